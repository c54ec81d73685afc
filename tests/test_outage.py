"""A job that has to wait: for a generator that is down, or for its turn there. Whole systems, real gRPC."""

import asyncio
import functools
import time

import grpc
import numpy as np
import pytest

import gateway.__main__ as gateway
import services.generator.__main__ as generator
from collage.v1 import collage_service_pb2 as pb
from gateway import stages, worker
from gateway.jobs import QueuePolicy
from gateway.jobs.sqlite import SqliteJobs
from services.common.errors import DeadlinePassed, from_rpc, from_status
from services.generator.duration import Duration
from services.generator.stages import TorchStages
from testing.system import LIMIT_S, collage, png
from tests.test_accepted import accepted, request, serving
from tests.test_accepted import folder as folder  # a fixture is found by name

pytestmark = pytest.mark.usefixtures("one_thread")


async def told_of(system, name: str) -> pb.Job:
    return (await system.stub.GetJob(pb.GetJobRequest(name=name), timeout=LIMIT_S)).job


async def test_a_generator_that_is_down_costs_a_job_no_attempt(folder, monkeypatch):
    """Each time its patience ended counted as a worker lost: 20 of them failed the job as INTERNAL."""
    monkeypatch.setattr(stages, "PATIENCE_S", 0.3)
    monkeypatch.setattr(worker, "FIRST_REST_S", 0.05)
    monkeypatch.setattr(worker, "LONGEST_REST_S", 0.1)
    # Far fewer than the times it will be given back.
    monkeypatch.setattr(gateway, "QueuePolicy", functools.partial(QueuePolicy, max_lost=2))
    job = await accepted(folder, request(sampling={"steps": 60}))
    async with serving(folder, slots=0) as (system, servers):
        await servers[2].stop(drain_s=0)
        address = servers[2].address
        settings = gateway.Settings(
            address="127.0.0.1:0",
            blobs=f"folder:{folder / 'blobs'}",
            jobs=f"sqlite:{folder / 'jobs.sqlite'}",
            compositor=servers[0].address,
            inversion=servers[1].address,
            generator=address,
            slots=1,
        )
        working = await gateway.build(settings)
        await working.start()
        try:
            async with asyncio.timeout(LIMIT_S):
                watched = system.stub.WatchJob(pb.WatchJobRequest(name=job.name), timeout=LIMIT_S)
                async for answer in watched:
                    if answer.event.stage_started.attempt == 5:
                        break
            servers[2] = await generator.build(
                generator.Settings(
                    address=address,
                    blobs=f"folder:{folder / 'blobs'}",
                    models=str(folder / "models.yaml"),
                    threads=1,
                )
            )
            await servers[2].start()
            events = await system.watch(job.name)
        finally:
            await working.stop(drain_s=0)
        told = await told_of(system, job.name)
    assert events[-1].HasField("done"), events[-1]
    assert (told.state, len(told.images)) == (pb.JOB_STATE_DONE, 1)
    # Not a worker was lost.
    assert told.attempts == 1
    # Of all the attempts' logs there is one plan, and the record says what the log says.
    (plan,) = [event.planned.plan for event in events if event.HasField("planned")]
    assert told.plan == plan


@pytest.mark.parametrize("max_waiting", [32, 1])
async def test_four_that_together_pass_the_limit_wait_for_one_another(
    folder, monkeypatch, max_waiting
):
    """Of four of 45 minutes at once one was done. With one place to wait in, two are refused again and again."""
    monkeypatch.setattr(stages, "PATIENCE_S", 0.3)
    monkeypatch.setattr(worker, "FIRST_REST_S", 0.05)
    monkeypatch.setattr(worker, "LONGEST_REST_S", 0.1)
    predict = TorchStages.predict

    def slow(self, rows):
        time.sleep(0.05)
        return predict(self, rows)

    monkeypatch.setattr(TorchStages, "predict", slow)
    told = {"max_work_s": 3.6, "max_waiting": max_waiting}
    async with serving(folder, slots=4, generator=told) as (system, _):
        start_s = time.monotonic()
        created = await asyncio.gather(
            *(
                system.stub.CreateJob(
                    request(sampling={"steps": 30, "seed": seed}), timeout=LIMIT_S
                )
                for seed in range(4)
            )
        )
        for each in created:
            events = await system.watch(each.job.name)
            assert events[-1].HasField("done"), events[-1]
        # The last one waited for longer than any may be drawn.
        assert time.monotonic() - start_s > 3.6
        assert [(await told_of(system, each.job.name)).attempts for each in created] == [1] * 4


async def test_a_job_whose_workers_die_is_unavailable_and_says_why(folder):
    job = await accepted(folder, request())
    policy = QueuePolicy(exhausted=worker.exhausted_event, lease_s=0.2, max_lost=2)
    jobs = await SqliteJobs.open(folder / "jobs.sqlite", policy)
    for _ in range(2):
        assert await jobs.claim("dies", wait_s=2) is not None
    assert await jobs.claim("other", wait_s=0.5) is None
    await jobs.close()
    async with serving(folder, slots=0) as (system, _):
        told = await told_of(system, job.name)
    assert told.state == pb.JOB_STATE_FAILED
    error = from_status(told.error)
    assert (type(error).__name__, error.reason) == ("Unavailable", "WORKERS_LOST")
    assert "2 workers were lost" in error.message


async def test_what_cannot_end_is_refused_at_every_door(folder):
    sampling = {"steps": 60, "seed": 1}
    parent = {"data": png(np.zeros((48, 32, 3), np.uint8))}
    redo = {"collage": collage(), "parent": parent, "layers": ["a"], "sampling": sampling}
    async with serving(folder, slots=1, generator={"max_work_s": 1e-6}) as (system, _):
        stub, drawing = system.stub, {"collage": collage(), "sampling": sampling}
        calls = {
            "": stub.PlanCollage(pb.PlanCollageRequest(**drawing), timeout=LIMIT_S),
            "generate.": stub.CreateJob(pb.CreateJobRequest(generate=drawing), timeout=LIMIT_S),
            "redo.": stub.CreateJob(pb.CreateJobRequest(redo=redo), timeout=LIMIT_S),
        }
        streams = {"": drawing, "redo.": {"redo": redo}}
        for place, call in [
            *calls.items(),
            *(
                (
                    place,
                    stub.GenerateImages(pb.GenerateImagesRequest(**each), timeout=LIMIT_S).read(),
                )
                for place, each in streams.items()
            ),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            error = from_rpc(refused.value)
            assert error.reason == "TOO_LONG"
            assert [each.field for each in error.violations] == [f"{place}sampling.steps"]
        assert not (await stub.ListJobs(pb.ListJobsRequest(), timeout=LIMIT_S)).jobs


async def test_a_job_that_is_drawn_past_the_limit_ends_at_once_and_says_so(folder, monkeypatch):
    """It was told as the end of a deadline that nobody had set."""
    monkeypatch.setattr(Duration, "check", lambda *_, **__: None)
    async with serving(folder, slots=1, generator={"max_work_s": 1e-6}) as (system, _):
        created = await system.stub.CreateJob(request(sampling={"steps": 60}), timeout=LIMIT_S)
        events = await system.watch(created.job.name)
        told = await told_of(system, created.job.name)
    assert events[-1].HasField("failed")
    error = from_status(told.error)
    assert (type(error), error.reason) == (DeadlinePassed, "TOO_LONG")
    assert "COLLAGE_MAX_WORK_S" in error.message
    assert told.attempts == 1


async def test_a_job_behind_others_at_the_generator_hears_its_place(folder, monkeypatch):
    """It was told that it runs, and then nothing until its turn came."""
    monkeypatch.setattr(worker, "AHEAD_EVERY_S", 0.1)
    long = collage(size={"width": 96, "height": 96})
    async with serving(folder, slots=3) as (system, _):
        first, *others = [
            await system.stub.CreateJob(
                request(collage=scene, sampling={"steps": steps}), timeout=LIMIT_S
            )
            for scene, steps in ((long, 400), (collage(), 2), (collage(), 2))
        ]
        streams = [
            asyncio.create_task(everything(system, each.job.name)) for each in (first, *others)
        ]
        async with asyncio.timeout(LIMIT_S):
            logs = await asyncio.gather(*streams)
    for events in logs[1:]:
        assert events[-1].HasField("done")
        running = next(
            number
            for number, event in enumerate(events)
            if event.HasField("stage_started") and event.stage_started.stage == "generate"
        )
        places = [e.queued.position for e in events[running:] if e.HasField("queued")]
        assert places[0] > 0
        assert places == sorted(places, reverse=True)
        # Not a part of the log.
        numbers = [event.sequence for event in events if not event.HasField("queued")]
        assert numbers == list(range(1, len(numbers) + 1))


async def everything(system, name: str) -> list[pb.JobEvent]:
    request = pb.WatchJobRequest(name=name)
    return [answer.event async for answer in system.stub.WatchJob(request, timeout=LIMIT_S)]


async def test_a_gateway_that_stops_cancels_first_what_lost_its_caller(folder, monkeypatch):
    """Its queue was closed under the cancel, and the job was drawn for nobody."""
    cancel = SqliteJobs.cancel

    async def slow(self, job_id, *, payload):
        await asyncio.sleep(0.3)
        return await cancel(self, job_id, payload=payload)

    monkeypatch.setattr(SqliteJobs, "cancel", slow)
    async with serving(folder, slots=0) as (system, servers):
        asked = pb.GenerateImagesRequest(
            collage=collage(), on_disconnect=pb.DISCONNECT_POLICY_CANCEL
        )
        call = system.stub.GenerateImages(asked, timeout=LIMIT_S)
        name = (await call.read()).event.job
        await servers.pop().stop(drain_s=0)
        call.cancel()
    async with serving(folder, slots=0) as (system, _):
        assert (await told_of(system, name)).state == pb.JOB_STATE_CANCELLED


async def test_a_finished_job_is_told_without_its_log(folder, monkeypatch):
    async with serving(folder, slots=1) as (system, _):
        created = await system.stub.CreateJob(
            request(sampling={"steps": 2, "images": 2}), timeout=LIMIT_S
        )
        events = await system.watch(created.job.name)

        def unread(*_, **__):
            raise AssertionError("the log is not read for a job that has ended")

        monkeypatch.setattr(SqliteJobs, "events", unread)
        told = await told_of(system, created.job.name)
    assert [image.index for image in told.images] == [0, 1]
    assert [event.image for event in events if event.HasField("image")] == list(told.images)
    (plan,) = [event.planned.plan for event in events if event.HasField("planned")]
    assert told.plan == plan
