"""The generator's four stages, and their implementation in this process.

Main types: `Stages`, the seam, and `TorchStages`. Every stage is batch-first and stateless, and only tensors cross:
float32 whatever dtype the networks compute in, on the stages' device, except token ids and pictures, which are on the
CPU. A row's result depends on its neighbours in a batch by float rounding only.
Suffixes: B rows, T text positions, D text width, C latent channels, h, w latent cells, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import ControlNetModel

from services.common.collage import Adapter
from services.generator.adapters import AdapterSwitch
from services.generator.attention import ControlSlot, StepControl, install
from services.generator.models import LoadedModel, ModelFacts, UnsupportedModel, load_controlnet
from services.generator.structure import StructurePass
from services.generator.word import Word, WordSlot


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """One text on its way into the text encoder.

    ids_T: token ids, begin to padding. word: the vectors of all its learned words, None for none. positions: where each
    of them stands in place of a token.
    """

    ids_T: tuple[int, ...]
    word: Word | None = None
    positions: tuple[int, ...] = ()


class Stages(Protocol):
    """What the generator asks of a model."""

    @property
    def facts(self) -> ModelFacts:
        """The model's facts."""

    @property
    def device(self) -> torch.device:
        """Where latents and texts live."""

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Turns on exactly these of the model's adapters for all that follows."""

    def encode_text(self, texts: Sequence[Text]) -> torch.Tensor:
        """Texts to hidden states [B, T, D]."""

    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """Pictures, uint8 sRGB, to latents [B, C, h, w]: the mode of the posterior, scaled as the U-Net wants it."""

    def predict(
        self,
        x_BChw: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BTD: torch.Tensor,
        control: StepControl | None,
        structure: Sequence[StructurePass],
    ) -> torch.Tensor:
        """The U-Net's prediction [B, C, h, w] (noise, or v) for scaled model inputs; `control` rules the last rows.

        `structure` holds each ControlNet of the call once; empty for none.
        """

    def decode_image(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """Latents to pictures [B, H, W, 3], uint8 sRGB, rounded as diffusers' VaeImageProcessor rounds."""


class TorchStages:
    """The stages on a model in this process. One thread at a time."""

    def __init__(self, model: LoadedModel) -> None:
        """Takes the model over: its U-Net's cross-attentions get the controlled processor.

        Raises:
            UnsupportedModel: a U-Net whose cross-attention cannot be controlled.
        """
        self._model = model
        self._slot = ControlSlot()
        self._controlnets: dict[str, ControlNetModel] = {}
        self._adapters = AdapterSwitch(
            {"unet": model.unet, "text_encoder": model.text_encoder}, model.adapters
        )
        self._word = WordSlot()
        self._word.install(model.text_encoder.get_input_embeddings())
        try:
            install(model.unet, self._slot)
        except ValueError as error:
            raise UnsupportedModel(str(error)) from error

    @property
    def facts(self) -> ModelFacts:
        """The model's facts."""
        return self._model.facts

    @property
    def device(self) -> torch.device:
        """Where latents and texts live."""
        return self._model.device

    def use(self, adapters: Sequence[Adapter]) -> None:
        """See `Stages`."""
        self._adapters.use(adapters)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[Text]) -> torch.Tensor:
        """See `Stages`."""
        # One by one: texts are short, and so a text's states never depend on what it came with.
        return torch.cat([self._encode(text) for text in texts]).float()

    def _encode(self, text: Text) -> torch.Tensor:
        ids_1T = torch.tensor([text.ids_T], device=self._model.device)
        if text.word is not None:
            (self._word.vectors_VD,) = text.word.vectors
            self._word.positions = text.positions
        try:
            hidden_1TD: torch.Tensor = self._model.text_encoder(ids_1T)[0]
        finally:
            self._word.vectors_VD = None
        return hidden_1TD

    @torch.inference_mode()
    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        # Contiguous: the order in memory decides which convolution runs, and with it the last bits of what follows.
        rgb_BCHW = rgb_BHWC.permute(0, 3, 1, 2).contiguous().to(self._model.device).float() / 255
        posterior = self._model.vae.encode((2 * rgb_BCHW - 1).to(self._model.dtype)).latent_dist
        z_BChw: torch.Tensor = posterior.mode() * self._model.vae.config.scaling_factor
        return z_BChw.float().contiguous()

    @torch.inference_mode()
    def predict(
        self,
        x_BChw: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BTD: torch.Tensor,
        control: StepControl | None,
        structure: Sequence[StructurePass],
    ) -> torch.Tensor:
        """See `Stages`."""
        dtype = self._model.dtype
        x_BChw, text_BTD = x_BChw.to(dtype), text_BTD.to(dtype)
        residuals = self._residuals(x_BChw, timestep_B, text_BTD, structure)
        self._slot.control = control
        try:
            noise_BChw: torch.Tensor = self._model.unet(
                x_BChw,
                timestep_B,
                encoder_hidden_states=text_BTD,
                down_block_additional_residuals=residuals[:-1] or None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
                return_dict=False,
            )[0]
        finally:
            self._slot.control = None
        return noise_BChw.float()

    def _residuals(
        self,
        x_BChw: torch.Tensor,
        timestep_B: torch.Tensor,
        text_BTD: torch.Tensor,
        structure: Sequence[StructurePass],
    ) -> tuple[torch.Tensor, ...]:
        """What the ControlNets add to the skip connections and, last, to the middle; 0 in rows without one."""
        total: tuple[torch.Tensor, ...] = ()
        for part in structure:
            rows_R = torch.tensor(part.rows, device=x_BChw.device)
            is_whole = len(part.rows) == len(x_BChw)
            x_RChw, timestep_R, text_RTD = (
                each if is_whole else each[rows_R] for each in (x_BChw, timestep_B, text_BTD)
            )
            down, middle = self._controlnet(part.kind)(
                x_RChw,
                timestep_R,
                encoder_hidden_states=text_RTD,
                controlnet_cond=part.picture_R3HW.to(x_BChw.dtype),
                return_dict=False,
            )
            residuals = tuple(part.weighted(residual_RChw) for residual_RChw in (*down, middle))
            if not is_whole:
                residuals = tuple(
                    each.new_zeros(len(x_BChw), *each.shape[1:]).index_copy(0, rows_R, each)
                    for each in residuals
                )
            total = tuple(map(torch.add, total, residuals)) if total else residuals
        return total

    def _controlnet(self, kind: str) -> ControlNetModel:
        """The ControlNet of this kind, loaded with its first use."""
        if kind not in self._controlnets:
            model = self._model
            self._controlnets[kind] = load_controlnet(
                model.controlnets[kind], dtype=model.dtype, device=model.device
            )
        return self._controlnets[kind]

    @torch.inference_mode()
    def decode_image(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        vae = self._model.vae
        x_BCHW = vae.decode(
            (z_BChw / vae.config.scaling_factor).to(self._model.dtype), return_dict=False
        )[0]
        unit_BHWC = (x_BCHW * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1)
        rgb_BHWC: torch.Tensor = (unit_BHWC * 255).round().to(torch.uint8)
        return rgb_BHWC.contiguous().cpu()
