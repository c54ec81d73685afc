"""What `--model` says: the services' setting `COLLAGE_MODELS`, and the files it stands for."""

from pathlib import Path

from services.common.models_file import is_models_file, read_cutouts, read_detectors, read_sources
from services.common.operator_file import HUB


def models_setting(model: str) -> str:
    """The setting for one model (a folder, or what `hub:` names) or a models.yaml; "" stays empty.

    It says the same in any working folder, and of a folder's name nothing is a separator.
    """
    if not model or model.startswith(HUB):
        return model
    return str(Path(model).absolute())


def model_files(model: str) -> list[Path]:
    """The files and folders that models are read from, with models.yaml. What a hub has does not change."""
    models = models_setting(model)
    found = [Path(model)] if is_models_file(models) else []
    for source in read_sources(models):
        parts = (source.source, *source.controlnets.values(), *source.adapters.values())
        found += [part for part in parts if isinstance(part, Path)]
    for each in (*read_detectors(models), *read_cutouts(models)):
        found += [each.file] if each.decoder is None else [each.file, each.decoder]
    inside = [each for path in found if path.is_dir() for each in path.rglob("*")]
    return [path.absolute() for path in (*found, *inside)]
