"""What `--model` says, as the services' setting `COLLAGE_MODELS`."""

from pathlib import Path

from services.common.registry import MODELS_FILE_SUFFIXES


def models_setting(model: str) -> str:
    """The setting for one model (folder or hub id, named after its last part) or a models.yaml; "" stays empty."""
    if not model or Path(model).suffix in MODELS_FILE_SUFFIXES:
        return model
    return f"{Path(model).name}={model}"
