"""Attention control: a layer's words gain inside the layer's visible mask and lose outside it.

Main types: `AttentionControl`, what one job's layers ask for, built once; `StepControl`, what one U-Net call is told;
`ControlledAttention`, the processor that does it. Collage Diffusion (Sarukkai et al. 2023): to the scaled scores S of
every cross-attention, for every token j of a layer with visible mask v, conditional rows only, is added

    + attract * v * g(sigma) * M_j - repel * (1 - v) * g(sigma) * M_j,      g(sigma) = log(log(sigma + 1.01) + 1)

with M_j = max(0, max of S over heads and positions). Departures from the released code: sigma is the true one of the
step, M_j is never negative (a negative one would swap attract and repel), tokens are found by characters.
Suffixes: B rows of a call, R its controlled rows, which come last; H heads, Q queries (cells at one resolution), T text
positions, U positions that belong to a layer, d head width, L layers, h, w latent cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0


def gain(sigma: float) -> float:
    """g(sigma): how strongly attention is controlled at noise level sigma >= 0; 0.01 at 0, 1.3 at 14."""
    return math.log(math.log(sigma + 1.01) + 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionControl:
    """What a job's layers ask of cross-attention; the same for all its pictures and steps.

    tokens: the text positions that belong to layers. token_J: int64, the same, and layer_J: int64, the layer of each; a
    position that two layers share stands twice. attract_L, repel_L: float32 in [0, 1]. visible_Lhw: float32 in [0, 1].
    """

    tokens: frozenset[int]
    token_J: torch.Tensor
    layer_J: torch.Tensor
    attract_L: torch.Tensor
    repel_L: torch.Tensor
    visible_Lhw: torch.Tensor
    _weights: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        positions: Sequence[Sequence[int]],
        dials: Sequence[tuple[float, float]],
        visible_Lhw: torch.Tensor,
    ) -> "AttentionControl | None":
        """The control of layers with these text positions and (attract, repel); None where nothing is asked."""
        device = visible_Lhw.device
        pairs = [
            (token, layer)
            for layer, tokens in enumerate(positions)
            for token in tokens
            if any(dials[layer])
        ]
        if not pairs:
            return None
        token_J, layer_J = torch.tensor(pairs, device=device).unbind(1)
        attract_L, repel_L = torch.tensor(dials, dtype=torch.float32, device=device).unbind(1)
        return cls(
            tokens=frozenset(token for token, _ in pairs),
            token_J=token_J,
            layer_J=layer_J,
            attract_L=attract_L,
            repel_L=repel_L,
            visible_Lhw=visible_Lhw,
        )

    def weight_QT(self, queries: int, tokens: int) -> torch.Tensor:
        """What attract * v - repel * (1 - v) is for every query and text position, 0 without a layer; made once.

        Here v is the mean of the mask over the query's cell of the U-Net level that has so many queries.
        """
        if (queries, tokens) not in self._weights:
            height, width = grid_of(queries, *self.visible_Lhw.shape[1:])
            v_LQ = F.adaptive_avg_pool2d(self.visible_Lhw, (height, width)).flatten(1)
            weight_LQ = self.attract_L[:, None] * v_LQ - self.repel_L[:, None] * (1 - v_LQ)
            weight_TQ = weight_LQ.new_zeros(tokens, queries)
            weight_TQ.index_add_(0, self.token_J, weight_LQ[self.layer_J])
            self._weights[queries, tokens] = weight_TQ.T.contiguous()
        return self._weights[queries, tokens]


def grid_of(queries: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of the U-Net level with so many cells; each level halves the one before, rounding up."""
    while height * width > queries:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == queries, f"no level of this grid has {queries} cells"
    return height, width


@dataclass(frozen=True, kw_only=True, eq=False)
class StepControl:
    """Control of the last rows of one U-Net call: for each job its control, its rows, and g at its step's sigma."""

    controls: tuple[AttentionControl, ...]
    rows: tuple[int, ...]
    gains: tuple[float, ...]

    @classmethod
    def of(cls, jobs: Sequence[tuple[AttentionControl, int, float]]) -> "StepControl":
        """From each job's control, its rows, and its gain."""
        controls, rows, gains = zip(*jobs, strict=True)
        return cls(controls=controls, rows=rows, gains=gains)

    @cached_property
    def token_U(self) -> torch.Tensor:
        """The text positions that belong to a layer of any of the jobs."""
        tokens = set().union(*(control.tokens for control in self.controls))
        return torch.tensor(sorted(tokens), device=self.controls[0].token_J.device)

    @cached_property
    def _made(self) -> dict[tuple[object, ...], torch.Tensor]:
        return {}

    def weight_RQT(self, queries: int, tokens: int) -> torch.Tensor:
        """The jobs' weights times their g(sigma), a row each; for a single job one row for all."""
        key = ("weight", queries, tokens)
        if key not in self._made:
            parts = [
                control.weight_QT(queries, tokens)[None] * g
                for control, g in zip(self.controls, self.gains, strict=True)
            ]
            if len(parts) > 1:
                pairs = zip(parts, self.rows, strict=True)
                parts = [torch.cat([part.expand(rows, -1, -1) for part, rows in pairs])]
            (self._made[key],) = parts
        return self._made[key]

    def _place_UT(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """1 where a column is the text position of a row."""
        key = ("place", tokens, dtype)
        if key not in self._made:
            all_T = torch.arange(tokens, device=self.token_U.device)
            self._made[key] = (self.token_U[:, None] == all_T).to(dtype)
        return self._made[key]

    def _room_B1QT(self, batch: int, queries: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros, made once, whose rows begin at multiples of 8 as attention on a GPU wants them."""
        key = ("room", batch, queries, tokens, dtype)
        if key not in self._made:
            width = -(-tokens // 8) * 8
            device = self.token_U.device
            room = torch.zeros(batch, 1, queries, width, dtype=dtype, device=device)
            self._made[key] = room[..., :tokens]
        return self._made[key]

    def bias_B1QT(self, query_BHQd: torch.Tensor, key_BHTd: torch.Tensor) -> torch.Tensor:
        """What is added to the scaled scores, the same for all heads, 0 in rows without control.

        It is true until the next call for as many queries. Few operations: on a GPU each costs as much as its launch,
        and there is one call for every cross-attention of every step.
        """
        batch, _, queries, width = query_BHQd.shape
        tokens, dtype = key_BHTd.shape[2], query_BHQd.dtype
        first = batch - sum(self.rows)
        # Scaled before the product, which in half precision would overflow for some models.
        key_RHUd = key_BHTd[first:].index_select(2, self.token_U) * width**-0.5
        score_RHQU = torch.matmul(query_BHQd[first:], key_RHUd.transpose(2, 3))
        top_RU = score_RHQU.amax(dim=(1, 2)).clamp_(min=0)
        top_R1T = (top_RU @ self._place_UT(tokens, dtype))[:, None]
        bias_B1QT = self._room_B1QT(batch, queries, tokens, dtype)
        torch.mul(self.weight_RQT(queries, tokens), top_R1T, out=bias_B1QT[first:, 0])
        return bias_B1QT


class ControlSlot:
    """Where one U-Net's processors find the control of the call under way; None outside controlled calls."""

    def __init__(self) -> None:
        self.control: StepControl | None = None


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
        query_BHQd, key_BHTd, value_BHTd = project(attn, hidden_states, encoder_hidden_states)
        mixed_BHQd = F.scaled_dot_product_attention(
            query_BHQd, key_BHTd, value_BHTd, attn_mask=control.bias_B1QT(query_BHQd, key_BHTd)
        )
        mixed: torch.Tensor = attn.to_out[0](mixed_BHQd.transpose(1, 2).flatten(2))
        return mixed


def project(
    attn: Attention, hidden_states: torch.Tensor, text_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a cross-attention, [B, H, Q or T, d] each."""
    if attn.norm_cross:
        text_BTD = attn.norm_encoder_hidden_states(text_BTD)
    query, key, value = attn.to_q(hidden_states), attn.to_k(text_BTD), attn.to_v(text_BTD)
    return tuple(x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))  # type: ignore[return-value]


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
