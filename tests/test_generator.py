"""GeneratorService over a real loopback server on a toy model: whole calls, repeats, refusals, cancel, drain."""

import asyncio
import contextlib
import io
import math
import re
from dataclasses import replace
from unittest.mock import Mock

import grpc
import numpy as np
import pytest
import pytest_asyncio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from prometheus_client import REGISTRY
from safetensors.torch import save

from collage.v1 import (
    collage_pb2,
    generator_service_pb2,
    generator_service_pb2_grpc,
)
from local import triton
from services.common import color, wire
from services.common.blobs import FolderBlobStore, put_blob
from services.common.collage import Extent
from services.common.decoder import Decoder
from services.common.errors import (
    DeadlinePassed,
    InvalidRequest,
    MissingBlobs,
    from_rpc,
)
from services.common.models_file import ModelSource
from services.common.pictures import decode_opaque, encode_png
from services.common.rpc import connect
from services.common.telemetry import start_logging
from services.diffusion.catalog import Catalog
from services.diffusion.pace import Expected
from services.generator.__main__ import Settings, build
from services.generator.duration import Duration
from services.generator.engine import Engine
from services.generator.folder_card import FolderCard, load_stages, read_catalog
from services.generator.scheduler import Scheduler
from services.generator.service import GeneratorServicer
from testing import plates, toy
from testing.servers import triton_server

pytestmark = pytest.mark.asyncio(loop_scope="module")
WAIT_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    start_logging("test", level="WARNING")
    return toy.mini(tmp_path_factory.mktemp("toy") / "mini")


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["torch", pytest.param("triton", marks=pytest.mark.triton)],
)
async def stages(request, folder, tmp_path_factory):
    """Who runs the networks, as `COLLAGE_STAGES` takes it."""
    if request.param == "torch":
        yield "torch"
        return
    if not triton.is_here():
        pytest.skip("no Triton server here: make triton")
    async with triton_server(tmp_path_factory.mktemp("triton"), f"mini={folder}") as server:
        yield f"triton:{server.url}"


@contextlib.asynccontextmanager
async def serving(folder, data, *, stages="torch", threads=1, max_rows=1, max_work_s=3600.0):
    """A serving generator: its server, a stub, and its blobs."""
    settings = Settings(
        address="127.0.0.1:0",
        blobs=f"folder:{data}",
        models=f"mini={folder}",
        stages=stages,
        threads=threads,
        max_rows=max_rows,
        max_work_s=max_work_s,
    )
    server = await build(settings)
    await asyncio.wait_for(server.start(), WAIT_S)
    async with connect(server.address) as channel:
        stub = generator_service_pb2_grpc.GeneratorServiceStub(channel)
        yield server, stub, FolderBlobStore(data)
    await server.stop(drain_s=WAIT_S)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(folder, stages, tmp_path_factory):
    async with serving(folder, tmp_path_factory.mktemp("blobs"), stages=stages) as parts:
        yield parts


async def request_for(blobs, plate=None, *, parent=None, **changes):
    """A request over a stored plate; `changes` are of its sampling."""
    ref = await put_blob(
        blobs, (plate or plates.plate()).to_bytes(), media_type="application/vnd.safetensors"
    )
    request = generator_service_pb2.GenerateRequest(
        plate=wire.render_blob(ref),
        prompt=plates.PROMPT,
        layers=[
            generator_service_pb2.LayerControl(
                plan={
                    "name": f"layer-{index}",
                    "text_start": start,
                    "text_end": end,
                    "attract": 0.5,
                    "repel": 0.8,
                }
            )
            for index, (start, end) in enumerate(plates.SPANS)
        ],
        sampling=wire.render_sampling(plates.sampling(**changes)),
    )
    if parent is not None:
        request.parent.CopyFrom(
            wire.render_blob(await put_blob(blobs, parent, media_type="image/png"))
        )
    return request


async def answers(stub, request, *, timeout_s=WAIT_S):
    try:
        return [answer async for answer in stub.Generate(request, timeout=timeout_s)]
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def images(answered):
    return [answer.image for answer in answered if answer.HasField("image")]


async def pixels(blobs, image):
    data = await blobs.get(f"blobs/{image.blob.sha256}", limit_bytes=2**20)
    return np.asarray(Image.open(io.BytesIO(data)))


def unet_calls():
    return REGISTRY.get_sample_value("collage_generator_step_seconds_count", {"model": "mini"}) or 0


async def test_a_whole_generation(served):
    _, stub, blobs = served
    model = (
        await stub.DescribeModels(generator_service_pb2.DescribeModelsRequest(), timeout=WAIT_S)
    ).models[0]
    answered = await answers(stub, await request_for(blobs, images=2, seed=41, preview_every=1))
    kinds = [answer.WhichOneof("event") for answer in answered]
    assert [kind for kind in kinds if kind != "queued"] == [
        *("step", "preview", "preview", "step", "preview", "preview", "step", "image", "image")
    ]
    assert [(a.step.step, a.step.total) for a in answered if a.HasField("step")] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    assert [(image.index, image.seed) for image in images(answered)] == [(0, 41), (1, 42)]
    for image in images(answered):
        assert image.model_digest == model.digest
        assert not image.HasField("changed_pixels")
        assert (await pixels(blobs, image)).shape == (32, 32, 3)


async def test_a_request_asked_again_is_answered_from_storage(served):
    _, stub, blobs = served
    request = await request_for(blobs, images=2)
    first = images(await answers(stub, request))
    before = unet_calls()
    # Who watches the pictures come does not change them.
    request.sampling.preview_every = 1
    again = await answers(stub, request)
    assert images(again) == first
    assert len(again) == 2
    assert unet_calls() == before
    await blobs.delete(f"blobs/{first[1].blob.sha256}")
    assert images(await answers(stub, request)) == first
    assert unet_calls() == before + 3


async def test_what_changes_the_picture_is_not_answered_from_storage(served):
    _, stub, blobs = served
    plain = await request_for(blobs)
    changed = [await request_for(blobs, seed=1), await request_for(blobs)]
    changed[1].layers[0].seed = 7
    digests = {images(await answers(stub, request))[0].blob.sha256 for request in (plain, *changed)}
    assert len(digests) == 3


async def test_a_redo_reports_what_changed_and_keeps_the_rest(served):
    _, stub, blobs = served
    plate = plates.plate(strengths=(1.0, 0.0))
    plate.release_HW[:, 16:] = 0
    request = await request_for(blobs, plate, parent=encode_png(plate.composite_HWC))
    image = images(await answers(stub, request))[0]
    drawn_HWC = await pixels(blobs, image)
    assert np.array_equal(drawn_HWC[:, 16:], plate.composite_HWC[:, 16:])
    assert 0 < image.changed_pixels <= 16 * 32


async def test_changed_pixels_of_a_parent_in_another_colour_space_are_those_drawn_anew(served):
    _, stub, blobs = served
    display_p3 = color.profile(
        xy=((0.3127, 0.3290), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
    )
    numbers_HWC = np.random.default_rng(3).integers(30, 220, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(numbers_HWC).save(file, "PNG", icc_profile=display_p3)
    plate = plates.plate(strengths=(1.0, 0.0))
    plate.release_HW[:, 16:] = 0
    # The compositor composes over what it decodes, which is not the file's numbers.
    plate.composite_HWC[:] = decode_opaque(file.getvalue())
    assert (plate.composite_HWC != numbers_HWC).any(axis=2).mean() > 0.9
    request = await request_for(blobs, plate, parent=file.getvalue())
    image = images(await answers(stub, request))[0]
    assert 0 < image.changed_pixels <= 16 * 32


async def test_estimates_count_tokens_and_refuse_nothing_too_long(served):
    _, stub, _ = served
    estimates = [
        await stub.Estimate(
            generator_service_pb2.EstimateRequest(
                sampling=wire.render_sampling(plates.sampling(images=count)),
                size=collage_pb2.Size(width=32, height=32),
                layers=[collage_pb2.LayerPlan(), collage_pb2.LayerPlan()],
                prompt="a sushi " * 60,
                negative_prompt="",
                word_tokens=3,
                largest_noise=1.0,
            ),
            timeout=WAIT_S,
        )
        for count in (1, 4)
    ]
    assert (estimates[0].prompt_tokens, estimates[0].negative_prompt_tokens) == (125, 2)
    assert estimates[0].prompt_tokens_limit == toy.WINDOW
    # Measured by the warm-up before the first request.
    assert 0 < estimates[0].seconds < estimates[1].seconds
    assert all(0 < each.seconds_low <= each.seconds <= each.seconds_high for each in estimates)
    assert 0 < estimates[0].memory_bytes < estimates[1].memory_bytes


async def word_of(blobs, vectors_VD):
    data = save({"<it>": vectors_VD})
    return wire.render_blob(await put_blob(blobs, data, media_type="application/vnd.safetensors"))


async def test_a_learned_word_is_drawn_with_and_kept_apart(served):
    _, stub, blobs = served
    request = await request_for(blobs, seed=77)
    (plain,) = images(await answers(stub, request))
    request.layers[0].word.CopyFrom(await word_of(blobs, torch.linspace(-1, 1, 64).reshape(2, 32)))
    request.layers[0].word_weight = 1.0
    (drawn,) = images(await answers(stub, request))
    assert drawn.blob.sha256 != plain.blob.sha256
    request.layers[0].word_weight = 0.5
    (lighter,) = images(await answers(stub, request))
    assert lighter.blob.sha256 not in (plain.blob.sha256, drawn.blob.sha256)
    # The model itself has learned nothing.
    (again,) = images(await answers(stub, await request_for(blobs, seed=77, preview_every=1)))
    assert again.blob.sha256 == plain.blob.sha256


async def test_a_word_of_another_model_or_without_end_is_refused(served):
    _, stub, blobs = served
    request = await request_for(blobs)
    request.layers[1].word.CopyFrom(await word_of(blobs, torch.zeros(1, 48)))
    with pytest.raises(InvalidRequest, match=r"layers\[1\]\.word: .* 1 x 48; .* vectors x 32"):
        await answers(stub, request)
    request.layers[1].word.CopyFrom(await word_of(blobs, torch.zeros(2**16, 32)))
    with pytest.raises(InvalidRequest, match="allowed: at most 4194304") as told:
        await answers(stub, request)
    assert told.value.metadata["field"] == "layers[1].word"


def _without_plate(request):
    request.plate.sha256 = "0" * 64


def _not_a_plate(request):
    request.plate.CopyFrom(request.parent)


def _other_layer_count(request):
    request.layers.add(plan={"name": "third"})


def _span_outside(request):
    request.layers[1].plan.text_end = 999


def _too_long(request):
    request.prompt = "a sushi on a table" + " rice" * 80


def _unknown_model(request):
    request.sampling.model = "huge"


def _unknown_sampler(request):
    request.sampling.sampler = "magic"


def _nan_dial(request):
    request.layers[0].plan.attract = float("nan")


def _missing_word(request):
    request.layers[0].word.sha256 = "0" * 64


def _not_a_word(request):
    request.layers[1].word.CopyFrom(request.plate)


def _heavy_word(request):
    request.layers[1].word.CopyFrom(request.plate)
    request.layers[1].word_weight = 2.5


def _weight_without_a_word(request):
    request.layers[1].word_weight = 1


def _bad_digest(request):
    request.plate.sha256 = "../etc"


def _missing_parent(request):
    request.parent.sha256 = "1" * 64


@pytest.mark.parametrize(
    ("spoil", "kind", "field"),
    [
        (_without_plate, MissingBlobs, "plate"),
        (_missing_parent, MissingBlobs, "parent"),
        (_not_a_plate, InvalidRequest, "plate"),
        (_bad_digest, InvalidRequest, "plate.sha256"),
        (_other_layer_count, InvalidRequest, "layers"),
        (_span_outside, InvalidRequest, "layers[1].plan.text_end"),
        (_too_long, InvalidRequest, "prompt"),
        (_unknown_model, InvalidRequest, "sampling.model"),
        (_unknown_sampler, InvalidRequest, "sampling.sampler"),
        (_nan_dial, InvalidRequest, "layers[0].plan.attract"),
        (_missing_word, MissingBlobs, "layers[0].word"),
        (_not_a_word, InvalidRequest, "layers[1].word"),
        (_heavy_word, InvalidRequest, "layers[1].word_weight"),
        (_weight_without_a_word, InvalidRequest, "layers[1].word_weight"),
    ],
)
async def test_a_wrong_request_names_its_field(served, spoil, kind, field):
    _, stub, blobs = served
    plate = plates.plate()
    request = await request_for(blobs, plate, parent=encode_png(plate.composite_HWC))
    spoil(request)
    with pytest.raises(kind) as told:
        await answers(stub, request)
    assert told.value.metadata["field"] == field


@pytest.mark.parametrize(
    ("plate", "part"),
    [
        (plates.plate(side=64, factor=8), "latent factor 8"),
        (plates.plate(side=40), "multiples of 16 from 16 to 128, the nearest being 32 or 48"),
    ],
)
async def test_a_plate_that_does_not_fit_the_model_is_refused(served, plate, part):
    _, stub, blobs = served
    with pytest.raises(InvalidRequest, match=part):
        await answers(stub, await request_for(blobs, plate))


async def test_a_client_that_leaves_frees_the_device_within_a_step(served):
    _, stub, blobs = served
    call = stub.Generate(await request_for(blobs, steps=999), timeout=WAIT_S)
    async for answer in call:
        if answer.HasField("step"):
            break
    call.cancel()
    # The cancel crosses a socket; the device then has at most the step under way to end.
    await asyncio.sleep(0.3)
    before = unet_calls()
    await asyncio.sleep(0.3)
    assert unet_calls() == before


async def test_a_deadline_ends_the_work(served):
    _, stub, blobs = served
    with pytest.raises(DeadlinePassed):
        await answers(stub, await request_for(blobs, steps=999), timeout_s=0.5)
    await asyncio.sleep(0.3)
    before = unet_calls()
    await asyncio.sleep(0.3)
    assert unet_calls() == before


async def test_what_cannot_end_in_time_is_refused_with_what_would(folder, tmp_path):
    """A job of 6.7 hours was admitted where the limit is one."""
    async with serving(folder, tmp_path, max_work_s=1.0) as (_, stub, blobs):
        (model,) = (await stub.DescribeModels(generator_service_pb2.DescribeModelsRequest())).models
        assert model.max_work_seconds == 1.0
        estimate = generator_service_pb2.EstimateRequest(
            sampling=wire.render_sampling(plates.sampling(steps=900, images=2)),
            size=collage_pb2.Size(width=64, height=64),
            prompt=plates.PROMPT,
            layers=[collage_pb2.LayerPlan()],
            largest_noise=1.0,
        )
        with pytest.raises(InvalidRequest) as refused:
            await estimated(stub, estimate)
        (violation,) = refused.value.violations
        assert (refused.value.reason, violation.field) == ("TOO_LONG", "sampling.steps")
        assert "the operator allows a request 1 s" in violation.description
        # By the generator itself, too, where nobody asked before.
        request = await request_for(blobs, plates.plate(side=64), steps=900, images=2)
        with pytest.raises(InvalidRequest) as refused_too:
            await answers(stub, request)
        assert refused_too.value.reason == "TOO_LONG"
        fits = int(violation.description.split("expected to fit: ")[1].split()[0])
        estimate.sampling.steps = fits
        told = await estimated(stub, estimate)
        assert told.seconds <= 1.1 < told.seconds * 1.5
        # What may end is drawn, with a warning where it is more likely not to.
        low = told.seconds_low / told.seconds
        estimate.sampling.steps = round(fits * (1 + 1 / low) / 2)
        (warning,) = (await estimated(stub, estimate)).warnings
        assert warning.reason == "LIKELY_TOO_LONG"


@pytest.mark.parametrize(
    ("changes", "size", "field"),
    [
        ({"steps": 300, "images": 2}, (32, 32), "sampling.steps"),
        ({"steps": 30, "images": 16}, (32, 32), "sampling.images"),
        ({"steps": 30, "images": 2}, (512, 256), "plate"),
        # Of many pictures of one step one is too many: only the canvas can help.
        ({"steps": 1, "images": 16}, (2048, 2048), "plate"),
        # Nothing helps alone.
        ({"steps": 500, "images": 16}, (2048, 2048), "plate"),
    ],
)
def test_the_field_to_change_is_the_one_furthest_above_the_models_default(
    folder, changes, size, field
):
    (card,) = read_catalog(f"mini={folder}").cards

    def of(size, images, steps):
        seconds = size.pixels * images * steps / (32 * 32 * 30)
        return Expected(seconds=seconds, low=seconds / 2, high=2 * seconds)

    width, height = size
    extent, sampling = Extent(width=width, height=height), plates.sampling(**changes)
    duration = Duration(
        card=card,
        size=extent,
        sampling=sampling,
        limit_s=4.0,
        expected=of(extent, sampling.images, sampling.steps),
        of=of,
    )
    with pytest.raises(InvalidRequest) as refused:
        duration.check(canvas="plate")
    (violation,) = refused.value.violations
    assert violation.field == field
    told = violation.description.split("; ")[-1]
    size, sampling = duration.size, duration.sampling
    fits = []
    for number, unit in re.findall(r"(\d+) (steps|pictures)", told):
        images, steps = sampling.images, sampling.steps
        fits.append(of(size, *((images, int(number)) if unit == "steps" else (int(number), steps))))
    for width, height in re.findall(r"(\d+) x (\d+) pixels", told):
        smaller = Extent(width=int(width), height=int(height))
        fits.append(of(smaller, sampling.images, sampling.steps))
    assert all(fit.seconds <= 4.0 for fit in fits)
    assert bool(fits) == ("more than one has to change" not in told)


async def test_nothing_is_refused_where_nothing_was_measured(folder, tmp_path):
    (card,) = read_catalog(f"mini={folder}").cards
    engine = Engine(Catalog({"mini": card}), load=load_stages, scheduler=Scheduler(), threads=1)
    servicer = GeneratorServicer(
        engine, FolderBlobStore(tmp_path), Decoder(), limit_bytes=math.inf, limit_s=1e-9
    )
    request = generator_service_pb2.EstimateRequest(
        sampling=wire.render_sampling(plates.sampling(steps=900)),
        size=collage_pb2.Size(width=64, height=64),
        layers=[collage_pb2.LayerPlan()],
        largest_noise=1.0,
    )
    told = await servicer.Estimate(request, None)
    assert (told.seconds, told.seconds_high) == (0.0, 0.0)
    await engine.drain()


async def estimated(stub, request):
    try:
        return await stub.Estimate(request, timeout=WAIT_S)
    except grpc.RpcError as error:
        raise from_rpc(error) from error


async def test_stopping_lets_an_admitted_call_finish(folder, tmp_path):
    async with serving(folder, tmp_path) as (server, stub, blobs):
        async with connect(server.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = stub.Generate(await request_for(blobs, steps=60), timeout=WAIT_S)
        answered = []
        async for answer in call:
            answered.append(answer)
            if answer.HasField("step"):
                break
        stopping = asyncio.create_task(server.stop(drain_s=WAIT_S))
        answered += [answer async for answer in call]
        assert len(images(answered)) == 1
        await asyncio.wait_for(stopping, WAIT_S)


async def test_pictures_that_other_arithmetic_drew_are_not_answered(folder, tmp_path):
    async def drawn(threads):
        """Whether a generator with so many threads draws the request; it keeps what it drew."""
        async with serving(folder, tmp_path, threads=threads) as (_, stub, blobs):
            before = unet_calls()
            assert images(await answers(stub, await request_for(blobs, seed=3)))
            return unet_calls() > before

    # Sums split over another number of threads round differently.
    assert [await drawn(threads) for threads in (1, 2, 1)] == [True, True, False]


async def test_a_device_of_another_kind_is_other_arithmetic(folder, monkeypatch):
    source = ModelSource(name="mini", source=folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Mock(total_memory=2**34))
    cards = [
        FolderCard.read(replace(source, device="cpu", dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    for name in ("NVIDIA H100", "NVIDIA A100"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        cards.append(FolderCard.read(replace(source, device="cuda")))
    assert [card.device_bytes for card in cards[2:]] == [2**34] * 2
    engine, joint = (
        Engine(Catalog({"mini": card}), load=load_stages, scheduler=scheduler, threads=1)
        for card, scheduler in ((cards[0], Scheduler()), (cards[0], Scheduler(max_rows=8)))
    )
    kinds = {engine.arithmetic(card) for card in cards}
    # Where jobs share calls, a picture's last bits are those of the company it had.
    kinds.add(joint.arithmetic(cards[0]))
    assert len(kinds) == 5


async def test_where_rows_are_shared_pictures_come_in_order_and_are_kept_apart(folder, tmp_path):
    async with serving(folder, tmp_path) as (_, stub, blobs):
        alone = images(await answers(stub, await request_for(blobs, images=5, seed=3)))
    async with serving(folder, tmp_path, max_rows=4) as (_, stub, blobs):
        request, before = await request_for(blobs, images=5, seed=3), unet_calls()
        answered = await answers(stub, request)
        assert unet_calls() > before, "what was drawn alone is not taken for it"
        drawn = images(answered)
        assert [image.index for image in drawn] == [*range(5)]
        steps = [answer.step.step for answer in answered if answer.HasField("step")]
        assert steps == sorted(set(steps))
        again = images(await answers(stub, request))
    assert [image.seed for image in drawn] == [image.seed for image in alone]
    assert again == drawn


async def test_a_gpu_too_refuses_what_does_not_fit_before_anything_is_drawn(folder, tmp_path):
    (card,) = read_catalog(f"mini={folder}").cards
    # Stable Diffusion XL on a card of 24 GiB, whose weights take seven.
    facts = replace(card.facts, latent_factor=8, upcasts_vae=True)
    large = replace(
        card,
        facts=facts,
        device=torch.device("cuda", 0),
        device_bytes=24 * 2**30,
        unet_channels=320,
        vae_channels=128,
        unet_value_bytes=2,
        vae_value_bytes=4,
        weights_bytes=7 * 2**30,
    )
    size = Extent(width=1024, height=1024)
    found = {}
    for max_rows in (1, 8):
        scheduler = Scheduler(max_rows=max_rows)
        engine = Engine(Catalog({"xl": large}), load=load_stages, scheduler=scheduler, threads=1)
        servicer = GeneratorServicer(
            engine, FolderBlobStore(tmp_path), Decoder(), limit_bytes=0, limit_s=math.inf
        )
        options = {"has_structure": False, "has_emphasis": False}
        for images in (1, 16):
            sampling = replace(large.defaults(), images=images, guidance_scale=5.0)
            try:
                servicer._memory_bytes(large, size, sampling, **options)
                found[max_rows, images] = True
            except InvalidRequest as error:
                assert error.reason == "TOO_MUCH_MEMORY"
                found[max_rows, images] = False
    # One call of 32 rows does not fit; the same pictures eight rows at a time, decoded one by one, do.
    assert found == {(1, 1): True, (1, 16): False, (8, 1): True, (8, 16): True}
    await engine.drain()
