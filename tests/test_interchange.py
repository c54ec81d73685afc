"""Files of other tools: round trips, files as those tools write them, and files that are meant to harm."""

import io
import json
import random
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from PIL import Image
from psd_tools import PSDImage
from psd_tools.constants import BlendMode, Compression

from collage.v1 import collage_pb2
from collage_client import files
from interchange import archive, asking, bounds, work
from interchange.drawing import Scene
from interchange.stack import BACKGROUND_NAME, RESULT_NAME
from services.common.errors import InvalidRequest
from services.common.pictures import decode, encode_png

ROOT = Path(__file__).parents[1]
WORDS = [
    "a cake",
    "quotes \" ' & <b>",
    "two\nlines\tand a tab",
    "寿司 🍣",
    "form\ffeed\vtab",
    "￾",
    " ",
]
# Numbers that a binary fraction does not hold, and ones that it does.
KINDS = [
    *(("PNG", mode) for mode in ("RGBA", "RGB", "P", "LA")),
    ("JPEG", "RGB"),
    ("WEBP", "RGBA"),
]
PLACES = [0.1, 17.0, 31.5, -20.25, 64.333333, 200.0]


def picture(rng, width, height, kind="PNG", mode="RGBA", **options):
    """An encoded picture of soft blobs."""
    noise = rng.random((height, width, 4))
    pixels = (noise * 255).astype(np.uint8)
    pixels[..., 3] = np.where(noise[..., 3] > 0.3, pixels[..., 3], 0)
    image = Image.fromarray(pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def generated(seed):
    """A collage of everything that one may hold."""
    rng, dice = np.random.default_rng(seed), random.Random(seed)
    made = collage_pb2.Collage(prompt=dice.choice(WORDS), negative_prompt=dice.choice(["", *WORDS]))
    made.size.width, made.size.height = dice.choice([(64, 64), (96, 48), (128, 128)])
    ground = dice.choice(["none", "empty", "color", "picture", "stretched"])
    if ground == "empty":
        made.background.SetInParent()
    elif ground == "color":
        made.background.color.red = dice.randrange(256)
    elif ground != "none":
        size = (made.size.width, made.size.height) if ground == "picture" else (20, 31)
        made.background.image.data = picture(rng, *size, mode="RGB")
    for index in range(dice.randint(1, 6)):
        layer = made.layers.add(name=f"layer_{index}-{dice.choice('abc')}", text=dice.choice(WORDS))
        kind, mode = dice.choice(KINDS)
        layer.image.data = picture(rng, dice.randint(1, 50), dice.randint(1, 50), kind, mode)
        where = dice.choice(["centre", "empty", "whole", "anywhere", "turned", "beyond"])
        width, height = Image.open(io.BytesIO(layer.image.data)).size
        if where == "empty":
            layer.transform.SetInParent()
        elif where == "whole":
            layer.transform.x = dice.randint(-9, 60) + width / 2
            layer.transform.y = dice.randint(-9, 60) + height / 2
        elif where == "beyond":
            layer.transform.x = 10_000
        elif where != "centre":
            layer.transform.x, layer.transform.y = dice.choice(PLACES), dice.choice(PLACES)
        if where == "turned":
            layer.transform.scale = dice.choice([0.3, 1.0, 2.7])
            layer.transform.rotation = dice.choice([0.0, 90.0, -33.3])
            layer.transform.flip_horizontal = dice.random() < 0.5
            layer.transform.flip_vertical = dice.random() < 0.5
        for name, values in {
            "opacity": [0.0, 0.1, 1 / 3, 1.0],
            "visible": [True, False],
            "noise": [0.0, 0.7],
            "attract": [1.0, 0.123456789012345],
            "repel": [0.0],
            "seed": [0, 2**64 - 1],
        }.items():
            if dice.random() < 0.5:
                setattr(layer, name, dice.choice(values))
        if dice.random() < 0.4:
            layer.structure.add(kind="canny", emphasis=0.5)
        if dice.random() < 0.4:
            layer.structure.add(kind="depth", end=0.5).image.data = picture(rng, 8, 9, mode="RGB")
        if dice.random() < 0.3:
            layer.appearance.learn, layer.appearance.vectors = True, 2
        elif dice.random() < 0.3:
            layer.appearance.word, layer.appearance.weight = "words/abc", 0.25
    return made


def simple(width=64, height=48):
    """Two layers, moved by whole pixels."""
    rng = np.random.default_rng(5)
    made = collage_pb2.Collage(prompt="{low} under {high}")
    made.size.width, made.size.height = width, height
    for name, left, top in (("low", 4, 6), ("high", 20, 10)):
        layer = made.layers.add(name=name, text=f"a {name}", noise=0.25, seed=7)
        layer.image.data = picture(rng, 16, 12)
        layer.transform.x, layer.transform.y = left + 8, top + 6
    return made


def entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def rezipped(parts):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in parts.items():
            opened.writestr(name, data)
    return file.getvalue()


def edited(data, **changes):
    """An archive with entries replaced: by bytes, or by what a function makes of them; None takes one out."""
    parts = entries(data)
    for name, change in changes.items():
        if change is None:
            del parts[name]
        else:
            parts[name] = change(parts[name]) if callable(change) else change
    return rezipped(parts)


def refusal(data):
    with pytest.raises(InvalidRequest) as caught:
        work.opened(data)
    return caught.value.violations[0]


@pytest.mark.parametrize("seed", range(30))
def test_a_collage_comes_back_from_openraster_as_it_was(seed):
    collage = generated(seed)
    data = work.saved(collage, "ora")
    back, warnings = work.opened(data)
    assert back == collage
    assert warnings == []
    # And equal collages have equal files.
    assert work.saved(back, "ora") == data


@pytest.mark.parametrize("seed", range(0, 30, 3))
def test_a_collage_comes_back_from_a_zipped_folder_as_it_was(seed):
    collage = generated(seed)
    # YAML has no vertical tab, and reads what is empty as absent.
    back, warnings = work.opened(work.saved(collage, "zip"))
    assert [layer.image for layer in back.layers] == [layer.image for layer in collage.layers]
    assert [layer.transform for layer in back.layers] == [
        layer.transform for layer in collage.layers
    ]
    assert [layer.noise for layer in back.layers] == [layer.noise for layer in collage.layers]
    assert warnings == []


def test_an_openraster_file_is_what_the_format_asks_for():
    collage = generated(3)
    data = work.saved(collage, "ora", encode_png(np.zeros(shape(collage), np.uint8)))
    # The kind is told by bytes 38 to 54 of the file.
    assert data[30:38] == b"mimetype"
    assert data[38:54] == b"image/openraster"
    parts = entries(data)
    assert {"stack.xml", "mergedimage.png", "Thumbnails/thumbnail.png"} < {*parts}
    thumbnail = Image.open(io.BytesIO(parts["Thumbnails/thumbnail.png"]))
    assert max(thumbnail.size) <= 256
    assert f'name="{RESULT_NAME}"' in parts["stack.xml"].decode().split("<layer")[1]


def shape(collage):
    return collage.size.height, collage.size.width, 3


@pytest.mark.parametrize("seed", range(0, 30, 5))
def test_other_tools_see_what_the_compositor_makes(seed):
    """The layers of the file laid over one another, by a few lines that know nothing of ours."""
    collage = generated(seed)
    data = work.saved(collage, "ora")
    parts = entries(data)
    stripped = parts["stack.xml"].decode()
    assert "collage:" in stripped
    tree = ElementTree.fromstring(stripped)
    canvas = np.zeros((collage.size.height, collage.size.width, 3))
    for layer in reversed(tree.findall("./stack/layer")):
        if layer.get("visibility", "visible") == "hidden":
            continue
        full = Image.new("RGBA", canvas.shape[1::-1])
        full.paste(
            Image.open(io.BytesIO(parts[layer.get("src")])).convert("RGBA"),
            (int(layer.get("x")), int(layer.get("y"))),
        )
        pixels = np.asarray(full).astype(float)
        alpha = pixels[..., 3:] / 255 * float(layer.get("opacity", "1"))
        canvas = canvas * (1 - alpha) + pixels[..., :3] * alpha
    merged = np.asarray(Image.open(io.BytesIO(parts["mergedimage.png"])).convert("RGB"))
    scene = Scene(collage)
    list(scene.sheets())
    assert np.array_equal(merged, scene.composite_HW3())
    # Each layer was rounded to eight bits once.
    assert np.abs(canvas - merged).max() < 2.5


def test_a_layer_that_another_tool_moved_is_moved():
    collage = generated(4)
    data = work.saved(collage, "ora")

    def move(stack):
        head, tail = stack.decode().split("<layer ", 1)
        old = tail.split(' x="', 1)[1].split('"', 1)[0]
        return (head + "<layer " + tail.replace(f' x="{old}"', f' x="{int(old) + 5}"', 1)).encode()

    back, _ = work.opened(edited(data, **{"stack.xml": move}))
    top, was = back.layers[-1], collage.layers[-1]
    centre = was.transform.x if was.transform.HasField("x") else collage.size.width / 2
    assert top.transform.x == centre + 5
    assert top.image == was.image
    assert list(back.layers[:-1]) == list(collage.layers[:-1])


def test_what_another_tool_painted_counts_and_the_words_stay():
    collage = generated(4)
    data = work.saved(collage, "ora")
    name = next(name for name in entries(data) if name.startswith("data/00"))
    painted = encode_png(np.full((9, 11, 4), 200, np.uint8))
    back, _ = work.opened(edited(data, **{name: painted}))
    layer, was = back.layers[0], collage.layers[0]
    assert layer.image.data == painted
    assert (layer.text, layer.structure, layer.seed) == (was.text, was.structure, was.seed)
    assert not layer.transform.HasField("scale")
    assert list(back.layers[1:]) == list(collage.layers[1:])


def test_a_picture_saved_again_by_another_tool_is_still_the_same():
    collage = generated(4)

    def again(data):
        pixels = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
        pixels[pixels[..., 3] == 0] = 77
        pixels[pixels[..., 3] == 0, 3] = 0
        pixels[np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3] == 0, 3] = 0
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=1)
        return file.getvalue()

    data = work.saved(collage, "ora")
    names = [name for name in entries(data) if name.startswith("data/0")]
    back, _ = work.opened(edited(data, **dict.fromkeys(names, again)))
    for layer, was in zip(back.layers, collage.layers, strict=True):
        assert np.array_equal(seen(layer.image.data), seen(was.image.data))
        assert (layer.transform, layer.text) == (was.transform, was.text)


def seen(data):
    pixels = decode(data).copy()
    pixels[pixels[..., 3] == 0] = 0
    return pixels


def test_result_and_background_are_known_by_their_names_where_a_tool_dropped_our_attributes():
    collage = simple()
    collage.background.color.green = 200
    result = encode_png(np.full((48, 64, 3), 9, np.uint8))
    data = work.saved(collage, "ora", result)

    def strip(stack):
        return stack.replace(b"urn:collage-diffusion", b"urn:another")

    back, warnings = work.opened(edited(data, **{"stack.xml": strip}))
    assert [layer.name for layer in back.layers] == ["low", "high"]
    assert [layer.text for layer in back.layers] == ["low", "high"]
    assert back.background.color.green == 200
    assert [each.reason for each in warnings] == ["RESULT_LEFT_OUT"]
    for layer, was in zip(back.layers, collage.layers, strict=True):
        assert layer.image == was.image
        assert layer.transform == was.transform


@pytest.mark.parametrize("form", ["ora", "psd"])
def test_of_many_layers_of_our_own_names_none_but_the_outermost_is_taken(form):
    collage = simple()
    result = encode_png(np.full((48, 64, 3), 9, np.uint8))
    names = [RESULT_NAME, BACKGROUND_NAME]
    if form == "ora":

        def renamed(stack):
            text = stack.replace(b"urn:collage-diffusion", b"urn:another").decode()
            for was, name in zip(("low", "high"), names, strict=True):
                text = text.replace(f'name="{was}"', f'name="{name}"')
            return text.encode()

        data = edited(work.saved(collage, "ora", result), **{"stack.xml": renamed})
    else:
        file = PSDImage.open(io.BytesIO(work.saved(collage, "psd", result)))
        for layer in file:
            if layer.name in ("low", "high"):
                layer.name = names[layer.name == "high"]
        made = io.BytesIO()
        file.save(made)
        data = made.getvalue()
    back, warnings = work.opened(data)
    assert [layer.text for layer in back.layers] == names
    assert [each.reason for each in warnings] == ["RESULT_LEFT_OUT"]


@pytest.mark.parametrize("form", ["ora", "zip"])
def test_a_picture_named_again_and_again_is_counted_each_time(form):
    large = picture(np.random.default_rng(0), 1024, 1024)
    assert 2**21 < len(large) < 2**23
    times = bounds.MAX_COLLAGE_BYTES // len(large) + 1
    if form == "ora":
        data = work.saved(simple(), "ora")
        told = json.dumps([{"kind": "canny", "image": {"path": "data/large.png"}}] * times)

        def structured(stack):
            ours = f'collage:structure={quoteattr(told)} name="low"'.encode()
            return stack.replace(b'name="low"', ours)

        data = rezipped(
            {**entries(edited(data, **{"stack.xml": structured})), "data/large.png": large}
        )
    else:
        layer = {"name": "a", "text": "b", "image": {"path": "large.png"}}
        layer["structure"] = [{"kind": "canny", "image": {"path": "large.png"}}] * times
        text = json.dumps({"size": {"width": 64, "height": 48}, "layers": [layer]})
        data = rezipped({"collage.yaml": text.encode(), "large.png": large})
    assert "brings all pictures to" in refusal(data).description


def test_a_psd_holds_the_pixels_that_other_tools_are_to_see():
    collage = simple()
    collage.layers[0].opacity = 0.4
    collage.layers[1].visible = False
    result = encode_png(np.full((48, 64, 3), 9, np.uint8))
    data = work.saved(collage, "psd", result)
    file = PSDImage.open(io.BytesIO(data))
    assert [layer.name for layer in file] == [BACKGROUND_NAME, "low", "high", RESULT_NAME]
    assert [layer.visible for layer in file] == [True, True, False, True]
    # What tools show that read no layers.
    assert np.array_equal(np.asarray(file.topil().convert("RGB")), decode(result)[..., :3])
    back, warnings = work.opened(data)
    assert [each.reason for each in warnings] == ["RESULT_LEFT_OUT"]
    assert [layer.name for layer in back.layers] == ["low", "high"]
    assert back.layers[0].opacity == pytest.approx(0.4)
    assert back.layers[1].visible is False
    for layer, was in zip(back.layers, collage.layers, strict=True):
        assert np.array_equal(decode(layer.image.data), decode(was.image.data))
        assert layer.transform == was.transform


@pytest.mark.parametrize("seed", range(0, 30, 4))
def test_pixels_go_through_psd_exactly(seed):
    first, _ = work.opened(work.saved(generated(seed), "psd"))
    second, _ = work.opened(work.saved(first, "psd"))
    for layer, was in zip(second.layers, first.layers, strict=True):
        assert np.array_equal(decode(layer.image.data), decode(was.image.data))
        assert (layer.name, layer.transform) == (was.name, was.transform)
    assert second.background == first.background


# As the tools write them; the pictures are ours.
DIALECTS = {
    "krita": """<?xml version='1.0' encoding='utf-8'?>
<image w="64" h="48" version="0.0.5" xres="300" yres="300"><stack isolation="isolate" name="root" opacity="1"
 visibility="visible"><stack name="Group 1" opacity="0.5" composite-op="svg:src-over" x="0" y="0"
 visibility="visible" isolation="auto"><layer composite-op="svg:src-over" name="Paint Layer 1" opacity="1"
 src="data/layer0.png" visibility="visible" x="3" y="-2" edit-locked="false" selected="true"/></stack>
 <layer composite-op="svg:multiply" name="Paint Layer 1" opacity="0.501961" src="data/layer1.png"
 visibility="hidden" x="0" y="0"/></stack></image>""",
    "mypaint": """<image h="48" w="64" xmlns:mypaint="http://mypaint.org/ns/openraster" mypaint:frame-active="false">
<stack x="2" y="1"><layer name="頭" src="data/layer0.png" x="3" y="-2" opacity="1.0" visibility="visible"
 composite-op="svg:src-over" selected="true"/><stack name="" x="-5" y="0"><layer src="data/layer1.png" x="5" y="0"
 opacity="0.5" mypaint:strokemap-v2="data/s.dat"/></stack></stack></image>""",
    "gimp": """<?xml version='1.0' encoding='UTF-8'?>
<image w="64" h="48"><stack><layer src="data/layer0.png" name="Layer #1" x="3" y="-2" opacity="1.0"
 visibility="visible" composite-op="svg:src-over" />
 <layer src="data/layer1.png" name="Background" x="0" y="0" opacity="1.0" visibility="visible"
 composite-op="gimp:grain-merge" /></stack></image>""",
    "pinta": """<?xml version="1.0" encoding="utf-8"?>
<image w="64" h="48" version="0.0.3">
  <stack opacity="1" name="root">
    <layer opacity="1" name="Layer 2" composite-op="svg:src-over" src="data/layer0.png" x="3" y="-2" />
    <layer opacity="0.25" name="Background" composite-op="svg:src-over" src="data/layer1.png" />
  </stack>
</image>""",
}


def foreign(stack, **more):
    rng = np.random.default_rng(1)
    parts = {
        "mimetype": b"image/openraster",
        "stack.xml": stack.encode(),
        "data/layer0.png": picture(rng, 20, 10),
        "data/layer1.png": picture(rng, 64, 48, mode="RGB"),
        "mergedimage.png": picture(rng, 64, 48),
    }
    return rezipped({**parts, **more})


@pytest.mark.parametrize(
    ("tool", "names", "texts", "opacities", "reasons"),
    [
        (
            "krita",
            ["Paint-Layer-1", "Paint-Layer-1-2"],
            ["Paint Layer 1", "Paint Layer 1"],
            [0.501961, 0.5],
            {"BLEND_MODE"},
        ),
        ("mypaint", ["layer-1", "layer-2"], ["layer-1", "頭"], [0.5, 1.0], set()),
        ("gimp", ["Background", "Layer-1"], ["Background", "Layer #1"], [1.0, 1.0], {"BLEND_MODE"}),
        ("pinta", ["Background", "Layer-2"], ["Background", "Layer 2"], [0.25, 1.0], set()),
    ],
)
def test_files_as_other_tools_write_them_open(tool, names, texts, opacities, reasons):
    data = foreign(DIALECTS[tool])
    collage, warnings = work.opened(data)
    assert [layer.name for layer in collage.layers] == names
    assert [layer.text for layer in collage.layers] == texts
    assert [layer.opacity for layer in collage.layers] == opacities
    assert {each.reason for each in warnings} == reasons
    assert (collage.size.width, collage.size.height) == (64, 48)
    top = collage.layers[1]
    # MyPaint's groups have corners of their own.
    left, up = (5, -1) if tool == "mypaint" else (3, -2)
    assert (top.transform.x, top.transform.y) == (left + 10, up + 5)
    assert top.image.data == entries(data)["data/layer0.png"]
    assert collage.layers[0].visible is (tool != "krita") or not collage.layers[0].HasField(
        "visible"
    )
    # What came in goes out and comes in again.
    again, _ = work.opened(work.saved(collage, "ora"))
    assert again == collage


def test_names_that_begin_with_a_slash_are_those_without_in_openraster():
    """As pyora writes them; nothing of such a file is written to a disk."""
    parts = entries(foreign(one(opacity="1.0")))
    slashed = {f"/{name}" if name.startswith("data") else name: parts[name] for name in parts}
    slashed["stack.xml"] = parts["stack.xml"].replace(b"data/", b"/data/")
    assert work.opened(rezipped(slashed))[0] == work.opened(rezipped(parts))[0]
    parts["/data/layer0.png"] = parts["data/layer0.png"]
    assert refusal(rezipped(parts)).field == "file[data/layer0.png]"


def test_a_blend_mode_is_rendered_into_the_layer():
    rng = np.random.default_rng(2)
    below, above = picture(rng, 64, 48, mode="RGB"), picture(rng, 64, 48)
    stack = """<image w="64" h="48"><stack><layer name="up" src="data/a.png" composite-op="svg:multiply"/>
        <layer name="low" src="data/b.png"/></stack></image>"""
    collage, warnings = work.opened(foreign(stack, **{"data/a.png": above, "data/b.png": below}))
    assert [(each.reason, each.field) for each in warnings] == [("BLEND_MODE", "collage.layers[1]")]
    a, b = decode(above) / 255, decode(below) / 255
    alpha = a[..., 3:]
    expected = b[..., :3] * (1 - alpha) + b[..., :3] * a[..., :3] * alpha
    scene = Scene(collage)
    list(scene.sheets())
    assert np.abs(scene.composite_HW3() / 255 - expected).max() < 1.5 / 255


def test_sixteen_bits_become_eight_and_a_large_canvas_smaller():
    deep = io.BytesIO()
    Image.fromarray((np.arange(64 * 48, dtype=np.uint16) * 21).reshape(48, 64)).save(deep, "PNG")
    stack = '<image w="4096" h="3072"><stack><layer name="deep" src="data/a.png" x="10"/></stack></image>'
    collage, warnings = work.opened(foreign(stack, **{"data/a.png": deep.getvalue()}))
    assert (collage.size.width, collage.size.height) == (2048, 1536)
    assert [each.reason for each in warnings] == ["CANVAS_SMALLER"]
    transform = collage.layers[0].transform
    assert (transform.scale, transform.x, transform.y) == (0.5, 21.0, 12.0)
    assert decode(collage.layers[0].image.data)[0, 30, 0] == 30 * 21 >> 8


def psd_of(layers, size=(64, 48)):
    file = PSDImage.new("RGBA", size)
    for name, pixels, left, top, options in layers:
        layer = file.create_pixel_layer(Image.fromarray(pixels), name=name, left=left, top=top)
        for option, value in options.items():
            setattr(layer, option, value)
    return file


def test_masks_groups_and_modes_of_a_psd_are_in_its_layers():
    rng = np.random.default_rng(3)
    pixels = (rng.random((12, 16, 4)) * 255).astype(np.uint8)
    ground = (rng.random((48, 64, 4)) * 255).astype(np.uint8)
    ground[..., 3] = 255
    file = psd_of(
        [
            ("Ground", ground, 0, 0, {}),
            ("Bild Nº 2", pixels, 5, -3, {"blend_mode": BlendMode.SCREEN, "opacity": 128}),
            ("cut", pixels, 20, 30, {"visible": False}),
        ]
    )
    mask = Image.new("L", (8, 12), 100)
    file[2].create_mask(mask, left=20, top=30)
    file.create_group(layer_list=[file[2]], name="group")
    made = io.BytesIO()
    file.save(made)
    collage, warnings = work.opened(made.getvalue())
    assert [layer.name for layer in collage.layers] == ["Ground", "Bild-No-2", "cut"]
    assert [layer.text for layer in collage.layers] == ["Ground", "Bild Nº 2", "cut"]
    assert [each.reason for each in warnings] == ["BLEND_MODE"]
    up, cut = collage.layers[1], collage.layers[2]
    assert up.opacity == pytest.approx(128 / 255)
    assert (up.transform.x, up.transform.y) == (13, 3)
    assert cut.visible is False
    alpha = decode(cut.image.data)[..., 3]
    assert np.array_equal(alpha[:, :8], np.rint(pixels[:, :8, 3] * np.float32(100 / 255)))
    screened = decode(up.image.data)[5, 5, :3] / 255
    a, b = pixels[5, 5, :3] / 255, ground[2, 10, :3] / 255
    assert np.abs(screened - (a + b - a * b)).max() < 1 / 255


def test_pixels_that_unpack_to_more_than_they_are_said_to_are_refused():
    file = psd_of([("a", np.full((64, 64, 4), 9, np.uint8), 0, 0, {})])
    packed = zlib.compress(bytes(50_000_000), 9)
    for channel, info in zip(file[0]._channels, file[0]._record.channel_info, strict=True):
        channel.compression, channel.data = Compression.ZIP, packed
        info.length = len(packed) + 2
    made = io.BytesIO()
    file._record.write(made)
    assert refusal(made.getvalue()).field == "file"


def zipped(*names, data=b"x"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name in names:
            opened.writestr(name, data)
    return file.getvalue()


def claimed_png(width, height):
    """A small file that claims to be a large picture, with zeros to match a part of it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    chunks = b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def one(**attributes):
    pairs = " ".join(f'{name}="{value}"' for name, value in attributes.items())
    return f'<image w="64" h="48"><stack><layer name="a" src="data/layer0.png" {pairs}/></stack></image>'


def psd_bytes(
    width=64, height=48, *, count=0, rectangle=(0, 0, 1, 1), length=2, extra=0, version=1
):
    """The head of a PSD that lists so many layers."""
    record = struct.pack(">4iH", *rectangle, 1) + struct.pack(">hI", 0, length)
    record += b"8BIMnorm" + bytes([255, 0, 0, 0]) + struct.pack(">I", extra)
    info = struct.pack(">h", count) + record * min(count, 40_000) + bytes(64)
    section = struct.pack(">I", len(info)) + info
    head = struct.pack(">4sH6xHIIHH", b"8BPS", version, 3, height, width, 8, 3)
    return head + bytes(8) + struct.pack(">I", len(section)) + section + bytes(2)


def overlong_directory():
    data = bytearray(zipped("stack.xml"))
    at = data.rfind(b"PK\x05\x06")
    data[at + 12 : at + 16] = struct.pack("<I", 2**31)
    return bytes(data)


def bomb():
    return zipped("stack.xml", "data/a.png", data=bytes(30_000_000))


HARMFUL = {
    "empty": (b"", "file", "begins with"),
    "a picture": (claimed_png(8, 8), "file", "is a picture"),
    "a gimp file": (b"gimp xcf v011", "file", "OpenRaster"),
    "a krita file": (rezipped({"mimetype": b"application/x-krita"}), "file", "Krita"),
    "a zip of nothing": (zipped(), "file", "without a collage.yaml"),
    "cut short": (zipped("stack.xml")[:-30], "file", "cut short"),
    "a bomb": (bomb(), "file[stack.xml]", "times its size"),
    "many entries": (zipped(*map(str, range(1001))), "file", "1001 entries"),
    "a long list": (overlong_directory(), "file", "list of entries"),
    "a name that leads out": (zipped("stack.xml", "../../x"), "file[../../x]", "is no name"),
    "an absolute name": (zipped("/etc/passwd"), "file[/etc/passwd]", "is no name"),
    "a name of another system": (zipped("C:\\x"), "file[C:\\x]", "is no name"),
    "no xml": (foreign("<image"), "file[stack.xml]", "no XML"),
    "an encoding that nobody knows": (
        foreign('<?xml version="1.0" encoding="uLf-8"?><image/>'),
        "file[stack.xml]",
        "no XML",
    ),
    "an encoding of no text": (
        foreign('<?xml version="1.0" encoding="hex"?><image/>'),
        "file[stack.xml]",
        "no XML",
    ),
    "another root": (foreign("<html/>"), "file[stack.xml]", "an image"),
    "entities": (
        foreign(
            '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><image w="64" h="48">&c;</image>'
        ),
        "file[stack.xml]",
        "document type",
    ),
    "a file fetched": (
        foreign('<!DOCTYPE a SYSTEM "file:///etc/passwd"><image w="64" h="48"/>'),
        "file[stack.xml]",
        "document type",
    ),
    "100,000 layers": (
        foreign('<image w="64" h="48"><stack>' + '<layer src="a"/>' * 60_000 + "</stack></image>"),
        "file[stack.xml]",
        "more layers than allowed",
    ),
    "33 layers": (
        foreign(
            '<image w="64" h="48"><stack>'
            + '<layer src="data/layer0.png"/>' * 33
            + "</stack></image>"
        ),
        "file[stack.xml].image.stack",
        "33 layers",
    ),
    "groups without end": (
        foreign('<image w="64" h="48">' + "<stack>" * 100 + "</stack>" * 100 + "</image>"),
        "file[stack.xml]",
        "within one another",
    ),
    "no layers": (
        foreign('<image w="64" h="48"><stack/></image>'),
        "file[stack.xml].image.stack",
        "0 layers",
    ),
    "a huge canvas": (
        foreign(one().replace('w="64"', 'w="90000"')),
        "file[stack.xml].image.width",
        "90000",
    ),
    "no size": (foreign('<image h="2"/>'), "file[stack.xml].image.w", "is missing"),
    "a file not there": (
        foreign(one(visibility="visible").replace("layer0", "no")),
        "file[data/no.png]",
        "not in the archive",
    ),
    "a lying picture": (
        foreign(one(), **{"data/layer0.png": claimed_png(60_000, 60_000)}),
        "file[data/layer0.png]",
        "60000 x 60000",
    ),
    "a picture with less than it claims": (
        foreign(one(), **{"data/layer0.png": claimed_png(3000, 3000)}),
        "file[data/layer0.png]",
        "damaged",
    ),
    "no png": (
        foreign(one(), **{"data/layer0.png": b"GIF89a" * 20}),
        "file[data/layer0.png]",
        "PNG",
    ),
    "a strange opacity": (
        foreign(one(opacity="7")),
        "file[stack.xml].image.stack[0].layer[0].opacity",
        "0 to 1",
    ),
    "no number": (foreign(one(x="nan")), "file[stack.xml].image.stack[0].layer[0].x", "nan"),
    "a dial of text": (
        foreign(
            one()
            .replace("<image", '<image xmlns:c="urn:collage-diffusion:openraster:1"')
            .replace('name="a"', 'c:noise="loud"')
        ),
        "file[stack.xml].image.stack[0].layer[0].noise",
        "loud",
    ),
    "a collage of wrong fields": (
        rezipped({"a/collage.yaml": b"size: {width: wide}\nlayer: []\n"}),
        "collage.size.width",
        "whole number",
    ),
    "a psd cut short": (psd_bytes()[:30], "file", "cut short"),
    "a huge psd": (psd_bytes(200_000, 200_000), "file.width", "200000"),
    "a psd of a later version": (psd_bytes(version=9), "file.version", "is 9"),
    "a psd of 32,767 layers": (psd_bytes(count=32_767), "file.layers", "32767"),
    "a psd of huge layers": (
        psd_bytes(count=1, rectangle=(0, 0, 60_000, 60_000)),
        "file.layers[0]",
        "60000 x 60000",
    ),
    "a psd of a far layer": (
        psd_bytes(count=1, rectangle=(-(2**31), 0, 2**31 - 1, 1)),
        "file.layers[0]",
        "stands at",
    ),
    "a psd of large layers": (
        psd_bytes(count=40, rectangle=(0, 0, 4000, 4000), length=0),
        "file.layers[32]",
        "brings all layers",
    ),
    "a psd of lying channels": (psd_bytes(count=1, length=2**31), "file.layers[0]", "bytes"),
    "a psd of lying blocks": (psd_bytes(count=1, extra=2**31), "file.layers[0]", "too many"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_meant_to_harm_is_refused_by_its_place(name):
    data, field, told = HARMFUL[name]
    violation = refusal(data)
    assert violation.field == field
    assert told in violation.description


def test_an_entry_that_stands_twice_is_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("stack.xml", "a")
        with pytest.warns(UserWarning, match="Duplicate"):
            opened.writestr("stack.xml", "b")
    assert refusal(file.getvalue()).field == "file[stack.xml]"


def test_what_cannot_be_written_is_refused_by_its_field():
    for change, field in (
        (lambda each: each.ClearField("size"), "collage.size.width"),
        (lambda each: each.layers[1].image.ClearField("data"), "collage.layers[1].image"),
        (lambda each: setattr(each.layers[1], "name", "low"), "collage.layers[1].name"),
        (lambda each: setattr(each.layers[0].image, "data", b"no"), "collage.layers[0].image"),
        (
            lambda each: setattr(each.layers[0].transform, "scale", 1e9),
            "collage.layers[0].transform.scale",
        ),
    ):
        collage = simple()
        change(collage)
        with pytest.raises(InvalidRequest) as caught:
            work.saved(collage, "ora")
        assert caught.value.violations[0].field == field
    with pytest.raises(
        InvalidRequest, match=r"result: is 8 x 8 pixels; allowed: the canvas' 64 x 48"
    ):
        work.saved(simple(), "ora", encode_png(np.zeros((8, 8, 3), np.uint8)))
    unfinished = simple()
    unfinished.layers[0].text = ""
    assert work.opened(work.saved(unfinished, "ora"))[0] == unfinished


# Refuses each file, and tells the most memory that the process ever had, bytes.
MEASURE = """
import sys
from pathlib import Path
from interchange import ora, psd, work
from services.common.errors import InvalidRequest
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
for file in sys.argv[1:]:
    try:
        work.opened(Path(file).read_bytes())
    except InvalidRequest:
        continue
    sys.exit(f"{file} was opened")
print(peak() - before)
"""


def test_refusing_takes_no_memory(tmp_path):
    """Each is refused on what it says of itself: for what they would unpack to, gigabytes would not do."""
    for number, (data, _, _) in enumerate(HARMFUL.values()):
        (tmp_path / str(number)).write_bytes(data)
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, *sorted(map(str, tmp_path.iterdir()))],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert int(told.stdout) < 150 * 2**20


async def test_a_file_is_opened_in_a_process_of_its_own():
    interchange = asking.Interchange()
    try:
        collage = generated(7)
        data = await interchange.saved(collage, "ora")
        assert await interchange.opened(data) == (collage, [])
        with pytest.raises(InvalidRequest, match="60000 x 60000"):
            await interchange.opened(HARMFUL["a lying picture"][0])
        with pytest.raises(InvalidRequest, match="is 'gif'; allowed: ora, psd, zip"):
            await interchange.saved(collage, "gif")
    finally:
        await interchange.close()


def test_damaged_files_are_refused_or_opened_and_nothing_else():
    """Bytes changed, cut and doubled at random, for ten seconds."""
    dice = random.Random(11)
    seeds = [work.saved(generated(seed), form) for seed in (1, 2) for form in asking.FORMS]
    seeds += [foreign(stack) for stack in DIALECTS.values()]
    # Damage within the archive, which its checksums would find.
    inner = [entries(data) for data in seeds if data.startswith(archive.SIGNATURE)]
    until = time.monotonic() + 10
    tried = opened = 0
    while time.monotonic() < until:
        tried += 1
        if dice.random() < 0.5:
            parts = dict(dice.choice(inner))
            name = dice.choice(sorted(parts))
            parts[name] = damaged(parts[name], dice)
            data = rezipped(parts)
        else:
            data = damaged(dice.choice(seeds), dice)
        try:
            collage, _ = work.opened(data)
        except InvalidRequest as error:
            assert error.violations[0].field.startswith(("file", "collage"))
        else:
            opened += 1
            assert len(collage.layers) <= bounds.MAX_LAYERS
    assert tried > 100
    assert opened > 0


def damaged(data, dice):
    changed = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(len(changed) or 1)
        way = dice.randrange(4)
        if way == 0 and changed:
            changed[at] = dice.randrange(256)
        elif way == 1:
            changed[at : at + 4] = struct.pack(
                ">I", dice.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1])
            )
        elif way == 2:
            del changed[at : at + dice.randint(1, 64)]
        else:
            changed[at:at] = changed[at : at + dice.randint(1, 64)]
    return bytes(changed)


def test_the_examples_go_through_every_form():
    for name in ("bento", "cake-table", "landscape"):
        collage = files.attach(files.load(ROOT / "examples" / name))
        for form in ("ora", "zip"):
            assert work.opened(work.saved(collage, form))[0] == collage
        drawn, _ = work.opened(work.saved(collage, "psd"))
        assert [layer.name for layer in drawn.layers] == [layer.name for layer in collage.layers]
