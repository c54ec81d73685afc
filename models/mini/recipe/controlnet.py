"""The edge ControlNet that learns with the denoiser: its control pictures, and how its residuals are cut to layers.

Control pictures are made by the compositor's own code: the edges of each layer alone, set together under the visible
masks, with some layers left out as when only some layers of a collage have structure. Edges of the whole picture are
mixed in. Half of the layered ones learn with residuals cut to the masks, as they are at serving time.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from scenes import Scene, without_marks
from torch import Tensor
from torch.nn import functional
from training import HELD_OUT, Pool, Run

from services.common.collage import Extent
from services.compositor.structure import ControlPicture, canny

NAME = "controlnet-canny"
WHOLE_PICTURE = 0.15
LAYER_LEFT_OUT = 0.3


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


def residuals(
    model: ControlNetModel,
    noisy_BCHW: Tensor,
    t_B: Tensor,
    states_BTC: Tensor,
    edges_AHW: Tensor,
    counts_AHW: Tensor,
) -> list[Tensor]:
    """What the ControlNet adds to the U-Net's ways across, fine to coarse, and to its middle.

    Control pictures edges_AHW act where counts_AHW (both uint8) say, on the first A of the batch; on the others nothing
    does.
    """
    count = len(edges_AHW)
    picture_A3HW = (edges_AHW.float() / 255)[:, None].expand(-1, 3, -1, -1)
    counts_A1HW = counts_AHW.float()[:, None] / 255
    downs, mid = model(
        noisy_BCHW[:count], t_B[:count], states_BTC[:count], picture_A3HW, return_dict=False
    )

    def cut(residual_ACHW: Tensor) -> Tensor:
        residual_ACHW = residual_ACHW * functional.adaptive_avg_pool2d(
            counts_A1HW, residual_ACHW.shape[-2:]
        )
        return functional.pad(residual_ACHW, (0, 0) * 3 + (0, len(noisy_BCHW) - count))

    return [cut(residual) for residual in (*downs, mid)]


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
        asked = {
            "prompt": without_marks(scene.caption),
            "num_inference_steps": 15,
            "guidance_scale": 3.0,
        }
        noise = torch.Generator("cpu")
        without = plain(**asked, generator=noise.manual_seed(0)).images[0]
        drawn = steered(**asked, image=edges, generator=noise.manual_seed(0)).images[0]
        for row, shown in enumerate((edges, without, drawn, Image.fromarray(truth[column]))):
            sheet.paste(shown, (side * column, side * row))
    sheet.save(path)
