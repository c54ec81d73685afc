"""Train a ControlNet that lets edges decide shapes, for an exported model whose weights stay still.

Main types: `Pool`, the latents, captions and control pictures of composed scenes; `ControlNetModel` of diffusers. The
control pictures are made by the compositor's own code: the edges of each layer alone, set together under the visible
masks, with some layers left out as when only some layers of a collage have structure. Edges of the whole picture are
mixed in. Half of the layered ones learn with residuals cut to the masks, as they are at serving time.

Runs for --minutes of working time; a pause does not count. Exports to `controlnet-canny` in the model's folder.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from art import WORK
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from services.common.collage import Extent
from services.compositor.structure import ControlPicture, canny

BATCH = 16
FIRST_SCENES = 512
NEW_SCENES = 4
POOL = 20_000
LEARNING_RATE = 1e-3
CAPTION_DROPOUT = 0.3
WHOLE_PICTURE = 0.15
LAYER_LEFT_OUT = 0.3
SNR_CAP = 5.0
OFFSET_NOISE = 0.1
AVERAGE = 0.99
HELD_OUT = range(10_000_000, 10_000_032)
CHECKPOINT = WORK / "controlnet.pt"
WEIGHTS = WORK.parent / "weights"
# The last is as wide as the convolution that leads into the U-Net's width; two strides of two make latents' size.
EDGE_CHANNELS = (8, 16, 32)


def control(scene: scenes.Scene, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The control picture of a scene, uint8 [H, W] with 255 on an edge, and where it counts, uint8 [H, W]."""
    rng = np.random.default_rng([7, seed])
    canvas = Extent(width=scenes.SIDE, height=scenes.SIDE)
    everywhere_HW = np.full((scenes.SIDE, scenes.SIDE), 255, np.uint8)
    if rng.random() < WHOLE_PICTURE:
        opaque_HW4 = np.dstack([scene.paint(), everywhere_HW])
        return canny(opaque_HW4)[..., 0], everywhere_HW
    picture = ControlPicture(canvas)
    whole = (slice(0, scenes.SIDE), slice(0, scenes.SIDE))
    through_HW = np.ones((scenes.SIDE, scenes.SIDE), np.float32)
    counted_HW = np.zeros((scenes.SIDE, scenes.SIDE), np.float32)
    left_out = rng.random(len(scene.placements)) < LAYER_LEFT_OUT
    left_out[rng.integers(len(left_out))] = False
    for item, is_left_out in reversed(list(zip(scene.placements, left_out, strict=True))):
        layer_HW4 = np.asarray(scenes.cut_out(item, scene.look))
        alpha_HW = layer_HW4[..., 3].astype(np.float32) / 255
        if not is_left_out:
            visible_HW = alpha_HW * through_HW
            picture.slide_under(canny(layer_HW4), whole, visible_HW)
            counted_HW += visible_HW
        through_HW *= 1 - alpha_HW
    if rng.random() < 0.5:
        counted_HW[:] = 1
    return picture.pixels_HW3[..., 0], (255 * counted_HW).round().astype(np.uint8)


class Pool:
    """What is learned from: latents, token ids, control pictures and where these count.

    A scene's place is its seed modulo the pool's size, so that a full pool forgets its oldest.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, size: int, threads: int) -> None:
        self._pipeline, self._size, self._threads = pipeline, size, threads
        self._workers = ThreadPoolExecutor(threads)
        side = scenes.SIDE // pipeline.vae_scale_factor
        self.latents_NCHW = torch.zeros(size, 4, side, side, dtype=torch.float16)
        self.ids_NT = torch.zeros(size, 77, dtype=torch.int16)
        self.edges_NHW = torch.zeros(size, scenes.SIDE, scenes.SIDE, dtype=torch.uint8)
        self.counts_NHW = torch.zeros(size, scenes.SIDE, scenes.SIDE, dtype=torch.uint8)

    def add(self, seeds: range) -> None:
        """Compose and encode the scenes of these seeds; each has its place by its seed."""
        list(
            self._workers.map(self._fill, [seeds[i :: self._threads] for i in range(self._threads)])
        )

    @torch.no_grad()
    def _fill(self, seeds: range) -> None:
        if not seeds:
            return
        torch.set_num_threads(1)
        vae = self._pipeline.vae
        made = [scenes.scene(seed) for seed in seeds]
        places = torch.tensor([seed % self._size for seed in seeds])
        pixels_BHWC = torch.from_numpy(np.stack([scene.paint() for scene in made]))
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).to(vae.device).float() / 127.5 - 1
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        with torch.autocast(vae.device.type, torch.bfloat16):
            latents = [vae.encode(part).latent_dist.mean for part in x_BCHW.split(16)]
        scaled_BCHW = torch.cat(latents).float() * vae.config.scaling_factor
        self.latents_NCHW[places] = scaled_BCHW.half().cpu()
        self.ids_NT[places] = self.token_ids([scene.caption for scene in made])
        controls = [control(scene, seed) for scene, seed in zip(made, seeds, strict=True)]
        self.edges_NHW[places] = torch.from_numpy(np.stack([edges for edges, _ in controls]))
        self.counts_NHW[places] = torch.from_numpy(np.stack([counts for _, counts in controls]))

    def token_ids(self, captions: Sequence[str]) -> torch.Tensor:
        """Padded token ids, int16 [B, 77]."""
        coded = self._pipeline.tokenizer(
            list(captions), padding="max_length", truncation=True, return_tensors="pt"
        )
        ids_BT: torch.Tensor = coded.input_ids.short()
        return ids_BT


def predict(
    pipeline: StableDiffusionPipeline,
    model: ControlNetModel,
    noisy_BCHW: torch.Tensor,
    t_B: torch.Tensor,
    ids_BT: torch.Tensor,
    edges_BHW: torch.Tensor,
    counts_BHW: torch.Tensor,
) -> torch.Tensor:
    """Predicted noise [B, 4, h, w] with control pictures edges_BHW acting where counts_BHW (both uint8) say."""
    with torch.no_grad():
        states_BTC = pipeline.text_encoder(input_ids=ids_BT).last_hidden_state
    picture_B3HW = (edges_BHW.float() / 255)[:, None].expand(-1, 3, -1, -1)
    counts_B1HW = counts_BHW.float()[:, None] / 255
    downs, mid = model(noisy_BCHW, t_B, states_BTC, picture_B3HW, return_dict=False)

    def cut(residual_BCHW: torch.Tensor) -> torch.Tensor:
        shape = residual_BCHW.shape[-2:]
        return residual_BCHW * functional.adaptive_avg_pool2d(counts_B1HW, shape)

    predicted_BCHW: torch.Tensor = pipeline.unet(
        noisy_BCHW,
        t_B,
        states_BTC,
        down_block_additional_residuals=[cut(residual) for residual in downs],
        mid_block_additional_residual=cut(mid),
    ).sample.float()
    return predicted_BCHW


@torch.no_grad()
def held_out_losses(
    pipeline: StableDiffusionPipeline, model: ControlNetModel, pool: Pool
) -> dict[str, float]:
    """Mean squared error of the predicted noise on held-out scenes, with their control pictures and without."""
    device = pipeline.device
    x_BCHW = pool.latents_NCHW.float()
    noise_BCHW = torch.randn(x_BCHW.shape, generator=torch.Generator("cpu").manual_seed(0))
    t_B = torch.linspace(100, 950, len(x_BCHW)).long()
    signal_B111 = pipeline.scheduler.alphas_cumprod[t_B].view(-1, 1, 1, 1)
    noisy_BCHW = signal_B111.sqrt() * x_BCHW + (1 - signal_B111).sqrt() * noise_BCHW
    noisy_BCHW = noisy_BCHW.to(device, memory_format=torch.channels_last)
    losses = {}
    for name, share in (("without", 0), ("with", 1)):
        predicted_BCHW = predict(
            pipeline,
            model,
            noisy_BCHW,
            t_B.to(device),
            pool.ids_NT.long().to(device),
            pool.edges_NHW.to(device),
            pool.counts_NHW.to(device) * share,
        )
        error = (predicted_BCHW.cpu() - noise_BCHW).square().mean()
        losses[name] = round(float(error), 4)
    return losses


def export(model: ControlNetModel, folder: Path) -> None:
    """Write a half-precision diffusers folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.save_pretrained(made)
        for path in Path(made).iterdir():
            if path.suffix == ".safetensors":
                halved = {name: value.half() for name, value in load_file(path).items()}
                save_file(halved, path, metadata={"format": "pt"})
            path.chmod(0o644)
            path.replace(folder / path.name)


def draw(weights: Path, folder: Path, path: Path) -> None:
    """Draw a sheet from pure noise: control picture, without it, with it, and the scene that it was made of."""
    model = ControlNetModel.from_pretrained(folder)
    plain = StableDiffusionPipeline.from_pretrained(weights)
    pipeline = StableDiffusionControlNetPipeline(
        **{**plain.components, "controlnet": model}, requires_safety_checker=False
    )
    rows: list[list[Image.Image]] = [[], [], [], []]
    for pipe in (plain, pipeline):
        pipe.set_progress_bar_config(disable=True)
    for seed in HELD_OUT[:8]:
        scene = scenes.scene(seed)
        edges = Image.fromarray(control(scene, seed)[0]).convert("RGB")
        asked = {"prompt": scene.caption, "num_inference_steps": 15, "guidance_scale": 3.0}
        rows[0].append(edges)
        noise = torch.Generator("cpu")
        rows[1].append(plain(**asked, generator=noise.manual_seed(0)).images[0])
        rows[2].append(pipeline(**asked, image=edges, generator=noise.manual_seed(0)).images[0])
        rows[3].append(Image.fromarray(scene.paint()))
    side = scenes.SIDE
    sheet = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (side * column, side * row))
    sheet.save(path)


def learn(
    pipeline: StableDiffusionPipeline,
    model: ControlNetModel,
    noise_BCHW: torch.Tensor,
    weights_B111: torch.Tensor,
    *inputs: torch.Tensor,
) -> float:
    """Add a part of a batch's gradients to the model's; the part's share of the loss."""
    torch.set_num_threads(1)
    with torch.autocast(noise_BCHW.device.type, torch.bfloat16):
        predicted_BCHW = predict(pipeline, model, *inputs)
    error_BCHW = (predicted_BCHW - noise_BCHW).square()
    loss = (weights_B111 * error_BCHW).mean() * (len(noise_BCHW) / BATCH)
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the exported model")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # A thread for each part of a batch, one core each: they meet once a step.
    workers = ThreadPoolExecutor(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.weights, torch_dtype=torch.float32)
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    model = ControlNetModel.from_unet(
        pipeline.unet, conditioning_embedding_out_channels=EDGE_CHANNELS
    )
    # The way out begins with zeros, and that is enough to begin with the model as it is. Were the way in zeros too,
    # each would wait for the other to learn.
    torch.nn.init.kaiming_normal_(model.controlnet_cond_embedding.conv_out.weight)
    model.requires_grad_(True).train().to(device, memory_format=torch.channels_last)
    groups: list[dict[str, Any]] = [{"params": [], "share": 2.0}, {"params": [], "share": 1.0}]
    for name, value in model.named_parameters():
        # What the U-Net has not taught yet learns faster: the edges' way in and the zeros' way out.
        groups[not name.startswith("controlnet_")]["params"].append(value)
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (0.9, 0.98), weight_decay=1e-3, fused=True)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    step, worked = 0, 0.0
    if arguments.resume and CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average = saved["average"]
        optimizer.load_state_dict(saved["optimizer"])
        step, worked = saved["step"], saved["worked"]
    held_out = Pool(pipeline, len(HELD_OUT), arguments.threads)
    held_out.add(HELD_OUT)
    pool = Pool(pipeline, POOL, arguments.threads)
    first = NEW_SCENES * step
    pool.add(range(first, first + FIRST_SCENES))
    oldest = first
    count = sum(value.numel() for value in model.parameters())
    before = held_out_losses(pipeline, model, held_out)
    print(json.dumps({"params_controlnet": count, "held_out": before}), flush=True)
    alphas_T = DDIMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.to(device)
    empty_T = pool.token_ids([""])[0].long()
    frozen = ControlNetModel.from_config(model.config).to(device)
    folder = arguments.weights / "controlnet-canny"
    shown, exported = worked, worked
    losses: list[float] = []
    while worked < 60 * arguments.minutes:
        start = time.monotonic()
        rng = np.random.default_rng([8, step])
        noise_rng = torch.Generator("cpu").manual_seed(step)
        first = FIRST_SCENES + NEW_SCENES * step
        newest = range(first, first + NEW_SCENES)
        pool.add(newest)
        oldest = max(oldest, newest.stop - POOL)
        old = rng.integers(oldest, first, BATCH - NEW_SCENES)
        chosen = torch.from_numpy(np.concatenate([newest, old]) % POOL)
        ids_BT = pool.ids_NT[chosen].long()
        ids_BT[torch.from_numpy(rng.random(BATCH) < CAPTION_DROPOUT)] = empty_T
        x_BCHW = pool.latents_NCHW[chosen].float()
        noise_BCHW = torch.randn(x_BCHW.shape, generator=noise_rng)
        noise_BCHW += OFFSET_NOISE * torch.randn((BATCH, 4, 1, 1), generator=noise_rng)
        # Noisy steps are met more often: shapes are decided there (as in T2I-Adapter, Mou et al.
        # 2023, with a square for their cube).
        spread = 1 - ((torch.from_numpy(rng.permutation(BATCH)) + rng.random()) / BATCH).square()
        t_B = (spread * len(alphas_T)).long().clamp(max=len(alphas_T) - 1).to(device)
        signal_B111 = alphas_T[t_B].view(-1, 1, 1, 1)
        x_BCHW = x_BCHW.to(device, memory_format=torch.channels_last)
        noise_BCHW = noise_BCHW.to(device, memory_format=torch.channels_last)
        noisy_BCHW = signal_B111.sqrt() * x_BCHW + (1 - signal_B111).sqrt() * noise_BCHW
        weights_B111 = (SNR_CAP * (1 - signal_B111) / signal_B111).clamp(max=1.0)
        progress = worked / (60 * arguments.minutes)
        rate = (
            LEARNING_RATE * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        optimizer.zero_grad()
        parts = zip(
            *(
                whole.to(device).chunk(arguments.threads)
                for whole in (
                    *(noise_BCHW, weights_B111, noisy_BCHW, t_B, ids_BT),
                    *(pool.edges_NHW[chosen], pool.counts_NHW[chosen]),
                )
            ),
            strict=True,
        )
        losses.append(sum(workers.map(lambda part: learn(pipeline, model, *part), parts)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(AVERAGE, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            average[name].lerp_(value, 1 - keep)
        step += 1
        worked += min(time.monotonic() - start, 30.0)
        done = worked >= 60 * arguments.minutes
        if worked - shown > 60 or done:
            shown = worked
            line = {"step": step, "minutes": round(worked / 60, 1)}
            line["loss"] = round(float(np.mean(losses)), 4)
            print(json.dumps(line), flush=True)
            losses = []
        if worked - exported > 300 or done:
            exported = worked
            frozen.load_state_dict(average)
            print(json.dumps({"held_out": held_out_losses(pipeline, frozen, held_out)}), flush=True)
            export(frozen, folder)
            draw(arguments.weights, folder, WORK / f"control-{step:05d}.png")
            state = {"model": model.state_dict(), "average": average}
            state["optimizer"] = optimizer.state_dict()
            partial = Path(f"{CHECKPOINT}.part")
            torch.save({**state, "step": step, "worked": worked}, partial)
            partial.replace(CHECKPOINT)


if __name__ == "__main__":
    main()
