"""Learned words: vectors that stand in the prompt where tokens stand, and belong to one request only.

Main types: `Word`, one word as its file has it, and `WordSlot`, by which a text encoder reads words it does not own.
Textual inversion (Gal et al. 2022). Files are foreign: sizes are capped and values looked at; nothing is unpickled.
Suffixes: V vectors, D width of a text encoder's token embeddings, B rows, T text positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from services.common.limits import MAX_VECTORS

# The names of a file's tensors for models with two text encoders, in the encoders' order, as files everywhere have it.
ENCODERS = ("clip_l", "clip_g")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class InvalidWord(Exception):
    """Bytes that are no word for this model: what they are, and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Word:
    """A learned word: for each text encoder its vectors [V, D], float32, the same V."""

    vectors: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        """V."""
        return len(self.vectors[0])

    def weighted(self, weight: float) -> "Word":
        """The word with its vectors multiplied."""
        return Word(vectors=tuple(weight * vectors_VD for vectors_VD in self.vectors))

    @classmethod
    def from_bytes(cls, data: bytes, widths: Sequence[int]) -> "Word":
        """The word of a safetensors file.

        Args:
            data: for one text encoder it holds one tensor of any name, [V, D] or [D], for two `clip_l` and `clip_g`.
            widths: D of each text encoder.

        Raises:
            InvalidWord: not safetensors, or not vectors for these text encoders.
        """
        try:
            tensors = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InvalidWord(f"is no safetensors file: {error}") from error
        word = cls(
            vectors=tuple(
                _checked(name, tensor, width)
                for (name, tensor), width in zip(
                    _by_encoder(tensors, len(widths)), widths, strict=True
                )
            )
        )
        if len({len(vectors_VD) for vectors_VD in word.vectors}) > 1:
            raise InvalidWord("holds another number of vectors for each text encoder")
        return word


class WordSlot:
    """Where a text encoder's token embedding finds the learned vectors of the call under way; empty between calls."""

    def __init__(self) -> None:
        self.positions: Sequence[int] = ()
        self.vectors_VD: torch.Tensor | None = None

    def install(self, embedding: torch.nn.Module) -> None:
        """Has the embedding of tokens put the slot's vectors at the slot's positions, in every row.

        With an empty slot it answers what it always did, bit for bit; its table is read and never written.
        """
        embedding.register_forward_hook(self._put)

    def _put(
        self, embedding: torch.nn.Module, args: Any, embedded_BTD: torch.Tensor
    ) -> torch.Tensor | None:
        if self.vectors_VD is None:
            return None
        embedded_BTD = embedded_BTD.clone()
        embedded_BTD[:, list(self.positions)] = self.vectors_VD.to(embedded_BTD)
        return embedded_BTD


def _by_encoder(
    tensors: Mapping[str, torch.Tensor], encoders: int
) -> Sequence[tuple[str, torch.Tensor]]:
    """Name and tensor for each text encoder."""
    names = tuple(tensors) if encoders == 1 else ENCODERS
    if len(names) != 1 if encoders == 1 else set(tensors) != set(names):
        needed = "one tensor" if encoders == 1 else f"the tensors {' and '.join(ENCODERS)}"
        held = ", ".join(sorted(tensors)[:8]) or "no tensor"
        raise InvalidWord(f"holds {held}; this model takes {needed}")
    return [(name, tensors[name]) for name in names]


def _checked(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    """One tensor as VD."""
    shape = " x ".join(map(str, tensor.shape)) or "a single number"
    dtype = str(tensor.dtype).removeprefix("torch.")
    is_shaped = tensor.ndim in (1, 2) and tensor.shape[-1] == width
    if tensor.dtype not in _DTYPES or not is_shaped:
        raise InvalidWord(
            f"holds {name} as {dtype} of shape {shape}; this model takes floating point of shape "
            f"vectors x {width}"
        )
    vectors_VD = tensor.reshape(-1, width).float()
    if not 1 <= len(vectors_VD) <= MAX_VECTORS:
        raise InvalidWord(f"holds {len(vectors_VD)} vectors; allowed: 1 to {MAX_VECTORS}")
    if not bool(vectors_VD.isfinite().all()):
        raise InvalidWord(f"holds values in {name} that are not finite")
    return vectors_VD
