import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from services.common.collage import Dials, Sampling
from services.common.errors import InvalidRequest
from services.common.plate import Plate
from services.diffusion.networks import load
from services.diffusion.text import Text
from services.generator import schedule
from services.generator.conditioning import LayerControl, prepare
from services.generator.sampler import Run, paste, step
from services.generator.schedule import SAMPLERS
from services.generator.stages import TorchStages
from testing import toy
from testing.parity import Case

PROMPT = "sushi and cake on the table"
SAMPLING = Sampling(model="toy", sampler="euler", steps=6, guidance_scale=4.0, images=1, seed=7)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.mini(tmp_path_factory.mktemp("sampler") / "mini")


@pytest.fixture(scope="module")
def stages(folder):
    return TorchStages(load(folder, dtype=torch.float32, device=torch.device("cpu")))


@pytest.fixture
def calls(stages):
    """Batch sizes of the U-Net calls."""
    sizes = []
    hook = stages._model.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


def plate(strength=1.0, *, release=255, seed=0, layers=2):
    """A landscape canvas of 48 x 32 px, 12 x 8 cells, layers side by side."""
    rng = np.random.default_rng(seed)
    visible = np.zeros((layers, 8, 12), np.float32)
    for index, columns in enumerate(np.array_split(np.arange(12), layers or 1)[:layers]):
        visible[index][:, columns] = 1
    return Plate(
        composite_HWC=rng.integers(0, 256, (32, 48, 3), dtype=np.uint8),
        visible_Lhw=visible,
        strength_hw=np.broadcast_to(np.float64(strength), (8, 12)).copy(),
        release_HW=np.broadcast_to(np.uint8(release), (32, 48)).copy(),
    )


LAYERS = (
    LayerControl(text_start=0, text_end=5, dials=Dials(noise=1.0, attract=0.8, repel=0.9)),
    LayerControl(text_start=10, text_end=14, dials=Dials(noise=1.0, attract=0.3, repel=0.6)),
)


def begin(stages, plate, sampling=SAMPLING, *, layers=LAYERS, prompt=PROMPT):
    conditioning = prepare(
        stages,
        prompt=prompt,
        negative_prompt="box",
        guidance_scale=sampling.guidance_scale,
        layers=layers[: len(plate.visible_Lhw)],
    )
    return Run.begin(stages, plate=plate, conditioning=conditioning, sampling=sampling)


def finish(stages, run):
    while not run.is_done:
        step(stages, [run])
    return list(run.finish(stages))


def test_equals_diffusers_bit_for_bit(tmp_path):
    """The whole table, with more strengths and models, is benchmarks/parity.py."""
    case = Case(toy.sd2(tmp_path))
    assert set(case.differences("euler_ancestral", [5.0], [0.7]).values()) == {0.0}


def test_a_distilled_model_equals_diffusers_bit_for_bit(tmp_path):
    """Its guidance scale is an input, so there are no rows without the prompt."""
    case = Case(toy.lcm(tmp_path))
    assert set(case.differences("lcm", [5.0], [0.7]).values()) == {0.0}
    sampling = replace(SAMPLING, sampler="lcm", guidance_scale=5.0)
    one, other = (
        finish(case.stages, begin(case.stages, plate(), replace(sampling, guidance_scale=scale)))
        for scale in (1.0, 5.0)
    )
    assert not np.array_equal(one, other)


def test_timesteps_are_spaced_as_the_folder_says(tmp_path):
    """Models distilled for few steps begin at the last timestep: trailing spacing."""
    folder = toy.mini(tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "timestep_spacing": "trailing"}))
    case = Case(folder)
    scheduler = schedule.scheduler(case.facts, "euler")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert set(case.differences("euler", [1.0], [0.7]).values()) == {0.0}


def test_no_strength_no_work(stages, calls):
    # int(6 * 0.16) is no step either.
    run = begin(stages, plate(0.16), replace(SAMPLING, images=2))
    assert run.is_done and run.steps_total == 0
    pictures = list(run.finish(stages))
    assert [np.array_equal(picture, plate().composite_HWC) for picture in pictures] == [True, True]
    assert calls == []


def test_steps_are_those_of_the_largest_strength(stages, calls):
    strength = np.zeros((8, 12))
    strength[2, 3] = 0.5
    run = begin(stages, plate(strength))
    assert run.steps_total == 3
    finish(stages, run)
    # With and without the prompt.
    assert calls == [2, 2, 2]
    finish(stages, begin(stages, plate(), replace(SAMPLING, guidance_scale=1.0, images=3)))
    assert calls[3:] == [3] * 6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cells_without_strength_end_as_they_were(stages, sampler):
    strength = np.zeros((8, 12))
    strength[:, 6:] = 1.0
    strength[:, 6] = 0.5
    run = begin(stages, plate(strength), replace(SAMPLING, sampler=sampler, images=2))
    finish(stages, run)
    z0 = stages.encode_image(torch.from_numpy(plate().composite_HWC)[None])
    kept, drawn = run.latents_NChw[..., :6], run.latents_NChw[..., 6:]
    assert torch.equal(kept, z0[..., :6].expand(2, -1, -1, -1))
    assert (drawn - z0[..., 6:]).abs().amin(dim=(0, 1)).max() > 1e-3
    assert torch.isfinite(run.latents_NChw).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_less_strength_changes_less(stages, sampler):
    z0 = stages.encode_image(torch.from_numpy(plate().composite_HWC)[None])
    strength = np.repeat([0.0, 0.25, 0.5, 0.75], 3) * np.ones((8, 1))
    run = begin(stages, plate(strength, layers=0), replace(SAMPLING, sampler=sampler, steps=8))
    finish(stages, run)
    change = [(run.latents_NChw - z0)[..., x : x + 3].abs().mean().item() for x in range(0, 12, 3)]
    assert change == sorted(change) and change[0] == 0 < change[1]


def test_released_pixels_only(stages):
    release = np.zeros((32, 48), np.uint8)
    release[:, 24:], release[:, 20:24] = 255, 51
    run = begin(stages, plate(release=release))
    (picture,) = finish(stages, run)
    whole = stages.decode_image(run.latents_NChw)[0].numpy()
    composite = plate().composite_HWC
    assert np.array_equal(picture[:, :20], composite[:, :20])
    assert np.array_equal(picture[:, 24:], whole[:, 24:])
    between = composite[:, 20:24] * 0.8 + whole[:, 20:24] * 0.2
    assert np.abs(picture[:, 20:24] - between).max() <= 0.5


def test_pasting_is_exact_at_both_ends():
    everything = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    for release, expected in ((0, everything), (255, everything[:, ::-1])):
        share = np.full((1, 256), release, np.uint8)
        assert np.array_equal(paste(everything, everything[:, ::-1], share), expected)


def test_same_request_same_bytes(stages):
    one, other = (finish(stages, begin(stages, plate())) for _ in range(2))
    assert np.array_equal(one, other)


def test_picture_k_is_the_picture_of_seed_plus_k(stages):
    many = SAMPLING_3 = replace(SAMPLING, images=3, sampler="euler_ancestral", seed=2**64 - 1)
    pictures = finish(stages, begin(stages, plate(), many))
    for index, seed in enumerate((2**64 - 1, 0, 1)):
        (alone,) = finish(stages, begin(stages, plate(), replace(SAMPLING_3, images=1, seed=seed)))
        # Equal but for rounding: batch sizes differ.
        assert np.abs(pictures[index].astype(int) - alone).max() <= 1
    assert not np.array_equal(pictures[0], pictures[1])


def test_runs_of_every_kind_share_a_step(stages, calls):
    """Samplers, steps, strengths, guidance, layers and pictures differ; each run ends as it would alone."""

    def runs():
        return [
            begin(stages, plate(), replace(SAMPLING, images=2)),
            begin(
                stages, plate(0.7, seed=1, layers=0), replace(SAMPLING, sampler="unipc", steps=9)
            ),
            begin(stages, plate(0.5, seed=2, layers=1), replace(SAMPLING, guidance_scale=1.0)),
            begin(stages, plate(seed=3), replace(SAMPLING, sampler="ddim", steps=4, seed=0)),
        ]

    alone = runs()
    for run in alone:
        finish(stages, run)
    calls.clear()
    together = runs()
    while left := [run for run in together if not run.is_done]:
        step(stages, left)
    assert [run.steps_total for run in together] == [6, 6, 3, 4]
    assert calls == [9, 9, 9, 8, 6, 6]
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.latents_NChw, other.latents_NChw, rtol=1e-3, atol=1e-4)


def test_control_steers_and_zero_dials_do_not(stages):
    free = finish(stages, begin(stages, plate(layers=0)))
    zero = [replace(layer, dials=Dials(noise=1.0, attract=0.0, repel=0.0)) for layer in LAYERS]
    assert np.array_equal(finish(stages, begin(stages, plate(), layers=zero)), free)
    assert not np.array_equal(finish(stages, begin(stages, plate())), free)


def test_a_layers_seed_changes_its_own_cells_noise_only(stages):
    own = [replace(LAYERS[0], seed=99), LAYERS[1]]
    one, other = begin(stages, plate()), begin(stages, plate(), layers=own)
    differs = (one.latents_NChw != other.latents_NChw).all(dim=1)[0]
    assert differs[:, :6].all() and not differs[:, 6:].any()


@pytest.mark.parametrize("make", [toy.mini, toy.sd2], ids=["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_step_expects_is_what_comes_out(tmp_path, sampler, make):
    stages = TorchStages(load(make(tmp_path), dtype=torch.float32, device=torch.device("cpu")))
    strength = np.ones((8, 12))
    strength[:, :6] = 0.0
    canvas = replace(plate(strength, layers=0))
    if make is toy.sd2:
        canvas = replace(
            canvas,
            composite_HWC=np.zeros((64, 96, 3), np.uint8),
            release_HW=np.zeros((64, 96), np.uint8),
        )
    run = begin(stages, canvas, replace(SAMPLING, sampler=sampler, steps=3))
    while not run.is_done:
        step(stages, [run])
    # DDIM alone ends at the schedule's lowest level and not at 0.
    tolerance = 0.05 if sampler == "ddim" else 1e-4
    final = run.latents_NChw
    torch.testing.assert_close(run.clean_NChw(), final, rtol=tolerance, atol=tolerance)


def test_preview_is_a_pixel_a_cell(stages):
    run = begin(stages, plate(), replace(SAMPLING, images=2))
    step(stages, [run])
    previews = run.preview()
    assert [(picture.shape, picture.dtype) for picture in previews] == [((8, 12, 3), np.uint8)] * 2


def test_preview_of_a_flat_picture_is_defined(stages):
    flat = replace(plate(), composite_HWC=np.full((32, 48, 3), 150, np.uint8))
    run = begin(stages, flat)
    step(stages, [run])
    assert run.preview()[0].std() < 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_close(folder, stages, dtype):
    half = TorchStages(load(folder, dtype=dtype, device=torch.device("cpu")))
    one, other = begin(half, plate()), begin(stages, plate())
    (near,), (exact,) = finish(half, one), finish(stages, other)
    assert one.latents_NChw.dtype == torch.float32
    assert np.abs(near.astype(int) - exact).max() <= 8


def test_a_prompt_that_does_not_fit_is_the_callers_mistake(stages):
    with pytest.raises(InvalidRequest, match="prompt: is 80 tokens long, 5 more than the 75") as e:
        begin(stages, plate(), prompt="sushi " * 80)
    assert e.value.reason == "PROMPT_TOO_LONG"


def test_plain_text_is_encoded_the_same_whatever_it_comes_with(stages):
    texts = [Text(ids_ET=stages.facts.tokenize(text).ids_ET) for text in ("sushi", "a cake", "")]
    together = stages.encode_text(texts).hidden_BTD
    for index, text in enumerate(texts):
        assert torch.equal(stages.encode_text([text]).hidden_BTD[0], together[index])
