"""The models an operator serves: where each one lies, and the digest of its files.

Main type: `ModelSource`. The generator draws with a model and the inversion service learns words for it, so both read
the same setting here. This module opens configs and hashes files; it knows no network and needs no torch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from services.common.settings import InvalidSetting

# The bundled model, beside the packages in the repository.
BUNDLED = Path(__file__).parents[2] / "models" / "mini" / "weights"
# What a folder in diffusers format is made of, besides model_index.json; this is what its digest covers.
_FILES = ("*/*.json", "*/*.txt", "*/*.safetensors")
_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
# What is fetched from a hub for a model, and for a ControlNet.
MODEL_FILES = ("model_index.json", *(f"{part}/{kind[2:]}" for part in _PARTS for kind in _FILES))
CONTROLNET_FILES = ("config.json", "*.safetensors")


class ModelError(Exception):
    """A model that cannot be loaded."""


class NotAModel(ModelError):
    """The folder does not hold a whole diffusers model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """One served model, as the operator names it.

    source: a folder in diffusers format, or a hub id `owner/name`. controlnets: by control kind ("canny"), folders or
    hub ids of ControlNets for it.
    """

    name: str
    source: str
    controlnets: Mapping[str, str] = field(default_factory=dict)


def read_sources(models: str) -> tuple[ModelSource, ...]:
    """The models of a setting, the default first.

    Args:
        models: `NAME=FOLDER` or `NAME=OWNER/NAME`, separated by commas; empty for the bundled model. A folder's
            subfolders `controlnet-KIND` are its ControlNets.

    Raises:
        InvalidSetting: naming the entry that does not parse or stands twice.
    """
    sources: dict[str, ModelSource] = {}
    for entry in (models or f"mini={BUNDLED}").split(","):
        name, _, source = (part.strip() for part in entry.partition("="))
        if not name or not source or name in sources:
            raise InvalidSetting(f"models: {entry!r} must be NAME=FOLDER, each name once")
        controlnets = {
            folder.name.removeprefix("controlnet-"): str(folder)
            for folder in sorted(Path(source).glob("controlnet-*"))
        }
        sources[name] = ModelSource(name=name, source=source, controlnets=controlnets)
    return tuple(sources.values())


def locate(source: str | Path, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model, fetched from the hub if it is no local one.

    Args:
        source: a folder, or a hub id `owner/name`.
        files: patterns of what is fetched.

    Raises:
        NotAModel: there is no such folder, and the hub does not know it either.
    """
    if Path(source).is_dir():
        return Path(source)
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts):
        raise NotAModel(f"{source}: no such folder, and not of the form owner/name")
    try:
        return Path(
            snapshot_download(
                str(source),
                allow_patterns=list(files),
                # Second copies of the same weights, which from_pretrained would not read.
                ignore_patterns=["*.fp16.*", "*.non_ema.*"],
            )
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise NotAModel(f"{source}: no such folder, and the hub says: {error}") from error


def digest(folder: Path) -> str:
    """sha256 over the sorted (relative name, sha256 of contents) of a folder's configs and weights, hex."""
    names = ["model_index.json"]
    for pattern in _FILES:
        names += [path.relative_to(folder).as_posix() for path in folder.glob(pattern)]
    whole = hashlib.sha256()
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
