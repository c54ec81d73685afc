"""How recognisable the exported model's pictures are: draw every concept and name what was drawn.

A picture is named after the nearest of many composed references, seen at 32 x 32 pixels.
"""

import argparse
import json
import math
from pathlib import Path

import art
import networks
import numpy as np
import torch
from autoencoder import decibels
from diffusers import StableDiffusionPipeline
from PIL import Image
from scenes import UNITS, Composer, Placement, Scene, scene
from training import HELD_OUT

GROUND = "on a wooden table"
SMALL = 32


def _small(picture_HWC: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(picture_HWC).resize((SMALL, SMALL), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


def references(composer: Composer, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Small composed pictures of every concept, and the index of each one's concept."""
    scenes, labels = [], []
    for index, concept in enumerate(names):
        for look in range(len(art.LOOKS)):
            for side in (80, 91, 102):
                for flip in (False, True):
                    middle = UNITS / 2
                    item = Placement(
                        concept=concept, look=look, x=middle, y=middle, side=side, flip=flip
                    )
                    shown = Scene(
                        seed=len(scenes),
                        ground=GROUND,
                        is_land=False,
                        placements=[item],
                        shadow=(0.0, 0.07, 0.42),
                        caption=concept,
                    )
                    scenes.append(shown)
                    labels.append(index)
    small = [
        _small(picture_HWC)
        for start in range(0, len(scenes), 16)
        for picture_HWC in _painted(composer, scenes[start : start + 16])
    ]
    shifts = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2)]
    moved = [np.roll(shown, shift, axis=(0, 1)) for shown in small for shift in shifts]
    return np.asarray(moved), np.repeat(labels, len(shifts))


def _painted(composer: Composer, scenes: list[Scene]) -> np.ndarray:
    pictures_BHWC: np.ndarray = composer.paint(scenes).permute(0, 2, 3, 1).numpy()
    return pictures_BHWC


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=art.WORK.parent / "weights")
    parser.add_argument("--size", choices=networks.SIZES, default="small")
    parser.add_argument("--sheet", type=Path, required=True, help="where the drawn sheet goes")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.weights)
    pipeline.set_progress_bar_config(disable=True)
    size = networks.SIZES[arguments.size]
    names = size.names
    composer = Composer(size.side, names, art.gallery(), torch.device("cpu"))
    small, labels = references(composer, names)
    columns = math.ceil(len(names) / 2)
    sheet = Image.new("RGB", (size.side * columns, size.side * 4))
    hits, wrong = 0, []
    for seed in range(2):
        for index, name in enumerate(names):
            shown = pipeline(
                f"a {name} {GROUND}",
                num_inference_steps=arguments.steps,
                guidance_scale=arguments.guidance,
                generator=torch.Generator("cpu").manual_seed(seed),
            ).images[0]
            sheet.paste(
                shown,
                (size.side * (index % columns), size.side * (2 * (index // columns) + seed)),
            )
            apart = np.square(small - _small(np.asarray(shown))).mean(axis=(1, 2, 3))
            named = names[labels[apart.argmin()]]
            hits += named == name
            if named != name:
                wrong.append(f"{name} seen as {named}")
    sheet.save(arguments.sheet)
    report: dict[str, object] = {"recognised": round(hits / (2 * len(names)), 3), "wrong": wrong}
    held_out = [scene(seed, names, composer.palette) for seed in range(HELD_OUT, HELD_OUT + 64)]
    report["held_out_psnr"] = round(decibels(pipeline.vae, composer.paint(held_out)), 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
