"""Blob storage: named byte strings with a media type, and content-addressed references to them.

`BlobStore` is the seam; `FolderBlobStore` here (one machine) and `S3BlobStore` in `s3.py` (any S3
server) pass one suite. This module knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
# How often, and how long after its last byte came, a file that no writer holds is swept.
SWEEP_EVERY_S, ABANDONED_S = 600.0, 600.0
# Room that a store must have to be ready: as much as a small picture and its records take.
_LEAST_ROOM_BYTES = 256 * 1024
_MAX_HEAD_BYTES = 1000
# More than this is hashed in a thread: 64 MiB take a thirtieth of a second.
_HASHED_AT_ONCE_BYTES = 1 << 20
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
    """The stored bytes were not those that were stored.

    Said once: a store that can be written holds nothing under this key from then on.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"blob {key!r} was damaged: its bytes do not have its digest")
        self.key = key


class BlobStoreUnavailable(BlobStoreError):
    """The store did not do it, within the retry budget where another try could help."""

    retryable: ClassVar[bool] = True


class BlobStoreFull(BlobStoreUnavailable):
    """The store has no space left, or a quota is used up; what it holds can still be read."""


class BlobStoreDenied(BlobStoreUnavailable):
    """The store refuses this process: read-only, or credentials or rights that do not do."""


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

    Every method may raise `BlobStoreUnavailable`, and ValueError for a bad key. What is seen to be
    damaged counts as missing: a look sees what was cut short, a read every changed byte. A key is parts
    joined by `/`, each of ASCII letters, digits and `._-`, starting with a letter, digit or `_`; at
    most 512 characters, 200 a part. Never use a key as the folder of another: some S3 servers lose
    one of them when they list. What a returned write stored survives a crash of every process.
    """

    async def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """Store, replacing what was there."""
        ...

    async def create(self, key: str, data: bytes, *, media_type: str) -> bool:
        """Store where nothing is, or what is there is damaged.

        Of any number of racing calls exactly one answers True.
        """
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


async def digest_of(data: bytes) -> str:
    """The SHA-256 of bytes, in hexadecimal; in a thread where that would keep others waiting."""
    if len(data) < _HASHED_AT_ONCE_BYTES:
        return hashlib.sha256(data).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()


async def put_blob(store: BlobStore, data: bytes, *, media_type: str) -> BlobRef:
    """Store bytes under their digest; bytes the store has already, undamaged, are not sent again."""
    ref = BlobRef(sha256=await digest_of(data), size_bytes=len(data), media_type=media_type)
    try:
        # Read, not looked at: damage that nobody has met yet is healed here.
        await store.get(ref.key, limit_bytes=len(data))
    except (BlobMissing, BlobCorrupt, BlobTooLarge):
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

    A file is one line of JSON (media type, digest, size) and then the bytes, so that all change in
    one rename; the digest is the etag and is checked whenever the bytes are read. Names end in `@`,
    which no key holds, so that no file stands in a folder's place. Writers of one key take turns
    through a file lock; readers take none. Files and folders are their owner's alone.
    """

    def __init__(self, root: Path, *, threads: int = 8) -> None:
        """Opens the folder, made where absent. Raises `BlobStoreUnavailable` where that fails."""
        self._root = root
        self._objects = root / "objects"
        self._unfinished = root / "unfinished"
        self._locks = root / "locks"
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="blobs")
        self._sweep_at = time.monotonic() + SWEEP_EVERY_S
        try:
            for folder in (self._objects, self._unfinished, self._locks):
                _make_folder(folder)
            self._sweep()
        except OSError as error:
            raise self._failure(error) from error

    async def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """See `BlobStore.put`."""
        await self._run(lambda: self._write(key, data, media_type, lambda _: True))

    async def create(self, key: str, data: bytes, *, media_type: str) -> bool:
        """See `BlobStore.create`."""
        etag = await self._run(
            lambda: self._write(
                key,
                data,
                media_type,
                lambda present: present is None or not self._is_sound(key),
            )
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
            if hashlib.sha256(data).hexdigest() != stat.etag:
                raise BlobCorrupt(key)
            return data

        def unless_damaged() -> bytes:
            try:
                return get()
            except BlobCorrupt:
                told = self._seen_damaged(key)
            if isinstance(told, BlobCorrupt):
                raise told
            # Somebody healed it meanwhile.
            return get()

        return await self._run(unless_damaged)

    async def read(self, key: str) -> AsyncIterator[bytes]:
        """See `BlobStore.read`."""
        with contextlib.ExitStack() as stack:
            try:
                file, stat = await self._run(lambda: stack.enter_context(self._open(key)))
                digest = hashlib.sha256()
                while chunk := await self._run(lambda: file.read(CHUNK_BYTES)):
                    digest.update(chunk)
                    yield chunk
                if digest.hexdigest() != stat.etag:
                    raise BlobCorrupt(key)
            except BlobCorrupt:
                raise await self._run(lambda: self._seen_damaged(key)) from None

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
            with self._draft() as (path, file):
                # Files of a few bytes may find room where pictures do not.
                file.write(bytes(_LEAST_ROOM_BYTES))
                file.flush()
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
        head = _Head(media_type=check_media_type(media_type), sha256=etag, size_bytes=len(data))
        if time.monotonic() > self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_EVERY_S
            self._sweep()
        with self._draft() as (draft, file):
            file.write(head.to_line())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            with self._locked(key):
                if not allowed(self._stat(key)):
                    return None
                _make_folder(path.parent)
                draft.replace(path)
                _sync_folder(path.parent)
        return etag

    @contextlib.contextmanager
    def _draft(self) -> Iterator[tuple[Path, BinaryIO]]:
        """A new unfinished file, held by a lock for as long as it is one."""
        path = self._unfinished / uuid.uuid4().hex
        try:
            with open(path, "xb", opener=_private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    def _stat(self, key: str) -> BlobStat | None:
        try:
            with self._open(key) as (_, stat):
                return stat
        except (BlobMissing, BlobCorrupt):
            return None

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[tuple[BinaryIO, BlobStat]]:
        """The file, placed at the first byte of the blob. Raises `BlobMissing`, `BlobCorrupt`."""
        try:
            file = self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            raise BlobMissing(key) from None
        with file:
            status = os.fstat(file.fileno())
            head = _Head.of_line(file.readline(_MAX_HEAD_BYTES))
            size_bytes = status.st_size - file.tell()
            if (
                head is None
                or head.size_bytes not in (None, size_bytes)
                or digest_in_key(key) not in (None, head.sha256)
            ):
                raise BlobCorrupt(key)
            yield (
                file,
                BlobStat(
                    size_bytes=size_bytes,
                    etag=head.sha256,
                    media_type=head.media_type,
                    modified_at=status.st_mtime,
                ),
            )

    def _seen_damaged(self, key: str) -> BlobStoreError:
        """What to say of a blob that was read damaged, which is removed if a second look agrees."""
        try:
            with self._locked(key):
                if self._is_sound(key):
                    return BlobStoreUnavailable(f"blob {key!r} was read wrongly; read it again")
                self._path(key).unlink()
                _sync_folder(self._path(key).parent)
        except (OSError, BlobMissing, BlobStoreUnavailable):
            # Somebody else removed it, or nobody can: damaged it was.
            pass
        return BlobCorrupt(key)

    def _is_sound(self, key: str) -> bool:
        try:
            with self._open(key) as (file, stat):
                digest = hashlib.sha256()
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                return digest.hexdigest() == stat.etag
        except BlobCorrupt:
            return False

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """One writer at a time per key, in all threads and processes; few files lock all keys."""
        lock = self._locks / f"{zlib.crc32(key.encode()) % 64:02}"
        with open(lock, "wb", opener=_private) as file:
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
        """Remove what writers that died left behind: old, and held by none."""
        for path in self._unfinished.iterdir():
            # Gone meanwhile, held, or not to be removed by this process.
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - ABANDONED_S:
                    with path.open("rb") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()

    async def _run(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> BlobStoreUnavailable:
        """What the system said, as what it means: each may be mended, and the call made again."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return BlobStoreFull(
                f"no space is left for {self._root}: free some, or move the folder to a larger disk"
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return BlobStoreDenied(
                f"{self._root} is closed to this process ({error.strerror}): it must be able to read "
                "and write there"
            )
        return BlobStoreUnavailable(f"blob folder: {error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The first line of a file. `size_bytes` is None in files of earlier versions, which had no check either."""

    media_type: str
    sha256: str
    size_bytes: int | None

    def to_line(self) -> bytes:
        told = {"media_type": self.media_type, "sha256": self.sha256, "size_bytes": self.size_bytes}
        return json.dumps({**told, "check": self._check()}).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> _Head | None:
        """None for a damaged one."""
        try:
            told = json.loads(line)
            head = cls(
                media_type=check_media_type(told["media_type"]),
                sha256=told["sha256"],
                size_bytes=told.get("size_bytes"),
            )
            is_whole = bool(line.endswith(b"\n") and _SHA256.fullmatch(head.sha256))
            if "check" in told or head.size_bytes is not None:
                is_whole = is_whole and told["check"] == head._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return head if is_whole else None

    def _check(self) -> int:
        return zlib.crc32(f"{self.media_type} {self.sha256} {self.size_bytes}".encode())


def _make_folder(folder: Path) -> None:
    """The folder and those above it, as far as they are made here for their owner alone."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _sync_folder(folder.parent)


def _private(path: str, flags: int) -> int:
    """Opens a file that is made for its owner alone."""
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
