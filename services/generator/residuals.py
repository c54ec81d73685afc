"""What ControlNets say of a U-Net call's rows, at the network's side of the seam.

Main types: `ControlNets`, a model's, each loaded with its first use, and `Pass`, one ControlNet's part in calls of the
same rows. The method is in `services.generator.structure`. It knows no job and no step.
Suffixes: B rows of a call, R the rows of one pass, h, w cells of one level, H, W pixels, 3 = R, G, B.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from diffusers import ControlNetModel

from services.diffusion.text import TextStates
from services.generator.call import ControlPicture, Hint
from services.generator.controlnet import load_controlnet

Residuals = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """One ControlNet in a call.

    rows: the rows it acts in, of `count` in all; a slice where they lie side by side. embedded_Rchw: their control
    pictures as it reads them. scale_R1hw: their scale maps, in double precision. text, beside_time: theirs.
    """

    kind: str
    rows: slice | torch.Tensor
    count: int
    embedded_Rchw: torch.Tensor
    scale_R1hw: torch.Tensor
    text: TextStates
    beside_time: Mapping[str, torch.Tensor]
    _scales: dict[torch.Size, torch.Tensor] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether it acts in every row."""
        return len(self.scale_R1hw) == self.count

    def weighted(self, residual_RChw: torch.Tensor) -> torch.Tensor:
        """A residual, at any level's resolution, times the mean of the scale map over each of its cells.

        A mean and no interpolation: where a cell lies wholly in layers of scale 0 its factor is exactly 0, wholly in
        one visible layer exactly that layer's scale; a cell on a border has the scales by their shares. In double
        precision, because a sum of equal 32-bit values need not be their multiple.
        """
        height, width = grid = residual_RChw.shape[2:]
        if grid not in self._scales:
            scale_R1hw = F.adaptive_avg_pool2d(self.scale_R1hw, (height, width))
            self._scales[grid] = scale_R1hw.to(residual_RChw.dtype)
        return residual_RChw * self._scales[grid]

    def spread(self, residual_RChw: torch.Tensor) -> torch.Tensor:
        """A residual of the pass' rows as one of all rows, 0 in the others."""
        if self.is_whole:
            return residual_RChw
        residual_BChw = residual_RChw.new_zeros(self.count, *residual_RChw.shape[1:])
        residual_BChw[self.rows] = residual_RChw
        return residual_BChw


class ControlNets:
    """A model's ControlNets by kind, each loaded with its first use. One thread at a time."""

    def __init__(
        self, folders: Mapping[str, Path], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._folders, self._dtype, self._device = folders, dtype, device
        self._networks: dict[str, ControlNetModel] = {}
        self._embeddings: dict[str, torch.nn.Module] = {}
        self._embedded: WeakKeyDictionary[ControlPicture, dict[int, torch.Tensor]] = (
            WeakKeyDictionary()
        )

    def network(self, kind: str) -> ControlNetModel:
        """The ControlNet of this kind; it takes control pictures embedded, see `_embed`."""
        if kind not in self._networks:
            network = load_controlnet(self._folders[kind], dtype=self._dtype, device=self._device)
            self._embeddings[kind] = network.controlnet_cond_embedding
            network.controlnet_cond_embedding = torch.nn.Identity()
            self._networks[kind] = network
        return self._networks[kind]

    def passes(
        self,
        groups: Sequence[tuple[int, Sequence[Hint]]],
        text: TextStates,
        beside_time: Mapping[str, torch.Tensor],
    ) -> tuple[Pass, ...]:
        """The ControlNets of a call, each once, from the groups of its rows: how many, and what acts there."""
        found: dict[str, list[tuple[range, Hint]]] = {}
        count = 0
        for rows, hints in groups:
            for hint in hints:
                found.setdefault(hint.picture.kind, []).append((range(count, count + rows), hint))
            count += rows
        return tuple(
            self._pass(kind, parts, count, text, beside_time)
            for kind, parts in sorted(found.items())
        )

    def _pass(
        self,
        kind: str,
        parts: Sequence[tuple[range, Hint]],
        count: int,
        text: TextStates,
        beside_time: Mapping[str, torch.Tensor],
    ) -> Pass:
        indices = [row for rows, _ in parts for row in rows]
        rows: slice | torch.Tensor = slice(indices[0], indices[-1] + 1)
        if len(indices) != indices[-1] + 1 - indices[0]:
            rows = torch.tensor(indices, device=self._device)
        counts: Counter[ControlPicture] = Counter()
        for own, hint in parts:
            counts[hint.picture] += len(own)
        pictures = [
            self._embed(hint.picture, counts[hint.picture]).expand(len(own), -1, -1, -1)
            for own, hint in parts
        ]
        scales = [hint.scale_hw.expand(len(rows), 1, -1, -1) for rows, hint in parts]
        return Pass(
            kind=kind,
            rows=rows,
            count=count,
            embedded_Rchw=torch.cat(pictures),
            scale_R1hw=torch.cat(scales).to(self._device).double(),
            text=text.rows(rows),
            beside_time={name: value[rows] for name, value in beside_time.items()},
        )

    def _embed(self, picture: ControlPicture, rows: int) -> torch.Tensor:
        """A control picture as the ControlNet adds it to what it sees in so many rows, [1, c, h, w]; made once."""
        made = self._embedded.setdefault(picture, {})
        if rows not in made:
            network = self.network(picture.kind)
            # In as many rows as a stock pipeline would: one alone is convolved otherwise, in its last bits.
            rgb_R3HW = picture.rgb_3HW.to(self._device, self._dtype).expand(rows, -1, -1, -1)
            is_bgr = network.config.controlnet_conditioning_channel_order == "bgr"
            if is_bgr:
                rgb_R3HW = rgb_R3HW.flip(1)
            embedded_1chw = self._embeddings[picture.kind](rgb_R3HW)[:1].clone()
            # The network will turn the channels of whatever it is given.
            made[rows] = embedded_1chw.flip(1) if is_bgr else embedded_1chw
        return made[rows]

    def residuals(
        self, passes: Sequence[Pass], x_BChw: torch.Tensor, timestep_B: torch.Tensor
    ) -> Residuals:
        """What they add to the skip connections and, last, to the middle; 0 in rows without one, empty without any."""
        total: Residuals = ()
        for part in passes:
            down, middle = self.network(part.kind)(
                x_BChw if part.is_whole else x_BChw[part.rows],
                timestep_B if part.is_whole else timestep_B[part.rows],
                encoder_hidden_states=part.text.hidden_BTD,
                added_cond_kwargs=part.beside_time,
                controlnet_cond=part.embedded_Rchw,
                return_dict=False,
            )
            residuals = tuple(part.spread(part.weighted(each)) for each in (*down, middle))
            total = tuple(map(torch.add, total, residuals)) if total else residuals
        return total
