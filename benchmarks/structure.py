"""Bar 4 of structure: ControlNet for 8 layers costs what diffusers takes for one, and little more.

    python -m benchmarks.structure [--model mini] [--model sd15] [--rounds 15] [--steps 10]

A whole img2img, picture in and picture out, by diffusers' `StableDiffusionControlNetImg2ImgPipeline` with one
ControlNet at scale 1, against the same by our path with 8 layers that all use that kind, each at its own scale, and
every other dial (a noise level, attract, repel and a seed each). The same weights, steps, guidance and threads; the two
take turns. The ControlNet is an untrained one of the U-Net's shape: what it draws is of no interest here. Models and
figures as in `benchmarks.overhead`. Exit code 1 when the median ratio is above 1.10. Then our path
with and without emphasis on every second layer, a third prediction a step. Nothing else may run meanwhile.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline
from PIL import Image

from benchmarks.overhead import WORDS, compare, controlled, plain, run, take_turns
from services.diffusion.networks import LoadedModel
from services.generator.controlnet import load_controlnet
from services.generator.stages import TorchStages

LAYERS = 8
BARS = {LAYERS: 1.10}
KIND = "canny"
# Channels of the picture's embedding, at the canvas' resolution and after each halving (diffusers' own).
EMBEDDING = (16, 32, 96, 256)


def add_controlnet(model: LoadedModel, folder: Path) -> LoadedModel:
    """The model with a ControlNet of its shape."""
    halvings = model.facts.latent_factor.bit_length()
    network = ControlNetModel.from_unet(
        model.unet, conditioning_embedding_out_channels=EMBEDDING[:halvings]
    )
    network.save_pretrained(folder)
    return replace(model, controlnets={KIND: folder})


def measure(name: str, model: LoadedModel, *, rounds: int, steps: int) -> bool:
    """Prints a model's figures; whether they are within the bars."""
    with tempfile.TemporaryDirectory() as folder:
        *ways, emphasised = _ways(add_controlnet(model, Path(folder)), steps)
        is_within = compare(name, dict(zip((0, LAYERS), ways, strict=True)), BARS, rounds=rounds)
        times = take_turns({"without": ways[1], "with": emphasised}, rounds=rounds)
    pairs = zip(times["with"], times["without"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    print(f"{name}: emphasis on every second layer takes {ratio:.3f} times as long", flush=True)
    return is_within


def _ways(model: LoadedModel, steps: int) -> tuple[Callable[[], object], ...]:
    """What is timed: stock, ours, and ours with emphasis."""
    native = model.facts.native
    shape = (native.height, native.width, 3)
    rng = np.random.default_rng(0)
    picture, control = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    network = load_controlnet(model.controlnets[KIND], dtype=model.dtype, device=model.device)
    stages = TorchStages(model)
    stock = plain(
        model,
        picture,
        ", ".join(WORDS),
        steps,
        kind=StableDiffusionControlNetImg2ImgPipeline,
        parts={"controlnet": network},
        control_image=Image.fromarray(control),
        controlnet_conditioning_scale=1.0,
    )
    ours = (
        controlled(stages, picture, LAYERS, steps, control={KIND: control}, emphasis=emphasis)
        for emphasis in (0.0, 1.0)
    )
    return (stock, *ours)


def main(argv: Sequence[str] | None = None) -> int:
    return run(__doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
