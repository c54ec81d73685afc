"""Collage files: what is read, what is refused and how it is named, what a saved copy holds."""

from pathlib import Path

import pytest

from collage.v1 import blob_pb2, collage_pb2
from collage_client import InvalidInput, files

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PNG = b"\x89PNG not looked into here"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "art").mkdir()
    (tmp_path / "art" / "x.png").write_bytes(PNG)
    return tmp_path


def written(folder, text):
    (folder / "collage.yaml").write_text(text)
    return folder


def refusals(folder, text):
    with pytest.raises(InvalidInput) as caught:
        files.load(written(folder, text))
    return [(v.field, v.description) for v in caught.value.field_violations]


LAYER = "layers:\n  - {name: a, text: sushi, image: {path: art/x.png}}\n"


def test_both_spellings_of_a_field_are_read_and_unset_is_not_zero(folder):
    text = """
size: {width: 128, height: 96}
prompt: a sushi
negativePrompt: blur
background: {color: {red: 1, green: 2, blue: 3}}
layers:
  - name: a
    image: {path: art/x.png}
    text: sushi
    transform: {flip_horizontal: true, x: 0, scale: 1e-1}
    noise: 0
    attract:
    seed: 18446744073709551615
    structure: [{kind: canny, end: 0.5}]
    appearance: {learn: true}
  - {name: b, image: {path: art/x.png}, text: 'no', transform: {flipVertical: true}}
"""
    collage = files.load(written(folder, text))
    first, second = collage.layers
    assert collage.negative_prompt == "blur"
    assert first.image.path == str(folder / "art" / "x.png")
    assert first.HasField("noise")
    assert first.noise == 0
    assert not first.HasField("attract")
    assert first.seed == 2**64 - 1
    assert first.transform.scale == 0.1
    assert first.transform.HasField("x")
    assert not first.transform.HasField("y")
    assert second.text == "no"
    assert second.transform.flip_vertical
    assert files.load(folder / "collage.yaml") == collage


def test_every_mistake_is_named_by_field_and_line(folder):
    text = """size: {width: wide, height: 96}
prompt: yes
layers:
  - name: a
    image: {path: art/missing.png}
    nose: 0.5
    noise: much
  - name: b
    image: {path: art/x.png, data: aGk=}
    noise: 1
    noise: 2
    opacity: true
  - just words
colour: red
"""
    found = refusals(folder, text)
    named = dict(found)
    assert len(found) == len(named) == 10
    for field, part, line in [
        ("collage.size.width", "must be a whole number, not 'wide'", 1),
        ("collage.prompt", "must be text (in quotes if it looks like something else), not True", 2),
        ("collage.layers[0].image.path", "no such picture", 5),
        ("collage.layers[0].nose", "did you mean noise?", 6),
        ("collage.layers[0].noise", "must be a number, not 'much'", 7),
        ("collage.layers[1].image.data", "beside its alternative", 9),
        ("collage.layers[1].noise", "given twice", 11),
        ("collage.layers[1].opacity", "must be a number, not True", 12),
        ("collage.layers[2]", "must hold fields", 13),
        ("collage.colour", "unknown field", 14),
    ]:
        assert part in named[field]
        assert f"line {line})" in named[field]
        assert "collage.yaml" in named[field]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("size: [1, 2", "line 1"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("just words", "must hold fields"),
        ("prompt: &a [*a]", "must be text"),
        ("layers: {name: a}", "must be a list"),
        ("prompt: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_what_is_no_collage_at_all_is_refused_in_words(folder, text, part):
    ((_, description),) = refusals(folder, text)
    assert part in description


def test_a_file_that_cannot_be_read_is_named(folder):
    with pytest.raises(InvalidInput, match="No such file"):
        files.load(folder / "other.yaml")
    (folder / "collage.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="UTF-8"):
        files.load(folder)


def test_a_saved_copy_is_self_contained_and_the_same(folder, tmp_path):
    collage = files.attach(files.load(written(folder, LAYER + "size: {width: 8, height: 8}")))
    collage.background.image.data = b"\xff\xd8\xff jpeg"
    collage.layers[0].noise = 0
    collage.layers[0].seed = 0
    collage.layers.add(name="kept", text="x", image=blob_pb2.Image(blob={"sha256": "ab"}))
    target = tmp_path / "copy"
    target.mkdir()
    paths = files.save(collage, target)
    assert {str(path.relative_to(target)) for path in paths} == {
        "background.jpg",
        "layers/a.png",
        "collage.yaml",
    }
    moved = tmp_path / "moved"
    target.rename(moved)
    assert files.attach(files.load(moved)) == collage


def test_control_pictures_are_read_sent_and_saved_like_layers(folder):
    (folder / "art" / "depth.png").write_bytes(PNG + b" depth")
    text = """
layers:
  - name: a
    text: sushi
    image: {path: art/x.png}
    structure: [{kind: canny}, {kind: depth, image: {path: art/depth.png}}]
"""
    collage = files.attach(files.load(written(folder, text)))
    assert [field for field, _ in files.pictures(collage)] == [
        "collage.layers[0].image",
        "collage.layers[0].structure[1].image",
    ]
    assert collage.layers[0].structure[1].image.data == PNG + b" depth"
    assert not collage.layers[0].structure[0].HasField("image")
    paths = files.save(collage, folder / "copy")
    assert folder / "copy" / "layers" / "a.structure-1.png" in paths
    assert files.attach(files.load(folder / "copy")) == collage
    text = text.replace("depth.png", "gone.png")
    ((field, _),) = refusals(folder, text)
    assert field == "collage.layers[0].structure[1].image.path"


def test_a_name_that_is_a_path_is_not_written(tmp_path):
    layer = collage_pb2.Layer(name="../up", image=blob_pb2.Image(data=PNG))
    with pytest.raises(InvalidInput, match="no layer name"):
        files.save(collage_pb2.Collage(layers=[layer]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bento", "cake-table", "landscape"])
def test_the_examples_load_with_a_placeholder_for_every_layer(name):
    collage = files.attach(files.load(EXAMPLES / name))
    assert 5 <= len(collage.layers) <= 7
    for layer in collage.layers:
        assert "{" + layer.name + "}" in collage.prompt
        assert layer.image.data.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("collage.layers[1].transform.flip_vertical", 7),
        ("redo.collage.layers[1].noise", 5),
        ("collage.layers[7].noise", 3),
        ("collage.background.color.red", 1),
    ],
)
def test_a_field_is_found_in_its_file(folder, field, line):
    text = """prompt: two
size: {width: 8, height: 8}
layers:
  - {name: a, text: b}
  - name: b
    transform:
      flipVertical: true
"""
    file = written(folder, text) / "collage.yaml"
    assert files.place(folder, field) == f"{file}, line {line}"
    assert files.place(folder, "sampling.steps") == files.place(folder, "collages") == ""
    assert files.place(folder / "gone", field) == ""


def test_a_collage_fits_a_canvas_of_another_size():
    collage = collage_pb2.Collage()
    collage.size.width, collage.size.height = 640, 320
    collage.layers.add(name="centred")
    placed = collage.layers.add(name="placed").transform
    placed.x, placed.y, placed.scale = 0, 320, 0.5
    fitted = files.fit(collage, 128, 128)
    assert (fitted.size.width, fitted.size.height) == (128, 128)
    centred, moved = (layer.transform for layer in fitted.layers)
    assert not centred.HasField("x")
    assert centred.scale == 0.2
    # 640 x 320 becomes 128 x 64, in the middle.
    assert (moved.x, moved.y, moved.scale) == (0, 96, 0.1)
    assert files.fit(collage, 640, 320) == collage
