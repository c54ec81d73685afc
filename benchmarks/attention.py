"""Bar 4: do a layer's words act where the layer is?

    python -m benchmarks.attention [--model models/mini/weights] [--steps 20] [--example examples/bento ...]

For each layer of each example: the share of the cross-attention that its words receive which comes from inside its own
visible mask (soft, at each level's resolution), the mean over heads, modules and steps, prompted rows only. Once with
attract and repel 0, once with the dials of the example (unset ones chosen from the layer's size, as always), once with
both dials at 1. `area` is the share that attention which knows nothing of the layer would have. Exit code 1 unless the
mean over all layers rises to the smaller of twice what it is without control and 0.9, with the dials at 1.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name

from collage_client.files import attach
from collage_client.files import load as load_collage
from gateway.prompt import bind
from services.common import wire
from services.common.collage import Sampling
from services.common.models_file import BUNDLED
from services.common.plate import Plate
from services.compositor.compose import Composition
from services.compositor.making import make
from services.compositor.work import Work
from services.diffusion.networks import load
from services.generator.attention import ControlledAttention, grid_of, heads
from services.generator.conditioning import Conditioning, LayerControl, prepare
from services.generator.sampler import Run, step
from services.generator.stages import TorchStages

EXAMPLES = Path(__file__).parents[1] / "examples"
FACTOR, CEILING = 2.0, 0.9


class Meter:
    """Gathers, for each layer, the share of its words' attention that comes from inside its mask."""

    def __init__(self, conditioning: Conditioning, plate: Plate) -> None:
        self._positions = conditioning.positions
        self._visible = torch.from_numpy(plate.visible_Lhw)
        self._shares: list[torch.Tensor] = []

    def read(self, attn: Any, cells: torch.Tensor, text: torch.Tensor) -> None:
        """One cross-attention: repeats its scores, with the control's bias, for the prompted rows."""
        query, key = heads(attn, attn.to_q(cells)), heads(attn, attn.to_k(text))
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        control = attn.processor.slot.control
        if control is not None:
            scores = scores + control.bias_B1QT(query, control.looked_at(key))
        mass_HQT = scores[len(scores) // 2 :].softmax(-1).flatten(0, 1)
        grid = grid_of(mass_HQT.shape[1], *self._visible.shape[1:])
        v_LQ = F.adaptive_avg_pool2d(self._visible, grid).flatten(1)
        shares = []
        for positions, v_Q in zip(self._positions, v_LQ, strict=True):
            of_words_HQ = mass_HQT[..., list(positions)].sum(-1)
            shares.append(((of_words_HQ @ v_Q) / of_words_HQ.sum(-1)).mean())
        self._shares.append(torch.stack(shares))

    def shares(self) -> list[float]:
        """The mean share of each layer."""
        return torch.stack(self._shares).mean(dim=0).tolist()


@contextmanager
def metering(stages: TorchStages, unet: torch.nn.Module, meter: Meter) -> Iterator[None]:
    """Lets the meter see every cross-attention of the U-Net."""

    def read(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        meter.read(attn, args[0], kwargs["encoder_hidden_states"])

    hooks = [
        part.register_forward_pre_hook(read, with_kwargs=True)
        for part in unet.modules()
        if isinstance(getattr(part, "processor", None), ControlledAttention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def composed(folder: Path, latent_factor: int) -> tuple[Composition, str, str, list[LayerControl]]:
    """An example as the services make it: composition, prompts, and how the layers steer."""
    collage = wire.parse_collage(attach(load_collage(folder)))
    work = Work(collage=collage, latent_factor=latent_factor, redo=None)
    pictures = {path: data for path, data in work.pictures().items() if isinstance(data, bytes)}
    composition = make(work, pictures).composition
    bound = bind(collage.prompt, collage.layers)
    layers = [
        LayerControl(
            text_start=start,
            text_end=end,
            dials=part.dials,
        )
        for part, (start, end) in zip(composition.layers, bound.spans, strict=True)
    ]
    return composition, bound.text, collage.negative_prompt, layers


def measure(
    stages: TorchStages,
    unet: torch.nn.Module,
    folder: Path,
    steps: int,
) -> Iterator[tuple[str, float, list[float]]]:
    """Layer, area, and the shares without control, with the example's dials, and with full dials."""
    composition, prompt, negative_prompt, own = composed(folder, stages.facts.latent_factor)
    settings = (
        [replace(layer, dials=replace(layer.dials, attract=0.0, repel=0.0)) for layer in own],
        own,
        [replace(layer, dials=replace(layer.dials, attract=1.0, repel=1.0)) for layer in own],
    )
    sampling = Sampling(
        model="", sampler="euler", steps=steps, guidance_scale=5.0, images=1, seed=0
    )
    shares = []
    for layers in settings:
        conditioning = prepare(
            stages,
            prompt=prompt,
            negative_prompt=negative_prompt,
            guidance_scale=sampling.guidance_scale,
            layers=layers,
        )
        meter = Meter(conditioning, composition.plate)
        run = Run.begin(
            stages, plate=composition.plate, conditioning=conditioning, sampling=sampling
        )
        with metering(stages, unet, meter), torch.inference_mode():
            while not run.is_done:
                step(stages, [run])
        shares.append(meter.shares())
    for index, part in enumerate(composition.layers):
        yield part.layer.name, part.visible_fraction, [each[index] for each in shares]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--example", type=Path, action="append")
    arguments = parser.parse_args(argv)
    examples = arguments.example or sorted(path.parent for path in EXAMPLES.glob("*/collage.yaml"))
    model = load(arguments.model, dtype=torch.float32, device=torch.device("cpu"))
    stages = TorchStages(model)
    print(f"{'example':12} {'layer':12} {'area':>6} {'without':>8} {'dials':>6} {'full':>6}")
    rows = []
    for folder in examples:
        for name, area, shares in measure(stages, model.unet, folder, arguments.steps):
            without, dials, full = shares
            print(
                f"{folder.name:12} {name:12} {area:6.3f} {without:8.3f} {dials:6.3f} {full:6.3f}",
                flush=True,
            )
            rows.append(shares)
    without, dials, full = np.mean(rows, axis=0)
    bar = min(FACTOR * without, CEILING)
    print(f"{'mean':32} {without:8.3f} {dials:6.3f} {full:6.3f}   bar {bar:.3f}")
    return 0 if full >= bar else 1


if __name__ == "__main__":
    sys.exit(main())
