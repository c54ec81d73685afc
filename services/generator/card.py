"""What the generator knows of a served model before it is loaded: its limits, its defaults, what is beside it.

Main type: `GeneratorCard`. Whoever runs a model says what it is; the limits and defaults that no model holds are
constants here. This module knows no job, no folder and no device.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from services.common.collage import Extent, Sampling
from services.common.errors import InvalidRequest
from services.common.limits import MAX_IMAGES, MAX_SIDE, MAX_STEPS, MIN_SIDE
from services.common.models_file import Defaults, Limits
from services.common.weights import ModelError
from services.diffusion.catalog import ModelCard
from services.generator.sampler import decoded_together
from services.generator.schedule import SAMPLERS, most_steps, native_sampler

Card = TypeVar("Card", bound="GeneratorCard")

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GeneratorCard(ModelCard):
    """A model that is drawn with, whoever runs it.

    arithmetic: how and on what kind of device its networks compute, which decides a picture's last bits. device_bytes:
    the device's memory. unet_channels, vae_channels: of the widest activations; unet_value_bytes, vae_value_bytes: of a
    value in them. controlnets, adapters: their digests by kind, and by name; a result without one does not depend on
    any. Their weights count in `weights_bytes`, though they are loaded when they are needed. limits, preset: what the
    operator says of requests.
    """

    arithmetic: str
    device_bytes: int
    unet_channels: int
    vae_channels: int
    unet_value_bytes: int
    vae_value_bytes: int
    controlnets: Mapping[str, str]
    adapters: Mapping[str, str]
    limits: Limits
    preset: Defaults

    def check_settings(self) -> None:
        """Refuses limits and defaults that contradict the model or one another.

        Raises:
            ModelError: naming the setting.
        """
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
        more; and the finished pictures twice (pixels and PNG).

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
        together = decoded_together(sampling.images, pixels=size.pixels)
        decode = together * size.pixels * self.vae_channels * VAE_COPIES
        return max(
            unet * self.unet_value_bytes,
            decode * self.vae_value_bytes,
        ) + (2 * 3 * sampling.images * size.pixels)
