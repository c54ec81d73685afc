"""What a model is made of on disk: its files, their digest, and what their heads say of the weights in them.

Main functions: `find`, the files that hold a network's weights, and `tensors`, what a safetensors file holds. Both read
heads only and hold them to the file: what is no safetensors file, or a part of one, is told for what it is before
anything is loaded. No torch is needed.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

# What a model is made of in diffusers format, and a ControlNet, and an adapter: what is fetched from a hub, and what a
# digest covers.
NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")
_PARTS = ("scheduler", "tokenizer", "tokenizer_2", *NETWORKS)
MODEL_FILES = (
    "model_index.json",
    *(f"{part}/{kind}" for part in _PARTS for kind in ("*.json", "*.txt", "*.safetensors")),
)
CONTROLNET_FILES = ("*.json", "*.safetensors")
ADAPTER_FILES = ("*.safetensors", "adapter_config.json")
# What a file of weights is called in a network's folder: by transformers, whose text encoders are, and by diffusers.
_TEXT_STEM, _STEM = "model", "diffusion_pytorch_model"
# Variants of a network that is not there plainly, in the order in which they take its place; any other comes after.
VARIANTS = ("fp32", "fp16", "bf16")
# Second copies of the same weights, which are fetched from a hub only where there is no first.
SECOND_COPIES = tuple(f"*.{variant}[.-]*" for variant in (*VARIANTS, "non_ema"))

# The safetensors library takes no longer head either.
_MAX_HEAD_BYTES = 100_000_000
# Bits of a value, by the name of its dtype.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# What stands in a file's place where it was not fetched itself.
_POINTER = b"version https://git-lfs.github.com/spec/"
# How a file begins that is something else. What torch.save writes is a zip, or a pickle of protocol 2 and up.
_OTHERS = {
    _POINTER: "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    **dict.fromkeys(
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "is a pickled file (.pt, .bin or .ckpt), which may run any code when it is read; allowed: "
        "safetensors only, so convert it where you trust it",
    ),
    b"GGUF": "is a GGUF file; allowed: safetensors only",
    b"<!DOCTYPE": "is a web page: the download went wrong",
    b"<html": "is a web page: the download went wrong",
}
_MOST_OF_A_START = max(map(len, _OTHERS))
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
# What a whole model in one file ends in.
LONE_FILES = (".safetensors", ".ckpt", ".pt", ".gguf")


class ModelError(Exception):
    """A model that cannot be loaded."""


class NotAModel(ModelError):
    """The folder does not hold a whole diffusers model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of one network on disk. variant: what its files are called after ("fp16"), None for plain ones.

    shapes: of its tensors, by name.
    """

    variant: str | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def count(self) -> int:
        """How many numbers they are."""
        return sum(map(math.prod, self.shapes.values()))


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


def find_all(model: Path) -> dict[str, Weights]:
    """The weights of a model's networks, by part; see `find`."""
    return {part: find(model / part) for part in NETWORKS if (model / part).is_dir()}


def find(folder: Path) -> Weights:
    """The weights of one network: the plain ones, in one file or in shards; a variant where there are none.

    Args:
        folder: the network's own, a part of a model or a ControlNet.

    Raises:
        NotAModel: there are none, or a file of them is not whole, is missing or is something else.
    """
    stem, names = _stem(folder), _names(folder)
    variants = _variants(stem, names)
    if not variants:
        raise NotAModel(_told_without(folder, stem, names))
    variant = min(variants, key=_rank)
    ending = f".{variant}" if variant else ""
    lone, index = f"{stem}{ending}.safetensors", f"{stem}.safetensors.index{ending}.json"
    # As each library looks for its own.
    is_lone = lone in names and (stem == _TEXT_STEM or index not in names)
    shapes = tensors(folder / lone) if is_lone else _in_shards(folder / index)
    return Weights(variant=variant, shapes=shapes)


def without_weights(folder: Path, files: Sequence[str] = MODEL_FILES) -> list[str]:
    """Which parts of what was fetched so have a config and no weights; "" for a ControlNet itself."""
    parts = {MODEL_FILES: NETWORKS, CONTROLNET_FILES: ("",)}.get(tuple(files), ())
    there = [part for part in parts if (folder / part / "config.json").is_file()]
    return [part for part in there if not _variants(_stem(folder / part), _names(folder / part))]


def _stem(folder: Path) -> str:
    return _TEXT_STEM if folder.name.startswith("text_encoder") else _STEM


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise NotAModel(f"{folder.name}: cannot be read: {error.strerror}") from error


def _variants(stem: str, names: Sequence[str]) -> set[str | None]:
    """The variants that a network's files have, None for plain ones; empty where none of them holds weights."""
    known = re.compile(
        rf"{stem}(?:\.([^.]+))?\.safetensors|{stem}\.safetensors\.index(?:\.([^.]+))?\.json"
    )
    matches = filter(None, map(known.fullmatch, names))
    return {match[1] or match[2] for match in matches}


def _rank(variant: str | None) -> tuple[int, str]:
    if variant is None:
        return -1, ""
    return VARIANTS.index(variant) if variant in VARIANTS else len(VARIANTS), variant


def _told_without(folder: Path, stem: str, names: Sequence[str]) -> str:
    """What is said of a network's folder without weights that could be read."""
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        return (
            f"{folder.name}: its weights are pickled ({', '.join(pickled[:3])}), which may run any code when they are "
            "read; allowed: safetensors only, so convert them where you trust them, with "
            "DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    held = ", ".join(names[:5]) or "nothing"
    return (
        f"{folder.name}: has no weights: no {stem}.safetensors, no variant of it ({stem}.fp16.safetensors) and no "
        f"{stem}.safetensors.index.json; it holds {held}"
    )


def _in_shards(index: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in all files that an index names."""
    where = f"{index.parent.name}/{index.name}"
    try:
        content = index.read_bytes()
        places = json.loads(content)["weight_map"]
        if not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("its weight_map names no file")
    except OSError as error:
        raise NotAModel(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotAModel(
            f"{where} {other_kind(content) or f'is no index of shards: {error}'}"
        ) from error
    shapes: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or not (index.parent / name).exists():
            raise NotAModel(f"{where} names {name}, which is not there")
        shapes |= tensors(index.parent / name)
    if missing := sorted(set(places) - set(shapes)):
        raise NotAModel(f"{where} names {missing[0]}, which {places[missing[0]]} does not hold")
    return shapes


def tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file by name; reads its head only, and holds it to the file's size.

    Raises:
        NotAModel: it is no safetensors file, or not a whole one.
    """
    where = f"{file.parent.name}/{file.name}"
    # What is read from a pipe never ends.
    if file.exists() and not file.is_file():
        raise NotAModel(f"{where} is no plain file")
    try:
        with file.open("rb") as opened:
            return tensors_in(opened, file.stat().st_size)
    except OSError as error:
        raise NotAModel(f"{where} cannot be read: {error.strerror}") from error
    except NotAModel as error:
        raise NotAModel(f"{where} {error}") from error


def tensors_in(opened: BinaryIO, size: int) -> dict[str, tuple[int, ...]]:
    """The same of an open file of so many bytes; what is wrong is told without its name."""
    start = opened.read(_MOST_OF_A_START)
    if not start:
        raise NotAModel("is empty")
    if other := other_kind(start):
        raise NotAModel(other)
    head_bytes = int.from_bytes(start[:8], "little")
    if size < 8 or head_bytes > _MAX_HEAD_BYTES or start[8:9] not in (b"{", b""):
        raise NotAModel("is no safetensors file: it does not begin as one")
    if size < 8 + head_bytes:
        raise NotAModel(f"is cut short: holds {size} of more than {8 + head_bytes} bytes")
    opened.seek(8)
    try:
        head = json.loads(opened.read(head_bytes))
        spans = sorted(_span(name, each) for name, each in head.items() if name != "__metadata__")
        shapes = {name: tuple(head[name]["shape"]) for _, _, name in spans}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise NotAModel(f"is no safetensors file: its head is not what one is: {error}") from error
    end = 0
    for first, last, name in spans:
        if first != end:
            problem = "begins within the one before" if first < end else "begins after a gap"
            raise NotAModel(f"is no safetensors file: its head lies: {name} {problem}")
        end = last
    whole = 8 + head_bytes + end
    if size != whole:
        problem = "is cut short: holds" if size < whole else "is no safetensors file: holds"
        raise NotAModel(f"{problem} {size} of {whole} bytes")
    return shapes


def other_kind(start: bytes) -> str | None:
    """What a file is that begins so, as far as it is known to be something else than it should be."""
    return next((told for sign, told in _OTHERS.items() if start.startswith(sign)), None)


def _span(name: str, tensor: Mapping[str, Any]) -> tuple[int, int, str]:
    """Where a tensor's bytes begin and end.

    Raises:
        ValueError: not as many as its shape and dtype take.
    """
    dtype, shape, (first, last) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if dtype not in _BITS:
        raise ValueError(f"{name} is of dtype {dtype!r}, which is not known")
    if not all(type(each) is int and each >= 0 for each in (first, last, *shape)):
        raise ValueError(f"{name} has a shape or place that is none")
    if (last - first) * 8 != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{name} has {last - first} bytes, which its shape and dtype do not take")
    return first, last, name


def told_of_file(file: Path) -> str:
    """What is said of a lone file where a folder in diffusers format is wanted: what it is, and how to convert it."""
    kind, what = "StableDiffusionPipeline", "a checkpoint in one file"
    if file.suffix in PICKLED:
        what = f"a pickled {what}, which may run any code when it is read"
    else:
        try:
            names = tensors(file)
        except NotAModel as error:
            return f"{error}; and a model is a folder in diffusers format"
        kind, what = next(
            ((kind, what) for sign, kind, what in _SINGLES if any(sign in name for name in names)),
            ("", "in none of the known forms"),
        )
    told = f"{file}: is a single file, {what}; required: a folder in diffusers format"
    if not kind:
        return told
    return (
        f"{told}, which diffusers makes of it where you trust it: "
        f"{kind}.from_single_file({str(file)!r}).save_pretrained({file.stem!r})"
    )


# What a lone file is, by a part of its tensors' names: which class of diffusers reads it, if any. The first counts.
_SINGLES = (
    ("lora_", "", "an adapter (LoRA), which belongs among a model's adapters"),
    ("control_model.", "ControlNetModel", "a ControlNet's checkpoint"),
    ("input_hint_block.", "ControlNetModel", "a ControlNet's checkpoint"),
    ("conditioner.embedders.1.", "StableDiffusionXLPipeline", "an SDXL checkpoint"),
    ("model.diffusion_model.", "StableDiffusionPipeline", "a checkpoint of a whole model"),
    ("first_stage_model.", "AutoencoderKL", "an autoencoder alone"),
    ("controlnet_cond_embedding.", "", "a ControlNet without its folder"),
    ("down_blocks.", "", "a network without its folder"),
)


def _all(folder: Path, patterns: Sequence[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern)}
