"""Train the denoiser and the text encoder together on latents of composed scenes, and export.

Needs the autoencoder's checkpoint. Runs for --minutes of working time; a pause does not count.
With --minutes 0 it exports what there is, trained or not, as a folder that diffusers loads.
"""

import argparse
import json
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import autoencoder
import networks
import numpy as np
import scenes
import torch
import words
from art import WORK
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

BATCH = 16
FIRST_SCENES = 1500
NEW_SCENES = 2
POOL = 20_000
LEARNING_RATE = 8e-4
CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0
OFFSET_NOISE = 0.1
AVERAGE = 0.998
CHECKPOINT = WORK / "denoiser.pt"
WEIGHTS = WORK.parent / "weights"
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

    def __init__(self, tokenizer: CLIPTokenizer, start: Path | None = None) -> None:
        super().__init__()
        self.unet = networks.denoiser()
        self.text = networks.text_encoder(len(tokenizer), tokenizer.eos_token_id)
        if start:
            self.unet.load_state_dict(_weights(UNet2DConditionModel, start, "unet"))
            self.text.load_state_dict(_weights(CLIPTextModel, start, "text_encoder"))

    def forward(
        self, x_BCHW: torch.Tensor, t_B: torch.Tensor, ids_BT: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise [B, 4, H, W] of noisy latents at steps t_B under token ids_BT."""
        states_BTC = self.text(input_ids=ids_BT).last_hidden_state
        return self.unet(x_BCHW, t_B, states_BTC).sample.float()


def _weights(kind: type, folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The float32 weights of a part of an exported folder."""
    weights: dict[str, torch.Tensor] = kind.from_pretrained(folder, subfolder=part).state_dict()  # type: ignore[attr-defined]
    return {name: value.float() for name, value in weights.items()}


class Average:
    """Exponential moving average of a model's parameters, quick to follow at the start."""

    def __init__(self, model: Model) -> None:
        self.values = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def follow(self, model: Model, step: int) -> None:
        """Move towards the model as it stands after `step`."""
        rate = 1 - min(AVERAGE, (step + 1) / (step + 10))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[key].lerp_(value, rate)


@torch.no_grad()
def encode(vae: AutoencoderKL, seeds: range) -> tuple[torch.Tensor, list[str]]:
    """Unscaled mean latents float16 [B, 4, 32, 32] of composed scenes, and their captions."""
    made = [scenes.compose(seed) for seed in seeds]
    pixels = torch.from_numpy(np.stack([picture for picture, _ in made])).permute(0, 3, 1, 2)
    x_BCHW = autoencoder.to_range(pixels).to(vae.device, memory_format=torch.channels_last)
    with torch.autocast(vae.device.type, torch.bfloat16):
        latents = [vae.encode(part).latent_dist.mean for part in x_BCHW.split(16)]
    return torch.cat(latents).half().cpu(), [caption for _, caption in made]


@torch.no_grad()
def centre(vae: AutoencoderKL, mean_C: torch.Tensor) -> None:
    """Move the latents' mean to zero inside the autoencoder; its reconstructions stay the same.

    The schedule's last step still holds 7 % of the latent. What is left of a mean there would be
    missing from the pure noise that sampling starts with, and the colours would drift.
    """
    mean_C = mean_C.to(vae.device)
    vae.quant_conv.bias[: len(mean_C)] -= mean_C
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean_C


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Padded token ids, int64 [B, 77]."""
    coded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids_BT: torch.Tensor = coded.input_ids
    return ids_BT


def export(vae: AutoencoderKL, model: Model, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a half-precision diffusers folder; each file appears whole or not at all."""
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
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as made:
        pipeline.save_pretrained(made)
        # Only the stored numbers are halved: the configs still say float32, the type to load as.
        for path in Path(made).rglob("*.safetensors"):
            halved = {name: value.half() for name, value in load_file(path).items()}
            save_file(halved, path, metadata={"format": "pt"})
        words.copy_vocabulary(WORK / "tokenizer", Path(made) / "tokenizer")
        for path in sorted(Path(made).rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(made)
                target.parent.mkdir(exist_ok=True)
                path.chmod(0o644)
                path.replace(target)


def draw(folder: Path, path: Path) -> None:
    """Draw PROMPTS with the exported folder, seed 0, as one sheet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator("cpu").manual_seed(0) for _ in PROMPTS]
    drawn = pipeline(
        list(PROMPTS), num_inference_steps=20, guidance_scale=4.0, generator=generators
    ).images
    sheet = Image.new("RGB", (networks.SIDE * 6, networks.SIDE * 2))
    for index, picture in enumerate(drawn):
        sheet.paste(picture, (networks.SIDE * (index % 6), networks.SIDE * (index // 6)))
    sheet.save(path)


def learn(
    model: Model,
    noisy_BCHW: torch.Tensor,
    noise_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    ids_BT: torch.Tensor,
    weights_B111: torch.Tensor,
) -> float:
    """Add a part of a batch's gradients to the model's; the part's share of the loss."""
    torch.set_num_threads(1)
    with torch.autocast(noisy_BCHW.device.type, torch.bfloat16):
        predicted_BCHW = model(noisy_BCHW, t_B, ids_BT)
    error_BCHW = (predicted_BCHW - noise_BCHW).square()
    loss = (weights_B111 * error_BCHW).mean() * (len(t_B) / BATCH)
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=65.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", type=Path, help="an exported folder whose weights to begin with")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    # A thread for each part of a batch, one core each: they meet once a step instead of at every
    # operation, which matters on a machine that is busy with other things.
    torch.set_num_threads(1)
    workers = ThreadPoolExecutor(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    vae = networks.autoencoder().to(device, memory_format=torch.channels_last).eval()
    trained = torch.load(autoencoder.CHECKPOINT, map_location=device, weights_only=True)
    vae.load_state_dict(trained["model"])
    tokenizer = words.make_tokenizer(WORK / "tokenizer", arguments.start)
    model = Model(tokenizer, arguments.start).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=1e-3, fused=True
    )
    average = Average(model)
    step, worked = 0, 0.0
    latents_NCHW = torch.zeros(POOL, 4, networks.LATENT_SIDE, networks.LATENT_SIDE).half()
    ids_NT = torch.zeros(POOL, 77, dtype=torch.int16)
    if arguments.resume and CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average.values = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
        step, worked = saved["step"], saved["worked"]
        filled, scale, mean_C = len(saved["ids"]), saved["scale"], saved["mean"]
        latents_NCHW[:filled], ids_NT[:filled] = saved["latents"], saved["ids"]
    else:
        filled = FIRST_SCENES
        latents_NCHW[:filled], captions = encode(vae, range(FIRST_SCENES))
        ids_NT[:filled] = token_ids(tokenizer, captions)
        mean_C = latents_NCHW[:filled].float().mean(dim=(0, 2, 3))
        latents_NCHW[:filled] -= mean_C.half().view(1, -1, 1, 1)
        scale = round(1 / float(latents_NCHW[:filled].float().std()), 5)
    centre(vae, mean_C)
    vae.register_to_config(scaling_factor=scale)
    shape = {"params_unet": sum(p.numel() for p in model.unet.parameters())}
    shape["params_text"] = sum(p.numel() for p in model.text.parameters())
    print(json.dumps({"scaling_factor": scale, **shape}), flush=True)
    alphas_T = networks.scheduler().alphas_cumprod.to(device)
    empty_T = token_ids(tokenizer, [""])[0]
    shown, exported = worked, worked
    losses: list[float] = []
    frozen = Model(tokenizer).to(device)
    while worked < 60 * arguments.minutes:
        start = time.monotonic()
        rng = np.random.default_rng([3, step])
        noise_rng = torch.Generator("cpu").manual_seed(step)
        first = FIRST_SCENES + NEW_SCENES * step
        # The newest scenes are in every batch once; a full pool forgets its oldest.
        newest = np.arange(first, first + NEW_SCENES) % POOL
        latents_NCHW[newest], captions = encode(vae, range(first, first + NEW_SCENES))
        ids_NT[newest] = token_ids(tokenizer, captions).short()
        filled = min(POOL, first + NEW_SCENES)
        old = rng.integers(0, filled, BATCH - NEW_SCENES)
        chosen = torch.from_numpy(np.concatenate([newest, old]))
        ids_BT = ids_NT[chosen].long()
        ids_BT[torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)] = empty_T
        x_BCHW = latents_NCHW[chosen].float() * scale
        noise_BCHW = torch.randn(x_BCHW.shape, generator=noise_rng)
        # Hides what the last steps still show of a picture's mean colour: the text must tell it.
        noise_BCHW += OFFSET_NOISE * torch.randn((BATCH, 4, 1, 1), generator=noise_rng)
        # Evenly spread over the schedule with one common shift: the loss varies less.
        spread = (torch.from_numpy(rng.permutation(BATCH)) + rng.random()) / BATCH
        t_B = (spread * len(alphas_T)).long().clamp(max=len(alphas_T) - 1).to(device)
        signal_B111 = alphas_T[t_B].view(-1, 1, 1, 1)
        x_BCHW = x_BCHW.to(device, memory_format=torch.channels_last)
        noise_BCHW = noise_BCHW.to(device, memory_format=torch.channels_last)
        noisy_BCHW = signal_B111.sqrt() * x_BCHW + (1 - signal_B111).sqrt() * noise_BCHW
        progress = worked / (60 * arguments.minutes)
        rate = (
            LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        weights_B111 = (SNR_CAP * (1 - signal_B111) / signal_B111).clamp(max=1.0)
        optimizer.zero_grad()
        parts = zip(
            *(
                whole.chunk(arguments.threads)
                for whole in (noisy_BCHW, noise_BCHW, t_B, ids_BT.to(device), weights_B111)
            ),
            strict=True,
        )
        loss = sum(workers.map(lambda part: learn(model, *part), parts))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.follow(model, step)
        step += 1
        losses.append(loss)
        worked += min(time.monotonic() - start, 30.0)
        done = worked >= 60 * arguments.minutes
        if worked - shown > 60 or done:
            shown = worked
            line = {"step": step, "minutes": round(worked / 60, 1)}
            line["loss"] = round(float(np.mean(losses)), 4)
            print(json.dumps(line), flush=True)
            losses = []
        if worked - exported > 420 or done:
            exported = worked
            frozen.load_state_dict(average.values)
            export(vae, frozen, tokenizer, WEIGHTS)
            draw(WEIGHTS, WORK / f"sheet-{step:05d}.png")
            state = {
                "model": model.state_dict(),
                "average": average.values,
                "optimizer": optimizer.state_dict(),
                "step": step,
                "worked": worked,
                "scale": scale,
                "mean": mean_C,
                "latents": latents_NCHW[:filled].clone(),
                "ids": ids_NT[:filled].clone(),
            }
            partial = Path(f"{CHECKPOINT}.part")
            torch.save(state, partial)
            partial.replace(CHECKPOINT)
    if not arguments.minutes:
        export(vae, model, tokenizer, WEIGHTS)


if __name__ == "__main__":
    main()
