"""The whole system through its public face: real gRPC, real queue, real storage, a model that is tiny but complete."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import uuid

import grpc
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from collage.v1 import collage_service_pb2 as pb
from testing.system import LIMIT_S, collage, cutout, layer, png, running, upload

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Eight pictures at the model's largest canvas: steps long enough to see what comes after one of them.
LONG = {"steps": 200, "images": 8, "guidance_scale": 7.0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory):
    async with running(tmp_path_factory.mktemp("system")) as system:
        yield system


def request(scene=None, *, on_disconnect=0, request_id="", **sampling) -> pb.GenerateImagesRequest:
    """A small request; its steps are few where nothing else is told."""
    return pb.GenerateImagesRequest(
        request_id=request_id,
        collage=scene or collage(),
        sampling={"steps": 4, "seed": 1, **sampling},
        on_disconnect=on_disconnect,
    )


def large(**changes):
    return collage(size={"width": 128, "height": 128}, **changes)


def kinds(events) -> list[str]:
    return [event.WhichOneof("kind") for event in events]


def digests(events) -> list[str]:
    return [event.image.blob.sha256 for event in events if event.HasField("image")]


def plan_of(events) -> pb.Plan:
    (planned,) = (event.planned for event in events if event.HasField("planned"))
    return planned.plan


async def job_of(system, name: str) -> pb.Job:
    return (await system.stub.GetJob(pb.GetJobRequest(name=name), timeout=LIMIT_S)).job


async def ended(system, name: str) -> pb.Job:
    """The job once it has ended."""
    await system.watch(name)
    return await job_of(system, name)


async def until_step(call) -> list[pb.JobEvent]:
    """What a stream gives up to its first step; the stream stays open."""
    events = []
    while not events or not events[-1].HasField("step"):
        answer = await call.read()
        assert answer is not grpc.aio.EOF, kinds(events)
        events.append(answer.event)
    return events


async def test_a_collage_becomes_a_picture(system):
    events = await system.generate(request())
    log = [event for event in events if not event.HasField("queued")]
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    assert len({event.job for event in events}) == 1
    assert kinds(log)[:3] == ["stage_started", "planned", "stage_started"]
    assert [event.stage_started.stage for event in (log[0], log[2])] == ["compose", "generate"]
    assert kinds(log)[-2:] == ["image", "done"]
    steps = [event.step for event in log if event.HasField("step")]
    # Noise 0.8 of 4 steps leaves 3.
    assert (steps[-1].step, steps[-1].total) == (3, 3)
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    assert set(log[-1].done.stage_seconds) == {"compose", "generate"}

    plan = plan_of(log)
    composite_HWC = await system.picture(plan.composite)
    picture_HWC = await system.picture(log[-2].image.blob)
    assert picture_HWC.shape == composite_HWC.shape == (48, 32, 3)
    assert (picture_HWC != composite_HWC).any()
    for part in plan.layers:
        mask_HW = await system.picture(part.mask)
        assert mask_HW.shape == (48, 32)
        assert mask_HW.max() == 255
    assert plan.prompt == "a sushi and a cake"
    spans = [plan.prompt[part.text_start : part.text_end] for part in plan.layers]
    assert spans == ["sushi", "cake"]

    job = await job_of(system, log[0].job)
    assert (job.state, job.attempts) == (pb.JOB_STATE_DONE, 1)
    assert job.plan == plan
    assert [image.blob.sha256 for image in job.images] == digests(log)
    assert (
        job.create_time.ToNanoseconds()
        <= job.start_time.ToNanoseconds()
        <= job.end_time.ToNanoseconds()
    )


async def test_a_plan_runs_no_model_and_says_what_a_job_will_do(system):
    asked = request(seed=3)
    plan = (
        await system.stub.PlanCollage(
            pb.PlanCollageRequest(collage=asked.collage, sampling=asked.sampling), timeout=LIMIT_S
        )
    ).plan
    drawn = plan_of(await system.generate(asked))
    assert (plan.composite, plan.layers, plan.sampling) == (
        drawn.composite,
        drawn.layers,
        drawn.sampling,
    )
    assert plan.prompt_tokens == 7
    assert plan.estimated_memory_bytes > 0


async def test_one_request_id_is_one_job_and_another_gives_the_same_pictures(system):
    identity = str(uuid.uuid4())
    first = await system.generate(request(request_id=identity, seed=11))
    again = await system.generate(request(request_id=identity, seed=11))
    other = await system.generate(request(request_id=str(uuid.uuid4()), seed=11))
    logs = [[e for e in events if not e.HasField("queued")] for events in (first, again)]
    assert logs[0] == logs[1]
    assert other[0].job != first[0].job
    assert digests(first) == digests(again) == digests(other)
    assert digests(await system.generate(request(seed=12))) != digests(first)


async def test_concurrent_calls_with_one_request_id_are_one_job(system):
    asked = request(request_id=str(uuid.uuid4()), seed=13)
    streams = await asyncio.gather(*(system.generate(asked) for _ in range(4)))
    assert len({events[0].job for events in streams}) == 1
    assert len({tuple(digests(events)) for events in streams}) == 1


async def test_a_watch_goes_on_after_any_event(system):
    log = await system.watch((await system.generate(request(seed=21)))[0].job)
    for after in range(len(log) + 3):
        assert await system.watch(log[0].job, after=after) == log[after:]


async def test_two_watchers_see_the_same_while_the_job_runs(system):
    created = await system.stub.CreateJob(
        pb.CreateJobRequest(generate={"collage": collage(), "sampling": {"steps": 30, "seed": 22}}),
        timeout=LIMIT_S,
    )
    first, second = await asyncio.gather(*(system.watch(created.job.name) for _ in range(2)))
    assert first == second
    assert kinds(first)[-1] == "done"


async def test_a_cancel_stops_this_job_within_one_step(system):
    call = system.stub.GenerateImages(request(large(), **LONG), timeout=LIMIT_S)
    events = await until_step(call)
    name = events[0].job
    job = (await system.stub.CancelJob(pb.CancelJobRequest(name=name), timeout=LIMIT_S)).job
    assert job.name == name
    while (answer := await call.read()) is not grpc.aio.EOF:
        events.append(answer.event)
    assert kinds(events)[-1] == "cancelled"
    assert events[-1].cancelled.code == grpc.StatusCode.CANCELLED.value[0]
    steps = [event.step.step for event in events if event.HasField("step")]
    # The step that ran when the cancel came may still be told.
    assert steps[-1] <= 2, steps
    job = await job_of(system, name)
    assert (job.state, job.error.code) == (pb.JOB_STATE_CANCELLED, 1)
    # The device is free, and a second cancel changes nothing.
    assert kinds(await system.generate(request(seed=31)))[-1] == "done"
    again = (await system.stub.CancelJob(pb.CancelJobRequest(name=name), timeout=LIMIT_S)).job
    assert again.end_time == job.end_time


async def test_a_cancel_ends_a_waiting_job_at_once_and_no_other(system):
    runs = system.stub.GenerateImages(
        request(large(), on_disconnect=pb.DISCONNECT_POLICY_CANCEL, **LONG), timeout=LIMIT_S
    )
    await until_step(runs)
    waiting = await system.stub.CreateJob(
        pb.CreateJobRequest(generate={"collage": collage(), "sampling": {"seed": 32}}),
        timeout=LIMIT_S,
    )
    cancel = pb.CancelJobRequest(name=waiting.job.name)
    await system.stub.CancelJob(cancel, timeout=LIMIT_S)
    assert kinds(await system.watch(waiting.job.name))[-1] == "cancelled"
    assert (await runs.read()).event.HasField("step")
    runs.cancel()


@pytest.mark.parametrize("way", ["hang up", "deadline"])
@pytest.mark.parametrize("policy", [pb.DISCONNECT_POLICY_UNSPECIFIED, pb.DISCONNECT_POLICY_DETACH])
async def test_a_job_outlives_its_stream(system, policy, way):
    seed = 40 + 2 * policy + (way == "deadline")
    asked = request(steps=60, seed=seed, on_disconnect=policy)
    name = await leave(system, asked, way)
    job = await ended(system, name)
    assert (job.state, len(job.images)) == (pb.JOB_STATE_DONE, 1)


@pytest.mark.parametrize("way", ["hang up", "deadline"])
async def test_a_job_ends_with_its_stream_where_the_caller_says_so(system, way):
    asked = request(large(), on_disconnect=pb.DISCONNECT_POLICY_CANCEL, **LONG)
    name = await leave(system, asked, way)
    start = time.monotonic()
    assert (await ended(system, name)).state == pb.JOB_STATE_CANCELLED
    assert time.monotonic() - start < 20


async def leave(system, asked, way) -> str:
    """Starts a stream and is gone after its first step; the job's name."""
    asked.request_id = str(uuid.uuid4())
    call = system.stub.GenerateImages(asked, timeout=LIMIT_S)
    name = (await until_step(call))[0].job
    if way == "deadline":
        # The same job, by its id, on a stream that lasts a moment.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in system.stub.GenerateImages(asked, timeout=0.05):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        call.cancel()
    return name


async def test_several_pictures_have_seeds_in_a_row(system):
    events = await system.generate(request(images=3, seed=2**64 - 1))
    images = [event.image for event in events if event.HasField("image")]
    assert [(image.index, image.seed) for image in images] == [(0, 2**64 - 1), (1, 0), (2, 1)]
    assert len(set(digests(events))) == 3
    # A picture alone is the one of the batch, but for rounding.
    alone = digests(await system.generate(request(seed=0)))
    together_HWC, alone_HWC = [
        (await system.picture(blob)).astype(int)
        for blob in (
            images[1].blob,
            pb.GeneratedImage(
                blob={"sha256": alone[0], "size_bytes": await size(system, alone[0])}
            ).blob,
        )
    ]
    assert np.abs(together_HWC - alone_HWC).max() <= 2


async def size(system, sha256: str) -> int:
    call = system.stub.GetBlob(pb.GetBlobRequest(sha256=sha256), timeout=LIMIT_S)
    header = (await call.read()).header
    call.cancel()
    return header.size_bytes


async def test_previews_come_where_they_are_asked_for(system):
    scene = collage(layers=[layer("a", noise=1), layer("b", noise=1)])
    events = await system.generate(request(scene, steps=6, images=2, preview_every=2, seed=51))
    previews = [event.preview for event in events if event.HasField("preview")]
    # Not at the last step, where the pictures themselves come.
    assert [(part.step, part.index) for part in previews] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    for part in previews:
        with Image.open(io.BytesIO(part.png)) as image:
            assert max(image.size) <= 256
            assert image.size[0] * 48 == image.size[1] * 32
    plain = await system.generate(request(scene, steps=6, images=2, seed=51))
    assert "preview" not in kinds(plain)
    assert digests(plain) == digests(events)


async def redo(system, parent, names, **changes) -> pb.Job:
    asked = {"collage": collage(), "sampling": {"steps": 4, "seed": 61}, **changes}
    work = pb.RedoWork(parent={"blob": parent}, layers=names, **asked)
    created = await system.stub.CreateJob(pb.CreateJobRequest(redo=work), timeout=LIMIT_S)
    job = await ended(system, created.job.name)
    assert job.state == pb.JOB_STATE_DONE, job.error
    return job


async def test_a_redo_keeps_every_byte_outside_its_layers(system):
    events = await system.generate(request(seed=60))
    plan = plan_of(events)
    masks = {part.name: await system.picture(part.mask) for part in plan.layers}
    parent = next(event.image.blob for event in events if event.HasField("image"))
    for number, name in enumerate(("a", "b", "a")):
        job = await redo(system, parent, [name], sampling={"steps": 4, "seed": 61 + number})
        before_HWC, after_HWC = [
            await system.picture(blob) for blob in (parent, job.images[0].blob)
        ]
        changed_HW = (before_HWC != after_HWC).any(axis=2)
        assert changed_HW.any()
        assert not changed_HW[masks[name] == 0].any()
        assert job.images[0].changed_pixels == changed_HW.sum()
        parent = job.images[0].blob


async def test_a_redo_without_noise_changes_nothing(system):
    events = await system.generate(request(seed=60))
    parent = next(event.image.blob for event in events if event.HasField("image"))
    scene = collage(layers=[layer("a", noise=0), layer("b")])
    job = await redo(system, parent, ["a"], collage=scene)
    assert job.images[0].changed_pixels == 0
    assert job.images[0].blob.sha256 == parent.sha256


@pytest.mark.parametrize(("width", "height"), [(32, 112), (112, 16), (48, 48)])
async def test_any_canvas_the_model_takes_is_drawn(system, width, height):
    events = await system.generate(
        request(collage(size={"width": width, "height": height}), steps=2)
    )
    image = next(event.image for event in events if event.HasField("image"))
    assert (await system.picture(image.blob)).shape == (height, width, 3)


async def test_without_noise_the_picture_is_the_composite_byte_for_byte(system):
    scene = collage(layers=[layer("a", noise=0), layer("b", noise=0)])
    events = await system.generate(request(scene))
    composite_HWC = await system.picture(plan_of(events).composite)
    image = next(event.image for event in events if event.HasField("image"))
    np.testing.assert_array_equal(await system.picture(image.blob), composite_HWC)


async def test_thirty_two_layers_are_drawn(system):
    layers = [layer(f"l{i}", seed=i, x=i, y=1.5 * i, noise=i / 31, text="") for i in range(32)]
    for index, part in enumerate(layers):
        part.text = "cake" if index % 2 else "rice"
    events = await system.generate(request(collage(layers=layers, prompt=""), steps=2))
    assert kinds(events)[-1] == "done"
    assert [part.name for part in plan_of(events).layers] == [part.name for part in layers]


async def test_what_is_not_told_is_chosen_reported_and_repeatable(system):
    asked = request()
    asked.ClearField("sampling")
    asked.sampling.steps = 3
    for part in asked.collage.layers:
        part.ClearField("noise")
    events = await system.generate(asked)
    plan = plan_of(events)
    assert plan.sampling.HasField("seed")
    assert (plan.sampling.model, plan.sampling.sampler) == ("toy", "euler")
    asked.sampling.CopyFrom(plan.sampling)
    for part, resolved in zip(asked.collage.layers, plan.layers, strict=True):
        for dial in ("noise", "attract", "repel", "opacity"):
            setattr(part, dial, getattr(resolved, dial))
        part.transform.CopyFrom(resolved.transform)
    assert digests(await system.generate(asked)) == digests(events)
    # Another request of the same words gets another seed.
    asked.ClearField("sampling")
    asked.sampling.steps = 3
    assert digests(await system.generate(asked)) != digests(events)


async def test_every_sampler_that_is_listed_draws(system):
    (model,) = (await system.stub.ListModels(pb.ListModelsRequest(), timeout=LIMIT_S)).models
    assert (model.name, model.native_side, model.max_layers) == ("toy", 32, 32)
    assert set(model.samplers) == {
        *("euler", "euler_ancestral", "ddim", "dpmpp_2m", "unipc", "lcm")
    }
    drawn = [
        digests(await system.generate(request(sampler=name, steps=3))) for name in model.samplers
    ]
    assert len({found[0] for found in drawn}) >= 4


async def test_jobs_are_listed_newest_first_page_by_page(system):
    whole = await system.stub.ListJobs(pb.ListJobsRequest(page_size=100), timeout=LIMIT_S)
    times = [job.create_time.ToNanoseconds() for job in whole.jobs]
    assert times == sorted(times, reverse=True)
    paged, token = [], ""
    while True:
        page = await system.stub.ListJobs(
            pb.ListJobsRequest(page_size=7, page_token=token), timeout=LIMIT_S
        )
        assert len(page.jobs) <= 7
        paged += page.jobs
        token = page.next_page_token
        if not token:
            break
    assert [job.name for job in paged] == [job.name for job in whole.jobs]
    assert not any(job.images or job.HasField("plan") for job in paged)
    few = await system.stub.ListJobs(pb.ListJobsRequest(), timeout=LIMIT_S)
    assert len(few.jobs) == min(20, len(paged))


async def test_a_large_picture_is_uploaded_once_and_referred_to(system):
    data = cutout(9, side=700)
    assert len(data) > 2**20
    digest = hashlib.sha256(data).hexdigest()
    asked = pb.CheckBlobsRequest(sha256=["ab" * 32, digest])
    missing = await system.stub.CheckBlobs(asked, timeout=LIMIT_S)
    assert list(missing.missing_sha256) == ["ab" * 32, digest]
    for _ in range(2):
        put = await system.stub.PutBlob(upload(data, media_type="image/png"), timeout=LIMIT_S)
        assert (put.blob.sha256, put.blob.media_type) == (digest, "image/png")
    missing = await system.stub.CheckBlobs(asked, timeout=LIMIT_S)
    assert list(missing.missing_sha256) == ["ab" * 32]
    assert await system.fetch(put.blob) == data
    scene = collage(
        layers=[layer("a", image={"blob": put.blob}, transform={"scale": 0.04}), layer("b")]
    )
    assert kinds(await system.generate(request(scene)))[-1] == "done"


async def test_a_background_picture_lies_under_all(system):
    pixels_HWC = np.zeros((48, 32, 3), np.uint8)
    pixels_HWC[:, :16] = 200
    scene = collage(
        background={"image": {"data": png(pixels_HWC)}},
        layers=[layer("a", visible=False), layer("b", noise=0, transform={"x": 100, "y": 100})],
    )
    events = await system.generate(request(scene))
    plan = plan_of(events)
    np.testing.assert_array_equal(await system.picture(plan.composite), pixels_HWC)
    warned = {(warning.reason, warning.field) for warning in plan.warnings}
    assert warned == {
        ("LAYER_HIDDEN", "collage.layers[0].visible"),
        ("LAYER_HIDDEN", "collage.layers[1].transform"),
    }


async def test_the_plan_says_what_few_steps_and_no_guidance_mean(system):
    scene = collage(
        negative_prompt="a box",
        layers=[layer("a", noise=0.45), layer("b", noise=0.5), layer("c", noise=0.2)],
    )
    asked = {"steps": 4, "guidance_scale": 1.0}
    planned = await system.stub.PlanCollage(
        pb.PlanCollageRequest(collage=scene, sampling=asked), timeout=LIMIT_S
    )
    said = {(warning.reason, warning.field): warning.message for warning in planned.plan.warnings}
    assert said[("NOISE_DIAL_COARSE", "collage.layers[0].noise")] == (
        "is 0.45: with 4 steps the dial has only the levels 0, 0.25, 0.5, 0.75, 1; the next below "
        "counts, so it acts as 0.25; set one of them, or take more steps"
    )
    assert "pixels stay as they are" in said[("NOISE_DIAL_COARSE", "collage.layers[2].noise")]
    assert ("NOISE_DIAL_COARSE", "collage.layers[1].noise") not in said
    assert (
        "at guidance scale 1 model" in said[("NEGATIVE_PROMPT_UNUSED", "collage.negative_prompt")]
    )
    asked = {"steps": 20, "guidance_scale": 5.0}
    planned = await system.stub.PlanCollage(
        pb.PlanCollageRequest(collage=scene, sampling=asked), timeout=LIMIT_S
    )
    reasons = {warning.reason for warning in planned.plan.warnings}
    assert not reasons & {"NOISE_DIAL_COARSE", "NEGATIVE_PROMPT_UNUSED"}


async def test_many_clients_at_once_are_all_served(system):
    streams = await asyncio.gather(
        *(system.generate(request(seed=100 + number, steps=2)) for number in range(12))
    )
    assert {kinds(events)[-1] for events in streams} == {"done"}
    assert len({events[0].job for events in streams}) == 12
