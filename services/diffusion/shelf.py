"""The models in memory: loaded with their first use, within a budget, those used least recently giving way.

Main type: `Shelf`. Both who draws and who learns keep their models on one.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from prometheus_client import Counter, Gauge

from services.common.telemetry import log
from services.diffusion.catalog import ModelCard
from services.diffusion.memory import give_back

LOADS = Counter("collage_model_loads_total", "Models loaded", ["model"])
LOADED_BYTES = Gauge("collage_loaded_bytes", "Weights in memory", ["device"])

Card = TypeVar("Card", bound=ModelCard)
Model = TypeVar("Model")


class Shelf(Generic[Card, Model]):
    """Models in memory by their cards; may be used from several threads.

    Args:
        load: puts a model on its card's device.
        memory_bytes: what the weights may take on each device. Every model fits by itself, see `Catalog.check_memory`.
    """

    def __init__(self, load: Callable[[Card], Model], *, memory_bytes: float = math.inf) -> None:
        self._load = load
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        # The one used last stands last.
        self._held: dict[str, tuple[Card, Model]] = {}
        # Of those that are being loaded.
        self._coming: dict[str, Card] = {}

    @property
    def names(self) -> frozenset[str]:
        """The models in memory."""
        with self._lock:
            return frozenset(self._held)

    def take(self, card: Card) -> Model:
        """The model, loaded in its turn where it is not held: those used least recently give way to it.

        Raises:
            ModelError: it cannot be loaded.
        """
        with self._lock:
            if card.name in self._held:
                # At the end again.
                self._held[card.name] = self._held.pop(card.name)
                return self._held[card.name][1]
        self.make_room(card)
        return self.load(card)

    def has_room(self, card: Card) -> bool:
        """Whether a model fits beside those that are in memory or on their way."""
        with self._lock:
            return self._taken_bytes(card) + card.weights_bytes <= self._memory_bytes

    def make_room(self, card: Card) -> None:
        """Unloads, on the card's device, the models used least recently until this one fits."""
        while not self.has_room(card):
            with self._lock:
                beside = (each for each, _ in self._held.values() if each.device == card.device)
                if (other := next(beside, None)) is None:
                    return
                del self._held[other.name]
            give_back()
            LOADED_BYTES.labels(str(card.device)).dec(other.weights_bytes)
            log.info("model unloaded", model=other.name, to_make_room_for=card.name)

    def load(self, card: Card) -> Model:
        """Loads a model and holds it; from the call on its memory counts as taken.

        Raises:
            ModelError: it cannot be loaded.
        """
        start_s = time.monotonic()
        with self._lock:
            self._coming[card.name] = card
        try:
            model = self._load(card)
            with self._lock:
                self._held[card.name] = card, model
        finally:
            with self._lock:
                del self._coming[card.name]
        LOADS.labels(card.name).inc()
        LOADED_BYTES.labels(str(card.device)).inc(card.weights_bytes)
        log.info("model loaded", model=card.name, seconds=round(time.monotonic() - start_s, 2))
        return model

    def _taken_bytes(self, card: Card) -> int:
        """What all other models take on the card's device."""
        others = (*(each for each, _ in self._held.values()), *self._coming.values())
        return sum(
            each.weights_bytes
            for each in others
            if each.device == card.device and each.name != card.name
        )
