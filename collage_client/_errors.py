"""What a call may raise: `CollageError` and its kinds, read from google.rpc error details.

The tree stands in the package's docstring. Nothing outside this module looks at trailing metadata or at packed details.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.rpc import error_details_pb2, status_pb2

from collage.v1 import collage_service_pb2 as service_pb

_DETAILS_KEY = "grpc-status-details-bin"
_TOO_LARGE = "MESSAGE_TOO_LARGE"
E = TypeVar("E", bound="CollageError")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One wrong field: its path, for example `collage.layers[2].noise`, and what is wrong with it."""

    field: str
    description: str


class CollageError(Exception):
    """A call that was answered with an error, or not answered.

    `code` is the gRPC status, `reason` a stable UPPER_SNAKE_CASE name ("" when the server gave none),
    `field_violations` the wrong fields, `retry_after_s` how long a full service asks to wait (seconds).
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode,
        reason: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.field_violations = field_violations
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        name = self.reason or self.code.name
        return f"{name}: {self.message}" if self.message else name


class InvalidInput(CollageError):
    """The request, or a collage file, is wrong: mend it before calling again."""

    @classmethod
    def in_field(cls, field: str, description: str, *, reason: str) -> InvalidInput:
        """An error found on this side, about one field."""
        violation = FieldViolation(field=field, description=description)
        return cls(
            f"{field}: {description}" if field else description,
            code=grpc.StatusCode.INVALID_ARGUMENT,
            reason=reason,
            field_violations=(violation,),
        )


class MessageTooLarge(InvalidInput):
    """One message is larger than the contract's 4 MiB.

    The client uploads a collage's pictures as blobs, so of its own calls texts are what is too long; raw messages sent
    by a stub of one's own name large pictures by their digests, see `PutBlob`.
    """


class PreconditionFailed(CollageError):
    """The request is well formed but the server is not in the state for it: a blob or a word is missing."""


class NotFound(CollageError):
    """No such job, word or blob."""


class Full(CollageError):
    """The service has no room now; `retry_after_s` says when to come again."""


class Unavailable(CollageError):
    """The service could not be reached, and the retries are used up."""


class DeadlineExceeded(CollageError):
    """The time the caller gave is over. A job that was created may still be going on."""


class JobFailed(CollageError):
    """The job ended without a result; `job` is its name. `code` is CANCELLED when someone stopped it."""

    job: str = ""


_KINDS: dict[grpc.StatusCode, type[CollageError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Full,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def error_of_call(error: grpc.aio.AioRpcError) -> CollageError:
    """The error of a finished call, with the details its trailing metadata carries."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            status.ParseFromString(value)
    message = error.details() or ""
    # gRPC itself refuses a message above its limit, without details; no service is full then.
    if not status.details and "message larger than max" in message:
        return MessageTooLarge(
            f"{message}; upload pictures with PutBlob and name them by their digests",
            code=error.code(),
            reason=_TOO_LARGE,
        )
    kind = _KINDS.get(error.code(), CollageError)
    if any(_reason_of(detail) == _TOO_LARGE for detail in status.details):
        kind = MessageTooLarge
    return _built(kind, error.code(), message, status.details)


def error_of_job(job: str, error: service_pb.JobError) -> JobFailed:
    """The error a job ended with."""
    code = _CODES.get(error.code, grpc.StatusCode.UNKNOWN)
    failed = _built(JobFailed, code, error.message, error.details)
    failed.job = job
    return failed


def _reason_of(detail: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    return info.reason if detail.Unpack(info) else ""


def _built(kind: type[E], code: grpc.StatusCode, message: str, details: Iterable[Any]) -> E:
    reason, violations, retry_after_s = "", [], None
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations += [
                FieldViolation(field=item.field, description=item.description)
                for item in bad.field_violations
            ]
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return kind(
        message,
        code=code,
        reason=reason,
        field_violations=tuple(violations),
        retry_after_s=retry_after_s,
    )
