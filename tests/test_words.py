"""Learned words through the public face: learned once, kept, listed, taken in, forgotten, and used by their layer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_status import rpc_status
from safetensors.numpy import load, save

import services.inversion.__main__ as service
from collage.v1 import blob_pb2, inversion_service_pb2, inversion_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from gateway.jobs import JobState, QueuePolicy
from gateway.jobs.sqlite import SqliteJobs
from gateway.pipeline import Pipeline
from gateway.words import Words
from gateway.worker import sweep
from services.common import limits
from services.common.blobs import FolderBlobStore, put_blob
from services.common.collage import Extent
from services.common.decoder import Decoder
from services.common.errors import DeadlinePassed, InvalidRequest, from_status
from services.common.rpc import connect
from services.common.words import checkpoint_key
from services.inversion.engine import Engine
from services.inversion.learn import Recipe, Trainer
from services.inversion.networks import read_catalog
from services.inversion.service import InversionServicer
from testing import toy
from testing.system import LIMIT_S, collage, cutout, layer, png, running, upload
from tests import test_accepted as accepted

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOTHING = png(np.zeros((20, 20, 4), np.uint8))
WIDTH = 32


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory):
    async with running(tmp_path_factory.mktemp("system")) as system:
        yield system


async def learned(system, scene, *names: str) -> list[pb.JobEvent]:
    """The events of a job that learns and does nothing else."""
    work = pb.LearnWork(collage=scene, layers=names)
    made = await system.stub.CreateJob(pb.CreateJobRequest(learn=work), timeout=LIMIT_S)
    return await system.watch(made.job.name)


async def listed(system, *, page_size: int = 100) -> list[pb.Word]:
    """Every word, page by page."""
    found, token = [], ""
    while True:
        request = pb.ListWordsRequest(page_size=page_size, page_token=token)
        page = await system.stub.ListWords(request, timeout=LIMIT_S)
        assert len(page.words) <= page_size
        found += page.words
        token = page.next_page_token
        if not token:
            return found


async def imported(system, data: bytes, text: str = "sushi") -> pb.Word:
    put = await system.stub.PutBlob(upload(data), timeout=LIMIT_S)
    request = pb.ImportWordRequest(text=text, vectors=put.blob)
    return (await system.stub.ImportWord(request, timeout=LIMIT_S)).word


def words_in(events) -> dict[str, str]:
    return {event.word.layer: event.word.word for event in events if event.word.word}


async def test_layers_are_learned_together_and_never_again(system):
    scene = collage(
        layers=[
            layer("a", appearance={"learn": True, "vectors": 2}),
            layer("b", seed=1, appearance={"learn": True}),
            # The same picture and words as b: the same word.
            layer("c", seed=1, text="cake"),
        ]
    )
    events = await learned(system, scene, "a", "b", "c")
    assert events[-1].WhichOneof("kind") == "done"
    names = words_in(events)
    assert set(names) == {"a", "b", "c"}
    assert names["b"] == names["c"] != names["a"]
    told = [event.word for event in events if event.HasField("word")]
    assert all(word.step <= word.total <= 4 for word in told)
    assert all(0 < word.loss < 10 for word in told if word.step)
    again = await learned(system, scene)
    # No training step was made.
    assert [(e.word.step, e.word.total) for e in again if e.HasField("word")] == [(0, 0)] * 2
    assert words_in(again) == {name: names[name] for name in ("a", "b")}
    for name, count, text in (("a", 2, "sushi"), ("b", 1, "cake")):
        word = (await system.stub.GetWord(pb.GetWordRequest(name=names[name]))).word
        assert (word.vector_count, word.text) == (count, text)
        (vectors,) = load(await system.fetch(word.vectors)).values()
        assert vectors.shape == (count, WIDTH)
        assert np.isfinite(vectors).all()


async def test_words_are_listed_by_name_page_by_page(system):
    for number in range(3):
        await imported(system, save({"x": np.full((1, WIDTH), number, np.float32)}))
    every = await listed(system)
    assert len(every) >= 3
    assert [word.name for word in every] == sorted({word.name for word in every})
    for size in (1, 2, len(every)):
        assert await listed(system, page_size=size) == every


async def test_an_imported_word_is_kept_until_it_is_deleted(system):
    rows = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    word = await imported(system, save({"emb_params": rows}), "lemon")
    assert (word.text, word.vector_count) == ("lemon", 2)
    ((key, kept),) = load(await system.fetch(word.vectors)).items()
    assert key == f"<{word.name.removeprefix('words/')[:8]}>"
    assert np.array_equal(kept, rows)
    assert await imported(system, save({"emb_params": rows}), "lemon") == word
    await system.stub.DeleteWord(pb.DeleteWordRequest(name=word.name), timeout=LIMIT_S)
    assert word.name not in {each.name for each in await listed(system)}
    for call in (
        system.stub.GetWord(pb.GetWordRequest(name=word.name)),
        system.stub.DeleteWord(pb.DeleteWordRequest(name=word.name)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"PK\x03\x04 and more", "pickled"),
        (save({"x": np.zeros((1, WIDTH + 1), np.float32)}), f"vectors x {WIDTH}"),
        (save({"x": np.zeros((5000, WIDTH * 10), np.float32)}), "allowed: at most"),
    ],
)
async def test_what_cannot_be_a_word_of_this_model_is_refused(system, data, told):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await imported(system, data)
    error = from_status(rpc_status.from_call(caught.value))
    assert isinstance(error, InvalidRequest)
    assert [each.field for each in error.violations] == ["vectors"]
    assert told in error.message


async def test_the_plan_counts_a_words_tokens(system):
    async def tokens(**changes) -> int:
        scene = collage(layers=[layer("a", **changes), layer("b", seed=1)])
        request = pb.PlanCollageRequest(collage=scene)
        return (await system.stub.PlanCollage(request, timeout=LIMIT_S)).plan.prompt_tokens

    word = await imported(system, save({"x": np.ones((3, WIDTH), np.float32)}))
    plain = await tokens()
    assert await tokens(appearance={"word": word.name}) == plain + 3
    assert await tokens(appearance={"learn": True, "vectors": 5}) == plain + 5
    assert await tokens(appearance={"learn": True, "vectors": 5}, visible=False) == plain


async def test_a_picture_is_drawn_without_a_word_that_failed_only_where_the_caller_said_so(system):
    bad = layer("b", image=blob_pb2.Image(data=NOTHING), appearance={"learn": True})
    request = pb.GenerateImagesRequest(
        collage=collage(layers=[layer("a"), bad]), sampling={"steps": 1, "seed": 1}
    )
    events = await system.generate(request)
    assert events[-1].WhichOneof("kind") == "failed"
    assert events[-1].failed.message.startswith("collage.layers[1].image: ")
    assert not any(event.HasField("step") or event.HasField("image") for event in events)
    request.skip_failed_words = True
    events = await system.generate(request)
    assert events[-1].WhichOneof("kind") == "done"
    (warning,) = (e.warning for e in events if e.warning.reason == "WORD_FAILED")
    assert warning.field == "collage.layers[1].appearance"
    assert "transparent" in warning.message
    # The picture is that of the same collage without a word.
    bad.ClearField("appearance")
    plain = pb.GenerateImagesRequest(
        collage=collage(layers=[layer("a"), bad]), sampling={"steps": 1, "seed": 1}
    )
    digests = [
        [event.image.blob.sha256 for event in each if event.HasField("image")]
        for each in (events, await system.generate(plain))
    ]
    assert digests[0] == digests[1]


async def test_a_word_of_another_model_is_refused_by_its_field(system, monkeypatch):
    word = await imported(system, save({"x": np.full((1, WIDTH), 2, np.float32)}))
    scene = collage(layers=[layer("a", appearance={"word": word.name})])

    async def foreign(blobs, digest):
        other = pb.Word()
        other.CopyFrom(word)
        other.model_digest = hashlib.sha256(b"other").hexdigest()
        return other

    monkeypatch.setattr("services.common.words.read", foreign)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.PlanCollage(pb.PlanCollageRequest(collage=scene), timeout=LIMIT_S)
    error = from_status(rpc_status.from_call(caught.value))
    assert error.reason == "WORD_OF_ANOTHER_MODEL"
    assert error.metadata["field"] == "collage.layers[0].appearance.word"


async def test_a_job_keeps_the_word_it_was_accepted_with(system, monkeypatch):
    """A word deleted behind a queued job failed it with UNKNOWN_WORD when it was taken up."""
    data = save({"x": np.full((2, WIDTH), 0.25, np.float32)})
    word = await imported(system, data)
    request = pb.CreateJobRequest(
        request_id=str(uuid.uuid4()),
        generate={
            "collage": collage(
                layers=[
                    layer("a", appearance={"word": word.name}),
                    layer("b", seed=1, visible=False, appearance={"word": word.name}),
                ]
            ),
            "sampling": {"steps": 2, "seed": 77},
        },
    )
    gate, run = asyncio.Event(), Pipeline.run

    async def gated(*args):
        await gate.wait()
        return await run(*args)

    monkeypatch.setattr(Pipeline, "run", gated)
    job = (await system.stub.CreateJob(request, timeout=LIMIT_S)).job
    await system.stub.DeleteWord(pb.DeleteWordRequest(name=word.name), timeout=LIMIT_S)
    # The same request again is the same job; a new one is refused by its field.
    assert (await system.stub.CreateJob(request, timeout=LIMIT_S)).job.name == job.name
    other = pb.CreateJobRequest(generate=request.generate)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await system.stub.CreateJob(other, timeout=LIMIT_S)
    error = from_status(rpc_status.from_call(caught.value))
    fields = [f"generate.collage.layers[{index}].appearance.word" for index in (0, 1)]
    assert (error.reason, [each.field for each in error.violations]) == ("UNKNOWN_WORD", fields)
    gate.set()
    events = await system.watch(job.name)
    assert events[-1].WhichOneof("kind") == "done", events[-1]
    # It was drawn with the word.
    await imported(system, data)
    request.ClearField("request_id")
    again = await system.stub.CreateJob(request, timeout=LIMIT_S)
    pictures = [
        [event.image.blob.sha256 for event in each if event.HasField("image")]
        for each in (events, await system.watch(again.job.name))
    ]
    assert pictures[0] == pictures[1]


async def test_pictures_of_one_digest_are_one_word(system):
    """What is learned is named by the picture's bytes, wherever it stands and however large."""
    one = collage(layers=[layer("a", x=3, opacity=0.5)])
    other = collage(layers=[layer("z", x=30, noise=0.2, image={"data": cutout(0)})])
    names = [words_in(await learned(system, each, each.layers[0].name)) for each in (one, other)]
    assert names[0]["a"] == names[1]["z"]


async def test_a_layer_is_drawn_with_its_word_learned_now_or_before(system):
    async def drawn(appearance=None) -> str:
        scene = collage(layers=[layer("a", appearance=appearance), layer("b", seed=1)])
        events = await system.generate(
            pb.GenerateImagesRequest(collage=scene, sampling={"steps": 2, "seed": 1})
        )
        assert events[-1].WhichOneof("kind") == "done", events[-1]
        (digest,) = (event.image.blob.sha256 for event in events if event.HasField("image"))
        return digest

    scene = collage(layers=[layer("a"), layer("b", seed=1)])
    name = words_in(await learned(system, scene, "a"))["a"]
    now = await drawn({"learn": True})
    assert now == await drawn({"word": name})
    assert now != await drawn()
    assert now != await drawn({"word": name, "weight": 0.5})


@contextlib.asynccontextmanager
async def slowly(folder: Path, monkeypatch, *, steps: int):
    """A system whose words take so many steps, with a checkpoint and an event after each."""

    def make(*args, **options) -> Engine:
        return Engine(*args, **{**options, "checkpoint_s": 0.0, "progress_s": 0.0})

    monkeypatch.setattr(service, "Engine", make)
    async with running(folder, word_steps=steps) as system:
        yield system


async def test_learning_that_outlasts_its_call_goes_on(tmp_path, monkeypatch):
    """A call's limit, an hour, was the learning's: the job failed with DEADLINE_EXCEEDED."""
    monkeypatch.setattr("gateway.stages.PATIENCE_S", 0.5)
    begun, learn, advance = [], Engine.learn, Trainer.advance
    ends = [3, 6]

    def counted(engine, *args, state, **options):
        begun.append(state)
        return learn(engine, *args, state=state, **options)

    def limited(trainer) -> None:
        if ends and trainer.steps_done == ends[0]:
            del ends[0]
            # The call lasted longer than a part that is down is waited for.
            time.sleep(0.6)
            raise DeadlinePassed("the deadline passed")
        advance(trainer)

    monkeypatch.setattr(Engine, "learn", counted)
    monkeypatch.setattr(Trainer, "advance", limited)
    async with slowly(tmp_path, monkeypatch, steps=8) as system:
        scene = collage(layers=[layer("a", appearance={"learn": True})])
        events = await learned(system, scene)
        assert events[-1].WhichOneof("kind") == "done", events[-1]
        assert [state is not None for state in begun] == [False, True, True]
        # Nothing is learned again.
        steps = [event.word.step for event in events if event.HasField("word")]
        assert steps == sorted(steps)
        assert steps[-1] == 8


async def test_learning_that_hangs_is_noticed_and_its_job_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("gateway.stages.SILENCE_S", 1.5)
    monkeypatch.setattr("gateway.stages.PATIENCE_S", 0.5)
    wakes, advance = threading.Event(), Trainer.advance
    wakes.set()

    def hanging(trainer) -> None:
        while trainer.steps_done == 3 and not wakes.is_set():
            time.sleep(0.05)
        advance(trainer)

    monkeypatch.setattr(Trainer, "advance", hanging)
    async with slowly(tmp_path, monkeypatch, steps=6) as system:
        scene = collage(
            layers=[
                layer(name, seed=seed, appearance={"learn": True}) for seed, name in enumerate("ab")
            ]
        )
        await learned(system, scene, "a")
        wakes.clear()
        made = await system.stub.CreateJob(pb.CreateJobRequest(learn={"collage": scene}))
        try:
            async with asyncio.timeout(20):
                watched = system.stub.WatchJob(pb.WatchJobRequest(name=made.job.name))
                async for answer in watched:
                    if answer.event.stage_started.attempt == 2:
                        break
        finally:
            wakes.set()
        events = await system.watch(made.job.name)
        assert events[-1].WhichOneof("kind") == "done", events[-1]
        # A word that was stored is told by the first attempt, and not again.
        told = [event.word.layer for event in events if event.word.word]
        assert sorted(told) == ["a", "b"]


async def test_a_job_that_waits_to_learn_is_told_of_no_words_but_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("services.inversion.engine.WAIT_TOLD_S", 0.02)
    async with slowly(tmp_path, monkeypatch, steps=8) as system:
        one, other = await asyncio.gather(
            *(
                learned(system, collage(layers=[layer(name, seed=seed)]), name)
                for seed, name in enumerate("ab")
            )
        )
        for name, events in (("a", one), ("b", other)):
            assert events[-1].WhichOneof("kind") == "done"
            assert {event.word.layer for event in events if event.HasField("word")} == {name}


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.rglob("*.checkpoint*"))


async def test_a_cancelled_learning_leaves_no_checkpoint(tmp_path, monkeypatch):
    going, advance = threading.Event(), Trainer.advance

    def gated(trainer) -> None:
        if trainer.steps_done == 3:
            going.wait()
        advance(trainer)

    monkeypatch.setattr(Trainer, "advance", gated)
    async with slowly(tmp_path, monkeypatch, steps=6) as system:
        scene = collage(layers=[layer("a", appearance={"learn": True})])
        made = await system.stub.CreateJob(pb.CreateJobRequest(learn={"collage": scene}))
        call = system.stub.WatchJob(pb.WatchJobRequest(name=made.job.name), timeout=LIMIT_S)
        # What is told of a step is told behind its checkpoint: none is being written.
        while (await call.read()).event.word.step < 3:
            pass
        assert checkpoints(tmp_path)
        await system.stub.CancelJob(pb.CancelJobRequest(name=made.job.name), timeout=LIMIT_S)
        await system.watch(made.job.name)
        going.set()
        end_s = time.monotonic() + LIMIT_S
        # A file tells nobody that it is gone.
        while checkpoints(tmp_path) and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert not checkpoints(tmp_path)


async def test_the_sweep_takes_what_no_job_goes_on_from(tmp_path):
    policy = QueuePolicy(exhausted=lambda job: b"")
    jobs = await SqliteJobs.open(tmp_path / "jobs.sqlite", policy)
    blobs = FolderBlobStore(tmp_path / "blobs")
    try:
        # The oldest is ended, the next is at work, the last waits.
        ended, running_, waiting = [
            (await jobs.submit(str(uuid.uuid4()), b"")).id for _ in range(3)
        ]
        for _ in range(2):
            claim = await jobs.claim("worker", wait_s=5)
            if claim.job.id == ended:
                await jobs.finish(claim, JobState.FAILED, b"")
        for job in (ended, running_, waiting, "job-of-another-queue", "job-long-gone"):
            key = checkpoint_key(job, "ab" * 32)
            await blobs.put(key, b"state", media_type="application/octet-stream")
        for job in (running_, waiting, "job-long-gone"):
            (file,) = (each for each in checkpoints(tmp_path) if job in each.parts)
            os.utime(file, (0, 0))
        await sweep(jobs, Words(blobs))
        left = {each.parent.name for each in checkpoints(tmp_path)}
        assert left == {running_, waiting, "job-of-another-queue"}
    finally:
        await jobs.close()
        await blobs.close()


async def test_learning_belongs_to_a_job(tmp_path):
    request = await subjects(tmp_path)
    async with inversion(tmp_path) as stub:
        for job in ("", "a/b", "-a", "a" * 65):
            request.job = job
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.LearnWords(request, timeout=LIMIT_S).read()
            error = from_status(rpc_status.from_call(caught.value))
            assert [each.field for each in error.violations] == ["job"]


async def estimated(stub, learn) -> inversion_service_pb2.EstimateWordsResponse:
    request = inversion_service_pb2.EstimateWordsRequest(learn=learn)
    try:
        return await stub.EstimateWords(request, timeout=LIMIT_S)
    except grpc.aio.AioRpcError as error:
        raise from_status(rpc_status.from_call(error)) from error


async def test_what_learning_takes_is_told_once_it_was_done_and_what_is_stored_costs_nothing(
    tmp_path,
):
    two = await subjects(tmp_path)
    async with inversion(tmp_path, joint_rows=4) as stub:
        unknown = await estimated(stub, two)
        assert (unknown.words, unknown.seconds, unknown.seconds_high) == (2, 0, 0)
        one = inversion_service_pb2.LearnWordsRequest()
        one.CopyFrom(two)
        del one.subjects[1:]
        async for _ in stub.LearnWords(one, timeout=LIMIT_S):
            pass
        stored, left = await estimated(stub, one), await estimated(stub, two)
        assert (stored.words, stored.seconds, stored.seconds_high) == (0, 0, 0)
        assert left.words == 1
        assert 0 < left.seconds_low <= left.seconds <= left.seconds_high < LIMIT_S


async def test_a_plan_tells_of_the_whole_request(system):
    """Of a picture of ten seconds whose word takes ten minutes it told ten seconds."""

    async def planned(**appearance) -> pb.Plan:
        scene = collage(prompt="a {a}", layers=[layer("a", seed=77, appearance=appearance or None)])
        request = pb.PlanCollageRequest(collage=scene, sampling={"steps": 2})
        return (await system.stub.PlanCollage(request, timeout=LIMIT_S)).plan

    # What other tests learned tells how long it takes.
    await learned(
        system, collage(prompt="a {a}", layers=[layer("a", seed=78, appearance={"learn": True})])
    )
    drawing, both = await planned(), await planned(learn=True)
    assert both.estimated_seconds > drawing.estimated_seconds
    assert both.estimated_seconds_high > drawing.estimated_seconds_high
    await learned(
        system, collage(prompt="a {a}", layers=[layer("a", seed=77, appearance={"learn": True})])
    )
    again = await planned(learn=True)
    assert again.estimated_seconds < both.estimated_seconds


async def test_words_that_cannot_be_learned_in_time_are_refused(tmp_path):
    catalog = read_catalog(f"toy={toy.mini(tmp_path / 'toy')}")
    (card,) = catalog.cards
    engine = Engine(catalog, recipe=replace(Recipe(), steps=100), threads=1, joint_rows=8)
    blobs = FolderBlobStore(tmp_path / "blobs")
    servicer = InversionServicer(engine, blobs, Decoder(), limit_s=10.0)
    learn = inversion_service_pb2.LearnWordsRequest(
        job="job",
        subjects=[
            {
                "layer": str(number),
                "text": "x",
                "vectors": 1,
                "image": {"sha256": f"{number:064x}", "size_bytes": 9, "media_type": "image/png"},
            }
            for number in range(4)
        ],
    )
    request = inversion_service_pb2.EstimateWordsRequest(learn=learn)
    told = await servicer.EstimateWords(request, None)
    assert (told.words, told.seconds) == (4, 0)
    # Two together in 9 s, four in twice that: from 60 steps on they may end.
    for _ in range(3):
        for together in (1, 2):
            engine._pace.record(engine._call(card, together), seconds=0.09)
    with pytest.raises(InvalidRequest, match="expected to fit: 2 at a time") as refused:
        await servicer.EstimateWords(request, None)
    (violation,) = refused.value.violations
    assert (refused.value.reason, violation.field) == ("TOO_LONG", "subjects[2]")
    with pytest.raises(InvalidRequest, match="expected to fit: 2 at a time"):
        await anext(aiter(servicer.LearnWords(learn, None)))
    del learn.subjects[2:]
    request.learn.CopyFrom(learn)
    told = await servicer.EstimateWords(request, None)
    assert (told.seconds_low, told.seconds) == (pytest.approx(5.4), pytest.approx(9))
    await engine.close()


@pytest.mark.parametrize("skips", [False, True])
async def test_learning_past_the_limit_ends_it_for_that_reason(tmp_path, skips):
    toy.mini(tmp_path / "one")
    accepted.write_models(tmp_path, {"name": "one", "source": "one"})
    async with accepted.serving(tmp_path, slots=1, inversion={"max_work_s": 1e-6}) as (system, _):
        scene = collage(prompt="a {a}", layers=[layer("a", appearance={"learn": True})])
        request = pb.CreateJobRequest(
            generate={"collage": scene, "sampling": {"steps": 2}, "skip_failed_words": skips}
        )
        job = (await system.stub.CreateJob(request, timeout=LIMIT_S)).job
        events = await system.watch(job.name)
        told = (await system.stub.GetJob(pb.GetJobRequest(name=job.name), timeout=LIMIT_S)).job
    assert told.attempts == 1
    if skips:
        assert events[-1].HasField("done")
        assert "WORD_FAILED" in {event.warning.reason for event in events}
    else:
        error = from_status(told.error)
        assert (type(error), error.reason) == (DeadlinePassed, "TOO_LONG")


@contextlib.asynccontextmanager
async def inversion(folder: Path, **changes):
    """An inversion service of its own that keeps a checkpoint after every step."""
    settings = service.Settings(
        address="127.0.0.1:0",
        blobs=f"folder:{folder / 'blobs'}",
        models=f"toy={toy.mini(folder / 'toy')}",
        threads=1,
        **{"word_steps": 8, "checkpoint_s": 0.0, **changes},
    )
    server = await service.build(settings)
    await server.start()
    try:
        async with connect(server.address) as channel:
            yield inversion_service_pb2_grpc.InversionServiceStub(channel)
    finally:
        await server.stop()


async def subjects(
    folder: Path, texts=("sushi", "cake")
) -> inversion_service_pb2.LearnWordsRequest:
    blobs = FolderBlobStore(folder / "blobs")
    request = inversion_service_pb2.LearnWordsRequest(job="job")
    for seed, text in enumerate(texts):
        ref = await put_blob(blobs, cutout(seed), media_type="image/png")
        image = {"sha256": ref.sha256, "size_bytes": ref.size_bytes}
        request.subjects.add(layer=text, image=image, text=text, vectors=1 + seed)
    await blobs.close()
    return request


@pytest.mark.parametrize("apart", [False, True])
async def test_what_was_cut_off_is_taken_up_and_ends_with_the_same_vectors(
    tmp_path, monkeypatch, apart
):
    advance = Trainer.advance

    def ending(trainer) -> None:
        advance(trainer)
        if trainer.steps_done == 2:
            trainer._pupils[0].is_done = True

    if apart:
        # One word of the batch is stored before the cut, the other is not.
        monkeypatch.setattr(Trainer, "advance", ending)
    found = []
    for name in ("undisturbed", "cut"):
        folder = tmp_path / name
        request = await subjects(folder)
        if name == "cut":
            async with inversion(folder) as stub:
                call = stub.LearnWords(request, timeout=LIMIT_S)
                while (await call.read()).progress.step < 4:
                    pass
                call.cancel()
        async with inversion(folder) as stub:
            answers = [each async for each in stub.LearnWords(request, timeout=LIMIT_S)]
        if name == "cut":
            # At most the step under way was lost.
            first = next(each for each in answers if each.progress.layer == "cake")
            assert first.progress.step >= 3
        found.append(
            {a.progress.layer: a.word.vectors.sha256 for a in answers if a.HasField("word")}
        )
        assert not checkpoints(folder)
    assert len(found[0]) == 2
    assert found[0] == found[1]


async def test_a_layer_that_is_done_is_not_told_of_again(tmp_path, monkeypatch):
    advance = Trainer.advance

    def ending(trainer) -> None:
        advance(trainer)
        if trainer.steps_done == 2:
            trainer._pupils[0].is_done = True

    monkeypatch.setattr(Trainer, "advance", ending)
    request = await subjects(tmp_path)
    async with inversion(tmp_path, word_steps=5) as stub:
        answers = [each async for each in stub.LearnWords(request, timeout=LIMIT_S)]
    first, second = (
        [each for each in answers if each.progress.layer == name] for name in ("sushi", "cake")
    )
    assert [each.HasField("word") for each in first] == [False] * (len(first) - 1) + [True]
    assert first[-1].progress.step == 2
    assert second[-1].progress.step == 5
    assert answers.index(first[-1]) < len(answers) - 3


async def test_layers_beyond_the_bound_are_learned_after_the_others(tmp_path, monkeypatch):
    """A call of 32 layers was one batch, whatever the model."""
    sizes, learn = [], Engine.learn

    def counted(engine, card, subjects, **options):
        sizes.append(len(subjects))
        return learn(engine, card, subjects, **options)

    monkeypatch.setattr(Engine, "learn", counted)

    async def learned_by(folder, *calls, joint_rows) -> dict[str, str]:
        """The digests of the vectors, by layer, of some calls one after another."""
        sizes.clear()
        found = {}
        request = await subjects(folder, ("sushi", "cake", "lemon"))
        async with inversion(folder, word_steps=2, joint_rows=joint_rows) as stub:
            for call in calls:
                part = inversion_service_pb2.LearnWordsRequest(job="job")
                part.subjects.extend(request.subjects[index] for index in call)
                async for answer in stub.LearnWords(part, timeout=LIMIT_S):
                    if answer.HasField("word"):
                        found[answer.progress.layer] = answer.word.vectors.sha256
        assert not checkpoints(folder)
        return found

    # Four rows a word.
    bounded = await learned_by(tmp_path / "bounded", (0, 1, 2), joint_rows=11)
    assert sizes == [2, 1]
    assert len(bounded) == 3
    # They are the batches, to the last bit, that two calls would have been.
    assert bounded == await learned_by(tmp_path / "apart", (0, 1), (2,), joint_rows=0)
    assert sizes == [2, 1]
    # What is stored makes a batch smaller, and moves no layer into another.
    await learned_by(tmp_path / "stored", (0,), (0, 1, 2), joint_rows=11)
    assert sizes == [1, 1, 1]


async def test_the_bundled_models_words_are_one_batch_and_a_large_models_are_not():
    catalog = read_catalog("")
    engine = Engine(catalog, recipe=Recipe(), threads=1)
    card = catalog.find("", field="model")
    assert engine.together(card) == limits.MAX_LAYERS
    large = replace(
        card, facts=replace(card.facts, native=Extent(width=512, height=512), size_multiple=64)
    )
    assert engine.together(large) == 2
    assert (
        engine.together(
            replace(large, facts=replace(card.facts, native=Extent(width=1024, height=1024)))
        )
        == 1
    )
