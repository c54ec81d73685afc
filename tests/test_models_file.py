"""The operator's models.yaml: what it may say, and that every mistake in it is told with its place."""

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.utils import filter_repo_objects

from local.served import model_files, models_setting
from services.common.errors import InvalidRequest
from services.common.hub import locate, locate_adapter
from services.common.models_file import Defaults, Limits, read_detectors, read_sources
from services.common.settings import InvalidSetting
from services.common.weights import CONTROLNET_FILES, NotAModel, digest, find_all
from services.generator.folder_card import read_catalog
from testing import toy


def read(tmp_path, text):
    file = tmp_path / "models.yaml"
    file.write_text(text)
    return read_sources(str(file))


def test_everything_a_file_may_say(tmp_path):
    for folder in ("sd15/controlnet-depth", "control/canny"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ink.safetensors").touch()
    one, other = read(
        tmp_path,
        """
models:
  - name: sd15
    source: sd15
    dtype: float16
    device: cuda:1
    controlnets: {canny: control/canny, pose: "hub:owner/pose@v2"}
    adapters: {ink: ink.safetensors}
    limits: {max_side: 1024, max_images: 4, max_steps: 60}
    defaults: {sampler: ddim, steps: 20, guidance_scale: 5}
  - {name: "2.1", source: "hub:owner/name@main"}
""",
    )
    # Folders are found from where the file is, whatever the process' own folder
    assert one.source == tmp_path / "sd15"
    assert one.controlnets == {
        "depth": tmp_path / "sd15/controlnet-depth",
        "canny": tmp_path / "control/canny",
        "pose": "hub:owner/pose@v2",
    }
    assert one.adapters == {"ink": tmp_path / "ink.safetensors"}
    assert (one.dtype, one.device) == ("float16", "cuda:1")
    assert one.limits == Limits(max_side=1024, max_images=4, max_steps=60)
    assert one.defaults == Defaults(sampler="ddim", steps=20, guidance_scale=5.0)
    assert (other.name, other.source, other.dtype) == ("2.1", "hub:owner/name@main", "")
    assert other.limits == Limits() and other.defaults == Defaults()


@pytest.fixture
def asked(monkeypatch):
    """What a hub was asked for; it has nothing."""
    names = []

    def fetch(name, *, revision, **_):
        names.append((name, revision))
        raise ValueError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return names


def test_a_source_means_what_it_means_where_it_is_written(tmp_path, monkeypatch, asked):
    here = tmp_path / "here"
    (here / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(here)
    # A path of the working folder is none for a file that lies elsewhere.
    (far,) = read(tmp_path, "models: [{name: a, source: owner/name, adapters: {ink: owner/ink}}]")
    (near,) = read_sources("a=owner/name")
    monkeypatch.chdir(tmp_path)
    (gone,) = read_sources("a=owner/name")
    assert locate(near.source).samefile(here / "owner/name")
    monkeypatch.chdir(here)
    for source in (far.source, gone.source):
        with pytest.raises(NotAModel, match="no such folder; a model on a hub is told as hub:"):
            locate(source)
    with pytest.raises(NotAModel, match="no such folder"):
        locate_adapter(far.adapters["ink"])
    # What only looks like a hub's id is fetched from nowhere.
    assert asked == []


def test_a_hub_is_asked_in_so_many_words(tmp_path, monkeypatch, asked):
    # Whatever lies in the working folder.
    (tmp_path / "hub:owner").mkdir()
    (tmp_path / "hub:owner/name").mkdir()
    monkeypatch.chdir(tmp_path)
    text = 'models: [{name: a, source: "hub:o/n@v2", adapters: {ink: "hub:o/ink"}}]'
    (told,) = read(tmp_path, text)
    (alone,) = read_sources(models_setting("hub:owner/name@main"))
    (named,) = read_sources("b=hub:owner/name")
    assert (alone.name, named.name) == ("name", "b")
    for find in (
        lambda: locate(told.source),
        lambda: locate_adapter(told.adapters["ink"]),
        lambda: locate(alone.source),
        lambda: locate(named.source),
    ):
        with pytest.raises(NotAModel, match="the hub says: not here"):
            find()
    assert asked == [("o/n", "v2"), ("o/ink", None), ("owner/name", "main"), ("owner/name", None)]


@pytest.mark.parametrize(
    ("holds", "fetched"),
    [
        (["", "fp16", "non_ema"], ""),
        (["fp16", "bf16"], "fp16"),
        (["bf16"], "bf16"),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_a_variant_is_fetched_where_there_is_nothing_else(
    tmp_path, monkeypatch, folder, holds, fetched, shards
):
    """A hub that is a folder, and what is asked of it by the hub's own matching of names."""
    there = tmp_path / "there"
    for variant in holds:
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        options = {"max_shard_size": "60KB"} if shards else {}
        pipeline.save_pretrained(there, variant=variant or None, **options)

    def fetch(_, *, revision, allow_patterns, ignore_patterns):
        names = [file.relative_to(there).as_posix() for file in there.rglob("*") if file.is_file()]
        for name in filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there / name, tmp_path / "here" / name)
        return str(tmp_path / "here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    here = locate("hub:owner/name")
    assert {each.variant for each in find_all(here).values()} == {fetched or None}
    named = [file.name for file in here.rglob("*.safetensors")]
    marked = {each for each in holds if each and any(f".{each}" in name for name in named)}
    assert named and marked == ({fetched} if fetched else set())


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("epic, v5", "epic-v5"),
        ("a=b", "a-b"),
        ("a=b,c=d", "a-b-c-d"),
        ("v1.yaml", "v1.yaml"),
        ("x#y?z%20", "x-y-z-20"),
        ("  spaces ", "spaces"),
        ("мо дель", "model"),
        ("hub:x", "hub-x"),
        ("-", "model"),
        ("x" * 200, "x" * 64),
    ],
)
def test_a_folder_of_any_name_is_served(tmp_path, monkeypatch, folder, name):
    (tmp_path / folder / "controlnet-canny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in (str(tmp_path / folder), f"./{folder}"):
        setting = models_setting(model)
        (source,) = read_sources(setting)
        assert source.name == name
        assert source.source == tmp_path / folder
        assert source.controlnets == {"canny": tmp_path / folder / "controlnet-canny"}
        assert read_detectors(setting) == ()
        assert tmp_path / folder / "controlnet-canny" in model_files(model)
    # And from within.
    monkeypatch.chdir(tmp_path / folder)
    (source,) = read_sources(models_setting("."))
    assert (source.name, locate(source.source).resolve()) == (name, tmp_path / folder)


def test_a_models_file_may_lie_in_a_folder_of_any_name(tmp_path):
    file = tmp_path / "a=b, c" / "models.yaml"
    file.parent.mkdir()
    file.write_text("models: [{name: a, source: x}]")
    (source,) = read_sources(models_setting(str(file)))
    assert source.source == file.parent / "x"
    assert file in model_files(str(file))


def test_a_list_of_models_is_read_as_before(tmp_path):
    one, two = read_sources(f"one={tmp_path}, two=hub:owner/name")
    assert (one.name, one.source) == ("one", tmp_path)
    assert (two.name, two.source) == ("two", "hub:owner/name")
    for wrong in ("one=a,one=b", "one=", "=a", "one=a,two"):
        with pytest.raises(InvalidSetting, match="must be NAME=FOLDER"):
            read_sources(wrong)


LAUGHS = "".join(
    f"{chr(n)}: &{chr(n)} [{','.join([f'*{chr(n - 1)}'] * 10)}]\n" for n in range(98, 120)
)


@pytest.mark.parametrize(
    "text",
    [
        f"a: &a [x,x,x,x,x,x,x,x,x,x]\n{LAUGHS}models: *w",
        f"a: &a [x,x,x,x,x,x,x,x,x,x]\n{LAUGHS}? *w\n: 1",
        f"a: &a {{x: 1}}\n{LAUGHS}".replace("[", "{? [").replace("]", "]\n: 1}"),
        "a: &a {x: 1}\nmodels: [" + "*a, " * 100_000 + "]",
        "models: &a [*a, *a]",
        "models: &a {name: *a, source: *a}",
        "models: " + "[" * 100_000,
        "models: " + "{a: " * 5000,
        "models: [{name: " + "9" * 5000 + "}]",
        "models: [" + "x, " * 100_000 + "]",
        "\x00",
        " " * 50_000_000,
        "models: 2001-99-99",
        'models: [{name: a, source: "a\\0b"}]',
        "models: [{name: a, source: ~nobody-of-that-name/x}]",
        "models: [{name: a, source: " + "x" * 500_000 + ", dtype: " + "y" * 400_000 + "}]",
    ],
)
def test_a_hostile_file_is_refused_soon(tmp_path, text):
    start = time.thread_time()
    with pytest.raises(InvalidSetting) as caught:
        read(tmp_path, text)
    assert len(str(caught.value)) < 2000
    assert time.thread_time() - start < 5


def test_a_device_or_a_pipe_is_no_file_of_models(tmp_path):
    pipe, device = tmp_path / "pipe.yaml", tmp_path / "device.yaml"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for file in (pipe, device):
        with pytest.raises(InvalidSetting, match="is no ordinary file"):
            read_sources(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "models.yaml: models: is missing; required: a list of at least one"),
        ("models: []", r"models: is \[\]; required: a list"),
        ("models: [1]", r"models\[0\]: is 1; required: a mapping with the keys name, source"),
        ("[]", "models.yaml: is .*; required: a mapping with the keys models"),
        ("model: []", "models.yaml: has the key 'model'; allowed: models"),
        ("models: [{name: a, source: b, dtpye: x}]", r"models\[0\]: has the key 'dtpye'; allowed"),
        ("models: [{source: b}]", r"models\[0\].name: is missing; allowed: 1 to 64"),
        ("models: [{name: 2.1, source: b}]", r"models\[0\].name: is 2.1; .* in quotes"),
        ("models: [{name: a}]", r"models\[0\].source: is missing; required: a folder"),
        (
            "models: [{name: a, source: b}, {name: b, source: b, dtype: fp8}]",
            r"models.yaml: models\[1\].dtype: is 'fp8'; allowed: float32, float16, bfloat16",
        ),
        ("models: [{name: a, source: b, device: tpu}]", "device: is 'tpu'; allowed: cpu, cuda"),
        ("models: [{name: a, source: b}, {name: a, source: c}]", r"models\[1\].name: is 'a'; the"),
        (
            "models: [{name: a, source: b, limits: {max_steps: yes}}]",
            "max_steps: is True; allowed: a whole number from 1 to 1000",
        ),
        (
            "models: [{name: a, source: b, limits: {max_side: 4096}}]",
            "limits.max_side: is 4096; allowed: a whole number from 16 to 2048",
        ),
        (
            "models: [{name: a, source: b, defaults: {guidance_scale: .nan}}]",
            "defaults.guidance_scale: is nan; allowed: a number from 0 to 50",
        ),
        ("models: [{name: a, source: b, adapters: [x]}]", "adapters: is .*; required: a mapping"),
        ("models: [{name: a, source: b, adapters: {'a b': x}}]", "has the name 'a b'"),
        ("models: [{name: a, source: b, adapters: {ink: 3}}]", "adapters.ink: is 3; required: a f"),
        ("models:\n- name: a\n  name: b", "models.yaml: line 3: the key 'name' stands twice"),
        ("models: [", "is no YAML"),
        ("models: &a [*a]", r"required: a mapping|is no YAML"),
        ("models: !!python/object:os.system {}", "is no YAML"),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path, text, message):
    with pytest.raises(InvalidSetting, match=message):
        read(tmp_path, text)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InvalidSetting, match=r"none\.yaml: cannot be read: No such file"):
        read_sources(str(tmp_path / "none.yaml"))


def test_an_adapter_is_one_file(tmp_path):
    with pytest.raises(NotAModel, match="it holds: none"):
        locate_adapter(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert locate_adapter(tmp_path) == tmp_path / "a.safetensors"
    assert locate_adapter(tmp_path / "a.safetensors") == tmp_path / "a.safetensors"
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(NotAModel, match=r"it holds: a.safetensors, b.safetensors"):
        locate_adapter(tmp_path)
    (tmp_path / "c.bin").touch()
    with pytest.raises(NotAModel, match=r"not a \.safetensors file"):
        locate_adapter(tmp_path / "c.bin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.mini(tmp_path_factory.mktemp("registry") / "mini")


def test_the_digest_is_of_the_models_own_parts(tmp_path, folder):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "controlnet-canny").mkdir()
    (copy / "controlnet-canny" / "config.json").write_text("{}")
    assert digest(copy) == digest(folder)
    assert digest(copy / "controlnet-canny", CONTROLNET_FILES) != digest(copy, CONTROLNET_FILES)
    (copy / "unet" / "config.json").write_text("{}")
    assert digest(copy) != digest(folder)


def catalog(tmp_path, folder, **entry):
    entry = {"name": "toy", "source": str(folder), **entry}
    (tmp_path / "models.yaml").write_text(json.dumps({"models": [entry]}))
    return read_catalog(str(tmp_path / "models.yaml"))


def test_the_card_says_what_the_operator_said(tmp_path, folder):
    (card,) = catalog(
        tmp_path,
        folder,
        dtype="bfloat16",
        device="cpu",
        limits={"max_side": 100, "max_images": 3, "max_steps": 20},
        defaults={"sampler": "ddim", "guidance_scale": 0},
    ).cards
    assert (card.dtype, card.device) == (torch.bfloat16, torch.device("cpu"))
    # A multiple of 16; the model alone would take 128.
    assert (card.max_side, card.max_images, card.max_steps) == (96, 3, 20)
    defaults = card.defaults()
    assert (defaults.sampler, defaults.steps, defaults.guidance_scale) == ("ddim", 20, 0.0)


def test_a_distilled_folder_is_drawn_with_as_it_was_made(tmp_path):
    (card,) = catalog(tmp_path, toy.lcm(tmp_path / "lcm")).cards
    defaults = card.defaults()
    assert (defaults.sampler, defaults.steps) == ("lcm", 8)
    # Guidance is an input of its U-Net: it takes no rows of its own.
    assert defaults.guidance_scale > 1 and card.rows_a_picture(defaults, has_emphasis=True) == 1
    card.check_sampling(replace(defaults, steps=50))
    with pytest.raises(InvalidRequest, match="steps: is 51; sampler lcm of model toy takes at mo"):
        card.check_sampling(replace(defaults, steps=51))


def test_the_weights_size_is_that_in_memory(tmp_path, folder):
    from services.diffusion.networks import load

    loaded = load(folder, dtype=torch.float32, device=torch.device("cpu"))
    numbers = sum(
        parameter.numel()
        for part in (loaded.unet, loaded.vae, *loaded.text_encoders.values())
        for parameter in part.parameters()
    )
    held = sum(each.count for each in find_all(folder).values())
    assert held == pytest.approx(numbers, rel=0.001)
    (half,) = catalog(tmp_path, folder, dtype="float16").cards
    assert half.weights_bytes == 2 * held


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"device": "cuda:99"}, "toy: device: is 'cuda:99'; this machine has: cpu"),
        ({"defaults": {"sampler": "magic"}}, "defaults.sampler: is 'magic'; allowed: euler"),
        (
            {"defaults": {"sampler": "lcm", "steps": 51}},
            "defaults.steps: is 51; sampler lcm takes at most 50",
        ),
        (
            {"limits": {"max_steps": 5}, "defaults": {"steps": 6}},
            "defaults.steps: is 6, above limits.max_steps, which is 5",
        ),
    ],
)
def test_settings_that_contradict_the_model_stop_the_start(tmp_path, folder, entry, message):
    with pytest.raises(InvalidSetting, match=message):
        catalog(tmp_path, folder, **entry)
