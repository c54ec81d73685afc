"""Texts on their way through a model's text encoders, learned words in the places of tokens.

Main types: `Text`, what goes in, `TextStates`, what the U-Net reads, and `TextEncoders`, which lie between.
Suffixes: B rows, T text positions, D text width, E text encoders, P width of the pooled text.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.diffusion.word import Word


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """One text on its way into the text encoders.

    ids_ET: for each text encoder the token ids, begin to padding. word: its learned word, None for none. positions:
    where each of the word's vectors stands in place of a token.
    """

    ids_ET: tuple[tuple[int, ...], ...]
    word: Word | None = None
    positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextStates:
    """Texts as the U-Net reads them: hidden states, and for SDXL the pooled text beside them, else None."""

    hidden_BTD: Tensor
    pooled_BP: Tensor | None = None

    @classmethod
    def cat(cls, states: Sequence["TextStates"]) -> "TextStates":
        """The rows of all, which are of one model."""
        pooled = [each.pooled_BP for each in states if each.pooled_BP is not None]
        return cls(
            hidden_BTD=torch.cat([each.hidden_BTD for each in states]),
            pooled_BP=torch.cat(pooled) if pooled else None,
        )

    def expand(self, rows: int) -> "TextStates":
        """The only row, `rows` times."""
        return TextStates(
            hidden_BTD=self.hidden_BTD.expand(rows, -1, -1),
            pooled_BP=None if self.pooled_BP is None else self.pooled_BP.expand(rows, -1),
        )

    def repeated(self, times: int) -> "TextStates":
        """Each row so many times, one after the other."""
        return TextStates(
            hidden_BTD=self.hidden_BTD.repeat_interleave(times, dim=0),
            pooled_BP=None
            if self.pooled_BP is None
            else self.pooled_BP.repeat_interleave(times, dim=0),
        )

    def rows(self, rows_R: slice | Tensor) -> "TextStates":
        """These rows of it."""
        return TextStates(
            hidden_BTD=self.hidden_BTD[rows_R],
            pooled_BP=None if self.pooled_BP is None else self.pooled_BP[rows_R],
        )

    def to(self, dtype: torch.dtype) -> "TextStates":
        """The same in another precision."""
        return TextStates(
            hidden_BTD=self.hidden_BTD.to(dtype),
            pooled_BP=None if self.pooled_BP is None else self.pooled_BP.to(dtype),
        )

    def zeros(self) -> "TextStates":
        """As many rows of nothing."""
        return TextStates(
            hidden_BTD=torch.zeros_like(self.hidden_BTD),
            pooled_BP=None if self.pooled_BP is None else torch.zeros_like(self.pooled_BP),
        )


class TextEncoders:
    """A model's text encoders: one, or two as SDXL has them (Podell et al. 2023)."""

    def __init__(self, encoders: Iterable[Any]) -> None:
        self._encoders = tuple(encoders)

    def encode(self, texts: Sequence[Text]) -> TextStates:
        """Texts as the U-Net reads them, a row each, in the encoders' own dtype.

        With one encoder that is its last hidden state; with two both last but one side by side, and what the second
        pools from its last. Gradients flow to the words' vectors where there are any; neither table nor encoder is
        changed.
        """
        is_lone = len(self._encoders) == 1
        hidden, pooled = [], None
        for number, encoder in enumerate(self._encoders):
            ids_BT = torch.tensor([text.ids_ET[number] for text in texts], device=encoder.device)
            with _in_place(encoder.get_input_embeddings(), texts, number):
                answer = encoder(ids_BT, output_hidden_states=not is_lone)
            hidden.append(answer[0] if is_lone else answer.hidden_states[-2])
            pooled = answer.text_embeds if number else None
        return TextStates(hidden_BTD=torch.cat(hidden, dim=-1), pooled_BP=pooled)


@contextlib.contextmanager
def _in_place(embedding: torch.nn.Module, texts: Sequence[Text], number: int) -> Iterator[None]:
    """Has the embedding of tokens answer the words' vectors where they stand, for one call."""
    put_in = [
        (row, text.positions, text.word.vectors[number])
        for row, text in enumerate(texts)
        if text.word is not None
    ]
    if not put_in:
        yield
        return
    rows = [row for row, positions, _ in put_in for _ in positions]
    places = [place for _, positions, _ in put_in for place in positions]
    vectors_VD = torch.cat([vectors_VD for *_, vectors_VD in put_in])

    def put(module: torch.nn.Module, args: Any, embedded_BTD: Tensor) -> Tensor:
        # A copy for this call: the table stays, and no gradient of its size comes into being.
        embedded_BTD = embedded_BTD.clone()
        embedded_BTD[rows, places] = vectors_VD.to(embedded_BTD)
        return embedded_BTD

    hook = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
