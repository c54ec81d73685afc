"""The second stage: the denoiser and the text encoder together on latents of composed scenes; exports the model."""

import tempfile
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
import words
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from training import (
    Average,
    Course,
    Pool,
    Run,
    exported,
    noised,
    squared_error,
    token_ids,
    write_halved,
)
from transformers import CLIPTextModel, CLIPTokenizer

POOL = 20_000
# Of the networks, and of the table of words. Its values are large (0.3) and a word that means nothing yet has a small
# gradient: at the networks' rate no word for a look or a colour meant anything after 800 steps.
LEARNING_RATE, WORD_RATE = 8e-4, 1e-2
CAPTION_DROPOUT = 0.1
AVERAGE = 0.998
# What a thing looks like is decided in the noisier half of the steps, so these are met more often.
POWER = 2.0
PROMPTS = (
    "a sushi on a wooden table",
    "a bento box on a white table cloth",
    "a birthday cake on a checkered cloth",
    "a coffee cup on a wooden table",
    "a house on grass",
    "a sailboat in a blue sky",
    "a cat on sand",
    "a sushi and a carrot on a white table cloth",
    "a mountain, a cloud and a pine tree in a landscape with green grass",
    "an apple",
    "strawberry",
    "a bento box, a sushi, a broccoli, an avocado and a rice ball on a wooden table",
)


class Model(nn.Module):
    """The two networks that learn together, so that one optimiser and one average hold both."""

    def __init__(self, run: Run, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = run.size.denoiser()
        self.text = run.size.text_encoder(len(tokenizer), tokenizer.eos_token_id)
        if run.start:
            self.unet = exported(UNet2DConditionModel, run.start, "unet")
            self.text = exported(CLIPTextModel, run.start, "text_encoder")

    def forward(self, x_BCHW: Tensor, t_B: Tensor, ids_BT: Tensor) -> Tensor:
        """Predicted noise [B, 4, H, W] of noisy latents at steps t_B under token ids_BT."""
        states_BTC = self.text(input_ids=ids_BT).last_hidden_state
        predicted_BCHW: Tensor = self.unet(x_BCHW, t_B, states_BTC).sample
        return predicted_BCHW


@torch.no_grad()
def centre(vae: AutoencoderKL, mean_C: Tensor) -> None:
    """Move the latents' mean to zero inside the autoencoder; its reconstructions stay the same.

    The schedule's last step still holds 7 % of the latent. What is left of a mean there would be
    missing from the pure noise that sampling starts with, and the colours would drift.
    """
    vae.quant_conv.bias[: len(mean_C)] -= mean_C
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean_C


def export(run: Run, vae: AutoencoderKL, model: Model, tokenizer: CLIPTokenizer) -> None:
    """Write the model as a half-precision diffusers folder."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with tempfile.TemporaryDirectory(dir=run.work) as made:
        pipeline.save_pretrained(made)
        words.copy_vocabulary(run.work / "tokenizer", Path(made) / "tokenizer")
        write_halved(Path(made), run.weights)


def draw(run: Run, path: Path) -> None:
    """Draw PROMPTS with the exported folder, seed 0, as one sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(run.weights).to(run.device)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(0) for _ in PROMPTS]
    drawn = pipeline(
        list(PROMPTS), num_inference_steps=20, guidance_scale=4.0, generator=generators
    ).images
    side = run.size.side
    sheet = Image.new("RGB", (side * 6, side * 2))
    for index, picture in enumerate(drawn):
        sheet.paste(picture, (side * (index % 6), side * (index // 6)))
    sheet.save(path)


def train(run: Run, minutes: float) -> None:
    """Train for so many minutes, or the rest of them, and export."""
    checkpoint = run.work / "autoencoder.pt"
    if checkpoint.exists():
        vae = run.size.autoencoder()
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        vae.load_state_dict(saved["model"])
    elif run.start:
        vae = exported(AutoencoderKL, run.start, "vae")
    else:
        raise FileNotFoundError(
            "the denoiser needs a trained autoencoder, or a folder to start with"
        )
    vae.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    tokenizer = words.make_tokenizer(
        run.work / "tokenizer", run.size.names, run.composer.palette, run.start
    )
    model = Model(run, tokenizer).to(run.device, memory_format=torch.channels_last)
    table = model.text.get_input_embeddings().weight
    rest = [value for value in model.parameters() if value is not table]
    groups = [
        {"params": rest, "lr": LEARNING_RATE},
        {"params": [table], "lr": WORD_RATE, "weight_decay": 0.0},
    ]
    course = Course(run, "denoiser", minutes, groups)
    average = Average(model, AVERAGE)
    pool = Pool(run, vae, tokenizer, POOL)
    # Of every batch an eighth is new.
    new = run.batch // 8
    pool.first = 96 * new
    saved = course.resumed()
    if saved:
        model.load_state_dict(saved["model"])
        average.values, mean_C, scale = saved["average"], saved["mean"], saved["scale"]
        centre(vae, mean_C)
        filled = len(saved["ids"])
        pool.latents_NCHW[:filled], pool.ids_NT[:filled] = saved["latents"], saved["ids"]
    else:
        pool.add(range(pool.first))
        mean_C = pool.latents_NCHW[: pool.first].float().mean(dim=(0, 2, 3))
        centre(vae, mean_C)
        pool.latents_NCHW[: pool.first] -= mean_C.half().view(1, -1, 1, 1)
        scale = round(1 / float(pool.latents_NCHW[: pool.first].float().std()), 5)
    vae.register_to_config(scaling_factor=scale)
    course.log(
        scaling_factor=scale,
        params={
            name: sum(value.numel() for value in part.parameters())
            for name, part in (("vae", vae), ("unet", model.unet), ("text", model.text))
        },
    )
    empty_T = token_ids(tokenizer, [""])[0].to(run.device)
    frozen = Model(run, tokenizer).to(run.device)

    def loss_of(
        noisy_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, ids_BT: Tensor, weights_B: Tensor
    ) -> Tensor:
        return squared_error(model(noisy_BCHW, t_B, ids_BT), noise_BCHW, weights_B)

    def learn(step: int) -> Tensor:
        rng = np.random.default_rng([3, step])
        places = pool.batch(step, new, rng)
        ids_BT = pool.ids_NT[places].long()
        ids_BT[torch.from_numpy(rng.random(run.batch) < CAPTION_DROPOUT)] = empty_T
        x_BCHW = pool.latents_NCHW[places].float() * scale
        noisy_BCHW, noise_BCHW, t_B, weights_B = noised(x_BCHW, step, rng, POWER)
        return run.gradients(loss_of, noisy_BCHW, noise_BCHW, t_B, ids_BT, weights_B)

    def save() -> dict[str, Any]:
        filled = min(POOL, pool.first + new * course.step)
        course.save(
            model=model.state_dict(),
            average=average.values,
            mean=mean_C,
            scale=scale,
            latents=pool.latents_NCHW[:filled].clone(),
            ids=pool.ids_NT[:filled].clone(),
        )
        frozen.load_state_dict(average.values)
        export(run, vae, frozen, tokenizer)
        draw(run, run.work / "denoiser.png")
        return {}

    course.attend(learn, save, [(average, model)])
