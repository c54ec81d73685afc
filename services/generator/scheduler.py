"""Which jobs the device works on next: admission, order, expiry, and the batch of the next step.

Main type: `Scheduler`. Pure policy: it knows no torch and no threads, the time is an argument (any
monotonic clock, seconds), and whoever calls it holds one lock around it.

The order is first come, first served. A running batch is run to its end; waiting jobs of the same
shape join it between steps while there is room. A job passes an earlier one only where that cannot
make the earlier one wait for more steps: the earlier one has another shape, so it waits for the end
of the batch in any case, and the later one ends no later than the batch would without it. So
nothing starves.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum

from services.common.collage import Adapter

# Rows that different jobs may share in one U-Net call. One means that every job is alone in its
# batch. Convolutions and matrix products choose their order of summation by batch size, so a
# picture made beside strangers differs in its last bits from one made alone; alone, its bytes
# depend on its request only, whatever the load. A GPU gains much from sharing: operators raise it
# there and accept pictures that are equal to rounding.
DEFAULT_MAX_ROWS = 1

# Jobs that may wait. A queue longer than this is answered sooner by another replica.
DEFAULT_MAX_WAITING = 32

# Weight of the newest step in the mean step time: steady, and yet the first step, which pays for
# allocation, counts for less than a tenth after five more.
PACE_NEWEST_WEIGHT = 0.4

# Bounds of the advice when to ask again: below, callers would spin; above, they would stay away
# from an idle server because of one long job.
RETRY_AFTER_MIN_S = 1.0
RETRY_AFTER_MAX_S = 60.0


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

    `rows` are the most U-Net rows of one step, at least 1; `steps` the steps that change the picture, 0 or
    more; `deadline_s` when the job is worth nothing any more, on the caller's clock, inf for never.
    """

    id: int
    shape: Shape
    rows: int
    steps: int
    deadline_s: float

    def __post_init__(self) -> None:
        assert self.rows >= 1, f"rows is {self.rows}, must be at least 1"
        assert self.steps >= 0, f"steps is {self.steps}, must not be negative"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What to do now: give up `dropped`, start `joined`, then step `batch` (which holds joined)."""

    batch: tuple[Ticket, ...]
    joined: tuple[Ticket, ...]
    dropped: tuple[tuple[Ticket, DropReason], ...]


class Pace:
    """How fast steps are here: a running mean, by model, of the seconds a row takes per cell."""

    def __init__(self) -> None:
        self._row_cell_s: dict[str, float] = {}

    def record(self, shape: Shape, *, rows: int, seconds: float) -> None:
        """Takes in one measured step of so many rows."""
        newest = seconds / (rows * shape.cells)
        mean = self._row_cell_s.get(shape.model, newest)
        self._row_cell_s[shape.model] = mean + PACE_NEWEST_WEIGHT * (newest - mean)

    def seconds(self, shape: Shape, *, rows: int, steps: int) -> float:
        """Expected seconds of so many steps; 0 where this model was never measured."""
        return self._row_cell_s.get(shape.model, 0.0) * rows * shape.cells * steps


class Scheduler:
    """Admits jobs, keeps their order, and forms the batch of the next step.

    `max_rows`: U-Net rows that several jobs may share; a job with more runs alone. `max_waiting`:
    jobs that may wait.
    """

    def __init__(
        self, *, max_rows: int = DEFAULT_MAX_ROWS, max_waiting: int = DEFAULT_MAX_WAITING
    ) -> None:
        assert max_rows >= 1, f"max_rows is {max_rows}, must be at least 1"
        assert max_waiting >= 1, f"max_waiting is {max_waiting}, must be at least 1"
        self.pace = Pace()
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._waiting: deque[Ticket] = deque()
        self._batch: list[Ticket] = []
        self._steps_left: dict[int, int] = {}
        self._cancelled: set[int] = set()

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._waiting and not self._batch

    def admit(self, ticket: Ticket, *, now_s: float) -> None:
        """Puts a job at the end of the queue.

        Raises `QueueFull` when all places are taken, or when the work ahead is expected to last
        beyond the job's deadline.
        """
        # What is cancelled leaves with the next turn: it holds a place until then, and takes no time.
        ahead_s = self._batch_seconds() + sum(
            self.pace.seconds(other.shape, rows=other.rows, steps=other.steps)
            for other in self._waiting
            if other.id not in self._cancelled
        )
        if len(self._waiting) >= self._max_waiting:
            # A place is free as soon as the batch ends and the next job starts.
            raise QueueFull(
                f"all {self._max_waiting} places in the queue are taken",
                retry_after_s=_bounded(self._batch_seconds()),
            )
        if now_s < ticket.deadline_s < now_s + ahead_s:
            raise QueueFull(
                f"the work ahead takes about {ahead_s:.1f} s, longer than the deadline allows",
                retry_after_s=_bounded(ahead_s),
            )
        self._waiting.append(ticket)

    def cancel(self, ticket_id: int) -> None:
        """Gives a job up with the next turn; one that is not here is none of our business."""
        if any(ticket.id == ticket_id for ticket in (*self._waiting, *self._batch)):
            self._cancelled.add(ticket_id)

    def turn(self, *, now_s: float) -> Turn:
        """Drops what is cancelled or expired, lets jobs join, and says what the next step holds."""
        dropped = [
            (ticket, reason)
            for ticket in (*self._batch, *self._waiting)
            if (reason := self._drop_reason(ticket, now_s)) is not None
        ]
        for ticket, _ in dropped:
            self.remove(ticket.id)
        joined = self._join()
        return Turn(batch=tuple(self._batch), joined=joined, dropped=tuple(dropped))

    def stepped(self, batch: tuple[Ticket, ...], *, rows: int, seconds: float) -> None:
        """Records that one U-Net call of so many rows and seconds took these jobs one step further."""
        self.pace.record(batch[0].shape, rows=rows, seconds=seconds)
        for ticket in batch:
            self._steps_left[ticket.id] = max(0, self._steps_left[ticket.id] - 1)

    def remove(self, ticket_id: int) -> None:
        """Forgets a job that is done, failed or given up."""
        self._waiting = deque(ticket for ticket in self._waiting if ticket.id != ticket_id)
        self._batch = [ticket for ticket in self._batch if ticket.id != ticket_id]
        self._steps_left.pop(ticket_id, None)
        self._cancelled.discard(ticket_id)

    def places(self) -> dict[int, int]:
        """Place of every waiting job by id: 1 for the next one."""
        return {ticket.id: place for place, ticket in enumerate(self._waiting, start=1)}

    def _drop_reason(self, ticket: Ticket, now_s: float) -> DropReason | None:
        if ticket.id in self._cancelled:
            return DropReason.CANCELLED
        return DropReason.EXPIRED if now_s >= ticket.deadline_s else None

    def _join(self) -> tuple[Ticket, ...]:
        joined: list[Ticket] = []
        passed_over: list[Ticket] = []
        while self._waiting:
            ticket = self._waiting.popleft()
            if self._may_join(ticket, has_passed=bool(passed_over)):
                self._batch.append(ticket)
                self._steps_left[ticket.id] = ticket.steps
                joined.append(ticket)
                continue
            passed_over.append(ticket)
            if ticket.shape == self._batch[0].shape:
                # It waits for rows to fall free: whoever passed it would take them away.
                break
        self._waiting.extendleft(reversed(passed_over))
        return tuple(joined)

    def _may_join(self, ticket: Ticket, *, has_passed: bool) -> bool:
        if not self._batch:
            return True
        rows = sum(other.rows for other in self._batch)
        fits = ticket.shape == self._batch[0].shape and rows + ticket.rows <= self._max_rows
        batch_steps_left = max(self._steps_left[other.id] for other in self._batch)
        return fits and (not has_passed or ticket.steps <= batch_steps_left)

    def _batch_seconds(self) -> float:
        return sum(
            self.pace.seconds(ticket.shape, rows=ticket.rows, steps=self._steps_left[ticket.id])
            for ticket in self._batch
            if ticket.id not in self._cancelled
        )


def _bounded(seconds: float) -> float:
    return min(max(seconds, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
