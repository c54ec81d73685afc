"""The first stage: the autoencoder, on crops of composed scenes."""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from training import HELD_OUT, Course, Run, exported, to_range

POOL = 1500
LEARNING_RATE = 6e-4
KL_WEIGHT = 5e-5
EDGE_WEIGHT = 0.5


def crops(pool_N3HW: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Random crops of half the side, flipped at random: uint8 [count, 3, side / 2, side / 2]."""
    side = pool_N3HW.shape[-1]
    crop = np.arange(side // 2)
    corner_2B = rng.integers(0, side - len(crop) + 1, (2, count))
    rows_BH = corner_2B[0, :, None] + crop
    columns_BW = corner_2B[1, :, None] + crop
    columns_BW = np.where(rng.random((count, 1)) < 0.5, columns_BW, columns_BW[:, ::-1])
    which_B = rng.integers(0, len(pool_N3HW), count)
    index = (which_B[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :])
    at = tuple(torch.from_numpy(part).to(pool_N3HW.device) for part in index)
    return pool_N3HW.permute(0, 2, 3, 1)[at].permute(0, 3, 1, 2)


def loss_of(model: AutoencoderKL, x_BCHW: Tensor) -> Tensor:
    """L1 + squared error + L1 of the horizontal and vertical differences + a little KL."""
    posterior = model.encode(x_BCHW).latent_dist
    y_BCHW = model.decode(posterior.sample()).sample.float()
    error = y_BCHW - x_BCHW
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error.abs().mean() + 0.5 * error.square().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


@torch.no_grad()
def decibels(model: AutoencoderKL, pixels_B3HW: Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions, averaged over pictures, in dB."""
    ratios = []
    for part in pixels_B3HW.split(16):
        x_B3HW = to_range(part)
        y_B3HW = model(x_B3HW).sample.clamp(-1, 1)
        mse_B = ((y_B3HW - x_B3HW) / 2).square().mean(dim=(1, 2, 3))
        ratios.append(-10 * mse_B.log10())
    return float(torch.cat(ratios).mean())


def train(run: Run, minutes: float) -> None:
    """Train for so many minutes, or the rest of them; writes a checkpoint only."""
    model = run.size.autoencoder()
    if run.start:
        model = exported(AutoencoderKL, run.start, "vae")
    model.to(run.device, memory_format=torch.channels_last).train()
    course = Course(
        run, "autoencoder", minutes, [{"params": model.parameters(), "lr": LEARNING_RATE}]
    )
    saved = course.resumed()
    if saved:
        model.load_state_dict(saved["model"])
    count = 16 if run.device.type == "cpu" else 64
    new = count // 16

    def pictures(seeds: range) -> Tensor:
        parts = [seeds[start : start + 64] for start in range(0, len(seeds), 64)]
        return torch.cat([run.composer.paint(run.scenes(part)) for part in parts])

    held_out_B3HW = pictures(range(HELD_OUT, HELD_OUT + 64))
    first = 1_000_000 + new * course.step
    pool_N3HW = torch.empty(0) if course.is_done else pictures(range(first, first + POOL))

    def learn(step: int) -> Tensor:
        rng = np.random.default_rng([2, step])
        # The pool is renewed slowly: composing costs a few ms a scene, a step far more.
        places = torch.arange(new * step, new * (step + 1)) % POOL
        seeds = range(2_000_000 + new * step, 2_000_000 + new * (step + 1))
        pool_N3HW[places] = pictures(seeds)
        x_B3HW = to_range(crops(pool_N3HW, count, rng)).contiguous(
            memory_format=torch.channels_last
        )
        return run.gradients(lambda x_B3HW: loss_of(model, x_B3HW), x_B3HW)

    def save() -> dict[str, Any]:
        course.save(model=model.state_dict())
        return {"held_out_psnr": round(decibels(model, held_out_B3HW), 2)}

    course.attend(learn, save)
