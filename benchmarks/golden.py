"""Golden pictures: what the bundled weights draw, committed, so that other weights or other arithmetic are noticed.

    python -m benchmarks.golden            # compares; exit code 1 where a value differs by more than 2 of 255
    python -m benchmarks.golden --write    # after training: draws them anew

A stock diffusers pipeline draws them, so that they judge the weights and not our sampler.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from services.common.registry import BUNDLED

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    drawn = draw()
    if arguments.write:
        GOLDEN.mkdir(exist_ok=True)
        for name, picture_HWC in drawn.items():
            Image.fromarray(picture_HWC).save(GOLDEN / f"{name}.png", optimize=True)
    differences = {name: difference(name, picture_HWC) for name, picture_HWC in drawn.items()}
    for name, most in differences.items():
        print(f"{name:16} largest difference {most} of 255, allowed {ALLOWED}")
    sys.exit(max(differences.values()) > ALLOWED)


if __name__ == "__main__":
    main()
