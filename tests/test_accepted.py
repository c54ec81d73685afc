"""What was accepted is what runs: a job keeps the settings, the model, the plan and the words it was accepted with, and
a request sent again finds its job whatever has become of the system since.
"""

import contextlib
import hashlib
import json
import sys
import uuid
from pathlib import Path

import grpc
import pytest
from google.rpc import code_pb2
from grpc_status import rpc_status
from prometheus_client import REGISTRY

import gateway.__main__ as gateway
import services.compositor.__main__ as compositor
import services.generator.__main__ as generator
import services.inversion.__main__ as inversion
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from services.common import wire
from services.common.errors import from_status
from services.common.rpc import connect
from testing import toy
from testing.system import LIMIT_S, System, collage, layer

pytestmark = pytest.mark.usefixtures("one_thread")

ANY_PORT = "127.0.0.1:0"


def write_models(folder: Path, *entries: dict) -> None:
    (folder / "models.yaml").write_text(json.dumps({"models": list(entries)}))


@pytest.fixture
def folder(tmp_path):
    toy.mini(tmp_path / "one")
    toy.mini(tmp_path / "two", seed=1)
    write_models(tmp_path, {"name": "one", "source": "one", "defaults": {"steps": 3}})
    return tmp_path


@contextlib.asynccontextmanager
async def serving(folder: Path, *, slots: int, **more: dict):
    """A whole system over the folder's models.yaml whose gateway works on so many jobs; its servers, gateway last.

    `more`: further settings of a service, by its name.
    """
    common = {
        "address": ANY_PORT,
        "blobs": f"folder:{folder / 'blobs'}",
        "models": str(folder / "models.yaml"),
        "threads": 1,
    }
    servers = []
    try:
        for part, own in ((compositor, {}), (inversion, {"word_steps": 3}), (generator, {})):
            own |= more.get(part.__name__.split(".")[1], {})
            servers.append(await part.build(part.Settings(**common, **own)))
            await servers[-1].start()
        servers.append(
            await gateway.build(
                gateway.Settings(
                    address=ANY_PORT,
                    blobs=common["blobs"],
                    jobs=f"sqlite:{folder / 'jobs.sqlite'}",
                    compositor=servers[0].address,
                    inversion=servers[1].address,
                    generator=servers[2].address,
                    slots=slots,
                )
            )
        )
        await servers[-1].start()
        async with connect(servers[-1].address) as channel:
            stub = collage_service_pb2_grpc.CollageServiceStub(channel)
            yield System(channel=channel, stub=stub), servers
    finally:
        for server in reversed(servers):
            await server.stop(drain_s=0)


def request(**work) -> pb.CreateJobRequest:
    return pb.CreateJobRequest(
        request_id=str(uuid.uuid4()), generate={"collage": collage(), **work}
    )


async def accepted(folder: Path, asked: pb.CreateJobRequest) -> pb.Job:
    """The job of a request, queued and not begun."""
    async with serving(folder, slots=0) as (system, _):
        created = await system.stub.CreateJob(asked, timeout=LIMIT_S)
        assert created.job.state == pb.JOB_STATE_QUEUED
        return created.job


async def test_a_job_runs_as_it_was_accepted_whatever_the_defaults_are_by_then(folder):
    job = await accepted(folder, request())
    write_models(
        folder,
        {"name": "two", "source": "two"},
        {"name": "one", "source": "one", "defaults": {"steps": 7, "sampler": "ddim"}},
    )
    async with serving(folder, slots=1) as (system, _):
        events = await system.watch(job.name)
        models = (await system.stub.ListModels(pb.ListModelsRequest(), timeout=LIMIT_S)).models
        told = (await system.stub.GetJob(pb.GetJobRequest(name=job.name), timeout=LIMIT_S)).job
    assert events[-1].HasField("done")
    (plan,) = [event.planned.plan for event in events if event.HasField("planned")]
    assert (plan.sampling.model, plan.sampling.steps) == ("one", 3)
    assert plan.sampling.sampler != "ddim"
    assert told.plan.sampling == plan.sampling
    # Of 3 steps at a noise of 0.8.
    assert {event.step.total for event in events if event.HasField("step")} == {2}
    (image,) = told.images
    assert image.model_digest == {model.name: model.digest for model in models}["one"]


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        ({"name": "one", "source": "two"}, "MODEL_CHANGED"),
        ({"name": "two", "source": "two"}, "MODEL_GONE"),
    ],
)
@pytest.mark.parametrize("learns", [False, True])
async def test_a_model_that_is_another_or_gone_by_then_is_said_so(folder, served, reason, learns):
    asked = request()
    if learns:
        asked.generate.collage.layers[0].appearance.learn = True
    job = await accepted(folder, asked)
    write_models(folder, served)
    async with serving(folder, slots=1) as (system, _):
        events = await system.watch(job.name)
    failed = events[-1].failed
    assert failed.code == code_pb2.ABORTED
    told = from_status(rpc_status.status_pb2.Status(code=failed.code, details=failed.details))
    assert told.reason == reason
    assert "model one" in failed.message
    assert not any(event.HasField("image") for event in events)


async def test_a_request_sent_again_finds_its_job_while_half_the_system_is_down(folder):
    asked = request(sampling={"seed": 5})
    async with serving(folder, slots=0) as (system, servers):
        first = (await system.stub.CreateJob(asked, timeout=LIMIT_S)).job
        for server in servers[:-1]:
            await server.stop(drain_s=0)
        for blob in (folder / "blobs").rglob("*"):
            if blob.is_file():
                blob.unlink()
        again = (await system.stub.CreateJob(asked, timeout=LIMIT_S)).job
        assert again.name == first.name
        # An id is a UUID, however it is written.
        loud = pb.CreateJobRequest(request_id=asked.request_id.upper(), generate=asked.generate)
        assert (await system.stub.CreateJob(loud, timeout=LIMIT_S)).job.name == first.name
        # The same request, its pictures by digest: what an upload beforehand makes of it.
        named = pb.CreateJobRequest()
        named.CopyFrom(asked)
        for part, told in zip(
            named.generate.collage.layers, asked.generate.collage.layers, strict=True
        ):
            part.image.blob.sha256 = hashlib.sha256(told.image.data).hexdigest()
        assert (await system.stub.CreateJob(named, timeout=LIMIT_S)).job.name == first.name
        asked.generate.sampling.seed = 6
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await system.stub.CreateJob(asked, timeout=LIMIT_S)
    told = from_status(rpc_status.from_call(caught.value))
    assert told.reason == "REQUEST_ID_REUSED"


def calls() -> dict[str, float]:
    """Calls that any server of this process answered, by method."""
    return {
        sample.labels["method"].rsplit("/", 1)[-1]: sample.value
        for metric in REGISTRY.collect()
        if metric.name == "collage_rpc_calls"
        for sample in metric.samples
        if sample.name == "collage_rpc_calls_total" and sample.labels["code"] == "OK"
    }


async def test_a_collage_is_parsed_once_and_its_worker_calls_three_stages_and_no_more(
    folder, monkeypatch
):
    parse, parsers = wire.parse_collage, []

    def counted(*args, **kwargs):
        parsers.append(sys._getframe(1).f_globals["__name__"])
        return parse(*args, **kwargs)

    monkeypatch.setattr(wire, "parse_collage", counted)
    asked = request(sampling={"steps": 2})
    asked.generate.collage.layers[0].appearance.learn = True
    job = await accepted(folder, asked)
    before = calls()
    async with serving(folder, slots=1) as (system, _):
        events = await system.watch(job.name)
        after = calls()
    assert events[-1].HasField("done")
    assert [name for name in parsers if name.startswith("gateway")] == ["gateway.request"]
    made = {method: count - before.get(method, 0) for method, count in after.items()}
    # Health and the watcher's own call aside.
    assert {method: count for method, count in made.items() if count and method != "Check"} == {
        "Compose": 1,
        "LearnWords": 1,
        "Generate": 1,
        "WatchJob": 1,
    }


async def test_one_stream_redoes_as_a_job_does(folder):
    async with serving(folder, slots=1) as (system, _):
        scene, sampling = collage(), {"steps": 2, "seed": 3}
        events = await system.generate(pb.GenerateImagesRequest(collage=scene, sampling=sampling))
        (parent,) = [event.image.blob for event in events if event.HasField("image")]
        redo = {
            "collage": scene,
            "parent": {"blob": parent},
            "layers": ["b"],
            "sampling": {"steps": 2, "seed": 9},
        }
        streamed = await system.generate(pb.GenerateImagesRequest(redo=redo))
        job = (await system.stub.CreateJob(pb.CreateJobRequest(redo=redo), timeout=LIMIT_S)).job
        queued = await system.watch(job.name)
        pictures = [
            [event.image for event in each if event.HasField("image")]
            for each in (streamed, queued)
        ]
        assert pictures[0] == pictures[1]
        assert pictures[0][0].changed_pixels > 0
        for wrong, field in (
            ({"redo": redo, "collage": scene}, "collage"),
            ({"redo": redo, "sampling": sampling}, "sampling"),
            ({"redo": redo, "skip_failed_words": True}, "skip_failed_words"),
            ({"redo": {**redo, "layers": ["nobody"]}}, "redo.layers[0]"),
            (
                {"redo": {**redo, "collage": collage(layers=[layer("b", noise=2)])}},
                "redo.collage.layers[0].noise",
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await system.generate(pb.GenerateImagesRequest(**wrong))
            told = from_status(rpc_status.from_call(caught.value))
            assert [each.field for each in told.violations] == [field]


async def test_a_job_of_a_server_that_accepted_otherwise_fails_and_says_so(folder):
    from gateway.jobs import QueuePolicy
    from gateway.jobs.sqlite import SqliteJobs

    asked = request()
    jobs = await SqliteJobs.open(
        folder / "jobs.sqlite", QueuePolicy(exhausted=lambda _: b"", lease_s=5)
    )
    # Field 1 held the request itself.
    raw = asked.SerializeToString()
    length = bytes([len(raw) & 127 | 128, len(raw) >> 7 & 127 | 128, len(raw) >> 14])
    record = await jobs.submit(asked.request_id, b"\x0a" + length + raw)
    await jobs.close()
    async with serving(folder, slots=1) as (system, _):
        events = await system.watch(f"jobs/{record.id}")
    assert "accepted by another version" in events[-1].failed.message
