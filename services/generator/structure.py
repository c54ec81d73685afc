"""Structure control: ControlNets that act inside the visible masks of the layers that ask for them.

Main type: `StructureControl`, what one job's layers ask for, and by step what of it acts; `residuals` has the network's
side. ControlNet (Zhang et al. 2023) adds residuals to the U-Net's skip connections and middle; here every
residual is first multiplied, at its own resolution, by the scale map

    W = sum over the layers that use this kind and are active at this step of scale_i * v_i

(Sarukkai et al. 2023). One ControlNet is run once a call for all layers, jobs and pictures that use it; several add up.

Guidance (Ho and Salimans 2022) starts at the prediction u without the prompt and goes away from it, towards the one
with it, p. Structure acts in both, so guidance does not touch what it says. A layer's emphasis asks for a third, bare
prediction b, without the prompt and with 1 - emphasis of the layer's scale; with e = 1 inside the layer's mask, 0
outside, s the guidance scale:

    b + s (p - (e b + (1 - e) u))

Inside, all that structure says is multiplied; outside, what a neighbour feels of it is in p and u alike and drops out.
Suffixes: L layers, h, w latent cells, H, W pixels, 3 = R, G, B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from services.common.collage import Structure
from services.generator.call import ControlPicture, Hint


def is_active(part: Structure, step: int, steps: int) -> bool:
    """Whether it acts in step `step` of `steps`, as diffusers' control_guidance_start and _end have it."""
    return step / steps >= part.start and (step + 1) / steps <= part.end


def acts_within(part: Structure, steps: int) -> bool:
    """Whether it acts in any of so many steps."""
    # The first step not before the start is the likeliest one; the product may be off by a last bit.
    first = int(part.start * steps)
    near = range(max(0, first - 1), min(steps, first + 2))
    return any(is_active(part, step, steps) for step in near)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructureStep:
    """What acts in a step: in predictions with the prompt, without it, and in bare ones; of each kind one.

    emphasis_hw: e, by the share of each cell; None where it is nowhere, or everywhere: then `unprompted` is the bare
    one.
    """

    prompted: tuple[Hint, ...] = ()
    unprompted: tuple[Hint, ...] = ()
    bare: tuple[Hint, ...] = ()
    emphasis_hw: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructureControl:
    """What a job's layers ask of ControlNets.

    pictures: by kind. asked: by kind the layers that use it, and how. visible_Lhw: float32 in [0, 1], on the CPU.
    """

    pictures: Mapping[str, ControlPicture]
    asked: Mapping[str, Sequence[tuple[int, Structure]]]
    visible_Lhw: torch.Tensor
    _steps: dict[tuple[tuple[str, int], ...], "StructureStep"] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        layers: Sequence[Sequence[Structure]],
        control: Mapping[str, NDArray[np.uint8]],
        visible_Lhw: torch.Tensor,
    ) -> "StructureControl | None":
        """The control of layers with these structures; None where nothing that is seen asks for any.

        Args:
            layers: of each layer, in the order of `visible_Lhw`, what it asks for.
            control: by kind the control picture, HWC; one for every kind that is asked for.
            visible_Lhw: float32 in [0, 1], on the CPU.
        """
        is_seen = visible_Lhw.flatten(1).any(dim=1).tolist()
        asked: dict[str, list[tuple[int, Structure]]] = {}
        for index, structures in enumerate(layers):
            for structure in structures:
                if is_seen[index] and structure.scale > 0:
                    asked.setdefault(structure.kind, []).append((index, structure))
        if not asked:
            return None
        pictures = {
            kind: ControlPicture(
                kind=kind,
                rgb_3HW=torch.from_numpy(control[kind]).permute(2, 0, 1).contiguous() / 255,
            )
            for kind in sorted(asked)
        }
        return cls(pictures=pictures, asked=asked, visible_Lhw=visible_Lhw)

    def kinds(self, steps: int) -> tuple[str, ...]:
        """The kinds that act in any of the job's `steps`."""
        return tuple(
            kind
            for kind in self.pictures
            if any(acts_within(part, steps) for _, part in self.asked[kind])
        )

    def at(self, step: int, steps: int) -> StructureStep:
        """What acts in step `step` of the job's `steps`; the same object as long as the same layers do."""
        active = [
            (index, part)
            for kind in self.pictures
            for index, part in self.asked[kind]
            if is_active(part, step, steps)
        ]
        key = tuple((part.kind, index) for index, part in active)
        if key not in self._steps:
            self._steps[key] = self._made(active)
        return self._steps[key]

    def _made(self, active: Sequence[tuple[int, Structure]]) -> StructureStep:
        prompted = self._acting([(index, part.kind, part.scale) for index, part in active])
        emphasised = sorted({index for index, part in active if part.emphasis > 0})
        if not emphasised:
            return StructureStep(prompted=prompted, unprompted=prompted)
        bare = self._acting(
            [(index, part.kind, part.scale * (1 - part.emphasis)) for index, part in active]
        )
        emphasis_hw = self.visible_Lhw[emphasised].sum(dim=0).clamp_max(1)
        if bool((emphasis_hw == 1).all()):
            return StructureStep(prompted=prompted, unprompted=bare)
        return StructureStep(
            prompted=prompted, unprompted=prompted, bare=bare, emphasis_hw=emphasis_hw
        )

    def _acting(self, weights: Sequence[tuple[int, str, float]]) -> tuple[Hint, ...]:
        """What acts where layers have these weights for kinds: of each kind the sum of weight times mask."""
        found = []
        for kind, picture in self.pictures.items():
            used = [(index, weight) for index, of, weight in weights if of == kind and weight > 0]
            if used:
                indices, scales = zip(*used, strict=True)
                scale_L11 = self.visible_Lhw.new_tensor(scales)[:, None, None]
                scale_hw = (scale_L11 * self.visible_Lhw[list(indices)]).sum(dim=0)
                found.append(Hint(picture=picture, scale_hw=scale_hw))
        return tuple(found)
