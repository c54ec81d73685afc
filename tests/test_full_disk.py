"""A disk that is full under a running system: what is said, what still works, and that all of it goes on afterwards."""

import asyncio
import contextlib
import os
import subprocess
import time
import uuid
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from collage.v1 import collage_service_pb2 as pb
from gateway import storage
from local import embedded
from local.residence import Residence
from services.common.blobs import (
    BlobCorrupt,
    BlobStoreDenied,
    BlobStoreFull,
    FolderBlobStore,
    put_blob,
)
from services.common.errors import from_rpc
from services.common.telemetry import start_logging
from testing.system import LIMIT_S, System, collage, cutout, running, upload
from tests.test_blobs import HARM, harm

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE_BYTES = 6 << 20


def mount(*words: str) -> None:
    command = ["mount", *words]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")


@pytest.fixture
def disk(tmp_path):
    """A disk of a few MiB, its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left, to the last byte."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


async def test_a_full_store_says_full_reads_and_goes_on(disk):
    store = FolderBlobStore(disk / "blobs")
    ref = await put_blob(store, b"x" * 1000, media_type="a/b")
    filler = fill(disk)
    for call in (store.put("a", bytes(9000), media_type="a/b"), store.ready()):
        with pytest.raises(BlobStoreFull, match=r"no space is left for .*free some"):
            await call
    assert await store.get(ref.key, limit_bytes=1000) == b"x" * 1000
    # Damage needs no room to be told.
    await store.delete(ref.key)
    filler.unlink()
    await store.put("a", bytes(9000), media_type="a/b")
    await store.ready()
    assert list((disk / "blobs" / "unfinished").iterdir()) == []
    await store.close()


async def test_a_store_that_cannot_be_written_still_tells_damage(disk):
    store = FolderBlobStore(disk / "blobs")
    sound, damaged = [await put_blob(store, data, media_type="a/b") for data in (b"abc", b"defg")]
    await harm(store, damaged.key, HARM["a byte"])
    mount("-o", "remount,ro", str(disk))
    other = FolderBlobStore(disk / "blobs")
    for each in (store, other):
        assert await each.get(sound.key, limit_bytes=9) == b"abc"
        for _ in range(2):
            with pytest.raises(BlobCorrupt):
                await each.get(damaged.key, limit_bytes=9)
        with pytest.raises(BlobStoreDenied, match="closed to this process"):
            await each.put("a", b"", media_type="a/b")
        await each.close()


async def refused(call) -> tuple[str, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc(caught.value)
    return caught.value.code().name, error.reason, error.message


async def health(system: System, name: str) -> str:
    stub = health_pb2_grpc.HealthStub(system.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=LIMIT_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def until(system: System, status: str) -> None:
    wanted = health_pb2.HealthCheckResponse.ServingStatus.Value(status)
    stub = health_pb2_grpc.HealthStub(system.channel)
    request = health_pb2.HealthCheckRequest(service="collage.v1.CollageService")
    async for answer in stub.Watch(request, timeout=LIMIT_S):
        if answer.status == wanted:
            return


async def test_a_system_on_a_full_disk_says_so_and_recovers(disk, monkeypatch):
    """It said "does not answer" and SERVING, and the log had a line a second for each slot."""
    monkeypatch.setattr(storage, "LOOK_S", 0.2)
    # Wherever an earlier test has sent the log, and whatever it kept out of it.
    start_logging("test")
    with capture_logs() as logged:
        async with running(disk) as system:
            request = pb.CreateJobRequest(
                request_id=str(uuid.uuid4()),
                generate={"collage": collage(), "sampling": {"steps": 2, "seed": 3}},
            )
            job = (await system.stub.CreateJob(request, timeout=LIMIT_S)).job
            done = (await system.watch(job.name))[-1]
            assert done.HasField("done")
            told = await system.stub.GetJob(pb.GetJobRequest(name=job.name), timeout=LIMIT_S)
            long = pb.CreateJobRequest(
                request_id=str(uuid.uuid4()),
                generate={"collage": collage(), "sampling": {"steps": 60, "seed": 4}},
            )
            waiting = (await system.stub.CreateJob(long, timeout=LIMIT_S)).job
            filler = fill(disk)
            logged.clear()
            began = time.monotonic()
            await until(system, "NOT_SERVING")
            assert await health(system, "") == "SERVING"
            other = collage(layers=[*collage().layers[:1]], prompt="a {a}")
            for call in (
                system.stub.PutBlob(upload(os.urandom(300_000)), timeout=LIMIT_S),
                system.stub.PlanCollage(pb.PlanCollageRequest(collage=other), timeout=LIMIT_S),
                system.stub.CreateJob(
                    pb.CreateJobRequest(
                        request_id=str(uuid.uuid4()),
                        generate={"collage": other, "sampling": {"seed": 5}},
                    ),
                    timeout=LIMIT_S,
                ),
            ):
                code, reason, message = await refused(call)
                assert (code, reason) == ("RESOURCE_EXHAUSTED", "STORAGE_FULL"), message
                assert "is full" in message
                assert "free space" in message
            # What is stored can be read.
            same = await system.stub.GetJob(pb.GetJobRequest(name=job.name), timeout=LIMIT_S)
            assert same.job.images == told.job.images
            await system.fetch(told.job.images[0].blob)
            assert (await system.stub.ListJobs(pb.ListJobsRequest(), timeout=LIMIT_S)).jobs
            await asyncio.sleep(max(0.0, began + 4 - time.monotonic()))
            lines = [each for each in logged if "no space is left" in str(each)]
            assert 1 <= len(lines) <= 8, lines
            filler.unlink()
            await until(system, "SERVING")
            assert (await system.watch(waiting.name))[-1].HasField("done")
            await system.stub.PutBlob(upload(cutout(9)), timeout=LIMIT_S)
            assert "storage works again" in str(logged)


@pytest.mark.parametrize("is_used_before", [False, True])
async def test_a_start_on_a_full_disk_says_what_to_do(disk, is_used_before):
    """It was a traceback that ended "No space left on device"."""
    if is_used_before:
        async with running(disk):
            pass
    fill(disk)
    with pytest.raises(OSError, match=r"No space left|no space is left for .*free some"):
        await (await embedded.start(disk / "data", threads=1)).stop()


async def test_a_start_on_a_closed_disk_says_what_to_do(disk):
    FolderBlobStore(disk / "data" / "blobs")
    mount("-o", "remount,ro", str(disk))
    with pytest.raises(OSError, match="closed to this process"):
        await embedded.start(disk / "data", threads=1)
    with pytest.raises(OSError, match="Read-only"):
        Residence(disk / "data")


async def test_a_start_on_a_damaged_database_says_what_to_do(tmp_path):
    (tmp_path / "jobs.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(OSError, match=r"damaged, or no database.*move it away"):
        await embedded.start(tmp_path, threads=1)
