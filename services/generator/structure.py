"""Structure control: ControlNets that act inside the visible masks of the layers that ask for them.

Main types: `StructureControl`, what one job's layers ask for, built once; `StructurePass`, one ControlNet's part in one
U-Net call. ControlNet (Zhang et al. 2023) adds residuals to the U-Net's skip connections and middle; here every
residual is first multiplied, at its own resolution, by the scale map

    W = sum over the layers that use this kind and are active at this step of scale_i * v_i

(Sarukkai et al. 2023). One ControlNet is run once a call for all layers, jobs and pictures that use it; several add up.
Suffixes: B rows of a call, R the rows of one pass, L layers, h, w latent cells, H, W pixels, 3 = R, G, B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from numpy.typing import NDArray

from services.common.collage import Structure


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StructureControl:
    """What a job's layers ask of ControlNets.

    pictures: by kind the control picture 3HW, float32 in [0, 1]. asked: by kind the layers that use it, and how.
    visible_Lhw: float32 in [0, 1].
    """

    pictures: Mapping[str, torch.Tensor]
    asked: Mapping[str, Sequence[tuple[int, Structure]]]
    visible_Lhw: torch.Tensor
    _maps: dict[tuple[str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

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
            if any(part.acts_within(steps) for _, part in self.asked[kind])
        )

    def maps(self, step: int, steps: int) -> dict[str, torch.Tensor]:
        """The scale map hw of every kind that acts in step `step` of the job's `steps`."""
        found = {}
        for kind in self.pictures:
            active = [(i, part) for i, part in self.asked[kind] if part.is_active(step, steps)]
            if not active:
                continue
            key = kind, tuple(index for index, _ in active)
            if key not in self._maps:
                weights = self.visible_Lhw.new_tensor([part.scale for _, part in active])
                v_Lhw = self.visible_Lhw[list(key[1])]
                self._maps[key] = (weights[:, None, None] * v_Lhw).sum(dim=0)
            found[kind] = self._maps[key]
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


def passes(
    groups: Sequence[tuple[StructureControl | None, int, int, int]],
) -> tuple[StructurePass, ...]:
    """The ControlNets of one U-Net call, each once.

    Args:
        groups: in the order of the call's rows, for each job's part of them its control, how many rows, and which
            step of how many is taken.
    """
    found: dict[str, list[tuple[range, torch.Tensor, torch.Tensor]]] = {}
    first = 0
    for control, rows, step, steps in groups:
        for kind, scale_hw in (control.maps(step, steps) if control else {}).items():
            assert control is not None, "no control, no maps"
            part = range(first, first + rows), control.pictures[kind], scale_hw
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
