"""What can go wrong, and what the caller is told.

    CollageError
    ├── InvalidRequest        INVALID_ARGUMENT      fields named, with the value and what is allowed
    ├── MissingBlobs          FAILED_PRECONDITION   upload these digests, then call again
    ├── ModelChanged          ABORTED               the job was accepted for a model that is gone or another one now
    ├── NotFound              NOT_FOUND
    ├── NotSupported          UNIMPLEMENTED         the contract has it, this server does not (yet)
    ├── Overloaded            RESOURCE_EXHAUSTED    try again after the stated delay
    ├── Unavailable           UNAVAILABLE           a part is down or draining; try again
    ├── DeadlinePassed        DEADLINE_EXCEEDED     the caller's time is over, or (TOO_LONG) the operator's limit
    ├── Cancelled             CANCELLED
    ├── DataLoss              DATA_LOSS             what was stored is damaged, and counts as missing from now on
    └── Internal              INTERNAL              a bug; the log has more under the request id

`DeviceLost` is the Unavailable that a process ends with.

Every error knows its google.rpc details (ErrorInfo always). `to_status` writes them, `from_status` reads them back
unchanged, so an error raised in one service reaches the client through two others whole. This module knows no server.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common.field import Field, Places, moved

DOMAIN = "collage.v1"
# Values quoted in messages are cut to this many characters, so that a hostile value cannot swell a message.
QUOTED_LENGTH = 80
# Violations told of one request, so that a request wrong in a thousand places still gets a small answer.
MAX_VIOLATIONS = 32
# A status travels in HTTP/2 trailers, which gRPC clients take up to 8 KiB: the message (percent-encoded, and once more
# within the details) and the violations (in base64) stay below that together. In bytes of UTF-8.
MAX_MESSAGE_BYTES = 400
MAX_VIOLATIONS_BYTES = 2800
# When a caller is to come again who found the storage full.
STORAGE_FULL_RETRY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One wrong field: its full path, and a sentence with the value and what is allowed."""

    field: str
    description: str


def quote(value: object) -> str:
    """The value as it is shown in a message: repr, cut."""
    text = repr(value)
    return text if len(text) <= QUOTED_LENGTH else text[:QUOTED_LENGTH] + "…"


def shorten(text: str) -> str:
    """The text, cut where it is longer than a message may be."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return text
    return data[: MAX_MESSAGE_BYTES - 3].decode(errors="ignore") + "…"


class CollageError(Exception):
    """An error a caller can be told about."""

    code: int = code_pb2.INTERNAL
    reason: str = "INTERNAL"

    def __init__(
        self, message: str, *, reason: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = shorten(message)
        self.reason = reason or self.reason
        self.metadata = {key: shorten(value) for key, value in (metadata or {}).items()}

    def details(self) -> list[AnyMessage]:
        """google.rpc details, at most one of a kind, ErrorInfo first."""
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain=DOMAIN, metadata=self.metadata
        )
        return [_pack(info), *(_pack(detail) for detail in self._more_details())]

    def _more_details(self) -> Sequence[Any]:
        return ()

    def moved(self, places: Places) -> "CollageError":
        """The same error, told of another request, in which the fields of this one have these places."""
        return self

    def to_status(self) -> status_pb2.Status:
        """The error as a google.rpc.Status."""
        return status_pb2.Status(code=self.code, message=self.message, details=self.details())


class InvalidRequest(CollageError):
    """One or more fields hold values that are not allowed."""

    code = code_pb2.INVALID_ARGUMENT
    reason = "INVALID_FIELD"

    def __init__(self, violations: Sequence[Violation], *, reason: str | None = None) -> None:
        assert violations, "an invalid request names at least one field"
        first = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        super().__init__(
            f"{first.field}: {first.description}{more}",
            reason=reason,
            metadata={"field": first.field},
        )
        self.violations = _told(violations)

    @classmethod
    def of(
        cls, field: Field | str, description: str, *, reason: str | None = None
    ) -> "InvalidRequest":
        """One wrong field."""
        return cls([Violation(field=str(field), description=description)], reason=reason)

    def moved(self, places: Places) -> "InvalidRequest":
        """See `CollageError.moved`."""
        return InvalidRequest(
            [replace(each, field=moved(each.field, places)) for each in self.violations],
            reason=self.reason,
        )

    def _more_details(self) -> Sequence[Any]:
        return [
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in self.violations
                ]
            )
        ]


class MissingBlobs(CollageError):
    """The request refers to blobs the server does not hold; `missing` maps field path to digest."""

    code = code_pb2.FAILED_PRECONDITION
    reason = "BLOB_MISSING"

    def __init__(self, missing: Mapping[str, str]) -> None:
        field, digest = next(iter(missing.items()))
        super().__init__(
            f"{field}: no blob {digest} is stored; upload it with PutBlob, then call again",
            metadata={"field": field, "sha256": digest},
        )
        self.missing = dict(missing)

    def moved(self, places: Places) -> "MissingBlobs":
        """See `CollageError.moved`."""
        return MissingBlobs({moved(field, places): sha for field, sha in self.missing.items()})

    def _more_details(self) -> Sequence[Any]:
        return [
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type="BLOB", subject=digest, description=f"{field} refers to it"
                    )
                    for field, digest in self.missing.items()
                ]
            )
        ]


class ModelChanged(CollageError):
    """A job was accepted for a model that is served no more, or that is another one under the same name now.

    Sent again, the request is settled anew.
    """

    code = code_pb2.ABORTED
    reason = "MODEL_CHANGED"

    @classmethod
    def of(cls, name: str, digest: str, accepted: str) -> "ModelChanged":
        """The model of that name and digest, for which another digest was accepted."""
        return cls(
            f"model {name} is {digest[:12]} now; the job was accepted for {accepted[:12]}; "
            "send the request again"
        )


class ModelUnusable(CollageError):
    """A served model, or what lies beside it, whose files do not make it: damaged, or others than at the start.

    No request can mend it, the operator can: the message names the file.
    """

    code = code_pb2.FAILED_PRECONDITION
    reason = "MODEL_UNUSABLE"


class NotFound(CollageError):
    """No such job, model, word or blob."""

    code = code_pb2.NOT_FOUND
    reason = "NOT_FOUND"


class NotSupported(CollageError):
    """Part of the contract that this server does not do."""

    code = code_pb2.UNIMPLEMENTED
    reason = "NOT_SUPPORTED"


class Overloaded(CollageError):
    """A queue is full; `retry_after_s` says when to come back."""

    code = code_pb2.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_s = retry_after_s

    def _more_details(self) -> Sequence[Any]:
        delay = Duration()
        delay.FromMilliseconds(int(self.retry_after_s * 1000))
        return [error_details_pb2.RetryInfo(retry_delay=delay)]


def storage_full(name: str) -> Overloaded:
    """The error of a call that needs room in a store that has none."""
    return Overloaded(
        f"the disk of the {name} is full; its operator has to free space or raise the quota. Nothing that is stored "
        "is lost, and it can still be read",
        reason="STORAGE_FULL",
        retry_after_s=STORAGE_FULL_RETRY_S,
    )


class Unavailable(CollageError):
    """A part of the system is down, starting or draining."""

    code = code_pb2.UNAVAILABLE
    reason = "UNAVAILABLE"


class DeviceLost(Unavailable):
    """What does a service's work has failed for good: its process ends and is started again."""

    reason = "DEVICE_LOST"


class DeadlinePassed(CollageError):
    """The caller's deadline passed before the work was done."""

    code = code_pb2.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


# Of work that takes longer than the operator allows: of the InvalidRequest where that is known before it is begun, of
# the DeadlinePassed where it is found when that time is over.
TOO_LONG = "TOO_LONG"


class Cancelled(CollageError):
    """The work was cancelled."""

    code = code_pb2.CANCELLED
    reason = "CANCELLED"


class DataLoss(CollageError):
    """Something that was stored is damaged: told once, and missing from then on, until it is stored again."""

    code = code_pb2.DATA_LOSS
    reason = "BLOB_CORRUPT"

    @classmethod
    def of(cls, damaged: Mapping[str, str]) -> "DataLoss":
        """Of stored bytes: `damaged` maps the path of each field that refers to some, or "", to their digest."""
        field, sha256 = next(iter(damaged.items()))
        where = f"{field}: " if field else ""
        return cls(
            f"{where}blob {sha256} was damaged in the store, which counts it as missing from now on: upload it again, "
            "or have drawn again what was drawn",
            metadata={"field": field, "sha256": sha256} if field else {"sha256": sha256},
        )

    def moved(self, places: Places) -> "DataLoss":
        """See `CollageError.moved`."""
        if "field" not in self.metadata:
            return self
        return DataLoss.of({moved(self.metadata["field"], places): self.metadata["sha256"]})


class Internal(CollageError):
    """A bug on our side."""


_KINDS: dict[int, type[CollageError]] = {
    kind.code: kind
    for kind in (
        ModelChanged,
        ModelUnusable,
        NotFound,
        NotSupported,
        Unavailable,
        DeadlinePassed,
        Cancelled,
        DataLoss,
        Internal,
    )
}


def from_status(status: status_pb2.Status) -> CollageError:
    """The error a status was written from; a foreign status becomes the nearest kind."""
    found = {detail.DESCRIPTOR.name: detail for detail in map(_unpack, status.details) if detail}
    info = found.get("ErrorInfo")
    reason = info.reason if info else None
    metadata = dict(info.metadata) if info else None
    if status.code == code_pb2.INVALID_ARGUMENT and "BadRequest" in found:
        return InvalidRequest(
            [
                Violation(field=violation.field, description=violation.description)
                for violation in found["BadRequest"].field_violations
            ],
            reason=reason,
        )
    if status.code == code_pb2.FAILED_PRECONDITION and "PreconditionFailure" in found:
        return MissingBlobs(
            {
                violation.description.removesuffix(" refers to it"): violation.subject
                for violation in found["PreconditionFailure"].violations
            }
        )
    if status.code == code_pb2.RESOURCE_EXHAUSTED:
        retry = found.get("RetryInfo")
        return Overloaded(
            status.message,
            retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if retry else 1.0,
            reason=reason,
            metadata=metadata,
        )
    error = _KINDS.get(status.code, Internal)(status.message, reason=reason, metadata=metadata)
    error.code = status.code
    return error


def from_rpc(error: grpc.RpcError) -> CollageError:
    """The error another service answered with."""
    status = rpc_status.from_call(error)
    if status is None:
        status = status_pb2.Status(code=error.code().value[0], message=error.details() or "")
    return from_status(status)


def _told(violations: Sequence[Violation]) -> tuple[Violation, ...]:
    """The first violations, shortened, as far as they fit into an answer; the first one always does."""
    told: list[Violation] = []
    size_bytes = 0
    for violation in violations[:MAX_VIOLATIONS]:
        description = shorten(violation.description)
        size_bytes += len(violation.field.encode()) + len(description.encode())
        if told and size_bytes > MAX_VIOLATIONS_BYTES:
            break
        told.append(Violation(field=violation.field, description=description))
    return tuple(told)


def _pack(message: Any) -> AnyMessage:
    packed = AnyMessage()
    # Equal errors have equal bytes: a map has no order of its own.
    packed.Pack(message, deterministic=True)
    return packed


def _unpack(detail: AnyMessage) -> Any:
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.RetryInfo,
    ):
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None
