"""The models in memory: loaded with their first use, within a budget, those used least recently giving way.

Main type: `Shelf`. Both who draws and who learns keep their models on one; a shelf belongs to the thread that owns the
device.
"""

import math
import time
from collections.abc import Callable, Container
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
    """Models in memory by their cards.

    Args:
        load: puts a model on its card's device.
        memory_bytes: what the weights may take on each device. Every model fits by itself, see `Catalog.check_memory`.
    """

    def __init__(self, load: Callable[[Card], Model], *, memory_bytes: float = math.inf) -> None:
        self._load = load
        self._memory_bytes = memory_bytes
        # The one used last stands last.
        self._held: dict[str, tuple[Card, Model]] = {}

    def take(self, card: Card, *, in_use: Container[str] = ()) -> Model:
        """The model, loaded where it is not held.

        Args:
            card: the model's.
            in_use: names of models that do not give way, though the budget be overrun for it.

        Raises:
            ModelError: it cannot be loaded.
        """
        if card.name in self._held:
            # At the end again.
            self._held[card.name] = self._held.pop(card.name)
            return self._held[card.name][1]
        self._make_room(card, in_use)
        start_s = time.monotonic()
        model = self._load(card)
        self._held[card.name] = card, model
        LOADS.labels(card.name).inc()
        LOADED_BYTES.labels(str(card.device)).inc(card.weights_bytes)
        log.info("model loaded", model=card.name, seconds=round(time.monotonic() - start_s, 2))
        return model

    def _make_room(self, card: Card, in_use: Container[str]) -> None:
        """Unloads, on the card's device, the models used least recently until this one fits."""
        beside = [other for other, _ in self._held.values() if other.device == card.device]
        taken_bytes = sum(other.weights_bytes for other in beside)
        for other in beside:
            if taken_bytes + card.weights_bytes <= self._memory_bytes:
                return
            if other.name in in_use:
                continue
            del self._held[other.name]
            give_back()
            taken_bytes -= other.weights_bytes
            LOADED_BYTES.labels(str(card.device)).dec(other.weights_bytes)
            log.info("model unloaded", model=other.name, to_make_room_for=card.name)
