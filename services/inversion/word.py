"""Word files: vectors as safetensors, in the forms that diffusers and A1111 exchange.

Main functions: `to_file` and `from_file`. With one text encoder a file holds one tensor, named after the token that
stands for the word; diffusers' `load_textual_inversion` adds that token, or one for each vector. Files made elsewhere
are foreign: sizes are capped and values looked at. Nothing is ever unpickled. This module knows no model.
"""

import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from services.common.limits import MAX_VECTORS
from services.inversion.networks import ONE

# Eight vectors for two text encoders are 64 KiB; files made elsewhere carry training notes.
MAX_FILE_BYTES = 4 * 1024 * 1024
# Largest value of a vector that is believed: text encoders' own lie below 1 or so.
MAX_VALUE = 1e4
# The first bytes of what torch.save writes: a zip, or a pickle of protocol 2 and up.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class InvalidWord(Exception):
    """Bytes that are no word for this model: what they are, and what is allowed."""


def to_file(vectors: Mapping[str, Tensor], digest: str) -> bytes:
    """The file of a word; equal vectors of one digest give equal bytes.

    Args:
        vectors: [V, D] in single precision, by encoder name.
        digest: of what the word was made from; its first eight digits name the token.
    """
    token = f"<{digest[:8]}>"
    named = {token if name == ONE else name: value for name, value in vectors.items()}
    file: bytes = save({name: value.float().contiguous() for name, value in named.items()})
    return file


def from_file(data: bytes, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The vectors of a file, [V, D] in single precision, by encoder name.

    Args:
        data: at most MAX_FILE_BYTES.
        widths: of the model's text encoders, by name.

    Raises:
        InvalidWord: not safetensors, or not vectors for such text encoders.
    """
    if data.startswith(_PICKLES):
        raise InvalidWord(
            "is a pickled file (.pt or .bin), which may run any code when it is read; allowed: "
            "safetensors only, so convert it where you trust it"
        )
    try:
        tensors = load(data)
    except (
        SafetensorError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        json.JSONDecodeError,
    ) as error:
        raise InvalidWord(f"is no safetensors file: {error}") from error
    is_lone = list(widths) == [ONE]
    found = {ONE: next(iter(tensors.values()))} if is_lone and len(tensors) == 1 else tensors
    if sorted(found) != sorted(widths):
        needed = "one tensor" if is_lone else f"tensors {', '.join(sorted(widths))}"
        names = ", ".join(sorted(tensors)[:8]) or "none"
        raise InvalidWord(f"holds the tensors {names}; this model takes {needed}")
    vectors = {name: _checked(value, widths[name]) for name, value in found.items()}
    if len({len(value) for value in vectors.values()}) > 1:
        raise InvalidWord("holds another number of vectors for each text encoder")
    return vectors


def _checked(value: Tensor, width: int) -> Tensor:
    """One tensor as VD."""
    shape = " x ".join(map(str, value.shape)) or "a single number"
    if value.dtype not in _DTYPES or value.ndim not in (1, 2):
        raise InvalidWord(f"holds {value.dtype} of shape {shape}; allowed: [vectors, {width}]")
    if value.shape[-1] != width:
        raise InvalidWord(
            f"holds vectors of width {value.shape[-1]}; this model's text encoder takes {width}"
        )
    value_VD = value.reshape(-1, width).float()
    if not 1 <= len(value_VD) <= MAX_VECTORS:
        raise InvalidWord(f"holds {len(value_VD)} vectors; allowed: 1 to {MAX_VECTORS}")
    if not bool(value_VD.isfinite().all()) or float(value_VD.abs().max()) > MAX_VALUE:
        raise InvalidWord(f"holds values that are not finite, or beyond {MAX_VALUE:g}")
    return value_VD
