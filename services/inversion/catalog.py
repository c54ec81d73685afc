"""Which models words can be learned for here, by name; each is loaded with the first word that needs it, and stays.

Main type: `Catalog`. The setting, the names and the digests are the generator's, so a word learned for a model here is
a word for the model of that name there. This module knows no job.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from services.common.errors import InvalidRequest, NotSupported, quote
from services.common.hub import locate
from services.common.models_file import ModelSource, read_sources
from services.common.settings import InvalidSetting
from services.common.weights import ModelError, digest
from services.inversion.networks import (
    ModelFacts,
    Networks,
    UnsupportedModel,
    load,
    read_facts,
    read_widths,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelCard:
    """One served model. `digest` is over the folder's files. Facts, or why no word can be learned for it.

    widths: of a word's vectors, by the name of their text encoder; words made elsewhere can be taken in for any model.
    device: as the operator names it, empty for a GPU where there is one.
    """

    name: str
    folder: Path
    digest: str
    facts: ModelFacts | UnsupportedModel
    widths: dict[str, int]
    device: str

    @classmethod
    def read(cls, source: ModelSource) -> "ModelCard":
        """The card of a served model. Hashes the weights: seconds for a large model.

        Raises:
            ModelError: no model.
        """
        folder = locate(source.source)
        try:
            facts: ModelFacts | UnsupportedModel = read_facts(folder)
        except UnsupportedModel as error:
            # The generator may well run it: only its words are refused.
            facts = error
        return cls(
            name=source.name,
            folder=folder,
            digest=digest(folder),
            facts=facts,
            widths=read_widths(folder),
            device=source.device,
        )

    @property
    def known(self) -> ModelFacts:
        """The facts.

        Raises:
            NotSupported: no word can be learned for this model.
        """
        if isinstance(self.facts, UnsupportedModel):
            raise NotSupported(
                f"no word can be learned for model {self.name!r}: {self.facts}",
                reason="WORDS_NOT_SUPPORTED",
            )
        return self.facts


class Catalog:
    """The served models, the first being the default, and those of them that are in memory."""

    def __init__(self, cards: Mapping[str, ModelCard]) -> None:
        assert cards, "there is at least one model"
        self._cards = dict(cards)
        self._loaded: dict[str, Networks] = {}

    @classmethod
    def read(cls, models: str) -> "Catalog":
        """The catalog of a setting, see `read_sources`.

        Raises:
            InvalidSetting: naming the entry that does not parse, stands twice, or is no model.
        """
        cards: dict[str, ModelCard] = {}
        for source in read_sources(models):
            try:
                cards[source.name] = ModelCard.read(source)
            except ModelError as error:
                raise InvalidSetting(f"models: {source.name}: {error}") from error
        return cls(cards)

    def find(self, name: str) -> ModelCard:
        """The model of that name, the default for an empty one.

        Raises:
            InvalidRequest: naming what is served.
        """
        if not name:
            return next(iter(self._cards.values()))
        if name not in self._cards:
            raise InvalidRequest.of(
                "model",
                f"is {quote(name)}; allowed: {', '.join(self._cards)}",
                reason="UNKNOWN_MODEL",
            )
        return self._cards[name]

    def networks(self, card: ModelCard) -> Networks:
        """The model in memory, in the precision of `dtype_on`."""
        if card.name not in self._loaded:
            device = torch.device(card.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self._loaded[card.name] = load(card.folder, dtype=dtype_on(device), device=device)
        return self._loaded[card.name]


def dtype_on(device: torch.device) -> torch.dtype:
    """What words are learned in: half precision on a GPU that has bfloat16, else single.

    The operator's dtype is for drawing: in float16 the gradients of late timesteps would vanish.
    """
    has_half = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_half else torch.float32
