"""Small plates and jobs for tests of the generator, on the toy model's canvas."""

import math

import numpy as np

from services.common.collage import Dials, Sampling
from services.common.plate import Plate
from services.generator.conditioning import LayerControl
from services.generator.job import Job

PROMPT = "a sushi on a table"
# "sushi" and "table", in characters.
SPANS = ((2, 7), (13, 18))


def plate(*, side=32, factor=4, strengths=(0.9, 0.4), release=255):
    """Two layers, left and right, over a picture of noise; strength and release as told."""
    rng = np.random.default_rng(0)
    cells = side // factor
    visible_Lhw = np.zeros((2, cells, cells), np.float32)
    visible_Lhw[0, :, : cells // 2] = 1
    visible_Lhw[1, :, cells // 2 :] = 0.75
    strength_hw = np.where(np.arange(cells) < cells // 2, *strengths)[None].repeat(cells, 0)
    return Plate(
        composite_HWC=rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        visible_Lhw=visible_Lhw,
        strength_hw=strength_hw.astype(np.float64),
        release_HW=np.full((side, side), release, np.uint8),
    )


def controls(*, attract=0.5, repel=0.8):
    """One control for each of the plate's layers."""
    return tuple(
        LayerControl(
            text_start=start, text_end=end, dials=Dials(noise=1.0, attract=attract, repel=repel)
        )
        for start, end in SPANS
    )


def sampling(**changes):
    values = {
        "model": "mini",
        "sampler": "euler",
        "steps": 4,
        "guidance_scale": 5.0,
        "images": 1,
        "seed": 0,
        "preview_every": None,
    }
    return Sampling(**{**values, **changes})


def job(*, made_of=None, prompt=PROMPT, deadline_s=math.inf, **changes):
    """A job of the toy model; `changes` are of its sampling."""
    return Job(
        plate=made_of or plate(),
        prompt=prompt,
        negative_prompt="",
        layers=controls(),
        sampling=sampling(**changes),
        deadline_s=deadline_s,
    )
