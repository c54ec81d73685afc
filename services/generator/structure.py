"""Structure control: ControlNets that act inside the visible masks of the layers that ask for them.

Main types: `StructureControl`, what one job's layers ask for, built once; `StructurePass`, one ControlNet's part in one
U-Net call. ControlNet (Zhang et al. 2023) adds residuals to the U-Net's skip connections and middle; here every
residual is first multiplied, at its own resolution, by the scale map

    W = sum over the layers that use this kind and are active at this step of scale_i * v_i

(Sarukkai et al. 2023). One ControlNet is run once a call for all layers, jobs and pictures that use it; several add up.

Guidance (Ho and Salimans 2022) starts at the prediction u without the prompt and goes away from it, towards the one
with it, p. Structure acts in both, so guidance does not touch what it says. A layer's emphasis asks for a third, bare
prediction b, without the prompt and with 1 - emphasis of the layer's scale; with e = 1 inside the layer's mask, 0
outside, s the guidance scale:

    b + s (p - (e b + (1 - e) u))

Inside, all that structure says is multiplied; outside, what a neighbour feels of it is in p and u alike and drops out.
Suffixes: B rows of a call, R the rows of one pass, L layers, h, w latent cells, H, W pixels, 3 = R, G, B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from numpy.typing import NDArray

from services.common.collage import Structure

# What acts in some rows of a step: by kind its control picture 3HW and its scale map hw.
Acting = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


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
    """What acts in one step: in predictions with the prompt, without it, and in bare ones.

    emphasis_hw: e, by the share of each cell; None where it is nowhere, or everywhere: then `unprompted` is the bare
    one.
    """

    prompted: Acting = field(default_factory=dict)
    unprompted: Acting = field(default_factory=dict)
    bare: Acting = field(default_factory=dict)
    emphasis_hw: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructureControl:
    """What a job's layers ask of ControlNets.

    pictures: by kind the control picture 3HW, float32 in [0, 1]. asked: by kind the layers that use it, and how.
    visible_Lhw: float32 in [0, 1].
    """

    pictures: Mapping[str, torch.Tensor]
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
            visible_Lhw: float32 in [0, 1], on the device to compute on.
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
            kind: torch.from_numpy(control[kind])
            .to(visible_Lhw.device)
            .permute(2, 0, 1)
            .contiguous()
            / 255
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
        """What acts in step `step` of the job's `steps`."""
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

    def _acting(self, weights: Sequence[tuple[int, str, float]]) -> Acting:
        """What acts where layers have these weights for kinds: of each kind the sum of weight times mask."""
        found = {}
        for kind in self.pictures:
            used = [(index, weight) for index, of, weight in weights if of == kind and weight > 0]
            if used:
                indices, scales = zip(*used, strict=True)
                scale_L11 = self.visible_Lhw.new_tensor(scales)[:, None, None]
                scale_hw = (scale_L11 * self.visible_Lhw[list(indices)]).sum(dim=0)
                found[kind] = self.pictures[kind], scale_hw
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructurePass:
    """One ControlNet's part in one U-Net call.

    rows: which rows of the call it acts in, ascending. picture_R3HW: their control pictures, in [0, 1]. scale_R1hw:
    their scale maps, float32.
    """

    kind: str
    rows: tuple[int, ...]
    picture_R3HW: torch.Tensor
    scale_R1hw: torch.Tensor

    def weighted(self, residual_RChw: torch.Tensor) -> torch.Tensor:
        """A residual, at any level's resolution, times the mean of the scale map over each of its cells.

        A mean and no interpolation: where a cell lies wholly in layers of scale 0 its factor is exactly 0, wholly in
        one visible layer exactly that layer's scale; a cell on a border has the scales by their shares. In double
        precision, because a sum of equal 32-bit values need not be their multiple.
        """
        height, width = residual_RChw.shape[2:]
        scale_R1hw = F.adaptive_avg_pool2d(self.scale_R1hw.double(), (height, width))
        return residual_RChw * scale_R1hw.to(residual_RChw.dtype)


def passes(groups: Sequence[tuple[int, Acting]]) -> tuple[StructurePass, ...]:
    """The ControlNets of one U-Net call, each once, from the groups of its rows: how many, and what acts there."""
    found: dict[str, list[tuple[range, torch.Tensor, torch.Tensor]]] = {}
    first = 0
    for rows, acting in groups:
        for kind, (picture_3HW, scale_hw) in acting.items():
            part = range(first, first + rows), picture_3HW, scale_hw
            found.setdefault(kind, []).append(part)
        first += rows
    return tuple(
        StructurePass(
            kind=kind,
            rows=tuple(row for rows, _, _ in parts for row in rows),
            picture_R3HW=torch.cat(
                [picture_3HW.expand(len(rows), -1, -1, -1) for rows, picture_3HW, _ in parts]
            ),
            scale_R1hw=torch.cat(
                [scale_hw.expand(len(rows), 1, -1, -1) for rows, _, scale_hw in parts]
            ),
        )
        for kind, parts in sorted(found.items())
    )
