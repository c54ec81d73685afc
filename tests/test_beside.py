"""What goes on beside the steps: models loaded, pictures finished, other canvases drawn; and what rows a call holds."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
import torch

from services.common.errors import DeviceLost, Internal
from services.diffusion import device, networks
from services.generator.engine import Engine
from services.generator.folder_card import load_stages, read_catalog
from services.generator.job import ImageMade, PreviewMade, QueuedAt, StepDone
from services.generator.scheduler import Scheduler
from testing import plates, toy

WAIT_S = 60.0
ENDLESS = 1000

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return read_catalog(str(toy.models_file(tmp_path_factory.mktemp("small"), models=3, width=16)))


class Held:
    """A call that waits, once it is reached, until it is let go; then it does what it always does."""

    def __init__(self, call, *, error=None):
        self._call, self._error = call, error
        self.reached, self.going = threading.Event(), threading.Event()

    def __call__(self, *args, **options):
        self.reached.set()
        assert self.going.wait(WAIT_S)
        if self._error is not None:
            raise self._error
        return self._call(*args, **options)

    async def until_reached(self):
        assert await asyncio.to_thread(self.reached.wait, WAIT_S)


class Stream:
    """A job's events as they come."""

    def __init__(self, engine, **changes):
        self.events, self._more = [], asyncio.Event()
        self.task = asyncio.create_task(self._read(engine, plates.job(**changes)))

    async def _read(self, engine, job):
        try:
            async for event in engine.generate(job):
                self.events.append(event)
                self._more.set()
        finally:
            self._more.set()
        return self.events

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, kind, count=1):
        async with asyncio.timeout(WAIT_S):
            while len(self.of(kind)) < count:
                assert not self.task.done(), "it ended before"
                self._more.clear()
                await self._more.wait()

    async def pixels(self):
        await asyncio.wait_for(self.task, WAIT_S)
        return [event.pixels_HWC for event in self.of(ImageMade)]


@contextlib.asynccontextmanager
async def running(catalog, load=load_stages, *, room=99, **policy):
    engine = Engine(
        catalog,
        load=load,
        scheduler=Scheduler(**policy),
        threads=1,
        memory_bytes=room * catalog.cards[0].weights_bytes,
    )
    try:
        yield engine
    finally:
        with contextlib.suppress(DeviceLost):
            await asyncio.wait_for(engine.drain(), WAIT_S)


def on(index):
    return {"model": f"toy-{index}"}


# Models


async def test_a_model_is_loaded_beside_the_steps_of_another(catalog):
    held = Held(load_stages)

    def load(card):
        return held(card) if card.name == "toy-1" else load_stages(card)

    async with running(catalog, load, slice_s=0) as engine:
        long = Stream(engine, **on(0), steps=ENDLESS)
        await long.until(StepDone)
        other = Stream(engine, **on(1))
        await held.until_reached()
        seen = len(long.of(StepDone))
        await long.until(StepDone, seen + 20)
        assert not other.of(StepDone)
        held.going.set()
        assert await other.pixels()
        assert not long.task.done()
        long.task.cancel()


async def test_without_room_it_waits_for_its_turn(catalog):
    loaded = []

    def load(card):
        loaded.append(card.name)
        return load_stages(card)

    async with running(catalog, load, room=1, slice_s=0) as engine:
        first = Stream(engine, **on(0), steps=60)
        await first.until(StepDone)
        other = Stream(engine, **on(1))
        await first.until(StepDone, 40)
        assert loaded == ["toy-0"]
        assert await first.pixels()
        assert await other.pixels()
        assert loaded == ["toy-0", "toy-1"]


async def test_who_waits_for_a_model_can_leave_at_once(catalog):
    held = Held(load_stages)
    async with running(catalog, held) as engine:
        waiting = Stream(engine, **on(0))
        await held.until_reached()
        waiting.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting.task, WAIT_S)
        held.going.set()
        assert await Stream(engine, **on(0)).pixels()


def test_loading_leaves_the_process_default_dtype_alone(catalog, monkeypatch):
    """Others compute meanwhile, and a number of theirs must not become one in half precision."""
    seen, change = set(), torch.set_default_dtype

    def watched(dtype):
        seen.add(dtype)
        change(dtype)

    monkeypatch.setattr(torch, "set_default_dtype", watched)
    cpu = torch.device("cpu")
    model = networks.load(catalog.cards[0].folder, dtype=torch.float16, device=cpu)
    assert seen == {torch.float32}
    parts = (model.unet, model.vae, *model.text_encoders.values())
    assert {value.dtype for part in parts for value in part.parameters()} == {torch.float16}


# Canvases


async def test_a_short_job_on_another_canvas_is_drawn_amid_a_long_one(catalog):
    async with running(catalog, slice_s=0.2) as engine:
        long = Stream(engine, **on(0), steps=ENDLESS)
        await long.until(StepDone)
        short = Stream(engine, **on(0), made_of=plates.plate(side=64))
        assert await short.pixels()
        assert not long.task.done()
        steps = [event.step for event in long.of(StepDone)]
        assert steps == sorted(set(steps))
        long.task.cancel()


async def test_interrupted_jobs_give_the_bytes_of_undisturbed_ones(catalog):
    jobs = [
        {**on(index % 2), "seed": index, "sampler": sampler, "steps": 12, "made_of": made_of}
        for index, (sampler, made_of) in enumerate(
            [
                ("euler_ancestral", plates.plate()),
                ("dpmpp_2m", plates.plate(side=64)),
                ("unipc", plates.plate()),
                ("lcm", plates.plate(side=64)),
            ]
        )
    ]
    async with running(catalog) as engine:
        alone = [await Stream(engine, **job).pixels() for job in jobs]
    async with running(catalog, slice_s=0) as engine:
        streams = [Stream(engine, **job) for job in jobs]
        together = [await stream.pixels() for stream in streams]
    for one, other in zip(alone, together, strict=True):
        assert all(map(np.array_equal, one, other))


# Rows


def watched_rows(rows, *, most=None):
    """Loads stages that note the rows of each call, and run out of memory at more than `most`."""

    def load(card):
        stages = load_stages(card)
        predict = stages.predict

        def call(*args, **options):
            answer = predict(*args, **options)
            rows.append(len(answer))
            if most is not None and len(answer) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return answer

        stages.predict = call
        return stages

    return load


async def test_pictures_of_one_job_need_not_share_a_call(catalog):
    job = {**on(0), "images": 5, "steps": 6, "seed": 3}
    async with running(catalog) as engine:
        alone = await Stream(engine, **job).pixels()
    rows = []
    async with running(catalog, watched_rows(rows), max_rows=4) as engine:
        stream = Stream(engine, **job, preview_every=2)
        drawn = await stream.pixels()
    assert max(rows) == 4
    assert [event.index for event in stream.of(ImageMade)] == [*range(5)]
    assert {event.index for event in stream.of(PreviewMade)} == {*range(5)}
    steps = [(event.step, event.total) for event in stream.of(StepDone)]
    assert steps == [(step, 5) for step in range(1, 6)]
    for one, other in zip(alone, drawn, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


async def test_a_step_that_ran_out_of_memory_teaches_how_many_rows_fit(catalog):
    rows = []
    async with running(catalog, watched_rows(rows, most=4), max_rows=16) as engine:
        streams = [Stream(engine, **on(0), images=4, steps=20, seed=seed) for seed in range(2)]
        for stream in streams:
            assert len(await stream.pixels()) == 4
    # Sixteen, then eight, and then four for good.
    assert [each for each in rows if each > 4] == [16, 8]


# Finishing


def with_decode(make, *, index=0):
    """Loads stages whose `decode_image` is what `make` makes of it, on one model."""
    made = []

    def load(card):
        stages = load_stages(card)
        if card.name == f"toy-{index}":
            stages.decode_image = make(stages.decode_image)
            made.append(stages.decode_image)
        return stages

    return load, made


async def test_a_picture_being_decoded_holds_up_no_step(catalog):
    load, made = with_decode(Held)
    async with running(catalog, load) as engine:
        first = Stream(engine, **on(0))
        await first.until(StepDone, 3)
        (held,) = made
        await held.until_reached()
        other = Stream(engine, **on(1), steps=20)
        await other.until(StepDone, 17)
        assert not first.task.done()
        held.going.set()
        assert await first.pixels()
        assert await other.pixels()


async def test_a_job_can_leave_while_its_picture_is_decoded(catalog):
    load, made = with_decode(Held)
    async with running(catalog, load) as engine:
        leaving = Stream(engine, **on(0))
        await leaving.until(StepDone, 3)
        (held,) = made
        await held.until_reached()
        leaving.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(leaving.task, WAIT_S)
        held.going.set()
        assert await Stream(engine, **on(0)).pixels()


async def test_a_picture_that_cannot_be_decoded_fails_its_job_alone(catalog):
    load, made = with_decode(lambda decode: Held(decode, error=RuntimeError("torn")))
    async with running(catalog, load) as engine:
        bad = Stream(engine, **on(0))
        await bad.until(StepDone, 3)
        made[0].going.set()
        with pytest.raises(Internal):
            await asyncio.wait_for(bad.task, WAIT_S)
        assert await Stream(engine, **on(1)).pixels()


async def test_a_device_lost_while_decoding_is_lost_for_everybody(catalog, monkeypatch):
    load, made = with_decode(lambda decode: Held(decode, error=RuntimeError("illegal access")))
    async with running(catalog, load) as engine:
        first = Stream(engine, **on(0))
        await first.until(StepDone, 3)
        await made[0].until_reached()
        other = Stream(engine, **on(1), steps=ENDLESS)
        await other.until(StepDone)

        def synchronize(_):
            if threading.current_thread().name == "finish":
                raise RuntimeError("illegal access")

        monkeypatch.setattr(device, "synchronize", synchronize)
        made[0].going.set()
        for stream in (first, other):
            with pytest.raises(DeviceLost):
                await asyncio.wait_for(stream.task, WAIT_S)
        with pytest.raises(DeviceLost):
            await asyncio.wait_for(engine.working(), WAIT_S)


async def test_a_large_picture_is_decoded_alone(catalog, monkeypatch):
    monkeypatch.setattr("services.generator.sampler.DECODED_PIXELS", 2 * 32 * 32)
    counts = []

    def counting(decode):
        def call(z_BChw):
            counts.append(len(z_BChw))
            return decode(z_BChw)

        return call

    load, _ = with_decode(counting)
    async with running(catalog, load) as engine:
        assert len(await Stream(engine, **on(0), images=5).pixels()) == 5
        assert counts == [2, 2, 1]
        del counts[:]
        await Stream(engine, **on(0), images=2, made_of=plates.plate(side=64)).pixels()
        assert counts == [1, 1]


async def test_a_place_is_told_until_the_work_begins(catalog):
    async with running(catalog, slice_s=0.05) as engine:
        long = Stream(engine, **on(0), steps=ENDLESS)
        await long.until(StepDone)
        waiting = [Stream(engine, **on(0), seed=seed) for seed in (1, 2)]
        for place, stream in enumerate(waiting, start=1):
            await stream.until(QueuedAt)
            assert stream.of(QueuedAt)[-1].place == place
        long.task.cancel()
        for stream in waiting:
            assert await stream.pixels()
            assert stream.of(QueuedAt)[-1].place == 0


# What would be a black picture


def spoiled(spoil):
    """Loads stages with a network spoiled."""

    def load(card):
        stages = load_stages(card)
        spoil(stages._model)
        return stages

    return load


def not_numbers(part):
    for parameter in part.parameters():
        parameter.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda model: not_numbers(model.unet), "U-Net gave"),
        (lambda model: not_numbers(model.vae.encoder), "autoencoder gave"),
        (lambda model: not_numbers(model.vae.decoder), "autoencoder decodes"),
    ],
)
async def test_what_would_be_a_black_picture_fails_and_names_the_network(catalog, spoil, told):
    async with running(catalog, spoiled(spoil)) as engine:
        with pytest.raises(Internal, match=told) as caught:
            await asyncio.wait_for(Stream(engine, **on(0)).task, WAIT_S)
        assert caught.value.reason == "NOT_FINITE"


def test_an_autoencoder_that_overflows_decodes_again_in_single_precision(catalog):
    stages = load_stages(catalog.cards[0])
    z_BChw = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = stages.decode_image(z_BChw)
    vae = stages._model.vae
    first = vae.decoder.conv_in
    # Weights that half precision holds, and answers on their way through that it does not.
    factor = 3e4 / first.weight.abs().max().item()
    first.weight.data.mul_(factor)
    first.bias.data.mul_(factor)
    assert torch.nn.functional.conv2d(z_BChw, first.weight, padding=1).abs().max() > 65504
    wide = stages.decode_image(z_BChw)
    vae.to(torch.float16)
    half = stages.decode_image(z_BChw)
    assert vae.dtype == torch.float16
    assert not torch.equal(wide, expected)
    assert (half.int() - wide.int()).abs().max() <= 2
