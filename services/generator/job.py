"""What goes into the engine and what comes out: `Job`, the events of its stream, and the `Mailbox` between.

The mailbox carries events from the device's thread to the event loop of the caller. It knows no model and no schedule.
"""

import asyncio
import contextlib
import math
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.collage import Sampling
from services.common.plate import Plate
from services.generator.conditioning import LayerControl

# Unread previews a job may hold: one round of the most pictures a request may ask for. Older ones give way.
MAX_UNREAD_PREVIEWS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One request, checked.

    layers: in the plate's order. deadline_s: on the monotonic clock, inf for none. limit_s: seconds that the device may
    be at work on it, waiting and other jobs' steps apart.
    """

    plate: Plate
    prompt: str
    negative_prompt: str
    layers: tuple[LayerControl, ...]
    sampling: Sampling
    deadline_s: float
    limit_s: float = math.inf

    @property
    def has_emphasis(self) -> bool:
        """Whether guidance strengthens the structure of a layer."""
        return any(part.emphasis > 0 for layer in self.layers for part in layer.structures)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedAt:
    """Place in the queue, 1 for the next job, 0 when its work has begun."""

    place: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """Denoising steps done, 1 to `total`."""

    step: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreviewMade:
    """An estimate of picture `index` after `step` steps: a PNG of at most 256 pixels a side."""

    index: int
    step: int
    png: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageMade:
    """Picture `index`, finished: its bytes, and the same as uint8 sRGB."""

    index: int
    seed: int
    png: bytes
    pixels_HWC: NDArray[np.uint8]


Event = QueuedAt | StepDone | PreviewMade | ImageMade


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawPreview:
    """A preview before it is encoded."""

    index: int
    step: int
    pixels_HWC: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RawImage:
    """A picture before it is encoded."""

    index: int
    pixels_HWC: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ended:
    """The last item: the job is done, or `error` says why it never will be."""

    error: Exception | None = None


Item = QueuedAt | StepDone | RawPreview | RawImage | Ended


class Mailbox:
    """One job's items on their way from any thread to the event loop that made the mailbox.

    Never holds the writer up, and is bounded all the same: every step, place and picture of a job comes once, and of
    previews only the newest are kept.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()

    def post(self, item: Item) -> None:
        """Adds an item; called from any thread."""
        with self._lock:
            if isinstance(item, RawPreview):
                unread = [other for other in self._items if isinstance(other, RawPreview)]
                if len(unread) >= MAX_UNREAD_PREVIEWS:
                    self._items.remove(unread[0])
            self._items.append(item)
        # A loop that is closed has no reader any more, and its end must not be the writer's.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def get(self) -> Item:
        """The oldest item, as soon as there is one. One reader."""
        while True:
            with self._lock:
                if self._items:
                    return self._items.popleft()
                self._arrived.clear()
            await self._arrived.wait()
