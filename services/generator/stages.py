"""The generator's four stages, and their implementation in this process.

Main types: `Stages`, the seam, and `TorchStages`. Every stage is batch-first, and only tensors and plain numbers cross,
see `services.generator.call`: float32 whatever dtype the networks compute in. What a call answers depends on what it is
given and on nothing before it, a row's result on its neighbours in a batch by float rounding only.
Suffixes: B rows, W width of the guidance scale's embedding, C latent channels, h, w latent cells, H, W pixels.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from diffusers import AutoencoderKL

from services.common.collage import Adapter
from services.common.errors import Internal
from services.common.telemetry import log
from services.diffusion.facts import ModelFacts
from services.diffusion.folder import UnsupportedModel
from services.diffusion.networks import LoadedModel
from services.diffusion.text import Text, TextEncoders, TextStates
from services.generator.adapters import AdapterSwitch
from services.generator.attention import Control, ControlSlot, install
from services.generator.call import Given, Rows
from services.generator.residuals import ControlNets, Pass

# See `Control`.
TOKENS_MULTIPLE = 8


class Stages(Protocol):
    """What the generator asks of a model."""

    @property
    def facts(self) -> ModelFacts:
        """The model's facts."""

    @property
    def device(self) -> torch.device:
        """Where latents and texts live."""

    def while_wanted(self, is_wanted: Callable[[], bool]) -> "Stages":
        """The same stages for work that is wanted as long as this says so.

        A call that waits for somebody else is then given up soon, and raises `NotWanted`.
        """

    def load_controlnets(self, kinds: Sequence[str]) -> None:
        """Has the ControlNets of these kinds in memory, so that no step has to wait for one; it changes no answer."""

    def encode_text(self, texts: Sequence[Text], adapters: Sequence[Adapter] = ()) -> TextStates:
        """What the U-Net reads of texts, a row each, with these of the model's adapters on."""

    def encode_image(self, rgb_BHWC: torch.Tensor) -> torch.Tensor:
        """Pictures, uint8 sRGB, to latents [B, C, h, w]: the mode of the posterior, scaled as the U-Net wants it."""

    def predict(self, rows: Sequence[Rows]) -> torch.Tensor:
        """The U-Net's prediction [B, C, h, w] (noise, or v) for rows of any jobs in this order, which share adapters.

        Rows that steer attention come last. SDXL is told that the picture is of the canvas' size and uncropped.
        """

    def decode_image(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """Latents to pictures [B, H, W, 3], uint8 sRGB, rounded as diffusers' VaeImageProcessor rounds.

        Raises:
            Internal: they would hold values that are not finite, see reason NOT_FINITE; never a black picture instead.
        """


class TorchStages:
    """The stages on a model in this process. One thread at a time."""

    def __init__(self, model: LoadedModel) -> None:
        """Takes the model over: its U-Net's cross-attentions get the controlled processor.

        Raises:
            UnsupportedModel: a U-Net whose cross-attention cannot be controlled.
        """
        self._model = model
        self._slot = ControlSlot()
        self._controlnets = ControlNets(model.controlnets, dtype=model.dtype, device=model.device)
        self._calls: WeakKeyDictionary[Given, _Call] = WeakKeyDictionary()
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

    def while_wanted(self, is_wanted: Callable[[], bool]) -> "TorchStages":
        """See `Stages`. Nobody is waited for here."""
        return self

    def load_controlnets(self, kinds: Sequence[str]) -> None:
        """See `Stages`."""
        for kind in kinds:
            self._controlnets.network(kind)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[Text], adapters: Sequence[Adapter] = ()) -> TextStates:
        """See `Stages`."""
        self._adapters.use(adapters)
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
    def predict(self, rows: Sequence[Rows]) -> torch.Tensor:
        """See `Stages`."""
        self._adapters.use(rows[0].given.adapters)
        call = self._call(rows)
        x_BChw = torch.cat([each.x_NChw for each in rows])
        if self._model.dtype != x_BChw.dtype:
            x_BChw = x_BChw.to(self._model.dtype)
        timestep_B, gain_R = self._numbers(rows)
        if call.control is not None:
            call.control.gain(gain_R)
        residuals = self._controlnets.residuals(call.passes, x_BChw, timestep_B)
        self._slot.control = call.control
        try:
            noise_BChw: torch.Tensor = self._model.unet(
                x_BChw,
                timestep_B,
                encoder_hidden_states=call.text.hidden_BTD,
                added_cond_kwargs=call.beside_time,
                timestep_cond=call.guidance_BW,
                down_block_additional_residuals=residuals[:-1] or None,
                mid_block_additional_residual=residuals[-1] if residuals else None,
                return_dict=False,
            )[0]
        finally:
            self._slot.control = None
        return noise_BChw if noise_BChw.dtype == torch.float32 else noise_BChw.float()

    def _numbers(self, rows: Sequence[Rows]) -> tuple[torch.Tensor, ...]:
        """The timestep of each row and the gain of each that steers, on the device and without waiting for it."""
        timesteps = [each.timestep for each in rows for _ in range(each.given.count)]
        gains = [
            each.gain
            for each in rows
            for _ in range(each.given.count)
            if each.given.steering is not None
        ]
        numbers = torch.from_numpy(np.array(timesteps + gains, np.float32))
        if self._model.device.type == "cuda":
            numbers = numbers.pin_memory()
        if self._model.device.type != "cpu":
            numbers = numbers.to(self._model.device, non_blocking=True)
        return torch.split(numbers, [len(timesteps), len(gains)])  # type: ignore[no-any-return, no-untyped-call]

    def _call(self, rows: Sequence[Rows]) -> "_Call":
        """What does not change from call to call of the same rows; made once, kept as long as the first of them."""
        given = [each.given for each in rows]
        grid = rows[0].x_NChw.shape[2:]
        key = (grid, *map(ref, given))
        call = self._calls.get(given[0])
        if call is None or call.key != key:
            call = self._calls[given[0]] = self._made(given, key)
        return call

    def _made(self, given: Sequence[Given], key: tuple[Any, ...]) -> "_Call":
        text = TextStates.cat([each.text.expand(each.count) for each in given]).to(
            self._model.dtype
        )
        beside_time = self._beside_time(text, *key[0])
        steered = [(each.steering, each.count) for each in given if each.steering is not None]
        scales = [each.guidance_scale for each in given for _ in range(each.count)]
        # On a CPU nothing is recorded, and a product of another width is rounded otherwise in its last bits.
        multiple = 1 if self._model.device.type == "cpu" else TOKENS_MULTIPLE
        return _Call(
            key=key,
            text=text,
            beside_time=beside_time,
            guidance_BW=self._guidance([scale for scale in scales if scale is not None]),
            control=Control(steered, device=self._model.device, tokens_multiple=multiple)
            if steered
            else None,
            passes=self._controlnets.passes(
                [(each.count, each.hints) for each in given], text, beside_time
            ),
        )

    def _beside_time(self, text: TextStates, height: int, width: int) -> dict[str, torch.Tensor]:
        """What SDXL reads beside the time: the pooled text, and the sizes; empty for others."""
        if text.pooled_BP is None:
            return {}
        height, width = (side * self.facts.latent_factor for side in (height, width))
        # Original size, corner of the crop, target size (Podell et al. 2023), as diffusers sets them when not told.
        sizes_6 = text.pooled_BP.new_tensor([height, width, 0, 0, height, width])
        return {
            "text_embeds": text.pooled_BP,
            "time_ids": sizes_6.expand(len(text.pooled_BP), -1),
        }

    def _guidance(self, scales: Sequence[float]) -> torch.Tensor | None:
        """Guidance scales as a distilled U-Net reads them (Meng et al. 2023): sines and cosines of 1000 (scale - 1)."""
        width = self._model.facts.guidance_width
        if not scales or width is None:
            return None
        half = width // 2
        falloff = torch.log(torch.tensor(10000.0)) / (half - 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -falloff)
        angles_BW = ((torch.tensor(scales) - 1) * 1000)[:, None] * frequencies
        waves_BW = F.pad(torch.cat([angles_BW.sin(), angles_BW.cos()], dim=1), (0, width % 2))
        return waves_BW.to(self._model.device, self._model.dtype)

    @torch.inference_mode()
    def decode_image(self, z_BChw: torch.Tensor) -> torch.Tensor:
        """See `Stages`."""
        vae = self._model.vae
        x_BCHW = _decoded(vae, z_BChw)
        if vae.dtype != torch.float32 and not bool(x_BCHW.isfinite().all()):
            log.warning("the autoencoder overflowed in half precision and decodes again in single")
            # A copy: what is decoded after this is as it would have been.
            x_BCHW = _decoded(torch.nn.Module.float(copy.deepcopy(vae)), z_BChw)
        if not bool(x_BCHW.isfinite().all()):
            raise Internal(
                "the model's autoencoder decodes to values that are not finite, in single precision too: "
                "its weights are damaged",
                reason="NOT_FINITE",
            )
        unit_BHWC = (x_BCHW * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1)
        rgb_BHWC: torch.Tensor = (unit_BHWC * 255).round().to(torch.uint8)
        return rgb_BHWC.contiguous().cpu()


def _decoded(vae: AutoencoderKL, z_BChw: torch.Tensor) -> torch.Tensor:
    x_BCHW: torch.Tensor = vae.decode(
        (z_BChw / vae.config.scaling_factor).to(vae.dtype), return_dict=False
    )[0]
    return x_BCHW


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """What the networks need of rows that come call after call. key: the grid, and which rows they are."""

    key: tuple[Any, ...]
    text: TextStates
    beside_time: Mapping[str, torch.Tensor]
    guidance_BW: torch.Tensor | None
    control: Control | None
    passes: tuple[Pass, ...]
