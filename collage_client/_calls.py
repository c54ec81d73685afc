"""How the client calls: one channel, its retries, its streams and its blobs.

`Calls` takes what every method of the client needs - a `Span` that its attempts share, sending again what may be sent
again, taking a broken stream up where it broke, moving blobs by digest - and knows nothing of collages.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

import grpc

from collage.v1 import blob_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from collage_client._errors import (
    CollageError,
    DeadlineExceeded,
    InvalidInput,
    Unavailable,
    error_of_call,
)

# The contract's limits.
MAX_BLOB_BYTES = 64 * 2**20
MAX_DIGESTS_PER_CHECK = 256
# Half the contract's limit a message: large enough to cost nothing, small enough to interleave.
CHUNK_BYTES = 512 * 1024
# Attempts in a row without a new event before a stream is given up: few when the server was never heard
# of, more (about a minute with the pauses below) when it is likely to come back.
FIRST_ATTEMPTS = 4
RESUME_ATTEMPTS = 20
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
# A stream that lasted longer than this did not fail at once.
_HELD_S = 5.0

TERMINAL_EVENTS = frozenset({"done", "failed", "cancelled"})

# Calls that may be sent again by the channel itself: answering twice changes nothing. The streams have
# their own loops, because a broken stream must not begin anew.
_IDEMPOTENT = (
    "PlanCollage",
    "CutOut",
    "CreateJob",
    "GetJob",
    "ListJobs",
    "CancelJob",
    "CheckBlobs",
    "PutBlob",
    "ListModels",
    "ListWords",
    "GetWord",
)
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "collage.v1.CollageService", "method": m} for m in _IDEMPOTENT],
            "retryPolicy": {
                "maxAttempts": FIRST_ATTEMPTS,
                "initialBackoff": f"{_PAUSE_S}s",
                "maxBackoff": f"{_LONGEST_PAUSE_S}s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_CHANNEL_OPTIONS = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # A dead peer on a quiet stream is noticed within a minute and a half.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC's own pause grows to two minutes, longer than a gateway takes to come back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Of addresses on this machine, where no proxy can reach what listens; a host elsewhere is reached as gRPC reaches it:
# through `https_proxy` or `http_proxy`, but for hosts in `no_proxy`.
_DIRECT = ("grpc.enable_http_proxy", 0)
_LOOPBACK = re.compile(
    r"(?:ipv[46]:|dns:/*)?(?:localhost|127(?:\.\d+){3}|\[::1\]|::1)(?::\d+)?", re.IGNORECASE
)
# The servers log a call under this.
_REQUEST_ID_KEY = "x-request-id"
_MEDIA_TYPES = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"RIFF", "image/webp"))


class Span:
    """One logical call: the request id and the point in time that all its attempts share."""

    def __init__(self, timeout_s: float, request_id: str = "") -> None:
        try:
            self.request_id = str(uuid.UUID(request_id)) if request_id else str(uuid.uuid4())
        except ValueError:
            text = f"{request_id!r} is no UUID"
            raise InvalidInput.in_field("request_id", text, reason="INVALID_ARGUMENT") from None
        self._end = time.monotonic() + timeout_s
        self._timeout_s = timeout_s

    def remaining_s(self) -> float:
        """Seconds left, more than 0. Raises `DeadlineExceeded` when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise DeadlineExceeded(f"no answer within {self._timeout_s:g} s", code=code)
        return left

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the next attempt."""
        return {
            "timeout": self.remaining_s(),
            "metadata": ((_REQUEST_ID_KEY, self.request_id),),
        }


class Calls:
    """The calls of one channel. Make it inside a running event loop."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        options: tuple[tuple[str, int | str], ...] = _CHANNEL_OPTIONS
        if _LOOPBACK.fullmatch(address):
            options = (*options, _DIRECT)
        # gRPC reads a URI, in which a path's # or ? would end the path.
        if address.startswith("unix:"):
            address = f"unix:{quote(address.removeprefix('unix:'))}"
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self.stub: Any = collage_service_pb2_grpc.CollageServiceStub(self._channel)

    async def close(self) -> None:
        """Closes the channel; calls still going on are cancelled."""
        await self._channel.close()

    async def call(self, method: str, request: Any, span: Span) -> Any:
        """One unary call by its name in the contract."""
        return await _answer(getattr(self.stub, method)(request, **span.options()))

    def watch(self, name: str, after_sequence: int, span: Span) -> Any:
        """A stream of `WatchJob`; it breaks when the connection does."""
        request = pb.WatchJobRequest(name=name, after_sequence=after_sequence)
        return self.stub.WatchJob(request, **span.options())

    async def follow(
        self,
        span: Span,
        *,
        name: str = "",
        after_sequence: int = 0,
        start: Callable[[], Awaitable[Any]] | None = None,
        resumes: bool = True,
    ) -> AsyncGenerator[pb.JobEvent, None]:
        """Events of job `name`, or of the one `start` creates, to the last; resumes after the last one seen.

        `start` returns a stream of answers that hold events. It may be called again as long as no event
        came, so what it does must be idempotent.
        """
        failures, heard = 0, False
        while True:
            call, began = None, time.monotonic()
            try:
                if start is not None and not name:
                    call = await start()
                else:
                    call = self.watch(name, after_sequence, span)
                async for answer in call:
                    heard = True
                    event: pb.JobEvent = answer.event
                    # No part of the log: it repeats the number watched from.
                    if event.HasField("queued"):
                        name = event.job
                        yield event
                        continue
                    # A server that repeats an event after a resume is no reason to show it twice.
                    if event.sequence <= after_sequence:
                        continue
                    name, after_sequence, failures = event.job, event.sequence, 0
                    yield event
                    if event.WhichOneof("kind") in TERMINAL_EVENTS:
                        return
                broken: CollageError = Unavailable(
                    "the event stream ended before the job did", code=grpc.StatusCode.UNAVAILABLE
                )
            except grpc.aio.AioRpcError as error:
                broken = error_of_call(error)
            except Unavailable as error:
                broken = error
            finally:
                if call is not None:
                    call.cancel()
            # A stream without news that held for a while was no failed attempt: a job may wait long.
            held = heard and time.monotonic() - began > _HELD_S
            failures = 1 if held else failures + 1
            given_up = failures >= (RESUME_ATTEMPTS if heard else FIRST_ATTEMPTS)
            if given_up or not isinstance(broken, Unavailable) or (name and not resumes):
                raise broken
            await _pause(failures - 1, span)

    async def put_all(self, contents: Sequence[bytes], span: Span) -> list[blob_pb2.BlobRef]:
        """Stores byte strings under their digests, sending only what the server lacks."""
        refs = [_reference(data) for data in contents]
        by_digest = {ref.sha256: (ref, data) for ref, data in zip(refs, contents, strict=True)}
        digests = list(by_digest)
        for first in range(0, len(digests), MAX_DIGESTS_PER_CHECK):
            request = pb.CheckBlobsRequest(sha256=digests[first : first + MAX_DIGESTS_PER_CHECK])
            answer = await self.call("CheckBlobs", request, span)
            for sha256 in answer.missing_sha256:
                ref, data = by_digest[sha256]
                await _answer(self.stub.PutBlob(_parts(ref, data), **span.options()))
        return refs

    async def pages(
        self,
        method: str,
        page: Callable[[str], Any],
        field: str,
        limit: int | None,
        span: Span,
    ) -> list[Any]:
        """The items of a paged list, all of them or the first `limit`."""
        items: list[Any] = []
        token = ""
        while True:
            answer = await self.call(method, page(token), span)
            items += getattr(answer, field)
            token = answer.next_page_token
            if not token or (limit is not None and len(items) >= limit):
                return items[:limit]

    async def fetch(self, sha256: str, span: Span) -> bytes:
        """The bytes of a blob; their digest is verified."""
        failures = 0
        while True:
            try:
                data = await self._download(sha256, span)
            except Unavailable:
                failures += 1
                if failures >= FIRST_ATTEMPTS:
                    raise
                await _pause(failures - 1, span)
                continue
            if hashlib.sha256(data).hexdigest() != sha256:
                raise _damaged(f"the bytes received for blob {sha256} do not have its digest")
            return data

    async def _download(self, sha256: str, span: Span) -> bytes:
        data = bytearray()
        call = self.stub.GetBlob(pb.GetBlobRequest(sha256=sha256), **span.options())
        try:
            async for answer in call:
                data += answer.chunk
                if len(data) > MAX_BLOB_BYTES:
                    raise _damaged(f"blob {sha256} is larger than {MAX_BLOB_BYTES} bytes")
        except grpc.aio.AioRpcError as error:
            raise error_of_call(error) from error
        finally:
            call.cancel()
        return bytes(data)


async def _answer(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_of_call(error) from error


async def _pause(attempt: int, span: Span) -> None:
    pause_s = min(_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S) * random.uniform(0.5, 1)
    await asyncio.sleep(min(pause_s, span.remaining_s()))


def _reference(data: bytes) -> blob_pb2.BlobRef:
    if len(data) > MAX_BLOB_BYTES:
        text = f"{len(data)} bytes; at most {MAX_BLOB_BYTES} are allowed"
        raise InvalidInput.in_field("blob", text, reason="BLOB_TOO_LARGE")
    known = (kind for magic, kind in _MEDIA_TYPES if data.startswith(magic))
    return blob_pb2.BlobRef(
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        media_type=next(known, "application/octet-stream"),
    )


async def _parts(ref: blob_pb2.BlobRef, data: bytes) -> AsyncIterator[pb.PutBlobRequest]:
    yield pb.PutBlobRequest(header=ref)
    for first in range(0, len(data), CHUNK_BYTES):
        yield pb.PutBlobRequest(chunk=data[first : first + CHUNK_BYTES])


def _damaged(message: str) -> CollageError:
    return CollageError(message, code=grpc.StatusCode.DATA_LOSS, reason="BLOB_CORRUPT")
