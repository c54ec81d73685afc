"""Bar 5: control is nearly free.

    python -m benchmarks.overhead [--model mini] [--model sd15] [--rounds 15] [--steps 10]

A whole img2img, picture in and picture out, by diffusers' `StableDiffusionImg2ImgPipeline` without any control, against
the same by our path with 8 and with 32 layers that use every dial (a noise level, attract, repel and a seed each). The
same weights in memory, the same steps, guidance and threads; the three take turns, in a different order each round.
`mini` is the bundled model on its own canvas; `sd15` is a U-Net of Stable Diffusion 1.5's shape with random weights at
64 x 64 latents between a toy's autoencoder and text encoder. The ratio is the median over rounds of ours by theirs in
the same round. Exit code 1 when it is above 1.05 with 8 layers or above 1.10 with 32. Nothing else may run meanwhile.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from PIL import Image

from services.common.collage import Sampling, Structure
from services.common.plate import Plate
from services.common.registry import BUNDLED
from services.generator.conditioning import LayerControl, prepare
from services.generator.models import LoadedModel, load
from services.generator.sampler import Run, step
from services.generator.stages import TorchStages
from tests import toy

BARS = {8: 1.05, 32: 1.10}
WORDS = ("sushi", "cake", "rice", "lemon", "box", "table")
GUIDANCE_SCALE = 5.0


def mini() -> LoadedModel:
    """The bundled model."""
    return load(BUNDLED, dtype=torch.float32, device=torch.device("cpu"))


def sd15() -> LoadedModel:
    """Stable Diffusion 1.5's U-Net with random weights, the rest a toy."""
    with tempfile.TemporaryDirectory() as folder:
        toy.sd1(Path(folder), text_width=768)
        model = load(Path(folder), dtype=torch.float32, device=torch.device("cpu"))
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    native = replace(model.facts.native, width=512, height=512)
    return replace(model, unet=unet, facts=replace(model.facts, native=native))


def plain(
    model: LoadedModel,
    picture: np.ndarray,
    prompt: str,
    steps: int,
    *,
    kind: type = StableDiffusionImg2ImgPipeline,
    parts: Mapping[str, object] | None = None,
    **options: object,
) -> Callable[[], object]:
    """Stock img2img on the model's own weights; its U-Net is a second shell around them.

    `kind` is another pipeline class, which has `parts` of its own and is called with `options` as well.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.unet.config).eval()
    unet.load_state_dict(model.unet.state_dict(), assign=True)
    pipeline = kind(
        vae=model.vae,
        text_encoder=model.text_encoders["text_encoder"],
        tokenizer=model.facts.tokenizers[0],
        unet=unet,
        scheduler=model.facts.scheduler("euler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **(parts or {}),
    )
    pipeline.set_progress_bar_config(disable=True)
    image = Image.fromarray(picture)
    return lambda: pipeline(
        prompt=prompt,
        image=image,
        strength=1.0,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        generator=torch.Generator().manual_seed(0),
        **options,
    )


def controlled(
    stages: TorchStages,
    picture: np.ndarray,
    layers: int,
    steps: int,
    *,
    control: Mapping[str, np.ndarray] | None = None,
) -> Callable[[], object]:
    """Our path with so many layers: equal tiles of the canvas, each with dials of its own.

    All use the kinds that there is a `control` picture of, at the scales of their dials.
    """
    height, width = (side // stages.facts.latent_factor for side in picture.shape[:2])
    columns = 8 if layers > 8 else 4
    tile = (
        np.arange(height)[:, None] * (layers // columns) // height * columns
        + np.arange(width) * columns // width
    )
    levels = np.linspace(0.3, 1.0, layers)
    plate = Plate(
        composite_HWC=picture,
        visible_Lhw=np.stack([tile == layer for layer in range(layers)]).astype(np.float32),
        strength_hw=levels[tile],
        release_HW=np.full(picture.shape[:2], 255, np.uint8),
        control=control or {},
    )
    prompt, controls = "", []
    for layer, word in zip(range(layers), itertools.cycle(WORDS), strict=False):
        prompt += ", " if prompt else ""
        controls.append(
            LayerControl(
                text_start=len(prompt),
                text_end=len(prompt) + len(word),
                attract=float(levels[layer]),
                repel=float(levels[-1 - layer]),
                seed=layer,
                structures=tuple(
                    Structure(kind=kind, scale=float(levels[layer])) for kind in control or {}
                ),
            )
        )
        prompt += word
    sampling = Sampling(
        model="",
        sampler="euler",
        steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        images=1,
        seed=0,
    )

    def draw() -> object:
        conditioning = prepare(
            stages,
            prompt=prompt,
            negative_prompt="",
            guidance_scale=GUIDANCE_SCALE,
            layers=controls,
        )
        run = Run.begin(stages, plate=plate, conditioning=conditioning, sampling=sampling)
        assert run.steps_total == steps
        while not run.is_done:
            step(stages, [run])
        return run.finish(stages)

    return draw


def measure(name: str, model: LoadedModel, *, rounds: int, steps: int) -> bool:
    """Prints a model's figures; whether they are within the bars."""
    native = model.facts.native
    picture = np.random.default_rng(0).integers(
        0, 256, (native.height, native.width, 3), dtype=np.uint8
    )
    stages = TorchStages(model)
    ways = {0: plain(model, picture, ", ".join(WORDS), steps)}
    ways |= {layers: controlled(stages, picture, layers, steps) for layers in BARS}
    return compare(name, ways, BARS, rounds=rounds)


def compare(
    name: str, ways: Mapping[int, Callable[[], object]], bars: Mapping[int, float], *, rounds: int
) -> bool:
    """Times the ways by turns, 0 being stock and the others layers; whether all are within their bars."""
    times: dict[int, list[float]] = {layers: [] for layers in ways}
    # The first round warms up.
    for number in range(-1, rounds):
        turn = number % len(ways)
        order = list(ways)[turn:] + list(ways)[:turn]
        for layers in order:
            start = time.perf_counter()
            ways[layers]()
            if number >= 0:
                times[layers].append(time.perf_counter() - start)
    is_within = True
    print(f"{name}: plain {statistics.median(times[0]) * 1000:.1f} ms", flush=True)
    for layers, bar in bars.items():
        ratios = [ours / theirs for ours, theirs in zip(times[layers], times[0], strict=True)]
        ratio = statistics.median(ratios)
        is_within &= ratio <= bar
        print(
            f"{name}: {layers:2} layers {statistics.median(times[layers]) * 1000:.1f} ms, "
            f"ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), allowed {bar:.2f}",
            flush=True,
        )
    return is_within


def run(doc: str | None, measure: Callable[..., bool], argv: Sequence[str] | None = None) -> int:
    """The command line of a benchmark that measures model by model; its exit code."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--model", choices=("mini", "sd15"), action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.rounds} rounds, {arguments.steps} steps, {arguments.threads} threads")
    is_within = True
    for name in arguments.model or ("mini", "sd15"):
        model = {"mini": mini, "sd15": sd15}[name]()
        is_within &= measure(name, model, rounds=arguments.rounds, steps=arguments.steps)
    return 0 if is_within else 1


def main(argv: Sequence[str] | None = None) -> int:
    return run(__doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
