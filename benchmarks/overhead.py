"""Bar 5: what control costs on a CPU.

    python -m benchmarks.overhead [--model mini] [--model sd15] [--rounds 15] [--steps 10]

A whole img2img, picture in and picture out, by diffusers' `StableDiffusionImg2ImgPipeline` without any control, against
the same by our path with 8 and with 32 layers that use every dial (a noise level, attract, repel and a seed each). The
same weights in memory, the same steps, guidance and threads; the three take turns, in a different order each round.
`mini` is the bundled model on its own canvas; `sd15` is a U-Net of Stable Diffusion 1.5's shape with random weights at
64 x 64 latents between a toy's autoencoder and text encoder. The ratio is the median over rounds of ours by theirs in
the same round. Exit code 1 when it is above the bar: 1.03 with 8 layers and 1.06 with 32 for `mini`, 1.02 and 1.04 for
`sd15`. Nothing else may run meanwhile.
"""

import argparse
import copy
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from services.common.collage import Dials, Sampling, Structure
from services.common.models_file import BUNDLED
from services.common.plate import Plate
from services.diffusion.networks import LoadedModel, load
from services.generator.conditioning import LayerControl, prepare
from services.generator.sampler import Run, step
from services.generator.schedule import scheduler
from services.generator.stages import TorchStages
from testing import toy

BARS = {"mini": {8: 1.03, 32: 1.06}, "sd15": {8: 1.02, 32: 1.04}}
WORDS = ("sushi", "cake", "rice", "lemon", "box", "table")
GUIDANCE_SCALE = 5.0

Way = TypeVar("Way", bound=Hashable)


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
    kind: type | None = None,
    parts: Mapping[str, object] | None = None,
    **options: object,
) -> Callable[[], object]:
    """Stock img2img on the model's own weights; its U-Net is a second shell around them.

    `kind` is another pipeline class than img2img's, which has `parts` of its own; `options` are of its call.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(model.unet.config).eval()
    unet.load_state_dict(model.unet.state_dict(), assign=True)
    if "text_encoder_2" in model.text_encoders:
        usual: type = StableDiffusionXLImg2ImgPipeline
        own = {
            # Its dtype goes up and down within each call.
            "vae": copy.deepcopy(model.vae),
            "tokenizer_2": model.facts.tokenizers[1],
            "force_zeros_for_empty_prompt": model.facts.is_empty_zero,
            "add_watermarker": False,
        }
    else:
        usual = StableDiffusionImg2ImgPipeline
        own = {
            "vae": model.vae,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    pipeline = (kind or usual)(
        **model.text_encoders,
        tokenizer=model.facts.tokenizers[0],
        unet=unet,
        scheduler=scheduler(model.facts, "euler"),
        **own,
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
    images: int = 1,
    control: Mapping[str, np.ndarray] | None = None,
    emphasis: float = 0.0,
) -> Callable[[], object]:
    """Our path with so many layers, a multiple of 4: equal tiles of the canvas, each with dials of its own.

    All use the kinds that there is a `control` picture of, at the scales of their dials; every second with `emphasis`.
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
                dials=Dials(
                    noise=1.0, attract=float(levels[layer]), repel=float(levels[-1 - layer])
                ),
                seed=layer,
                structures=tuple(
                    Structure(
                        kind=kind, scale=float(levels[layer]), emphasis=emphasis * (layer % 2)
                    )
                    for kind in control or {}
                ),
            )
        )
        prompt += word
    sampling = Sampling(
        model="",
        sampler="euler",
        steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        images=images,
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
        return list(run.finish(stages))

    return draw


def measure(name: str, model: LoadedModel, *, rounds: int, steps: int) -> bool:
    """Prints a model's figures; whether they are within the bars."""
    native = model.facts.native
    picture = np.random.default_rng(0).integers(
        0, 256, (native.height, native.width, 3), dtype=np.uint8
    )
    stages = TorchStages(model)
    ways = {0: plain(model, picture, ", ".join(WORDS), steps)}
    ways |= {layers: controlled(stages, picture, layers, steps) for layers in BARS[name]}
    return compare(name, ways, BARS[name], rounds=rounds)


def compare(
    name: str, ways: Mapping[int, Callable[[], object]], bars: Mapping[int, float], *, rounds: int
) -> bool:
    """Times the ways by turns, 0 being stock and the others layers; whether all are within their bars."""
    times = take_turns(ways, rounds=rounds)
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


def take_turns(ways: Mapping[Way, Callable[[], object]], *, rounds: int) -> dict[Way, list[float]]:
    """Seconds of each way in each round, another one first each time; a round before them warms up."""
    times: dict[Way, list[float]] = {way: [] for way in ways}
    for number in range(-1, rounds):
        turn = number % len(ways)
        for way in [*ways][turn:] + [*ways][:turn]:
            start = time.perf_counter()
            ways[way]()
            if number >= 0:
                times[way].append(time.perf_counter() - start)
    return times


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
