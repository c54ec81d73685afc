"""The third stage: an edge ControlNet for the exported model, whose weights stay still.

Control pictures are made by the compositor's own code: the edges of each layer alone, set together under the visible
masks, with some layers left out as when only some layers of a collage have structure. Edges of the whole picture are
mixed in. Half of the layered ones learn with residuals cut to the masks, as they are at serving time.
"""

import tempfile
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from scenes import Scene
from torch import Tensor
from torch.nn import functional
from training import (
    HELD_OUT,
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

from services.common.collage import Extent
from services.compositor.structure import ControlPicture, canny

NAME = "controlnet-canny"
POOL = 20_000
LEARNING_RATE = 1e-3
CAPTION_DROPOUT = 0.3
WHOLE_PICTURE = 0.15
LAYER_LEFT_OUT = 0.3
AVERAGE = 0.99
HELD_OUT_COUNT = 32
# Noisy steps are met more often: shapes are decided there (as in T2I-Adapter, Mou et al. 2023,
# with a square for their cube). After 90 steps the loss at t = 850 was 0.899 of that without
# control, against 0.918 with timesteps evenly spread.
POWER = 2.0


def control(scene: Scene, paint_K4HW: Tensor, pixels_3HW: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The control picture of a scene and where it counts.

    Args:
        scene: what is shown; the choice of layers follows from its seed.
        paint_K4HW: its objects, premultiplied, back to front.
        pixels_3HW: the picture, uint8.

    Returns:
        uint8 [H, W] with 255 on an edge, and the soft mask of the layers that have structure, uint8 [H, W].
    """
    rng = np.random.default_rng([7, scene.seed])
    height, width = pixels_3HW.shape[1:]
    everywhere_HW = np.full((height, width), 255, np.uint8)
    if rng.random() < WHOLE_PICTURE:
        return canny(np.dstack([*pixels_3HW.numpy(), everywhere_HW]))[..., 0], everywhere_HW
    picture = ControlPicture(Extent(width=width, height=height))
    whole = (slice(0, height), slice(0, width))
    through_HW = np.ones((height, width), np.float32)
    counted_HW = np.zeros((height, width), np.float32)
    has_structure = rng.random(len(paint_K4HW)) >= LAYER_LEFT_OUT
    has_structure[rng.integers(len(has_structure))] = True
    for paint_4HW, is_shown in reversed(list(zip(paint_K4HW.numpy(), has_structure, strict=True))):
        alpha_HW = paint_4HW[3].clip(0, 1)
        if is_shown:
            straight_3HW = paint_4HW[:3] / alpha_HW.clip(1 / 255)
            layer_HW4 = np.dstack([*straight_3HW, alpha_HW]).clip(0, 1) * 255
            visible_HW = alpha_HW * through_HW
            picture.slide_under(canny(layer_HW4.round().astype(np.uint8)), whole, visible_HW)
            counted_HW += visible_HW
        through_HW *= 1 - alpha_HW
    if rng.random() < 0.5:
        counted_HW[:] = 1
    return picture.pixels_HW3[..., 0], (255 * counted_HW).round().astype(np.uint8)


class Controlled:
    """The still model with a ControlNet beside it."""

    def __init__(self, run: Run) -> None:
        self.vae = exported(AutoencoderKL, run.weights, "vae")
        self.unet = exported(UNet2DConditionModel, run.weights, "unet")
        self.text = exported(CLIPTextModel, run.weights, "text_encoder")
        self.tokenizer = CLIPTokenizer.from_pretrained(run.weights, subfolder="tokenizer")
        for part in (self.vae, self.unet, self.text):
            part.requires_grad_(False).eval().to(run.device, memory_format=torch.channels_last)
        self.scale: float = self.vae.config.scaling_factor

    def predict(
        self,
        model: ControlNetModel,
        noisy_BCHW: Tensor,
        t_B: Tensor,
        ids_BT: Tensor,
        edges_BHW: Tensor,
        counts_BHW: Tensor,
    ) -> Tensor:
        """Predicted noise [B, 4, h, w]; control pictures edges_BHW act where counts_BHW (both uint8) say."""
        with torch.no_grad():
            states_BTC = self.text(input_ids=ids_BT).last_hidden_state
        picture_B3HW = (edges_BHW.float() / 255)[:, None].expand(-1, 3, -1, -1)
        counts_B1HW = counts_BHW.float()[:, None] / 255
        downs, mid = model(noisy_BCHW, t_B, states_BTC, picture_B3HW, return_dict=False)

        def cut(residual_BCHW: Tensor) -> Tensor:
            shape = residual_BCHW.shape[-2:]
            return residual_BCHW * functional.adaptive_avg_pool2d(counts_B1HW, shape)

        predicted_BCHW: Tensor = self.unet(
            noisy_BCHW,
            t_B,
            states_BTC,
            down_block_additional_residuals=[cut(residual) for residual in downs],
            mid_block_additional_residual=cut(mid),
        ).sample
        return predicted_BCHW

    @torch.no_grad()
    def gain(self, model: ControlNetModel, pool: Pool) -> dict[str, float]:
        """The error of predicted noise on a pool of held-out scenes, with their control pictures and without."""
        x_BCHW = pool.latents_NCHW.float() * self.scale
        noisy_BCHW, noise_BCHW, t_B, _ = noised(x_BCHW, 0, np.random.default_rng(0), POWER)
        ids_BT, edges_BHW = pool.ids_NT.long(), pool.edges_NHW
        errors = {}
        for name, counts_BHW in (("without", 0 * pool.counts_NHW), ("with", pool.counts_NHW)):
            predicted_BCHW = self.predict(model, noisy_BCHW, t_B, ids_BT, edges_BHW, counts_BHW)
            errors[name] = round(float((predicted_BCHW - noise_BCHW).square().mean()), 5)
        return errors


def draw(run: Run, pool: Pool, path: Path) -> None:
    """Draw a sheet from pure noise: control pictures, pictures without, pictures with, the scenes they came from."""
    plain = StableDiffusionPipeline.from_pretrained(run.weights)
    model = ControlNetModel.from_pretrained(run.weights / NAME)
    steered = StableDiffusionControlNetPipeline(
        **plain.components, controlnet=model, requires_safety_checker=False
    ).to(run.device)
    for pipeline in (plain, steered):
        pipeline.set_progress_bar_config(disable=True)
    scenes = run.scenes(range(HELD_OUT, HELD_OUT + 8))
    truth = run.composer.paint(scenes).permute(0, 2, 3, 1).cpu().numpy()
    side = run.size.side
    sheet = Image.new("RGB", (side * len(scenes), side * 4))
    for column, scene in enumerate(scenes):
        edges_HW = pool.edges_NHW[scene.seed % pool.size].cpu().numpy()
        edges = Image.fromarray(edges_HW).convert("RGB")
        asked = {"prompt": scene.caption, "num_inference_steps": 15, "guidance_scale": 3.0}
        noise = torch.Generator("cpu")
        without = plain(**asked, generator=noise.manual_seed(0)).images[0]
        drawn = steered(**asked, image=edges, generator=noise.manual_seed(0)).images[0]
        for row, shown in enumerate((edges, without, drawn, Image.fromarray(truth[column]))):
            sheet.paste(shown, (side * column, side * row))
    sheet.save(path)


def train(run: Run, minutes: float) -> None:
    """Train for so many minutes, or the rest of them, and export beside the model."""
    still = Controlled(run)
    if run.start and (run.start / NAME).exists():
        model = exported(ControlNetModel, run.start, NAME)
    else:
        model = networks.controlnet(still.unet)
    model.requires_grad_(True).train()
    model.to(run.device, memory_format=torch.channels_last)
    # What the U-Net has not taught yet learns faster: the edges' way in and the zeros' way out.
    fresh, taught = [], []
    for name, value in model.named_parameters():
        (fresh if name.startswith("controlnet_") else taught).append(value)
    groups = [
        {"params": fresh, "lr": 2 * LEARNING_RATE},
        {"params": taught, "lr": LEARNING_RATE},
    ]
    course = Course(run, "controlnet", minutes, groups)
    average = Average(model, AVERAGE)
    saved = course.resumed()
    if saved:
        model.load_state_dict(saved["model"])
        average.values = saved["average"]
    held_out = Pool(run, still.vae, still.tokenizer, HELD_OUT_COUNT, control)
    held_out.add(range(HELD_OUT, HELD_OUT + HELD_OUT_COUNT))
    pool = Pool(run, still.vae, still.tokenizer, POOL, control)
    new = run.batch // 8
    pool.first = 32 * run.batch
    if not course.is_done:
        pool.add(range(new * course.step, new * course.step + pool.first))
    pool.oldest = new * course.step
    course.log(params=sum(value.numel() for value in model.parameters()))
    empty_T = token_ids(still.tokenizer, [""])[0].to(run.device)
    frozen = ControlNetModel.from_config(model.config).to(run.device)

    def loss_of(noise_BCHW: Tensor, weights_B: Tensor, *inputs: Tensor) -> Tensor:
        return squared_error(still.predict(model, *inputs), noise_BCHW, weights_B)

    def learn(step: int) -> Tensor:
        rng = np.random.default_rng([8, step])
        places = pool.batch(step, new, rng)
        ids_BT = pool.ids_NT[places].long()
        ids_BT[torch.from_numpy(rng.random(run.batch) < CAPTION_DROPOUT)] = empty_T
        x_BCHW = pool.latents_NCHW[places].float() * still.scale
        noisy_BCHW, noise_BCHW, t_B, weights_B = noised(x_BCHW, step, rng, POWER)
        controls = (pool.edges_NHW[places], pool.counts_NHW[places])
        return run.gradients(loss_of, noise_BCHW, weights_B, noisy_BCHW, t_B, ids_BT, *controls)

    def save() -> dict[str, Any]:
        course.save(model=model.state_dict(), average=average.values)
        frozen.load_state_dict(average.values)
        folder = run.weights / NAME
        with tempfile.TemporaryDirectory(dir=run.work) as made:
            frozen.save_pretrained(made)
            write_halved(Path(made), folder)
        draw(run, held_out, run.work / "controlnet.png")
        return {"held_out": still.gain(frozen, held_out)}

    course.attend(learn, save, [(average, model)])
