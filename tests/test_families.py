"""SDXL beside the older families: what the text encoders give, parity with diffusers, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save

from benchmarks.parity import STRUCTURES, Case
from services.common.registry import ModelSource
from services.generator import models
from services.generator.catalog import ModelCard
from services.generator.conditioning import LayerControl, prepare
from services.generator.stages import TorchStages
from services.generator.word import Word
from tests import toy

PROMPT = "a sushi on a table"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.sdxl(tmp_path_factory.mktemp("families") / "sdxl")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def pipeline(folder):
    return StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)


def load(folder, *, dtype=torch.float32):
    return TorchStages(models.load(folder, dtype=dtype, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def stages(folder):
    return load(folder)


def conditioned(stages, *, negative_prompt="a box", word=None):
    layer = LayerControl(text_start=2, text_end=7, attract=0.5, repel=0.5, word=word)
    return prepare(
        stages,
        prompt=PROMPT,
        negative_prompt=negative_prompt,
        guidance_scale=5.0,
        layers=[layer],
    )


def states(conditioning):
    """In the order of diffusers' encode_prompt."""
    prompt, negative = conditioning.prompt, conditioning.negative
    return prompt.hidden_BTD, negative.hidden_BTD, prompt.pooled_BP, negative.pooled_BP


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("told", "theirs"), [("a box", "a box"), ("", None)])
def test_sdxl_texts_are_diffusers_own(stages, pipeline, told, theirs):
    """A negative prompt that is left out is zeros, as SDXL was trained, and not the encoding of no text."""
    with torch.inference_mode():
        expected = pipeline.encode_prompt(PROMPT, device="cpu", negative_prompt=theirs)
    for ours, stock in zip(
        states(conditioned(stages, negative_prompt=told)), expected, strict=True
    ):
        assert (ours - stock).abs().max() == 0


def test_a_folder_may_say_that_no_text_is_text(copy, pipeline):
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    with torch.inference_mode():
        expected = pipeline.encode_prompt(PROMPT, device="cpu", negative_prompt="")
    for ours, stock in zip(
        states(conditioned(load(copy), negative_prompt="")), expected, strict=True
    ):
        assert (ours - stock).abs().max() == 0


def word_file():
    generator = torch.Generator().manual_seed(0)
    return {
        "clip_l": torch.randn((2, 32), generator=generator),
        "clip_g": torch.randn((2, 48), generator=generator),
    }


def test_a_learned_word_goes_to_both_encoders_as_in_diffusers(folder, stages):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    vectors = word_file()
    for name, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(
            vectors[name], token="<pink>", text_encoder=encoder, tokenizer=tokenizer
        )
    with torch.inference_mode():
        expected = pipeline.encode_prompt(
            "a <pink> sushi on a table", device="cpu", negative_prompt="a box"
        )
    ours = conditioned(stages, word=Word.from_bytes(save(vectors), (32, 48)))
    assert ours.positions == ((2, 3, 4),)
    for one, other in zip(states(ours), expected, strict=True):
        assert (one - other).abs().max() == 0


def test_the_pooled_text_is_of_the_end_mark_in_old_folders_too(copy, stages):
    """Published SDXL folders name no end mark; the highest id is taken for it, which a new token's id would be."""
    for part in ("text_encoder", "text_encoder_2"):
        edit(copy / part / "config.json", eos_token_id=2)
    word = Word.from_bytes(save(word_file()), (32, 48))
    ours, plain = conditioned(load(copy), word=word), conditioned(stages, word=word)
    assert torch.equal(ours.prompt.pooled_BP, plain.prompt.pooled_BP)


def test_sdxl_equals_the_stock_pipelines(tmp_path):
    """The whole table, with more samplers, strengths and scales, is benchmarks/parity.py."""
    case = Case(toy.sdxl(tmp_path))
    strength_hw = np.full(case.grid, 0.3)
    latents, pictures = case.ours("euler", strength_hw, 5.0)
    assert (latents - case.stock("euler", 0.3, 5.0)).abs().max() == 0
    theirs = case.stock("euler", 0.3, 5.0, output_type="np")
    assert np.array_equal(pictures, (theirs * 255).round())
    structures = STRUCTURES["controls"]
    controlled, _ = case.ours("euler", strength_hw, 5.0, structures)
    assert (controlled - case.stock_controlled("euler", 0.3, 5.0, structures)).abs().max() == 0
    assert (controlled - latents).abs().max() > 1e-3


def test_the_size_of_the_canvas_is_told(stages):
    text = conditioned(stages).prompt
    x_1Chw = torch.randn((1, 4, 4, 8), generator=torch.Generator().manual_seed(0))
    beside = stages._beside_time(x_1Chw, text)
    assert beside["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]]


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_in_half_stays_single(copy, upcast):
    edit(copy / "vae" / "config.json", force_upcast=upcast)
    stages = load(copy, dtype=torch.float16)
    assert stages._model.unet.dtype == torch.float16
    assert stages._model.vae.dtype == (torch.float32 if upcast else torch.float16)
    rgb_BHWC = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    assert stages.decode_image(stages.encode_image(rgb_BHWC)).shape == (1, 64, 64, 3)


def test_sdxl_is_named_and_sized_by_its_folder(folder):
    card = ModelCard.read(ModelSource(name="xl", source=str(folder)))
    assert card.family == "sdxl"
    assert (card.facts.size_multiple, card.min_side, card.max_side) == (32, 32, 256)
    assert card.tokens_limit == toy.WINDOW
    assert card.defaults().guidance_scale == 5.0


def _no_second_tokenizer(copy):
    shutil.rmtree(copy / "tokenizer_2")


def _other_tokens(copy):
    file = copy / "tokenizer_2" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["sushi</w>"], vocabulary["cake</w>"] = (
        vocabulary["cake</w>"],
        vocabulary["sushi</w>"],
    )
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda copy: edit(copy / "model_index.json", tokenizer_2=None), "names no tokenizer_2"),
        (_no_second_tokenizer, "tokenizer_2"),
        (lambda copy: shutil.rmtree(copy / "text_encoder_2"), "text_encoder_2"),
        (_other_tokens, "the two tokenizers know different tokens"),
        # A refiner reads one number less beside the time.
        (
            lambda copy: edit(
                copy / "unet" / "config.json", projection_class_embeddings_input_dim=80
            ),
            "takes text_time beside the time, 80 numbers wide; .* 88 wide",
        ),
        (
            lambda copy: edit(copy / "vae" / "config.json", latents_mean=[0, 0, 0, 0]),
            "the autoencoder shifts its latents",
        ),
        (
            lambda copy: edit(copy / "model_index.json", text_encoder_2=None, tokenizer_2=None),
            "takes text_time beside the time",
        ),
    ],
)
def test_what_is_no_whole_sdxl_says_why(copy, spoil, told):
    spoil(copy)
    with pytest.raises(models.ModelError, match=told):
        models.read_facts(copy)
