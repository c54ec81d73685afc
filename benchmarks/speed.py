"""Seconds a picture: our generator beside diffusers' img2img, on the machine's own device.

    python -m benchmarks.speed --model sdxl [--device cuda] [--dtype float16] [--layers 8] [--rounds 5] [--steps 30]

A whole img2img, picture in and pictures out, by diffusers' stock pipeline without any control, and by our stages with
as many layers as told that use every dial, stepped in a loop: neither the engine, which schedules jobs and decodes
beside the steps, nor the services are in the figures. 1 and 4 pictures a call, on canvases of 512 and 1024 pixels.
Both share the weights in memory, dtype, steps, guidance and attention (torch's scaled dot product; nothing is
compiled), and take turns. Models: `sd15` and `sdxl` are folders of the published shapes with random weights, made on
the spot (2 and 7 GB of disk); `mini` is the bundled model, on 128 and 256 pixels; or any folder, or
hub:OWNER/NAME@REVISION. Device and dtype left out are what the generator would take.

Printed: seconds a picture, medians over the rounds; the median over rounds of ours by theirs in the same round; and on
a GPU the peak memory of each, the shared weights included. (Stock SDXL has an autoencoder of its own beside ours,
because it changes its dtype within a call: 0.2 to 0.3 GiB in both figures.) Exit code 1 where ours takes 24 GiB or more
for one picture. Nothing else may run meanwhile.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.logging import set_verbosity_error

from benchmarks.overhead import WORDS, controlled, plain, take_turns
from services.common.models_file import BUNDLED, DTYPES, ModelSource
from services.common.operator_file import resolve
from services.diffusion.networks import LoadedModel, load
from services.generator.folder_card import FolderCard
from services.generator.stages import TorchStages
from testing import fullsize

LIMIT_GIB = 24
SIDES = {"mini": (128, 256)}
LARGE_SIDES = (512, 1024)
IMAGES = (1, 4)


def read(name: str, *, device: str, dtype: str, scratch: Path) -> LoadedModel:
    """The model of that name in memory; a random one is made in `scratch`."""
    if name in fullsize.MAKERS:
        source: Path | str = fullsize.MAKERS[name](scratch / name)
    else:
        source = BUNDLED if name == "mini" else resolve(name, Path())
    card = FolderCard.read(ModelSource(name=name, source=source, device=device, dtype=dtype))
    return load(card.folder, dtype=card.dtype, device=card.device)


class Watched:
    """A way to draw that waits for the device's end, and the most memory that it had there."""

    def __init__(self, draw: Callable[[], object], device: torch.device) -> None:
        self._draw = draw
        self._device = device
        self.peak_bytes = 0

    def __call__(self) -> None:
        """Draws."""
        if self._device.type != "cuda":
            self._draw()
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        self._draw()
        torch.cuda.synchronize(self._device)
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(self._device))


def compare(
    model: LoadedModel,
    stages: TorchStages,
    *,
    side: int,
    images: int,
    layers: int,
    steps: int,
    rounds: int,
) -> bool:
    """Prints the figures of one canvas and number of pictures; whether ours keeps within the memory."""
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    prompt = ", ".join(WORDS)
    stock = plain(model, picture, prompt, steps, num_images_per_prompt=images)
    ours = controlled(stages, picture, layers, steps, images=images)
    ways = {"stock": Watched(stock, model.device), "ours": Watched(ours, model.device)}
    times = take_turns(ways, rounds=rounds)
    each = {way: statistics.median(times[way]) / images for way in ways}
    ratios = [one / other for one, other in zip(times["ours"], times["stock"], strict=True)]
    peaks = {way: watched.peak_bytes / 2**30 for way, watched in ways.items()}
    memory = (
        f"; peak memory stock {peaks['stock']:.2f} GiB, ours {peaks['ours']:.2f} GiB"
        if model.device.type == "cuda"
        else ""
    )
    print(
        f"{side} x {side}, {images} a call: stock {each['stock']:.3f} s a picture, ours {each['ours']:.3f} s, "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}){memory}",
        flush=True,
    )
    return images > 1 or peaks["ours"] < LIMIT_GIB


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model", default="mini", help="mini, sd15, sdxl, a folder or hub:OWNER/NAME@REVISION"
    )
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", default="", choices=DTYPES)
    parser.add_argument("--layers", type=int, default=8, choices=(4, 8, 16, 32))
    parser.add_argument("--side", type=int, action="append", help="of the canvas; may be repeated")
    parser.add_argument("--images", type=int, action="append", help="a call; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    # Stock SDXL remarks on every change of its autoencoder's dtype.
    set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        model = read(
            arguments.model,
            device=arguments.device,
            dtype=arguments.dtype,
            scratch=Path(scratch),
        )
        is_gpu = model.device.type == "cuda"
        machine = torch.cuda.get_device_name(model.device) if is_gpu else platform.machine()
        print(
            f"{arguments.model} on {model.device} ({machine}), {model.dtype}, torch {torch.__version__}, "
            f"{arguments.layers} layers, {arguments.steps} steps, {arguments.rounds} rounds"
        )
        stages = TorchStages(model)
        is_within = True
        for side in arguments.side or SIDES.get(arguments.model, LARGE_SIDES):
            for images in arguments.images or IMAGES:
                is_within &= compare(
                    model,
                    stages,
                    side=side,
                    images=images,
                    layers=arguments.layers,
                    steps=arguments.steps,
                    rounds=arguments.rounds,
                )
    return 0 if is_within else 1


if __name__ == "__main__":
    sys.exit(main())
