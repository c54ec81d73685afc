"""What the generator knows of a served model before it is loaded: its limits, its defaults, what is beside it.

Main type: `GeneratorCard`. Facts come from the folder; the limits and defaults that no folder holds are constants here.
This module knows no job and loads no weights.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict

from services.common.collage import Extent, Sampling
from services.common.errors import InvalidRequest
from services.common.hub import locate, locate_adapter
from services.common.limits import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MIN_SIDE
from services.common.models_file import Defaults, Limits, ModelSource
from services.common.weights import CONTROLNET_FILES, ModelError, digest, digest_file, weights
from services.diffusion import device
from services.diffusion.catalog import Catalog, ModelCard, weights_bytes
from services.diffusion.facts import read_facts
from services.generator.adapters import AdapterFile
from services.generator.controlnet import check_controlnet
from services.generator.sampler import decoded_together
from services.generator.schedule import SAMPLERS, most_steps, native_sampler

# A U-Net repeats its subject on canvases far larger than it was trained at, and self-attention grows with the square.
MAX_SIDE_PER_NATIVE = 4
# The paper's setting is Euler ancestral with 50 steps at scale 7; plain Euler converges in fewer, and its pictures do
# not drift as steps are added.
DEFAULT_SAMPLER = "euler"
DEFAULT_STEPS = 30
DEFAULT_GUIDANCE = 7.0
# Latent consistency models (Luo et al. 2023) are made for 4 to 8 steps; guidance is in their weights.
LCM_STEPS = 8
LCM_GUIDANCE = 1.0
# The bundled model's shapes break up at scales that a full-sized model needs (looked at from 3 to 7).
# SDXL's is what diffusers has it at.
_GUIDANCE = {"mini": 4.0, "sdxl": 5.0}
# Families by the width of their text encoder: CLIP ViT-L/14 and OpenCLIP ViT-H/14.
_FAMILIES = {768: "sd1", 1024: "sd2"}

# Memory of one U-Net row, and of one decoded picture, in copies of the first block's activation at full resolution.
# Largest found as the peak beyond the weights on the CPU, for U-Nets and autoencoders of two widths and three sizes:
# 39 and 9. Control adds a bias of 77 values a cell, which is nothing beside them.
UNET_COPIES = 40
VAE_COPIES = 10
# Found in the same way with ControlNets: their residuals are kept during the U-Net's call (5.1 such copies, and as many
# again while another kind's are added), and before it the control picture is embedded at the canvas' own resolution
# (51 values a pixel, for 16 channels there, as all ControlNets have them).
RESIDUAL_COPIES = 6
EMBEDDED_VALUES = 52


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetCard:
    """One ControlNet. `digest` is over the folder's files."""

    folder: Path
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """One adapter of a model: its safetensors file, and the digest of that."""

    file: Path
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GeneratorCard(ModelCard):
    """A model that is drawn with. Channels are those of the widest activations.

    controlnets, adapters: by kind, and by name; they have digests of their own, so that a result without one does not
    depend on any. Their weights count in `weights_bytes`, though they are loaded when they are needed. limits, preset:
    what the operator says of requests.
    """

    unet_channels: int
    vae_channels: int
    controlnets: Mapping[str, ControlNetCard]
    adapters: Mapping[str, AdapterCard]
    limits: Limits
    preset: Defaults

    @classmethod
    def read(cls, source: ModelSource) -> "GeneratorCard":
        """The card of a served model. Hashes the weights: seconds for a large model.

        Raises:
            ModelError: no model, or none of a supported kind, or a ControlNet or adapter that does not fit it.
        """
        folder = locate(source.source)
        facts = read_facts(folder)
        on = device.find(source.device)
        dtype = _dtype(source.dtype, on)
        controlnets: dict[str, ControlNetCard] = {}
        numbers = 0
        for kind, where in sorted(source.controlnets.items()):
            controlnet = locate(where, CONTROLNET_FILES)
            check_controlnet(controlnet, folder)
            numbers += weights(controlnet, CONTROLNET_FILES)
            controlnets[kind] = ControlNetCard(
                folder=controlnet, digest=digest(controlnet, CONTROLNET_FILES)
            )
        adapters = {
            name: _read_adapter(name, where, folder)
            for name, where in sorted(source.adapters.items())
        }
        numbers += sum(weights(adapter.file) for adapter in adapters.values())
        card = cls(
            name=source.name,
            folder=folder,
            digest=digest(folder),
            facts=facts,
            unet_channels=_first_block_channels(folder / "unet"),
            vae_channels=_first_block_channels(folder / "vae"),
            controlnets=controlnets,
            dtype=dtype,
            device=on,
            adapters=adapters,
            weights_bytes=numbers * dtype.itemsize
            + weights_bytes(folder, dtype=dtype, vae_dtype=facts.vae_dtype(dtype)),
            limits=source.limits,
            preset=source.defaults,
        )
        card._check_settings()
        return card

    def _check_settings(self) -> None:
        """Refuses limits and defaults that contradict the model or one another."""
        if self.preset.sampler not in (None, *SAMPLERS):
            raise ModelError(
                f"defaults.sampler: is {self.preset.sampler!r}; allowed: {', '.join(SAMPLERS)}"
            )
        defaults = self.defaults()
        if defaults.steps > self.max_steps:
            raise ModelError(
                f"defaults.steps: is {defaults.steps}, above limits.max_steps, which is "
                f"{self.max_steps}"
            )
        if defaults.steps > (most := most_steps(self.facts, defaults.sampler)):
            raise ModelError(
                f"defaults.steps: is {defaults.steps}; sampler {defaults.sampler} takes at most {most}"
            )
        if self.max_side < self.min_side:
            raise ModelError(
                f"limits.max_side: is {self.limits.max_side}; the model's smallest side is "
                f"{self.min_side}"
            )

    @property
    def family(self) -> str:
        """The shape of the model: "sdxl" with two text encoders, else "sd1", "sd2", or "mini" for any other."""
        return (
            "sdxl" if self.facts.pooled_width else _FAMILIES.get(self.facts.text_widths[0], "mini")
        )

    @property
    def min_side(self) -> int:
        """Smallest side, pixels."""
        return max(MIN_SIDE, self.facts.size_multiple)

    @property
    def max_side(self) -> int:
        """Largest side, pixels."""
        native = max(self.facts.native.width, self.facts.native.height)
        largest = min(self.limits.max_side or MAX_SIDE, MAX_SIDE_PER_NATIVE * native)
        return largest - largest % self.facts.size_multiple

    @property
    def max_images(self) -> int:
        """Most pictures of one request."""
        return self.limits.max_images or MAX_IMAGES

    @property
    def max_steps(self) -> int:
        """Most denoising steps."""
        return self.limits.max_steps or MAX_STEPS

    @property
    def tokens_limit(self) -> int:
        """Tokens of a prompt, begin and end marks included."""
        return self.facts.token_limit + 2

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt of any length, begin and end marks included."""
        return self.facts.token_count(prompt) + 2

    def check_size(self, size: Extent, *, field: str) -> None:
        """Refuses a canvas the model cannot take.

        Raises:
            InvalidRequest: naming the side, and the nearest sides that are allowed.
        """
        multiple = self.facts.size_multiple
        for name, side in (("width", size.width), ("height", size.height)):
            if side % multiple or not self.min_side <= side <= self.max_side:
                near = (side // multiple * multiple, -(-side // multiple) * multiple)
                allowed = {min(max(each, self.min_side), self.max_side) for each in near}
                raise InvalidRequest.of(
                    f"{field}.{name}",
                    f"is {side}; model {self.name!r} takes multiples of {multiple} from "
                    f"{self.min_side} to {self.max_side}, the nearest being "
                    f"{' or '.join(map(str, sorted(allowed)))}",
                )

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuses more steps than the sampler has on this model's schedule.

        Raises:
            InvalidRequest: naming how many it has.
        """
        most = most_steps(self.facts, sampling.sampler)
        if sampling.steps > most:
            raise InvalidRequest.of(
                "sampling.steps",
                f"is {sampling.steps}; sampler {sampling.sampler} of model {self.name} takes at most {most}",
            )

    def rows_a_picture(self, sampling: Sampling, *, has_emphasis: bool) -> int:
        """U-Net rows of a picture's step: one, two with guidance, three where that emphasises structure."""
        if not self.facts.reads_negative(sampling.guidance_scale):
            return 1
        return 3 if has_emphasis else 2

    def defaults(self) -> Sampling:
        """What a request that leaves sampling unset gets."""
        preset, guidance = self.preset, _GUIDANCE.get(self.family, DEFAULT_GUIDANCE)
        sampler = preset.sampler or native_sampler(self.facts) or DEFAULT_SAMPLER
        steps = LCM_STEPS if sampler == "lcm" else DEFAULT_STEPS
        if sampler == "lcm" and self.facts.guidance_width is None:
            guidance = LCM_GUIDANCE
        return Sampling(
            model=self.name,
            sampler=sampler,
            steps=preset.steps or min(steps, self.max_steps),
            guidance_scale=guidance if preset.guidance_scale is None else preset.guidance_scale,
            images=1,
            seed=0,
        )

    def memory_bytes(
        self,
        size: Extent,
        sampling: Sampling,
        *,
        max_rows: int,
        has_structure: bool,
        has_emphasis: bool,
    ) -> int:
        """Peak working memory of a request beyond the weights.

        The larger of a U-Net step and of what is decoded together:

            max(rows * cells * unet_channels * UNET_COPIES, pictures * pixels * vae_channels * VAE_COPIES)

        values, and with ControlNets RESIDUAL_COPIES more in the first, or the embedding of their pictures where that is
        more; and the finished pictures twice (pixels and PNG). On the CPU a value takes 4 bytes, because half precision
        falls back to single there, elsewhere those of the network's dtype.

        Args:
            size: of the canvas.
            sampling: what is asked for.
            max_rows: rows of one call where pictures need not share it; 1 where all of a request do.
            has_structure: whether ControlNets act.
            has_emphasis: whether guidance strengthens them.
        """
        cells = size.pixels // self.facts.latent_factor**2
        rows = each = self.rows_a_picture(sampling, has_emphasis=has_emphasis)
        rows *= sampling.images
        if max_rows > 1:
            rows = max(each, min(rows, max_rows))
        block = rows * cells * self.unet_channels
        unet = block * UNET_COPIES
        if has_structure:
            residuals = block * RESIDUAL_COPIES
            unet = max(unet + residuals, rows * size.pixels * EMBEDDED_VALUES + 2 * residuals)
        together = min(sampling.images, decoded_together(size.pixels))
        decode = together * size.pixels * self.vae_channels * VAE_COPIES
        return max(
            unet * self._value_bytes(self.dtype),
            decode * self._value_bytes(self.facts.vae_dtype(self.dtype)),
        ) + (2 * 3 * sampling.images * size.pixels)

    def _value_bytes(self, dtype: torch.dtype) -> int:
        return torch.float32.itemsize if self.device.type == "cpu" else dtype.itemsize


def read_catalog(models: str) -> Catalog[GeneratorCard]:
    """The catalog of a setting, see `Catalog.read`."""
    return Catalog.read(models, GeneratorCard.read)


def _read_adapter(name: str, where: Path | str, folder: Path) -> AdapterCard:
    """Finds an adapter and looks whether it fits the model in `folder`."""
    try:
        file = locate_adapter(where)
        config = json.loads((folder / "unet" / "config.json").read_text())
        # diffusers reads it both as a mapping and by attributes.
        AdapterFile.read(file, FrozenDict(config)).check(folder)
    except ModelError as error:
        raise ModelError(f"adapters.{name}: {error}") from error
    return AdapterCard(file=file, digest=digest_file(file))


def _dtype(name: str, on: torch.device) -> torch.dtype:
    """The dtype of that name; for an empty one half precision on a GPU, single precision on the CPU."""
    found = getattr(torch, name or ("float16" if on.type == "cuda" else "float32"))
    assert isinstance(found, torch.dtype), f"{name} is no dtype"
    return found


def _first_block_channels(part: Path) -> int:
    """Channels at full resolution, from the part's config."""
    return int(json.loads((part / "config.json").read_text())["block_out_channels"][0])
