"""What crosses the seam between generator and networks: tensors and plain numbers, nothing else.

Main types: `Rows`, a job's rows in one U-Net call, and `Given`, all of them that stays the same from step to step, so
that whoever computes makes of it once what it needs, and a server far away is sent it once.

What was encoded lies on the stages' device, as latents do; what is made of a plate lies on the CPU. All is float32.
Suffixes: N pictures of a job, T text positions, C latent channels, L layers, h, w latent cells, H, W pixels,
3 = R, G, B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 its usual name

from services.common.collage import Adapter
from services.diffusion.text import TextStates

# Layers of a `Steering` are a multiple of it, so that jobs of nearly as many layers have tensors of the same shapes.
LAYERS_MULTIPLE = 8


class NotWanted(Exception):
    """A call that was given up because its answer is not wanted any more; whose it was knows why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Steering:
    """How a job's layers steer cross-attention, see `services.generator.attention`; the last ones may do nothing.

    visible_Lhw: masks in [0, 1]. speaks_LT: 1 where a text position speaks of a layer, else 0. dials: by name, L each,
    in [0, 1].
    """

    visible_Lhw: torch.Tensor
    speaks_LT: torch.Tensor
    dials: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        positions: Sequence[Sequence[int]],
        dials: Sequence[Mapping[str, float]],
        visible_Lhw: torch.Tensor,
        *,
        window: int,
    ) -> "Steering | None":
        """Of layers with these text positions and dials; None where nothing is asked.

        Args:
            positions: of each layer in a text of `window` positions; a position that layers share hears all of them.
            dials: of each layer, the same names for all.
            visible_Lhw: each layer's mask, in [0, 1].
            window: T.
        """
        speaks_LT = torch.zeros(len(positions), window)
        for layer, own in enumerate(positions):
            if any(dials[layer].values()):
                speaks_LT[layer, list(own)] = 1
        if not bool(speaks_LT.any()):
            return None
        steering = cls(
            visible_Lhw=visible_Lhw,
            speaks_LT=speaks_LT,
            dials={
                name: torch.tensor([each[name] for each in dials], dtype=torch.float32)
                for name in dials[0]
            },
        )
        return steering.padded(-(-len(positions) // LAYERS_MULTIPLE) * LAYERS_MULTIPLE)

    def padded(self, layers: int) -> "Steering":
        """The same with so many layers; those that come to it do nothing."""
        more = layers - len(self.speaks_LT)
        return Steering(
            visible_Lhw=F.pad(self.visible_Lhw, (0, 0, 0, 0, 0, more)),
            speaks_LT=F.pad(self.speaks_LT, (0, 0, 0, more)),
            dials={name: F.pad(dial_L, (0, more)) for name, dial_L in self.dials.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ControlPicture:
    """What one kind of ControlNet reads of a job: rgb_3HW in [0, 1]."""

    kind: str
    rgb_3HW: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hint:
    """A ControlNet that acts in some rows, and what multiplies what it says, cell by cell."""

    picture: ControlPicture
    scale_hw: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Given:
    """What does not change from step to step of a job's rows; it is the same for all of them.

    count: how many rows. text: one row. hints: of each kind at most one; another set of them is another `Given`.
    guidance_scale: for a U-Net that takes it as an input, else None. adapters: the ones that are on, with their
    weights; all rows of a call have the same.
    """

    count: int
    text: TextStates
    steering: Steering | None = None
    hints: tuple[Hint, ...] = ()
    guidance_scale: float | None = None
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """A job's rows in one U-Net call.

    x_NChw: the scaled model inputs, `given.count` of them. timestep: the schedule's. gain: g at the step's sigma, see
    `services.generator.attention`; without a meaning where nothing steers.
    """

    given: Given
    x_NChw: torch.Tensor
    timestep: float
    gain: float = 0.0
