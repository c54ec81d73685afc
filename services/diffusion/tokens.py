"""A text as text encoders take it, with places for learned words.

Main type: `Tokens`; `services.diffusion.facts` makes them with a model's tokenizers. This module knows no model.
Suffixes: E text encoders, T text positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A text as the text encoders take it: begin, the text's tokens, end, padding.

    ids_ET: for each text encoder the token ids, T = the encoders' window; they differ in the padding only. spans: for
    each of the text's own tokens, which start at position 1, the half-open range of characters it stands for; None
    where a learned vector stands for none. words: for each learned word the positions of its vectors.
    """

    ids_ET: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int] | None, ...]
    words: tuple[tuple[int, ...], ...] = ()

    def of_characters(self, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens that overlap characters start..end (half-open)."""
        return tuple(
            position
            for position, span in enumerate(self.spans, start=1)
            if span is not None and span[0] < end and start < span[1]
        )

    def insert(self, words: Sequence[tuple[int, int]]) -> "Tokens":
        """The same text with places for learned words, which must fit; the padding gives way.

        Args:
            words: for each word the character it stands before and how many vectors it has. It comes directly before
                the token of that character, or at the text's end; words of one place keep their order.
        """
        end = len(self.spans)
        places = [
            next((i for i, span in enumerate(self.spans) if span and span[1] > start), end)
            for start, _ in words
        ]
        # Where each position's id comes from. A vector's place gets the begin mark's: any would do that is not the end
        # mark's, by which text encoders find where to pool.
        sources = [0]
        spans: list[tuple[int, int] | None] = []
        found: list[tuple[int, ...]] = [()] * len(words)
        for index in range(end + 1):
            for word, (_, count) in enumerate(words):
                if places[word] == index:
                    found[word] = tuple(range(len(sources), len(sources) + count))
                    sources += [0] * count
                    spans += [None] * count
            if index < end:
                sources.append(index + 1)
                spans.append(self.spans[index])
        window = len(self.ids_ET[0])
        sources += range(end + 1, window + end - len(spans))
        assert len(sources) == window and len(spans) < window - 1, "the words do not fit"
        return Tokens(
            ids_ET=tuple(tuple(ids_T[source] for source in sources) for ids_T in self.ids_ET),
            spans=tuple(spans),
            words=tuple(found),
        )


class TextTooLong(Exception):
    """A text of more tokens, vectors of learned words among them, than the text encoder's window holds."""

    def __init__(self, *, tokens: int, limit: int, learned: int = 0) -> None:
        counted = f" with {learned} of learned words" if learned else ""
        super().__init__(
            f"is {tokens} tokens long{counted}, {tokens - limit} more than the {limit} "
            "the model reads"
        )
        self.tokens = tokens
        self.limit = limit
