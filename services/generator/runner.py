"""The runner: the one thread that owns the device, and the jobs it works off.

Main type: `Runner`. The thread asks the `Scheduler` whose turn it is, takes the batch one step further, and looks at
cancels and deadlines before the next. It knows neither event loops nor messages nor storage, and of a model only its
`Stages`.
"""

import contextlib
import contextvars
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from prometheus_client import Counter, Histogram

from services.common.errors import (
    Cancelled,
    CollageError,
    DeadlinePassed,
    DeviceLost,
    Internal,
    Overloaded,
    Unavailable,
)
from services.common.telemetry import log
from services.diffusion import device
from services.diffusion.catalog import Catalog
from services.diffusion.shelf import Shelf
from services.generator.card import GeneratorCard
from services.generator.conditioning import prepare
from services.generator.job import Ended, Job, Mailbox, QueuedAt, RawImage, RawPreview, StepDone
from services.generator.noise import released_at
from services.generator.sampler import Run, step
from services.generator.scheduler import DropReason, QueueFull, Scheduler, Shape, Ticket, Turn
from services.generator.stages import Stages

# Longest sleep of the idle thread: it is woken by every admission, this only bounds the wait.
IDLE_WAIT_S = 60.0
# As messages name it.
WHO = "generator"

QUEUE_SECONDS = Histogram(
    "collage_generator_queue_seconds", "From admission to the start of a job's work"
)
STAGE_SECONDS = Histogram(
    "collage_generator_stage_seconds", "Device time of a job's stage", ["stage"]
)
STEP_SECONDS = Histogram("collage_generator_step_seconds", "One U-Net call", ["model"])
BATCH_ROWS = Histogram(
    "collage_generator_batch_rows", "U-Net rows of one call", buckets=(1, 2, 4, 8, 16, 32, 64)
)
JOBS = Counter("collage_generator_jobs_total", "Jobs that ended", ["outcome"])

# Loads a model and answers its stages; called on the device's thread.
StagesLoader = Callable[[GeneratorCard], Stages]


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """An admitted job. `context` carries the request id into the thread's log lines."""

    job: Job
    ticket: Ticket
    mailbox: Mailbox
    admitted_s: float
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    place: int | None = None
    run: Run | None = None


class Runner:
    """Works off jobs, several at a time where the scheduler says so; the answers go to each job's mailbox.

    Args:
        catalog: the models that may be asked for; each is loaded with the first job that needs it.
        load: makes a model's stages.
        scheduler: whose turn it is.
        memory_bytes: what the weights may take on each device, see `Shelf`.
        threads: CPU threads of one operation, see `device.own`.

    `end` is done when the thread has ended: after a drain, or, with `DeviceLost`, because it died.
    """

    def __init__(
        self,
        catalog: Catalog[GeneratorCard],
        *,
        load: StagesLoader,
        scheduler: Scheduler,
        threads: int,
        memory_bytes: float = math.inf,
    ) -> None:
        self._catalog = catalog
        self._shelf = Shelf(load, memory_bytes=memory_bytes)
        self._scheduler = scheduler
        self._threads = threads
        self._entries: dict[int, _Entry] = {}
        self._ids = itertools.count()
        # Guards scheduler and entries, and tells the thread of news.
        self._changed = threading.Condition()
        self._is_draining = False
        self._has_ended = False
        self.end: Future[None] = Future()
        threading.Thread(target=self._live, name="device", daemon=True).start()

    def submit(self, job: Job, mailbox: Mailbox) -> int:
        """Queues a job and answers its id.

        Raises:
            Overloaded: the queue is full, or too long for the job's deadline.
            Unavailable: the runner is draining; DeviceLost: it has died.
        """
        now_s = time.monotonic()
        card = self._catalog.find(job.sampling.model, field="sampling.model")
        sampling, released_hw = job.sampling, released_at(job.plate.strength_hw, job.sampling.steps)
        height, width = released_hw.shape
        ticket = Ticket(
            id=next(self._ids),
            shape=Shape(
                model=sampling.model,
                grid_height=height,
                grid_width=width,
                adapters=sampling.active_adapters,
            ),
            rows=card.unet_rows(sampling, has_emphasis=job.has_emphasis),
            steps=sampling.steps - int(released_hw.min()),
            deadline_s=job.deadline_s,
        )
        with self._changed:
            if self._has_ended:
                raise device.lost(WHO)
            if self._is_draining:
                raise Unavailable("the generator is shutting down", reason="DRAINING")
            try:
                self._scheduler.admit(ticket, now_s=now_s)
            except QueueFull as full:
                raise Overloaded(str(full), retry_after_s=full.retry_after_s) from full
            self._entries[ticket.id] = _Entry(
                job=job, ticket=ticket, mailbox=mailbox, admitted_s=now_s
            )
            self._tell_places()
            self._changed.notify()
        return ticket.id

    def cancel(self, job_id: int) -> None:
        """Gives a job up within one step; one that has ended is left as it is."""
        with self._changed:
            self._scheduler.cancel(job_id)

    def seconds(self, shape: Shape, *, rows: int, steps: int) -> float:
        """Expected seconds of so many steps on an idle device; 0 where the model has not run yet."""
        with self._changed:
            return self._scheduler.pace.seconds(shape, rows=rows, steps=steps)

    def drain(self) -> None:
        """Admits nothing more; the thread finishes what was admitted and ends, see `end`."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    # Below: the device's thread.

    def _live(self) -> None:
        """Works until there is no more to do, or dies of what is no job's own failure; either way nobody waits on."""
        death: BaseException | None = None
        try:
            self._work()
        except BaseException as error:  # of the thread: there is nobody above to hear of it
            log.error("device thread died", exc_info=error)
            death = error
        with self._changed:
            # From here on none comes in. Not `_end`: what it keeps in order may be what is broken.
            self._has_ended = True
            left = list(self._entries.values())
            self._entries.clear()
        for entry in left:
            JOBS.labels(DeviceLost.reason).inc()
            entry.mailbox.post(Ended(error=device.lost(WHO)))
        if death is None:
            self.end.set_result(None)
        else:
            self.end.set_exception(device.lost(WHO))

    def _work(self) -> None:
        device.own(self._threads)
        while (turn := self._next_turn()) is not None:
            for ticket, reason in turn.dropped:
                self._end(self._entries[ticket.id], _dropped(reason))
            for ticket in turn.joined:
                self._attempt(self._entries[ticket.id], self._begin)
            self._advance([self._entries[t.id] for t in turn.batch if t.id in self._entries])

    def _next_turn(self) -> Turn | None:
        with self._changed:
            while self._scheduler.is_idle:
                if self._is_draining:
                    return None
                self._changed.wait(IDLE_WAIT_S)
            turn = self._scheduler.turn(now_s=time.monotonic())
            self._tell_places()
            return turn

    def _begin(self, entry: _Entry) -> None:
        QUEUE_SECONDS.observe(time.monotonic() - entry.admitted_s)
        entry.mailbox.post(QueuedAt(place=0))
        job = entry.job
        stages = self._stages_of(entry)
        with self._stage(entry, stages, "encode_text"):
            conditioning = prepare(
                stages,
                prompt=job.prompt,
                negative_prompt=job.negative_prompt,
                guidance_scale=job.sampling.guidance_scale,
                layers=job.layers,
                adapters=job.sampling.active_adapters,
            )
        with self._stage(entry, stages, "encode_image"):
            entry.run = Run.begin(
                stages, plate=job.plate, conditioning=conditioning, sampling=job.sampling
            )
        if kinds := entry.run.control_kinds:
            # Before the first step, whose time is what all that follow are estimated by.
            with self._stage(entry, stages, "load_controlnets"):
                stages.load_controlnets(kinds)

    def _stages_of(self, entry: _Entry) -> Stages:
        """The stages of the job's model; models of jobs that have begun do not give way to it."""
        with self._changed:
            in_use = {
                each.job.sampling.model for each in self._entries.values() if each.run is not None
            }
        return self._shelf.take(self._card(entry), in_use=in_use)

    def _card(self, entry: _Entry) -> GeneratorCard:
        return self._catalog.find(entry.job.sampling.model, field="sampling.model")

    def _advance(self, entries: Sequence[_Entry]) -> None:
        """One step for those that have one left, then the pictures of those that have none."""
        done = {entry.ticket.id: _run(entry).steps_done for entry in entries}
        self._step([entry for entry in entries if not _run(entry).is_done])
        for entry in entries:
            if self._is_here(entry) and _run(entry).steps_done > done[entry.ticket.id]:
                self._attempt(entry, self._tell_step)
            if self._is_here(entry) and _run(entry).is_done:
                self._attempt(entry, self._finish)

    def _is_here(self, entry: _Entry) -> bool:
        """Has not ended yet."""
        return entry.ticket.id in self._entries

    def _step(self, entries: Sequence[_Entry]) -> None:
        if not entries:
            return
        sampling = entries[0].job.sampling
        stages = self._stages_of(entries[0])
        try:
            start_s = time.monotonic()
            rows = step(stages, [_run(entry) for entry in entries])
            device.synchronize(stages.device)
            seconds = time.monotonic() - start_s
        except Exception as error:
            failure = error
        else:
            STEP_SECONDS.labels(sampling.model).observe(seconds)
            BATCH_ROWS.observe(rows)
            batch = tuple(entry.ticket for entry in entries)
            with self._changed:
                self._scheduler.stepped(batch, rows=rows, seconds=seconds)
            return
        # Outside the handler: while an exception is handled, all that the failed call held stays in memory.
        if len(entries) == 1:
            self._fail(entries[0], failure)
            return
        # Whose fault it is cannot be told from here: every run is as it was before, each job tries alone, and only the
        # culprit fails.
        log.warning(
            "joint step failed, each job tries alone", jobs=len(entries), error=str(failure)
        )
        device.recover(stages.device, failure, who=WHO)
        for entry in entries:
            self._step([entry])

    def _tell_step(self, entry: _Entry) -> None:
        run, every = _run(entry), entry.job.sampling.preview_every
        entry.mailbox.post(StepDone(step=run.steps_done, total=run.steps_total))
        if every is not None and run.steps_done % every == 0 and not run.is_done:
            for index, pixels_HWC in enumerate(run.preview()):
                entry.mailbox.post(
                    RawPreview(index=index, step=run.steps_done, pixels_HWC=pixels_HWC)
                )

    def _finish(self, entry: _Entry) -> None:
        stages = self._stages_of(entry)
        with self._stage(entry, stages, "decode"):
            pictures = _run(entry).finish(stages)
        for index, pixels_HWC in enumerate(pictures):
            entry.mailbox.post(RawImage(index=index, pixels_HWC=pixels_HWC))
        self._end(entry, None)

    def _attempt(self, entry: _Entry, work: Callable[[_Entry], None]) -> None:
        """Does one job's own work; what goes wrong is that job's alone."""
        try:
            entry.context.run(work, entry)
            return
        except Exception as error:
            failure = error
        # Outside the handler, as in `_step`.
        self._fail(entry, failure)

    def _fail(self, entry: _Entry, error: Exception) -> None:
        told = _told(error, entry.job)
        if isinstance(told, Internal):
            entry.context.run(log.error, "job failed", reason=told.reason, exc_info=error)
        entry.run = None
        if told is not error:
            device.recover(self._card(entry).device, error, who=WHO)
        self._end(entry, told)

    def _end(self, entry: _Entry, error: CollageError | None) -> None:
        with self._changed:
            self._scheduler.remove(entry.ticket.id)
            del self._entries[entry.ticket.id]
            self._tell_places()
        JOBS.labels(error.reason if error else "DONE").inc()
        entry.mailbox.post(Ended(error=error))

    def _tell_places(self) -> None:
        """Tells every waiting job whose place has changed. Needs the lock."""
        for ticket_id, place in self._scheduler.places().items():
            entry = self._entries[ticket_id]
            if entry.place != place:
                entry.place = place
                entry.mailbox.post(QueuedAt(place=place))

    @contextlib.contextmanager
    def _stage(self, entry: _Entry, stages: Stages, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        device.synchronize(stages.device)
        seconds = time.monotonic() - start_s
        STAGE_SECONDS.labels(name).observe(seconds)
        log.info("stage done", stage=name, seconds=round(seconds, 4))


def _run(entry: _Entry) -> Run:
    assert entry.run is not None, "only a job that has begun is stepped"
    return entry.run


def _dropped(reason: DropReason) -> CollageError:
    if reason is DropReason.EXPIRED:
        return DeadlinePassed("the deadline passed before the pictures were done")
    return Cancelled("cancelled by the caller")


def _told(error: Exception, job: Job) -> CollageError:
    """What the caller hears of an exception in its job."""
    if isinstance(error, CollageError):
        return error
    if device.is_out_of_memory(error):
        height, width = job.plate.release_HW.shape
        return Internal(
            f"{job.sampling.images} pictures of {width} x {height} do not fit the generator's "
            "memory; ask for fewer at a time, or for a smaller canvas",
            reason="OUT_OF_MEMORY",
        )
    return Internal("internal error; the generator's log has more under this request id")
