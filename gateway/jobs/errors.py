"""What `Jobs` raises: a tree under `JobsError`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from gateway.jobs import Claim


class JobsError(Exception):
    """Root of what `Jobs` raises. `retryable`: the same call may succeed later."""

    retryable: ClassVar[bool] = False


class JobMissing(JobsError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r}")
        self.job_id = job_id


class RequestReused(JobsError):
    """The request id already stands for another body."""

    def __init__(self, request_id: str) -> None:
        super().__init__(f"request_id {request_id!r} was used before with another request")
        self.request_id = request_id


class QueueFull(JobsError):
    """As many jobs wait as the policy allows."""

    retryable: ClassVar[bool] = True

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} jobs are waiting already; try again in {retry_after_s:g} s")
        self.waiting = waiting
        self.retry_after_s = retry_after_s


class ClaimLost(JobsError):
    """The job was given to another claim, or has ended: stop working on it, write nothing more."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(
            f"claim of attempt {claim.attempt} on {claim.job.id} by {claim.worker} is void"
        )
        self.claim = claim


class JobsUnavailable(JobsError):
    """The store behind the queue did not answer within the retry budget."""

    retryable: ClassVar[bool] = True


class JobsFull(JobsUnavailable):
    """The store has no room for a change; what it holds can still be read."""


class JobsUnusable(JobsUnavailable):
    """The store is damaged, gone, closed to this process or of another program; the message says what to do."""
