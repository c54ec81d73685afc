"""Noise: where a picture starts, how noisy each state of the schedule is, and the hold of the noise map.

Main types: `Levels`, the exact noise level of every state of a sampler, and `Hold`, which keeps each latent cell at
its own noised latent until the schedule has fallen to the cell's strength (masked SDEdit, Meng et al. 2021; a
strength per cell: Collage Diffusion, Sarukkai et al. 2023, and Differential Diffusion, Levin and Fried 2023).

A sampler of N steps has N + 1 states: state k goes into step k, state N is the latent to decode.
Suffixes: N pictures of a job, C latent channels, h, w latent cells, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray

# Share of a cell that a layer must fill for its own seed to rule there. Noise is taken whole from one seed or the
# other: a mixture of two would have less variance than the sampler expects.
_OWN_SEED_COVERAGE = 0.5
# Least alpha-bar, as diffusers' Euler has it for schedules that end in pure noise: keeps sigma finite.
MIN_ALPHA_BAR = 2.0**-24


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Levels:
    """State k of the sampler is scales[k] * z0 + sigmas[k] * noise, in the sampler's own scaling; single precision.

    `true_sigmas[k]` is sqrt((1 - abar) / abar) at the timestep of step k, whatever the sampler's scaling.
    """

    scales: tuple[float, ...]
    sigmas: tuple[float, ...]
    true_sigmas: tuple[float, ...]

    @classmethod
    def of(cls, scheduler: Any) -> "Levels":
        """The levels of a diffusers scheduler whose timesteps are set."""
        if isinstance(scheduler, DDIMScheduler | LCMScheduler):
            last = scheduler.final_alpha_cumprod
            alpha_bar = torch.stack([*scheduler.alphas_cumprod[scheduler.timesteps.cpu()], last])
            scales, sigmas = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        elif isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler):
            # Variance exploding: the picture keeps its scale.
            scales, sigmas = torch.ones_like(scheduler.sigmas), scheduler.sigmas
        else:
            scales = 1 / ((scheduler.sigmas**2 + 1) ** 0.5)
            sigmas = scheduler.sigmas * scales
        alpha_bar = scheduler.alphas_cumprod.double().clamp(min=MIN_ALPHA_BAR).numpy()
        true_sigmas = np.interp(
            scheduler.timesteps.double().cpu().numpy(),
            np.arange(len(alpha_bar)),
            ((1 - alpha_bar) / alpha_bar) ** 0.5,
        )
        return cls(
            scales=tuple(scales.tolist()),
            sigmas=tuple(sigmas.tolist()),
            true_sigmas=tuple(true_sigmas.tolist()),
        )

    def noised(self, z0: torch.Tensor, noise: torch.Tensor, state: int) -> torch.Tensor:
        """z0 as it is in state `state`."""
        scale = self.scales[state]
        return (z0 if scale == 1 else scale * z0) + self.sigmas[state] * noise


def released_at(strength_hw: NDArray[np.float64], steps: int) -> NDArray[np.int64]:
    """The step from which each cell is free: steps - int(steps * strength), as diffusers' img2img has it.

    `steps` means never: the cell ends as it was.
    """
    # float64 on purpose: float32 would turn 0.7 * 10 into 6.
    return steps - np.floor(steps * strength_hw.astype(np.float64)).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hold:
    """Keeps cells at the composite's latent, noised to the exact level of the state, until they are released.

    z0_1Chw: the composite's latent. noise_NChw: one fixed noise a picture. released_hw: int64, see `released_at`.
    releases: the values in it, ascending, for nobody to ask a device for them.
    """

    z0_1Chw: torch.Tensor
    noise_NChw: torch.Tensor
    released_hw: torch.Tensor
    releases: tuple[int, ...]
    levels: Levels
    _held: dict[int, torch.Tensor] = field(default_factory=dict)

    def start(self, state: int) -> torch.Tensor:
        """All cells, noised to the level of `state`."""
        return self.levels.noised(self.z0_1Chw, self.noise_NChw, state)

    def held_hw(self, state: int) -> torch.Tensor | None:
        """Which cells are held in `state`; None where no cell is.

        A cell is held up to and including the state that goes into its first free step.
        """
        # The next ones to be let go: until then the map is the same.
        following = next((release for release in self.releases if release >= state), None)
        if following is None:
            return None
        if following not in self._held:
            self._held.clear()
            self._held[following] = self.released_hw >= following
        return self._held[following]

    def apply(self, x_NChw: torch.Tensor, state: int) -> torch.Tensor:
        """The state with held cells put back: x where free, noised z0 where held, z0 itself at the very end."""
        held_hw = self.held_hw(state)
        if held_hw is None:
            return x_NChw
        is_end = state == len(self.levels.scales) - 1
        kept_NChw = self.z0_1Chw if is_end else self.start(state)
        return torch.where(held_hw, kept_NChw, x_NChw)


class HoldingUniPC(UniPCMultistepScheduler):  # type: ignore[misc] # diffusers has no types
    """UniPC (Zhao et al. 2023) whose corrector leaves held cells alone.

    The corrector recomputes the current state from the one before, which would undo the hold: a cell that is held in
    this state is exact already. Set `held_hw` before each step; None changes nothing.
    """

    held_hw: torch.Tensor | None = None

    def multistep_uni_c_bh_update(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The corrected state, held cells as they were."""
        corrected: torch.Tensor = super().multistep_uni_c_bh_update(*args, **kwargs)
        if self.held_hw is None:
            return corrected
        return torch.where(self.held_hw, kwargs["this_sample"], corrected)


def starting_noise(
    generators: Sequence[torch.Generator],
    visible_Lhw: NDArray[np.float32],
    layer_seeds: Sequence[int | None],
    *,
    channels: int,
) -> torch.Tensor:
    """Noise [N, C, h, w], float32 on the CPU: one draw from each picture's generator.

    Where a layer with a seed of its own is what one sees, that seed's noise stands instead, the same in every
    picture.
    """
    shape = (1, channels, *visible_Lhw.shape[1:])
    noise_NChw = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    for visible_hw, seed in zip(visible_Lhw, layer_seeds, strict=True):
        if seed is not None:
            own_1Chw = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
            is_own_hw = torch.from_numpy(visible_hw > _OWN_SEED_COVERAGE)
            noise_NChw = torch.where(is_own_hw, own_1Chw, noise_NChw)
    return noise_NChw
