"""One HTTP request and its answer, as ASGI hands them over: `Exchange`.

Bodies are read as they come and answers written as they are made, so that a slow side holds the other back and nothing
piles up between them. What bodies hold is bounded in all.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from google.rpc import code_pb2
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from services.common.admission import Budget
from services.common.errors import CollageError, DeadlinePassed
from services.common.rpc import MESSAGE_S

# Under way at once, streams too; and what the bodies of calls hold.
MAX_CALLS = 1024
MAX_HELD_BYTES = 128 * 2**20
# Of a body that nobody wants any more, what is still read, so that its sender gets to read the answer.
_LINGER_BYTES, _LINGER_S = 32 * 2**20, 5.0


class Gone(Exception):
    """The other side has closed the connection."""


class Load:
    """What a door has under way."""

    def __init__(self) -> None:
        self._calls = Budget("calls", total=MAX_CALLS, peer=MAX_CALLS)
        self._held = Budget("bytes of messages", total=MAX_HELD_BYTES, peer=MAX_HELD_BYTES)

    @contextmanager
    def exchange(self, peer: str) -> Iterator["Holding"]:
        """One exchange under way. Raises `Overloaded` where there are too many."""
        self._calls.take(peer, 1)
        holding = Holding(self._held, peer)
        try:
            yield holding
        finally:
            holding.give_back()
            self._calls.give(peer, 1)


class Holding:
    """What one exchange holds in memory."""

    def __init__(self, budget: Budget, peer: str) -> None:
        self._budget, self._peer, self._bytes = budget, peer, 0

    def take(self, size_bytes: int) -> None:
        """Raises `Overloaded` where that is more than there is."""
        self._budget.take(self._peer, size_bytes)
        self._bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """So much of it."""
        self._budget.give(self._peer, size_bytes)
        self._bytes -= size_bytes

    def give_back(self) -> None:
        """Everything."""
        self._budget.give(self._peer, self._bytes)
        self._bytes = 0


class Exchange:
    """A request, and the way to answer it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method = str(scope["method"])
        self.headers = Headers(scope=scope)
        self.is_gone = False
        self.has_begun = False
        # Of an HTTP/1.1 connection, which carries one exchange at a time.
        client = scope.get("client") or ("", 0)
        self.peer = f"{client[0]}:{client[1]}"
        self._receive, self._send = receive, send
        self._is_read = False

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            Gone: before its end.
        """
        while not self._is_read:
            message = await self._next()
            if body := message.get("body", b""):
                yield body

    async def body(self, limit_bytes: int, holding: Holding) -> bytes | None:
        """The whole body; None where it has more than that.

        Raises:
            Gone: before its end.
            Overloaded: there is no room for it now.
            DeadlinePassed: it did not arrive in time.
        """
        if self.announced_bytes() > limit_bytes:
            return None
        body = bytearray()
        try:
            async with asyncio.timeout(MESSAGE_S):
                async for chunk in self.chunks():
                    if len(body) + len(chunk) > limit_bytes:
                        return None
                    holding.take(len(chunk))
                    body += chunk
        except TimeoutError:
            raise too_slow() from None
        return bytes(body)

    def announced_bytes(self) -> int:
        """What `Content-Length` says; -1 where it does not."""
        told = self.headers.get("content-length", "")
        return int(told) if told.isascii() and told.isdigit() else -1

    async def gone(self) -> None:
        """Returns when the other side has closed the connection, or the answer has ended."""
        try:
            while True:
                await self._next()
        except Gone:
            return

    async def begin(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """The head of the answer."""
        self.has_begun = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes) -> None:
        """A part of the answer's body; returns when there is room for more."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The end of the answer."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def answer(
        self, status: int, body: bytes, media_type: str, headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        """A whole answer."""
        length = ("content-length", str(len(body)))
        await self.begin(status, [("content-type", media_type), length, *headers])
        # Of HEAD it has none.
        if self.method != "HEAD":
            await self.write(body)
        if not self._is_read:
            await self._linger()
        await self.end()

    async def _linger(self) -> None:
        """Reads on for a while: a connection that is closed on what was sent loses the answer too."""
        left, end = _LINGER_BYTES, time.monotonic() + _LINGER_S
        try:
            async with asyncio.timeout(max(0.0, end - time.monotonic())):
                async for chunk in self.chunks():
                    left -= len(chunk)
                    if left < 0:
                        return
        except (TimeoutError, Gone):
            return

    async def _next(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_gone = True
            raise Gone
        self._is_read = not message.get("more_body", False)
        return message


def too_slow() -> CollageError:
    """Of a message that did not arrive in time."""
    return DeadlinePassed(f"the message did not arrive within {MESSAGE_S:g} s")


class TooLarge(CollageError):
    """A message that is not even read; what is read the gateway refuses in its own words."""

    code = code_pb2.RESOURCE_EXHAUSTED
    reason = "MESSAGE_TOO_LARGE"

    def __init__(self, size: str, limit_bytes: int) -> None:
        super().__init__(
            f"the message has {size} bytes; read are at most {limit_bytes}; upload pictures with PUT /blobs/SHA256"
        )
