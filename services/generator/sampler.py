"""The sampler: masked SDEdit of one job, all its pictures together, and the step that several jobs share.

Main type: `Run`, one job from composite to pictures; `step` takes any number of runs one step further with a single
U-Net call. Read `step` and `Run._advance` for the algorithm. This module knows no queue, no clock and no service.
Suffixes: B rows of a call, N pictures of a job, C latent channels, h, w latent cells, H, W pixels.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from numpy.typing import NDArray

from services.common.collage import Sampling
from services.common.errors import Internal
from services.common.plate import Plate
from services.generator.attention import gain
from services.generator.call import Given, Rows
from services.generator.conditioning import Conditioning
from services.generator.noise import Hold, HoldingUniPC, released_at, starting_noise
from services.generator.schedule import step_options, timed
from services.generator.stages import Stages
from services.generator.structure import StructureControl, StructureStep

# Pixels decoded in one call, a picture at least: an autoencoder takes some 5 KiB a pixel, far more than steps do. A
# number of its own, because a picture's last bits depend on how many are decoded beside it, and must not on the memory.
DECODED_PIXELS = 1024 * 1024
# Weight of "no colour" when the preview's map is fitted, relative to the picture: makes a flat composite solvable.
_PREVIEW_RIDGE = 1e-4
_NO_STRUCTURE = StructureStep()


class Role(IntEnum):
    """What a prediction is for, in the order of a call's rows; see `services.generator.structure` for the bare one."""

    BARE = 0
    UNPROMPTED = 1
    PROMPTED = 2


class Run:
    """One job: `begin`, then `step` until `is_done`, then `finish`.

    steps_total: U-Net steps this job takes, 0 where every strength rounds to none. steps_done: of these.
    """

    def __init__(
        self, stages: Stages, plate: Plate, conditioning: Conditioning, sampling: Sampling
    ) -> None:
        """Use `begin`."""
        facts, device = stages.facts, stages.device
        released_hw = released_at(plate.strength_hw, sampling.steps)
        self._plate = plate
        self._conditioning = conditioning
        self._images = sampling.images
        # As in diffusers' img2img, every cell starts at the level of the largest strength.
        self._first_step = int(released_hw.min())
        self._prediction_type = facts.prediction_type
        self.steps_total = sampling.steps - self._first_step
        self.steps_done = 0
        if self.steps_total == 0:
            return
        self._scheduler, self._levels = timed(
            facts, sampling.sampler, sampling.steps, first=self._first_step
        )
        # One generator a picture: it draws the start, and then what an ancestral sampler adds.
        generators = [
            torch.Generator("cpu").manual_seed(sampling.seed_of(index))
            for index in range(sampling.images)
        ]
        self._step_options = step_options(self._scheduler, generators)
        layer_seeds = [layer.seed for layer in conditioning.layers]
        noise_NChw = starting_noise(
            generators, plate.visible_Lhw, layer_seeds, channels=facts.latent_channels
        )
        self._hold = Hold(
            z0_1Chw=stages.encode_image(torch.from_numpy(plate.composite_HWC)[None]),
            noise_NChw=noise_NChw.to(device),
            released_hw=torch.from_numpy(released_hw).to(device),
            levels=self._levels,
            releases=tuple(np.unique(released_hw).tolist()),
        )
        self._x_NChw = self._hold.start(self._first_step)
        visible_Lhw = torch.from_numpy(plate.visible_Lhw)
        self._steering = conditioning.steering(visible_Lhw)
        self._structure = StructureControl.of(
            [layer.structures for layer in conditioning.layers], plate.control, visible_Lhw
        )
        self._adapters = sampling.active_adapters
        # A guidance scale is given to the U-Nets that take it as an input, and to no other.
        is_input = facts.guidance_width is not None
        self._guidance_input = conditioning.guidance_scale if is_input else None
        self._given: dict[StructureStep, dict[Role, Given]] = {}
        self._emphasis_hw: torch.Tensor | None = None
        self._latent_to_rgb: torch.Tensor | None = None

    @classmethod
    @torch.inference_mode()
    def begin(
        cls, stages: Stages, *, plate: Plate, conditioning: Conditioning, sampling: Sampling
    ) -> "Run":
        """Encodes the composite and noises it; runs no network where no cell is free at any step."""
        return cls(stages, plate, conditioning, sampling)

    def split(self) -> list["Run"]:
        """A run for each picture, in order, from before the first step; they share what does not change."""
        assert self.steps_done == 0, "a run is split before its first step"
        runs = [copy.copy(self) for _ in range(self._images)]
        for index, run in enumerate(runs):
            run._images = 1
            if self.steps_total == 0:
                continue
            own = slice(index, index + 1)
            run._scheduler = copy.deepcopy(self._scheduler)
            run._step_options = {
                name: generators[own] for name, generators in self._step_options.items()
            }
            run._hold = replace(self._hold, noise_NChw=self._hold.noise_NChw[own])
            run._x_NChw = self._x_NChw[own]
        return runs

    @property
    def is_done(self) -> bool:
        """No step is left."""
        return self.steps_done == self.steps_total

    @property
    def control_kinds(self) -> tuple[str, ...]:
        """The ControlNets that its steps ask for."""
        if self.steps_total == 0 or self._structure is None:
            return ()
        return self._structure.kinds(self.steps_total)

    @property
    def latents_NChw(self) -> torch.Tensor:
        """The state the pictures are in, in the sampler's scaling; the latents to decode once done."""
        return self._x_NChw

    @property
    def _step(self) -> int:
        """Index of the next step in the whole schedule, and of the state that goes into it."""
        return self._first_step + self.steps_done

    @property
    def _timestep(self) -> Any:
        return self._scheduler.timesteps[self._step]

    @property
    def _structure_step(self) -> StructureStep:
        """What structure does in the next step."""
        if self._structure is None:
            return _NO_STRUCTURE
        return self._structure.at(self.steps_done, self.steps_total)

    def rows(self) -> dict[Role, Rows]:
        """What the next step has to be predicted."""
        x_NChw = self._scheduler.scale_model_input(self._x_NChw, self._timestep)
        timestep, g = float(self._timestep), gain(self._levels.true_sigmas[self._step])
        return {
            role: Rows(given=given, x_NChw=x_NChw, timestep=timestep, gain=g)
            for role, given in self._given_now().items()
        }

    def _given_now(self) -> dict[Role, Given]:
        """What does not change of the next step's rows; the same as for the step before unless structure changes."""
        structure = self._structure_step
        if structure not in self._given:
            prompt, negative = self._conditioning.prompt, self._conditioning.negative
            common = Given(
                count=self._images,
                text=prompt,
                guidance_scale=self._guidance_input,
                adapters=self._adapters,
            )
            given = {
                Role.PROMPTED: replace(common, steering=self._steering, hints=structure.prompted)
            }
            if negative is not None:
                plain = replace(common, text=negative)
                given[Role.UNPROMPTED] = replace(plain, hints=structure.unprompted)
                if structure.emphasis_hw is not None:
                    given[Role.BARE] = replace(plain, hints=structure.bare)
                    self._emphasis_hw = structure.emphasis_hw.to(self._x_NChw.device)
            # A new one, for a step that fails brings the old one back.
            self._given = {structure: given}
        return self._given[structure]

    def _undo(self) -> Callable[[], None]:
        """What brings all that a step changes back to how it is now: the latents, the states of sampler and noise."""
        run, scheduler = dict(vars(self)), _copied(vars(self._scheduler))
        generators = self._step_options.get("generator", [])
        drawn = [generator.get_state() for generator in generators]

        def undo() -> None:
            self.__dict__ = run
            self._scheduler.__dict__ = scheduler
            for generator, state in zip(generators, drawn, strict=True):
                generator.set_state(state)

        return undo

    def _advance(self, predictions: Mapping[Role, torch.Tensor]) -> None:
        """One step from the U-Net's predictions: guidance, the scheduler's step, the hold."""
        prediction_NChw = prompted = predictions[Role.PROMPTED]
        if Role.UNPROMPTED in predictions:
            # Classifier-free guidance (Ho and Salimans 2022); with emphasis see `services.generator.structure`.
            start = away_from = predictions[Role.UNPROMPTED]
            if self._emphasis_hw is not None and Role.BARE in predictions:
                start = predictions[Role.BARE]
                away_from = away_from.lerp(start, self._emphasis_hw)
            prediction_NChw = start + self._conditioning.guidance_scale * (prompted - away_from)
        if isinstance(self._scheduler, HoldingUniPC):
            self._scheduler.held_hw = self._hold.held_hw(self._step)
        x_NChw = self._scheduler.step(
            prediction_NChw, self._timestep, self._x_NChw, **self._step_options, return_dict=False
        )[0]
        # What a preview is made of, should one be asked for.
        self._last = (self._step, self._x_NChw, prediction_NChw)
        self._x_NChw = self._hold.apply(x_NChw, self._step + 1)
        self.steps_done += 1

    @torch.inference_mode()
    def clean_NChw(self, at: tuple[int, torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """The latents that the last step, or one looked at, expects in the end; z0 in cells not yet free."""
        step, x_NChw, prediction_NChw = at or self._last
        # The sampler's own scaling taken out: scale² + sigma² = 1.
        scale, sigma = self._levels.scales[step], self._levels.sigmas[step]
        norm = (scale**2 + sigma**2) ** 0.5
        scale, sigma, x_NChw = scale / norm, sigma / norm, x_NChw / norm
        if self._prediction_type == "epsilon":
            clean_NChw = (x_NChw - sigma * prediction_NChw) / scale
        else:
            clean_NChw = scale * x_NChw - sigma * prediction_NChw
        return torch.where(self._hold.released_hw > step, self._hold.z0_1Chw, clean_NChw)

    def look(self) -> Callable[[], list[NDArray[np.uint8]]]:
        """What makes a `preview` as the last step has it, on any thread, whatever is stepped meanwhile."""
        return functools.partial(self.preview, self._last)

    @torch.inference_mode()
    def preview(
        self, at: tuple[int, torch.Tensor, torch.Tensor] | None = None
    ) -> list[NDArray[np.uint8]]:
        """What the pictures are going to be, as the last step has it: uint8 sRGB [h, w, 3] each, a pixel a cell.

        Nothing is decoded: colours come from the linear map that takes the composite's latent closest to the
        composite. Needs one step done.
        """
        if self._latent_to_rgb is None:
            self._latent_to_rgb = self._fitted_colours()
        rgb_Nhw3 = _with_constant(self.clean_NChw(at)) @ self._latent_to_rgb
        return list((rgb_Nhw3.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())

    def _fitted_colours(self) -> torch.Tensor:
        """Least squares from the composite's latent cells to their mean colours in [0, 1], [C + 1, 3]."""
        factor = self._plate.latent_factor
        height, width = self._plate.strength_hw.shape
        rgb_hw3 = (
            self._plate.composite_HWC.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
            / 255
        )
        latent = _with_constant(self._hold.z0_1Chw).flatten(0, 2).double().cpu()
        gram = latent.T @ latent
        gram += _PREVIEW_RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
        weights = torch.linalg.solve(gram, latent.T @ torch.from_numpy(rgb_hw3.reshape(-1, 3)))
        on_device: torch.Tensor = weights.float().to(self._x_NChw.device)
        return on_device

    @torch.inference_mode()
    def finish(self, stages: Stages) -> Iterator[NDArray[np.uint8]]:
        """The pictures, uint8 sRGB [H, W, 3] each; so many are decoded at a time as `DECODED_PIXELS` allow.

        Where the plate's release is 0 they hold the composite's own bytes, at 255 the decoded ones, a blend between.

        Raises:
            Internal: the networks gave values that are not finite, reason NOT_FINITE.
        """
        assert self.is_done, f"{self.steps_total - self.steps_done} steps are left"
        kept_HWC, release_HW = self._plate.composite_HWC, self._plate.release_HW
        if self.steps_total == 0:
            yield from (kept_HWC.copy() for _ in range(self._images))
            return
        if not bool(self._x_NChw.isfinite().all()):
            part = "U-Net" if bool(self._hold.z0_1Chw.isfinite().all()) else "autoencoder"
            raise Internal(
                f"the model's {part} gave values that are not finite: its weights are damaged, or overflow in its "
                "dtype, which the operator can widen",
                reason="NOT_FINITE",
            )
        for x_NChw in torch.split(
            self._x_NChw, decoded_together(self._images, pixels=release_HW.size)
        ):
            for drawn_HWC in stages.decode_image(x_NChw).numpy():
                yield paste(kept_HWC, drawn_HWC, release_HW)


@torch.inference_mode()
def step(stages: Stages, runs: Sequence[Run]) -> int:
    """Takes runs of one model and one latent shape, none of them done, one step further with one U-Net call.

    Rows may differ in timestep, guidance and control. Controlled rows come last, as the seam wants it; a run alone is
    laid out as diffusers does it, rows without the prompt before rows with. Answers how many there were. Where it
    raises, every run is as it was.
    """
    undos = [run._undo() for run in runs]
    try:
        return _step(stages, runs)
    except BaseException:
        for undo in undos:
            undo()
        raise


def _step(stages: Stages, runs: Sequence[Run]) -> int:
    parts = [(run, role, rows) for run in runs for role, rows in run.rows().items()]
    parts.sort(key=lambda part: (part[1], part[2].given.steering is not None))
    prediction_BChw = stages.predict([rows for _, _, rows in parts])
    predictions: dict[Run, dict[Role, torch.Tensor]] = {run: {} for run in runs}
    split = torch.split(prediction_BChw, [rows.given.count for _, _, rows in parts])
    for (run, role, _), prediction_NChw in zip(parts, split, strict=True):
        predictions[run][role] = prediction_NChw
    for run in runs:
        run._advance(predictions[run])
    return len(prediction_BChw)


def decoded_together(pictures: int, *, pixels: int) -> int:
    """How many of so many pictures, of so many pixels each, are decoded in one call."""
    return min(pictures, max(1, DECODED_PIXELS // pixels))


def paste(
    kept_HWC: NDArray[np.uint8], drawn_HWC: NDArray[np.uint8], release_HW: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """(255 - release) parts of `kept` and release parts of `drawn` in 255, rounded; exact at both ends."""
    share_HW1 = release_HW.astype(np.uint32)[..., None]
    blend_HWC = (kept_HWC * (255 - share_HW1) + drawn_HWC * share_HW1 + 127) // 255
    return blend_HWC.astype(np.uint8)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's attributes; of lists too, which multistep samplers shift in place. Tensors are never changed."""
    return {
        name: list(value) if isinstance(value, list) else value for name, value in state.items()
    }


def _with_constant(z_NChw: torch.Tensor) -> torch.Tensor:
    """Latent cells and a one beside each, [N, h, w, C + 1], for a linear map with an offset."""
    return F.pad(z_NChw.permute(0, 2, 3, 1), (0, 1), value=1.0)
