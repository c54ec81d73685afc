"""The generator's four stages, and their implementation in this process.

Main types: `Stages`, the seam, and `TorchStages`. Every stage is batch-first and stateless, and only tensors cross:
float32 whatever dtype the networks compute in, on the stages' device, except token ids and pictures, which are on the
CPU. A row's result depends on its neighbours in a batch by float rounding only.
Suffixes: B rows, T text positions, D text width, E text encoders, P width of the pooled text, C latent channels, h, w
latent cells, H, W pixels.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from diffusers import ControlNetModel

from services.common.collage import Adapter
from services.diffusion.facts import ModelFacts
from services.diffusion.folder import UnsupportedModel
from services.diffusion.networks import LoadedModel
from services.diffusion.text import Text, TextEncoders, TextStates
from services.generator.adapters import AdapterSwitch
from services.generator.attention import ControlSlot, StepControl, install
from services.generator.controlnet import load_controlnet
from services.generator.structure import StructurePass


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
        self._encoders = TextEncoders(model.text_encoders.values())
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
        return TextStates.cat([self._encoders.encode([text]) for text in texts]).to(torch.float32)

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
