"""How a call ended, as HTTP says it: google.rpc.Status in JSON, and the HTTP status that google.rpc.Code documents."""

import base64
from typing import Any

import grpc
from google.protobuf import json_format

# Known by their names only once they are imported.
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from services.common.errors import CollageError, Unavailable

__all__ = ["HTTP", "http_status", "of_call", "rendered", "told"]

HTTP = {
    code_pb2.OK: 200,
    code_pb2.CANCELLED: 499,
    code_pb2.UNKNOWN: 500,
    code_pb2.INVALID_ARGUMENT: 400,
    code_pb2.DEADLINE_EXCEEDED: 504,
    code_pb2.NOT_FOUND: 404,
    code_pb2.ALREADY_EXISTS: 409,
    code_pb2.PERMISSION_DENIED: 403,
    code_pb2.UNAUTHENTICATED: 401,
    code_pb2.RESOURCE_EXHAUSTED: 429,
    code_pb2.FAILED_PRECONDITION: 400,
    code_pb2.ABORTED: 409,
    code_pb2.OUT_OF_RANGE: 400,
    code_pb2.UNIMPLEMENTED: 501,
    code_pb2.INTERNAL: 500,
    code_pb2.UNAVAILABLE: 503,
    code_pb2.DATA_LOSS: 500,
}
_DETAILS = error_details_pb2.DESCRIPTOR.message_types_by_name


def http_status(status: status_pb2.Status) -> int:
    """The HTTP status of a google.rpc.Status."""
    return HTTP.get(status.code, 500)


def of_call(error: grpc.RpcError) -> status_pb2.Status:
    """The status that a call ended with, its details whole."""
    status = rpc_status.from_call(error)
    if status is not None:
        return status
    code = error.code().value[0]
    if code == code_pb2.UNAVAILABLE:
        # gRPC's own words are of sockets.
        return Unavailable(
            "the service does not answer; try again", reason="UNREACHABLE"
        ).to_status()
    return status_pb2.Status(code=code, message=error.details() or "")


def told(error: CollageError | grpc.RpcError) -> status_pb2.Status:
    """The status that says what went wrong, here or at the gateway."""
    return error.to_status() if isinstance(error, CollageError) else of_call(error)


def rendered(status: status_pb2.Status) -> str:
    """A status as JSON in one line, which needs the details' types to be known."""
    try:
        return json_format.MessageToJson(status, indent=None)
    except (TypeError, json_format.Error):
        return json_format.MessageToJson(_opaque(status), indent=None)


def _opaque(status: status_pb2.Status) -> status_pb2.Status:
    """The same without the details that this program has no type of."""
    known = [
        each for each in status.details if each.TypeName().removeprefix("google.rpc.") in _DETAILS
    ]
    return status_pb2.Status(code=status.code, message=status.message, details=known)


def metadata_value(key: str, value: Any) -> str:
    """A value of metadata as a header has it: base64 where it is bytes."""
    if key.endswith("-bin"):
        return base64.b64encode(value).decode().rstrip("=")
    return value if isinstance(value, str) else value.decode("latin-1")
