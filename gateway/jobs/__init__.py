"""Jobs: the queue of accepted requests and the ordered event log of each.

`Jobs` is what the gateway sees; `SqliteJobs` (one machine) and `NatsJobs` (production) are its two
implementations and pass one suite. Bodies, event payloads and results are opaque bytes here: this
package knows no protobuf and no pipeline. Whether a claim stands is decided on the store's clock
alone; `created_at` and the like are the writer's, and only told.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from gateway.jobs.errors import (
    ClaimLost,
    JobMissing,
    JobsError,
    JobsFull,
    JobsUnavailable,
    JobsUnusable,
    QueueFull,
    RequestReused,
)

__all__ = [
    "AHEAD_EVERY_S",
    "FINAL_STATES",
    "Ahead",
    "Claim",
    "ClaimLost",
    "Event",
    "JobMissing",
    "JobRecord",
    "JobState",
    "Jobs",
    "JobsError",
    "JobsFull",
    "JobsUnavailable",
    "JobsUnusable",
    "QueueFull",
    "QueuePolicy",
    "RequestReused",
    "job_id_of",
]


class JobState(enum.Enum):
    """Where a job stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing changes any more: the terminal event is written."""
        return self in FINAL_STATES


FINAL_STATES = frozenset({JobState.DONE, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job as it stood when it was read. Times are unix seconds, None where not reached yet."""

    id: str
    request_id: str
    state: JobState
    # Claims so far: 0 while never claimed, 1 during the first run. Released and lost claims count.
    attempt: int
    # Those of them whose lease ran out: the worker died, or hung.
    lost: int
    created_at: float
    # When the first claim was made.
    started_at: float | None
    finished_at: float | None
    body: bytes
    # What `finish` was given, empty before and where none was.
    result: bytes
    cancel_requested: bool
    # What its worker said last with `stand`, None where it said nothing.
    ahead: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right to work on one job until the lease runs out unextended.

    `token` fences off every earlier claim. `job` is the record right after claiming (`state`
    RUNNING). Look at `job.cancel_requested` before starting: a job whose worker died after a cancel
    request arrives with it set.
    """

    job: JobRecord
    worker: str
    token: str
    lease_s: float

    @property
    def attempt(self) -> int:
        """1 for the first run, more after a release or a lost worker."""
        return self.job.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One entry of a job's log. `sequence` counts 1, 2, 3… without gaps; `at` is unix seconds.

    `final` is None except on the terminal event, the last of the log, where it is the job's final
    state.
    """

    sequence: int
    at: float
    payload: bytes
    final: JobState | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """How many jobs stand before a job now: in the queue, or where its worker has it wait."""

    jobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePolicy:
    """The limits of a queue, the same for every process on it.

    `lease_s` (> 0): a claim not extended for so long is given to another worker; extend about every
    third of it.
    `max_queued` (>= 1): jobs that may wait; more are refused with `QueueFull`.
    `max_lost` (>= 1): claims of a job that may be lost before it ends FAILED with the payload
    `exhausted` makes for it; claims given back do not count.
    `retry_after_s`: what `QueueFull` tells the caller.
    """

    exhausted: Callable[[JobRecord], bytes]
    lease_s: float = 30.0
    max_queued: int = 1000
    max_lost: int = 20
    retry_after_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.lease_s > 0:
            raise ValueError(f"lease_s is {self.lease_s}, must be above 0")
        if self.max_queued < 1 or self.max_lost < 1:
            raise ValueError(
                f"max_queued is {self.max_queued} and max_lost {self.max_lost}, must be at least 1"
            )


# Seconds between two tellings of a job's place, at least.
AHEAD_EVERY_S = 1.0


class Jobs(Protocol):
    """A durable queue with an event log per job.

    Every method may raise `JobsUnavailable`. An instance belongs to the
    event loop that opened it; any number of processes may hold one on the same queue.
    """

    async def submit(self, request_id: str, body: bytes) -> JobRecord:
        """The job for this request, created at the end of the queue unless it exists already.

        Raises:
            ValueError: `request_id` is not a UUID, or the body is larger than the store takes.
            RequestReused: the id stands for another body.
            QueueFull: too many jobs wait. Never raised for a job that exists.
        """
        ...

    async def claim(self, worker: str, *, wait_s: float) -> Claim | None:
        """The oldest of the jobs that wait and those whose lease ran out; None after `wait_s`."""
        ...

    async def extend(self, claim: Claim) -> bool:
        """Start the lease anew; answers whether cancellation was requested. Raises `ClaimLost`."""
        ...

    async def release(self, claim: Claim, *, rest_s: float = 0) -> None:
        """Give the job back, to its old place in the queue. A lost claim is no error.

        `rest_s`: seconds for which nobody is given it, whatever waits behind it.
        """
        ...

    async def stand(self, claim: Claim, ahead: int) -> None:
        """Say how many jobs stand before this one where its worker has it wait. Raises `ClaimLost`.

        Told to those who `watch`, and no part of the log.
        """
        ...

    async def cancelled(self, claim: Claim) -> None:
        """Return within a second of a cancel request for this job.

        Raises `ClaimLost` when the claim is lost. Otherwise waits: run it as a task beside the work
        and cancel that task when the work ends.
        """
        ...

    async def append(self, claim: Claim, payload: bytes, *, key: str | None = None) -> int:
        """Add an event and answer its sequence number. Raises `ClaimLost`.

        A key stands once in a job's log: appending it again, by whichever claim, answers the first
        one's number.
        """
        ...

    async def finish(
        self, claim: Claim, state: JobState, payload: bytes, *, result: bytes = b""
    ) -> None:
        """End the job with its one terminal event and its record's result, atomically.

        Raises `ClaimLost`.
        """
        ...

    def events(self, job_id: str, *, after: int = 0, live: bool = True) -> AsyncIterator[Event]:
        """Events with a sequence above `after`: history, then live as they come.

        Ends after the terminal event; without `live`, at the end of the history there is. Raises
        `JobMissing` on first use.
        """
        ...

    def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event | Ahead]:
        """Live `events`, and between them the jobs ahead: as that changes, `AHEAD_EVERY_S` apart.

        Led by it where the job waits. Costs nothing while nothing of this job changes, and however
        many watch one job read it once.
        """
        ...

    async def cancel(self, job_id: str, *, payload: bytes) -> JobRecord:
        """Ask for this one job's end and answer its record afterwards.

        Waiting: CANCELLED at once, `payload` being its terminal event. Running: `cancel_requested`
        is set and the worker told. Finished: nothing changes. Raises `JobMissing`.
        """
        ...

    async def get(self, job_id: str) -> JobRecord:
        """The job as it stands. Raises `JobMissing`."""
        ...

    async def list(
        self, *, page_size: int, page_token: str = ""
    ) -> tuple[tuple[JobRecord, ...], str]:
        """Newest first, with the next page's token ("" on the last). ValueError for a bad one."""
        ...

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state; every state is a key."""
        ...

    async def oldest_waiting(self) -> float | None:
        """When the first of the jobs that wait was created, unix seconds; None where none waits."""
        ...

    async def position(self, job_id: str) -> int:
        """Place in the queue: 1 is the next to be claimed, 0 not waiting. Raises `JobMissing`."""
        ...

    async def ready(self) -> None:
        """Do a real round trip to the store; raises `JobsUnavailable` where that fails."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads; calls that wait end with `JobsUnavailable`.

        Claims held stay until their lease runs out.
        """
        ...


def job_id_of(request_id: str) -> str:
    """The id of a request's job: `job-` and the UUID's 32 hex digits. Raises ValueError."""
    try:
        return f"job-{uuid.UUID(request_id).hex}"
    except ValueError:
        raise ValueError(f"request_id is {request_id!r}, must be a UUID") from None
