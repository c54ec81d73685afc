"""The engine: batches of subjects in, an async stream of what they learn out.

Main type: `Engine`. One batch is at work at a time, on a thread of its own that owns the device; the others wait in
turn, a bounded number of them. Between two units of work the thread looks whether it is still wanted. This module knows
neither messages nor storage.
"""

import asyncio
import contextlib
import contextvars
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import Counter, Gauge, Histogram

from services.common.errors import (
    TOO_LONG,
    CollageError,
    DeadlinePassed,
    DeviceLost,
    Internal,
    ModelUnusable,
    Overloaded,
    Unavailable,
)
from services.common.telemetry import log
from services.common.weights import ModelError
from services.diffusion import device
from services.diffusion.catalog import Catalog
from services.diffusion.pace import Call, Expected, Pace
from services.diffusion.shelf import Shelf
from services.diffusion.word import Word
from services.inversion.learn import Progress, Recipe, Trainer
from services.inversion.networks import LearningCard, Networks, load
from services.inversion.subject import Subject

# What a batch is believed to take before the first one has been timed.
FIRST_GUESS_S = 30.0
# Bounds of the delay told to a caller who finds the queue full.
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
DEFAULT_MAX_WAITING = 32
# As messages name it.
WHO = "inversion service"
# Pixels of all rows of one training step where the operator sets no number of rows: 8 rows of Stable Diffusion 1.5 at
# 384 x 384, or every row of 32 layers of the bundled model at 96 x 96.
JOINT_PIXELS = 8 * 384 * 384
# Seconds between two signs of life to a batch that waits.
WAIT_TOLD_S = 10.0

WAITING = Gauge("collage_inversion_waiting", "Batches that wait for their turn")
STEP_SECONDS = Histogram("collage_inversion_step_seconds", "One training step", ["model"])
BATCHES = Counter("collage_inversion_batches_total", "Batches that ended", ["outcome"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Where every subject of a batch stands, and the words of those that are done, by their place in it.

    state: for a checkpoint, where one was due.
    """

    progress: tuple[Progress, ...]
    words: dict[int, Word]
    state: bytes | None = None


class Engine:
    """Learns words.

    Args:
        catalog: the models; each is loaded with the first word that is learned for it.
        recipe: how words are learned.
        threads: CPU threads of one operation, see `device.own`.
        joint_rows: rows that are trained together, at most, though a subject is never split; 0 for JOINT_PIXELS.
        max_waiting: batches that may wait for their turn.
        checkpoint_s: seconds between two checkpoints.
        progress_s: seconds between two reports where nothing ended.
        memory_bytes: what the weights may take on each device, see `Shelf`.
    """

    def __init__(
        self,
        catalog: Catalog[LearningCard],
        *,
        recipe: Recipe,
        threads: int,
        joint_rows: int = 0,
        max_waiting: int = DEFAULT_MAX_WAITING,
        checkpoint_s: float = 3.0,
        progress_s: float = 0.5,
        memory_bytes: float = math.inf,
    ) -> None:
        self.catalog = catalog
        self.recipe = recipe
        self._joint_rows = joint_rows
        self._max_waiting = max_waiting
        self._checkpoint_s = checkpoint_s
        self._progress_s = progress_s
        self._admitted = 0
        self._turn = asyncio.Semaphore(1)
        self._draining = threading.Event()
        self._lost = asyncio.Event()
        self._last_s = FIRST_GUESS_S
        # How long steps take here, and how many the last batch took that was done.
        self._pace = Pace()
        self._last_steps = recipe.steps
        # Of all batches, since the start.
        self._units = 0
        self._shelf: Shelf[LearningCard, Networks] = Shelf(load, memory_bytes=memory_bytes)
        self._device = ThreadPoolExecutor(
            1, thread_name_prefix="learn", initializer=device.own, initargs=(threads,)
        )

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[AsyncIterator[None]]:
        """A place in the line for the device, after those that came before.

        Yields the wait: the device is held from its end on. It has an item now and then for as long as the batch at
        work gets on, so that who waits behind one that hangs hears nothing, either.

        Raises:
            Overloaded: too many wait already.
            Unavailable: the engine is draining; from the wait, too. DeviceLost: nothing can be learned here any more.
        """
        self._refuse_at_the_end()
        if self._admitted > self._max_waiting:
            wait_s = self._last_s * self._admitted
            raise Overloaded(
                f"{self._max_waiting} batches of words wait to be learned",
                retry_after_s=min(max(wait_s, SHORTEST_RETRY_S), LONGEST_RETRY_S),
            )
        self._admitted += 1
        WAITING.set(max(0, self._admitted - 1))
        acquiring = asyncio.create_task(self._turn.acquire())
        try:
            yield self._wait(acquiring)
        finally:
            acquiring.cancel()
            await _finished(acquiring)
            if not acquiring.cancelled():
                self._turn.release()
            self._admitted -= 1
            WAITING.set(max(0, self._admitted - 1))

    async def _wait(self, acquiring: "asyncio.Task[Literal[True]]") -> AsyncIterator[None]:
        seen = self._units
        while not (await asyncio.wait((acquiring,), timeout=WAIT_TOLD_S))[0]:
            if self._units != seen:
                seen = self._units
                yield
        self._refuse_at_the_end()

    def together(self, card: LearningCard) -> int:
        """How many subjects are learned in one batch, at most.

        It follows from model, recipe and setting alone, not from the memory that is free: a word's last bits depend on
        who shares its batch.
        """
        rows = self._joint_rows or JOINT_PIXELS // Trainer.side(card.facts, self.recipe) ** 2
        return max(1, rows // self.recipe.rows)

    def expected(self, card: LearningCard, subjects: int) -> Expected:
        """How long an idle device learns one batch of so many; all 0 where it has learned none for the model yet.

        From the fewest steps after which learning may end to the most. Waiting, and loading the model, are not in it.
        """
        step = self._pace.expected(self._call(card, subjects))
        return Expected(
            seconds=step.seconds * max(self._last_steps, self.recipe.fewest_steps),
            low=step.low * self.recipe.fewest_steps,
            high=step.high * self.recipe.steps,
        )

    def _call(self, card: LearningCard, subjects: int) -> Call:
        cells = (Trainer.side(card.facts, self.recipe) // card.facts.latent_factor) ** 2
        rows = subjects * self.recipe.rows
        return Call(model=card.name, work="train", cells=cells, rows=rows)

    async def learn(
        self,
        card: LearningCard,
        subjects: Sequence[Subject],
        *,
        state: bytes | None,
        deadline_s: float,
        limit_s: float = math.inf,
    ) -> AsyncGenerator[Learned, None]:
        """Learns a batch; to be called within a `turn`, and to be closed (`contextlib.aclosing`).

        Closing it, or cancelling the task that reads it, ends the work within one unit.

        Raises:
            DeadlinePassed: on the monotonic clock, the deadline passed first; reason TOO_LONG: it was at work for
                longer than `limit_s`.
            Unavailable: the engine drains; the last item held a state to go on from. DeviceLost: see `working`.
            ModelUnusable: the model's files make none. Internal: the work failed.
        """
        loop, mailbox, stop = (
            asyncio.get_running_loop(),
            asyncio.Queue[Learned | None](),
            threading.Event(),
        )

        def post(item: Learned | None) -> None:
            loop.call_soon_threadsafe(mailbox.put_nowait, item)

        def work() -> None:
            failure: Exception | None = None
            try:
                self._work(card, subjects, state, deadline_s, limit_s, stop, post)
            except CollageError:
                raise
            except Exception as error:
                failure = error
            finally:
                post(None)
            # Outside the handler: while an exception is handled, all that the failed call held stays in memory.
            if failure is not None:
                device.recover(card.device, failure, who=WHO)
                raise failure

        context = contextvars.copy_context()
        working = loop.run_in_executor(self._device, context.run, work)
        try:
            while (item := await mailbox.get()) is not None:
                yield item
            await working
            BATCHES.labels("DONE").inc()
        except CollageError as error:
            BATCHES.labels(error.reason).inc()
            if isinstance(error, DeviceLost):
                self._lost.set()
            raise
        except Exception as error:
            told = _told(error, card.name)
            BATCHES.labels(told.reason).inc()
            raise told from error
        finally:
            stop.set()
            # The turn passes on only when the device is free.
            await _finished(working)

    async def drain(self) -> None:
        """Admits nothing more. What is at work ends within one unit, with a state to go on from elsewhere."""
        self._draining.set()
        async with self._turn:
            pass

    async def working(self) -> None:
        """Never returns.

        Raises:
            DeviceLost: the device answers nothing any more.
        """
        await self._lost.wait()
        raise device.lost(WHO)

    async def close(self) -> None:
        """Lets go of the thread."""
        self._device.shutdown(wait=False, cancel_futures=True)

    def _refuse_at_the_end(self) -> None:
        if self._lost.is_set():
            raise device.lost(WHO)
        self._refuse_when_draining()

    def _refuse_when_draining(self) -> None:
        if self._draining.is_set():
            raise Unavailable("the inversion service is shutting down", reason="DRAINING")

    # Below: the device's thread.

    def _work(
        self,
        card: LearningCard,
        subjects: Sequence[Subject],
        state: bytes | None,
        deadline_s: float,
        limit_s: float,
        stop: threading.Event,
        post: Callable[[Learned], None],
    ) -> None:
        networks = self._shelf.take(card)
        try:
            trainer = Trainer(networks, subjects, self.recipe, state=state)
        except ValueError as error:
            log.warning("checkpoint left aside", message=str(error))
            trainer = Trainer(networks, subjects, self.recipe)
        began_s = saved_s = told_s = time.monotonic()
        begun, ended = trainer.steps_done, set[int]()
        log.info("learning", model=card.name, words=len(subjects), step=begun)
        while not stop.is_set():
            now_s, is_draining = time.monotonic(), self._draining.is_set()
            fresh = {k for k, p in enumerate(trainer.progress()) if p.is_done} - ended
            is_last = trainer.is_done or is_draining
            is_due = now_s - saved_s >= self._checkpoint_s and not trainer.is_done
            if fresh or is_last or is_due or now_s - told_s >= self._progress_s:
                words = trainer.words()
                # With a word that is done the state goes out too: taken up without it, the others' batch would be
                # another one, and their last bits with it.
                keeps = is_due or ((fresh or is_last) and not trainer.is_done)
                post(
                    Learned(
                        progress=tuple(trainer.progress()),
                        words={k: words[k] for k in fresh},
                        state=trainer.state() if keeps else None,
                    )
                )
                told_s, ended = now_s, ended | fresh
                if keeps:
                    saved_s = now_s
            if trainer.is_done:
                self._last_s = now_s - began_s
                self._last_steps = trainer.steps_done
                self._record(card, subjects, steps=trainer.steps_done - begun, since_s=began_s)
                log.info(
                    "learned", steps=trainer.steps_done - begun, seconds=round(self._last_s, 2)
                )
                return
            if is_draining:
                self._refuse_when_draining()
            if now_s - began_s > limit_s:
                raise DeadlinePassed(
                    f"words were learned for {now_s - began_s:.0f} s, waiting apart, and are not done; the operator "
                    "allows a request no more (COLLAGE_MAX_WORK_S): have fewer learned at a time",
                    reason=TOO_LONG,
                )
            if now_s > deadline_s:
                raise DeadlinePassed("the deadline passed before the words were learned")
            before = trainer.steps_done
            trainer.advance()
            self._units += 1
            if trainer.steps_done > before:
                device.synchronize(card.device)
                STEP_SECONDS.labels(card.name).observe(time.monotonic() - now_s)
                steps = trainer.steps_done - begun
                if steps % self.recipe.check_every == 0:
                    self._record(card, subjects, steps=steps, since_s=began_s)
        BATCHES.labels("CANCELLED").inc()

    def _record(
        self, card: LearningCard, subjects: Sequence[Subject], *, steps: int, since_s: float
    ) -> None:
        """Takes in how long a step took, with its part of what is none: pictures encoded, looks at the loss."""
        if steps:
            seconds = (time.monotonic() - since_s) / steps
            self._pace.record(self._call(card, len(subjects)), seconds=seconds)


async def _finished(working: "asyncio.Future[Any]") -> None:
    """Waits for it even when the waiting task is cancelled once more."""
    while not working.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((working,))


def _told(error: Exception, model: str) -> CollageError:
    """What the caller hears of an exception in the work."""
    if device.is_out_of_memory(error):
        return Internal(
            "the words do not fit the memory together; the operator can lower COLLAGE_JOINT_ROWS",
            reason="OUT_OF_MEMORY",
        )
    if isinstance(error, ModelError):
        log.error("learning failed", error=str(error))
        return ModelUnusable(f"model {model} cannot be used: {error}")
    log.error("learning failed", exc_info=error)
    return Internal("internal error; the inversion's log has more under this request id")
