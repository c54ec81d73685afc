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
import train  # noqa: E402
import training  # noqa: E402
import words  # noqa: E402
from networks import SIZES, Size  # noqa: E402
from scenes import GROUNDS, Composer, Placement, Scene, scene  # noqa: E402

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
        middle = picture_3HW[:, int(top.y), int(top.x)].tolist()
        assert middle == pytest.approx(colour(NAMES.index(top.concept), shown.look), abs=2)
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


def test_a_shadow_darkens_the_ground_where_it_is_cast(composer):
    item = Placement(concept="apple", x=50.3, y=60.8, side=48, angle=30, flip=True)
    lit = Scene(
        seed=5,
        ground="on sand",
        is_land=False,
        placements=[item],
        look=1,
        shadow=(0.0, 0.0, 0.0),
        caption="an apple on sand",
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
    monkeypatch.setattr(train.denoiser, "draw", lambda *_: None)
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
