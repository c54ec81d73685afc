"""What a model is made of on disk: its files, their digest, and how many numbers they hold.

Files are hashed and their heads read; nothing is loaded, so that no torch is needed.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

# What a model is made of in diffusers format, and a ControlNet, and an adapter: what is fetched from a hub, and what a
# digest covers.
_PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae")
MODEL_FILES = (
    "model_index.json",
    *(f"{part}/{kind}" for part in _PARTS for kind in ("*.json", "*.txt", "*.safetensors")),
)
CONTROLNET_FILES = ("config.json", "*.safetensors")
ADAPTER_FILES = ("*.safetensors",)
# Second copies of the same weights, which from_pretrained would not read.
SECOND_COPIES = ("*.fp16.*", "*.non_ema.*")

# The safetensors library takes no longer one either.
_MAX_HEAD_BYTES = 100_000_000


class ModelError(Exception):
    """A model that cannot be loaded."""


class NotAModel(ModelError):
    """The folder does not hold a whole diffusers model."""


def digest(folder: Path, files: Sequence[str] = MODEL_FILES) -> str:
    """sha256 over the sorted (relative name, sha256 of contents) of a folder's configs and weights, hex.

    Args:
        folder: of a model, or with `CONTROLNET_FILES` of a ControlNet.
        files: patterns of what counts.
    """
    whole = hashlib.sha256()
    for name in sorted(file.relative_to(folder).as_posix() for file in _all(folder, files)):
        whole.update(f"{name}\0{digest_file(folder / name)}\n".encode())
    return whole.hexdigest()


def digest_file(file: Path) -> str:
    """sha256 of a file's bytes, hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def weights(source: Path, files: Sequence[str] = MODEL_FILES) -> int:
    """How many numbers the weights in a folder, or in one safetensors file, are; reads the heads of files only.

    Raises:
        NotAModel: a file is no safetensors file.
    """
    found = _all(source, files) if source.is_dir() else {source}
    names = [file for file in found if file.suffix == ".safetensors"]
    copies = {file for pattern in SECOND_COPIES for file in names if file.match(pattern)}
    return sum(
        math.prod(shape)
        for file in names
        if file not in copies
        for shape in tensor_shapes(file).values()
    )


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file by name; reads its head only.

    Raises:
        NotAModel: it is no safetensors file.
    """
    try:
        with file.open("rb") as opened:
            head_bytes = int.from_bytes(opened.read(8), "little")
            if head_bytes > _MAX_HEAD_BYTES:
                raise ValueError("its head is too long")
            head = json.loads(opened.read(head_bytes))
        return {
            name: tuple(tensor["shape"]) for name, tensor in head.items() if name != "__metadata__"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise NotAModel(
            f"{file.parent.name}/{file.name} is no safetensors file: {error}"
        ) from error


def _all(folder: Path, patterns: Sequence[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern)}
