"""The bundled model's recipe: scenes show what their captions say, and every stage trains, stops and goes on."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

MINI = Path(__file__).resolve().parent.parent / "models" / "mini"
sys.path.append(str(MINI / "recipe"))
import art  # noqa: E402 the recipe's folder is not a package
import controlnet  # noqa: E402
import train  # noqa: E402
import training  # noqa: E402
import words  # noqa: E402
from networks import SIZES, Size  # noqa: E402
from scenes import (  # noqa: E402
    BOUNDS,
    GROUNDS,
    LOOK_WORDS,
    MARKS,
    MOST,
    PORTRAIT_SIDE,
    TURNS,
    VECTORS,
    Composer,
    Placement,
    Scene,
    scene,
    without_marks,
)
from training import token_ids  # noqa: E402

NAMES = list(art.CONCEPTS.values())
LACKING = 3
TINY = Size(
    side=32,
    concepts=len(NAMES),
    vae_channels=(16, 16, 16),
    unet_channels=(16, 16),
    text_width=16,
    text_layers=1,
)


def colour(concept: int, look: int) -> tuple[int, int, int]:
    return 40 + 7 * concept, 250 - 7 * concept, 30 + 30 * look


@pytest.fixture(scope="module")
def gallery() -> np.ndarray:
    """A disc for each concept and look, in a colour of its own; the last look lacks the first concepts."""
    y_HW, x_HW = np.mgrid[0:64, 0:64] - 31.5
    disc_HW = np.where(np.hypot(x_HW, y_HW) < 28, 255, 0)
    pictures = np.zeros((len(NAMES), len(LOOK_WORDS), 64, 64, 4), np.uint8)
    pictures[..., 3] = disc_HW
    for concept in range(len(NAMES)):
        for look in range(len(LOOK_WORDS)):
            pictures[concept, look, ..., :3] = colour(concept, look)
    pictures[:LACKING, -1] = 0
    return pictures


@pytest.fixture(scope="module")
def composer(gallery) -> Composer:
    torch.set_num_threads(1)
    return Composer(128, NAMES, gallery, torch.device("cpu"))


def on_sand(item: Placement) -> Scene:
    """One object that casts no shadow."""
    return Scene(
        seed=5,
        ground="on sand",
        is_land=False,
        placements=[item],
        shadow=(0.0, 0.0, 0.0),
        caption="an apple on sand",
    )


def test_a_scene_follows_from_its_seed_and_not_from_its_batch(composer):
    scenes = [scene(seed, NAMES, composer.palette) for seed in range(12)]
    pictures = composer.paint(scenes)
    again = [scene(seed, NAMES, composer.palette) for seed in (3, 4)]
    assert torch.equal(pictures[3:5], composer.paint(again))
    assert len({picture.numpy().tobytes() for picture in pictures}) == 12


def test_objects_are_where_they_are_placed_in_looks_of_their_own(composer):
    scenes = [scene(seed, NAMES, composer.palette) for seed in range(60)]
    scenes = [each for each in scenes if not each.is_land]
    pictures = composer.paint(scenes)
    seen = []
    for shown, picture_3HW in zip(scenes, pictures, strict=True):
        for item in shown.placements:
            assert item.concept in shown.caption
            assert item.look < len(LOOK_WORDS) - 1 or item.concept not in NAMES[:LACKING]
        # What lies on top is not covered.
        top = shown.placements[-1]
        middle = picture_3HW[:, int(top.y), int(top.x)].tolist()
        if top.turn == 0:
            assert middle == pytest.approx(colour(NAMES.index(top.concept), top.look), abs=2)
            seen.append(top.look)
    assert len(seen) > 20 and set(seen) == set(range(len(LOOK_WORDS)))


def test_turned_hues_are_other_colours_and_are_told(composer):
    disc = Placement(concept="apple", look=0, x=64, y=64, side=64)
    drawn = [
        composer.paint([on_sand(replace(disc, turn=turn))])[0, :, 64, 64] for turn in range(TURNS)
    ]
    assert len({tuple(each.tolist()) for each in drawn}) == TURNS
    assert composer.palette["apple", 0][0] == "yellow" != composer.palette["apple", 0][3]
    turned = told = named = 0
    for seed in range(300):
        shown = scene(seed, NAMES, composer.palette)
        for item in shown.placements:
            words = composer.palette[item.concept, item.look]
            if item.is_described:
                continue
            if words[item.turn] != words[0]:
                turned += 1
                assert f"{words[item.turn]} {item.concept}" in shown.caption
            else:
                told += f"{words[0]} {item.concept}" in shown.caption
            named += f"{LOOK_WORDS[item.look]} " in shown.caption
    assert min(turned, told, named) > 50


def test_captions_name_objects_in_any_order_and_the_ground(composer):
    scenes = [scene(seed, NAMES, composer.palette) for seed in range(400)]
    several = [each for each in scenes if len(each.placements) in (2, 3) and not each.is_land]
    places = [[each.caption.find(item.concept) for item in each.placements] for each in several]
    assert 0.2 < np.mean([first < second for first, second, *_ in places]) < 0.8
    twins = [each for each in several if each.placements[0].concept == each.placements[1].concept]
    assert all(len({item.look for item in each.placements[:2]}) == 2 for each in twins)
    assert 0.1 < len(twins) / len(several) < 0.3
    grounds = {ground for ground in GROUNDS if any(ground in each.caption for each in scenes)}
    assert grounds == set(GROUNDS) and len(GROUNDS) == 10


def test_a_picture_s_own_word_stands_before_its_concept_and_is_made_from_its_picture(composer):
    tokenizer = words.make_tokenizer(MINI / "weights" / "tokenizer", NAMES, composer.palette)
    scenes = [scene(seed, NAMES, composer.palette) for seed in range(200)]
    lengths = set()
    for shown in scenes:
        for mark, item in zip(MARKS, shown.placements, strict=False):
            told = re.findall(f"({mark}+) {item.concept}", shown.caption)
            assert len(told) == item.is_described
            lengths.update(map(len, told))
        plain = without_marks(shown.caption)
        assert plain.isascii() and "  " not in plain
        (ids_T,), (owner_T,) = token_ids(tokenizer, [shown.caption])
        kept = ids_T[ids_T >= 0]
        text = tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert text.replace(" ,", ",") == plain
        for number, item in enumerate(shown.placements):
            (name_N,) = (owner_T == number).nonzero(as_tuple=True)
            assert (name_N.diff() == 1).all() and (ids_T[name_N] < 0).any() == item.is_described
            name = tokenizer.decode(ids_T[name_N].clamp(min=0)[-len(item.concept.split()) :])
            assert name.strip() == item.concept
        assert owner_T.max() == len(shown.placements) - 1
        assert len(ids_T) == 77 and len(ids_T[ids_T < 0]) == sum(map(shown.caption.count, MARKS))
    assert lengths == set(VECTORS)
    caption = f"a {BOUNDS[1]}{2 * MARKS[1]} cat{BOUNDS[1]} on sand"
    (ids_T,), (owner_T,) = token_ids(tokenizer, [caption])
    assert ids_T[2:4].tolist() == [-9, -10]
    assert owner_T.tolist() == 2 * [-1] + 3 * [1] + 72 * [-1]
    drawn = [
        composer.portraits(torch.tensor([[composer.rendering(item), item.turn]]))
        for item in (
            Placement(concept="apple", look=2, turn=turn, x=0, y=0, side=1) for turn in range(2)
        )
    ]
    middle = 255 * drawn[0][0, :, PORTRAIT_SIDE // 2, PORTRAIT_SIDE // 2]
    assert middle.tolist() == pytest.approx([*colour(NAMES.index("apple"), 2), 255], abs=1)
    assert not torch.equal(*drawn)


def test_a_shadow_darkens_the_ground_where_it_is_cast(composer):
    item = Placement(concept="apple", look=1, x=50.3, y=60.8, side=48, angle=30, flip=True)
    lit = on_sand(item)
    dark = replace(lit, shadow=(0.1, 0.2, 0.42))
    difference_HW = (composer.paint([lit])[0].float() - composer.paint([dark])[0].float()).mean(0)
    assert difference_HW.min() >= 0
    assert difference_HW[int(60.8 + 25), int(50.3 + 4)] > 30  # below the disc
    assert difference_HW[60, 50] == 0  # under the disc
    assert difference_HW[:30].max() < 1 and difference_HW[:, 100:].max() < 1  # far away


def test_a_control_picture_has_edges_of_the_layers_that_count(composer):
    scenes = [scene(seed, NAMES, composer.palette) for seed in range(30)]
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
    spent = dict.fromkeys(train.STAGES, 0.0)
    for resume in (False, True):
        for name, (stage, _) in train.STAGES.items():
            # Time for a step, and then for one more at least.
            run = training.Run(TINY, composer, tmp_path, resume=resume)
            stage(run, spent[name] + 0.02 if resume else 0.002)
            spent[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)["worked"] / 60
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
    # Begun with an exported model and given no time, the stage exports that.
    run = training.Run(TINY, composer, tmp_path / "more", start=made)
    train.denoiser.train(run, 0.0)
    again = ControlNetModel.from_pretrained(run.weights / controlnet.NAME).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    # A picture's own word is heard where it stands, a control picture in its own half of the batch.
    tokenizer = words.make_tokenizer(tmp_path / "tokenizer", TINY.names, composer.palette)
    model = train.denoiser.Model(run, tokenizer)
    captions = [
        f"a {BOUNDS[0]}{MARKS[0]} cat{BOUNDS[0]}",
        f"a {BOUNDS[1]}{MARKS[1]} cat{BOUNDS[1]}",
        "a cat",
    ]
    ids_BT, owner_BT = token_ids(tokenizer, captions)
    x_BCHW = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).expand(
        3, -1, -1, -1
    )
    blur_BKVC = torch.zeros(3, MOST, max(VECTORS), TINY.text_width)
    shown_BK2 = torch.zeros(3, MOST, 2, dtype=torch.int16)
    white_1HW = torch.full((1, TINY.side, TINY.side), 255, dtype=torch.uint8)

    nobody_BT = torch.full_like(owner_BT, -1)
    seen_BKhw = torch.full((3, MOST, 4, 4), 255, dtype=torch.uint8)

    def predicted(
        shown_BK2: torch.Tensor, counts_1HW: torch.Tensor, owner_BT: torch.Tensor = nobody_BT
    ) -> torch.Tensor:
        with torch.no_grad():
            states_BTC = model.hear(ids_BT, shown_BK2, blur_BKVC)
            t_B = torch.full((3,), 500)
            return model(x_BCHW, t_B, states_BTC, white_1HW, counts_1HW, owner_BT, seen_BKhw)

    before_BCHW = predicted(shown_BK2, 0 * white_1HW)
    shown_BK2[:, 1] = 5
    changed_B = (predicted(shown_BK2, 0 * white_1HW) != before_BCHW).flatten(1).any(dim=1)
    assert changed_B.tolist() == [False, True, False]
    shown_BK2[:, 1] = 0
    changed_B = (predicted(shown_BK2, white_1HW) != before_BCHW).flatten(1).any(dim=1)
    assert changed_B.tolist() == [True, False, False]
    # A name whose thing is seen everywhere is heard as any; one whose thing is not seen is not.
    assert torch.equal(predicted(shown_BK2, 0 * white_1HW, owner_BT), before_BCHW)
    seen_BKhw.zero_()
    heard_BCHW = predicted(shown_BK2, 0 * white_1HW, owner_BT)
    assert (heard_BCHW != before_BCHW).flatten(1).any(dim=1).tolist() == [True, True, False]
    # What is recalled at the end of a name is the rendering that is shown.
    states_BTC = model.hear(ids_BT, shown_BK2, blur_BKVC)
    error = model.recall(states_BTC, owner_BT, shown_BK2)
    (slope_BTC,) = torch.autograd.grad(error, states_BTC)
    assert slope_BTC.any(dim=2).nonzero().tolist() == [[0, 3], [1, 3]]
    assert not model.recall(states_BTC, nobody_BT, shown_BK2)


def test_processes_make_the_scenes_that_threads_make(tmp_path, gallery):
    composer = Composer(TINY.side, TINY.names, gallery, torch.device("cpu"))
    tokenizer = words.make_tokenizer(
        tmp_path / "tokenizer", TINY.names, composer.palette, MINI / "weights"
    )
    vae = TINY.autoencoder()
    pools = []
    for has_painters in (False, True):
        run = training.Run(TINY, composer, tmp_path)
        run.has_painters = has_painters
        maker = training.Maker(
            size=TINY, composer=composer, tokenizer=tokenizer, control=controlnet.control
        )
        # What is not a multiple of a step's new ones.
        few = training.Pool(run, vae, maker, 6)
        few.add(range(12, 18))
        assert few.ids_NT.any(dim=1).all()
        pool = training.Pool(run, vae, maker, 64)
        pool.first = 8 * run.new
        pool.add(range(pool.first))
        batches = [pool.batch(step, np.random.default_rng(step)) for step in range(12)]
        pools.append((*pool.kept, *few.kept[1:], *batches))
    assert pool.oldest == 20 * run.new - 64 > 0
    (theirs, *their_others), (ours, *our_others) = pools
    # Networks sum in another order where they are given another number of pictures.
    torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=2e-3)
    for theirs, ours in zip(their_others, our_others, strict=True):
        assert torch.equal(theirs, ours) and theirs.any()


def test_a_loss_that_is_not_finite_ends_the_training_and_no_checkpoint_is_made(tmp_path, composer):
    run = training.Run(TINY, composer, tmp_path)
    weight = torch.nn.Parameter(torch.ones(1))
    course = training.Course(run, "stage", 1.0, [{"params": [weight], "lr": 1e-3}])

    def learn(step: int) -> torch.Tensor:
        return torch.tensor(1.0 if step < 10 else float("nan"))

    with pytest.raises(FloatingPointError, match="loss of step 15"):
        course.attend(learn, lambda: pytest.fail("saved"))


@pytest.mark.parametrize("stock", [AttnProcessor(), AttnProcessor2_0()])
def test_a_name_with_an_owner_is_heard_where_the_owner_is_seen(stock):
    torch.manual_seed(0)
    attn = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    in_place = train.denoiser.HeardInPlace(stock)
    seen_BKhw = torch.zeros(2, MOST, 8, 8, dtype=torch.uint8)
    seen_BKhw[:, 1, :, :4] = 255
    # Token 2 is of placement 1 in the first caption, of nobody in the second.
    in_place.tell(torch.tensor([[-1, -1, 1, -1], [-1, -1, -1, -1]]), seen_BKhw)
    x_BQC, text_BTC = torch.randn(2, 16, 8), torch.randn(2, 4, 6)
    other_BTC = text_BTC.clone()
    other_BTC[:, 2] = torch.randn(6)
    with torch.no_grad():
        before_BQC, after_BQC = (in_place(attn, x_BQC, text) for text in (text_BTC, other_BTC))
        plain_BQC = stock(attn, x_BQC, text_BTC)
    moved_BQ = (after_BQC - before_BQC).abs().amax(dim=2).view(2, 4, 4)
    assert moved_BQ[0, :, :2].min() > 0.01 and moved_BQ[1].min() > 0.01
    assert moved_BQ[0, :, 2:].max() < 1e-3
    assert torch.equal(before_BQC[1], plain_BQC[1])
    torch.testing.assert_close(
        before_BQC[0].view(4, 4, 8)[:, :2], plain_BQC[0].view(4, 4, 8)[:, :2]
    )


def test_what_is_seen_of_objects_adds_up_to_what_they_cover(composer):
    scenes = [scene(seed, NAMES, composer.palette) for seed in range(20)]
    layers = composer.layers(scenes)
    seen_BKhw = layers.visible(len(scenes), 16)
    through_B1HW = torch.ones(len(scenes), 1, composer.side, composer.side)
    for of, paint_4HW in zip(layers.of_M, layers.paint_M4HW, strict=True):
        through_B1HW[of] *= 1 - paint_4HW[3]
    covered_Bhw = torch.nn.functional.adaptive_avg_pool2d(1 - through_B1HW, 16)[:, 0]
    torch.testing.assert_close(seen_BKhw.sum(dim=1), covered_Bhw)
    for shown, seen_Khw in zip(scenes, seen_BKhw, strict=True):
        assert not seen_Khw[len(shown.placements) :].any()
        # What lies in front is seen whole.
        front_HW = layers.paint_M4HW[layers.of_M == shown.seed][len(shown.placements) - 1, 3]
        whole_hw = torch.nn.functional.adaptive_avg_pool2d(front_HW[None], 16)[0]
        torch.testing.assert_close(seen_Khw[len(shown.placements) - 1], whole_hw)
