"""The frozen networks a word is learned against, and the card by which they are known before they are loaded.

Main type: `Networks`. Nothing here is ever trained and no weight keeps a gradient, but gradients flow through the U-Net
and the text encoder to the vectors that take the place of token embeddings. This module knows no layer and no step.

Suffixes: B rows, N tokens a text encoder knows, D text width, V vectors, C latent channels, h, w latent cells, H, W
pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor

from services.common.hub import locate
from services.common.models_file import ModelSource
from services.common.weights import digest
from services.diffusion import device, networks
from services.diffusion.catalog import Catalog, ModelCard, weights_bytes
from services.diffusion.facts import ModelFacts, read_facts
from services.diffusion.networks import LoadedModel
from services.diffusion.text import Text, TextEncoders, TextStates
from services.diffusion.tokens import TextTooLong, Tokens
from services.diffusion.word import Word

# An autoencoder encodes once a placement, and half precision overflows in some.
_VAE_DTYPE = torch.float32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Networks:
    """One model's networks, frozen. alphas_T: the schedule's cumulative products, one per timestep."""

    model: LoadedModel
    encoders: TextEncoders
    alphas_T: Tensor

    @classmethod
    def of(cls, model: LoadedModel) -> "Networks":
        """Takes a model over, and freezes it."""
        for part in (model.unet, model.vae, *model.text_encoders.values()):
            part.requires_grad_(False)
        scheduler = DDPMScheduler.from_config(model.facts.scheduler_config)
        return cls(
            model=model,
            encoders=TextEncoders(model.text_encoders.values()),
            alphas_T=scheduler.alphas_cumprod.to(model.device),
        )

    @property
    def facts(self) -> ModelFacts:
        """The model's facts."""
        return self.model.facts

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.model.device

    @property
    def _predicts_v(self) -> bool:
        return self.facts.prediction_type == "v_prediction"

    @property
    def _tables_ND(self) -> tuple[Tensor, ...]:
        """Of each text encoder the embeddings of its tokens."""
        return tuple(
            encoder.get_input_embeddings().weight for encoder in self.model.text_encoders.values()
        )

    def first_word(self, text: str, vectors: int) -> Word:
        """Where learning starts: in every vector the mean of the embeddings of the text's own tokens."""
        means = []
        for tokenizer, table_ND in zip(self.facts.tokenizers, self._tables_ND, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            means.append(table_ND[torch.tensor(ids, device=self.device)].float().mean(dim=0))
        return Word(vectors=tuple(mean_D.repeat(vectors, 1) for mean_D in means))

    def spread(self) -> tuple[float, ...]:
        """Root mean square of each embedding table's values: the scale on which vectors differ."""
        return tuple(float(table_ND.float().square().mean().sqrt()) for table_ND in self._tables_ND)

    def encode_text(self, prompts: Sequence[Tokens], words: Sequence[Word]) -> TextStates:
        """The texts as the U-Net takes them, each with a word of its own in the place made for one."""
        return self.encoders.encode(
            [
                Text(ids_ET=tokens.ids_ET, word=word, positions=tokens.words[0])
                for tokens, word in zip(prompts, words, strict=True)
            ]
        )

    @torch.no_grad()
    def encode_image(self, pixels_BHW3: NDArray[np.uint8]) -> Tensor:
        """Latents BChw: the mean of the autoencoder's posterior, scaled as the U-Net takes it."""
        vae = self.model.vae
        pixels_BCHW = torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).to(self.device)
        posterior = vae.encode((pixels_BCHW.float() / 127.5 - 1).to(vae.dtype))
        latents: Tensor = posterior.latent_dist.mean.float() * vae.config.scaling_factor
        return latents

    def noised(self, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """The latents at the noise level of each row's timestep (Ho et al. 2020, eq. 4)."""
        alpha_B111 = self.alphas_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha_B111.sqrt() * latents_BChw + (1 - alpha_B111).sqrt() * noise_BChw

    def target(self, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the U-Net is to predict: the noise, or v (Salimans and Ho 2022, section 4)."""
        if not self._predicts_v:
            return noise_BChw
        alpha_B111 = self.alphas_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha_B111.sqrt() * noise_BChw - (1 - alpha_B111).sqrt() * latents_BChw

    def share_of_loss(self, timesteps_B: Tensor, tilt: float) -> Tensor:
        """What makes the squared error against `target` one of the noise, times sigma^tilt, at each row's timestep.

        With a the schedule's cumulative product, sigma^2 = (1 - a) / a, and an error of v is one of the noise divided
        by the root of a. In this order nothing divides by the 0 that a schedule for v may end with.
        """
        alpha_B = self.alphas_T[timesteps_B]
        return (1 - alpha_B) ** (tilt / 2) * alpha_B ** (self._predicts_v - tilt / 2)

    def predict(self, noisy_BChw: Tensor, timesteps_B: Tensor, text: TextStates) -> Tensor:
        """The U-Net's answer in single precision."""
        dtype, added = self.model.dtype, None
        if text.pooled_BP is not None:
            height, width = (extent * self.facts.latent_factor for extent in noisy_BChw.shape[2:])
            # Original size, crop, target size: what the canvas would be told at drawing.
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device)
            sizes_B6 = sizes.to(dtype).expand(len(noisy_BChw), -1)
            added = {"text_embeds": text.pooled_BP, "time_ids": sizes_B6}
        answer: Tensor = self.model.unet(
            noisy_BChw.to(dtype), timesteps_B, text.hidden_BTD, added_cond_kwargs=added
        ).sample
        return answer.float()


def prompt(facts: ModelFacts, before: str, vectors: int, after: str) -> Tokens | None:
    """The text `before <word> after` as tokens, a place for the word in it; None where it does not fit the window."""
    try:
        return facts.tokenize(f"{before} {after}".strip(), [(len(before), vectors)])
    except TextTooLong:
        return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearningCard(ModelCard):
    """A model that words are learned for: its folder, and what its networks are loaded in."""

    folder: Path
    dtype: torch.dtype


def load(card: LearningCard) -> Networks:
    """Loads a model's networks.

    Raises:
        ModelError: see `networks.load`.
    """
    return Networks.of(
        networks.load(card.folder, dtype=card.dtype, device=card.device, vae_dtype=_VAE_DTYPE)
    )


def read_card(source: ModelSource) -> LearningCard:
    """The card of a served model. Hashes the weights: seconds for a large model.

    Raises:
        ModelError: no model, or none of a supported kind.
    """
    folder, on = locate(source.source), device.find(source.device)
    dtype, facts = dtype_on(on), read_facts(folder)
    # Before the digest: what is no model is told at once.
    own_bytes = weights_bytes(folder, dtype=dtype, vae_dtype=_VAE_DTYPE)
    return LearningCard(
        name=source.name,
        folder=folder,
        digest=digest(folder),
        facts=facts,
        dtype=dtype,
        device=on,
        weights_bytes=own_bytes,
    )


def read_catalog(models: str) -> Catalog[LearningCard]:
    """The catalog of a setting, see `Catalog.read`."""
    return Catalog.read(models, read_card)


def dtype_on(on: torch.device) -> torch.dtype:
    """What words are learned in: half precision on a GPU that has bfloat16, else single.

    The operator's dtype is for drawing: in float16 the gradients of late timesteps would vanish.
    """
    has_half = on.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_half else torch.float32
