import asyncio
import shutil
import sys
import threading

import cv2
import grpc
import numpy as np
import pytest
import pytest_asyncio

from collage.v1 import collage_service_pb2 as pb
from collage.v1 import compositor_service_pb2, compositor_service_pb2_grpc
from services.common.blobs import FolderBlobStore, put_blob
from services.common.collage import Extent, Transform
from services.common.errors import InvalidRequest, from_rpc
from services.common.models_file import read_detectors
from services.common.pictures import encode_png
from services.common.plate import Plate
from services.common.rpc import connect
from services.common.settings import InvalidSetting
from services.common.wire import render_blob
from services.compositor import detector, network
from services.compositor.__main__ import Settings, build
from services.compositor.detector import Window, open_detectors
from services.compositor.network import Network
from services.compositor.placement import place
from services.compositor.pose import skeleton
from services.compositor.structure import on_ground
from services.compositor.work import parse
from testing import networks
from testing import system as system_tools

LIMIT_S = 60
# Larger than the canvas: at the border of what it is shown a network sees black.
SIDE = 144
CANVAS = Extent(width=96, height=128)
KINDS = ("softedge", "depth", "pose")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    networks.sobel(folder / "sobel.onnx")
    networks.brightness(folder / "brightness.onnx")
    networks.dots(folder / "dots.onnx")
    return folder


@pytest.fixture(scope="module")
def models(files):
    """A models.yaml with a detector of each form."""
    return networks.models_file(
        files,
        {
            "softedge": {"file": "sobel.onnx", "form": "edges", "side": SIDE},
            "depth": {"file": "brightness.onnx", "form": "depth", "side": SIDE},
            "pose": {"file": "dots.onnx", "form": "pose"},
        },
    )


@pytest.fixture(scope="module")
def detectors(models):
    return open_detectors(models, threads=1)


class Compositor:
    """A running compositor, and the blobs that it works on."""

    def __init__(self, stub, blobs):
        self.stub = stub
        self.blobs = blobs

    async def request(self, *layers, canvas=CANVAS):
        """A request whose layers are pairs of pixels and fields."""
        request = compositor_service_pb2.ComposeRequest(latent_factor=8)
        request.collage.size.width, request.collage.size.height = canvas.width, canvas.height
        for name, (pixels, fields) in zip("abcdefgh", layers, strict=False):
            layer = request.collage.layers.add(name=name, text=name, **fields)
            blob = await put_blob(self.blobs, encode_png(pixels), media_type="image/png")
            layer.image.blob.CopyFrom(render_blob(blob))
        return request

    async def control(self, *layers, canvas=CANVAS):
        """The control pictures of the plate."""
        answer = await self.stub.Compose(
            await self.request(*layers, canvas=canvas), timeout=LIMIT_S
        )
        data = await self.blobs.get(f"blobs/{answer.plate.sha256}", limit_bytes=2**26)
        return Plate.from_bytes(data).control


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def compositor(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("compositor")
    settings = Settings(address="127.0.0.1:0", blobs=f"folder:{folder}", models=models, threads=1)
    server = await build(settings)
    await server.start()
    blobs = FolderBlobStore(folder)
    async with connect(server.address) as channel:
        yield Compositor(compositor_service_pb2_grpc.CompositorServiceStub(channel), blobs)
    await blobs.close()
    await server.stop(drain_s=0)


def cutout(height, width, *, soft=False, seed=0):
    """Smooth colours, opaque or fading out to the sides."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    waves = [np.sin(x / rng.uniform(3, 9) + y / rng.uniform(3, 9)) for _ in range(3)]
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[..., :3] = np.rint(np.stack(waves, axis=2) * 100 + 120)
    fade = np.minimum(np.minimum(x, width - 1 - x), 8) / 8 if soft else np.ones((height, width))
    pixels[..., 3] = np.rint(fade * 255)
    return pixels


def on_canvas(pixels, fields, canvas=CANVAS):
    """Where a layer lies, HW4, as the compositor has it."""
    return place(pixels, Transform(**fields.get("transform", {})), canvas).on(canvas)


def flattened(layer_HW4):
    """The layer alone on its ground, R, G, B in [0, 1]."""
    channels = [on_ground(layer_HW4[..., i], layer_HW4[..., 3]) for i in range(3)]
    return np.dstack(channels) / np.float32(255)


def slopes(picture_HW3):
    """What the network of `networks.sobel` gives, worked out plainly; the border of the canvas goes on."""
    grey = np.pad(picture_HW3.mean(axis=2), 1, mode="edge")
    found = []
    for kernel in (networks.SOBEL, networks.SOBEL.T):
        moved = [
            kernel[i, j] * grey[i : i + grey.shape[0] - 2, j : j + grey.shape[1] - 2]
            for i in range(3)
            for j in range(3)
        ]
        found.append(np.abs(sum(moved)))
    return np.maximum(*found).clip(0, 1)


PLACES = [
    pytest.param((60, 30), {"x": 40, "y": 50}, False, id="portrait"),
    pytest.param((30, 60), {"x": 47.5, "y": 60.25}, True, id="landscape, soft, between pixels"),
    pytest.param((50, 30), {"x": 40, "y": 60, "rotation": 30, "scale": 1.2}, True, id="rotated"),
    pytest.param((60, 50), {"x": 2, "y": 120, "flip_horizontal": True}, False, id="cut off"),
    pytest.param((128, 96), {}, False, id="everywhere"),
]


@pytest.mark.parametrize(("shape", "transform", "soft"), PLACES)
@pytest.mark.asyncio(loop_scope="module")
async def test_soft_edges_are_the_networks_for_the_layer_alone(compositor, shape, transform, soft):
    pixels, fields = cutout(*shape, soft=soft), {"transform": transform}
    over = (cutout(9, 9, seed=1), {"transform": {"x": 90, "y": 5}})
    control = await compositor.control(
        (pixels, {**fields, "structure": [{"kind": "softedge"}]}), over
    )
    edges = control["softedge"]
    layer = on_canvas(pixels, fields)
    expected = slopes(flattened(layer)) * 255
    seen = layer[..., 3] > 0
    # Where the layer above covers it, it is not seen.
    seen[:12, 84:] = False
    assert seen.any() and expected[seen].max() > 40
    # One window pixel for each canvas pixel: only rounding differs.
    assert np.abs(edges[seen] - expected[seen][:, None]).max() <= 0.51
    assert not edges[layer[..., 3] == 0].any()


def test_the_border_of_the_canvas_is_no_edge_and_what_lies_under_alpha_0_neither(detectors):
    draw = detectors["softedge"].draw
    full = np.full((96, 96, 4), (200, 30, 90, 255), np.uint8)
    assert not draw(full).any()
    hidden = full.copy()
    hidden[:, :40] = np.random.default_rng(0).integers(0, 256, (96, 40, 4))
    hidden[:, :40, 3] = 0
    clear = full.copy()
    clear[:, :40] = 0
    assert draw(clear).any() and np.array_equal(draw(hidden), draw(clear))
    assert not draw(np.zeros((8, 8, 4), np.uint8)).any()


def test_a_layer_larger_than_the_networks_side_is_made_smaller_for_it(detectors):
    pixels = np.full((400, 640, 4), (250, 250, 250, 255), np.uint8)
    pixels[:, :320, :3] = 10
    edges = detectors["softedge"].draw(pixels)[..., 0]
    assert edges.shape == (400, 640)
    columns = np.flatnonzero(edges.max(axis=0) > 100)
    # A window of 640 for 144 pixels: the edge is two of its pixels wide, and where it was.
    # The border of the canvas, at which the network itself sees black, is none.
    assert columns.min() >= 305 and columns.max() <= 335 and 10 <= columns.size <= 25


@pytest.mark.parametrize(("shape", "transform", "soft"), PLACES[:3])
@pytest.mark.asyncio(loop_scope="module")
async def test_depth_is_stretched_over_each_layer_alone(compositor, shape, transform, soft):
    rising = cutout(*shape, soft=soft)
    rising[..., :3] = np.linspace(90, 130, shape[0])[:, None, None]
    fields = {"transform": transform, "structure": [{"kind": "depth"}]}
    other = np.full((12, 20, 4), 255, np.uint8)
    other[..., :3] = np.linspace(20, 220, 20)[:, None]
    beside = {"transform": {"x": 84, "y": 119}, "structure": [{"kind": "depth"}]}
    near = (await compositor.control((rising, fields), (other, beside)))["depth"][..., 0]
    layer = on_canvas(rising, fields)
    solid = layer[..., 3] >= 128
    solid[112:, 73:] = False
    assert near[solid].min() <= 1 and near[solid].max() >= 254
    grey = flattened(layer).mean(axis=2)
    inner = cv2.erode(solid.astype(np.uint8), np.ones((3, 3))) > 0
    low, high = grey[inner].min(), grey[inner].max()
    whole = layer[..., 3] == 255
    whole[112:, 73:] = False
    expected = (grey[whole] - low) / (high - low) * 255
    # It is enlarged for the network and made smaller again, which smooths steps of one grey, 6 of 255 here.
    assert np.abs(near[whole] - expected).mean() < 6
    assert np.array_equal(near[119, 75:93], np.sort(near[119, 75:93]))
    assert near[113:125, 74:94].min() <= 1 and near[113:125, 74:94].max() >= 254
    near[113:125, 74:94] = 0
    assert not near[layer[..., 3] == 0].any()


def test_depth_of_a_flat_layer_is_that_of_the_nearest(detectors):
    flat = np.zeros((64, 64, 4), np.uint8)
    flat[10:50, 5:60] = (77, 130, 200, 255)
    depth = detectors["depth"].draw(flat)
    assert (depth[10:50, 5:60] == 255).all()
    depth[10:50, 5:60] = 0
    assert not depth.any()


def opened(folder, file, **entry):
    """The one detector of a models.yaml, of kind `other`."""
    models = networks.models_file(folder, {"other": {"file": file, **entry}})
    return open_detectors(models, threads=1)["other"]


def test_what_is_inverted_is_the_other_way_round(files, tmp_path):
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[..., :3] = np.linspace(10, 200, 64)[:, None]
    plain, inverted = [
        opened(tmp_path, str(files / "brightness.onnx"), form="depth", side=64, invert=invert)
        for invert in (False, True)
    ]
    near = plain.draw(pixels)[..., 0].astype(int)
    assert near[0, 0] == 0 and near[0, -1] == 255
    assert np.abs(255 - near - inverted.draw(pixels)[..., 0]).max() <= 1
    lines = opened(tmp_path, str(files / "sobel.onnx"), form="edges", invert=True).draw(pixels)
    drawn = opened(tmp_path, str(files / "sobel.onnx"), form="edges").draw(pixels)
    assert drawn.any() and np.abs(255.0 - drawn - lines).max() <= 1


def test_mean_and_deviation_are_the_operators(files, tmp_path):
    pixels = np.full((64, 64, 4), (51, 102, 153, 255), np.uint8)
    file = str(files / "brightness.onnx")
    (plain,) = np.unique(opened(tmp_path, file, form="edges", side=64).draw(pixels))
    assert plain == 102
    told = {"mean": [0.1, 0, 0.2], "std": [0.5, 2, 1]}
    (normal,) = np.unique(opened(tmp_path, file, form="edges", side=64, **told).draw(pixels))
    assert normal == round(255 * (0.1 / 0.5 + 0.4 / 2 + 0.4) / 3)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("size", [(40, 56), (64, 32)])
def test_a_file_may_have_its_own_size_and_a_map_with_or_without_channel(tmp_path, size, keepdims):
    networks.brightness(tmp_path / "x.onnx", size=size, keepdims=keepdims)
    pixels = np.zeros((96, 96, 4), np.uint8)
    pixels[20:80, 30:60] = (90, 90, 90, 255)
    pixels[40:70, 40:50, :3] = 210
    near = opened(tmp_path, "x.onnx", form="depth").draw(pixels)[..., 0]
    assert near[55, 45] == 255 and near[25, 32] == 0
    assert not near[:20].any() and not near[:, 60:].any()


# Of poses.

# Where the dots are on a cut-out of 64 x 48, x and y, in COCO's order.
DOTS = np.array(
    [
        *([24, 8], [28, 4], [20, 4], [32, 7], [16, 7]),
        *([33, 14], [15, 14], [39, 22], [9, 22], [44, 30], [4, 30]),
        *([29, 34], [19, 34], [31, 46], [17, 46], [32, 60], [15, 60]),
    ]
)


def person(*, radius=0, missing=(), blurred=()):
    """An opaque cut-out with a dot for each keypoint; `blurred` ones are hard to tell."""
    pixels = np.zeros((64, 48, 4), np.uint8)
    pixels[..., 3] = 255
    for number, (x, y) in enumerate(DOTS):
        if number not in missing:
            level = networks.LEVELS[number] + (9 if number in blurred else 0)
            reach = (slice(y - radius, y + radius + 1), slice(x - radius, x + radius + 1))
            pixels[reach] = (level, networks.GREEN, 0, 255)
    return pixels


def drawn(points, *, unseen=(), canvas=CANVAS):
    is_seen = ~np.isin(np.arange(17), unseen)
    return skeleton(np.float64(points), is_seen, width=canvas.width, height=canvas.height)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_pose_is_the_skeleton_of_the_keypoints_on_the_canvas(compositor):
    """The file is shown 80 x 60 pixels, which is the box with its padding: one for each of the canvas."""
    fields = {"transform": {"x": 54, "y": 60}, "structure": [{"kind": "pose"}]}
    control = await compositor.control((person(missing=(9,), blurred=(16,)), fields))
    expected = drawn(DOTS + np.array([30, 28]), unseen=(9, 16))
    expected[on_canvas(person(), fields)[..., 3] == 0] = 0
    assert np.array_equal(control["pose"], expected)
    assert not np.array_equal(expected, drawn(DOTS + np.array([30, 28])))


@pytest.mark.parametrize(
    ("transform", "turn"),
    [
        ({"scale": 1.5, "x": 45, "y": 60}, lambda p: p),
        ({"rotation": 90, "x": 50, "y": 60}, lambda p: p[:, ::-1] * (-1, 1)),
        ({"rotation": 180, "scale": 1.25, "x": 50, "y": 66}, lambda p: -p),
        ({"flip_horizontal": True, "scale": 1.75, "x": 47, "y": 61}, lambda p: p * (-1, 1)),
    ],
)
def test_keypoints_are_found_wherever_the_layer_lies(detectors, monkeypatch, transform, turn):
    found = []
    monkeypatch.setattr(
        detector,
        "skeleton",
        lambda points, seen, **size: found.append((points, seen)) or drawn(points),
    )
    layer = place(person(radius=1), Transform(**transform), CANVAS).on(CANVAS)
    detectors["pose"].draw(layer)
    ((points, is_seen),) = found
    centre = (transform["x"], transform["y"])
    # Dots are three pixels wide, and the first place of equals counts.
    expected = turn(DOTS + 0.5 - (24, 32)) * transform.get("scale", 1) + centre - 0.5
    assert is_seen.all()
    assert np.abs(points - expected).max() < 2.5


def test_every_joint_has_its_colour_and_limbs_the_shade_of_theirs():
    """Names and colours as OpenPose's documentation of its body of 18 points has them."""
    size = {"width": 512, "height": 512}
    points = DOTS * 8.0
    picture = skeleton(points, np.ones(17, bool), **size)
    colours = {
        "nose": (0, (255, 0, 0)),
        "right shoulder": (6, (255, 170, 0)),
        "right elbow": (8, (255, 255, 0)),
        "right wrist": (10, (170, 255, 0)),
        "left shoulder": (5, (85, 255, 0)),
        "left elbow": (7, (0, 255, 0)),
        "left wrist": (9, (0, 255, 85)),
        "right hip": (12, (0, 255, 170)),
        "right knee": (14, (0, 255, 255)),
        "right ankle": (16, (0, 170, 255)),
        "left hip": (11, (0, 85, 255)),
        "left knee": (13, (0, 0, 255)),
        "left ankle": (15, (85, 0, 255)),
        "right eye": (2, (170, 0, 255)),
        "left eye": (1, (255, 0, 255)),
        "right ear": (4, (255, 0, 170)),
        "left ear": (3, (255, 0, 85)),
    }
    for name, (number, colour) in colours.items():
        x, y = points[number].astype(int)
        assert tuple(picture[y, x]) == colour, name
    neck = points[[5, 6]].mean(axis=0).astype(int)
    assert tuple(picture[neck[1], neck[0]]) == (255, 85, 0)
    # From neck to right shoulder, and from left knee to left ankle.
    for ends, colour in (
        ((neck, points[6]), (153, 0, 0)),
        ((points[13], points[15]), (0, 51, 153)),
    ):
        x, y = ((ends[0] + ends[1]) / 2).astype(int)
        assert tuple(picture[y, x]) == colour
    assert len({tuple(p) for p in picture.reshape(-1, 3)}) == 1 + 18 + 17
    # A joint is a disc of radius 4 on such a canvas; without the shoulders there is no neck.
    assert (picture[int(points[9, 1]), :] == (0, 255, 85)).all(axis=1).sum() == 9
    seen = np.ones(17, bool)
    seen[6] = False
    assert not (skeleton(points, seen, **size) == (255, 85, 0)).all(axis=2).any()


@pytest.mark.parametrize("keypoints", [26, 133])
def test_more_keypoints_than_cocos_body_are_left_out(files, tmp_path, keypoints):
    networks.dots(tmp_path / "more.onnx", keypoints=keypoints)
    more, plain = (
        opened(tmp_path, file, form="pose") for file in ("more.onnx", str(files / "dots.onnx"))
    )
    assert plain.draw(person()).any()
    assert np.array_equal(more.draw(person()), plain.draw(person()))


def test_the_least_confidence_is_the_operators(files, tmp_path):
    shy, bold = (
        opened(tmp_path, str(files / "dots.onnx"), form="pose", confidence=least)
        for least in (0.3, 0)
    )
    dim = person(blurred=(16,))
    assert np.array_equal(bold.draw(dim), drawn(DOTS, canvas=Extent(width=48, height=64)))
    assert not np.array_equal(shy.draw(dim), bold.draw(dim))


# Of requests.


@pytest.mark.asyncio(loop_scope="module")
async def test_a_collage_may_have_every_kind_at_once(compositor, detectors):
    one = (person(), {"transform": {"x": 30, "y": 40}})
    two = (cutout(40, 40), {"transform": {"x": 60, "y": 100, "rotation": 20}})
    pose = {"structure": [{"kind": "pose"}, {"kind": "canny"}]}
    both = {"structure": [{"kind": "softedge"}, {"kind": "depth"}, {"kind": "canny"}]}
    control = await compositor.control((one[0], {**one[1], **pose}), (two[0], {**two[1], **both}))
    assert sorted(control) == ["canny", "depth", "pose", "softedge"]
    upper = on_canvas(*two)[..., 3] >= 128
    for kind in ("softedge", "depth", "canny"):
        expected = detectors[kind].draw(on_canvas(*two))
        assert expected.any() and np.array_equal(control[kind][upper], expected[upper])
    clear = on_canvas(*two)[..., 3] == 0
    expected = detectors["pose"].draw(on_canvas(*one))
    assert np.array_equal(control["pose"][clear], expected[clear])


def test_threads_draw_what_one_draws(models, detectors):
    layers = [
        on_canvas(cutout(60, 50, seed=i), {"transform": {"x": 40, "y": 50}}) for i in range(4)
    ]
    expected = [detectors[kind].draw(layer) for layer in layers for kind in KINDS]
    fresh = open_detectors(models, threads=1)
    made = {}

    def work(number):
        made[number] = [fresh[kind].draw(layer) for layer in layers for kind in KINDS]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in made.values():
        assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(made) == 4


def test_what_a_network_gave_is_kept_up_to_a_size(models, monkeypatch):
    (source,) = (each for each in read_detectors(models) if each.kind == "softedge")
    sobel = Network(source, threads=1)
    runs = []
    given = sobel._given
    monkeypatch.setattr(sobel, "_given", lambda pixels: runs.append(1) or given(pixels))
    pictures = [cutout(SIDE, SIDE, seed=seed)[..., :3] for seed in range(3)]
    first = [sobel.run(picture) for picture in pictures]
    again = [sobel.run(picture) for picture in pictures]
    assert len(runs) == 3
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr(network, "MAX_KEPT_BYTES", 2 * first[0][0].nbytes)
    sobel.run(cutout(SIDE, SIDE, seed=3)[..., :3])
    # The two used last are left.
    sobel.run(pictures[2])
    assert len(runs) == 4
    sobel.run(pictures[1])
    assert len(runs) == 5


def request_of(*kinds):
    image = {"blob": {"sha256": "0" * 64, "size_bytes": 1}}
    structure = [{"kind": kind} for kind in kinds]
    layer = {"name": "a", "image": image, "text": "x", "structure": structure}
    size = {"width": 64, "height": 64}
    return compositor_service_pb2.ComposeRequest(
        latent_factor=8, collage={"size": size, "layers": [layer]}
    )


def test_a_plate_is_named_after_the_file_that_draws_for_it_and_its_settings(files, tmp_path):
    def digest(request, **entry):
        entry = {"file": str(files / "sobel.onnx"), "form": "edges", **entry}
        models = networks.models_file(tmp_path, {"other": entry})
        drawn = open_detectors(models, threads=1).items()
        return parse(request, {kind: detector.digest for kind, detector in drawn}).digest()

    names = {
        digest(request_of("other")),
        digest(request_of("other"), file=str(files / "brightness.onnx")),
        digest(request_of("other"), form="depth"),
        digest(request_of("other"), side=64),
        digest(request_of("other"), invert=True),
        digest(request_of("other"), mean=[0.1, 0, 0]),
        digest(request_of("other"), std=[1, 1, 2]),
        digest(request_of("other", "canny")),
    }
    assert len(names) == 8
    assert digest(request_of("other")) in names
    pose = {"file": str(files / "dots.onnx"), "form": "pose"}
    shy = digest(request_of("other"), **pose, confidence=0.5)
    assert shy != digest(request_of("other"), **pose)
    # What it does not draw for does not change, nor does what brings its own picture.
    plain = parse(request_of("canny")).digest()
    assert digest(request_of("canny")) == plain
    brought = request_of("other")
    brought.collage.layers[0].structure[0].image.blob.sha256 = "1" * 64
    brought.collage.layers[0].structure[0].image.blob.size_bytes = 1
    assert digest(brought) == digest(brought, invert=True)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_kind_that_nothing_draws_is_refused_and_those_that_are_drawn_are_named(compositor):
    request = await compositor.request((person(), {"structure": [{"kind": "normal"}]}))
    with pytest.raises(grpc.RpcError) as caught:
        await compositor.stub.Compose(request, timeout=LIMIT_S)
    error = from_rpc(caught.value)
    assert isinstance(error, InvalidRequest)
    (violation,) = error.violations
    assert violation.field == "collage.layers[0].structure[0].kind"
    assert violation.description.endswith("only of kind canny, softedge, depth, pose")


# Of files and settings.

GOOD = {"file": "sobel.onnx", "form": "edges"}


@pytest.mark.parametrize(
    ("detectors", "told"),
    [
        ([1], r"models.yaml: detectors: is \[1\]; required: a mapping of names"),
        ({"a b": GOOD}, "detectors: has the name 'a b'"),
        ({"x": "sobel.onnx"}, "detectors.x: is 'sobel.onnx'; required: a mapping with the keys"),
        ({"x": None}, "detectors.x.form: is missing; allowed: edges, depth, pose"),
        ({"x": {"form": "edges"}}, "detectors.x.file: is missing; required: a file"),
        ({"x": {**GOOD, "file": 3}}, "detectors.x.file: is 3; required: a file"),
        ({"x": {**GOOD, "form": "normal"}}, "x.form: is 'normal'; allowed: edges, depth, pose"),
        ({"x": {**GOOD, "size": 3}}, "detectors.x: has the key 'size'; allowed: file, form, side"),
        ({"x": {**GOOD, "confidence": 0.5}}, "has the key 'confidence'; allowed: file, form, side"),
        ({"x": {**GOOD, "form": "pose", "side": 64}}, "has the key 'side'; allowed: file, form, m"),
        ({"x": {**GOOD, "side": 2048}}, "side: is 2048; allowed: a whole number from 32 to 1024"),
        ({"x": {**GOOD, "mean": 0.5}}, "x.mean: is 0.5; required: a list"),
        ({"x": {**GOOD, "mean": [0.5, 0.5]}}, r"x.mean: is \[0.5, 0.5\]; required: three numbers"),
        ({"x": {**GOOD, "std": [1, 1, 0]}}, r"x.std\[2\]: is 0; allowed: a number from 0.001"),
        ({"x": {**GOOD, "invert": 1}}, "x.invert: is 1; allowed: true, false"),
        (
            {"x": {**GOOD, "form": "pose", "confidence": 2}},
            "x.confidence: is 2; allowed: a number from 0 to 1",
        ),
        ({"canny": GOOD}, "detectors.canny: is .*; allowed: another kind, as this one is drawn"),
        ({"x": {**GOOD, "file": "no.onnx"}}, "x.file: is 'no.onnx'; .* read: No such file"),
        ({"x": {**GOOD, "file": "."}}, "x.file: is '.'; .* cannot be read: Is a directory"),
        ({"x": {**GOOD, "file": "bad.onnx"}}, "x.file: is 'bad.onnx'; required: a whole ONNX file"),
        ({"x": {**GOOD, "file": "cut.onnx"}}, "x.file: is 'cut.onnx'; required: a whole ONNX file"),
        ({"x": {**GOOD, "file": "empty.onnx"}}, "x.file: is 'empty.onnx'; required: a whole ONNX"),
        ({"x": {**GOOD, "file": "parts.onnx"}}, "x.file: .*a whole ONNX file, its weights in it"),
        ({"x": {**GOOD, "file": "dots.onnx"}}, "for form edges: one output; it has simcc_x, simcc"),
        ({"x": {**GOOD, "form": "pose"}}, r"for form pose: an input of one size; it takes \[1, 3,"),
        (
            {"x": {"file": "fixed.onnx", "form": "pose"}},
            "for form pose: the outputs simcc_x and simcc_y; it has y",
        ),
        (
            {"x": {"file": "fifteen.onnx", "form": "pose"}},
            "keypoints first, 17, 26, 133 in all; it gives 1 x 15 x 120 and 1 x 15 x 160",
        ),
        (
            {"x": {**GOOD, "file": "fixed.onnx", "side": 64}},
            "x.side: is 64; allowed: nothing, as the file takes 48 x 64 only",
        ),
        (
            {"x": {**GOOD, "file": "large.onnx"}},
            "with sides from 32 to 1024; it takes 2048 x 2048",
        ),
        ({"x": {**GOOD, "file": "grey.onnx"}}, "one input of float32, 1 x 3 .* it takes tensor"),
        ({"x": {**GOOD, "file": "pair.onnx"}}, "one input of float32, 1 x 3 .* it takes tensor"),
        ({"x": {**GOOD, "file": "colour.onnx"}}, "one map, 1 x 1 .* it gives 1 x 3 x 512 x 512"),
        ({"x": {**GOOD, "file": "number.onnx", "side": 64}}, "one map, .* it gives 1$"),
        (
            {"x": {**GOOD, "file": "tall.onnx", "side": 64}},
            "shape; for 64 x 64 pixels it gives 1 x 1",
        ),
        (
            {"x": {**GOOD, "file": "sized.onnx", "side": 40}},
            "x.side: is 40; .* 40 x 40 pixels; it f",
        ),
        ({"x": {**GOOD, "file": "sized.onnx"}}, "x.file: .* takes 512 x 512 pixels; it fails"),
    ],
)
def test_a_wrong_entry_or_file_stops_the_start_and_is_named(bad_files, detectors, told):
    models = networks.models_file(bad_files, detectors)
    with pytest.raises(InvalidSetting, match=told):
        open_detectors(models, threads=1)


@pytest.fixture(scope="module")
def bad_files(files, tmp_path_factory):
    """The good files, and bad ones beside them."""
    files = shutil.copytree(files, tmp_path_factory.mktemp("bad") / "files")
    save, one = networks._save, networks.helper.make_node
    whole = (files / "sobel.onnx").read_bytes()
    (files / "bad.onnx").write_bytes(b"GIF89a, not a network")
    (files / "cut.onnx").write_bytes(whole[:-40])
    (files / "empty.onnx").write_bytes(b"")
    weight = {"w": np.ones((1, 3, 1, 1), np.float32)}
    summed = [one("Conv", ["x", "w"], ["y"])]
    # A kernel of one pixel onnxruntime could not take from beside the file in any case.
    wide = {"w": np.ones((1, 3, 9, 9), np.float32)}
    save(files / "parts.onnx", summed, wide, size=("h", "w"), external=True)
    save(files / "fixed.onnx", summed, weight, size=(64, 48))
    save(files / "large.onnx", summed, weight, size=(2048, 2048))
    mean = [one("ReduceMean", ["x"], ["y"], axes=[1])]
    save(files / "grey.onnx", mean, {}, size=("h", "w"), channels=1)
    save(files / "pair.onnx", mean, {}, size=("h", "w"), batch=2)
    save(files / "colour.onnx", [one("Relu", ["x"], ["y"])], {}, size=("h", "w"))
    number = [one("ReduceMean", ["x"], ["y"], axes=[1, 2, 3], keepdims=0)]
    save(files / "number.onnx", number, {}, size=("h", "w"))
    tall = [*[one("ReduceMean", ["x"], ["z"], axes=[1])], one("Concat", ["z", "z"], ["y"], axis=2)]
    save(files / "tall.onnx", tall, {}, size=("h", "w"))
    added = {"a": np.ones((1, 1, 64, 64), np.float32)}
    sized = [one("ReduceMean", ["x"], ["z"], axes=[1]), one("Add", ["z", "a"], ["y"])]
    save(files / "sized.onnx", sized, added, size=("h", "w"))
    networks.dots(files / "fifteen.onnx", keypoints=15)
    return files


def test_weights_beside_the_file_are_refused_wherever_the_process_runs(bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    with pytest.raises(InvalidSetting, match="its weights in it"):
        opened(bad_files, "parts.onnx", form="edges")


def test_a_file_that_fits_at_its_side_is_taken(bad_files):
    assert opened(bad_files, "sized.onnx", form="edges", side=64).draw(person()).any()


def test_without_onnxruntime_the_extra_is_named_and_canny_is_there(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InvalidSetting, match=r"detectors.softedge.file: .* onnxruntime, of this"):
        open_detectors(models, threads=1)
    assert list(open_detectors("mini=somewhere", threads=1)) == ["canny"]
    assert list(open_detectors("", threads=1)) == ["canny"]
    assert list(open_detectors(networks.models_file(tmp_path, {}), threads=1)) == ["canny"]


def test_a_window_has_the_layer_in_its_middle():
    alpha = np.zeros((40, 60), np.uint8)
    alpha[10:20, 30:50] = 1
    window = Window.around(alpha, width=32, height=32, largest_scale=1)
    assert (window.rows, window.columns) == (range(-1, 31), range(24, 56))
    assert Window.around(alpha, width=80, height=80).columns == range(30, 50)
    wide = Window.around(alpha, width=80, height=40, padding=1.5)
    assert (wide.rows, wide.columns) == (range(7, 22), range(25, 55))
    canvas = np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)
    assert np.array_equal(window.seen(canvas)[1:], canvas[0:31, 24:56])
    assert np.array_equal(window.seen(canvas)[0], canvas[0, 24:56])
    laid = window.laid(np.ones((32, 32), np.float32), alpha.shape)
    assert laid[:31, 24:56].all() and laid.sum() == 31 * 32


# Of a whole system.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory, files):
    found = {
        "softedge": {"file": str(files / "sobel.onnx"), "form": "edges"},
        "normal": {"file": str(files / "sobel.onnx"), "form": "edges"},
    }
    kinds = ("canny", "depth", "softedge")
    folder = tmp_path_factory.mktemp("system")
    async with system_tools.running(folder, kinds=kinds, detectors=found) as system:
        yield system


@pytest.mark.asyncio(loop_scope="module")
async def test_a_model_says_which_of_its_kinds_are_drawn(system):
    for _ in range(2):
        answer = await system.stub.ListModels(pb.ListModelsRequest(), timeout=LIMIT_S)
        (model,) = answer.models
        assert list(model.control_kinds) == ["canny", "depth", "softedge"]
        assert list(model.drawn_control_kinds) == ["canny", "softedge"]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_picture_is_drawn_with_a_detected_kind_and_one_without_is_refused(system):
    async def digest(*structure):
        layers = [
            system_tools.layer("a", structure=structure),
            system_tools.layer("b", seed=1, x=22),
        ]
        request = pb.GenerateImagesRequest(
            collage=system_tools.collage(layers=layers), sampling={"steps": 4, "seed": 1}
        )
        (image,) = [e.image for e in await system.generate(request) if e.HasField("image")]
        return image.blob.sha256

    plain, edges = await digest(), await digest({"kind": "softedge"})
    assert plain != edges == await digest({"kind": "softedge"})
    with pytest.raises(grpc.RpcError) as caught:
        await digest({"kind": "softedge"}, {"kind": "depth"})
    (violation,) = from_rpc(caught.value).violations
    assert violation.field == "collage.layers[0].structure[1].kind"
    assert "'depth', which needs an image" in violation.description.replace('"', "'")
    assert violation.description.endswith("only of kind canny, softedge, normal")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_system_does_not_start_with_a_detector_that_is_not_there(tmp_path):
    found = {"depth": {"file": "depth.onnx", "form": "depth"}}
    with pytest.raises(InvalidSetting, match=r"detectors.depth.file: is 'depth.onnx'"):
        async with asyncio.timeout(LIMIT_S):
            async with system_tools.running(tmp_path, detectors=found):
                pass
