"""The generator's four stages, and their implementation in this process.

Main types: `Stages`, the seam, and `TorchStages`. Every stage is batch-first and stateless, and only tensors cross:
float32 whatever dtype the networks compute in, on the stages' device, except token ids and pictures, which are on the
CPU. A row's result depends on its neighbours in a batch by float rounding only.
Suffixes: B rows, T text positions, D text width, E text encoders, P width of the pooled text, C latent channels, h, w
latent cells, H, W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from diffusers import ControlNetModel

from services.common.collage import Adapter
from services.generator.adapters import AdapterSwitch
from services.generator.attention import ControlSlot, StepControl, install
from services.generator.models import LoadedModel, ModelFacts, UnsupportedModel, load_controlnet
from services.generator.structure import StructurePass
from services.generator.word import Word, WordSlot


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """One text on its way into the text encoders.

    ids_ET: for each text encoder the token ids, begin to padding. word: its learned word, None for none. positions:
    where each of the word's vectors stands in place of a token.
    """

    ids_ET: tuple[tuple[int, ...], ...]
    word: Word | None = None
    positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextStates:
    """Texts as the U-Net reads them: hidden states, and for SDXL the pooled text beside them, else None."""

    hidden_BTD: torch.Tensor
    pooled_BP: torch.Tensor | None = None

    @classmethod
    def cat(cls, states: Sequence["TextStates"]) -> "TextStates":
        """The rows of all, which are of one model."""
        pooled = [each.pooled_BP for each in states if each.pooled_BP is not None]
        return cls(
            hidden_BTD=torch.cat([each.hidden_BTD for each in states]),
            pooled_BP=torch.cat(pooled) if pooled else None,
        )

    def expand(self, rows: int) -> "TextStates":
        """The only row, `rows` times."""
        return TextStates(
            hidden_BTD=self.hidden_BTD.expand(rows, -1, -1),
            pooled_BP=None if self.pooled_BP is None else self.pooled_BP.expand(rows, -1),
        )

    def rows(self, rows_R: torch.Tensor) -> "TextStates":
        """These rows of it."""
        return TextStates(
            hidden_BTD=self.hidden_BTD[rows_R],
            pooled_BP=None if self.pooled_BP is None else self.pooled_BP[rows_R],
        )

    def to(self, dtype: torch.dtype) -> "TextStates":
        """The same in another precision."""
        return TextStates(
            hidden_BTD=self.hidden_BTD.to(dtype),
            pooled_BP=None if self.pooled_BP is None else self.pooled_BP.to(dtype),
        )

    def zeros(self) -> "TextStates":
        """As many rows of nothing."""
        return TextStates(
            hidden_BTD=torch.zeros_like(self.hidden_BTD),
            pooled_BP=None if self.pooled_BP is None else torch.zeros_like(self.pooled_BP),
        )


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

    def load_controlnets(self, kinds: Sequence[str]) -> None:
        """Has the ControlNets of these kinds in memory, so that no step has to wait for one."""

    def encode_text(self, texts: Sequence[Text]) -> TextStates:
        """What the U-Net reads of texts, a row each."""

    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """Pictures, uint8 sRGB, to latents [B, C, h, w]: the mode of the posterior, scaled as the U-Net wants it."""

    def predict(
        self,
        x_BChw: torch.Tensor,
        timestep_B: torch.Tensor,
        text: TextStates,
        control: StepControl | None,
        structure: Sequence[StructurePass],
        guidance_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The U-Net's prediction [B, C, h, w] (noise, or v) for scaled model inputs; `control` rules the last rows.

        `structure` holds each ControlNet of the call once; empty for none. `guidance_B`: guidance scales, float32 on
        the CPU, for a U-Net that takes them as an input, and for no other. SDXL is told that the picture is of the
        canvas' size and uncropped.
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
        self._adapters = AdapterSwitch({"unet": model.unet, **model.text_encoders}, model.adapters)
        self._encoders = tuple(model.text_encoders.values())
        self._words = tuple(WordSlot() for _ in self._encoders)
        for encoder, words in zip(self._encoders, self._words, strict=True):
            words.install(encoder.get_input_embeddings())
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

    def load_controlnets(self, kinds: Sequence[str]) -> None:
        """See `Stages`."""
        for kind in kinds:
            self._controlnet(kind)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[Text]) -> TextStates:
        """See `Stages`."""
        # One by one: texts are short, and so a text's states never depend on what it came with.
        return TextStates.cat([self._encode(text) for text in texts]).to(torch.float32)

    def _encode(self, text: Text) -> TextStates:
        encoded = [self._encode_by(encoder, text) for encoder in range(len(self._encoders))]
        if not self.facts.pooled_width:
            return TextStates(hidden_BTD=encoded[0].last_hidden_state)
        # SDXL reads both encoders before their last layer, and what the second pools from its last.
        return TextStates(
            hidden_BTD=torch.cat([each.hidden_states[-2] for each in encoded], dim=2),
            pooled_BP=encoded[1].text_embeds,
        )

    def _encode_by(self, encoder: int, text: Text) -> Any:
        """The text by one of the text encoders, its learned words in place for this call."""
        slot = self._words[encoder]
        if text.word is not None:
            slot.vectors_VD, slot.positions = text.word.vectors[encoder], text.positions
        try:
            return self._encoders[encoder](
                torch.tensor([text.ids_ET[encoder]], device=self._model.device),
                output_hidden_states=bool(self.facts.pooled_width),
            )
        finally:
            slot.vectors_VD = None

    @torch.inference_mode()
    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        # Contiguous: the order in memory decides which convolution runs, and with it the last bits of what follows.
        rgb_BCHW = rgb_BHWC.permute(0, 3, 1, 2).contiguous().to(self._model.device).float() / 255
        vae = self._model.vae
        posterior = vae.encode((2 * rgb_BCHW - 1).to(vae.dtype)).latent_dist
        z_BChw: torch.Tensor = posterior.mode() * vae.config.scaling_factor
        return z_BChw.float().contiguous()

    @torch.inference_mode()
    def predict(
        self,
        x_BChw: torch.Tensor,
        timestep_B: torch.Tensor,
        text: TextStates,
        control: StepControl | None,
        structure: Sequence[StructurePass],
        guidance_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Stages`."""
        dtype = self._model.dtype
        x_BChw, text = x_BChw.to(dtype), text.to(dtype)
        residuals = self._residuals(x_BChw, timestep_B, text, structure)
        self._slot.control = control
        try:
            noise_BChw: torch.Tensor = self._model.unet(
                x_BChw,
                timestep_B,
                encoder_hidden_states=text.hidden_BTD,
                added_cond_kwargs=self._beside_time(x_BChw, text),
                timestep_cond=self._guidance(guidance_B),
                down_block_additional_residuals=residuals[:-1] or None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
                return_dict=False,
            )[0]
        finally:
            self._slot.control = None
        return noise_BChw.float()

    def _beside_time(self, x_BChw: torch.Tensor, text: TextStates) -> dict[str, torch.Tensor]:
        """What SDXL reads beside the time: the pooled text, and the sizes; empty for others."""
        if text.pooled_BP is None:
            return {}
        height, width = (side * self.facts.latent_factor for side in x_BChw.shape[2:])
        # Original size, corner of the crop, target size (Podell et al. 2023), as diffusers sets them when not told.
        sizes_6 = x_BChw.new_tensor([height, width, 0, 0, height, width])
        return {"text_embeds": text.pooled_BP, "time_ids": sizes_6.expand(len(x_BChw), -1)}

    def _guidance(self, guidance_B: torch.Tensor | None) -> torch.Tensor | None:
        """Guidance scales as a distilled U-Net reads them (Meng et al. 2023): sines and cosines of 1000 (scale - 1)."""
        width = self._model.facts.guidance_width
        if guidance_B is None or width is None:
            return None
        half = width // 2
        falloff = torch.log(torch.tensor(10000.0)) / (half - 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -falloff)
        angles_BW = ((guidance_B - 1) * 1000)[:, None] * frequencies
        waves_BW = F.pad(torch.cat([angles_BW.sin(), angles_BW.cos()], dim=1), (0, width % 2))
        return waves_BW.to(self._model.device, self._model.dtype)

    def _residuals(
        self,
        x_BChw: torch.Tensor,
        timestep_B: torch.Tensor,
        text: TextStates,
        structure: Sequence[StructurePass],
    ) -> tuple[torch.Tensor, ...]:
        """What the ControlNets add to the skip connections and, last, to the middle; 0 in rows without one."""
        total: tuple[torch.Tensor, ...] = ()
        for part in structure:
            is_whole = len(part.rows) == len(x_BChw)
            x_RChw, timestep_R, part_text = x_BChw, timestep_B, text
            if not is_whole:
                rows_R = torch.tensor(part.rows, device=x_BChw.device)
                x_RChw, timestep_R = x_BChw[rows_R], timestep_B[rows_R]
                part_text = text.rows(rows_R)
            down, middle = self._controlnet(part.kind)(
                x_RChw,
                timestep_R,
                encoder_hidden_states=part_text.hidden_BTD,
                added_cond_kwargs=self._beside_time(x_RChw, part_text),
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
        x_BCHW = vae.decode((z_BChw / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[
            0
        ]
        unit_BHWC = (x_BCHW * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1)
        rgb_BHWC: torch.Tensor = (unit_BHWC * 255).round().to(torch.uint8)
        return rgb_BHWC.contiguous().cpu()
