"""Blob storage: named byte strings with a media type, and content-addressed references to them.

`BlobStore` is the seam; `FolderBlobStore` here (one machine) and `S3BlobStore` in `s3.py` (any S3
server) pass one suite. This module knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol, TypeVar

# S3 allows 1024 bytes; a file name on common file systems 255. Both leave room for what a store
# adds.
MAX_KEY_LENGTH = 512
MAX_KEY_PART_LENGTH = 200
_KEY_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
# What `read` yields at most in one piece.
CHUNK_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_T = TypeVar("_T")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,100}/[A-Za-z0-9!#$&^_.+-]{1,100}", re.ASCII)


class BlobStoreError(Exception):
    """Root of what a blob store raises. `retryable`: the same call may succeed later."""

    retryable: ClassVar[bool] = False


class BlobMissing(BlobStoreError):
    """Nothing is stored under this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no blob {key!r}")
        self.key = key


class BlobTooLarge(BlobStoreError):
    """The blob is larger than the caller is ready to hold."""

    def __init__(self, key: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"blob {key!r} has {size_bytes} bytes, the limit is {limit_bytes}")
        self.key = key
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class BlobCorrupt(BlobStoreError):
    """The stored bytes do not have the digest they are named after."""

    def __init__(self, key: str) -> None:
        super().__init__(f"blob {key!r} is damaged: its bytes do not match its digest")
        self.key = key


class BlobStoreUnavailable(BlobStoreError):
    """The store did not answer within the retry budget."""

    retryable: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """What bytes are: SHA-256 (64 lowercase hex digits), how many, and their media type."""

    sha256: str
    size_bytes: int
    media_type: str

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256 is {self.sha256!r}, must be 64 lowercase hex digits")
        if self.size_bytes < 0:
            raise ValueError(f"size_bytes is {self.size_bytes}, must not be negative")
        check_media_type(self.media_type)

    @property
    def key(self) -> str:
        """Where a store keeps these bytes."""
        return blob_key(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobStat:
    """What a store knows of a blob without reading it. `etag` changes whenever the bytes do.

    modified_at: unix seconds of the last write, by the store's clock.
    """

    size_bytes: int
    etag: str
    media_type: str
    modified_at: float


class BlobStore(Protocol):
    """Named byte strings.

    Every method may raise `BlobStoreUnavailable`, and ValueError for a bad key. A key is parts
    joined by `/`, each of ASCII letters, digits and `._-`, starting with a letter, digit or `_`; at
    most 512 characters, 200 a part. Never use a key as the folder of another: some S3 servers lose
    one of them when they list. What a returned write stored survives a crash of every process.
    """

    async def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """Store, replacing what was there."""
        ...

    async def create(self, key: str, data: bytes, *, media_type: str) -> bool:
        """Store where nothing is; of any number of racing calls exactly one answers True."""
        ...

    async def replace(self, key: str, data: bytes, *, etag: str, media_type: str) -> str | None:
        """Store where the blob still has this etag; answers the new one, None where it has not."""
        ...

    async def get(self, key: str, *, limit_bytes: int) -> bytes:
        """The whole blob. Raises `BlobMissing`, `BlobTooLarge`, `BlobCorrupt`."""
        ...

    def read(self, key: str) -> AsyncIterator[bytes]:
        """The blob in chunks of at most 1 MiB.

        Raises `BlobMissing` on first use, `BlobCorrupt` after the last chunk.
        """
        ...

    async def stat(self, key: str) -> BlobStat | None:
        """Size, etag and media type; None where nothing is stored."""
        ...

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> tuple[str, ...]:
        """The first `limit` keys with this prefix behind `after`, in the store's own order."""
        ...

    async def delete(self, key: str) -> None:
        """Remove; nothing there is no error."""
        ...

    async def presign(self, key: str, *, expires_s: int) -> str | None:
        """An address that reads it without credentials for so long; None where none is served."""
        ...

    async def ready(self) -> None:
        """Do a real round trip; raises `BlobStoreUnavailable` where that fails."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads."""
        ...


def blob_key(sha256: str) -> str:
    """The key of content-addressed bytes."""
    return f"blobs/{sha256}"


async def put_blob(store: BlobStore, data: bytes, *, media_type: str) -> BlobRef:
    """Store bytes under their digest; bytes the store has already are not sent again."""
    ref = BlobRef(
        sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), media_type=media_type
    )
    if await store.stat(ref.key) is None:
        await store.put(ref.key, data, media_type=media_type)
    return ref


def check_key(key: str) -> str:
    """The key itself where it is a safe one; raises ValueError."""
    parts = key.split("/")
    if len(key) > MAX_KEY_LENGTH or any(
        len(part) > MAX_KEY_PART_LENGTH or not _KEY_PART.fullmatch(part) for part in parts
    ):
        raise ValueError(
            f"key is {key[:80]!r}, must be parts of A-Z a-z 0-9 . _ - joined by '/', "
            "none starting with '.' or '-'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself where a safe key can start with it (or ""); raises ValueError."""
    if prefix:
        check_key(f"{prefix}x")
    return prefix


def check_media_type(media_type: str) -> str:
    """The media type itself where it reads `type/subtype`; raises ValueError."""
    if not _MEDIA_TYPE.fullmatch(media_type):
        raise ValueError(f"media_type is {media_type[:80]!r}, must read like 'image/png'")
    return media_type


def digest_in_key(key: str) -> str | None:
    """The SHA-256 that bytes under this key must have; None where the key does not name one."""
    folder, _, name = key.partition("/")
    return name if folder == "blobs" and _SHA256.fullmatch(name) else None


class FolderBlobStore:
    """Blobs as files under one folder, shared by any number of processes on one machine.

    A file is one line of JSON (media type, digest) and then the bytes, so that both change in one
    rename; the digest is the etag and is checked whenever the bytes are read. Names end in `@`,
    which no key holds, so that no file stands in a folder's place. Writers of one key take turns
    through a file lock; readers take none.
    """

    def __init__(self, root: Path, *, threads: int = 8) -> None:
        self._objects = root / "objects"
        self._unfinished = root / "unfinished"
        self._locks = root / "locks"
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="blobs")
        for folder in (self._objects, self._unfinished, self._locks):
            folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    async def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """See `BlobStore.put`."""
        await self._run(lambda: self._write(key, data, media_type, lambda _: True))

    async def create(self, key: str, data: bytes, *, media_type: str) -> bool:
        """See `BlobStore.create`."""
        etag = await self._run(
            lambda: self._write(key, data, media_type, lambda present: present is None)
        )
        return etag is not None

    async def replace(self, key: str, data: bytes, *, etag: str, media_type: str) -> str | None:
        """See `BlobStore.replace`."""
        return await self._run(
            lambda: self._write(
                key, data, media_type, lambda present: present is not None and present.etag == etag
            )
        )

    async def get(self, key: str, *, limit_bytes: int) -> bytes:
        """See `BlobStore.get`."""

        def get() -> bytes:
            with self._open(key) as (file, stat):
                if stat.size_bytes > limit_bytes:
                    raise BlobTooLarge(key, stat.size_bytes, limit_bytes)
                data = file.read()
            if hashlib.sha256(data).hexdigest() != (digest_in_key(key) or stat.etag):
                raise BlobCorrupt(key)
            return data

        return await self._run(get)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """See `BlobStore.read`."""
        with contextlib.ExitStack() as stack:
            file, stat = await self._run(lambda: stack.enter_context(self._open(key)))
            digest = hashlib.sha256()
            while chunk := await self._run(lambda: file.read(CHUNK_BYTES)):
                digest.update(chunk)
                yield chunk
            if digest.hexdigest() != (digest_in_key(key) or stat.etag):
                raise BlobCorrupt(key)

    async def stat(self, key: str) -> BlobStat | None:
        """See `BlobStore.stat`."""
        return await self._run(lambda: self._stat(key))

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> tuple[str, ...]:
        """See `BlobStore.list`."""

        def walk() -> Iterator[str]:
            # Only the folder that the prefix names can hold matches.
            start = self._objects.joinpath(*prefix.split("/")[:-1])
            for folder, _, names in os.walk(start):
                for name in names:
                    key = Path(folder, name).relative_to(self._objects).as_posix().removesuffix("@")
                    if key.startswith(prefix) and key > after:
                        yield key

        check_prefix(prefix)
        return await self._run(lambda: tuple(sorted(walk())[:limit]))

    async def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""

        def delete() -> None:
            path = self._path(key)
            with self._locked(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                _sync_folder(path.parent)

        await self._run(delete)

    async def presign(self, key: str, *, expires_s: int) -> None:
        """A folder serves no addresses."""
        check_key(key)

    async def ready(self) -> None:
        """See `BlobStore.ready`."""

        def round_trip() -> None:
            path = self._unfinished / uuid.uuid4().hex
            path.write_bytes(b"ready")
            path.unlink()

        await self._run(round_trip)

    async def close(self) -> None:
        """See `BlobStore.close`."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _path(self, key: str) -> Path:
        return self._objects / f"{check_key(key)}@"

    def _write(
        self, key: str, data: bytes, media_type: str, allowed: Callable[[BlobStat | None], bool]
    ) -> str | None:
        """Write if `allowed` agrees with what is there; answers the new etag."""
        path = self._path(key)
        etag = hashlib.sha256(data).hexdigest()
        head = json.dumps({"media_type": check_media_type(media_type), "sha256": etag})
        unfinished = self._unfinished / uuid.uuid4().hex
        try:
            with unfinished.open("xb") as file:
                file.write(head.encode() + b"\n")
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with self._locked(key):
                if not allowed(self._stat(key)):
                    return None
                self._make_folder(path.parent)
                unfinished.replace(path)
                _sync_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
        return etag

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            _sync_folder(folder.parent)

    def _stat(self, key: str) -> BlobStat | None:
        try:
            with self._open(key) as (_, stat):
                return stat
        except BlobMissing:
            return None

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, BlobStat]]:
        """The file, placed at the first byte of the blob."""
        try:
            file = self._path(key).open("rb")
        except FileNotFoundError:
            raise BlobMissing(key) from None
        with file:
            try:
                head = json.loads(file.readline(1000))
                status = os.fstat(file.fileno())
                stat = BlobStat(
                    size_bytes=status.st_size - file.tell(),
                    etag=head["sha256"],
                    media_type=head["media_type"],
                    modified_at=status.st_mtime,
                )
            except (ValueError, KeyError, TypeError):
                raise BlobCorrupt(key) from None
            yield file, stat

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """One writer at a time per key, in all threads and processes; few files lock all keys."""
        with (self._locks / f"{zlib.crc32(key.encode()) % 64:02}").open("wb") as file:
            deadline = time.monotonic() + 30.0
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise BlobStoreUnavailable(f"blob {key!r} stays locked") from None
                    time.sleep(0.002)
            yield

    def _sweep(self) -> None:
        """Remove what writers that died left behind an hour ago or more."""
        for path in self._unfinished.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - 3600:
                    path.unlink()

    async def _run(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except OSError as error:
            # A full or read-only disk may be mended; the caller may try again.
            raise BlobStoreUnavailable(f"blob folder: {error}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
