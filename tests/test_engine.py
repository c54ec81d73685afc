"""The engine on toy models with real torch: order of events, cancel, deadline, determinism, isolation, drain."""

import asyncio
import contextlib
import hashlib
import io
import math
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from services.common.collage import Extent
from services.common.errors import (
    TOO_LONG,
    DeadlinePassed,
    DeviceLost,
    Internal,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from services.common.telemetry import start_logging
from services.diffusion import device
from services.diffusion.networks import load
from services.diffusion.text import Text
from services.generator.engine import Engine
from services.generator.folder_card import read_catalog
from services.generator.job import ImageMade, PreviewMade, QueuedAt, StepDone
from services.generator.noise import Hold
from services.generator.scheduler import Scheduler
from services.generator.stages import TorchStages
from testing import plates, toy

# Long enough that no test waits for its end.
ENDLESS = 1000
WAIT_S = 20.0


class WatchedStages:
    """The real stages, with a record of the U-Net's calls and, where asked, one prompt that breaks it.

    A row of the cursed prompt makes the U-Net's call fail, whatever else is in the batch.
    """

    def __init__(self, inner, *, cursed=None, error=None):
        self.inner = inner
        self.facts, self.device = inner.facts, inner.device
        self.encode_image, self.decode_image = inner.encode_image, inner.decode_image
        self.rows, self.grids = [], []
        self.is_lost = False
        self._error = error or RuntimeError("the device is on fire")
        self._cursed_TD = None
        if cursed is not None:
            self._cursed_TD = inner.encode_text(
                [Text(ids_ET=inner.facts.tokenize(cursed).ids_ET)]
            ).hidden_BTD[0]

    def while_wanted(self, is_wanted):
        return self

    def encode_text(self, texts, adapters=()):
        return self.inner.encode_text(texts, adapters)

    def predict(self, rows):
        self.rows.append(sum(each.given.count for each in rows))
        self.grids.append(tuple(rows[0].x_NChw.shape[2:]))
        if self._cursed_TD is not None and any(
            torch.equal(each.given.text.hidden_BTD[0], self._cursed_TD) for each in rows
        ):
            self.is_lost = True
            raise self._error
        return self.inner.predict(rows)


@pytest.fixture(scope="module", autouse=True)
def plain_logs():
    """JSON lines: structlog's own default draws the tensors of every frame of a traceback."""
    start_logging("test")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    folder = toy.mini(tmp_path_factory.mktemp("toy") / "mini")
    return read_catalog(f"mini={folder}")


@pytest.fixture(scope="module")
def torch_stages(catalog):
    return TorchStages(
        load(catalog.cards[0].folder, dtype=torch.float32, device=torch.device("cpu"))
    )


@contextlib.asynccontextmanager
async def running(catalog, stages, **limits):
    """An engine over `stages`, drained at the end."""
    engine = Engine(catalog, load=lambda _: stages, scheduler=Scheduler(**limits), threads=1)
    try:
        yield engine
    finally:
        await asyncio.wait_for(engine.drain(), WAIT_S)


async def collect(engine, job):
    return [event async for event in engine.generate(job)]


def images(events):
    return [event for event in events if isinstance(event, ImageMade)]


def digests(events):
    return [hashlib.sha256(event.png).hexdigest() for event in images(events)]


async def start(engine, job):
    """A task that reads the job's events, once its first step is done."""
    stepped = asyncio.Event()
    events = []

    async def read():
        async for event in engine.generate(job):
            events.append(event)
            if isinstance(event, StepDone):
                stepped.set()
        return events

    task = asyncio.create_task(read())
    waiting = asyncio.create_task(stepped.wait())
    await asyncio.wait({task, waiting}, timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return task


async def test_a_job_is_queued_stepped_previewed_and_drawn(catalog, torch_stages):
    async with running(catalog, torch_stages) as engine:
        events = await collect(engine, plates.job(images=2, seed=2**64 - 1, preview_every=2))
    # 0.9 of 4 steps is 3 whole ones.
    assert [type(event) for event in events if not isinstance(event, QueuedAt)] == [
        StepDone,
        StepDone,
        PreviewMade,
        PreviewMade,
        StepDone,
        ImageMade,
        ImageMade,
    ]
    assert events[1] == QueuedAt(place=0)
    assert [(event.index, event.seed) for event in images(events)] == [(0, 2**64 - 1), (1, 0)]
    for event in images(events):
        picture = Image.open(io.BytesIO(event.png))
        assert (picture.mode, picture.size, picture.info["srgb"]) == ("RGB", (32, 32), 0)
        assert np.array_equal(np.asarray(picture), event.pixels_HWC)
    previews = [event for event in events if isinstance(event, PreviewMade)]
    assert [(event.index, event.step) for event in previews] == [(0, 2), (1, 2)]
    assert Image.open(io.BytesIO(previews[0].png)).size == (32, 32)


async def test_noise_zero_returns_the_composite_without_the_unet(catalog, torch_stages):
    stages = WatchedStages(torch_stages)
    still = plates.plate(strengths=(0.0, 0.0), release=0)
    async with running(catalog, stages) as engine:
        events = await collect(engine, plates.job(made_of=still))
    assert np.array_equal(images(events)[0].pixels_HWC, still.composite_HWC)
    assert stages.rows == []


async def test_cancel_frees_the_device_within_one_step(catalog, torch_stages):
    stages = WatchedStages(torch_stages)
    async with running(catalog, stages) as engine:
        task = await start(engine, plates.job(steps=ENDLESS))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        calls = len(stages.rows)
        await collect(engine, plates.job(steps=2))
    # The step under way may end, then only the second job's one step is left.
    assert len(stages.rows) <= calls + 2


@pytest.mark.parametrize("ends", ["cancel", "deadline"])
async def test_what_nobody_wants_ends_between_two_calls_of_its_beginning(
    catalog, torch_stages, ends
):
    """Encoders, ControlNets and the first step were gone through, whoever had left."""
    stages, begun, goes_on = WatchedStages(torch_stages), threading.Event(), threading.Event()

    def held(texts, adapters=()):
        begun.set()
        goes_on.wait(WAIT_S)
        return torch_stages.encode_text(texts, adapters)

    def never(*_):
        raise AssertionError("the picture of a job that nobody wants is encoded")

    async with running(catalog, stages) as engine:
        stages.encode_text, stages.encode_image = held, never
        deadline_s = time.monotonic() + 0.5 if ends == "deadline" else math.inf
        job = asyncio.create_task(collect(engine, plates.job(steps=9, deadline_s=deadline_s)))
        await asyncio.to_thread(begun.wait, WAIT_S)
        if ends == "cancel":
            job.cancel()
        with pytest.raises((asyncio.CancelledError, DeadlinePassed)):
            await job
        goes_on.set()
        stages.encode_text, stages.encode_image = (
            torch_stages.encode_text,
            torch_stages.encode_image,
        )
        assert len(images(await collect(engine, plates.job()))) == 1
    assert len(stages.rows) == 3


async def test_closing_the_stream_cancels(catalog, torch_stages):
    stages = WatchedStages(torch_stages)
    async with running(catalog, stages) as engine:
        async with contextlib.aclosing(engine.generate(plates.job(steps=ENDLESS))) as events:
            async for event in events:
                if isinstance(event, StepDone):
                    break
        calls = len(stages.rows)
        await collect(engine, plates.job(steps=2))
    assert len(stages.rows) <= calls + 2


async def test_a_waiting_job_that_is_cancelled_never_reaches_the_device(catalog, torch_stages):
    stages = WatchedStages(torch_stages, cursed="lemon")
    async with running(catalog, stages) as engine:
        running_task = await start(engine, plates.job(steps=40))
        waiting = asyncio.create_task(collect(engine, plates.job(prompt="lemon")))
        await asyncio.sleep(0)
        waiting.cancel()
        await running_task
    assert len(stages.rows) == 36


async def test_the_deadline_ends_a_running_and_a_waiting_job(catalog, torch_stages):
    stages = WatchedStages(torch_stages)
    async with running(catalog, stages) as engine:
        soon = time.monotonic() + 0.3
        with pytest.raises(DeadlinePassed):
            await collect(engine, plates.job(steps=ENDLESS, deadline_s=soon))
        calls = len(stages.rows)
        await collect(engine, plates.job(steps=2))
        assert len(stages.rows) <= calls + 2


async def test_pictures_do_not_depend_on_the_load(catalog, torch_stages):
    jobs = [plates.job(seed=seed, images=2, sampler=name) for seed, name in _MIXED]
    async with running(catalog, torch_stages) as engine:
        alone = [digests(await collect(engine, job)) for job in jobs]
        together = await asyncio.gather(*(collect(engine, job) for job in jobs))
    assert [digests(events) for events in together] == alone
    assert len({digest for pair in alone for digest in pair}) == 2 * len(jobs)


_MIXED = [(0, "euler"), (5, "euler_ancestral"), (9, "ddim"), (20, "dpmpp_2m"), (30, "unipc")]


async def test_a_joint_batch_equals_each_job_alone_to_rounding(catalog, torch_stages):
    jobs = [
        plates.job(seed=1, steps=30),
        plates.job(seed=2, steps=9, sampler="euler_ancestral", guidance_scale=1.0),
        plates.job(seed=3, steps=12, prompt="a cake and a lemon", sampler="unipc"),
    ]
    async with running(catalog, torch_stages) as engine:
        alone = [images(await collect(engine, job))[0].pixels_HWC for job in jobs]
    stages = WatchedStages(torch_stages)
    async with running(catalog, stages, max_rows=5) as engine:
        together = await asyncio.gather(*(collect(engine, job) for job in jobs))
    assert max(stages.rows) == 5
    for one, events in zip(alone, together, strict=True):
        difference = np.abs(images(events)[0].pixels_HWC.astype(int) - one.astype(int)).max()
        assert difference <= 1, f"largest difference {difference}"


async def test_a_failing_job_leaves_its_neighbour_intact(catalog, torch_stages):
    good, bad = plates.job(seed=4, steps=20), plates.job(prompt="lemon", steps=20)
    async with running(catalog, torch_stages) as engine:
        alone = images(await collect(engine, good))[0].pixels_HWC
    stages = WatchedStages(torch_stages, cursed="lemon")
    async with running(catalog, stages, max_rows=4) as engine:
        events, error = await asyncio.gather(
            collect(engine, good), collect(engine, bad), return_exceptions=True
        )
        assert 4 in stages.rows, "the two never shared a step"
        assert isinstance(error, Internal)
        assert [event.step for event in events if isinstance(event, StepDone)] == [*range(1, 19)]
        assert np.abs(images(events)[0].pixels_HWC.astype(int) - alone).max() <= 1
        assert images(await collect(engine, good)), "the engine goes on"


@pytest.mark.parametrize("sampler", ["euler_ancestral", "ddim", "dpmpp_2m", "unipc", "lcm"])
async def test_a_joint_step_that_fails_leaves_no_trace(catalog, torch_stages, monkeypatch, sampler):
    jobs = [plates.job(seed=seed, sampler=sampler, steps=8) for seed in (1, 2)]
    async with running(catalog, torch_stages) as engine:
        undisturbed = [digests(await collect(engine, job)) for job in jobs]
    stages = WatchedStages(torch_stages)
    predict, apply = stages.predict, Hold.apply
    applied = []

    def begin_step(rows):
        applied.clear()
        return predict(rows)

    def breaks_second(hold, *args):
        """Fails at the end of the step of a joint step's second run; the first one has finished its own."""
        applied.append(hold)
        if len(applied) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return apply(hold, *args)

    stages.predict = begin_step
    monkeypatch.setattr(Hold, "apply", breaks_second)
    async with running(catalog, stages, max_rows=4) as engine:
        events = await asyncio.gather(*(collect(engine, job) for job in jobs))
    assert 4 in stages.rows, "the two never shared a step"
    assert [digests(each) for each in events] == undisturbed


async def test_what_a_failed_joint_step_held_is_free_before_each_job_tries_alone(
    catalog, torch_stages
):
    stages = WatchedStages(torch_stages)
    predict, held = stages.predict, []

    def too_large(rows):
        if sum(each.given.count for each in rows) == 4:
            activations = torch.zeros(1)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not any(each() is not None for each in held)
        return predict(rows)

    stages.predict = too_large
    async with running(catalog, stages, max_rows=4) as engine:
        await asyncio.gather(*(collect(engine, plates.job(steps=8)) for _ in range(2)))
    assert held, "the two never shared a step"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
    ],
)
async def test_out_of_memory_is_told_as_such(catalog, torch_stages, error):
    stages = WatchedStages(torch_stages, cursed="lemon", error=error)
    async with running(catalog, stages) as engine:
        with pytest.raises(Internal, match="1 pictures of 32 x 32") as told:
            await collect(engine, plates.job(prompt="lemon"))
        assert told.value.reason == "OUT_OF_MEMORY"
        assert images(await collect(engine, plates.job()))


async def test_a_prompt_too_long_names_the_field(catalog, torch_stages):
    async with running(catalog, torch_stages) as engine:
        with pytest.raises(InvalidRequest, match="prompt: is 80 tokens long"):
            await collect(engine, plates.job(prompt="rice " * 80))


async def test_a_model_that_cannot_be_loaded_fails_its_job_only(catalog, torch_stages):
    answers = iter([RuntimeError("disk on fire"), torch_stages])

    def load_second_time(_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    engine = Engine(catalog, load=load_second_time, scheduler=Scheduler(), threads=1)
    with pytest.raises(Internal):
        await collect(engine, plates.job())
    assert images(await collect(engine, plates.job()))
    await engine.drain()


async def test_a_full_queue_refuses_with_a_delay(catalog, torch_stages):
    async with running(catalog, torch_stages, max_waiting=1) as engine:
        first = await start(engine, plates.job(steps=ENDLESS))
        second = asyncio.create_task(collect(engine, plates.job()))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as full:
            await collect(engine, plates.job())
        assert full.value.retry_after_s >= 1
        first.cancel()
        assert images(await second)


async def test_waiting_jobs_hear_their_place(catalog, torch_stages):
    async with running(catalog, torch_stages) as engine:
        first = await start(engine, plates.job(steps=30))
        waiting = [asyncio.create_task(collect(engine, plates.job())) for _ in range(2)]
        await first
        answers = await asyncio.gather(*waiting)
    places = [[each.place for each in events if isinstance(each, QueuedAt)] for events in answers]
    assert places == [[1, 0], [2, 1, 0]]


async def test_drain_finishes_what_was_admitted_and_admits_no_more(catalog, torch_stages):
    engine = Engine(catalog, load=lambda _: torch_stages, scheduler=Scheduler(), threads=1)
    admitted = await start(engine, plates.job(steps=50))
    waiting = asyncio.create_task(collect(engine, plates.job()))
    await asyncio.sleep(0)
    draining = asyncio.create_task(engine.drain())
    await asyncio.sleep(0.05)
    with pytest.raises(Unavailable):
        await collect(engine, plates.job())
    assert images(await admitted)
    assert images(await waiting)
    await asyncio.wait_for(draining, WAIT_S)


async def test_estimates_are_measured_and_scale(catalog, torch_stages):
    card = catalog.cards[0]
    size, large = Extent(width=32, height=32), Extent(width=64, height=32)
    ten = plates.sampling(steps=10)
    async with running(catalog, torch_stages) as engine:

        def estimate(extent, sampling=ten, *, steps=10, has_emphasis=False):
            return engine.expected(
                card, extent, sampling, steps=steps, controlnets=0, has_emphasis=has_emphasis
            )

        assert estimate(size).seconds == 0.0
        await engine.warm_up()
        once = estimate(size)
        assert 0 < once.low <= once.seconds <= once.high < 10
        # What was not drawn yet is told from it, by its rows and cells.
        assert estimate(large).seconds == pytest.approx(2 * once.seconds)
        step = (estimate(size, steps=110).seconds - once.seconds) / 100
        for sampling, emphasis, rows in (
            (plates.sampling(steps=10, guidance_scale=1.0), False, 0.5),
            (ten, True, 1.5),
        ):
            told = estimate(size, sampling, has_emphasis=emphasis)
            assert told.seconds == pytest.approx(once.seconds + 10 * (rows - 1) * step)
        # Once it was, it is told as it was.
        job = plates.job(steps=10, made_of=plates.plate(side=64))
        start_s = time.monotonic()
        await collect(engine, job)
        taken_s = time.monotonic() - start_s
        drawn = estimate(Extent(width=64, height=64), steps=9)
        assert 0.2 * taken_s < drawn.seconds < 1.5 * taken_s


@pytest.mark.parametrize(
    ("limits", "grids"), [("{}", {(8, 8), (4, 4)}), ("{max_side: 16}", {(4, 4)})]
)
async def test_the_warm_up_is_no_larger_than_requests_may_be(
    tmp_path, catalog, torch_stages, limits, grids
):
    """A limit below the model's own size is there for memory or time, which the warm-up would take all the same."""
    file = tmp_path / "models.yaml"
    source = catalog.cards[0].folder
    file.write_text(f"models: [{{name: mini, source: {source}, limits: {limits}}}]")
    stages = WatchedStages(torch_stages)
    async with running(read_catalog(str(file)), stages) as engine:
        await engine.warm_up()
    # The second is of half its sides, for what a larger one takes at least; none has fewer than 16 pixels.
    assert set(stages.grids) == grids


async def test_drawing_past_the_limit_is_ended_and_waiting_is_none_of_it(catalog, torch_stages):
    """The hour began when a gateway called: of four jobs of 45 minutes at once, three failed."""
    stages = WatchedStages(torch_stages)
    predict = stages.predict

    def slow(rows):
        time.sleep(0.02)
        return predict(rows)

    stages.predict = slow
    async with running(catalog, stages, slice_s=0.1) as engine:

        def job(side, limit_s):
            made_of = plates.plate(side=side)
            return replace(plates.job(steps=20, made_of=made_of), limit_s=limit_s)

        start_s = time.monotonic()
        await collect(engine, job(64, math.inf))
        alone_s = time.monotonic() - start_s
        # One behind another, half of them in turns with another canvas: each within its own limit, all far beyond it.
        limit_s, start_s = 3 * alone_s, time.monotonic()
        jobs = [job(side, limit_s) for side in (32, 32, 32, 32, 64, 64, 64, 64)]
        drawn = await asyncio.gather(*(collect(engine, each) for each in jobs))
        assert all(len(images(events)) == 1 for events in drawn)
        assert time.monotonic() - start_s > limit_s
        with pytest.raises(DeadlinePassed, match=r"the operator allows a request 0\.1 s") as told:
            await collect(engine, replace(plates.job(steps=ENDLESS), limit_s=0.1))
        assert told.value.reason == TOO_LONG
        # The steps are over: what was drawn is not thrown away.
        last = replace(plates.job(steps=1), limit_s=0.0)
        assert len(images(await collect(engine, last))) == 1


async def test_a_job_hears_of_its_place_until_the_device_hangs(catalog, torch_stages, monkeypatch):
    monkeypatch.setattr("services.generator.engine.ALIVE_EVERY_S", 0.05)
    stages, goes_on = WatchedStages(torch_stages), threading.Event()
    predict = stages.predict

    def hangs(rows):
        goes_on.wait(WAIT_S)
        return predict(rows)

    stages.predict = hangs
    async with running(catalog, stages) as engine:
        heard = []
        job = replace(plates.job(steps=4), limit_s=0.5)

        async def read():
            async for event in engine.generate(job):
                heard.append(event)

        reading = asyncio.create_task(read())
        behind = asyncio.create_task(collect(engine, plates.job(steps=2)))
        # Twice the limit.
        await asyncio.sleep(1.0)
        before = len(heard)
        # From the limit on nothing: no call takes as long as a whole request may.
        assert before > 1
        assert {event.place for event in heard} <= {0, 1}
        await asyncio.sleep(0.2)
        assert len(heard) == before
        goes_on.set()
        with pytest.raises(DeadlinePassed):
            await reading
        waited = [event.place for event in await behind if isinstance(event, QueuedAt)]
        assert waited.count(1) > 1


async def test_a_slow_reader_holds_nobody_up_and_keeps_every_step(catalog, torch_stages):
    async with running(catalog, torch_stages) as engine:
        slow = engine.generate(plates.job(steps=20, images=4, preview_every=1))
        events = [await anext(slow)]
        assert images(await collect(engine, plates.job()))
        events += [event async for event in slow]
    steps = [event.step for event in events if isinstance(event, StepDone)]
    assert steps == [*range(1, 19)]
    assert sum(isinstance(event, PreviewMade) for event in events) == 16
    assert len(images(events)) == 4


class BrokenScheduler(Scheduler):
    """Fails at a turn, as a bug outside any job's own work would, once it is told to."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.error = None

    def turn(self, **options):
        if self.error is not None:
            raise self.error
        return super().turn(**options)

    def remove(self, ticket_id):
        if self.error is not None:
            raise self.error
        super().remove(ticket_id)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), SystemExit(3)])
async def test_a_dead_thread_fails_everybody_at_once_and_says_so(catalog, torch_stages, error):
    scheduler = BrokenScheduler()
    engine = Engine(catalog, load=lambda _: torch_stages, scheduler=scheduler, threads=1)
    working = asyncio.create_task(engine.working())
    at_work = await start(engine, plates.job(steps=ENDLESS))
    waiting = asyncio.create_task(collect(engine, plates.job()))
    await asyncio.sleep(0)
    assert not working.done()
    scheduler.error = error
    async with asyncio.timeout(WAIT_S):
        for task in (at_work, waiting):
            with pytest.raises(Unavailable) as told:
                await task
            assert told.value.reason == "DEVICE_LOST"
        with pytest.raises(DeviceLost):
            await working
        with pytest.raises(Unavailable) as told:
            await collect(engine, plates.job())
        assert told.value.reason == "DEVICE_LOST"
        await engine.drain()


async def test_an_error_that_stays_with_the_device_is_no_jobs_own(
    catalog, torch_stages, monkeypatch
):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    stages = WatchedStages(torch_stages, cursed="lemon", error=error)
    lost = []

    def synchronize(device):
        # As the driver does: once there was such an error, everything answers with it.
        if stages.is_lost:
            lost.append(device)
            raise error

    monkeypatch.setattr(device, "synchronize", synchronize)
    engine = Engine(catalog, load=lambda _: stages, scheduler=Scheduler(), threads=1)
    async with asyncio.timeout(WAIT_S):
        jobs = [plates.job(prompt="lemon"), plates.job()]
        told = await asyncio.gather(*(collect(engine, job) for job in jobs), return_exceptions=True)
        assert [(type(each), each.reason) for each in told] == [(DeviceLost, "DEVICE_LOST")] * 2
        with pytest.raises(DeviceLost):
            await engine.working()
    assert lost == [catalog.cards[0].device]


async def test_a_drained_engine_has_not_failed(catalog, torch_stages):
    async with running(catalog, torch_stages) as engine:
        await collect(engine, plates.job())
    await asyncio.wait_for(engine.working(), WAIT_S)
