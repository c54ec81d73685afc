"""The parts of the small model, untrained, in the shapes that stock diffusers pipelines expect.

Main type: `Size`, everything in which a small and a large model differ.
"""

from dataclasses import dataclass
from itertools import pairwise

import art
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

# Standard deviation of the values of a word's embedding.
WORD_SPREAD = 0.3
# Pixels to a latent, along each side.
FACTOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a model is.

    side: pixels of its pictures. concepts: how many of `art.names()` it learns. The tuples are channels from fine to
    coarse; each further level halves the side.
    """

    side: int
    concepts: int
    vae_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    text_width: int
    text_layers: int

    @property
    def names(self) -> list[str]:
        """The concepts it learns."""
        return art.names()[: self.concepts]

    def autoencoder(self) -> AutoencoderKL:
        """Picture [B, 3, side, side] in -1..1 to latent [B, 4, side / 4, side / 4] and back."""
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(self.vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(self.vae_channels),
            block_out_channels=self.vae_channels,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=16,
            mid_block_add_attention=False,
            sample_size=self.side,
            force_upcast=False,
        )

    def denoiser(self) -> UNet2DConditionModel:
        """Noise prediction for latents; cross-attention at every level but the finest."""
        coarse = len(self.unet_channels) - 1
        return UNet2DConditionModel(
            sample_size=self.side // FACTOR,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * coarse),
            up_block_types=(*["CrossAttnUpBlock2D"] * coarse, "UpBlock2D"),
            block_out_channels=self.unet_channels,
            layers_per_block=1,
            cross_attention_dim=self.text_width,
            # Diffusers' name for the number of heads. Few wide heads run fastest on a CPU.
            attention_head_dim=2,
            norm_num_groups=16,
        )

    def text_encoder(self, words: int, end: int) -> CLIPTextModel:
        """Token ids [B, 77] to states [B, 77, text_width]; `end` is the id of the last token."""
        model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=words,
                hidden_size=self.text_width,
                intermediate_size=2 * self.text_width,
                projection_dim=self.text_width,
                num_hidden_layers=self.text_layers,
                num_attention_heads=4,
                max_position_embeddings=77,
                bos_token_id=end - 1,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        # CLIP's start (0.02) leaves the words nearly alike for the first thousand steps.
        model.get_input_embeddings().weight.data.normal_(std=WORD_SPREAD)
        return model


SIZES = {
    "small": Size(
        side=128,
        concepts=len(art.CONCEPTS),
        vae_channels=(32, 64, 96),
        unet_channels=(48, 96, 128),
        text_width=160,
        text_layers=2,
    ),
    "large": Size(
        side=256,
        concepts=len(art.CONCEPTS) + len(art.MORE_CONCEPTS),
        vae_channels=(48, 80, 112),
        unet_channels=(64, 96, 128, 128),
        text_width=192,
        text_layers=2,
    ),
}


class Describer(nn.Module):
    """Makes a picture's own word: portraits [M, 4, 48, 48], premultiplied, to vectors [M, V, text_width].

    It stands beside the model in training only. Whoever learns a word by textual inversion later finds a model whose
    words can say what things look like, as the captions of a large model's millions of pictures do. What the first
    vectors tell the later ones add to: a caption holds the first 1, 2, 4 or 8.
    """

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__()
        channels = (4, 32, 64, 128, 128)
        self._shape = (vectors, width)
        self.layers = nn.Sequential()
        for before, after in pairwise(channels):
            self.layers.append(nn.Conv2d(before, after, 3, stride=2, padding=1))
            self.layers.append(nn.GroupNorm(8, after))
            self.layers.append(nn.SiLU())
        self.layers.append(nn.Flatten())
        self.layers.append(nn.Linear(channels[-1] * 3 * 3, vectors * width))

    def forward(self, portraits_M4HW: Tensor) -> Tensor:
        """The vectors, as wide as the table's words are at their start."""
        vectors_MVC = self.layers(portraits_M4HW).view(-1, *self._shape).float()
        return WORD_SPREAD * functional.layer_norm(vectors_MVC, self._shape[-1:])


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that changes nothing yet, for control pictures FACTOR times as wide as latents."""
    # The way in from the picture halves its side between each two of these.
    model = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))
    # The way out begins with zeros, and that is enough to begin with the model as it is. Were the
    # way in zeros too, each would wait for the other to learn.
    nn.init.kaiming_normal_(model.controlnet_cond_embedding.conv_out.weight)
    return model


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.x; any diffusers scheduler can be made from it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
