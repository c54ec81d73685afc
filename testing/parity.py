"""One model folder drawn twice, by us and by diffusers' own pipelines, and how far the two are apart.

Main type: `Case`. `benchmarks.parity` prints its differences for every family and sampler, tests ask for some.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from services.common.collage import Adapter, Dials, Sampling, Structure
from services.common.plate import Plate
from services.diffusion.networks import load
from services.generator.conditioning import LayerControl, prepare
from services.generator.sampler import Run, step
from services.generator.schedule import scheduler
from services.generator.stages import TorchStages
from testing import toy

PROMPT = "a photo of sushi and cake on the table"
NEGATIVE = "a box"
STEPS = 10
# 0.7 is one that float32 would turn into 6 steps of 10.
STRENGTHS = (0.3, 0.7, 1.0)
GUIDANCE_SCALES = (1.0, 5.0)
SEEDS = (0, 1)
KINDS = ("canny", "depth")
# What a layer asks for; diffusers takes the starts and ends as fractions of the steps that are left, as we do.
STRUCTURES = {
    "control": (Structure(kind="canny"),),
    "controls": (
        Structure(kind="canny", scale=0.6, start=0.2, end=0.7),
        Structure(kind="depth", scale=0.9, start=0.4),
    ),
    "emphasis": (
        Structure(kind="canny", scale=0.6, emphasis=1.0),
        Structure(kind="depth", scale=0.9, start=0.4, emphasis=1.0),
    ),
}


class Case:
    """One model folder, loaded twice: by us, and by diffusers' pipelines. Twice as wide as high: nothing is square."""

    def __init__(self, folder: Path) -> None:
        networks = {kind: toy.controlnet(folder, kind) for kind in KINDS}
        self.stages = TorchStages(
            load(
                folder,
                dtype=torch.float32,
                device=torch.device("cpu"),
                controlnets=networks,
            )
        )
        # What is on in what `ours` draws.
        self.adapters: tuple[Adapter, ...] = ()
        self.facts = self.stages.facts
        is_xl = bool(self.facts.pooled_width)
        plain = StableDiffusionXLImg2ImgPipeline if is_xl else StableDiffusionImg2ImgPipeline
        self.pipeline = plain.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.controlnets = {
            kind: ControlNetModel.from_pretrained(network) for kind, network in networks.items()
        }
        self.rng = np.random.default_rng(0)
        shape = (self.facts.native.height, 2 * self.facts.native.width, 3)
        self.composite = self.rng.integers(0, 256, shape, dtype=np.uint8)
        self.z0 = self.stages.encode_image(torch.from_numpy(self.composite)[None])
        self.grid = tuple(self.z0.shape[2:])
        self.control = {
            kind: self.rng.integers(0, 256, shape, dtype=np.uint8) for kind in sorted(KINDS)
        }

    def ours(
        self,
        sampler: str,
        strength_hw: NDArray[np.float64],
        scale: float,
        structures: tuple[Structure, ...] = (),
    ) -> tuple[Tensor, NDArray[np.uint8]]:
        """Latents and pictures, by the code that the service runs; one layer over everything has the structures."""
        layers = [
            LayerControl(
                text_start=0,
                text_end=0,
                dials=Dials(noise=1.0, attract=0, repel=0),
                structures=structures,
            )
        ]
        plate = Plate(
            composite_HWC=self.composite,
            visible_Lhw=np.ones((1, *self.grid), np.float32),
            strength_hw=strength_hw,
            release_HW=np.full(self.composite.shape[:2], 255, np.uint8),
            control=self.control,
        )
        conditioning = prepare(
            self.stages,
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            guidance_scale=scale,
            layers=layers,
            adapters=self.adapters,
        )
        sampling = Sampling(
            model="toy",
            sampler=sampler,
            steps=STEPS,
            guidance_scale=scale,
            images=len(SEEDS),
            seed=SEEDS[0],
            adapters=self.adapters,
        )
        run = Run.begin(self.stages, plate=plate, conditioning=conditioning, sampling=sampling)
        while not run.is_done:
            step(self.stages, [run])
        return run.latents_NChw, np.stack(list(run.finish(self.stages)))

    def stock(self, sampler: str, strength: float, scale: float, **options: Any) -> Any:
        """Latents, or what `output_type` says, by the stock pipeline."""
        self.pipeline.scheduler = scheduler(self.facts, sampler)
        return self.pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=self.z0.expand(len(SEEDS), -1, -1, -1),
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            num_images_per_prompt=len(SEEDS),
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            **{"output_type": "latent", **options},
        ).images

    def stock_controlled(
        self, sampler: str, strength: float, scale: float, structures: Sequence[Structure]
    ) -> Any:
        """Latents by the stock pipeline with ControlNets; emphasis 1 of all of them is its guess mode."""
        used = MultiControlNetModel([self.controlnets[part.kind] for part in structures])
        is_guess = all(part.emphasis == 1 for part in structures)
        if is_guess:
            # In that mode a ControlNet also weakens its finer levels (down to a tenth), which is no part of ours.
            for network in used.nets:
                network.register_forward_pre_hook(_without_falloff, with_kwargs=True)
        if self.facts.pooled_width:
            pipeline = StableDiffusionXLControlNetImg2ImgPipeline(
                **self.pipeline.components, controlnet=used, add_watermarker=False
            )
        else:
            pipeline = StableDiffusionControlNetImg2ImgPipeline(
                **self.pipeline.components, controlnet=used, requires_safety_checker=False
            )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = scheduler(self.facts, sampler)
        return pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=self.z0.expand(len(SEEDS), -1, -1, -1),
            control_image=[Image.fromarray(self.control[part.kind]) for part in structures],
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=scale,
            num_images_per_prompt=len(SEEDS),
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            controlnet_conditioning_scale=[part.scale for part in structures],
            control_guidance_start=[part.start for part in structures],
            control_guidance_end=[part.end for part in structures],
            guess_mode=is_guess,
            output_type="latent",
        ).images

    def inject(self, sampler: str, strength_hw: NDArray[np.float64], scale: float) -> Any:
        """Latents by exact-level injection: after each step of a stock pipeline, cells not yet free are put back."""
        shape = (1, *self.z0.shape[1:])
        noise = torch.cat(
            [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
        )
        free_from = torch.tensor(
            [[STEPS - int(STEPS * s) for s in row] for row in strength_hw.tolist()]
        )

        def put_back(pipeline: Any, index: int, _: Any, tensors: dict[str, Tensor]) -> Any:
            state, scheduler = index + 1, pipeline.scheduler
            kept = self.z0
            if state < STEPS:
                kept = scheduler.add_noise(kept, noise, scheduler.timesteps[state : state + 1])
            return {"latents": torch.where(free_from >= state, kept, tensors["latents"])}

        return self.stock(sampler, 1.0, scale, callback_on_step_end=put_back)

    def differences(
        self,
        sampler: str,
        scales: Sequence[float] = GUIDANCE_SCALES,
        strengths: Sequence[float] = STRENGTHS,
    ) -> dict[str, float]:
        """Largest difference of each kind over all settings."""
        found: dict[str, list[float]] = {}

        def note(kind: str, one: Any, other: Any) -> None:
            found.setdefault(kind, []).append(float(abs(one - other).max()))

        maps = {"map 0/1": self.rng.choice([0.0, 1.0], self.grid)}
        if sampler != "unipc":
            maps["map 0..1"] = self.rng.choice([0.0, 0.3, 0.7, 0.95, 1.0], self.grid)
        for scale in scales:
            for strength in strengths:
                latents, pictures = self.ours(sampler, np.full(self.grid, strength), scale)
                note("latents", latents, self.stock(sampler, strength, scale))
                theirs = self.stock(sampler, strength, scale, output_type="np")
                note("pictures", pictures, (theirs * 255).round())
                # diffusers' ControlNet img2img pipeline leaves such a U-Net's guidance input out.
                is_comparable = self.facts.guidance_width is None
                for kind, structures in STRUCTURES.items() if is_comparable else ():
                    latents, _ = self.ours(sampler, np.full(self.grid, strength), scale, structures)
                    stock = self.stock_controlled(sampler, strength, scale, structures)
                    note(kind, latents, stock)
            for kind, strength_hw in maps.items():
                latents, _ = self.ours(sampler, strength_hw, scale)
                note(kind, latents, self.inject(sampler, strength_hw, scale))
        return {kind: max(values) for kind, values in found.items()}


def _without_falloff(_: Any, args: Any, options: dict[str, Any]) -> Any:
    return args, {**options, "guess_mode": False}
