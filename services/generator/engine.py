"""The engine: jobs in, an async stream of events out.

Main type: `Engine`. It stands between the event loop, where callers are, and the `Runner`, which owns the device in a
thread of its own. It knows neither messages nor storage.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Generic

import numpy as np

from services.common.collage import Dials, Extent, Sampling
from services.common.errors import DeadlinePassed, DeviceLost, ModelUnusable
from services.common.pictures import encode_png
from services.common.plate import Plate
from services.common.settings import InvalidSetting
from services.diffusion.catalog import Catalog
from services.diffusion.pace import Call, Expected
from services.generator.card import Card, GeneratorCard
from services.generator.conditioning import LayerControl
from services.generator.job import (
    Ended,
    Event,
    ImageMade,
    Item,
    Job,
    Mailbox,
    PreviewMade,
    QueuedAt,
    RawImage,
    RawPreview,
    StepDone,
)
from services.generator.preview import encode_preview
from services.generator.runner import Runner
from services.generator.sampler import decoded_together
from services.generator.scheduler import Scheduler
from services.generator.stages import Stages

# Threads that write PNGs while the device goes on: a picture is encoded much faster than it is drawn.
PNG_THREADS = 2
# Steps of the warm-up: the first one pays for allocation and is then outweighed by the others.
WARM_UP_STEPS, SMALL_WARM_UP_STEPS = 6, 4
# A job hears its place again after so long, for as long as the device is at work and does not hang.
ALIVE_EVERY_S = 10.0
# Longest wait for a warm-up: a large model read from slow storage, then run on a CPU.
WARM_UP_LIMIT_S = 900.0


class Engine(Generic[Card]):
    """Generates pictures. For the arguments see `Runner`. max_rows: rows of one call that jobs may share."""

    def __init__(
        self,
        catalog: Catalog[Card],
        *,
        load: Callable[[Card], Stages],
        scheduler: Scheduler,
        threads: int,
        memory_bytes: float = math.inf,
    ) -> None:
        self.catalog = catalog
        self._threads = threads
        self.max_rows = scheduler.max_rows
        self._memory_bytes = memory_bytes
        self._runner = Runner(
            catalog, load=load, scheduler=scheduler, threads=threads, memory_bytes=memory_bytes
        )
        self._encoders = ThreadPoolExecutor(PNG_THREADS, thread_name_prefix="png")

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        """The job's events: places in the queue, steps, previews, then every picture in order.

        Between them its place again, now and then: who hears nothing has lost it. Closing the iterator, or cancelling
        the task that reads it, gives the job up within one step.

        Raises:
            Overloaded: the queue is full, or too long for the job's deadline.
            Unavailable: the engine is draining; DeviceLost: its device's thread has died.
            DeadlinePassed: the job's deadline passed first; reason TOO_LONG: it was drawn for longer than its limit.
            InvalidRequest: a prompt is too long.
            ModelUnusable: the model's files make none.
            Internal: the work failed; reason OUT_OF_MEMORY where it did not fit the device.
        """
        mailbox = Mailbox()
        job_id = self._runner.submit(job, mailbox)
        place = QueuedAt(place=0)
        try:
            while True:
                item = await self._next(job, mailbox) or place
                if isinstance(item, QueuedAt):
                    place = item
                if isinstance(item, Ended):
                    if item.error is not None:
                        raise item.error
                    return
                yield await self._encode(job, item)
        finally:
            self._runner.cancel(job_id)

    async def warm_up(self) -> None:
        """Loads the default model and draws with it, so that the first request finds all in place.

        A picture of the model's native size, the one most requests have, or the largest that the operator allows: its
        steps give the first estimate of seconds. And one of half its sides: how much faster that is tells what a larger
        one takes at least.

        Raises:
            InvalidSetting: its files make no model.
        """
        card, deadline_s = self.catalog.cards[0], time.monotonic() + WARM_UP_LIMIT_S
        native, multiple = card.facts.native, card.facts.size_multiple
        sides = [min(side, card.max_side) for side in (native.width, native.height)]
        halves = [max(card.min_side, side // 2 // multiple * multiple) for side in sides]
        whole, half = (Extent(width=width, height=height) for width, height in (sides, halves))
        try:
            for size, steps in {half: SMALL_WARM_UP_STEPS, whole: WARM_UP_STEPS}.items():
                job = _warm_up_job(card, size, steps=steps, deadline_s=deadline_s)
                async with contextlib.aclosing(self.generate(job)) as events:
                    async for _ in events:
                        pass
        except ModelUnusable as error:
            raise InvalidSetting(f"models: {error}") from error

    def expected(
        self,
        card: GeneratorCard,
        size: Extent,
        sampling: Sampling,
        *,
        steps: int,
        controlnets: int,
        has_emphasis: bool,
    ) -> Expected:
        """How long an idle device draws a request: encoding, so many steps, decoding; all 0 where it has not drawn yet.

        Learning, loading and waiting are not in it.
        """
        each = card.rows_a_picture(sampling, has_emphasis=has_emphasis)
        # Pictures of one call, see `Scheduler.together`.
        stepped = sampling.images
        if self.max_rows > 1:
            stepped = min(stepped, max(1, self.max_rows // each))
        # Of one part of the job, which is finished by itself.
        part = 1 if self.max_rows > 1 else sampling.images
        decoded = decoded_together(part, pixels=size.pixels)
        call = Call(
            model=card.name, work="encode", cells=size.pixels // card.facts.latent_factor**2
        )
        step = replace(call, work="step", rows=stepped * each, controlnets=controlnets)
        decode = replace(call, work="decode", rows=decoded)
        calls = math.ceil(sampling.images / stepped) * steps
        return (
            self._runner.expected(call)
            + self._runner.expected(step).times(calls)
            + self._runner.expected(decode).times(math.ceil(sampling.images / decoded))
        )

    def most_bytes(self, card: GeneratorCard) -> float:
        """What a request's work may take: half of what weights leave of the memory, as one is decoded beside another.

        Where no budget is set for weights, and all models together are large, they are believed to leave half.
        """
        whole = card.device_bytes
        beside = [each.weights_bytes for each in self.catalog.cards if each.device == card.device]
        budget = min(self._memory_bytes, whole / 2)
        return (whole - max(card.weights_bytes, min(sum(beside), budget))) / 2

    def arithmetic(self, card: GeneratorCard) -> str:
        """Names what decides a picture's last bits beside the request and the networks: equal here, equal bytes.

        Where jobs share calls, a picture's last bits are those of the company it had: it is found again, but only by a
        generator that draws so, too.
        """
        joint = f", {self.max_rows} rows together" if self.max_rows > 1 else ""
        threads = f" with {self._threads} threads" if card.device.type == "cpu" else ""
        return f"{card.arithmetic}{threads}{joint}"

    async def drain(self) -> None:
        """Admits nothing more and returns when what was admitted is finished."""
        self._runner.drain()
        with contextlib.suppress(DeviceLost):
            await self.working()

    async def working(self) -> None:
        """Returns when a drain is over.

        Raises:
            DeviceLost: the device's thread has died, and nothing will be drawn here any more.
        """
        # Shielded: the end is everybody's, and whoever stops waiting for it must not cancel it.
        await asyncio.shield(asyncio.wrap_future(self._runner.end))

    async def _next(self, job: Job, mailbox: Mailbox) -> Item | None:
        """What comes next of a job; None where nothing did for a while, and yet the device does not hang."""
        while True:
            left_s = job.deadline_s - time.monotonic()
            try:
                # Not wait_for: before Python 3.12 it swallows a cancel that comes together with the item.
                async with asyncio.timeout(min(left_s, ALIVE_EVERY_S)):
                    return await mailbox.get()
            except TimeoutError:
                if left_s <= ALIVE_EVERY_S:
                    told = "the deadline passed before the pictures were done"
                    raise DeadlinePassed(told) from None
            # No call lasts as long as a whole request may.
            if self._runner.busy_s < job.limit_s:
                return None

    async def _encode(self, job: Job, item: Item) -> Event:
        encode = asyncio.get_running_loop().run_in_executor
        if isinstance(item, RawPreview):
            height, width = job.plate.release_HW.shape
            extent = Extent(width=width, height=height)
            png = await encode(self._encoders, encode_preview, item.pixels_HWC, extent)
            return PreviewMade(index=item.index, step=item.step, png=png)
        if isinstance(item, RawImage):
            return ImageMade(
                index=item.index,
                seed=job.sampling.seed_of(item.index),
                png=await encode(self._encoders, encode_png, item.pixels_HWC),
                pixels_HWC=item.pixels_HWC,
            )
        assert isinstance(item, QueuedAt | StepDone), "the end is not an event"
        return item


def _warm_up_job(card: GeneratorCard, size: Extent, *, steps: int, deadline_s: float) -> Job:
    """One grey picture, every part of the work in it."""
    factor, height, width = card.facts.latent_factor, size.height, size.width
    grid = (height // factor, width // factor)
    return Job(
        plate=Plate(
            composite_HWC=np.full((height, width, 3), 128, np.uint8),
            visible_Lhw=np.ones((1, *grid), np.float32),
            strength_hw=np.ones(grid, np.float64),
            release_HW=np.full((height, width), 255, np.uint8),
        ),
        prompt="warm-up",
        negative_prompt="",
        layers=(
            LayerControl(text_start=0, text_end=7, dials=Dials(noise=1.0, attract=0.5, repel=0.5)),
        ),
        sampling=Sampling(
            model=card.name,
            sampler=card.defaults().sampler,
            steps=steps,
            guidance_scale=card.defaults().guidance_scale,
            images=1,
            seed=0,
        ),
        deadline_s=deadline_s,
    )
