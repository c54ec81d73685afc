"""The bundled model's recipe: scenes show what their captions say, and every stage trains, stops and goes on."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline

MINI = Path(__file__).resolve().parent.parent / "models" / "mini"
sys.path.append(str(MINI / "recipe"))
import art  # noqa: E402 the recipe's folder is not a package
import controlnet  # noqa: E402
import denoiser  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
import words  # noqa: E402
from networks import READ_SIDE, SIZES, Size  # noqa: E402
from scenes import GROUNDS, PLAIN, WORD, Composer, Placement, Scene, scene  # noqa: E402

NAMES = list(art.CONCEPTS.values())
TINY = Size(
    side=32,
    concepts=len(NAMES),
    vae_channels=(16, 16, 16),
    unet_channels=(16, 16),
    text_width=16,
    text_layers=1,
)


def colour(concept: int, look: int) -> tuple[int, int, int]:
    return 40 + 7 * concept, 250 - 7 * concept, 30 + 60 * look


@pytest.fixture(scope="module")
def gallery() -> np.ndarray:
    """A disc for each concept and look, in a colour of its own."""
    y_HW, x_HW = np.mgrid[0:64, 0:64] - 31.5
    disc_HW = np.where(np.hypot(x_HW, y_HW) < 28, 255, 0)
    pictures = np.zeros((len(NAMES), len(art.LOOKS), 64, 64, 4), np.uint8)
    pictures[..., 3] = disc_HW
    for concept in range(len(NAMES)):
        for look in range(len(art.LOOKS)):
            pictures[concept, look, ..., :3] = colour(concept, look)
    return pictures


@pytest.fixture(scope="module")
def composer(gallery) -> Composer:
    torch.set_num_threads(1)
    return Composer(128, NAMES, gallery, torch.device("cpu"))


def test_a_scene_follows_from_its_seed_and_not_from_its_batch(composer):
    scenes = [scene(seed, NAMES) for seed in range(12)]
    pictures = composer.paint(scenes)
    assert torch.equal(pictures[3:5], composer.paint([scene(3, NAMES), scene(4, NAMES)]))
    assert len({picture.numpy().tobytes() for picture in pictures}) == 12


def test_objects_are_where_they_are_placed_in_the_look_of_the_scene(composer):
    scenes = [each for each in (scene(seed, NAMES) for seed in range(40)) if not each.is_land]
    pictures = composer.paint(scenes)
    seen = 0
    for shown, picture_3HW in zip(scenes, pictures, strict=True):
        for item in shown.placements:
            assert item.concept in shown.caption
        # What lies on top is not covered.
        top = shown.placements[-1]
        if top.tint != PLAIN:
            continue
        middle = picture_3HW[:, int(top.y), int(top.x)].tolist()
        assert middle == pytest.approx(colour(NAMES.index(top.concept), top.look), abs=2)
        seen += 1
    assert seen > 20


def test_captions_name_objects_in_any_order_and_the_ground():
    scenes = [scene(seed, NAMES) for seed in range(400)]
    several = [each for each in scenes if len(each.placements) in (2, 3) and not each.is_land]
    first = [each.caption.find(each.placements[0].concept) for each in several]
    second = [each.caption.find(each.placements[1].concept) for each in several]
    assert 0.2 < np.mean(np.array(first) < np.array(second)) < 0.8
    grounds = {ground for ground in GROUNDS if any(ground in each.caption for each in scenes)}
    assert grounds == set(GROUNDS) and len(GROUNDS) == 10


def test_only_what_a_caption_has_a_place_for_may_look_as_it_likes():
    scenes = [scene(seed, NAMES) for seed in range(400)]
    for each in scenes:
        places = [part.split() for part in each.caption.split(WORD)[1:]]
        assert len(places) == len(each.worded)
        for words_after, item in zip(places, each.worded, strict=True):
            assert " ".join(words_after).startswith(item.concept)
        plain = [item for item in each.placements if not item.has_word]
        assert len({item.look for item in plain}) <= 1
        assert all(item.tint == PLAIN for item in plain)
    worded = [each for each in scenes if each.worded]
    assert 0.3 < len(worded) / len(scenes) < 0.6
    assert any(len({item.look for item in each.worded}) > 1 for each in worded)


def test_a_tint_changes_colours_and_nothing_else(composer):
    plain = Placement(concept="apple", x=0, y=0, side=1, look=2)
    grey = replace(plain, tint=(0.0, 0.0, 1.0))
    turned = replace(plain, tint=(2 * np.pi / 3, 1.0, 1.0))
    paint_M4HW = composer.sprites([plain, grey, turned], 32)
    assert torch.equal(paint_M4HW[0, 3], paint_M4HW[1, 3])
    assert torch.equal(paint_M4HW[0, 3], paint_M4HW[2, 3])
    same, pale, other = paint_M4HW[:, :3, 16, 16]
    assert same.tolist() == pytest.approx(
        [value / 255 for value in colour(NAMES.index("apple"), 2)], abs=0.01
    )
    assert pale.tolist() == pytest.approx([float(same.mean())] * 3, abs=1e-3)
    # A third of a turn makes of red green, of green blue.
    assert other.tolist() == pytest.approx(same.roll(1).tolist(), abs=1e-3)


def test_each_place_of_a_caption_reads_its_own_picture(tmp_path, composer):
    run = training.Run(TINY, composer, tmp_path)
    tokenizer = words.make_tokenizer(tmp_path / "tokenizer", NAMES, MINI / "weights")
    model = denoiser.Model(run, tokenizer).eval()
    captions = ["a cat on sand", f"a {WORD} cat and a {WORD} dog"]
    ids_BT = training.token_ids(tokenizer, captions)
    looks_BK4HW = torch.rand(2, 2, 4, READ_SIDE, READ_SIDE)
    seen: list[torch.Tensor] = []
    model.text.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    x_BCHW, t_B = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        for each_BK4HW in (looks_BK4HW, looks_BK4HW.flip(1)):
            model(x_BCHW, t_B, ids_BT, each_BK4HW)
    first_BTC, second_BTC = seen
    assert torch.equal(first_BTC[0], second_BTC[0])
    (places,) = (ids_BT[1] == tokenizer.bos_token_id).nonzero().T
    position_TC = model.text.embeddings.position_embedding.weight
    one, two = (first_BTC[1] - position_TC)[places[1:]]
    assert len(places) == 3 and not torch.allclose(one, two, atol=1e-3)
    swapped = (second_BTC[1] - position_TC)[places[1:]]
    assert torch.allclose(swapped, torch.stack([two, one]), atol=1e-5)
    others = torch.ones(77, dtype=torch.bool).index_fill(0, places[1:], False)
    assert torch.equal(first_BTC[1, others], second_BTC[1, others])


def test_a_shadow_darkens_the_ground_where_it_is_cast(composer):
    item = Placement(concept="apple", x=50.3, y=60.8, side=48, look=1, angle=30, flip=True)
    lit = Scene(
        seed=5,
        ground="on sand",
        is_land=False,
        placements=[item],
        shadow=(0.0, 0.0, 0.0),
        caption="an apple on sand",
        order=(0,),
    )
    dark = replace(lit, shadow=(0.1, 0.2, 0.42))
    difference_HW = (composer.paint([lit])[0].float() - composer.paint([dark])[0].float()).mean(0)
    assert difference_HW.min() >= 0
    assert difference_HW[int(60.8 + 25), int(50.3 + 4)] > 30  # below the disc
    assert difference_HW[60, 50] == 0  # under the disc
    assert difference_HW[:30].max() < 1 and difference_HW[:, 100:].max() < 1  # far away


def test_a_control_picture_has_edges_of_the_layers_that_count(composer):
    scenes = [scene(seed, NAMES) for seed in range(30)]
    layers = composer.layers(scenes)
    pictures = composer.paint(scenes, layers)
    parts = layers.paint_M4HW.split([len(each.placements) for each in scenes])
    cut = 0
    for shown, paint_K4HW, picture_3HW in zip(scenes, parts, pictures, strict=True):
        edges_HW, counts_HW = controlnet.control(shown, paint_K4HW, picture_3HW)
        assert set(np.unique(edges_HW)) == {0, 255}
        if counts_HW.min() < 255:
            cut += 1
            assert (edges_HW[counts_HW == 0] == 0).all()
    assert cut > 3


def test_both_sizes_fit_the_budget():
    for size in SIZES.values():
        unet = size.denoiser()
        parts = [size.autoencoder(), size.text_encoder(1394, 1393), unet]
        parts.append(
            ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))
        )
        weights = sum(value.numel() for part in parts for value in part.parameters())
        assert 2 * weights < 31_000_000
        assert len(size.names) == size.concepts


def test_every_stage_trains_stops_and_goes_on(tmp_path, gallery, monkeypatch, capsys):
    monkeypatch.setattr(controlnet, "draw", lambda *_: None)
    monkeypatch.setattr(denoiser, "draw", lambda *_: None)
    words.copy_vocabulary(MINI / "weights" / "tokenizer", tmp_path / "tokenizer")
    composer = Composer(TINY.side, TINY.names, gallery, torch.device("cpu"))
    for resume in (False, True):
        for stage, _ in train.STAGES.values():
            # Long enough for a step, the second time for more.
            run = training.Run(TINY, composer, tmp_path, resume=resume)
            stage(run, 0.02 if resume else 0.002)
    made = tmp_path / "weights"
    pipeline = StableDiffusionPipeline.from_pretrained(made)
    assert pipeline.vae.config.scaling_factor > 0
    model = ControlNetModel.from_pretrained(made / "controlnet-canny")
    assert any(value.any() for value in model.controlnet_mid_block.parameters())
    lines = capsys.readouterr().out
    for name in train.STAGES:
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert saved["step"] > 1 and saved["worked"] >= 1.2, lines
    assert not list(tmp_path.rglob("*.part"))
