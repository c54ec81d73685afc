"""Files that a stranger wrote: a collage file, a results folder. They stay harmless, and are refused in words."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from collage_client import InvalidInput, files
from collage_client.cli import results

PNG = b"\x89PNG not looked into here"
JPEG, WEBP = b"\xff\xd8\xff\xe0 the same", b"RIFF\x00\x00\x00\x00WEBPVP8 "


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "theirs"
    (made / "art").mkdir(parents=True)
    (made / "art/x.png").write_bytes(PNG)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/secret.png").write_bytes(PNG)
    (tmp_path / "mine/secret.txt").write_text("root:x:0:0")
    return made


def picture(path) -> str:
    return f"layers: [{{name: a, text: b, image: {{path: '{path}'}}}}]"


def load(folder, text, **options):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "collage.yaml").write_bytes(data)
    return files.load(folder, **options)


def refusal(folder, text, **options) -> str:
    with pytest.raises(InvalidInput) as caught:
        load(folder, text, **options)
    return " ".join(each.description for each in caught.value.field_violations)


def test_pictures_lie_in_the_files_own_folder(folder, tmp_path, monkeypatch):
    link = folder / "art/link.png"
    link.symlink_to(tmp_path / "mine/secret.png")
    (folder / "linked").symlink_to(tmp_path / "mine")
    inside = folder / "art/inside.png"
    inside.symlink_to("x.png")
    outside = [
        tmp_path / "mine/secret.png",
        "../mine/secret.png",
        "art/../../mine/secret.png",
        "art/link.png",
        "linked/secret.png",
        "/etc/passwd",
        "/etc/none",
    ]
    for path in outside:
        assert "lies outside of" in refusal(folder, picture(path)), path
    # Even whether it is there is not told.
    assert "lies outside of" in refusal(folder, picture("../mine/none.png"))
    for path in ("art/x.png", "./art/../art/x.png", inside, "art/inside.png"):
        assert load(folder, picture(path)).layers[0].image.path
    monkeypatch.chdir(folder)
    assert files.load(Path("collage.yaml")).layers[0].image.path == "art/inside.png"
    # Backgrounds and control pictures are pictures as well.
    text = "background: {image: {path: ../mine/secret.png}}\n" + picture("art/x.png").replace(
        "text: b", "structure: [{kind: a, image: {path: ../mine/secret.png}}], text: b"
    )
    assert refusal(folder, text).count("lies outside of") == 2


def test_other_folders_are_allowed_by_name(folder, tmp_path):
    for allowed in (tmp_path / "mine", tmp_path, str(tmp_path / "mine")):
        collage = load(folder, picture("../mine/secret.png"), allow=[allowed])
        assert files.attach(collage).layers[0].image.data == PNG
    assert "lies outside" in refusal(
        folder, picture("../mine/secret.png"), allow=[tmp_path / "min"]
    )
    assert "no PNG" in refusal(folder, picture("../mine/secret.txt"), allow=[tmp_path])


@pytest.mark.parametrize("data", [PNG, JPEG, WEBP])
def test_the_three_kinds_are_taken(folder, data):
    (folder / "art/y").write_bytes(data)
    assert files.attach(load(folder, picture("art/y"))).layers[0].image.data == data


def test_kind_and_size_are_looked_at_before_a_picture_is_read(folder, tmp_path):
    os.mkfifo(folder / "art/pipe.png")
    (folder / "art/text.png").write_text("root:x:0:0")
    (folder / "art/wave.webp").write_bytes(b"RIFF\x00\x00\x00\x00WAVE")
    (folder / "art/empty.png").touch()
    with (folder / "art/large.png").open("wb") as large:
        large.write(PNG)
        large.truncate(3 * 2**30)
    start = time.monotonic()
    for name, told in (
        ("pipe.png", "no ordinary file"),
        ("text.png", "no PNG"),
        ("wave.webp", "no PNG"),
        ("empty.png", "no PNG"),
        ("large.png", "allowed: 67108864"),
        ("", "is a folder"),
        ("none.png", "no such picture"),
        ("x" * 5000, "no such picture"),
        ("x\\0y", "no such picture"),
    ):
        path = f'"art/{name}"'
        assert told in refusal(folder, picture("").replace("''", path)), name
    # What changed between load and attach is looked at again.
    collage = load(folder, picture("art/x.png"))
    (folder / "art/x.png").write_text("root:x:0:0")
    with pytest.raises(InvalidInput, match="no PNG"):
        files.attach(collage)
    assert time.monotonic() - start < 5


LAYER = "{name: a, text: b, image: {path: art/x.png}}"
HOSTILE = {
    "nul": b"prompt: a\x00b",
    "escape": b"\x1b[31m: 1",
    "utf-16": "prompt: a".encode("utf-16"),
    "no utf-8": b"prompt: \xff",
    "surrogate": b'"\\ud800": "\\ud800"',
    "surrogate value": b'prompt: "\\ud800"',
    "nested lists": b"layers: " + b"[" * 100_000,
    "nested maps": b"{a: " * 5000,
    "nested keys": b"? " * 5000,
    "nested blocks": b"".join(b" " * n + b"a:\n" for n in range(1000)),
    "5000 digits": b"size: {width: " + b"9" * 5000 + b"}",
    "5000 digits as a seed": b"layers: [{name: a, seed: " + b"9" * 5000 + b"}]",
    "5000 digits as a key": b"9" * 5000 + b": 1",
    "a float of 400 digits": b"layers: [{noise: 1" + b"0" * 400 + b".0}]",
    "a date": b"prompt: 2001-99-99",
    "a date of none": b"layers: [{noise: 2001-01-01}]",
    "sixties": b"size: {width: 1" + b":59" * 3000 + b"}",
    "binary": b"prompt: !!binary '###'",
    "object": b"prompt: !!python/object/apply:os.system [ls]",
    "a set": b"layers: !!set {a, b}",
    "a list as a key": b"? [a, b]\n: 1",
    "aliases": b"x: &a " + LAYER.encode() + b"\nlayers: [" + b"*a, " * 100_000 + b"]",
    "a layer in itself": b"layers: &a [*a]",
    "a layer within itself": b"layers: [&a {name: x, image: *a}]",
    "billion laughs": b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 120)
    )
    + b"prompt: *w",
    "billion laughs as a key": b"a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 10)) for n in range(98, 120)
    )
    + b"? *w\n: 1",
    "merge keys": b"a: &a {x: 1}\n<<: [" + b"*a, " * 30_000 + b"]",
    "spaces": b" " * 50_000_000,
    "lines": b"\n" * 1_000_000,
    "a long line": b"prompt: " + b"a" * 900_000,
    "a long name": b"a" * 900_000 + b": 1",
    "directives": b"%YAML 1.1\n" * 1000,
    "documents": b"--- 1\n" * 1000,
    "unended": b"layers: [{name: 'a",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_collage_file_makes_a_traceback_or_takes_long(folder, kind):
    start = time.thread_time()
    try:
        load(folder, HOSTILE[kind])
    except InvalidInput as error:
        for violation in error.field_violations:
            told = violation.field + violation.description
            assert len(told) < 2000
            assert told.isprintable()
            files.place(folder, "collage.layers[2].noise")
    assert time.thread_time() - start < 5


@pytest.mark.parametrize("kind", ["nul", "nested lists", "5000 digits", "surrogate", "aliases"])
def test_the_command_ends_with_exit_code_2(folder, kind):
    (folder / "collage.yaml").write_bytes(HOSTILE[kind])
    command = [sys.executable, "-m", "collage_client.cli", "plan", folder, "--out", folder / "out"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_command_allows_folders_by_option(folder, tmp_path):
    (folder / "collage.yaml").write_text(picture("../mine/secret.png"))
    command = [sys.executable, "-m", "collage_client.cli", "plan", folder, "--out", folder / "out"]
    command += ["--server", "127.0.0.1:9"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "--allow" in refused.stderr
    allowed = [*command, "--allow", tmp_path / "mine"]
    # Nobody is at the address, so the file was read.
    assert subprocess.run(allowed, capture_output=True, timeout=60).returncode == 1


def test_a_results_folder_of_a_stranger_is_read_as_carefully(folder, tmp_path):
    (folder / "collage.yaml").write_text(picture("art/x.png"))
    (folder / "result.json").write_text('{"sampling": {}}')
    (folder / "image-0.png").write_bytes(PNG)
    assert results.read(folder, 0).parent == PNG
    for name, target, told in (
        ("image-1.png", tmp_path / "mine/secret.png", "lies outside of"),
        ("image-2.png", "/dev/zero", "lies outside of"),
        ("image-3.png", folder / "collage.yaml", "no PNG"),
    ):
        (folder / name).symlink_to(target)
        with pytest.raises(InvalidInput, match=told):
            results.read(folder, int(name[6]))
    for text in ("[" * 100_000, "9" * 5000, "{}", "\x00", " " * 2**25):
        (folder / "result.json").write_text(text)
        with pytest.raises(InvalidInput, match="no results folder"):
            results.read(folder, 0)


@pytest.mark.parametrize("name", ["bento", "cake-table", "landscape"])
def test_the_examples_need_no_other_folder(name):
    examples = Path(__file__).resolve().parents[1] / "examples"
    collage = files.attach(files.load(examples / name))
    for layer in files.load(examples / name).layers:
        assert (
            Path(layer.image.path).read_bytes()
            == (examples / "art" / Path(layer.image.path).name).read_bytes()
        )
    assert all(layer.image.data for layer in collage.layers)
