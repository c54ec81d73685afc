"""Which pictures the device works on next: admission, order, expiry, and the rows of the next step.

Main type: `Scheduler`. Pure policy: it knows no torch and no threads, the time is an argument (any monotonic clock,
seconds), and whoever calls it holds one lock around it.

Jobs of one shape (model, adapters, grid) come first come, first served: their pictures fill a step's rows in order, so
that a later job's begin while an earlier one's last ones end, and a job of many pictures is drawn a few at a time. Jobs
of different shapes cannot share a call; they take turns:

- a shape keeps the device for `slice_s` and then, between two steps, makes way for the one that has waited longest;
  what was begun goes on where it stopped. With k shapes whose models are in memory a job hears of its next step within
  (k - 1) (slice_s + one step).
- a shape whose model is not in memory is passed by those whose model is, but for `patience_s` at most: then models are
  unloaded for it.

So nothing starves, and a long job holds off nobody for long. It does hold off later ones of its own shape where the
rows are taken: who came first ends first.
"""

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import Enum

from services.common.collage import Adapter
from services.diffusion.pace import Call, Pace

# Rows that different jobs, or pictures of one, may share in one U-Net call. One means that every job is alone in its
# batch, with all its pictures. Convolutions and matrix products choose their order of summation by batch size, so a
# picture made beside strangers differs in its last bits from one made alone; alone, its bytes depend on its request
# only, whatever the load. A GPU gains much from sharing: operators raise it there and accept pictures that are equal to
# rounding.
DEFAULT_MAX_ROWS = 1

# Jobs that may wait. A queue longer than this is answered sooner by another replica.
DEFAULT_MAX_WAITING = 32

# Seconds that a canvas keeps the device while another waits: a large GPU draws a picture of Stable Diffusion XL in
# less, so that most jobs are drawn in one piece.
DEFAULT_SLICE_S = 10.0

# Seconds that a job may be passed because its model is not in memory: a few times what it takes to load a large one, so
# that models which do not fit together spend most of the time drawing.
DEFAULT_PATIENCE_S = 30.0

# Bounds of the advice when to ask again: below, callers would spin; above, they would stay away from an idle server
# because of one long job.
RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0

# Seconds after which it is tried again whether more rows fit the memory: what took it may be gone.
MEMORY_LESSON_S = 600.0


class QueueFull(Exception):
    """No place, or none before the job's deadline. `retry_after_s`: when to ask again."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DropReason(Enum):
    """Why a job is given up."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What must be equal for rows to share a U-Net call: the model, its adapters and the latent grid (cells)."""

    model: str
    grid_height: int
    grid_width: int
    adapters: tuple[Adapter, ...] = ()

    @property
    def cells(self) -> int:
        """Area of the latent grid."""
        return self.grid_height * self.grid_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What the scheduler knows of a job.

    parts: what it can be stepped by, one after another or together: its pictures, or 1 where they stay together. rows:
    the most U-Net rows that a part takes in a step, at least 1. steps: of each part, those that change the picture, 0
    or more. deadline_s: when the job is worth nothing any more, on the caller's clock, inf for never. controlnets: how
    many act in its steps.
    """

    id: int
    shape: Shape
    rows: int
    steps: int
    deadline_s: float
    parts: int = 1
    controlnets: int = 0

    def __post_init__(self) -> None:
        assert self.rows >= 1, f"rows is {self.rows}, must be at least 1"
        assert self.parts >= 1, f"parts is {self.parts}, must be at least 1"
        assert self.steps >= 0, f"steps is {self.steps}, must not be negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the parts of a job, 0 to `ticket.parts` - 1."""

    ticket: Ticket
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What to do now: give up `dropped`, then step `batch`, whose parts have one shape and each a step left or none.

    wanted: the model not in memory that somebody has waited for longest, None for none. With an empty batch nothing can
    be stepped before it is there, and models that are may be unloaded for it.
    """

    batch: tuple[Part, ...] = ()
    dropped: tuple[tuple[Ticket, DropReason], ...] = ()
    wanted: str | None = None


@dataclass(slots=True, kw_only=True)
class _Line:
    """The jobs of one shape in the order they came, each with the steps that its parts have left.

    waiting_since_s: when the shape last had the device, or came.
    """

    jobs: dict[int, tuple[Ticket, list[int]]]
    waiting_since_s: float

    def parts(self) -> Iterator[Part]:
        """Those that have not ended, in order."""
        for ticket, left in self.jobs.values():
            for index, steps in enumerate(left):
                if steps >= 0:
                    yield Part(ticket=ticket, index=index)


class Scheduler:
    """Admits jobs, keeps their order, and forms the batch of the next step.

    Args:
        max_rows: U-Net rows that jobs may share, and the pictures of one; a part with more runs alone.
        max_waiting: jobs that may be here beside those that are stepped.
        slice_s: how long a shape keeps the device while another waits.
        patience_s: how long a job may be passed because its model is not in memory.
    """

    def __init__(
        self,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        max_waiting: int = DEFAULT_MAX_WAITING,
        slice_s: float = DEFAULT_SLICE_S,
        patience_s: float = DEFAULT_PATIENCE_S,
    ) -> None:
        assert max_rows >= 1, f"max_rows is {max_rows}, must be at least 1"
        assert max_waiting >= 1, f"max_waiting is {max_waiting}, must be at least 1"
        self.pace = Pace()
        self.max_rows = max_rows
        self._max_waiting = max_waiting
        self._slice_s = slice_s
        self._patience_s = patience_s
        self._tickets: dict[int, Ticket] = {}
        self._begun: set[int] = set()
        self._cancelled: set[int] = set()
        self._lines: dict[Shape, _Line] = {}
        # The shape that has the device, since when, and the jobs of its last step.
        self._shape: Shape | None = None
        self._since_s = -math.inf
        self._stepping: frozenset[int] = frozenset()
        # By model the most rows times cells that memory is believed to hold, and until when.
        self._lessons: dict[str, tuple[float, float]] = {}

    @property
    def is_empty(self) -> bool:
        """No job is here."""
        return not self._tickets

    @property
    def is_idle(self) -> bool:
        """Nothing is to be stepped or dropped."""
        return not self._lines and not self._cancelled

    def together(self, pictures: int) -> int:
        """Parts that a job of so many pictures is stepped by."""
        return pictures if self.max_rows > 1 else 1

    def admit(self, ticket: Ticket, *, now_s: float) -> None:
        """Puts a job at the end of its shape's line.

        Raises:
            QueueFull: all places are taken, or the work ahead is expected to last beyond the job's deadline.
        """
        if len(self._tickets.keys() - self._stepping) >= self._max_waiting:
            # A place is free as soon as one of the jobs that are stepped ends.
            stepping = [self._seconds_left(self._tickets[each]) for each in self._stepping]
            raise QueueFull(
                f"all {self._max_waiting} places in the queue are taken",
                retry_after_s=_bounded(min(stepping, default=0.0)),
            )
        ahead_s = self._ahead_seconds(ticket)
        if now_s < ticket.deadline_s < now_s + ahead_s:
            raise QueueFull(
                f"the work ahead takes about {ahead_s:.1f} s, longer than the deadline allows",
                retry_after_s=_bounded(ahead_s),
            )
        self._tickets[ticket.id] = ticket
        line = self._lines.setdefault(ticket.shape, _Line(jobs={}, waiting_since_s=now_s))
        line.jobs[ticket.id] = ticket, [ticket.steps] * ticket.parts

    def cancel(self, ticket_id: int) -> None:
        """Gives a job up with the next turn; one that is not here is none of our business."""
        if ticket_id in self._tickets:
            self._cancelled.add(ticket_id)

    def wants(self, ticket: Ticket, *, now_s: float) -> bool:
        """Whether a job is here and neither cancelled nor expired: asked between two long pieces of its own work."""
        return ticket.id in self._tickets and self._drop_reason(ticket, now_s) is None

    def turn(self, *, now_s: float, in_memory: Container[str], coming: Container[str] = ()) -> Turn:
        """Drops what is cancelled or expired, and says what the next step holds.

        Args:
            now_s: the time.
            in_memory: names of the models that can be stepped at once.
            coming: names of those that are being loaded; while they are, others are stepped.
        """
        dropped = tuple(
            (ticket, reason)
            for ticket in self._tickets.values()
            if (reason := self._drop_reason(ticket, now_s)) is not None
        )
        for ticket, _ in dropped:
            self.remove(ticket.id)
        away = [
            shape
            for shape in self._lines
            if shape.model not in in_memory and shape.model not in coming
        ]
        wanted = min(away, key=self._waiting_since, default=None)
        shape = self._next_shape(now_s, in_memory, coming)
        batch: tuple[Part, ...] = ()
        if shape is not None and shape.model in in_memory:
            if shape != self._shape:
                self._leave(now_s)
                self._shape, self._since_s = shape, now_s
            batch = self._batch(shape, now_s)
            self._begun.update(part.ticket.id for part in batch)
        else:
            self._leave(now_s)
            wanted = shape
        self._stepping = frozenset(part.ticket.id for part in batch)
        return Turn(batch=batch, dropped=dropped, wanted=None if wanted is None else wanted.model)

    def stepped(self, batch: tuple[Part, ...], *, rows: int, seconds: float) -> None:
        """Records that one U-Net call of so many rows and seconds took these parts one step further."""
        controlnets = max(part.ticket.controlnets for part in batch)
        self.pace.record(_step(batch[0].ticket.shape, rows, controlnets), seconds=seconds)
        for part in batch:
            if (left := self._left(part)) is not None:
                left[part.index] = max(0, left[part.index] - 1)

    def ended(self, part: Part) -> None:
        """The part has no step left and is finished elsewhere; its job stays here until it is removed."""
        if (left := self._left(part)) is None:
            return
        left[part.index] = -1
        if all(steps < 0 for steps in left):
            self._leave_line(part.ticket)

    def ran_out(self, batch: tuple[Part, ...], *, now_s: float) -> None:
        """Records that memory did not hold a step of these parts together: half of them are tried next."""
        shape = batch[0].ticket.shape
        rows = sum(part.ticket.rows for part in batch)
        self._lessons[shape.model] = rows * shape.cells / 2, now_s + MEMORY_LESSON_S

    def remove(self, ticket_id: int) -> None:
        """Forgets a job that is done, failed or given up."""
        if (ticket := self._tickets.pop(ticket_id, None)) is not None:
            self._leave_line(ticket)
        self._cancelled.discard(ticket_id)
        self._begun.discard(ticket_id)
        self._stepping -= {ticket_id}

    def places(self) -> dict[int, int]:
        """Place of every job that has not begun, by id: 1 for the next one."""
        waiting = (each for each in self._tickets if each not in self._begun)
        return {ticket_id: place for place, ticket_id in enumerate(waiting, start=1)}

    def _drop_reason(self, ticket: Ticket, now_s: float) -> DropReason | None:
        if ticket.id in self._cancelled:
            return DropReason.CANCELLED
        return DropReason.EXPIRED if now_s >= ticket.deadline_s else None

    def _waiting_since(self, shape: Shape) -> float:
        return self._lines[shape].waiting_since_s

    def _next_shape(
        self, now_s: float, in_memory: Container[str], coming: Container[str]
    ) -> Shape | None:
        """The shape whose turn it is, or whose model is to be loaded before anything is stepped; None for none."""
        others = [shape for shape in self._lines if shape != self._shape]
        is_here = self._shape in self._lines
        if is_here and (not others or now_s - self._since_s < self._slice_s):
            return self._shape
        longest = sorted(others, key=self._waiting_since)
        if is_here and self._shape is not None:
            # It has had its slice, and is the last of all.
            longest.append(self._shape)
        longest = [shape for shape in longest if shape.model not in coming]
        ready = [shape for shape in longest if shape.model in in_memory]
        if not ready or now_s - self._waiting_since(longest[0]) >= self._patience_s:
            return next(iter(longest), None)
        return ready[0]

    def first_of(self, model: str) -> Ticket | None:
        """The job of a model that came first; None for none."""
        return next((each for each in self._tickets.values() if each.shape.model == model), None)

    def _leave(self, now_s: float) -> None:
        """Takes the device from the shape that has it."""
        if self._shape in self._lines:
            self._lines[self._shape].waiting_since_s = now_s
        self._shape = None

    def _batch(self, shape: Shape, now_s: float) -> tuple[Part, ...]:
        """The first parts of the line that fit together; one that does not fit lets nobody pass."""
        most, rows = self._most_rows(shape, now_s), 0
        batch: list[Part] = []
        for part in self._lines[shape].parts():
            rows += part.ticket.rows
            if batch and rows > most:
                break
            batch.append(part)
        return tuple(batch)

    def _most_rows(self, shape: Shape, now_s: float) -> float:
        most_cells, until_s = self._lessons.get(shape.model, (math.inf, math.inf))
        if now_s >= until_s:
            del self._lessons[shape.model]
            most_cells = math.inf
        return min(self.max_rows, most_cells / shape.cells)

    def _left(self, part: Part) -> list[int] | None:
        line = self._lines.get(part.ticket.shape)
        return None if line is None else line.jobs.get(part.ticket.id, (None, None))[1]

    def _leave_line(self, ticket: Ticket) -> None:
        if (line := self._lines.get(ticket.shape)) is not None:
            line.jobs.pop(ticket.id, None)
            if not line.jobs:
                del self._lines[ticket.shape]

    def _seconds_left(self, ticket: Ticket) -> float:
        """Of its steps, alone; nothing for one that leaves with the next turn."""
        line = self._lines.get(ticket.shape)
        if line is None or ticket.id not in line.jobs or ticket.id in self._cancelled:
            return 0.0
        return self._step_seconds(ticket) * sum(max(0, left) for left in line.jobs[ticket.id][1])

    def _step_seconds(self, ticket: Ticket) -> float:
        """Of one of its parts, alone."""
        return self.pace.expected(_step(ticket.shape, ticket.rows, ticket.controlnets)).seconds

    def _ahead_seconds(self, ticket: Ticket) -> float:
        """Expected seconds until a job's own steps begin, and of what interrupts them."""
        by_shape: dict[Shape, float] = {}
        for other in self._tickets.values():
            seconds = self._seconds_left(other)
            by_shape[other.shape] = by_shape.get(other.shape, 0.0) + seconds
        own_s = by_shape.pop(ticket.shape, 0.0)
        with_it_s = own_s + self._step_seconds(ticket) * ticket.steps * ticket.parts
        slices = max(1, math.ceil(with_it_s / self._slice_s)) if self._slice_s else math.inf
        return own_s + sum(min(each, slices * self._slice_s) for each in by_shape.values())


def _step(shape: Shape, rows: int, controlnets: int) -> Call:
    return Call(
        model=shape.model, work="step", cells=shape.cells, rows=rows, controlnets=controlnets
    )


def _bounded(seconds: float) -> float:
    return min(max(seconds, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
