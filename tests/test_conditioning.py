"""Prompts with learned words: what the text encoders read, and which positions steer which layer."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save

from services.common.collage import Dials
from services.common.errors import InvalidRequest
from services.diffusion.networks import load
from services.diffusion.text import Text
from services.diffusion.word import Word
from services.generator.conditioning import LayerControl, prepare
from services.generator.stages import TorchStages
from testing import toy

PROMPT = "a sushi on a table"
SUSHI, TABLE = (2, 7), (13, 18)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.sd1(tmp_path_factory.mktemp("conditioning") / "sd1")


@pytest.fixture(scope="module")
def stages(folder):
    return TorchStages(load(folder, dtype=torch.float32, device=torch.device("cpu")))


def vectors(count, width=32, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, width), generator=generator)


def word(count=1, *, seed=0):
    return Word(vectors=(vectors(count, seed=seed),))


def control(span, learned=None):
    start, end = span
    return LayerControl(
        text_start=start, text_end=end, dials=Dials(noise=1.0, attract=0.5, repel=0.5), word=learned
    )


def conditioned(stages, *layers, prompt=PROMPT, negative_prompt=""):
    return prepare(
        stages,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance_scale=5.0,
        layers=layers,
    )


def test_learned_words_equal_diffusers_textual_inversion(folder, stages, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    files = {"<pink>": save({"<pink>": vectors(3)}), "<oak>": save({"emb": vectors(1, seed=1)[0]})}
    learned = []
    for token, data in files.items():
        (tmp_path / f"{token}.safetensors").write_bytes(data)
        pipeline.load_textual_inversion(tmp_path, weight_name=f"{token}.safetensors", token=token)
        learned.append(Word.from_bytes(data, (32,)))
    with torch.inference_mode():
        (plain, negative), (sushi, _), (table, _) = (
            pipeline.encode_prompt(text, "cpu", 1, True, "a box")
            for text in (PROMPT, "<pink> sushi", "<oak> table")
        )
    ours = conditioned(
        stages, control(SUSHI, learned[0]), control(TABLE, learned[1]), negative_prompt="a box"
    )
    # The word's vectors steer with the layer's own tokens: begin, "a", three vectors, "sushi", "on", "a", and so on.
    assert ours.positions == ((2, 3, 4, 5), (8, 9))
    # Each layer's words are those of a text of their own, all else is the prompt without learned words.
    theirs = torch.cat(
        [plain[:, :2], sushi[:, 1:5], plain[:, 3:5], table[:, 1:3], plain[:, 6:-4]], dim=1
    )
    assert (ours.prompt.hidden_BTD - theirs).abs().max() == 0
    assert (ours.negative.hidden_BTD - negative).abs().max() == 0


def test_a_learned_word_is_heard_by_its_own_layer_only(stages):
    """Text encoders mix what follows a word with it: what other layers hear must not depend on it."""
    both = conditioned(stages, control(SUSHI, word(2)), control(TABLE, word(1)))
    other = conditioned(stages, control(SUSHI, word(2, seed=3)), control(TABLE, word(1)))
    differs_T = (both.prompt.hidden_BTD != other.prompt.hidden_BTD).any(dim=2)[0]
    assert differs_T.nonzero().flatten().tolist() == list(both.positions[0])


def test_a_learned_word_is_there_for_one_prompt_only(stages):
    before = conditioned(stages, control(SUSHI)).prompt.hidden_BTD
    (encoder,) = stages._model.text_encoders.values()
    table = encoder.get_input_embeddings().weight.clone()
    with_word = conditioned(stages, control(SUSHI, word())).prompt.hidden_BTD
    after = conditioned(stages, control(SUSHI)).prompt.hidden_BTD
    assert not torch.equal(with_word, before)
    assert torch.equal(after, before)
    assert torch.equal(encoder.get_input_embeddings().weight, table)


def test_a_text_that_fails_leaves_no_word_behind(stages):
    before = conditioned(stages, control(SUSHI)).prompt.hidden_BTD
    ids = stages.facts.tokenize(PROMPT).ids_ET
    wrong = Word(vectors=(vectors(2, width=31),))
    with pytest.raises(RuntimeError):
        stages.encode_text([Text(ids_ET=ids, word=wrong, positions=(1, 2))])
    assert torch.equal(conditioned(stages, control(SUSHI)).prompt.hidden_BTD, before)


def test_the_weight_multiplies_the_vectors(stages):
    plain, doubled = word(), Word(vectors=(2 * vectors(1),))
    assert torch.equal(plain.weighted(1).vectors[0], plain.vectors[0])
    one, other = (
        conditioned(stages, control(SUSHI, learned)).prompt.hidden_BTD
        for learned in (plain.weighted(2), doubled)
    )
    assert torch.equal(one, other)


def test_words_of_layers_that_share_text_keep_to_their_layer(stages):
    # The whole prompt, a part of it, and a layer whose text is nowhere.
    layers = (control((0, 18), word(2)), control(SUSHI, word(1)), control((0, 0), word(1)))
    made = conditioned(stages, *layers)
    # Begin, two of the first, one of the third, "a", one of the second, "sushi", "on", "a", "table".
    assert made.positions == ((1, 2, 4, 6, 7, 8, 9), (5, 6), (3,))
    # "sushi" is of two layers: it stays as the prompt has it.
    plain = conditioned(stages)
    assert torch.equal(made.prompt.hidden_BTD[0, 6], plain.prompt.hidden_BTD[0, 2])
    assert not torch.equal(made.prompt.hidden_BTD[0, 7], plain.prompt.hidden_BTD[0, 3])


def test_vectors_count_as_tokens_of_the_prompt(stages):
    long = "sushi " * 70
    conditioned(stages, control((0, 5), word(5)), prompt=long)
    with pytest.raises(InvalidRequest, match="is 76 tokens long with 6 of learned words") as told:
        conditioned(stages, control((0, 5), word(6)), prompt=long)
    assert told.value.reason == "PROMPT_TOO_LONG"
    # The negative prompt holds none.
    conditioned(stages, control(SUSHI, word(8)), negative_prompt="sushi " * 75)
