"""Train the autoencoder on crops of composed scenes; the denoiser needs it finished.

Runs for --minutes of working time, so a slower machine takes fewer steps; a pause does not count.
"""

import argparse
import json
import math
import time
from pathlib import Path

import networks
import numpy as np
import scenes
import torch
from art import WORK
from diffusers import AutoencoderKL

CROP = 64
BATCH = 16
POOL = 1500
LEARNING_RATE = 6e-4
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 0.5
HELD_OUT = range(10_000_000, 10_000_064)
CHECKPOINT = WORK / "autoencoder.pt"


def pictures(seeds: range) -> torch.Tensor:
    """Scenes of these seeds as uint8 [B, 3, H, W]."""
    stack = np.stack([scenes.compose(seed)[0] for seed in seeds])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def to_range(pixels: torch.Tensor) -> torch.Tensor:
    """From uint8 to float in -1..1."""
    return pixels.float() / 127.5 - 1


def crops(pool: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A batch of random crops, flipped at random: float [BATCH, 3, CROP, CROP] in -1..1."""
    cut = []
    for index in rng.integers(0, len(pool), BATCH):
        top, left = rng.integers(0, networks.SIDE - CROP + 1, 2)
        piece = pool[index, :, top : top + CROP, left : left + CROP]
        cut.append(piece.flip(-1) if rng.random() < 0.5 else piece)
    return to_range(torch.stack(cut))


def loss_of(model: AutoencoderKL, x_BCHW: torch.Tensor) -> torch.Tensor:
    """L1 + squared error + L1 of the horizontal and vertical differences + a little KL."""
    posterior = model.encode(x_BCHW).latent_dist
    y_BCHW = model.decode(posterior.sample()).sample.float()
    error = y_BCHW - x_BCHW
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error.abs().mean() + 0.5 * error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


@torch.no_grad()
def decibels(model: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions, averaged over pictures, in dB."""
    x_BCHW = to_range(pixels)
    y_BCHW = model(x_BCHW).sample.clamp(-1, 1)
    mse_B = ((y_BCHW - x_BCHW) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * mse_B.log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", type=Path, help="an exported folder whose weights to begin with")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = networks.autoencoder()
    if arguments.start:
        model = AutoencoderKL.from_pretrained(arguments.start, subfolder="vae").float()
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.98), weight_decay=1e-3)
    step, worked = 0, 0.0
    if arguments.resume and CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, worked = saved["step"], saved["worked"]
    pool = pictures(range(1_000_000 + step, 1_000_000 + step + POOL))
    held_out = pictures(HELD_OUT)
    shown = 0.0
    while worked < 60 * arguments.minutes:
        start = time.monotonic()
        rng = np.random.default_rng([2, step])
        # The pool is renewed slowly: composing costs about 5 ms a scene, a step far more.
        pool[step % POOL] = pictures(range(2_000_000 + step, 2_000_001 + step))[0]
        progress = worked / (60 * arguments.minutes)
        rate = (
            LEARNING_RATE * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        x_BCHW = crops(pool, rng).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model, x_BCHW)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        # A process that was stopped for a while has not worked meanwhile.
        worked += min(time.monotonic() - start, 30.0)
        if worked - shown > 120 or worked >= 60 * arguments.minutes:
            shown = worked
            line = {"step": step, "minutes": round(worked / 60, 1), "loss": round(loss.item(), 4)}
            line["psnr"] = round(decibels(model, held_out[:16].to(device)), 2)
            print(json.dumps(line), flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            partial = Path(f"{CHECKPOINT}.part")
            torch.save({**state, "step": step, "worked": worked}, partial)
            partial.replace(CHECKPOINT)
    print(json.dumps({"held_out_psnr": round(decibels(model, held_out.to(device)), 2)}), flush=True)


if __name__ == "__main__":
    main()
