import json
import shutil

import pytest
import torch

from services.common.collage import Extent
from services.common.hub import locate
from services.common.weights import NotAModel, digest
from services.diffusion import networks
from services.diffusion.facts import read_facts
from services.diffusion.folder import UnsupportedModel
from services.diffusion.tokens import TextTooLong
from services.generator.schedule import SAMPLERS, scheduler
from testing import toy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.mini(tmp_path_factory.mktemp("models") / "mini")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load(folder):
    return networks.load(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "factor", "multiple", "side", "widths", "prediction"),
    [
        (toy.sd1, 8, 64, 64, (32,), "epsilon"),
        (toy.sd2, 8, 64, 64, (48,), "v_prediction"),
        (toy.sdxl, 8, 32, 64, (32, 48), "epsilon"),
        (toy.mini, 4, 16, 32, (32,), "epsilon"),
    ],
)
def test_facts_come_from_the_folder(tmp_path, make, factor, multiple, side, widths, prediction):
    facts = read_facts(make(tmp_path))
    assert facts.latent_factor == factor
    assert facts.size_multiple == multiple
    assert facts.native == Extent(width=side, height=side)
    assert facts.text_widths == widths
    assert facts.pooled_width == (40 if make is toy.sdxl else 0)
    assert facts.prediction_type == prediction
    assert facts.latent_channels == 4
    assert facts.token_limit == 75


def test_every_job_gets_its_own_scheduler_of_the_folders_schedule(folder):
    facts = read_facts(folder)
    for name in SAMPLERS:
        one, other = scheduler(facts, name), scheduler(facts, name)
        assert one is not other
        assert one.config.beta_end == 0.012
        # Latents are not pictures: clipping them to [-1, 1] would flatten every colour.
        assert not one.config.get("clip_sample", False)


def test_digest_is_of_contents(folder, copy):
    assert digest(copy) == digest(folder)
    (copy / "README.md").write_text("not a part of the model")
    assert digest(copy) == digest(folder)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert digest(copy) != digest(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(NotAModel, match=r"model_index\.json"):
        load(tmp_path)
    for name in (tmp_path / "none", "none", "a/b", "hub:a/b/c", "hub:a", "hub:"):
        with pytest.raises(NotAModel, match=r"no such folder.*hub:OWNER/NAME@REVISION"):
            locate(name)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(NotAModel, match=part):
        load(copy)


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_cut_weights_are_refused(copy, name):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(NotAModel, match=name.split("/")[0]):
        load(copy)


def test_a_config_that_is_not_json_is_refused(copy):
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(NotAModel, match=r"unet/config\.json"):
        load(copy)


def test_pickled_weights_are_not_read(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(NotAModel, match="unet"):
        load(copy)


def test_other_families_are_named(copy):
    edit(copy / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(NotAModel, match="names no tokenizer_2"):
        load(copy)
    edit(copy / "model_index.json", text_encoder_2=None, unet=["diffusers", "UNet3DConditionModel"])
    with pytest.raises(UnsupportedModel, match="UNet3DConditionModel"):
        load(copy)
    edit(copy / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    edit(copy / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    with pytest.raises(UnsupportedModel, match="text_encoder_3"):
        load(copy)


def test_other_prediction_types_are_named(copy):
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(UnsupportedModel, match="'sample'"):
        load(copy)


def test_tokens_know_their_characters(folder):
    facts = read_facts(folder)
    text = "A  SUSHI on\na table, cafe\u0301 sushi"
    tokens = facts.tokenize(text)
    first, last = text.index("SUSHI"), text.rindex("sushi")
    assert tokens.of_characters(first, first + 5) == (2,)
    assert tokens.of_characters(last, last + 5) == (len(tokens.spans),)
    assert tokens.ids_ET[0][2] == tokens.ids_ET[0][len(tokens.spans)]
    assert tokens.of_characters(0, 0) == ()
    assert len(tokens.ids_ET[0]) == toy.WINDOW


def test_a_text_that_does_not_fit_says_by_how_much(folder):
    facts = read_facts(folder)
    assert len(facts.tokenize("sushi " * 75).spans) == 75
    with pytest.raises(TextTooLong, match="is 78 tokens long, 3 more than the 75"):
        facts.tokenize("sushi " * 78)
