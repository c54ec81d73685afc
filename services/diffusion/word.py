"""Learned words: vectors that stand in a text where tokens stand, and their files.

Main type: `Word` (textual inversion, Gal et al. 2022). Files are safetensors in the forms that diffusers and A1111
exchange: with one text encoder they hold one tensor, named after the token that stands for the word; with two, one
tensor each. Files made elsewhere are foreign: sizes are capped and values looked at; nothing is ever unpickled.
Suffixes: V vectors, D width of a text encoder's token embeddings.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from services.common.limits import MAX_VECTORS
from services.common.weights import NotAModel, tensors_in

# Eight vectors for two text encoders are 64 KiB; files made elsewhere carry training notes.
MAX_FILE_BYTES = 4 * 1024 * 1024
# Largest value of a vector that is believed: text encoders' own lie below 1 or so.
MAX_VALUE = 1e4
# The names of a file's tensors for models with two text encoders, in the encoders' order, as files everywhere have it;
# and as diffusers' script for SDXL with LoRA writes them.
_ENCODERS = ("clip_l", "clip_g")
_NUMBERED = ("text_encoders_0", "text_encoders_1")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class InvalidWord(Exception):
    """Bytes that are no word for this model: what they are, and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Word:
    """A learned word: for each text encoder its vectors [V, D], float32, the same V."""

    vectors: tuple[Tensor, ...]

    def __len__(self) -> int:
        """V."""
        return len(self.vectors[0])

    def weighted(self, weight: float) -> "Word":
        """The word with its vectors multiplied."""
        return Word(vectors=tuple(weight * vectors_VD for vectors_VD in self.vectors))

    def to_bytes(self, digest: str) -> bytes:
        """The word's file; equal vectors of one digest give equal bytes.

        Args:
            digest: of what the word was made from, hex; its first eight digits name the token.
        """
        names = _ENCODERS if len(self.vectors) > 1 else (f"<{digest[:8]}>",)
        named = zip(names, self.vectors, strict=True)
        file: bytes = save({name: value.float().contiguous() for name, value in named})
        return file

    @classmethod
    def from_bytes(cls, data: bytes, widths: Sequence[int]) -> "Word":
        """The word of a safetensors file.

        Args:
            data: at most MAX_FILE_BYTES. For one text encoder it holds one tensor of any name, [V, D] or [D], for two
                `clip_l` and `clip_g`.
            widths: D of each text encoder.

        Raises:
            InvalidWord: not safetensors, or not vectors for these text encoders.
        """
        try:
            tensors_in(io.BytesIO(data), len(data))
            tensors = load(data)
        # What the head's own check lets pass.
        except (NotAModel, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            problem = (
                str(error) if isinstance(error, NotAModel) else f"is no safetensors file: {error}"
            )
            raise InvalidWord(problem) from error
        named = zip(_by_encoder(tensors, len(widths)), widths, strict=True)
        word = cls(vectors=tuple(_checked(name, tensor, width) for (name, tensor), width in named))
        if len({len(vectors_VD) for vectors_VD in word.vectors}) > 1:
            raise InvalidWord("holds another number of vectors for each text encoder")
        return word


def _by_encoder(tensors: Mapping[str, Tensor], encoders: int) -> Sequence[tuple[str, Tensor]]:
    """Name and tensor for each text encoder."""
    is_lone = encoders == 1
    pair = _NUMBERED if set(tensors) == set(_NUMBERED) else _ENCODERS
    names = tuple(tensors) if is_lone else pair
    if len(names) != 1 if is_lone else set(tensors) != set(names):
        needed = "one tensor" if is_lone else f"the tensors {' and '.join(_ENCODERS)}"
        held = ", ".join(sorted(tensors)[:8]) or "no tensor"
        raise InvalidWord(f"holds {held}; this model takes {needed}")
    return [(name, tensors[name]) for name in names]


def _checked(name: str, tensor: Tensor, width: int) -> Tensor:
    """One tensor as VD."""
    shape = " x ".join(map(str, tensor.shape)) or "a single number"
    is_shaped = tensor.ndim in (1, 2) and tensor.shape[-1] == width
    if tensor.dtype not in _DTYPES or not is_shaped:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise InvalidWord(
            f"holds {name} as {dtype} of shape {shape}; this model takes floating point of shape "
            f"vectors x {width}, the width of its text encoder"
        )
    vectors_VD = tensor.reshape(-1, width).float()
    if not 1 <= len(vectors_VD) <= MAX_VECTORS:
        raise InvalidWord(f"holds {len(vectors_VD)} vectors; allowed: 1 to {MAX_VECTORS}")
    if not bool(vectors_VD.isfinite().all()) or float(vectors_VD.abs().max()) > MAX_VALUE:
        raise InvalidWord(f"holds values in {name} that are not finite, or beyond {MAX_VALUE:g}")
    return vectors_VD
