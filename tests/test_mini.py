"""The bundled model: it loads as any Stable Diffusion does, fits its budget, and draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from testing import golden

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "models" / "mini" / "weights"
ART = ROOT / "examples" / "art"
SIDE = 128
WOOD = (168, 116, 68)


@pytest.fixture(scope="module")
def pipeline():
    torch.set_num_threads(1)
    loaded = StableDiffusionImg2ImgPipeline.from_pretrained(WEIGHTS)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def on_ground(names: list[str], colour: tuple[int, int, int] = WOOD) -> Image.Image:
    """Cut-outs side by side on a plain ground."""
    picture = Image.new("RGB", (SIDE, SIDE), colour)
    side = 92 if len(names) == 1 else 60
    for index, name in enumerate(names):
        cutout = Image.open(ART / f"{name}.png").convert("RGBA").resize((side, side))
        left = SIDE * (2 * index + 1) // (2 * len(names)) - side // 2
        picture.paste(cutout, (left, (SIDE - side) // 2), cutout)
    return picture


def as_tensor(picture: Image.Image) -> torch.Tensor:
    pixels = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def small(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255


def test_weights_fit_their_budget():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000


def test_the_weights_draw_the_golden_pictures():
    for name, picture_HWC in golden.draw().items():
        assert golden.difference(name, picture_HWC) <= golden.ALLOWED, name


def test_shapes_are_those_of_stable_diffusion(pipeline):
    assert pipeline.vae.config.latent_channels == pipeline.unet.config.in_channels == 4
    assert pipeline.vae_scale_factor == 4
    assert pipeline.unet.config.sample_size == 32
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    modules = [name for name in pipeline.unet.attn_processors if "attn2" in name]
    assert len(modules) == 7
    assert pipeline.safety_checker is None


def test_loading_twice_gives_the_same_weights(pipeline):
    again = StableDiffusionImg2ImgPipeline.from_pretrained(WEIGHTS)
    for part in ("unet", "vae", "text_encoder"):
        first, second = getattr(pipeline, part).state_dict(), getattr(again, part).state_dict()
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(value.isfinite().all() for value in first.values())
        assert getattr(pipeline, part).dtype == torch.float32


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_come_from_its_config(pipeline, kind):
    other = kind.from_config(pipeline.scheduler.config)
    assert other.config.prediction_type == "epsilon"
    assert torch.allclose(other.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_tokenizer_keeps_offsets(pipeline):
    text = "A Bento box with sushi, pickled ginger & naïve 寿司!"
    coded = pipeline.tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:stop] for start, stop in coded.offset_mapping]
    assert pieces[1:6] == ["A", "Bento", "box", "with", "sushi"]
    assert pieces[0] == pieces[-1] == ""
    assert "寿" in pieces
    ends = [stop for _, stop in coded.offset_mapping[:-1]]
    assert ends == sorted(ends)
    assert pipeline.tokenizer.unk_token_id not in coded.input_ids[1:-1]


def test_every_text_is_encodable_and_padded(pipeline):
    coded = pipeline.tokenizer(
        ["", "sushi", "x" * 500, "\N{SLICE OF PIZZA}\t日本"], padding="max_length", truncation=True
    )
    assert {len(row) for row in coded.input_ids} == {77}
    assert max(max(row) for row in coded.input_ids) < pipeline.text_encoder.config.vocab_size
    assert coded.input_ids[0].count(pipeline.tokenizer.eos_token_id) == 76


@torch.no_grad()
def test_autoencoder_reconstructs_collages(pipeline):
    collages = [
        on_ground(["sushi-noto", "avocado-twemoji"]),
        on_ground(["birthday-cake-fluent", "teapot-flat"], (238, 236, 232)),
        on_ground(["house-noto", "deciduous-tree-fluent"], (110, 175, 240)),
    ]
    x_BCHW = torch.cat([as_tensor(picture) for picture in collages])
    y_BCHW = pipeline.vae(x_BCHW).sample.clamp(-1, 1)
    mse_B = ((x_BCHW - y_BCHW) / 2).square().mean(dim=(1, 2, 3))
    assert (-10 * mse_B.log10()).min() > 24


@torch.no_grad()
def test_latents_are_scaled_to_unit_spread(pipeline):
    latent = pipeline.vae.encode(as_tensor(on_ground(["cookie-noto"]))).latent_dist.mean
    assert 0.5 < float(latent.std()) * pipeline.vae.config.scaling_factor < 2.0


def test_it_draws_the_sushi_it_is_asked_for(pipeline):
    names = sorted(path.stem for path in ART.glob("*.png") if "feathered" not in path.stem)
    seen = {name: small(on_ground([name])) for name in names}
    shifts = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2)]

    def nearest(picture: Image.Image) -> str:
        drawn = small(picture)
        apart = {
            name: min(
                np.square(np.roll(seen[name], shift, (0, 1)) - drawn).mean() for shift in shifts
            )
            for name in names
        }
        return min(apart, key=apart.__getitem__)

    text_to_image = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    text_to_image.set_progress_bar_config(disable=True)
    drawn = text_to_image(
        ["a sushi on a wooden table"] * 4,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(4)],
    ).images
    assert [nearest(picture).startswith("sushi") for picture in drawn].count(True) >= 3
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    wanted = small(on_ground(["sushi-noto"]))
    distance = [np.square(small(picture) - wanted).mean() for picture in drawn]
    assert max(distance) < np.square(small(Image.fromarray(noise)) - wanted).mean()
