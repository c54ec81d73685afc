import asyncio
import contextlib
import hashlib
import re
from io import BytesIO

import grpc
import numpy as np
import pytest
from PIL import Image

from collage.v1 import collage_pb2, compositor_service_pb2, compositor_service_pb2_grpc
from services.common.blobs import FolderBlobStore, put_blob
from services.common.confined import Confined
from services.common.errors import InvalidRequest, MissingBlobs, Overloaded, from_rpc
from services.common.pictures import encode_png
from services.common.plate import Plate
from services.common.rpc import connect
from services.common.wire import render_blob
from services.compositor import service
from services.compositor.__main__ import Settings, build
from testing.waiting import until

RNG = np.random.default_rng(3)


def rgba(height, width, alpha=255):
    pixels = RNG.integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[..., 3] = alpha
    return pixels


class Compositor:
    """A running compositor and the blob store it works on."""

    def __init__(self, stub, blobs):
        self.stub = stub
        self.blobs = blobs

    async def put(self, data):
        return render_blob(await put_blob(self.blobs, data, media_type="image/png"))

    async def request(self, *pictures, width=64, height=32):
        """A request whose layers a, b, ... hold these pictures (arrays, or encoded)."""
        request = compositor_service_pb2.ComposeRequest(latent_factor=8)
        request.collage.size.width = width
        request.collage.size.height = height
        for name, picture in zip("abcdefgh", pictures, strict=False):
            layer = request.collage.layers.add(name=name, text=f"a {name}")
            data = picture if isinstance(picture, bytes) else encode_png(picture)
            layer.image.blob.CopyFrom(await self.put(data))
        return request

    async def compose(self, request):
        return await self.stub.Compose(request, timeout=20)

    async def refused(self, request):
        with pytest.raises(grpc.RpcError) as caught:
            await self.compose(request)
        return from_rpc(caught.value)

    async def get(self, ref):
        return await self.blobs.get(f"blobs/{ref.sha256}", limit_bytes=2**26)


@contextlib.asynccontextmanager
async def running(tmp_path):
    server = await build(Settings(address="127.0.0.1:0", blobs=f"folder:{tmp_path}"))
    await server.start()
    blobs = FolderBlobStore(tmp_path)
    async with connect(server.address) as channel:
        yield Compositor(compositor_service_pb2_grpc.CompositorServiceStub(channel), blobs)
    await blobs.close()
    await server.stop(drain_s=0)


@pytest.fixture
async def compositor(tmp_path):
    async with running(tmp_path) as compositor:
        yield compositor


class Watched(Confined):
    """The work of a compositor, for tests that look at its processes."""

    first = None

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # The first of a compositor's, which has the work of a lone caller.
        Watched.first = Watched.first or self


def plain(side):
    """A cut-out that is small as a file."""
    return np.full((side, side, 4), 255, np.uint8)


async def test_a_composition_is_stored_and_reported(compositor):
    back, front = rgba(32, 64), rgba(16, 16, alpha=128)
    request = await compositor.request(back, front)
    request.collage.layers[1].transform.x = 20
    request.collage.layers[1].noise = 0.25
    answer = await compositor.compose(request)
    plate = Plate.from_bytes(await compositor.get(answer.plate))
    assert plate.composite_HWC.shape == (32, 64, 3)
    assert plate.visible_Lhw.shape == (2, 4, 8)
    assert plate.latent_factor == 8
    assert np.array_equal(plate.composite_HWC[:, 30:], back[:, 30:, :3])
    composite = Image.open(BytesIO(await compositor.get(answer.composite)))
    assert np.array_equal(np.asarray(composite), plate.composite_HWC)
    masks = [Image.open(BytesIO(await compositor.get(layer.mask))) for layer in answer.layers]
    assert [(mask.mode, mask.size) for mask in masks] == [("L", (64, 32))] * 2
    expected = np.zeros((32, 64), np.uint8)
    expected[8:24, 12:28] = 128
    assert np.array_equal(np.asarray(masks[1]), expected)
    assert np.array_equal(np.asarray(masks[0]), 255 - expected)
    below, above = answer.layers
    assert (below.name, above.name) == ("a", "b")
    assert above.noise == 0.25
    assert below.noise == pytest.approx(0.7)
    assert (above.transform.x, above.transform.y, above.transform.scale) == (20, 16, 1)
    assert above.opacity == 1
    assert above.unoccluded_fraction == pytest.approx(1)
    assert not answer.warnings


async def test_the_same_request_is_found_again(compositor):
    request = await compositor.request(rgba(16, 16, alpha=77), rgba(9, 9))
    first = await compositor.compose(request)
    files = {path: path.stat().st_mtime_ns for path in compositor.blobs._objects.rglob("*@")}
    # Words do not change a composition.
    request.collage.prompt = "something else"
    request.collage.layers[0].text = "another"
    assert await compositor.compose(request) == first
    assert {
        path: path.stat().st_mtime_ns for path in compositor.blobs._objects.rglob("*@")
    } == files
    request.collage.layers[0].noise = 0
    assert (await compositor.compose(request)).plate != first.plate


async def test_an_answer_whose_files_are_gone_is_made_again(compositor):
    request = await compositor.request(rgba(16, 16))
    first = await compositor.compose(request)
    await compositor.blobs.delete(f"blobs/{first.plate.sha256}")
    assert await compositor.compose(request) == first
    assert Plate.from_bytes(await compositor.get(first.plate)).release_HW.all()


async def test_equal_requests_at_once_agree(compositor):
    requests = [await compositor.request(rgba(16, 16), rgba(9, 9, alpha=3)) for _ in range(3)] * 3
    answers = await asyncio.gather(*(compositor.compose(request) for request in requests))
    assert answers[:3] == answers[3:6] == answers[6:]


async def test_a_photograph_is_a_layer_opaque_in_its_rectangle(compositor):
    file = BytesIO()
    Image.new("RGB", (16, 12), (200, 100, 50)).save(file, "JPEG", quality=95)
    answer = await compositor.compose(await compositor.request(file.getvalue()))
    mask_HW = np.asarray(Image.open(BytesIO(await compositor.get(answer.layers[0].mask))))
    assert (mask_HW == 255).sum() == mask_HW.astype(bool).sum() == 16 * 12


async def test_every_unusable_picture_is_named(compositor):
    gif = b"GIF89a" + bytes(20)
    request = await compositor.request(gif, rgba(8, 8), b"no picture", encode_png(rgba(8, 8))[:70])
    error = await compositor.refused(request)
    assert isinstance(error, InvalidRequest)
    assert [violation.field for violation in error.violations] == [
        "collage.layers[0].image",
        "collage.layers[2].image",
        "collage.layers[3].image",
    ]
    assert "no picture in a known format" in error.violations[0].description
    assert "PNG, WebP or JPEG" in error.violations[0].description


async def test_every_missing_blob_is_named(compositor):
    request = await compositor.request(rgba(8, 8), rgba(8, 8))
    digests = [hashlib.sha256(bytes([index])).hexdigest() for index in range(2)]
    request.collage.layers[1].image.blob.sha256 = digests[0]
    request.collage.background.image.blob.sha256 = digests[1]
    error = await compositor.refused(request)
    assert isinstance(error, MissingBlobs)
    assert error.missing == {
        "collage.layers[1].image": digests[0],
        "collage.background.image": digests[1],
    }


async def test_a_canvas_between_cells_is_refused_with_its_neighbours(compositor):
    request = await compositor.request(rgba(8, 8), width=68, height=2047)
    error = await compositor.refused(request)
    assert {violation.field: violation.description for violation in error.violations} == {
        "collage.size.width": "is 68; allowed: multiples of 8, the nearest: 64 and 72",
        "collage.size.height": "is 2047; allowed: multiples of 8, the nearest: 2040 and 2048",
    }


@pytest.mark.parametrize("factor", [0, -8, 65])
async def test_a_latent_factor_out_of_range_is_refused(compositor, factor):
    request = await compositor.request(rgba(8, 8))
    request.latent_factor = factor
    error = await compositor.refused(request)
    assert [violation.field for violation in error.violations] == ["latent_factor"]


async def test_a_background_picture_is_stretched(compositor):
    request = await compositor.request(rgba(8, 8, alpha=0))
    background = np.full((4, 4, 3), (10, 200, 30), np.uint8)
    request.collage.background.image.blob.CopyFrom(await compositor.put(encode_png(background)))
    answer = await compositor.compose(request)
    plate = Plate.from_bytes(await compositor.get(answer.plate))
    assert (plate.composite_HWC == (10, 200, 30)).all()
    assert answer.warnings[0] == collage_pb2.Warning(
        reason="LAYER_HIDDEN",
        field="collage.layers[0].image",
        message="layer a takes no part: its picture is wholly transparent",
    )
    request.collage.background.image.blob.CopyFrom(
        await compositor.put(encode_png(rgba(4, 4, alpha=9)))
    )
    error = await compositor.refused(request)
    assert error.violations[0].field == "collage.background.image"


async def test_a_redo_starts_from_its_parent(compositor):
    request = await compositor.request(rgba(16, 32), rgba(8, 8))
    parent = RNG.integers(0, 256, (32, 64, 3), dtype=np.uint8)
    request.redo.parent.CopyFrom(await compositor.put(encode_png(parent)))
    request.redo.layers.append("b")
    request.redo.feather = 1
    answer = await compositor.compose(request)
    plate = Plate.from_bytes(await compositor.get(answer.plate))
    assert np.array_equal(plate.composite_HWC, parent)
    assert plate.release_HW[12:20, 28:36].all()
    assert np.count_nonzero(plate.release_HW) == 64
    assert [layer.noise for layer in answer.layers] == pytest.approx([0, 0.4])
    request.redo.restore_cutout = True
    assert (await compositor.compose(request)).composite != answer.composite


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda redo: redo.layers.append("z"), "redo.layers[1]"),
        (lambda redo: redo.ClearField("layers"), "redo.layers"),
        (lambda redo: setattr(redo, "feather", float("nan")), "redo.feather"),
        (lambda redo: setattr(redo.parent, "sha256", "x"), "redo.parent.sha256"),
        (None, "redo.parent"),
    ],
)
async def test_a_wrong_redo_is_refused(compositor, change, field):
    request = await compositor.request(rgba(8, 8))
    side = 32 if change else 40
    parent = await compositor.put(encode_png(np.zeros((side, 64, 3), np.uint8)))
    request.redo.parent.CopyFrom(parent)
    request.redo.layers.append("a")
    if change:
        change(request.redo)
    error = await compositor.refused(request)
    assert [violation.field for violation in error.violations] == [field]


async def test_a_full_queue_is_told_with_a_delay(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "MAX_RUNNING", 0)
    monkeypatch.setattr(service, "KEPT", 0)
    monkeypatch.setattr(service, "MAX_WAITING", 0)
    async with running(tmp_path) as compositor:
        error = await compositor.refused(await compositor.request(rgba(8, 8)))
    assert isinstance(error, Overloaded)
    assert error.retry_after_s > 0


async def test_equal_requests_at_one_time_are_worked_out_once(compositor, monkeypatch):
    request = await compositor.request(rgba(8, 8))
    made = []
    run = Confined.run

    async def counted(self, parts, field):
        made.append(field)
        return await run(self, parts, field)

    monkeypatch.setattr(Confined, "run", counted)
    leaving = compositor.stub.Compose(request, timeout=20)
    answers = [compositor.compose(request) for _ in range(5)]
    leaving.cancel()
    first, *others = await asyncio.gather(*answers)
    assert all(other == first for other in others)
    # One more where the call that began was given up before another had come.
    assert len(made) <= 2


async def test_a_call_that_is_given_up_ends_its_work(tmp_path, monkeypatch):
    monkeypatch.setattr("services.compositor.__main__.Confined", Watched)
    monkeypatch.setattr(Watched, "first", None)
    async with running(tmp_path) as compositor:
        # Eight layers of 16 megapixels take seconds.
        request = await compositor.request(*[plain(4000)] * 8)
        call = compositor.stub.Compose(request, timeout=60)
        await until(lambda: Watched.first._busy)
        (child,) = Watched.first._busy
        call.cancel()
        await until(lambda: not Watched.first._busy)
        assert not child.is_running
        await compositor.compose(await compositor.request(rgba(8, 8)))


async def test_what_takes_too_long_is_refused_at_the_picture_it_was_at(tmp_path, monkeypatch):
    monkeypatch.setattr("services.compositor.__main__.LIMIT_S", 0.3)
    async with running(tmp_path) as compositor:
        large = await compositor.request(*[plain(4000)] * 8)
        error = await compositor.refused(large)
        assert isinstance(error, InvalidRequest)
        (violation,) = error.violations
        assert re.fullmatch(r"collage(\.layers\[\d\]\.image)?", violation.field)
        assert "was being worked on when 0.3 s were over" in violation.description


async def test_what_takes_too_much_memory_is_refused_and_the_next_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("services.compositor.__main__.MEMORY_BYTES", 150 * 2**20)
    async with running(tmp_path) as compositor:
        error = await compositor.refused(await compositor.request(plain(4000)))
        assert isinstance(error, InvalidRequest)
        assert "takes more memory than there is for one request" in str(error)
        await compositor.compose(await compositor.request(rgba(8, 8)))


@pytest.mark.parametrize(
    ("limit", "fields"),
    [
        ("MAX_ENCODED_BYTES", ["collage.layers[0].image", "collage.layers[1].image"]),
        ("MAX_COLLAGE_BYTES", ["collage"]),
    ],
)
async def test_pictures_that_are_too_large_are_not_fetched(compositor, monkeypatch, limit, fields):
    request = await compositor.request(rgba(8, 8), rgba(8, 8))
    monkeypatch.setattr(service, limit, 100)
    error = await compositor.refused(request)
    assert [violation.field for violation in error.violations] == fields
