"""What `--model` says: the services' setting `COLLAGE_MODELS`, and the files it stands for."""

from pathlib import Path

from services.common.models_file import MODELS_FILE_SUFFIXES, read_detectors, read_sources


def models_setting(model: str) -> str:
    """The setting for one model (folder or hub id, named after its last part) or a models.yaml; "" stays empty."""
    if not model or Path(model).suffix in MODELS_FILE_SUFFIXES:
        return model
    return f"{Path(model).name}={model}"


def model_files(model: str) -> list[Path]:
    """The files and folders that models are read from, with models.yaml. What a hub id names does not change."""
    models = models_setting(model)
    found = [Path(model)] if models == model and model else []
    for source in read_sources(models):
        parts = (source.source, *source.controlnets.values(), *source.adapters.values())
        found += [Path(part) for part in parts if isinstance(part, Path) or Path(part).exists()]
    found += [detector.file for detector in read_detectors(models)]
    inside = [each for path in found if path.is_dir() for each in path.rglob("*")]
    return [path.absolute() for path in (*found, *inside)]
