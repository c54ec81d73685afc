"""Attention control: a layer's words gain inside the layer's visible mask and lose outside it.

Main types, at the network's side of the seam: `Control`, made of what the jobs of a call ask for, once for all their
steps, and `ControlledAttention`, the processor that heeds it. Collage Diffusion (Sarukkai et al. 2023): to the scaled
scores S of every cross-attention, for every token j of a layer with visible mask v, conditional rows only, is added

    + attract * v * g(sigma) * M_j - repel * (1 - v) * g(sigma) * M_j,      g(sigma) = log(log(sigma + 1.01) + 1)

with M_j = max(0, max of S over heads and positions). Departures from the released code: sigma is the true one of the
step, M_j is never negative (a negative one would swap attract and repel), tokens are found by characters.
Suffixes: B rows of a call, R its controlled rows, which come last; J jobs, H heads, Q queries (cells at one
resolution), T text positions, U positions that belong to a layer of any job, d head width, D dials, L layers,
h, w latent cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from services.generator.call import Steering

# A layer's dials that steer attention, in the order that `Control` takes them; the others act through the plate.
STEERING = ("attract", "repel")


def gain(sigma: float) -> float:
    """g(sigma): how strongly attention is controlled at noise level sigma >= 0; 0.01 at 0, 1.3 at 14."""
    return math.log(math.log(sigma + 1.01) + 1)


def grid_of(queries: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the U-Net level with so many cells; each level halves the one before, rounding up."""
    while height * width > queries:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == queries, f"no level of this grid has {queries} cells"
    return height, width


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Words:
    """Texts as one cross-attention reads them, and the scaled keys at positions that belong to layers."""

    key_BHTd: torch.Tensor
    value_BHTd: torch.Tensor
    looked_at_RHdU: torch.Tensor


class Control:
    """Control of the last rows of U-Net calls, the same rows with the same texts each time."""

    def __init__(
        self,
        steerings: Sequence[tuple[Steering, int]],
        *,
        device: torch.device,
        tokens_multiple: int = 1,
    ) -> None:
        """Takes each job's steering and rows, in the order of the rows; the jobs are of one grid.

        With a `tokens_multiple` that many times some number of text positions are looked at, so that a U-Net that was
        compiled or recorded for a shape serves jobs of other words.
        """
        layers = max(len(each.speaks_LT) for each, _ in steerings)
        padded = [each.padded(layers) for each, _ in steerings]
        speaks_JLT = torch.stack([each.speaks_LT for each in padded])
        # For a single job one row stands for all.
        self._counts = [rows for _, rows in steerings] if len(steerings) > 1 else [1]
        self.rows = sum(rows for _, rows in steerings)
        self._visible_JLhw = torch.stack([each.visible_Lhw for each in padded]).to(device)
        self._dials_DJL1 = torch.stack(
            [torch.stack([each.dials[dial] for each in padded]) for dial in STEERING]
        )[..., None].to(device)
        self._speaks_JTL = speaks_JLT.transpose(1, 2).to(device)
        tokens = speaks_JLT.any(dim=0).any(dim=0).nonzero()[:, 0].tolist()
        more = -len(tokens) % tokens_multiple
        place_UT = torch.eye(speaks_JLT.shape[2])[tokens + [0] * more]
        # What is looked at beside them has a place nowhere.
        place_UT[len(tokens) :] = 0
        self._token_U = torch.tensor(tokens + [0] * more, device=device)
        self._place_UT = place_UT.to(device)
        self._gain_R11 = torch.ones(1, 1, 1, device=device)
        self._gained: dict[int, torch.Tensor] = {}
        self._words: dict[Attention, Words] = {}
        self._weights: dict[int, torch.Tensor] = {}
        self._rooms: dict[tuple[int, int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def gain(self, gain_R: torch.Tensor) -> None:
        """Sets g(sigma) of each row, for the calls that follow."""
        self._gain_R11 = gain_R.view(-1, 1, 1)
        self._gained.clear()

    def weight_RQT(self, queries: int) -> torch.Tensor:
        """What attract * v - repel * (1 - v) is for every query and text position, 0 without a layer; made once.

        Here v is the mean of the mask over the query's cell of the U-Net level that has so many queries.
        """
        if queries not in self._weights:
            grid = grid_of(queries, *self._visible_JLhw.shape[2:])
            v_JLQ = F.adaptive_avg_pool2d(self._visible_JLhw, grid).flatten(2)
            attract_JL1, repel_JL1 = self._dials_DJL1
            weight_JLQ = attract_JL1 * v_JLQ - repel_JL1 * (1 - v_JLQ)
            weight_JQT = (self._speaks_JTL @ weight_JLQ).transpose(1, 2)
            parts = [
                weight_1QT.expand(rows, -1, -1)
                for rows, weight_1QT in zip(self._counts, weight_JQT.split(1), strict=True)
            ]
            self._weights[queries] = torch.cat(parts).contiguous()
        return self._weights[queries]

    def _room_B1QT(self, batch: int, queries: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Zeros, made once, whose rows begin at multiples of 8 as attention on a GPU wants them; and the last ones."""
        key = (batch, queries, dtype)
        if key not in self._rooms:
            window, device = self._place_UT.shape[1], self._place_UT.device
            room = torch.zeros(batch, 1, queries, -(-window // 8) * 8, dtype=dtype, device=device)
            room_B1QT = room[..., :window]
            self._rooms[key] = room_B1QT, room_B1QT[batch - self.rows :, 0]
        return self._rooms[key]

    def words(self, attn: Attention, text_BTD: torch.Tensor) -> "Words":
        """What a cross-attention makes of the texts of the calls, which are the same each time; made once."""
        if attn not in self._words:
            if attn.norm_cross:
                text_BTD = attn.norm_encoder_hidden_states(text_BTD)
            key_BHTd, value_BHTd = (heads(attn, part(text_BTD)) for part in (attn.to_k, attn.to_v))
            self._words[attn] = Words(
                key_BHTd=key_BHTd, value_BHTd=value_BHTd, looked_at_RHdU=self.looked_at(key_BHTd)
            )
        return self._words[attn]

    def looked_at(self, key_BHTd: torch.Tensor) -> torch.Tensor:
        """The scaled keys of the controlled rows at positions that belong to layers, [R, H, d, U]."""
        key_RHUd = key_BHTd[-self.rows :].index_select(2, self._token_U)
        # Scaled before the product, which in half precision would overflow for some models.
        scale: float = key_BHTd.shape[3] ** -0.5
        return (key_RHUd * scale).transpose(2, 3)

    def bias_B1QT(self, query_BHQd: torch.Tensor, looked_at_RHdU: torch.Tensor) -> torch.Tensor:
        """What is added to the scaled scores, the same for all heads, 0 in rows without control.

        It is true until the next call for as many queries. Few operations: on a GPU each costs as much as its launch,
        and there is one call for every cross-attention of every step.
        """
        batch, _, queries, _ = query_BHQd.shape
        bias_B1QT, bias_RQT = self._room_B1QT(batch, queries, query_BHQd.dtype)
        query_RHQd = query_BHQd[-self.rows :] if batch > self.rows else query_BHQd
        score_RHQU = torch.matmul(query_RHQd, looked_at_RHdU)
        top_RU = score_RHQU.amax(dim=(1, 2)).clamp_(min=0)
        if top_RU.dtype != torch.float32:
            top_RU = top_RU.float()
        if queries not in self._gained:
            self._gained[queries] = self.weight_RQT(queries) * self._gain_R11
        torch.mul(self._gained[queries], (top_RU @ self._place_UT)[:, None], out=bias_RQT)
        return bias_B1QT


class ControlSlot:
    """Where one U-Net's processors find the control of the call under way; None outside controlled calls."""

    def __init__(self) -> None:
        self.control: Control | None = None


class ControlledAttention:
    """Cross-attention with the control in its slot; with an empty slot the stock processor, bit for bit."""

    def __init__(self, slot: ControlSlot) -> None:
        self.slot = slot
        self._stock = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, Q, inner], encoder_hidden_states [B, T, D] -> [B, Q, inner]."""
        control = self.slot.control
        if control is None:
            stock: torch.Tensor = self._stock(
                attn, hidden_states, encoder_hidden_states, attention_mask
            )
            return stock
        assert encoder_hidden_states is not None and attention_mask is None, "not cross-attention"
        words = control.words(attn, encoder_hidden_states)
        query_BHQd = heads(attn, attn.to_q(hidden_states))
        mixed_BHQd = F.scaled_dot_product_attention(
            query_BHQd,
            words.key_BHTd,
            words.value_BHTd,
            attn_mask=control.bias_B1QT(query_BHQd, words.looked_at_RHdU),
        )
        mixed: torch.Tensor = attn.to_out[0](mixed_BHQd.transpose(1, 2).flatten(2))
        return mixed


def heads(attn: Attention, projected: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values [B, Q or T, H * d] by heads, [B, H, Q or T, d]."""
    by_head: torch.Tensor = projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return by_head


def install(unet: UNet2DConditionModel, slot: ControlSlot) -> None:
    """Gives every cross-attention of the U-Net the controlled processor, once.

    Raises:
        ValueError: a cross-attention with parts that the controlled processor would leave out.
    """
    for name, attn in unet.named_modules():
        if name.endswith(".attn2") and isinstance(attn, Attention):
            extras = (attn.group_norm, attn.spatial_norm, attn.norm_q, attn.norm_k)
            is_plain = isinstance(attn.processor, AttnProcessor2_0) and extras == (None,) * 4
            if not is_plain or attn.residual_connection or attn.rescale_output_factor != 1:
                raise ValueError(f"{name} is not a plain cross-attention")
            attn.set_processor(ControlledAttention(slot))
