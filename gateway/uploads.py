"""Pictures in and out of the store by their digests: what is missing, uploads, downloads.

Main type: `Blobs`. An upload may take as long as it likes while bytes come. It holds what has come, and what all hold
is bounded, so that neither a slow caller nor a large picture keeps another from uploading.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from collage.v1 import collage_service_pb2
from services.common import limits, wire
from services.common.admission import Budget
from services.common.blobs import BlobMissing, BlobRef, BlobStore, digest_of
from services.common.errors import DeadlinePassed, InvalidRequest, NotFound, quote
from services.common.field import Field

MAX_CHECKED_DIGESTS = 256
# What uploads under way may hold in memory, of one connection and in all.
MAX_HELD_BYTES = 8 * limits.MAX_BLOB_BYTES
MAX_PEER_HELD_BYTES = 2 * limits.MAX_BLOB_BYTES
# Uploads under way, of one connection and in all.
MAX_UPLOADS, MAX_PEER_UPLOADS = 512, 64
# The least that must come in each span of time. Whoever sends less cannot be told from one who only means to stay.
LEAST_BYTES = 64 * 1024
LEAST_BYTES_S = 20.0
CHUNK_BYTES = 1024 * 1024


class Blobs:
    """The blobs of a store, as callers send and read them."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._uploads = Budget("uploads", total=MAX_UPLOADS, peer=MAX_PEER_UPLOADS)
        self._held = Budget("bytes of uploads", total=MAX_HELD_BYTES, peer=MAX_PEER_HELD_BYTES)

    async def missing(self, digests: Sequence[str]) -> list[str]:
        """Which digests are unknown here.

        Raises:
            InvalidRequest: one is no digest, or there are too many.
        """
        if len(digests) > MAX_CHECKED_DIGESTS:
            raise InvalidRequest.of(
                "sha256", f"has {len(digests)} digests; allowed: {MAX_CHECKED_DIGESTS}"
            )
        keys = [_key(digest, Field("sha256")[i]) for i, digest in enumerate(digests)]
        stats = await asyncio.gather(*map(self._store.stat, keys))
        return [digest for digest, stat in zip(digests, stats, strict=True) if stat is None]

    async def put(
        self, requests: AsyncIterator[collage_service_pb2.PutBlobRequest], *, peer: str
    ) -> BlobRef:
        """Header, chunks, digest checked, stored.

        Args:
            requests: as they come.
            peer: the connection they come over.

        Raises:
            Overloaded: too many uploads, or too much held by them.
            DeadlinePassed: less than the least came in time.
            InvalidRequest: the messages are not what the header says.
        """
        self._uploads.take(peer, 1)
        held = _Held(self._held, peer)
        try:
            blob, data = await _receive(requests, held)
            await self._store.create(blob.key, data, media_type=blob.media_type)
        finally:
            held.give_back()
            self._uploads.give(peer, 1)
        return blob

    async def get(self, digest: str) -> AsyncIterator[collage_service_pb2.GetBlobResponse]:
        """Header, then chunks.

        Raises:
            NotFound: there is no such blob.
            BlobCorrupt: there was one, and it is damaged.
        """
        key = _key(digest, Field("sha256"))
        chunks = self._store.read(key)
        try:
            # Read before it is looked at: what is damaged is missing to whoever only looks.
            chunk = await anext(chunks, None)
            stat = await self._store.stat(key)
            if stat is None:
                raise BlobMissing(key)
            header = BlobRef(sha256=digest, size_bytes=stat.size_bytes, media_type=stat.media_type)
            yield collage_service_pb2.GetBlobResponse(header=wire.render_blob(header))
            while chunk is not None:
                yield collage_service_pb2.GetBlobResponse(chunk=chunk)
                chunk = await anext(chunks, None)
        except BlobMissing:
            raise _no_blob(digest) from None


class _Held:
    """What one upload holds of the budget of all."""

    def __init__(self, budget: Budget, peer: str) -> None:
        self._budget, self._peer = budget, peer
        self._bytes = 0

    def take(self, size_bytes: int) -> None:
        """Raises `Overloaded` where that is more than there is."""
        self._budget.take(self._peer, size_bytes)
        self._bytes += size_bytes

    def give_back(self) -> None:
        self._budget.give(self._peer, self._bytes)


async def _receive(
    requests: AsyncIterator[collage_service_pb2.PutBlobRequest], held: _Held
) -> tuple[BlobRef, bytes]:
    """The header and the bytes of an upload, never holding more than is allowed."""
    header: BlobRef | None = None
    data = bytearray()
    async for request in _kept_coming(requests):
        if request.HasField("header"):
            if header is not None:
                raise InvalidRequest.of("header", "came twice; allowed: once, first")
            header = wire.parse_blob(request.header, "header")
        elif header is None:
            raise InvalidRequest.of("header", "is missing; required: first message")
        elif not 1 <= len(request.chunk) <= CHUNK_BYTES:
            raise InvalidRequest.of(
                "chunk",
                f"has {len(request.chunk)} bytes; allowed: from 1 to {CHUNK_BYTES} a message",
            )
        else:
            if len(data) + len(request.chunk) > header.size_bytes:
                raise InvalidRequest.of(
                    "chunk", f"goes beyond header.size_bytes, {header.size_bytes}"
                )
            held.take(len(request.chunk))
            data += request.chunk
    if header is None:
        raise InvalidRequest.of("header", "is missing; required: first message")
    if len(data) != header.size_bytes:
        raise InvalidRequest.of(
            "header.size_bytes", f"is {header.size_bytes}, but {len(data)} bytes came"
        )
    received = bytes(data)
    digest = await digest_of(received)
    if digest != header.sha256:
        raise InvalidRequest.of("header.sha256", f"is {header.sha256}, but the bytes have {digest}")
    return header, received


async def _kept_coming(
    requests: AsyncIterator[collage_service_pb2.PutBlobRequest],
) -> AsyncIterator[collage_service_pb2.PutBlobRequest]:
    """The messages of an upload, for as long as the least comes in each span of time."""
    came, end = 0, time.monotonic() + LEAST_BYTES_S
    coming = asyncio.ensure_future(anext(requests, None))
    try:
        while True:
            # Not with a timeout: that would end the messages, and they may go on in the next span.
            await asyncio.wait((coming,), timeout=max(0.0, end - time.monotonic()))
            if coming.done():
                request = coming.result()
                if request is None:
                    return
                came += len(request.chunk)
                yield request
                coming = asyncio.ensure_future(anext(requests, None))
            if time.monotonic() >= end:
                if came < LEAST_BYTES:
                    raise DeadlinePassed(
                        f"{came} bytes came within {LEAST_BYTES_S:g} s; required: at least {LEAST_BYTES}",
                        reason="UPLOAD_TOO_SLOW",
                    )
                came, end = 0, time.monotonic() + LEAST_BYTES_S
    finally:
        coming.cancel()


def _key(digest: str, field: Field) -> str:
    try:
        return BlobRef(sha256=digest, size_bytes=0, media_type="a/b").key
    except ValueError:
        raise InvalidRequest.of(
            field, f"is {quote(digest)}; allowed: 64 lowercase hexadecimal digits"
        ) from None


def _no_blob(digest: str) -> NotFound:
    return NotFound(f"no blob {digest}", reason="BLOB_NOT_FOUND", metadata={"sha256": digest})
