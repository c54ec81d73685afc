"""`S3BlobStore`: blobs in one bucket of any S3 server that honours conditional writes.

The `minio` client is synchronous: its calls run in a bounded pool of threads. Its own retries are
off; one loop here tries again while the server is away, and a write whose answer was lost
recognises itself by a mark it left. Every object holds the digest of its bytes, which is checked
whenever they are read. A damaged one under its digest is emptied where it still has the etag it was
read with, so that no write that heals it meanwhile is lost, and an empty one counts as missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import minio
import minio.error
import urllib3

from services.common.blobs import (
    CHUNK_BYTES,
    BlobCorrupt,
    BlobMissing,
    BlobStat,
    BlobStoreDenied,
    BlobStoreError,
    BlobStoreFull,
    BlobStoreUnavailable,
    BlobTooLarge,
    check_key,
    check_media_type,
    check_prefix,
    digest_in_key,
    digest_of,
)

_T = TypeVar("_T")

# Names the write that stored an object.
_WRITER_HEADER = "x-amz-meta-writer"
# The SHA-256 of the bytes that were stored; objects of earlier versions have none.
_DIGEST_HEADER = "x-amz-meta-sha256"
_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
# Seconds before a try is given up: to connect, and between two bytes.
_CONNECT_S = 2.0
_READ_S = 30.0
# Seconds between two tries, doubling from the first to the last.
_FIRST_PAUSE_S = 0.1
_LAST_PAUSE_S = 2.0
_MISSING = frozenset({"NoSuchKey", "ResourceNotFound"})
# What S3 servers answer when the same request may succeed in a moment.
_TRANSIENT = frozenset(
    {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown"}
)
# What they answer when they have no room: MinIO, Ceph, and what the status 507 means.
_FULL = frozenset(
    {
        "InsufficientStorage",
        "QuotaExceeded",
        "XMinioAdminBucketQuotaExceeded",
        "XMinioStorageFull",
    }
)
# Times a blob is read whose bytes were wrong once and right on a second look.
_LOOKS = 3
_FULL_STATUS, _DENIED_STATUSES = 507, (401, 403)
# What the client raises when a request fails.
_FAILURES = (minio.error.MinioException, urllib3.exceptions.HTTPError, OSError)


class S3BlobStore:
    """See `BlobStore`. Open with `S3BlobStore.open`."""

    def __init__(
        self,
        client: minio.Minio,
        bucket: str,
        *,
        threads: int,
        retry_s: float,
        public: minio.Minio | None = None,
    ) -> None:
        self._client = client
        # Signs for the address that callers use; it never connects.
        self._public = public
        self._bucket = bucket
        self._retry_s = retry_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="s3")

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        access_key: str,
        secret_key: str,
        bucket: str,
        region: str = "us-east-1",
        threads: int = 16,
        retry_s: float = 45.0,
        public_url: str = "",
    ) -> S3BlobStore:
        """Connect to a server, creating the bucket where absent.

        Args:
            url: http or https, host, port.
            access_key: of the server.
            secret_key: of the server.
            bucket: its name.
            region: what requests are signed for.
            threads: requests at a time.
            retry_s: how long an operation waits for a server that is away.
            public_url: the same server as callers reach it, of the same form; empty where they do not.

        Raises:
            ValueError: an address is of another form.
            BlobStoreUnavailable: the server is away.
        """

        def client_of(url: str) -> minio.Minio:
            address = urllib.parse.urlsplit(url)
            is_right = address.scheme in ("http", "https") and address.hostname
            if not is_right or "@" in address.netloc or address.path.strip("/") or address.query:
                raise ValueError(f"url is {url!r}, must read like 'https://host:port'")
            return minio.Minio(
                address.netloc,
                access_key=access_key,
                secret_key=secret_key,
                secure=address.scheme == "https",
                region=region,
                http_client=urllib3.PoolManager(
                    maxsize=2 * threads,
                    retries=False,
                    timeout=urllib3.Timeout(connect=_CONNECT_S, read=_READ_S),
                ),
            )

        public = client_of(public_url) if public_url else None
        store = cls(client_of(url), bucket, threads=threads, retry_s=retry_s, public=public)
        try:
            await store._request(store._create_bucket)
        except BaseException:
            await store.close()
            raise
        return store

    async def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """See `BlobStore.put`. More than 5 MiB goes in parts, a few at once."""
        check_key(key)
        check_media_type(media_type)
        await self._request(
            lambda: self._client.put_object(
                self._bucket,
                key,
                io.BytesIO(data),
                len(data),
                content_type=media_type,
                metadata={_DIGEST_HEADER: hashlib.sha256(data).hexdigest()},
            )
        )

    async def create(self, key: str, data: bytes, *, media_type: str) -> bool:
        """See `BlobStore.create`."""
        etag = await self._write_if(key, data, media_type, {"If-None-Match": "*"})
        found = await self._head(key) if etag is None else None
        # What is damaged counts as missing.
        if found and (_is_void(key, found) or not await self._is_sound(key, found.etag)):
            etag = await self._write_if(key, data, media_type, _same(found.etag))
        return etag is not None

    async def replace(self, key: str, data: bytes, *, etag: str, media_type: str) -> str | None:
        """See `BlobStore.replace`."""
        return await self._write_if(key, data, media_type, _same(etag))

    async def get(self, key: str, *, limit_bytes: int) -> bytes:
        """See `BlobStore.get`."""
        check_key(key)

        def get() -> tuple[bytes, Mapping[str, str]]:
            with contextlib.closing(self._client.get_object(self._bucket, key)) as response:
                size_bytes = int(response.headers["Content-Length"])
                if size_bytes > limit_bytes:
                    raise BlobTooLarge(key, size_bytes, limit_bytes)
                data: bytes = response.read()
                response.release_conn()
                return data, response.headers

        for _ in range(_LOOKS):
            data, headers = await self._request(get, key)
            digest, expected = await digest_of(data), _expected(key, headers)
            if expected in (None, digest):
                return data
            if not data and headers.get(_DIGEST_HEADER) == _EMPTY_SHA256:
                raise BlobMissing(key)
            told = await self._seen_damaged(key, headers["ETag"].strip('"'))
            if isinstance(told, BlobCorrupt):
                break
        raise told

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """See `BlobStore.read`. Each chunk is a request of its own, and can be tried again."""
        stat = await self._head(key)
        if stat is None or (
            _is_void(key, stat) and stat.metadata.get(_DIGEST_HEADER) == _EMPTY_SHA256
        ):
            raise BlobMissing(key)
        # The bytes of one version, even when the key is written meanwhile.
        same = _same(stat.etag)

        def get(offset: int, length: int) -> bytes:
            response = self._client.get_object(
                self._bucket, key, offset=offset, length=length, request_headers=dict(same)
            )
            with contextlib.closing(response):
                data: bytes = response.read()
                response.release_conn()
                return data

        digest = hashlib.sha256()
        for offset in range(0, stat.size, CHUNK_BYTES):
            length = min(CHUNK_BYTES, stat.size - offset)
            try:
                chunk = await self._request(functools.partial(get, offset, length), key)
            except minio.error.S3Error as error:
                if error.code == "PreconditionFailed":
                    raise BlobStoreUnavailable(f"blob {key!r} changed while it was read") from error
                raise
            digest.update(chunk)
            yield chunk
        if _expected(key, stat.metadata) not in (None, digest.hexdigest()):
            raise await self._seen_damaged(key, stat.etag)

    async def stat(self, key: str) -> BlobStat | None:
        """See `BlobStore.stat`."""
        found = await self._head(key)
        if found is None or _is_void(key, found):
            return None
        return BlobStat(
            size_bytes=found.size,
            etag=found.etag,
            media_type=found.content_type,
            modified_at=found.last_modified.timestamp(),
        )

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> tuple[str, ...]:
        """See `BlobStore.list`."""
        check_prefix(prefix)

        def listing() -> tuple[str, ...]:
            found = self._client.list_objects(
                self._bucket, prefix=prefix, recursive=True, start_after=after or None
            )
            return tuple(each.object_name for each in itertools.islice(found, limit))

        return await self._request(listing)

    async def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        check_key(key)
        await self._request(lambda: self._client.remove_object(self._bucket, key))

    async def presign(self, key: str, *, expires_s: int) -> str | None:
        """See `BlobStore.presign`. At most seven days; None where callers do not reach the server."""
        check_key(key)
        if self._public is None:
            return None
        expires = datetime.timedelta(seconds=expires_s)
        url: str = self._public.presigned_get_object(self._bucket, key, expires=expires)
        return url

    async def ready(self) -> None:
        """See `BlobStore.ready`: stores, reads and removes a blob, without trying again."""
        key = f"ready/{uuid.uuid4().hex}"

        def round_trip() -> None:
            self._client.put_object(self._bucket, key, io.BytesIO(b"ready"), 5)
            with contextlib.closing(self._client.get_object(self._bucket, key)) as response:
                found = response.read()
                response.release_conn()
            self._client.remove_object(self._bucket, key)
            if found != b"ready":
                raise OSError("other bytes came back than were stored")

        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, round_trip)
        except _FAILURES as error:
            raise _failure(error) or BlobStoreUnavailable(f"S3 server: {error}") from error

    async def close(self) -> None:
        """See `BlobStore.close`."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _create_bucket(self) -> None:
        if not self._client.bucket_exists(self._bucket):
            try:
                self._client.make_bucket(self._bucket)
            except minio.error.S3Error as error:
                # Another process was faster.
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    async def _write_if(
        self, key: str, data: bytes, media_type: str, condition: Mapping[str, str]
    ) -> str | None:
        """Write where the condition holds and answer the etag; None where it does not."""
        writer = uuid.uuid4().hex
        headers = {
            "Content-Type": check_media_type(media_type),
            _WRITER_HEADER: writer,
            _DIGEST_HEADER: await digest_of(data),
            **condition,
        }
        check_key(key)
        try:
            # The public `put_object` passes no conditions on.
            stored = await self._request(
                lambda: self._client._put_object(self._bucket, key, data, dict(headers))
            )
        except minio.error.S3Error as error:
            if error.code != "PreconditionFailed" and error.code not in _MISSING:
                raise
            # An earlier try whose answer was lost may be what stands in the way.
            found = await self._head(key)
            is_own = found is not None and found.metadata.get(_WRITER_HEADER) == writer
            return found.etag if is_own else None
        etag: str = stored.etag
        return etag

    async def _head(self, key: str) -> Any:
        """The client's account of what is stored, None where nothing is."""
        check_key(key)
        try:
            return await self._request(lambda: self._client.stat_object(self._bucket, key), key)
        except BlobMissing:
            return None

    async def _is_sound(self, key: str, etag: str) -> bool:
        """Has the blob of this etag the digest it must have? Also where another has taken its place."""

        def look() -> bool:
            response = self._client.get_object(self._bucket, key, request_headers=_same(etag))
            with contextlib.closing(response):
                digest = hashlib.sha256()
                while chunk := response.read(CHUNK_BYTES):
                    digest.update(chunk)
                return _expected(key, response.headers) in (None, digest.hexdigest())

        try:
            return await self._request(look, key)
        except minio.error.S3Error as error:
            if error.code == "PreconditionFailed":
                return True
            raise
        except BlobMissing:
            return True

    async def _seen_damaged(self, key: str, etag: str) -> BlobStoreError:
        """What to say of a blob that was read damaged, which is emptied if a second look agrees."""
        try:
            if await self._is_sound(key, etag):
                return BlobStoreUnavailable(f"blob {key!r} was read wrongly; read it again")
            if digest_in_key(key):
                await self._write_if(key, b"", "application/octet-stream", _same(etag))
            else:
                # What is kept under another key is made anew by whoever misses it.
                await self.delete(key)
        except (BlobStoreError, *_FAILURES):
            # Somebody else was faster, or nobody can: damaged it was.
            pass
        return BlobCorrupt(key)

    async def _request(self, work: Callable[[], _T], key: str = "") -> _T:
        """Do `work` in a thread, again and again while the server is away and the budget lasts."""
        deadline = time.monotonic() + self._retry_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._executor, work)
            except _FAILURES as error:
                if key and isinstance(error, minio.error.S3Error) and error.code in _MISSING:
                    raise BlobMissing(key) from None
                if (told := _failure(error)) is not None:
                    raise told from error
                if not _is_transient(error):
                    raise
                if time.monotonic() + pause_s > deadline:
                    raise BlobStoreUnavailable(f"S3 server: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)


def _same(etag: str) -> dict[str, str]:
    return {"If-Match": f'"{etag}"'}


def _expected(key: str, headers: Mapping[str, str]) -> str | None:
    """The digest that the bytes must have; None where nothing says."""
    return digest_in_key(key) or headers.get(_DIGEST_HEADER)


def _is_void(key: str, found: Any) -> bool:
    """Was this emptied: here, where it was seen to be damaged, or by a stranger?"""
    return found.size == 0 and digest_in_key(key) not in (None, _EMPTY_SHA256)


def _failure(error: Exception) -> BlobStoreUnavailable | None:
    """What a server that refuses for good means by it; None for anything else."""
    if not isinstance(error, minio.error.S3Error):
        return None
    if error.code in _FULL or error.response.status == _FULL_STATUS:
        return BlobStoreFull(
            f"the S3 server has no space left or a quota is used up ({error.code})"
        )
    if error.response.status in _DENIED_STATUSES:
        return BlobStoreDenied(f"the S3 server refuses this process ({error.code})")
    if error.code == "NoSuchBucket":
        return BlobStoreUnavailable("the bucket is gone from the S3 server")
    return None


def _is_transient(error: Exception) -> bool:
    if isinstance(error, minio.error.S3Error):
        return error.code in _TRANSIENT or error.response.status >= 500
    if isinstance(error, minio.error.InvalidResponseError):
        return int(error._code) >= 500
    return True
