"""Files of weights, whoever wrote them: every form that is loaded, and what is said of every one that is not."""

import json
import os
import shutil

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save, save_file

from services.common.errors import ModelUnusable
from services.common.settings import InvalidSetting
from services.common.weights import NotAModel, digest, find, find_all
from services.diffusion import networks
from services.diffusion.folder import UnsupportedModel
from services.generator.engine import Engine
from services.generator.folder_card import load_stages, read_catalog
from services.generator.scheduler import Scheduler
from services.inversion.networks import read_catalog as read_learning_catalog
from testing import plates, toy

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "mini": (toy.mini, StableDiffusionPipeline),
    "sdxl": (toy.sdxl, StableDiffusionXLPipeline),
}
FORMS = [
    {"variant": "fp16"},
    {"variant": "bf16"},
    {"variant": "non_ema"},
    {"max_shard_size": "60KB"},
    {"variant": "fp16", "max_shard_size": "60KB"},
    {"variant": "bf16", "max_shard_size": "60KB"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family, and one with a ControlNet and an adapter."""
    made = {name: make(tmp_path_factory.mktemp(name)) for name, (make, _) in FAMILIES.items()}
    toy.controlnet(made["mini"], "canny")
    toy.lora(made["mini"] / "ink.safetensors", made["mini"])
    return made


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders["mini"], tmp_path / "copy")


def catalog(tmp_path, folder, *, adapters=()):
    """As a start reads it."""
    lines = [f"models:\n  - name: toy\n    source: {folder}\n    dtype: float32\n    device: cpu\n"]
    if adapters:
        lines.append("    adapters:\n")
    lines += [f"      {name}: {file}\n" for name, file in adapters]
    (tmp_path / "models.yaml").write_text("".join(lines))
    return read_catalog(str(tmp_path / "models.yaml"))


def loaded(folder):
    return networks.load(folder, dtype=torch.float32, device=torch.device("cpu"))


def states(model):
    parts = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    return {
        (part, name): tensor
        for part, network in parts.items()
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_that_the_libraries_save_is_loaded(tmp_path, folders, family, form):
    _, pipeline = FAMILIES[family]
    saved = pipeline.from_pretrained(folders[family], torch_dtype=torch.float16)
    saved.save_pretrained(tmp_path / "saved", **form)
    if family == "mini":
        network = ControlNetModel.from_pretrained(folders[family] / "controlnet-canny")
        network.save_pretrained(tmp_path / "saved" / "controlnet-canny", **form)
    names = [file.name for file in (tmp_path / "saved").rglob("*.safetensors")]
    assert all(form.get("variant", "") in name for name in names)
    assert not form.get("max_shard_size") or any("00002-of-" in name for name in names)
    # The same numbers, in one plain file a network.
    plain = shutil.copytree(folders[family], tmp_path / "plain")
    saved.save_pretrained(plain)
    (ours,) = catalog(tmp_path, tmp_path / "saved").cards
    (theirs,) = catalog(tmp_path, plain).cards
    assert ours.weights_bytes == theirs.weights_bytes > 100_000
    (learning,) = read_learning_catalog(f"toy={tmp_path / 'saved'}").cards
    assert learning.weights_bytes > 100_000
    found, wanted = (states(loaded(each)) for each in (tmp_path / "saved", plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    if family == "mini":
        stages = load_stages(ours)
        stages.load_controlnets(["canny"])
    # What is loaded counts in the digest.
    before = digest(tmp_path / "saved")
    file = next((tmp_path / "saved" / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert digest(tmp_path / "saved") != before


def test_of_several_forms_the_plain_one_is_taken(copy):
    saved = StableDiffusionPipeline.from_pretrained(copy)
    with torch.no_grad():
        for part in (saved.unet, saved.vae, saved.text_encoder):
            next(part.parameters()).zero_()
    wanted = states(loaded(copy))
    for variant in ("bf16", "fp16", "non_ema"):
        saved.save_pretrained(copy, variant=variant)
    found = states(loaded(copy))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert {each.variant for each in find_all(copy).values()} == {None}
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    variants = {part: each.variant for part, each in find_all(copy).items()}
    assert variants == {"unet": "fp16", "vae": None, "text_encoder": None}


def head(file):
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(file, head, data):
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_head(change):
    """The file with another head before the same numbers."""

    def spoil(file):
        told, data = head(file)
        names = [name for name in told if name != "__metadata__"]
        change(told, names)
        write(file, told, data)

    return spoil


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def folder_instead(file):
    file.unlink()
    file.mkdir()


def pickled(file):
    torch.save({"x": torch.ones(2)}, file)


DAMAGE = {
    "empty": (lambda f: f.write_bytes(b""), "is empty"),
    "a few bytes": (lambda f: f.write_bytes(b"\x01\x02\x03"), "is no safetensors file"),
    "half": (
        lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
        r"is cut short: holds \d+ of \d+ bytes",
    ),
    "a byte less": (
        lambda f: f.write_bytes(f.read_bytes()[:-1]),
        r"is cut short: holds \d+ of \d+ bytes",
    ),
    "head only in part": (
        lambda f: f.write_bytes(f.read_bytes()[:40]),
        r"is cut short: holds 40 of more than \d+ bytes",
    ),
    "a byte more": (
        lambda f: f.write_bytes(f.read_bytes() + b"\0"),
        r"is no safetensors file: holds \d+ of \d+ bytes",
    ),
    "pickled": (pickled, "is a pickled file .* convert it where you trust it"),
    "LFS pointer": (
        lambda f: f.write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
        ),
        "is a Git LFS pointer, not the file itself: fetch it with",
    ),
    "web page": (lambda f: f.write_text("<!DOCTYPE html><html></html>"), "is a web page"),
    "GGUF": (lambda f: f.write_bytes(b"GGUF" + bytes(60)), "is a GGUF file"),
    "zeros": (lambda f: f.write_bytes(bytes(1000)), "is no safetensors file"),
    "noise": (lambda f: f.write_bytes(bytes(range(1, 256)) * 9), "is no safetensors file"),
    "head is a list": (
        lambda f: f.write_bytes((3).to_bytes(8, "little") + b"[1]"),
        "is no safetensors file",
    ),
    "head is no JSON": (
        lambda f: f.write_bytes((9).to_bytes(8, "little") + b"{" * 9),
        "is no safetensors file: its head",
    ),
    "deep head": (
        lambda f: f.write_bytes((99_999).to_bytes(8, "little") + b'{"a":' + b"[" * 99_994),
        "is no safetensors file: its head",
    ),
    "dtype": (
        with_head(lambda told, names: told[names[0]].update(dtype="Q4_K")),
        "is of dtype 'Q4_K', which is not known",
    ),
    "overlap": (
        with_head(
            lambda told, names: told[names[-1]].update(dtype="U8", shape=[4], data_offsets=[0, 4])
        ),
        "its head lies: .* begins",
    ),
    "beyond the file": (
        with_head(
            lambda told, names: told.update(
                far={"dtype": "F32", "shape": [1], "data_offsets": [2**40, 2**40 + 4]}
            )
        ),
        "its head lies: far begins after a gap",
    ),
    "huge": (
        with_head(lambda told, names: told[names[0]].update(shape=[2**40, 2**40])),
        "which its shape and dtype do not take",
    ),
    "negative": (
        with_head(lambda told, names: told[names[0]].update(shape=[-1])),
        "has a shape or place that is none",
    ),
    "shape is a word": (
        with_head(lambda told, names: told[names[0]].update(shape="many")),
        "is no safetensors file: its head",
    ),
    "no offsets": (
        with_head(lambda told, names: told[names[0]].pop("data_offsets")),
        "is no safetensors file: its head",
    ),
}
# Beside the LoRA, which is found only where it is a file.
NO_FILES = {"pipe": pipe, "folder": folder_instead}
PLACES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "controlnet-canny": "controlnet-canny/diffusion_pytorch_model.safetensors",
    "ink": "ink.safetensors",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_stops_the_start_for_what_it_is(tmp_path, copy, place, damage):
    spoil, told = DAMAGE[damage]
    file = copy / PLACES[place]
    spoil(file)
    blamed = "adapters.ink: " if place == "ink" else "(?!adapters)"
    with pytest.raises(
        InvalidSetting, match=f"models: toy: {blamed}.*{file.parent.name}/{file.name} .*{told}"
    ):
        catalog(tmp_path, copy, adapters=[("ink", copy / "ink.safetensors")])
    if place in ("unet", "vae", "text_encoder"):
        with pytest.raises(InvalidSetting, match=told):
            read_learning_catalog(f"toy={copy}")


@pytest.mark.parametrize("place", [*list(PLACES)[:4]])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_plain_file_stops_the_start(tmp_path, copy, place, kind):
    NO_FILES[kind](copy / PLACES[place])
    with pytest.raises(InvalidSetting, match=f"{PLACES[place]} is no plain file"):
        catalog(tmp_path, copy)


def remove(folder, part):
    (next((folder / part).glob("*.safetensors"))).unlink()


def only_pickled(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def index(change):
    """Two shards of the part's file under an index that lies."""

    def spoil(folder, part):
        file = next((folder / part).glob("*.safetensors"))
        tensors = load_file(file)
        names = [f"{file.stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        places = {name: names[number % 2] for number, name in enumerate(sorted(tensors))}
        for each in names:
            save_file({n: t for n, t in tensors.items() if places[n] == each}, file.with_name(each))
        file.unlink()
        told = {"metadata": {}, "weight_map": places}
        change(told, file.parent, names)
        if told is not None:
            (file.parent / f"{file.name}.index.json").write_text(json.dumps(told))

    return spoil


ABSENCES = {
    "none": (remove, "{part}: has no weights: no .* it holds config.json"),
    "pickled": (
        only_pickled,
        "{part}: its weights are pickled .* convert them where you trust them",
    ),
    "missing shard": (
        index(lambda told, folder, names: (folder / names[1]).unlink()),
        "{part}/.*index.json names .*-00002-of-00002.safetensors, which is not there",
    ),
    "shard elsewhere": (
        index(lambda told, folder, names: told["weight_map"].update(x="../../config.json")),
        "names ../../config.json, which is not there",
    ),
    "tensor that its shard lacks": (
        index(lambda told, folder, names: told["weight_map"].update(x=names[0])),
        "names x, which .*-00001-of-00002.safetensors does not hold",
    ),
    "cut shard": (
        index(lambda told, folder, names: (folder / names[0]).write_bytes(b"")),
        "{part}/.*-00001-of-00002.safetensors is empty",
    ),
    "index without a map": (
        index(lambda told, folder, names: told.pop("weight_map")),
        "{part}/.*index.json is no index of shards",
    ),
    "index with an empty map": (
        index(lambda told, folder, names: told["weight_map"].clear()),
        "{part}/.*index.json is no index of shards",
    ),
    "index of numbers": (
        index(lambda told, folder, names: told["weight_map"].update(x=3)),
        "{part}/.*index.json is no index of shards",
    ),
}


@pytest.mark.parametrize("part", [*list(PLACES)[:4]])
@pytest.mark.parametrize("absence", ABSENCES)
def test_weights_that_are_not_there_stop_the_start(tmp_path, copy, part, absence):
    spoil, told = ABSENCES[absence]
    spoil(copy, part)
    with pytest.raises(InvalidSetting, match=f"models: toy: .*{told.format(part=part)}"):
        catalog(tmp_path, copy)


def change(folder, part, what):
    """A whole file of other tensors than the config says; answers which one shows it."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].ndim == 2)
    if what == "lacks":
        del tensors[name]
    else:
        tensors[name] = torch.ones(3, 5)
    save_file(tensors, file, {"format": "pt"})
    return name.removeprefix("text_model.")


@pytest.mark.parametrize("what", ["lacks", "of shape"])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "controlnet-canny"])
def test_a_tensor_that_does_not_fit_is_told_by_its_name(tmp_path, copy, part, what):
    name = change(copy, part, what)
    (card,) = catalog(tmp_path, copy).cards
    told = f"{part.removeprefix('x')} cannot be loaded: its weights .*{name}"
    if what == "of shape":
        told += r" of shape \[3, 5\]; its config asks for \["
    with pytest.raises(NotAModel, match=told):
        load_stages(card).load_controlnets(["canny"])


async def test_what_cannot_be_loaded_fails_its_own_jobs_and_says_why(tmp_path, copy, folders):
    """A model that is found damaged when it is loaded, one changed since the start, and one that is sound."""
    name = change(copy, "text_encoder", "lacks")
    entries = [("sound", folders["mini"]), ("odd", copy), ("gone", tmp_path / "gone")]
    shutil.copytree(folders["mini"], tmp_path / "gone")
    (tmp_path / "models.yaml").write_text(
        "models:\n" + "".join(f"  - {{name: {name}, source: {f}}}\n" for name, f in entries)
    )
    found = read_catalog(str(tmp_path / "models.yaml"))
    remove(tmp_path / "gone", "unet")
    engine = Engine(found, load=load_stages, scheduler=Scheduler(), threads=1)
    told = {}
    for model in ("odd", "gone", "sound"):
        try:
            async for _ in engine.generate(plates.job(model=model, steps=1)):
                pass
        except ModelUnusable as error:
            told[model] = str(error)
    await engine.drain()
    assert told.keys() == {"odd", "gone"}
    assert told["odd"].startswith("model odd cannot be used: ") and name in told["odd"]
    assert "unet: has no weights" in told["gone"]


async def test_a_default_model_that_cannot_be_loaded_stops_the_start(tmp_path, copy):
    change(copy, "unet", "lacks")
    engine = Engine(catalog(tmp_path, copy), load=load_stages, scheduler=Scheduler(), threads=1)
    with pytest.raises(
        InvalidSetting, match=r"models: model toy cannot be used: .*its weights lack"
    ):
        await engine.warm_up()
    await engine.drain()


CHECKPOINTS = {
    "sd1": (["model.diffusion_model.x", "first_stage_model.x"], "StableDiffusionPipeline"),
    "sdxl": (
        ["model.diffusion_model.x", "conditioner.embedders.1.x"],
        "StableDiffusionXLPipeline",
    ),
    "vae": (["first_stage_model.x"], "AutoencoderKL"),
    "controlnet": (["control_model.x"], "ControlNetModel"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_in_one_file_is_told_with_how_to_convert_it(tmp_path, name):
    names, kind = CHECKPOINTS[name]
    file = tmp_path / f"{name}.safetensors"
    save_file({each: torch.ones(2) for each in names}, file)
    told = (
        rf"is a single file, .*{kind}\.from_single_file\('.*{name}\.safetensors'\)\.save_pretrained"
    )
    for source in (file, tmp_path):
        with pytest.raises(InvalidSetting, match=told):
            read_catalog(str(source))


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        (
            "a.ckpt",
            b"PK\x03\x04",
            "is a single file, a pickled checkpoint in one file, .* convert|Pipe",
        ),
        (
            "a.safetensors",
            b"",
            "a.safetensors is empty; and a model is a folder in diffusers format",
        ),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ("a.gguf", b"GGUF1234", "is a GGUF file"),
        (
            "a.safetensors",
            save({"lora_unet_x.lora_up.weight": torch.ones(2)}),
            "belongs among a mod",
        ),
        ("a.safetensors", save({"down_blocks.0.x": torch.ones(2)}), "a network without its folder"),
        ("a.safetensors", save({"x": torch.ones(2)}), "in none of the known forms"),
    ],
)
def test_any_other_lone_file_is_told_for_what_it_is(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidSetting, match=told):
        read_catalog(str(tmp_path / name))


WORTHLESS = (None, "x", -1, 0, [], {}, 1.5, True, 10**30, ["x"], [0])


CONFIGS = {
    "model_index": "model_index.json",
    "scheduler": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
    **{part: f"{part}/config.json" for part in ("unet", "vae", "text_encoder")},
    "controlnet": "controlnet-canny/config.json",
}


@pytest.mark.parametrize("part", CONFIGS)
def test_no_config_of_any_content_makes_a_traceback(tmp_path, copy, part):
    """Every key of it with a value that means nothing, another one each."""
    file = copy / CONFIGS[part]
    told = json.loads(file.read_text())
    refused = 0
    for number, key in enumerate(told):
        file.write_text(json.dumps({**told, key: WORTHLESS[3 * number % len(WORTHLESS)]}))
        try:
            (card,) = catalog(tmp_path, copy).cards
            if part in ("unet", "vae", "text_encoder", "controlnet"):
                load_stages(card).load_controlnets(["canny"])
        except (InvalidSetting, NotAModel, UnsupportedModel):
            refused += 1
    assert refused


def test_a_config_that_is_something_else_is_told(copy):
    (copy / "unet" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(NotAModel, match=r"unet/config\.json is a Git LFS pointer"):
        loaded(copy)


def test_a_folder_of_weights_is_looked_at_without_reading_it(folders, monkeypatch):
    read = []
    real = type(folders["mini"]).open

    def watched(self, *args, **options):
        opened = real(self, *args, **options)
        read.append((self, opened))
        return opened

    monkeypatch.setattr(type(folders["mini"]), "open", watched)
    assert find(folders["mini"] / "unet").count > 10_000
    assert len(read) == 1
