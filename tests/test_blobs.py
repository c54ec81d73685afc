"""One suite for both blob stores: a folder and a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import http.server
import io
import multiprocessing
import os
import random
import threading
import time
import traceback
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from gateway.jobs.database import Database
from local.processes import free_port
from services.common import blobs
from services.common.blobs import (
    MAX_KEY_LENGTH,
    BlobCorrupt,
    BlobMissing,
    BlobRef,
    BlobStore,
    BlobStoreDenied,
    BlobStoreFull,
    BlobStoreUnavailable,
    BlobTooLarge,
    FolderBlobStore,
    check_key,
    put_blob,
)
from services.common.s3 import S3BlobStore
from services.common.settings import InvalidSetting, open_blobs
from testing.servers import ACCESS_KEY, SECRET_KEY, Server, seaweed

pytestmark = pytest.mark.asyncio(loop_scope="module")

PNG = "image/png"
BYTES = "application/octet-stream"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with seaweed(tmp_path_factory.mktemp("weed")) as running:
        yield running


async def open_s3(server: Server, bucket: str = "collage-test", **limits: Any) -> S3BlobStore:
    return await S3BlobStore.open(
        server.url,
        access_key=ACCESS_KEY,
        secret_key=SECRET_KEY,
        bucket=bucket,
        **{"public_url": server.url.replace("127.0.0.1", "localhost"), **limits},
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["folder", "s3"])
async def opener(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Awaitable[BlobStore]]:
    """Opens one store over and over, as several processes would."""
    if request.param == "s3":
        return lambda: open_s3(server)
    root = tmp_path_factory.mktemp("blobs")

    async def open_folder() -> BlobStore:
        return FolderBlobStore(root)

    return open_folder


@pytest_asyncio.fixture(loop_scope="module")
async def store(opener: Callable[[], Awaitable[BlobStore]]) -> AsyncIterator[BlobStore]:
    opened = await opener()
    yield opened
    await opened.close()


@pytest.fixture
def folder() -> str:
    """A part of the store that no other test uses."""
    return f"test/{uuid.uuid4().hex}"


async def read_all(store: BlobStore, key: str) -> bytes:
    return b"".join([chunk async for chunk in store.read(key)])


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 11 << 20])
async def test_bytes_come_back(store: BlobStore, folder: str, size: int) -> None:
    data = random.Random(size).randbytes(size)
    key = f"{folder}/data.bin"
    await store.put(key, data, media_type=PNG)
    assert await store.get(key, limit_bytes=size) == data
    assert await read_all(store, key) == data
    stat = await store.stat(key)
    assert stat is not None
    assert (stat.size_bytes, stat.media_type) == (size, PNG)
    assert abs(stat.modified_at - time.time()) < 60
    if size:
        with pytest.raises(BlobTooLarge) as refused:
            await store.get(key, limit_bytes=size - 1)
        assert refused.value.size_bytes == size


async def test_put_replaces_bytes_and_media_type(store: BlobStore, folder: str) -> None:
    key = f"{folder}/a"
    await store.put(key, b"one", media_type=PNG)
    before = await store.stat(key)
    await store.put(key, b"three", media_type=BYTES)
    after = await store.stat(key)
    assert before is not None
    assert after is not None
    assert (after.media_type, after.size_bytes) == (BYTES, 5)
    assert after.etag != before.etag
    assert await store.get(key, limit_bytes=10) == b"three"


async def test_what_is_not_there_is_missing(store: BlobStore, folder: str) -> None:
    key = f"{folder}/nothing"
    assert await store.stat(key) is None
    with pytest.raises(BlobMissing):
        await store.get(key, limit_bytes=1)
    with pytest.raises(BlobMissing):
        await read_all(store, key)
    await store.delete(key)
    assert await store.list(f"{folder}/") == ()


async def test_delete_removes(store: BlobStore, folder: str) -> None:
    await store.put(f"{folder}/a", b"a", media_type=PNG)
    await store.put(f"{folder}/b", b"b", media_type=PNG)
    await store.delete(f"{folder}/a")
    assert await store.stat(f"{folder}/a") is None
    assert await store.list(f"{folder}/") == (f"{folder}/b",)
    assert await store.create(f"{folder}/a", b"again", media_type=PNG)


BAD_KEYS = [
    *("", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/..", "a/../b", "a/./b", ".a", "a/.b"),
    *("a\0b", "a\\b", "a b", "a\n", "ä", "a/-b", "C:", "a@", "%2e%2e/a", "a?b", "a*", "~"),
    *("x" * 201, "/".join(["x" * 100] * 6)),
]


@pytest.mark.parametrize("key", BAD_KEYS)
async def test_unsafe_keys_are_refused_everywhere(store: BlobStore, key: str) -> None:
    with pytest.raises(ValueError, match="key is"):
        await store.put(key, b"", media_type=PNG)
    with pytest.raises(ValueError, match="key is"):
        await store.create(key, b"", media_type=PNG)
    with pytest.raises(ValueError, match="key is"):
        await store.replace(key, b"", etag="e", media_type=PNG)
    with pytest.raises(ValueError, match="key is"):
        await store.get(key, limit_bytes=1)
    with pytest.raises(ValueError, match="key is"):
        await read_all(store, key)
    with pytest.raises(ValueError, match="key is"):
        await store.stat(key)
    with pytest.raises(ValueError, match="key is"):
        await store.delete(key)
    with pytest.raises(ValueError, match="key is"):
        await store.presign(key, expires_s=60)


@pytest.mark.parametrize("prefix", ["/", "../", "a/../", "\0", "."])
async def test_unsafe_prefixes_are_refused(store: BlobStore, prefix: str) -> None:
    with pytest.raises(ValueError, match="key is"):
        await store.list(prefix)


@given(st.text(max_size=30) | st.text(alphabet="ab./\0-_", max_size=MAX_KEY_LENGTH + 5))
async def test_an_accepted_key_stays_below_its_folder(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    assert ".." not in Path(key).parts
    assert Path("/store", key).relative_to("/store").as_posix() == key


async def test_bad_media_types_are_refused(store: BlobStore, folder: str) -> None:
    for media_type in ("", "png", "a/b\r\nX: y", "image/", "/png", "é/b"):
        with pytest.raises(ValueError, match="media_type"):
            await store.put(f"{folder}/a", b"", media_type=media_type)
        with pytest.raises(ValueError, match="media_type"):
            await store.create(f"{folder}/a", b"", media_type=media_type)


async def test_one_of_many_racing_creators_wins(
    store: BlobStore, opener: Callable[[], Awaitable[BlobStore]], folder: str
) -> None:
    other = await opener()
    for attempt in range(2):
        key = f"{folder}/{attempt}"
        won = await asyncio.gather(
            *(
                each.create(key, b"%d" % i, media_type=PNG)
                for i, each in enumerate([store, other] * 6)
            )
        )
        assert won.count(True) == 1
        assert await store.get(key, limit_bytes=9) == b"%d" % won.index(True)
        assert not await other.create(key, b"late", media_type=PNG)
    await other.close()


def create_in_folder(root: Path, name: str, count: int) -> int:
    async def create_all() -> int:
        store = FolderBlobStore(root)
        wins = [
            await store.create(f"race/{i}", name.encode() * 1000, media_type=PNG)
            for i in range(count)
        ]
        return wins.count(True)

    return asyncio.run(create_all())


async def test_folder_creators_in_several_processes_race_too(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        work = [(tmp_path, name, 60) for name in "abc"]
        wins = await asyncio.to_thread(pool.starmap, create_in_folder, work)
    assert sum(wins) == 60


async def test_replace_needs_the_etag(store: BlobStore, folder: str) -> None:
    key = f"{folder}/a"
    assert await store.replace(key, b"new", etag="0" * 32, media_type=PNG) is None
    assert await store.stat(key) is None
    await store.put(key, b"one", media_type=PNG)
    stat = await store.stat(key)
    assert stat is not None
    etag = await store.replace(key, b"two", etag=stat.etag, media_type=BYTES)
    assert etag is not None
    assert etag != stat.etag
    assert await store.replace(key, b"three", etag=stat.etag, media_type=PNG) is None
    assert await store.get(key, limit_bytes=9) == b"two"
    assert await store.replace(key, b"four", etag=etag, media_type=PNG) is not None


async def test_a_counter_kept_by_replace_loses_no_count(
    store: BlobStore, opener: Callable[[], Awaitable[BlobStore]], folder: str
) -> None:
    key = f"{folder}/counter"
    await store.put(key, b"0", media_type=PNG)
    other = await opener()

    async def count(via: BlobStore) -> None:
        for _ in range(5):
            while True:
                stat = await via.stat(key)
                assert stat is not None
                now = int(await via.get(key, limit_bytes=9))
                # The bytes may be newer than the etag: then the write fails, as it must.
                if await via.replace(key, b"%d" % (now + 1), etag=stat.etag, media_type=PNG):
                    break

    await asyncio.gather(*(count(each) for each in [store, other] * 2))
    assert await store.get(key, limit_bytes=9) == b"20"
    await other.close()


async def test_listing_pages_without_loss(store: BlobStore, folder: str) -> None:
    names = ["a-b", "a.b", "a/b", "a/c/d", "a0", "b", "ab/c", "B", "_x"]
    keys = {f"{folder}/{name}" for name in names}
    for key in keys:
        await store.put(key, b"x", media_type=PNG)
    listed = await store.list(f"{folder}/")
    assert len(listed) == len(keys)
    assert set(listed) == keys
    assert await store.list(f"{folder}/a/") == (f"{folder}/a/b", f"{folder}/a/c/d")
    for limit in (1, 2, 3, 4):
        paged: list[str] = []
        while page := await store.list(f"{folder}/", after=paged[-1] if paged else "", limit=limit):
            assert len(page) <= limit
            paged += page
        assert tuple(paged) == listed
    assert set(await store.list(f"{folder}/a")) == {
        key for key in keys if key.startswith(f"{folder}/a")
    }
    assert keys <= set(await store.list("", limit=100_000))


async def test_content_addressed_bytes_are_sent_once(store: BlobStore) -> None:
    data = uuid.uuid4().bytes
    ref = await put_blob(store, data, media_type=PNG)
    assert ref == BlobRef(sha256=hashlib.sha256(data).hexdigest(), size_bytes=16, media_type=PNG)
    assert ref.key == f"blobs/{ref.sha256}"
    before = await store.stat(ref.key)
    # Sending again would store the other media type.
    await put_blob(store, data, media_type=BYTES)
    assert await store.stat(ref.key) == before
    assert await store.get(ref.key, limit_bytes=16) == data


HARM: dict[str, Callable[[bytes], bytes]] = {
    "a byte": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "cut": lambda data: data[:-1],
    "grown": lambda data: data + b"x",
    "emptied": lambda data: b"",
    "overwritten": lambda data: b"not even a head",
}


async def harm(store: BlobStore, key: str, how: Callable[[bytes], bytes]) -> None:
    """Changes what is stored behind the store's back, and nothing that is noted beside it."""
    if isinstance(store, FolderBlobStore):
        path = store._path(key)
        path.write_bytes(how(path.read_bytes()))
        return
    assert isinstance(store, S3BlobStore)

    def change() -> None:
        with contextlib.closing(store._client.get_object(store._bucket, key)) as response:
            data = how(response.read())
            notes = {
                name: text
                for name, text in response.headers.items()
                if "x-amz-meta" in name.lower()
            }
        store._client.put_object(store._bucket, key, io.BytesIO(data), len(data), metadata=notes)

    await asyncio.to_thread(change)


async def whole(store: BlobStore, key: str) -> bytes:
    return await store.get(key, limit_bytes=3 << 20)


@pytest.mark.parametrize("reading", [whole, read_all])
@pytest.mark.parametrize("how", HARM.values(), ids=HARM.keys())
@pytest.mark.parametrize("kind", ["blobs", "plates"])
async def test_damage_is_told_once_and_then_missing(
    store: BlobStore,
    kind: str,
    how: Callable[[bytes], bytes],
    reading: Callable[[BlobStore, str], Awaitable[bytes]],
) -> None:
    data = uuid.uuid4().bytes + random.Random(1).randbytes(2 << 20)
    key = f"{kind}/{hashlib.sha256(data).hexdigest()}"
    for heal in ("put", "create"):
        await store.put(key, data, media_type=PNG)
        await harm(store, key, how)
        with pytest.raises(BlobCorrupt) as told:
            await reading(store, key)
        assert told.value.key == key
        assert await store.stat(key) is None
        for again in (whole, read_all):
            with pytest.raises(BlobMissing):
                await again(store, key)
        if heal == "put":
            await store.put(key, data, media_type=PNG)
        else:
            assert await store.create(key, data, media_type=PNG)
            assert not await store.create(key, data, media_type=PNG)
        assert await reading(store, key) == data
    await store.delete(key)


@pytest.mark.parametrize("how", HARM.values(), ids=HARM.keys())
async def test_what_is_stored_again_heals_damage_that_nobody_met(
    store: BlobStore, how: Callable[[bytes], bytes]
) -> None:
    data = uuid.uuid4().bytes + bytes(1000)
    ref = await put_blob(store, data, media_type=PNG)
    await harm(store, ref.key, how)
    assert await put_blob(store, data, media_type=PNG) == ref
    assert await whole(store, ref.key) == data
    await harm(store, ref.key, how)
    assert await store.create(ref.key, data, media_type=PNG)
    assert await whole(store, ref.key) == data
    assert not await store.create(ref.key, data, media_type=PNG)


async def test_many_readers_of_damage_remove_nothing_sound(store: BlobStore) -> None:
    data = uuid.uuid4().bytes + bytes(3 << 19)
    key = f"blobs/{hashlib.sha256(data).hexdigest()}"

    async def heal() -> None:
        for _ in range(4):
            await put_blob(store, data, media_type=PNG)

    for _ in range(3):
        await store.put(key, data, media_type=PNG)
        await harm(store, key, HARM["a byte"])
        answers = await asyncio.gather(
            *(reading(store, key) for reading in (whole, read_all) for _ in range(4)),
            heal(),
            return_exceptions=True,
        )
        for answer in answers[:-1]:
            told = (BlobCorrupt, BlobMissing, BlobStoreUnavailable)
            assert answer == data or isinstance(answer, told), answer
        assert answers[-1] is None
        # Whatever the order was: what was stored last is there.
        assert await whole(store, key) == data


async def test_the_empty_blob_is_no_damage(store: BlobStore) -> None:
    ref = await put_blob(store, b"", media_type=PNG)
    assert await store.stat(ref.key) is not None
    assert (await whole(store, ref.key), await read_all(store, ref.key)) == (b"", b"")


@pytest.mark.parametrize("position", range(0, 220, 7))
async def test_no_byte_of_a_files_head_can_change_unseen(tmp_path: Path, position: int) -> None:
    store = FolderBlobStore(tmp_path)
    await store.put("words/a", b"x" * 100, media_type=PNG)
    path = store._path("words/a")
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(BlobCorrupt):
        await whole(store, "words/a")
    await store.close()


async def test_files_of_the_version_before_are_read(tmp_path: Path) -> None:
    store = FolderBlobStore(tmp_path)
    head = f'{{"media_type": "image/png", "sha256": "{hashlib.sha256(b"x").hexdigest()}"}}\n'
    store._path("a").write_bytes(head.encode() + b"x")
    assert await whole(store, "a") == b"x"
    store._path("a").write_bytes(head.encode() + b"y")
    with pytest.raises(BlobCorrupt):
        await whole(store, "a")
    await store.close()


async def test_a_blob_ref_is_valid_or_is_not() -> None:
    BlobRef(sha256="0" * 64, size_bytes=0, media_type=PNG)
    for wrong in (
        {"sha256": "A" * 64},
        {"sha256": "0" * 63},
        {"sha256": "0" * 64 + "\n"},
        {"size_bytes": -1},
        {"media_type": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BlobRef(**({"sha256": "0" * 64, "size_bytes": 0, "media_type": PNG} | wrong))


async def test_presigned_addresses_read_and_expire(store: BlobStore, folder: str) -> None:
    key = f"{folder}/a.png"
    await store.put(key, b"picture", media_type=PNG)
    address = await store.presign(key, expires_s=1)
    if isinstance(store, FolderBlobStore):
        assert address is None
        return
    # Where callers reach the server, not where we do.
    assert address.startswith("http://localhost:")

    def fetch() -> bytes:
        with urllib.request.urlopen(address) as response:
            return response.read()

    assert await asyncio.to_thread(fetch) == b"picture"
    await asyncio.sleep(2.1)
    with pytest.raises(urllib.error.HTTPError) as refused:
        await asyncio.to_thread(fetch)
    assert refused.value.code == 403


async def test_no_address_is_offered_that_callers_do_not_reach(server: Server, folder: str) -> None:
    inner = await open_s3(server, public_url="")
    assert await inner.presign(f"{folder}/a.png", expires_s=1) is None
    await inner.close()
    with pytest.raises(InvalidSetting, match="COLLAGE_PUBLIC_BLOBS is of an S3 server"):
        await open_blobs("folder:data/blobs", public="https://pictures.example")


async def test_ready_does_a_round_trip(store: BlobStore) -> None:
    await store.ready()
    assert await store.list("ready/") == ()


async def test_a_folder_that_cannot_be_written_may_be_tried_again(tmp_path: Path) -> None:
    store = FolderBlobStore(tmp_path)
    (tmp_path / "unfinished").rmdir()
    with pytest.raises(BlobStoreUnavailable) as failed:
        await store.put("a", b"", media_type=PNG)
    assert failed.value.retryable
    with pytest.raises(BlobStoreUnavailable):
        await store.ready()
    await store.close()


@pytest.mark.parametrize("is_running", [False, True])
async def test_leftovers_of_dead_writers_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
) -> None:
    store = FolderBlobStore(tmp_path)
    old, fresh, held = (tmp_path / "unfinished" / name for name in ("old", "fresh", "held"))
    for path in (old, fresh, held):
        path.write_bytes(b"")
    for path in (old, held):
        os.utime(path, (time.time() - 2 * blobs.ABANDONED_S,) * 2)
    # As a slow writer in another process holds it.
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if is_running:
            await store.put("a", b"", media_type=PNG)
            assert old.exists()
            store._sweep_at = 0
            await store.put("a", b"", media_type=PNG)
        else:
            await FolderBlobStore(tmp_path).close()
        assert (old.exists(), fresh.exists(), held.exists()) == (False, True, True)
    await store.close()


async def test_a_writer_holds_its_unfinished_file(tmp_path: Path) -> None:
    store = FolderBlobStore(tmp_path)
    with store._draft() as (path, file):
        file.write(b"half")
        file.flush()
        os.utime(path, (time.time() - 2 * blobs.ABANDONED_S,) * 2)
        await FolderBlobStore(tmp_path).close()
        assert path.exists()
    assert not path.exists()
    await store.close()


async def test_what_is_stored_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        store = FolderBlobStore(tmp_path / "above" / "blobs")
        await store.put("a/b", b"x", media_type=PNG)
        jobs = await Database.open(tmp_path / "above" / "jobs.sqlite")
        await jobs.change(lambda: jobs.execute("DELETE FROM news"), then=lambda: None)
        modes = {p: p.stat().st_mode & 0o777 for p in (tmp_path / "above").rglob("*")}
        await jobs.close()
        await store.close()
    finally:
        os.umask(before)
    assert (tmp_path / "above").stat().st_mode & 0o777 == 0o700
    assert {path.name for path in modes} >= {"b@", "jobs.sqlite", "jobs.sqlite-wal"}
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


async def test_s3_server_killed_in_mid_traffic_loses_nothing(server: Server) -> None:
    stores = [await open_s3(server, "crash") for _ in range(2)]
    chance = random.Random(2)
    stored: dict[str, bytes] = {}
    created: dict[str, int] = {}
    stopping = asyncio.Event()

    async def put(store: BlobStore, name: str) -> None:
        for i in range(10_000):
            if stopping.is_set():
                return
            data = chance.randbytes(chance.choice([*([100, 50_000] * 10), 6 << 20]))
            await store.put(f"{name}/{i}", data, media_type=BYTES)
            stored[f"{name}/{i}"] = data
            assert await store.get(f"{name}/{i}", limit_bytes=len(data)) == data

    async def create(store: BlobStore) -> None:
        for i in range(10_000):
            if stopping.is_set():
                return
            won = await store.create(f"created/{i}", b"%d" % id(store), media_type=BYTES)
            created[f"created/{i}"] = created.get(f"created/{i}", 0) + won
            assert await store.stat(f"created/{i}") is not None

    tasks = [
        *(asyncio.create_task(put(store, f"put{n}")) for n, store in enumerate(stores * 2)),
        *(asyncio.create_task(create(store)) for store in stores),
    ]
    await asyncio.sleep(0.7)
    server.crash()
    await asyncio.sleep(0.3)
    await server.restart()
    await asyncio.sleep(0.5)
    stopping.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 45)
    assert len(stored) > 4
    assert created
    for key, data in stored.items():
        assert await stores[0].get(key, limit_bytes=len(data)) == data
    # An answer lost in the crash must make no winner a loser, and no two winners.
    assert set(created.values()) == {1}
    for store in stores:
        await store.close()


async def test_s3_that_does_not_answer_is_said_within_the_budget() -> None:
    began = time.monotonic()
    with pytest.raises(BlobStoreUnavailable) as failed:
        await S3BlobStore.open(
            f"http://127.0.0.1:{free_port()}",
            access_key=ACCESS_KEY,
            secret_key=SECRET_KEY,
            bucket="absent",
            retry_s=0.5,
        )
    assert failed.value.retryable
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", ["C# work", "what? now", "50% off", "a:b", "s3://x", " spaces "])
async def test_a_path_is_a_path_and_no_address(tmp_path: Path, name: str) -> None:
    store = await open_blobs(f"folder:{tmp_path / name / 'blobs'}")
    await store.put("a/b", b"x", media_type="a/b")
    await store.close()
    assert os.listdir(tmp_path) == [Path(name).parts[0]]
    assert list((tmp_path / name / "blobs").rglob("b*"))
    jobs = await Database.open(tmp_path / name / "jobs.sqlite")
    await jobs.close()
    assert (tmp_path / name / "jobs.sqlite").is_file()


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEY:SE/CRET@host:9000/bucket",
        "s3://KEY:SE#CRET@host:9000/bucket",
        "s3://KEY:SE?CRET@host:9000/bucket",
        "s3://KEY:SECRET@host:port/bucket",
        "s3://KEY:SECRET@host:99999/bucket",
        "s3://KEY:SECRET@[host/bucket",
        "s3://KEY:SECRET@host:9000",
        "s4://KEY:SECRET@host:9000/bucket",
        "KEY:SECRET@host",
        "folder:",
        "",
    ],
)
async def test_a_wrong_address_never_prints_its_secret(address: str) -> None:
    with pytest.raises(InvalidSetting, match="COLLAGE_BLOBS is neither") as caught:
        await open_blobs(address)
    printed = "".join(traceback.format_exception(caught.value))
    assert "CRET" not in printed.replace("KEY:SECRET@HOST:PORT/BUCKET", "").replace(
        "KEY and SECRET", ""
    )


async def test_s3_that_refuses_is_told_at_once(server: Server) -> None:
    for access_key, secret_key in ((ACCESS_KEY, "wrong"), ("nobody", SECRET_KEY)):
        with pytest.raises(BlobStoreDenied, match="refuses this process"):
            await S3BlobStore.open(
                server.url, access_key=access_key, secret_key=secret_key, bucket="collage-test"
            )


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (507, "XMinioStorageFull", BlobStoreFull),
        (507, "Anything", BlobStoreFull),
        (403, "QuotaExceeded", BlobStoreFull),
        (400, "XMinioAdminBucketQuotaExceeded", BlobStoreFull),
        (403, "AccessDenied", BlobStoreDenied),
        (403, "RequestTimeTooSkewed", BlobStoreDenied),
        (404, "NoSuchBucket", BlobStoreUnavailable),
        (500, "InternalError", BlobStoreUnavailable),
        (503, "SlowDown", BlobStoreUnavailable),
    ],
)
async def test_what_an_s3_server_refuses_with_is_told_for_what_it_is(
    status: int, code: str, kind: type[BlobStoreUnavailable]
) -> None:
    """What MinIO and Ceph answer when they are full, and others; of these servers none runs here."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = f"<Error><Code>{code}</Code><Message>told</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        store = await S3BlobStore.open(
            f"http://127.0.0.1:{refusing.server_port}",
            access_key="a",
            secret_key="b",
            bucket="bucket",
            retry_s=0,
        )
        for call in (
            store.put("a", b"x", media_type=PNG),
            store.create("a", b"x", media_type=PNG),
            store.ready(),
        ):
            with pytest.raises(BlobStoreUnavailable) as told:
                await call
            assert type(told.value) is kind
        await store.close()
        refusing.shutdown()
