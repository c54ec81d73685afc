"""The client against a small real server that records its calls and breaks on purpose."""

import asyncio
import hashlib
import inspect
import io
import subprocess
import sys
import time
import uuid

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from collage.v1 import blob_pb2, collage_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from collage_client import (
    AsyncCollageClient,
    AsyncJob,
    Collage,
    CollageClient,
    CollageError,
    DeadlineExceeded,
    Full,
    InvalidInput,
    Job,
    JobFailed,
    Layer,
    MessageTooLarge,
    NotFound,
    Sampling,
    Structure,
    Unavailable,
)

PICTURE = b"\x89PNG one"
DRAWN = b"\x89PNG drawn"
# No *args and no **options: every argument has a name and a type.
NAMED_KINDS = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def sha(data):
    return hashlib.sha256(data).hexdigest()


def refused(code, message, *details):
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=packed))


class Service(collage_service_pb2_grpc.CollageServiceServicer):
    """Keeps blobs and one job's log; `broken` lists how many events each stream sends before it dies."""

    def __init__(self):
        self.blobs = {}
        self.calls = []
        self.deadlines = []
        self.broken = []
        self.unavailable = 0
        self.hang = False
        self.stalls = False
        self.failure = None
        self.answers_twice = False

    def log(self, method, request, context):
        self.calls.append((method, request))
        self.deadlines.append(context.time_remaining())
        self.metadata = dict(context.invocation_metadata())

    def called(self, method):
        return [request for name, request in self.calls if name == method]

    async def flaky(self, context):
        if self.hang:
            await asyncio.sleep(30)
        if self.unavailable:
            self.unavailable -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")

    def events(self, job="jobs/a"):
        image = pb.GeneratedImage(index=0, seed=7, blob=blob_pb2.BlobRef(sha256=sha(DRAWN)))
        kinds = [
            {"planned": pb.Planned()},
            {"stage_started": pb.StageStarted(stage="compose", attempt=1)},
            {"step": pb.Step(step=1, total=2)},
            {"step": pb.Step(step=2, total=2)},
            {"word": pb.WordProgress(layer="a", step=1, total=1, word="words/w")},
            {"image": image},
            {"failed": self.failure} if self.failure else {"done": pb.Done()},
        ]
        if not self.failure:
            kinds[-1]["done"].stage_seconds["generate"] = 1.5
        return [pb.JobEvent(job=job, sequence=n, **kind) for n, kind in enumerate(kinds, start=1)]

    async def stream(self, context, answer, after):
        rest = [event for event in self.events() if event.sequence > after]
        if not after:
            # No part of the log: it repeats the number watched from.
            queued = pb.JobEvent(job="jobs/a", sequence=after, queued=pb.Queued(position=0))
            yield answer(event=queued)
        if self.answers_twice and after:
            rest.insert(0, self.events()[after - 1])
        if self.broken:
            for event in rest[: self.broken.pop(0)]:
                yield answer(event=event)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gateway went away")
        for event in rest:
            yield answer(event=event)
            if self.stalls:
                await asyncio.sleep(30)

    async def GenerateImages(self, request, context):
        self.log("GenerateImages", request, context)
        async for answer in self.stream(context, pb.GenerateImagesResponse, 0):
            yield answer

    async def WatchJob(self, request, context):
        self.log("WatchJob", request, context)
        async for answer in self.stream(context, pb.WatchJobResponse, request.after_sequence):
            yield answer

    async def CreateJob(self, request, context):
        self.log("CreateJob", request, context)
        await self.flaky(context)
        return pb.CreateJobResponse(job=pb.Job(name="jobs/a", request_id=request.request_id))

    async def GetJob(self, request, context):
        self.log("GetJob", request, context)
        if request.name != "jobs/a":
            await context.abort_with_status(refused(5, "no such job"))
        images = [event.image for event in self.events() if event.WhichOneof("kind") == "image"]
        return pb.GetJobResponse(job=pb.Job(name="jobs/a", state=3, images=images))

    async def CancelJob(self, request, context):
        self.log("CancelJob", request, context)
        return pb.CancelJobResponse(job=pb.Job(name=request.name, state=5))

    async def ListJobs(self, request, context):
        self.log("ListJobs", request, context)
        first = int(request.page_token or 0)
        jobs = [pb.Job(name=f"jobs/{n}") for n in range(first, min(first + 3, 8))]
        token = str(first + 3) if first + 3 < 8 else ""
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def PlanCollage(self, request, context):
        self.log("PlanCollage", request, context)
        await self.flaky(context)
        if request.collage.prompt == "bad":
            violation = error_details_pb2.BadRequest.FieldViolation(
                field="collage.layers[0].noise", description="must be 0 to 1"
            )
            await context.abort_with_status(
                refused(
                    3,
                    "one field is wrong",
                    error_details_pb2.ErrorInfo(reason="INVALID_FIELD", domain="collage.v1"),
                    error_details_pb2.BadRequest(field_violations=[violation]),
                )
            )
        if request.collage.prompt == "full":
            delay = duration_pb2.Duration(seconds=2, nanos=500_000_000)
            await context.abort_with_status(
                refused(8, "queue full", error_details_pb2.RetryInfo(retry_delay=delay))
            )
        return pb.PlanCollageResponse(plan=pb.Plan(prompt=request.collage.prompt))

    async def CheckBlobs(self, request, context):
        self.log("CheckBlobs", request, context)
        missing = [digest for digest in request.sha256 if digest not in self.blobs]
        return pb.CheckBlobsResponse(missing_sha256=missing)

    async def PutBlob(self, request_iterator, context):
        header, data, largest = None, b"", 0
        async for part in request_iterator:
            if part.WhichOneof("part") == "header":
                header = part.header
            else:
                data += part.chunk
                largest = max(largest, len(part.chunk))
        self.log("PutBlob", (header, largest), context)
        assert sha(data) == header.sha256
        self.blobs[header.sha256] = data
        return pb.PutBlobResponse(blob=header)

    async def GetBlob(self, request, context):
        self.log("GetBlob", request, context)
        data = self.blobs[request.sha256]
        yield pb.GetBlobResponse(header=blob_pb2.BlobRef(sha256=request.sha256))
        if self.unavailable:
            self.unavailable -= 1
            yield pb.GetBlobResponse(chunk=data[:2])
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        for first in range(0, len(data), 1000):
            yield pb.GetBlobResponse(chunk=data[first : first + 1000])


@pytest.fixture
async def service():
    service = Service()
    server = grpc.aio.server()
    collage_service_pb2_grpc.add_CollageServiceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    service.server = server
    await server.start()
    yield service
    await server.stop(None)


@pytest.fixture
async def client(service):
    async with AsyncCollageClient(service.address) as client:
        yield client


def collage(*pictures, prompt="a sushi"):
    layers = [
        collage_pb2.Layer(name=f"l{n}", text="sushi", image=blob_pb2.Image(data=picture))
        for n, picture in enumerate(pictures)
    ]
    size = collage_pb2.Size(width=64, height=64)
    return collage_pb2.Collage(size=size, prompt=prompt, layers=layers)


async def test_pictures_go_up_once_and_requests_carry_only_digests(service, client):
    background = collage(PICTURE, PICTURE, b"\xff\xd8\xff two")
    background.background.image.data = b"RIFF three"
    background.layers[0].structure.add(kind="depth").image.data = PICTURE
    sent = collage_pb2.Collage()
    sent.CopyFrom(background)
    await client.plan(background)
    await client.plan(background)
    assert background == sent, "the caller's message is left alone"
    assert [ref.media_type for ref, _ in service.called("PutBlob")] == [
        "image/png",
        "image/jpeg",
        "image/webp",
    ]
    for request in service.called("PlanCollage"):
        layers = request.collage.layers
        assert [layer.image.blob.sha256 for layer in layers[:2]] == [sha(PICTURE)] * 2
        assert request.collage.background.image.blob.sha256 == sha(b"RIFF three")
        assert layers[0].structure[0].image.blob.sha256 == sha(PICTURE)


async def test_large_blobs_travel_in_chunks_both_ways(service, client):
    data = bytes(range(256)) * 20_000
    ref = await client.put(data)
    ((header, largest),) = service.called("PutBlob")
    assert (header.size_bytes, largest) == (len(data), 512 * 1024)
    assert await client.fetch(ref) == data
    with pytest.raises(InvalidInput, match="67108864"):
        await client.put(bytes(64 * 2**20 + 1))


async def test_a_download_begins_again_when_it_breaks_and_its_digest_is_verified(service, client):
    ref = await client.put(PICTURE)
    service.unavailable = 2
    assert await client.fetch(ref) == PICTURE
    assert len(service.called("GetBlob")) == 3
    service.blobs[ref.sha256] = b"something else"
    with pytest.raises(CollageError) as caught:
        await client.fetch(ref.sha256)
    assert caught.value.code is grpc.StatusCode.DATA_LOSS


@pytest.mark.parametrize(
    ("broken", "resumed_after"),
    [([3], [3]), ([0, 2, 1], [0, 2, 2]), ([1, 0, 0, 0, 0, 5], [1, 1, 1, 1, 1, 5])],
)
async def test_generate_shows_every_event_once_over_broken_streams(
    service, client, broken, resumed_after
):
    service.broken = broken
    service.answers_twice = True
    events = [event async for event in await client.generate(collage(PICTURE))]
    logged = [event for event in events if not event.HasField("queued")]
    assert [event.sequence for event in logged] == [1, 2, 3, 4, 5, 6, 7]
    assert events[0].HasField("queued")
    watched = [request.after_sequence for request in service.called("WatchJob")]
    assert watched == resumed_after
    ids = {request.request_id for request in service.called("GenerateImages")}
    assert len(ids) == 1
    uuid.UUID(ids.pop())


async def test_a_stream_that_never_comes_back_is_given_up(service, client, monkeypatch):
    monkeypatch.setattr("collage_client._calls._LONGEST_PAUSE_S", 0.001)
    service.broken = [2] + [0] * 50
    seen = []
    with pytest.raises(Unavailable):
        [seen.append(event.sequence) async for event in await client.generate(collage(PICTURE))]
    assert seen == [0, 1, 2]
    assert len(service.called("WatchJob")) == 19
    service.broken = [0] * 50
    with pytest.raises(Unavailable):
        [event async for event in client.watch("jobs/a")]
    assert len(service.called("WatchJob")) == 39


async def test_a_stream_that_means_cancel_does_not_resume(service, client):
    service.broken = [2]
    with pytest.raises(Unavailable):
        job = await client.generate(collage(PICTURE), cancel_on_disconnect=True)
        [event async for event in job]
    (request,) = service.called("GenerateImages")
    assert request.on_disconnect == pb.DISCONNECT_POLICY_CANCEL
    assert not service.called("WatchJob")


async def test_a_stopped_server_breaks_the_stream_and_the_next_one_resumes_it(service, client):
    service.stalls = True
    events = client.watch("jobs/a")
    assert [(await anext(events)).sequence for _ in range(2)] == [0, 1]
    service.stalls = False
    port = service.address.rpartition(":")[2]
    await service.server.stop(0)
    again = grpc.aio.server()
    collage_service_pb2_grpc.add_CollageServiceServicer_to_server(service, again)
    assert again.add_insecure_port(f"127.0.0.1:{port}") == int(port)
    await again.start()
    assert [event.sequence async for event in events] == [2, 3, 4, 5, 6, 7]
    await again.stop(None)


async def test_unary_calls_repeat_only_when_unavailable_under_one_request_id(service, client):
    service.unavailable = 3
    job = await client.create_job(pb.GenerateWork(collage=collage(PICTURE)), timeout_s=5)
    requests = service.called("CreateJob")
    assert len(requests) == 4
    assert {request.request_id for request in requests} == {job.request_id}
    assert service.metadata["x-request-id"] == job.request_id
    assert service.deadlines[-1] < service.deadlines[-4] - 0.1 < 5
    service.calls.clear()
    with pytest.raises(Full):
        await client.plan(collage(prompt="full"))
    assert len(service.called("PlanCollage")) == 1


async def test_errors_carry_reason_fields_and_delay(service, client):
    with pytest.raises(InvalidInput) as bad:
        await client.plan(collage(prompt="bad"))
    assert bad.value.reason == "INVALID_FIELD"
    assert [v.field for v in bad.value.field_violations] == ["collage.layers[0].noise"]
    with pytest.raises(Full) as full:
        await client.plan(collage(prompt="full"))
    assert full.value.retry_after_s == 2.5
    with pytest.raises(NotFound, match="no such job"):
        await client.job("jobs/b")
    with pytest.raises(InvalidInput, match="UUID"):
        await client.create_job(pb.GenerateWork(collage=collage()), request_id="x")


async def test_one_deadline_bounds_all_attempts(service, client):
    service.hang = True
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.plan(collage(), timeout_s=0.5)
    service.broken = [0] * 100
    with pytest.raises(CollageError):
        [event async for event in client.watch("jobs/a", timeout_s=0.3)]
    assert time.monotonic() - start < 2


async def test_nobody_at_the_address_is_unavailable():
    async with AsyncCollageClient("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.models(timeout_s=20)


async def test_a_result_holds_pictures_words_and_timings(service, client):
    await client.put(DRAWN)
    job = await client.redo(collage(PICTURE), PICTURE, ["l0"], feather=0.0)
    result = await job.result()
    assert await job.result() is result
    assert result.images == (DRAWN,)
    assert (result.words, result.stage_seconds) == ({"a": "words/w"}, {"generate": 1.5})
    (request,) = service.called("GenerateImages")
    assert request.redo.parent.blob.sha256 == sha(PICTURE)
    assert request.redo.HasField("feather")
    assert not request.redo.HasField("restore_cutout")


async def test_a_failed_job_raises_with_its_details(service, client):
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="OUT_OF_MEMORY"))
    service.failure = pb.JobError(code=8, message="too large", details=[detail])
    job = await client.learn(collage(PICTURE), ["l0"])
    assert [event async for event in job][-1].HasField("failed")
    with pytest.raises(JobFailed) as caught:
        await job.result()
    error = caught.value
    assert (error.job, error.reason) == ("jobs/a", "OUT_OF_MEMORY")
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_lists_walk_their_pages(service, client):
    assert len(await client.jobs(100)) == 8
    assert [job.name for job in await client.jobs(4)] == [f"jobs/{n}" for n in range(4)]


async def test_the_simple_client_does_the_same_without_a_loop(service):
    def use():
        with CollageClient(service.address) as client:
            client.put(DRAWN)
            service.broken = [2]
            with client.generate(collage(PICTURE), skip_failed_words=True) as job:
                seen = [event.sequence for event in job]
            assert job.name == "jobs/a"
            assert job.cancel().state == pb.JOB_STATE_CANCELLED
            watched = client.watch("jobs/a")
            assert [next(watched).sequence for _ in range(2)] == [0, 1]
            watched.close()
            # It goes on after the last one given.
            assert next(watched).sequence == 2
            with pytest.raises(NotFound):
                client.job("jobs/b")
            return job.result(), seen, client.watch("jobs/a").result()

    result, seen, again = await asyncio.to_thread(use)
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7]
    assert result.images == again.images == (DRAWN,)


def test_both_flavours_have_the_same_verbs_and_arguments():
    for waited, awaited in ((CollageClient, AsyncCollageClient), (Job, AsyncJob)):
        verbs = {
            name: function
            for name, function in vars(awaited).items()
            if callable(function) and not name.startswith("_") and name != "of"
        }
        names = {name for name in vars(waited) if not name.startswith("_")}
        assert names - {"name"} == set(verbs)
        for name, function in verbs.items():
            told = inspect.signature(getattr(waited, name)).parameters
            assert list(told) == list(inspect.signature(function).parameters), name
            assert {p.kind for p in told.values()} <= NAMED_KINDS, name
            assert getattr(waited, name).__doc__


async def test_a_handle_goes_on_where_the_loop_was_left(service, client):
    job = await client.generate(collage(PICTURE))
    assert job.name == "jobs/a"
    async for event in job:
        if event.HasField("step"):
            break
    await client.put(DRAWN)
    service.broken = [1]
    rest = [event.sequence async for event in job]
    assert rest == [4, 5, 6, 7]
    # At its end it stays.
    assert [event async for event in job] == []
    result = await job.result()
    assert (result.images, result.words) == ((DRAWN,), {"a": "words/w"})
    assert (await job.cancel()).name == (await job.record()).name == "jobs/a"


async def test_a_handle_that_gave_up_may_be_followed_again(service, client, monkeypatch):
    monkeypatch.setattr("collage_client._calls._LONGEST_PAUSE_S", 0.001)
    service.broken = [2] + [0] * 19
    job = await client.generate(collage(PICTURE))
    with pytest.raises(Unavailable):
        await job.result()
    await client.put(DRAWN)
    assert (await job.result()).images == (DRAWN,)


async def test_a_collage_is_built_from_paths_bytes_and_open_files(service, client, tmp_path):
    (tmp_path / "box.png").write_bytes(PICTURE)
    structure = Structure("depth", scale=0.5, image=io.BytesIO(b"\x89PNG depth"))
    built = Collage(
        size=(128, 96),
        prompt="a {box} and {rice}",
        background=(1, 2, 3),
        layers=[
            Layer("box", tmp_path / "box.png", text="bento box", x=64, y=0, scale=0.5, noise=0.0),
            Layer("rice", PICTURE, text="rice", structure=["canny", structure], seed=0, learn=True),
            Layer("old", io.BytesIO(PICTURE), text="x", word="words/w", word_weight=0.5),
            collage_pb2.Layer(name="raw", text="y", image=blob_pb2.Image(data=PICTURE)),
        ],
    )
    box, rice, old, raw = built.message().layers
    assert built.message() == built.message(), "an open file is read once"
    assert box.image.data == rice.image.data == old.image.data == raw.image.data == PICTURE
    assert (box.noise, box.transform.y, box.transform.x) == (0, 0, 64)
    assert box.HasField("noise") and box.transform.HasField("y")
    assert not box.HasField("attract") and not box.transform.HasField("rotation")
    assert not box.HasField("appearance") and not box.HasField("visible")
    assert rice.HasField("seed") and rice.appearance.learn
    assert [part.kind for part in rice.structure] == ["canny", "depth"]
    assert rice.structure[1].image.data == b"\x89PNG depth"
    assert (old.appearance.word, old.appearance.weight) == ("words/w", 0.5)
    assert built.message().background.color.blue == 3
    sampling = Sampling(images=2, seed=0, adapters={"ink": 0.8})
    await client.generate(built, sampling)
    (request,) = service.called("GenerateImages")
    assert request.collage.size.height == 96
    assert request.collage.layers[0].image.blob.sha256 == sha(PICTURE)
    assert request.sampling.HasField("seed") and not request.sampling.HasField("steps")
    assert request.sampling.adapters[0].weight == 0.8
    with pytest.raises(OSError, match="none"):
        Layer("box", tmp_path / "none.png", text="x")


async def test_a_closed_client_may_be_closed_again(service):
    def use():
        client = CollageClient(service.address)
        client.close()
        client.close()
        with client:
            pass

    await asyncio.to_thread(use)
    client = AsyncCollageClient(service.address)
    await client.close()
    await client.close()


async def test_a_message_above_grpcs_limit_is_no_full_service(service, client):
    text = "x" * (5 * 2**20)
    with pytest.raises(MessageTooLarge, match="larger than max") as caught:
        await client.plan(collage(prompt=text))
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    # Pictures never make a message large.
    await client.plan(collage(*(bytes([n]) * 2**20 for n in range(5))))


def test_the_client_imports_nothing_but_grpc_protobuf_and_yaml():
    program = (
        "import pkgutil, sys, importlib; before = set(sys.modules); import collage_client\n"
        "for each in pkgutil.walk_packages(collage_client.__path__, 'collage_client.'):\n"
        "    if not each.name.endswith(('sheet', '__main__')): importlib.import_module(each.name)\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(names - set(sys.stdlib_module_names)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True
    )
    # grpc takes its own extensions along where they are installed.
    allowed = ("collage", "collage_client", "cython_runtime", "google", "typing_extensions", "yaml")
    found = [name for name in ran.stdout.split() if not name.startswith(("_", "grpc"))]
    assert set(found) <= set(allowed)


def test_the_package_imports_without_pillow_numpy_or_torch():
    program = (
        "import sys; import collage_client, collage_client.cli.command, collage_client.cli.results; "
        "heavy = {'PIL', 'numpy', 'torch', 'local'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
