"""Which models are served, by name, and what is known of each before it is loaded.

Main types: `ModelCard` and `Catalog`. Who draws and who learns read the same setting, so names and digests are the same
there and here. This module knows no job and loads no weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from services.common.errors import InvalidRequest, quote
from services.common.models_file import ModelSource, read_sources
from services.common.settings import InvalidSetting
from services.common.telemetry import log
from services.common.weights import ModelError, find_all
from services.diffusion.facts import ModelFacts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelCard:
    """One served model, as whoever runs it describes it. `digest` is over all that its answers depend on.

    device: where its networks are once they are loaded. weights_bytes: memory that they take there.
    """

    name: str
    digest: str
    facts: ModelFacts
    device: torch.device
    weights_bytes: int


Card = TypeVar("Card", bound=ModelCard, covariant=True)


class Catalog(Generic[Card]):
    """The served models; the first is the default."""

    def __init__(self, cards: Mapping[str, Card]) -> None:
        assert cards, "at least one model is served"
        self._cards = dict(cards)

    @classmethod
    def read(cls, models: str, read_card: Callable[[ModelSource], Card]) -> "Catalog[Card]":
        """The catalog of a setting, see `read_sources`.

        Args:
            models: the setting.
            read_card: makes the card of one model. Hashes the weights: seconds for a large model.

        Raises:
            InvalidSetting: naming the entry that does not parse, stands twice, or is no usable model.
        """
        cards: dict[str, Card] = {}
        for source in read_sources(models):
            try:
                card = read_card(source)
            except ModelError as error:
                raise InvalidSetting(f"models: {source.name}: {error}") from error
            log.info(
                "model found",
                model=card.name,
                digest=card.digest,
                device=str(card.device),
                weights_mib=round(card.weights_bytes / 2**20, 1),
            )
            cards[source.name] = card
        return cls(cards)

    @property
    def cards(self) -> tuple[Card, ...]:
        """All models, the default first."""
        return tuple(self._cards.values())

    def check_memory(self, limit_bytes: float) -> None:
        """Refuses a limit that not every model keeps by itself.

        Raises:
            InvalidSetting: naming the model and what it needs.
        """
        for card in self.cards:
            if card.weights_bytes > limit_bytes:
                raise InvalidSetting(
                    f"models: {card.name}: its weights, with what else is served of it, take "
                    f"{card.weights_bytes / 2**30:.3g} GiB; COLLAGE_MODEL_MEMORY is {limit_bytes / 2**30:.3g}"
                )

    def find(self, name: str, *, field: str) -> Card:
        """The model of that name, the default for an empty one.

        Args:
            name: as a caller gave it.
            field: where it stands in the request.

        Raises:
            InvalidRequest: naming what is served.
        """
        if not name:
            return self.cards[0]
        if name not in self._cards:
            raise InvalidRequest.of(
                field,
                f"is {quote(name)}; allowed: {', '.join(self._cards)}",
                reason="UNKNOWN_MODEL",
            )
        return self._cards[name]


def weights_bytes(folder: Path, *, dtype: torch.dtype, vae_dtype: torch.dtype) -> int:
    """Memory of a model's networks in these dtypes; reads the heads of files only, and checks them.

    Raises:
        NotAModel: a network has no weights, or a file of them is not whole or no safetensors file.
    """
    return sum(
        each.count * (vae_dtype if part == "vae" else dtype).itemsize
        for part, each in find_all(folder).items()
    )
