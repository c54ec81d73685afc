"""Pictures in and out of the store by their digests: what is missing, uploads, downloads.

Main type: `Blobs`. An upload holds no more memory than it was admitted for, and a silent one keeps nobody from a turn.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence

from collage.v1 import collage_service_pb2
from services.common import wire
from services.common.blobs import BlobMissing, BlobRef, BlobStore
from services.common.errors import InvalidRequest, NotFound, Overloaded, quote
from services.common.field import Field

MAX_CHECKED_DIGESTS = 256
# Uploads held in memory at a time, each up to limits.MAX_BLOB_BYTES.
MAX_UPLOADS = 4
# Uploads that may wait for their turn.
MAX_WAITING_UPLOADS = 64
UPLOAD_TIMEOUT_S = 120.0
# Longest silence within an upload: a caller that sends nothing must not keep others from their turn.
UPLOAD_SILENCE_S = 10.0
CHUNK_BYTES = 1024 * 1024


class Blobs:
    """The blobs of a store, as callers send and read them."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)
        self._admitted = 0

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

    async def put(self, requests: AsyncIterator[collage_service_pb2.PutBlobRequest]) -> BlobRef:
        """Header, chunks, digest checked, stored.

        Raises:
            Overloaded: too many uploads wait.
            InvalidRequest: the messages are not what the header says.
        """
        if self._admitted >= MAX_UPLOADS + MAX_WAITING_UPLOADS:
            raise Overloaded(f"{MAX_WAITING_UPLOADS} uploads wait", retry_after_s=2.0)
        self._admitted += 1
        try:
            async with self._uploads:
                async with asyncio.timeout(UPLOAD_TIMEOUT_S):
                    blob, data = await _receive(requests)
                await self._store.create(blob.key, data, media_type=blob.media_type)
        finally:
            self._admitted -= 1
        return blob

    async def get(self, digest: str) -> AsyncIterator[collage_service_pb2.GetBlobResponse]:
        """Header, then chunks.

        Raises:
            NotFound: there is no such blob.
        """
        key = _key(digest, Field("sha256"))
        stat = await self._store.stat(key)
        if stat is None:
            raise _no_blob(digest)
        header = BlobRef(sha256=digest, size_bytes=stat.size_bytes, media_type=stat.media_type)
        yield collage_service_pb2.GetBlobResponse(header=wire.render_blob(header))
        try:
            async for chunk in self._store.read(key):
                yield collage_service_pb2.GetBlobResponse(chunk=chunk)
        except BlobMissing:
            raise _no_blob(digest) from None


async def _receive(
    requests: AsyncIterator[collage_service_pb2.PutBlobRequest],
) -> tuple[BlobRef, bytes]:
    """The header and the bytes of an upload, never holding more than is allowed."""
    header: BlobRef | None = None
    data = bytearray()
    while True:
        try:
            async with asyncio.timeout(UPLOAD_SILENCE_S):
                request = await anext(requests)
        except StopAsyncIteration:
            break
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
            data += request.chunk
            if len(data) > header.size_bytes:
                raise InvalidRequest.of(
                    "chunk", f"goes beyond header.size_bytes, {header.size_bytes}"
                )
    if header is None:
        raise InvalidRequest.of("header", "is missing; required: first message")
    if len(data) != header.size_bytes:
        raise InvalidRequest.of(
            "header.size_bytes", f"is {header.size_bytes}, but {len(data)} bytes came"
        )
    received = bytes(data)
    digest = hashlib.sha256(received).hexdigest()
    if digest != header.sha256:
        raise InvalidRequest.of("header.sha256", f"is {header.sha256}, but the bytes have {digest}")
    return header, received


def _key(digest: str, field: Field) -> str:
    try:
        return BlobRef(sha256=digest, size_bytes=0, media_type="a/b").key
    except ValueError:
        raise InvalidRequest.of(
            field, f"is {quote(digest)}; allowed: 64 lowercase hexadecimal digits"
        ) from None


def _no_blob(digest: str) -> NotFound:
    return NotFound(f"no blob {digest}", reason="BLOB_NOT_FOUND", metadata={"sha256": digest})
