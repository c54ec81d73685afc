"""Server-sent events: the messages of a stream as JSON, each with its place in the log as its id.

Which field of a message is its place, and which of a request asks for what comes after one, is read off the contract's
types: a message that holds an `event` with a `sequence`, a request with `after_sequence`.
"""

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import status_pb2

from door.status import rendered
from services.common.errors import InvalidRequest, quote

MEDIA_TYPE = "text/event-stream"
# Seconds of silence after which a comment says that the stream lives.
KEEPALIVE_S = 15.0
KEEPALIVE = b": the stream lives\n\n"


class Resumption:
    """Where a reader left off: `Last-Event-ID`, 0 where it begins."""

    def __init__(self, last_event_id: str) -> None:
        """Raises `InvalidRequest` for what is no id that was given out here."""
        if last_event_id and not (last_event_id.isascii() and last_event_id.isdigit()):
            raise InvalidRequest.of(
                "Last-Event-ID", f"is {quote(last_event_id)}; allowed: the id of an event, a number"
            )
        self._after = min(int(last_event_id[:19] or 0), 2**63 - 1)

    def ask(self, request: Message) -> None:
        """Has the request ask for what comes after it, where it can."""
        if "after_sequence" in request.DESCRIPTOR.fields_by_name and self._after:
            request.after_sequence = self._after  # type: ignore[attr-defined]

    def is_told(self, message: Message) -> bool:
        """Whether the reader has this one: of calls that cannot be asked for a part."""
        return 0 < sequence(message) <= self._after and not message.event.HasField("queued")  # type: ignore[attr-defined]


def sequence(message: Message) -> int:
    """The message's place in its log; 0 where it has none."""
    event = getattr(message, "event", None)
    return int(getattr(event, "sequence", 0))


def rendered_message(message: Message) -> bytes:
    """One event of the stream."""
    number = sequence(message)
    place = f"id: {number}\n" if number else ""
    return f"{place}data: {json_format.MessageToJson(message, indent=None)}\n\n".encode()


def rendered_error(status: status_pb2.Status) -> bytes:
    """How a stream that has begun says that it failed."""
    return f"event: error\ndata: {rendered(status)}\n\n".encode()
