"""`PUT`, `GET` and `HEAD /blobs/SHA256`: stored bytes by plain HTTP, through the gateway's own calls.

Main type: `Blobs`. A blob never changes, so it may be kept for good. What was stored is whatever a caller sent: nothing
of it may run in the page's origin.
"""

import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf import json_format
from starlette.types import Receive, Scope, Send

from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from collage.v1.blob_pb2 import BlobRef
from door import status
from door.calls import JSON_MEDIA_TYPE, call_options, cancelled_when_gone, refuse, upload
from door.exchange import Exchange, Gone, Load
from services.common.errors import CollageError, InvalidRequest, NotSupported, quote

PATH = "/blobs/"
# Less than a message may hold.
_CHUNK_BYTES = 512 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)
# Whatever it is, it is shown and no more: it runs nothing, loads nothing, and is of no origin.
_CONFINED = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
# What a page would take in as its own.
_RUN = {
    "script",
    "style",
    "worker",
    "sharedworker",
    "serviceworker",
    "audioworklet",
    "paintworklet",
}


class Blobs:
    """Passes blobs on, from and to the gateway at the other end of a channel."""

    def __init__(self, channel: grpc.aio.Channel, load: Load) -> None:
        self._stub: Any = collage_service_pb2_grpc.CollageServiceStub(channel)  # type: ignore[no-untyped-call]
        self._load = load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One exchange, as ASGI has it."""
        exchange = Exchange(scope, receive, send)
        digest = str(scope["path"]).removeprefix(PATH)
        with suppress(Gone):
            try:
                with self._load.exchange(exchange.peer):
                    await self._serve(exchange, digest)
            except (CollageError, grpc.aio.AioRpcError) as error:
                if exchange.has_begun:
                    # Too late for words: the connection breaks off, and the length shows it.
                    raise
                await refuse(exchange, status.told(error))

    async def _serve(self, exchange: Exchange, digest: str) -> None:
        if exchange.method == "PUT":
            await self._put(exchange, digest)
        elif exchange.method in ("GET", "HEAD"):
            await self._get(exchange, digest)
        else:
            told = NotSupported(f"{exchange.method} is not allowed here", reason="HTTP_FORM")
            body = status.rendered(told.to_status()).encode()
            await exchange.answer(405, body, JSON_MEDIA_TYPE, [("allow", "GET, HEAD, PUT")])

    async def _put(self, exchange: Exchange, digest: str) -> None:
        size_bytes = exchange.announced_bytes()
        if size_bytes < 0:
            told = InvalidRequest.of("Content-Length", "is missing; required: the blob's length")
            body = status.rendered(told.to_status()).encode()
            await exchange.answer(411, body, JSON_MEDIA_TYPE)
            return
        media_type, _, _ = exchange.headers.get("content-type", "").partition(";")
        header = BlobRef(
            sha256=digest,
            size_bytes=size_bytes,
            media_type=media_type.strip().lower() or "application/octet-stream",
        )
        call = self._stub.PutBlob(**call_options(exchange))
        stored = await upload(call, _requests(exchange, header))
        body = json_format.MessageToJson(stored, indent=None).encode()
        await exchange.answer(200, body, JSON_MEDIA_TYPE)

    async def _get(self, exchange: Exchange, digest: str) -> None:
        if exchange.headers.get("sec-fetch-dest", "") in _RUN:
            told = NotSupported(
                "a blob is no program, and none is made of it here", reason="NO_PROGRAM"
            )
            body = status.rendered(told.to_status()).encode()
            await exchange.answer(403, body, JSON_MEDIA_TYPE)
            return
        call = self._stub.GetBlob(pb.GetBlobRequest(sha256=digest), **call_options(exchange))
        async with cancelled_when_gone(exchange, call):
            first = await call.read()
            await _send(exchange, first.header, call)


async def _requests(exchange: Exchange, header: BlobRef) -> AsyncIterator[pb.PutBlobRequest]:
    yield pb.PutBlobRequest(header=header)
    async for data in exchange.chunks():
        for start in range(0, len(data), _CHUNK_BYTES):
            yield pb.PutBlobRequest(chunk=data[start : start + _CHUNK_BYTES])


async def _send(exchange: Exchange, blob: BlobRef, call: Any) -> None:
    """The blob, or the part of it that is asked for."""
    etag = f'"{blob.sha256}"'
    common = [
        ("etag", etag),
        ("cache-control", "public, max-age=31536000, immutable"),
        ("accept-ranges", "bytes"),
        ("content-security-policy", _CONFINED),
    ]
    if _names(exchange.headers.get("if-none-match", ""), etag):
        await exchange.begin(304, common)
        await exchange.end()
        return
    wanted = exchange.headers.get("range", "")
    part = (
        _RANGE.fullmatch(wanted.strip()) if exchange.headers.get("if-range", etag) == etag else None
    )
    is_part = part is not None and _is_range(part[1], part[2])
    span = _span(part[1], part[2], blob.size_bytes) if part and is_part else range(blob.size_bytes)
    if is_part and not span:
        told = InvalidRequest.of(
            "Range", f"is {quote(wanted)}; the blob has {blob.size_bytes} bytes"
        )
        body = status.rendered(told.to_status()).encode()
        beyond = ("content-range", f"bytes */{blob.size_bytes}")
        await exchange.answer(416, body, JSON_MEDIA_TYPE, [beyond])
        return
    own = [("content-type", blob.media_type), ("content-length", str(len(span)))]
    if is_part:
        own.append(("content-range", f"bytes {span.start}-{span.stop - 1}/{blob.size_bytes}"))
        await exchange.begin(206, [*own, *common])
    else:
        await exchange.begin(200, [*own, *common])
    if exchange.method == "GET":
        await _write(exchange, span, call)
    await exchange.end()


async def _write(exchange: Exchange, span: range, call: Any) -> None:
    at = 0
    while at < span.stop and (part := await call.read()) is not grpc.aio.EOF:
        chunk = part.chunk
        wanted = chunk[max(0, span.start - at) : span.stop - at]
        at += len(chunk)
        if wanted:
            await exchange.write(wanted)


def _names(condition: str, etag: str) -> bool:
    """Whether `If-None-Match` names this one."""
    return condition.strip() == "*" or etag in (
        each.strip().removeprefix("W/") for each in condition.split(",")
    )


def _is_range(first: str, last: str) -> bool:
    """Whether these are the ends of one; what is none is passed over, as HTTP has it."""
    return bool(first or last) and not (first and last and int(first) > int(last))


def _span(first: str, last: str, size_bytes: int) -> range:
    """The bytes of a range, none where it lies beyond them; without a first it is so many at the end."""
    if not first:
        return range(max(0, size_bytes - int(last)), size_bytes)
    return range(int(first), min(int(last or size_bytes) + 1, size_bytes))
