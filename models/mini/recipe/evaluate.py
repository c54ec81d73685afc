"""How recognisable the exported model's pictures are: draw every concept and name what was drawn.

A picture is named after the nearest of many composed references, seen at 32 x 32 pixels.
"""

import argparse
import json
import math
from pathlib import Path

import art
import numpy as np
import scenes
import torch
from autoencoder import HELD_OUT, decibels, pictures
from denoiser import WEIGHTS
from diffusers import StableDiffusionPipeline
from PIL import Image

GROUND = "on a wooden table"
SMALL = 32


def _small(picture_HWC: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(picture_HWC).resize((SMALL, SMALL), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32) / 255


def references() -> tuple[np.ndarray, np.ndarray]:
    """Small composed pictures of every concept, and the index of each one's concept."""
    rng = np.random.default_rng(5)
    small, labels = [], []
    for index, concept in enumerate(art.CONCEPTS.values()):
        for look in range(len(art.LOOKS)):
            for side in (80, 91, 102):
                for flip in (False, True):
                    item = scenes.Placement(concept=concept, x=64, y=64, side=side, flip=flip)
                    ground = scenes.paint_ground(GROUND, rng)
                    shown = _small(scenes.paint(ground, [item], look, (0.0, 0.07, 0.42)))
                    for down in (-2, 0, 2):
                        for right in (-2, 0, 2):
                            small.append(np.roll(shown, (down, right), axis=(0, 1)))
                            labels.append(index)
    return np.asarray(small), np.asarray(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--sheet", type=Path, required=True, help="where the drawn sheet goes")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.weights)
    pipeline.set_progress_bar_config(disable=True)
    names = list(art.CONCEPTS.values())
    small, labels = references()
    columns = math.ceil(len(names) / 2)
    sheet = Image.new("RGB", (scenes.SIDE * columns, scenes.SIDE * 4))
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
                (scenes.SIDE * (index % columns), scenes.SIDE * (2 * (index // columns) + seed)),
            )
            apart = np.square(small - _small(np.asarray(shown))).mean(axis=(1, 2, 3))
            named = names[labels[apart.argmin()]]
            hits += named == name
            if named != name:
                wrong.append(f"{name} seen as {named}")
    sheet.save(arguments.sheet)
    report: dict[str, object] = {"recognised": round(hits / (2 * len(names)), 3), "wrong": wrong}
    report["held_out_psnr"] = round(decibels(pipeline.vae, pictures(HELD_OUT)), 2)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
