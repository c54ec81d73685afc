"""The golden pictures of the bundled weights, drawn again by a stock diffusers pipeline and compared.

`benchmarks.golden` prints the differences and writes the pictures anew.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from services.common.models_file import BUNDLED

GOLDEN = BUNDLED.parent / "golden"
PROMPTS = {
    "sushi": "a sushi on a wooden table",
    "tree": "a tree in a landscape with green grass",
    "cake-and-cookie": "a birthday cake and a cookie on a checkered cloth",
}
STEPS = 20
GUIDANCE = 4.0
# Another processor adds in another order: last bits differ, and a rounding now and then.
ALLOWED = 2


def draw(model: Path = BUNDLED) -> dict[str, np.ndarray]:
    """The pictures by name, uint8 [H, W, RGB], one thread, seed 0."""
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    return {
        name: np.asarray(
            pipeline(
                prompt,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(0),
            ).images[0]
        )
        for name, prompt in PROMPTS.items()
    }


def difference(name: str, drawn_HWC: np.ndarray) -> int:
    """The largest difference of a value from the committed picture's, of 255."""
    golden_HWC = np.asarray(Image.open(GOLDEN / f"{name}.png"), dtype=np.int16)
    return int(np.abs(golden_HWC - drawn_HWC).max())
