"""The runner: the one thread that steps, and the jobs it works off.

Main type: `Runner`. The thread asks the `Scheduler` whose turn it is, takes the batch one step further, and looks at
cancels and deadlines before the next. What need not hold up the next step is done beside it: a thread finishes
pictures, decoding them and their previews, and another loads the models that are asked for. It knows neither event
loops nor messages nor storage, and of a model only its `Stages`.
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
from queue import SimpleQueue
from typing import Generic

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter, Histogram

from services.common.errors import (
    TOO_LONG,
    Cancelled,
    CollageError,
    DeadlinePassed,
    Internal,
    ModelUnusable,
    Overloaded,
    Unavailable,
)
from services.common.telemetry import log
from services.common.weights import ModelError
from services.diffusion import device
from services.diffusion.catalog import Catalog
from services.diffusion.pace import Call, Expected
from services.diffusion.shelf import Shelf
from services.generator.call import NotWanted
from services.generator.card import Card
from services.generator.conditioning import prepare
from services.generator.job import Ended, Job, Mailbox, QueuedAt, RawImage, RawPreview, StepDone
from services.generator.noise import released_at
from services.generator.sampler import Run, decoded_together, step
from services.generator.scheduler import (
    DropReason,
    Part,
    QueueFull,
    Scheduler,
    Shape,
    Ticket,
    Turn,
)
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


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """An admitted job. `context` carries the request id into the threads' log lines.

    runs: one for each part, once it has begun. finished: parts whose pictures have been made. worked_s: what the device
    has been at work on it, of calls that it shared its part.
    """

    job: Job
    ticket: Ticket
    mailbox: Mailbox
    admitted_s: float
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    place: int | None = None
    runs: list[Run] = field(default_factory=list)
    steps_told: int = 0
    finished: int = 0
    worked_s: float = 0.0

    @property
    def steps_done(self) -> int:
        """Steps that all pictures have had, on average."""
        return sum(run.steps_done for run in self.runs) // len(self.runs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Work:
    """A part of a batch, with its job."""

    part: Part
    entry: _Entry

    @property
    def run(self) -> Run:
        """Once the job has begun."""
        return self.entry.runs[self.part.index]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Loading(Generic[Card]):
    """A model on its way into memory."""

    card: Card
    done: "Future[None]" = field(default_factory=Future)


class Runner(Generic[Card]):
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
        catalog: Catalog[Card],
        *,
        load: Callable[[Card], Stages],
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
        self._lost: BaseException | None = None
        # Since when a thread has been at what it does now.
        self._busy_since_s: dict[str, float] = {}
        self._loading: _Loading[Card] | None = None
        self._to_finish: SimpleQueue[tuple[_Entry, Callable[[_Entry], None]]] = SimpleQueue()
        self._to_load: SimpleQueue[_Loading[Card]] = SimpleQueue()
        self.end: Future[None] = Future()
        # Daemons: a process that ends waits neither for a device that is lost nor for a model that nobody wants now.
        # One that loads, and not one a model: each thread's allocator would keep what the last one left it.
        threading.Thread(target=self._load_all, name="load", daemon=True).start()
        threading.Thread(target=self._finish_all, name="finish", daemon=True).start()
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
        parts = self._scheduler.together(sampling.images)
        ticket = Ticket(
            id=next(self._ids),
            shape=Shape(
                model=card.name,
                grid_height=height,
                grid_width=width,
                adapters=sampling.active_adapters,
            ),
            parts=parts,
            rows=card.rows_a_picture(sampling, has_emphasis=job.has_emphasis)
            * (sampling.images // parts),
            steps=sampling.steps - int(released_hw.min()),
            deadline_s=job.deadline_s,
            controlnets=len({part.kind for layer in job.layers for part in layer.structures}),
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
            self._changed.notify()

    def expected(self, call: Call) -> Expected:
        """How long a call of the networks takes here."""
        with self._changed:
            return self._scheduler.pace.expected(call)

    @property
    def busy_s(self) -> float:
        """How long the device has been at one and the same call or picture; 0 where it waits for work."""
        return time.monotonic() - min(self._busy_since_s.copy().values(), default=math.inf)

    def drain(self) -> None:
        """Admits nothing more; the thread finishes what was admitted and ends, see `end`."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    # Below: the thread that steps.

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
            lost = device.lost(WHO)
            JOBS.labels(lost.reason).inc()
            entry.mailbox.post(Ended(error=lost))
        if death is None:
            self.end.set_result(None)
        else:
            self.end.set_exception(device.lost(WHO))

    def _work(self) -> None:
        device.own(self._threads)
        while (turn := self._next_turn()) is not None:
            for ticket, reason in turn.dropped:
                if (entry := self._entries.get(ticket.id)) is not None:
                    self._end(entry, _dropped(reason))
            if turn.wanted is not None:
                self._ask_for(turn.wanted, is_idle=not turn.batch)
            if turn.batch:
                with self._busy():
                    self._advance(turn.batch)

    def _next_turn(self) -> Turn | None:
        """What to do, as soon as there is something; None at the end of a drain."""
        while True:
            self._settle_loading()
            with self._changed:
                if self._lost is not None:
                    raise self._lost
                if not self._scheduler.is_idle:
                    coming = () if self._loading is None else (self._loading.card.name,)
                    turn = self._scheduler.turn(
                        now_s=time.monotonic(), in_memory=self._shelf.names, coming=coming
                    )
                    self._tell_places()
                    if turn.batch or turn.dropped or (turn.wanted and self._loading is None):
                        return turn
                elif self._is_draining and not self._entries:
                    return None
                if self._loading is None or not self._loading.done.done():
                    self._changed.wait(IDLE_WAIT_S)

    def _ask_for(self, model: str, *, is_idle: bool) -> None:
        """Has a model loaded, beside what is stepped where there is room, in others' place where nothing is."""
        card = self._catalog.find(model, field="sampling.model")
        if self._loading is not None or not (is_idle or self._shelf.has_room(card)):
            return
        self._shelf.make_room(card)
        self._loading = _Loading(card=card)
        self._to_load.put(self._loading)

    def _settle_loading(self) -> None:
        """Takes notice of a model that is there now; one that cannot be loaded fails the job that waited longest."""
        if self._loading is None or not self._loading.done.done():
            return
        loading, self._loading = self._loading, None
        failure = loading.done.exception()
        if failure is None:
            return
        with self._changed:
            ticket = self._scheduler.first_of(loading.card.name)
        if device.is_out_of_memory(failure):
            device.recover(loading.card.device, failure, who=WHO)
            failure = Internal(
                f"model {loading.card.name} does not fit the generator's memory",
                reason="OUT_OF_MEMORY",
            )
        if ticket is not None and (entry := self._entries.get(ticket.id)) is not None:
            self._fail(entry, failure)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """Around what a thread does with the device."""
        name = threading.current_thread().name
        self._busy_since_s[name] = time.monotonic()
        try:
            yield
        finally:
            del self._busy_since_s[name]

    def _begin(self, entry: _Entry) -> None:
        QUEUE_SECONDS.observe(time.monotonic() - entry.admitted_s)
        entry.mailbox.post(QueuedAt(place=0))
        job, cells = entry.job, entry.ticket.shape.cells
        stages, start_s = self._stages_of([entry]), time.monotonic()
        with self._stage(entry, stages, "encode_text"):
            conditioning = prepare(
                stages,
                prompt=job.prompt,
                negative_prompt=job.negative_prompt,
                guidance_scale=job.sampling.guidance_scale,
                layers=job.layers,
                adapters=job.sampling.active_adapters,
            )
        if not self._wants(entry):
            return
        with self._stage(entry, stages, "encode_image"):
            run = Run.begin(
                stages, plate=job.plate, conditioning=conditioning, sampling=job.sampling
            )
        self._record(
            Call(model=job.sampling.model, work="encode", cells=cells),
            seconds=time.monotonic() - start_s,
        )
        # Before the first step, whose time is what all that follow are estimated by.
        for kind in run.control_kinds:
            if not self._wants(entry):
                return
            with self._stage(entry, stages, "load_controlnets"):
                stages.load_controlnets([kind])
        if not self._wants(entry):
            return
        entry.runs = run.split() if entry.ticket.parts > 1 else [run]
        entry.worked_s += time.monotonic() - start_s

    def _wants(self, entry: _Entry) -> bool:
        """Whether anybody still wants a job's pictures; one that nobody does is dropped with the next turn."""
        with self._changed:
            return self._scheduler.wants(entry.ticket, now_s=time.monotonic())

    def _stages_of(self, entries: Sequence[_Entry]) -> Stages:
        """Their model's stages, for as long as one of them wants an answer."""
        stages = self._shelf.take(self._card(entries[0]))
        return stages.while_wanted(lambda: any(self._wants(entry) for entry in entries))

    def _card(self, entry: _Entry) -> Card:
        return self._catalog.find(entry.job.sampling.model, field="sampling.model")

    def _advance(self, batch: Sequence[Part]) -> None:
        """One step for the parts that have one left; the pictures of those that have none are finished elsewhere."""
        # By their entries from here on: the thread that finishes may end a job at any time.
        work = [
            _Work(part=part, entry=entry)
            for part in batch
            if (entry := self._entries.get(part.ticket.id)) is not None
        ]
        for entry in dict.fromkeys(each.entry for each in work):
            if not entry.runs:
                self._attempt(entry, self._begin)
        work = self._those_here(work)
        self._step([each for each in work if not each.run.is_done])
        work = self._those_here(work)
        for entry in dict.fromkeys(each.entry for each in work):
            if entry.steps_done > entry.steps_told:
                entry.steps_told = entry.steps_done
                total = entry.runs[0].steps_total
                entry.mailbox.post(StepDone(step=entry.steps_told, total=total))
            if entry.worked_s > entry.job.limit_s and not all(run.is_done for run in entry.runs):
                self._end(entry, _too_long(entry))
        work = self._those_here(work)
        for each in work:
            self._show(each)

    def _those_here(self, work: Sequence["_Work"]) -> list["_Work"]:
        """Those whose jobs have begun and not ended."""
        return [each for each in work if each.entry.runs and self._is_here(each.entry)]

    def _is_here(self, entry: _Entry) -> bool:
        return entry.ticket.id in self._entries

    def _step(self, work: Sequence["_Work"]) -> None:
        if not work:
            return
        entry = work[0].entry
        stages = self._stages_of([each.entry for each in work])
        parts = tuple(each.part for each in work)
        try:
            start_s = time.monotonic()
            rows = step(stages, [each.run for each in work])
            device.synchronize(stages.device)
            seconds = time.monotonic() - start_s
        except Exception as error:
            failure = error
        else:
            STEP_SECONDS.labels(entry.job.sampling.model).observe(seconds)
            BATCH_ROWS.observe(rows)
            shares = sum(part.ticket.rows for part in parts)
            for each in work:
                each.entry.worked_s += seconds * each.part.ticket.rows / shares
            with self._changed:
                self._scheduler.stepped(parts, rows=rows, seconds=seconds)
            return
        if isinstance(failure, NotWanted):
            # Every run is as it was; the next turn drops whom nobody waits for.
            return
        # Outside the handler: while an exception is handled, all that the failed call held stays in memory.
        if len(work) == 1:
            self._fail(entry, failure)
            return
        device.recover(stages.device, failure, who=WHO)
        log.warning("joint step failed", parts=len(work), error=str(failure))
        if device.is_out_of_memory(failure):
            # Every run is as it was; the next turn takes fewer of them.
            with self._changed:
                self._scheduler.ran_out(parts, now_s=time.monotonic())
            return
        # Whose fault it is cannot be told from here: every run is as it was, each tries alone, and only the culprit
        # fails.
        for each in work:
            self._step(self._those_here([each]))

    def _show(self, each: "_Work") -> None:
        """Has what is to be seen of a part made by the other thread: its pictures, or a preview where one is due."""
        entry, run, first = each.entry, each.run, each.part.index
        stages, every = self._stages_of([entry]), entry.job.sampling.preview_every
        if run.is_done:
            with self._changed:
                self._scheduler.ended(each.part)
            self._beside(entry, lambda entry: self._finish(entry, run, stages, first=first))
        elif every is not None and run.steps_done % every == 0 and run.steps_done > 0:
            done, look = run.steps_done, run.look()
            self._beside(entry, lambda entry: _preview(entry, look, step=done, first=first))

    def _attempt(self, entry: _Entry, work: Callable[[_Entry], None]) -> None:
        """Does one job's own work; what goes wrong is that job's alone."""
        try:
            entry.context.copy().run(work, entry)
            return
        except NotWanted:
            # The next turn drops it, and says why.
            return
        except Exception as error:
            failure = error
        # Outside the handler, as in `_step`.
        self._fail(entry, failure)

    def _fail(self, entry: _Entry, error: BaseException) -> None:
        told = _told(error, entry.job)
        if isinstance(told, Internal):
            entry.context.copy().run(log.error, "job failed", reason=told.reason, exc_info=error)
        if isinstance(told, ModelUnusable):
            entry.context.copy().run(log.error, "job failed", reason=told.reason, error=str(told))
        if told is not error:
            device.recover(self._card(entry).device, error, who=WHO)
        self._end(entry, told)

    def _end(self, entry: _Entry, error: CollageError | None) -> None:
        """Tells a job's end; one that has ended already is left as it is."""
        with self._changed:
            if self._entries.pop(entry.ticket.id, None) is None:
                return
            self._scheduler.remove(entry.ticket.id)
            self._tell_places()
            self._changed.notify()
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

    def _record(self, call: Call, *, seconds: float) -> None:
        with self._changed:
            self._scheduler.pace.record(call, seconds=seconds)

    # Below: the thread that loads.

    def _load_all(self) -> None:
        while True:
            loading = self._to_load.get()
            try:
                self._shelf.load(loading.card)
            except BaseException as error:  # of the thread: told where it is settled
                loading.done.set_exception(error)
            else:
                loading.done.set_result(None)
            with self._changed:
                self._changed.notify()

    # Below: the thread that finishes.

    def _beside(self, entry: _Entry, work: Callable[[_Entry], None]) -> None:
        """Has a job's own work done by the thread that finishes, in the order it was asked for."""
        self._to_finish.put((entry, work))

    def _finish_all(self) -> None:
        device.own(self._threads)
        while True:
            entry, work = self._to_finish.get()
            if not self._is_here(entry):
                continue
            try:
                with self._busy():
                    self._attempt(entry, work)
            except BaseException as error:  # of the thread: the device is lost
                with self._changed:
                    self._lost = error
                    self._changed.notify()
                return

    def _finish(self, entry: _Entry, run: Run, stages: Stages, *, first: int) -> None:
        start_s = time.monotonic()
        with self._stage(entry, stages, "decode"):
            for index, pixels_HWC in enumerate(run.finish(stages), start=first):
                entry.mailbox.post(RawImage(index=index, pixels_HWC=pixels_HWC))
                if not self._is_here(entry):
                    return
        if run.steps_total > 0:
            pictures = entry.job.sampling.images // entry.ticket.parts
            together = decoded_together(pictures, pixels=entry.job.plate.release_HW.size)
            self._record(
                Call(
                    model=entry.job.sampling.model,
                    work="decode",
                    cells=entry.ticket.shape.cells,
                    rows=together,
                ),
                seconds=(time.monotonic() - start_s) * together / pictures,
            )
        entry.finished += 1
        if entry.finished == entry.ticket.parts:
            self._end(entry, None)


def _preview(
    entry: _Entry, look: Callable[[], Sequence[NDArray[np.uint8]]], *, step: int, first: int
) -> None:
    for index, pixels_HWC in enumerate(look(), start=first):
        entry.mailbox.post(RawPreview(index=index, step=step, pixels_HWC=pixels_HWC))


def _too_long(entry: _Entry) -> CollageError:
    return DeadlinePassed(
        f"drawn for {entry.worked_s:.0f} s, waiting apart, after {entry.steps_done} of "
        f"{entry.runs[0].steps_total} steps; the operator allows a request {entry.job.limit_s:g} s "
        "(COLLAGE_MAX_WORK_S): ask for fewer pictures, fewer steps or a smaller canvas",
        reason=TOO_LONG,
    )


def _dropped(reason: DropReason) -> CollageError:
    if reason is DropReason.EXPIRED:
        return DeadlinePassed("the deadline passed before the pictures were done")
    return Cancelled("cancelled by the caller")


def _told(error: BaseException, job: Job) -> CollageError:
    """What the caller hears of an exception in its job."""
    if isinstance(error, CollageError):
        return error
    if isinstance(error, ModelError):
        return ModelUnusable(f"model {job.sampling.model} cannot be used: {error}")
    if device.is_out_of_memory(error):
        height, width = job.plate.release_HW.shape
        return Internal(
            f"{job.sampling.images} pictures of {width} x {height} do not fit the generator's "
            "memory; ask for fewer at a time, or for a smaller canvas",
            reason="OUT_OF_MEMORY",
        )
    return Internal("internal error; the generator's log has more under this request id")
