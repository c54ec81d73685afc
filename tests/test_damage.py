"""Whatever is stored may be damaged under a running system: told once, then made or brought again, the same."""

import contextlib
import hashlib
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collage.v1 import blob_pb2
from collage.v1 import collage_service_pb2 as pb
from gateway import storage
from services.common.errors import CollageError, DataLoss, MissingBlobs, from_rpc, from_status
from testing.system import LIMIT_S, System, collage, cutout, layer, running, upload
from tests.test_blobs import HARM
from tests.test_words import checkpoints, inversion, subjects

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = {hashlib.sha256(data).hexdigest(): data for data in (cutout(5), cutout(6))}


def request() -> pb.GenerateImagesRequest:
    first, second = (
        blob_pb2.Image(blob={"sha256": sha256, "size_bytes": len(data)})
        for sha256, data in PICTURES.items()
    )
    layers = [
        layer("a", image=first),
        layer("b", image=second, x=22.5, y=30.25, appearance={"learn": True}),
    ]
    return pb.GenerateImagesRequest(
        request_id=str(uuid.uuid4()),
        collage=collage(layers=layers),
        sampling={"steps": 2, "images": 2, "seed": 7},
    )


class Caller:
    """Does what a careful client does: uploads what is missing, asks, and asks again when told of damage."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.told: list[CollageError] = []

    async def send(self) -> None:
        asked = pb.CheckBlobsRequest(sha256=list(PICTURES))
        answer = await self.system.stub.CheckBlobs(asked, timeout=LIMIT_S)
        for sha256 in answer.missing_sha256:
            await self.system.stub.PutBlob(upload(PICTURES[sha256]), timeout=LIMIT_S)

    async def draw(self) -> dict[str, blob_pb2.BlobRef]:
        """The pictures by what they are."""
        for _ in range(len(PICTURES) + 1):
            await self.send()
            try:
                events = await self.system.generate(request())
                error = from_status(events[-1].failed) if events[-1].HasField("failed") else None
            except grpc.aio.AioRpcError as refused:
                error = from_rpc(refused)
            if error is None:
                return _pictures(events)
            self.told.append(error)
        raise self.told[-1]

    async def fetch(self, blob: blob_pb2.BlobRef) -> bool:
        """Are the bytes there, and right?"""
        try:
            await self.system.fetch(blob)
        except grpc.aio.AioRpcError as refused:
            error = from_rpc(refused)
            assert refused.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.NOT_FOUND)
            assert error.metadata["sha256"] == blob.sha256
            return False
        return True


def _pictures(events: list[pb.JobEvent]) -> dict[str, blob_pb2.BlobRef]:
    assert events[-1].HasField("done"), events[-1]
    plan = next(event.planned.plan for event in events if event.HasField("planned"))
    images = {f"image {e.image.index}": e.image.blob for e in events if e.HasField("image")}
    masks = {f"mask {each.name}": each.mask for each in plan.layers}
    return {"composite": plan.composite, **masks, **images}


def stored(folder: Path) -> list[Path]:
    objects = folder / "data" / "blobs" / "objects"
    return sorted(path for path in objects.rglob("*") if path.is_file())


def gone(path: Path) -> None:
    path.unlink()


def by(how: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize("ruin", [gone, *map(by, HARM.values())], ids=["gone", *HARM])
async def test_each_stored_thing_may_be_damaged(tmp_path, ruin):
    async with running(tmp_path) as system:
        first = await Caller(system).draw()
        kinds = {path.parent.name for path in stored(tmp_path)}
        assert {"blobs", "plates", "results", "words"} <= kinds
        for path in stored(tmp_path):
            ruin(path)
            caller = Caller(system)
            # Of what a server made, nobody is told.
            assert await caller.draw() == first
            assert caller.told == []
            whole = [await caller.fetch(blob) for blob in first.values()]
            assert sum(whole) >= len(whole) - 1
            for sha256, data in PICTURES.items():
                await caller.fetch(blob_pb2.BlobRef(sha256=sha256, size_bytes=len(data)))
            # What was found damaged by now is missing, and comes back by itself or by an upload.
            assert await caller.draw() == first, path
            assert all([await caller.fetch(blob) for blob in first.values()]), path
            for sha256, data in PICTURES.items():
                assert await caller.fetch(blob_pb2.BlobRef(sha256=sha256, size_bytes=len(data)))


@pytest.mark.parametrize("ruin", [gone, *map(by, HARM.values())], ids=["gone", *HARM])
async def test_everything_stored_may_be_damaged_at_once(tmp_path, ruin):
    async with running(tmp_path) as system:
        first = await Caller(system).draw()
        for path in stored(tmp_path):
            ruin(path)
        caller = Caller(system)
        assert await caller.draw() == first
        for error in caller.told:
            assert isinstance(error, DataLoss | MissingBlobs), error
            assert error.metadata["sha256"] in PICTURES
            assert error.metadata["field"].startswith("collage.layers[")
        assert all([await caller.fetch(blob) for blob in first.values()])


async def test_a_plate_and_a_word_lost_after_they_were_found_are_made_again(tmp_path):
    """The compositor looks; it is the generator that reads."""
    async with running(tmp_path) as system:
        caller = Caller(system)
        first = await caller.draw()
        seen = {blob.sha256 for blob in first.values()} | set(PICTURES)
        for path in stored(tmp_path):
            sha256 = path.name.removesuffix("@")
            if path.parent.name == "results":
                path.unlink()
            elif path.parent.name == "blobs" and sha256 not in seen:
                by(HARM["a byte"])(path)
        assert await caller.draw() == first
        assert caller.told == []


async def test_damage_is_told_once_with_the_digest(tmp_path):
    async with running(tmp_path) as system:
        caller = Caller(system)
        await caller.send()
        sha256 = next(iter(PICTURES))
        blob = blob_pb2.BlobRef(sha256=sha256, size_bytes=len(PICTURES[sha256]))
        (path,) = (path for path in stored(tmp_path) if path.name.startswith(sha256))
        by(HARM["a byte"])(path)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await system.fetch(blob)
        error = from_rpc(told.value)
        assert (told.value.code().name, error.reason) == ("DATA_LOSS", "BLOB_CORRUPT")
        assert error.metadata == {"sha256": sha256}
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await system.fetch(blob)
        assert told.value.code().name == "NOT_FOUND"
        answer = await system.stub.CheckBlobs(pb.CheckBlobsRequest(sha256=list(PICTURES)))
        assert list(answer.missing_sha256) == [sha256]
        with contextlib.suppress(grpc.aio.AioRpcError):
            await system.generate(request())
        await caller.send()
        await system.fetch(blob)


@pytest.mark.parametrize("ruin", [gone, by(HARM["emptied"])], ids=["gone", "emptied"])
async def test_a_jobs_database_that_goes_is_told_and_takes_no_job(tmp_path, monkeypatch, ruin):
    """CreateJob said OK, and the job was gone after the next start."""
    monkeypatch.setattr(storage, "LOOK_S", 0.1)
    async with running(tmp_path) as system:
        health = health_pb2_grpc.HealthStub(system.channel)
        asked = health_pb2.HealthCheckRequest(service="collage.v1.CollageService")
        seen = health.Watch(asked, timeout=LIMIT_S)
        assert (await anext(aiter(seen))).status == health_pb2.HealthCheckResponse.SERVING
        ruin(tmp_path / "data" / "jobs.sqlite")
        assert (await anext(aiter(seen))).status == health_pb2.HealthCheckResponse.NOT_SERVING
        job = pb.CreateJobRequest(
            request_id=str(uuid.uuid4()), generate={"collage": collage(), "sampling": {"steps": 2}}
        )
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await system.stub.CreateJob(job, timeout=LIMIT_S)
        error = from_rpc(told.value)
        assert (told.value.code().name, error.reason) == ("UNAVAILABLE", "JOBS_UNUSABLE")
        assert str(tmp_path) not in error.message
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def change(folder: Path, statement: str) -> None:
    """As damage would, behind the server's back."""
    database = sqlite3.connect(folder / "data" / "jobs.sqlite")
    database.execute(statement)
    database.commit()
    database.close()


async def test_damaged_records_of_a_job_are_told_and_stop_no_other(tmp_path):
    """SQLite keeps no checksums. It was INTERNAL, and an unreadable job was taken up again and again."""

    async def job(*, steps: int) -> str:
        asked = pb.CreateJobRequest(
            request_id=str(uuid.uuid4()),
            generate={
                "collage": collage(),
                "sampling": {"steps": steps, "images": 2, "seed": steps},
            },
        )
        return (await system.stub.CreateJob(asked, timeout=LIMIT_S)).job.name

    async def told(call) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        return f"{refused.value.code().name} {from_rpc(refused.value).reason}"

    async with running(tmp_path) as system:
        done = await job(steps=2)
        assert (await system.watch(done))[-1].HasField("done")
        change(tmp_path, "UPDATE events SET payload = x'ffff'")
        change(tmp_path, "UPDATE jobs SET result = x'ffff'")
        assert await told(system.watch(done)) == "DATA_LOSS RECORD_CORRUPT"
        get = system.stub.GetJob(pb.GetJobRequest(name=done), timeout=LIMIT_S)
        assert await told(get) == "DATA_LOSS RECORD_CORRUPT"
        # Four slots are busy, so that the fifth waits.
        busy = [await job(steps=100 + number) for number in range(4)]
        waiting = await job(steps=3)
        change(
            tmp_path, f"UPDATE jobs SET body = x'ffff' WHERE id = '{waiting.removeprefix('jobs/')}'"
        )
        failed = (await system.watch(waiting))[-1]
        assert failed.HasField("failed"), failed
        assert from_status(failed.failed).reason == "RECORD_CORRUPT"
        for name in busy:
            assert (await system.watch(name))[-1].HasField("done")


@pytest.mark.parametrize("ruin", [gone, *map(by, HARM.values())], ids=["gone", *HARM])
async def test_a_damaged_checkpoint_is_left_aside(tmp_path, ruin):
    """Learning begins anew, and ends with the same vectors."""
    found = []
    for name in ("undisturbed", "damaged"):
        folder = tmp_path / name
        asked = await subjects(folder)
        if name == "damaged":
            async with inversion(folder) as stub:
                call = stub.LearnWords(asked, timeout=LIMIT_S)
                while (await call.read()).progress.step < 4:
                    pass
                call.cancel()
            (path,) = checkpoints(folder)
            ruin(path)
        async with inversion(folder) as stub:
            answers = [each async for each in stub.LearnWords(asked, timeout=LIMIT_S)]
        assert answers[0].progress.step <= 1 or name == "undisturbed"
        found.append([a.word.vectors.sha256 for a in answers if a.HasField("word")])
        assert checkpoints(folder) == []
    assert len(found[0]) == 2
    assert found[0] == found[1]
