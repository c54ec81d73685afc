"""The frozen networks a word is learned against, and how a learned vector enters the text encoder.

Main type: `Networks`. Nothing here is ever trained and no weight keeps a gradient, but gradients flow through the U-Net
and the text encoder to the vectors that take the place of token embeddings. This module knows no layer and no step.

Suffixes: B rows, S texts, T tokens, D text width, V vectors, C latent channels, h, w latent cells, H, W pixels.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from services.common.weights import ModelError, NotAModel

# Name of a lone text encoder's vectors while they are learned; of two, the names that files everywhere have.
ONE = "vectors"
TWO = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_PREDICTION_TYPES = ("epsilon", "v_prediction")
_PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": (None, "CLIPTextModelWithProjection"),
    # Of other families.
    "text_encoder_3": (None,),
    "image_encoder": (None,),
}


class UnsupportedModel(ModelError):
    """A whole model, but of a kind that no word can be learned for here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known about a model without loading it.

    widths: of the vectors, by the name of their text encoder. native_side: pixels. size_multiple: canvas sides must be
    multiples of it.
    """

    widths: dict[str, int]
    native_side: int
    latent_factor: int
    size_multiple: int
    scheduler_config: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextEncoder:
    """A text encoder and its tokenizer. `name`: of its vectors."""

    name: str
    model: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer

    @property
    def table_ND(self) -> Tensor:
        """The embeddings of its tokens."""
        table: Tensor = self.model.get_input_embeddings().weight
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A text with room for a word. ids_T: as the text encoder takes it. first: position of the word's first vector."""

    ids_T: tuple[int, ...]
    first: int


# A text as each of a model's text encoders takes it.
Prompt = tuple[Tokens, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """Texts as a U-Net takes them. pooled_BD: the second text encoder's summary, where there is one."""

    hidden_BTD: Tensor
    pooled_BD: Tensor | None = None

    def repeated(self, rows: int) -> "Text":
        """Each text so many times in a row."""
        pooled = self.pooled_BD
        return Text(
            hidden_BTD=self.hidden_BTD.repeat_interleave(rows, dim=0),
            pooled_BD=None if pooled is None else pooled.repeat_interleave(rows, dim=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Networks:
    """One model's networks on one device. alphas_T: the schedule's cumulative products, one per timestep."""

    facts: ModelFacts
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    encoders: tuple[TextEncoder, ...]
    alphas_T: Tensor
    predicts_v: bool
    device: torch.device
    dtype: torch.dtype

    def prompt(self, before: str, vectors: int, after: str) -> Prompt | None:
        """The text `before <word> after` as tokens; None where an encoder's window does not hold it."""
        made = []
        for encoder in self.encoders:
            tokenizer, limit = encoder.tokenizer, encoder.model.config.max_position_embeddings
            head, tail = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)
            )
            # What stands in the word's place does not matter, only that it is no mark that ends a text.
            word = [0] * vectors
            ids = [tokenizer.bos_token_id, *head, *word, *tail, tokenizer.eos_token_id]
            if len(ids) > limit:
                return None
            padding = [tokenizer.pad_token_id] * (limit - len(ids))
            made.append(Tokens(ids_T=(*ids, *padding), first=1 + len(head)))
        return tuple(made)

    def first_vectors(self, text: str, vectors: int) -> dict[str, Tensor]:
        """Where learning starts, [V, D] by encoder name: the mean of the embeddings of the text's own tokens."""
        found = {}
        for encoder in self.encoders:
            ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
            mean_D = encoder.table_ND[torch.tensor(ids, device=self.device)].float().mean(dim=0)
            found[encoder.name] = mean_D.repeat(vectors, 1)
        return found

    def spread(self) -> dict[str, float]:
        """Root mean square of the embedding table's values, by encoder name: the scale on which vectors differ."""
        return {
            encoder.name: float(encoder.table_ND.float().square().mean().sqrt())
            for encoder in self.encoders
        }

    def encode_text(self, prompts: Sequence[Prompt], vectors: Sequence[dict[str, Tensor]]) -> Text:
        """The texts as the U-Net takes them, each with its own vectors in the word's place.

        With one text encoder that is its last hidden state; with two (Podell et al. 2023) both last but one side by
        side, and the second's pooled answer.
        """
        is_lone = len(self.encoders) == 1
        hidden, pooled = [], None
        for number, encoder in enumerate(self.encoders):
            tokens = [prompt[number] for prompt in prompts]
            values = [each[encoder.name] for each in vectors]
            with _in_place(encoder, tokens, values):
                ids_ST = torch.tensor([each.ids_T for each in tokens], device=self.device)
                answer = encoder.model(ids_ST, output_hidden_states=not is_lone)
            hidden.append(answer[0] if is_lone else answer.hidden_states[-2])
            pooled = None if is_lone else answer[0]
        return Text(hidden_BTD=torch.cat(hidden, dim=-1), pooled_BD=pooled)

    @torch.no_grad()
    def encode_image(self, pixels_BHW3: NDArray[np.uint8]) -> Tensor:
        """Latents BChw: the mean of the autoencoder's posterior, scaled as the U-Net takes it."""
        config = self.vae.config
        pixels_BCHW = torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).to(self.device)
        posterior = self.vae.encode((pixels_BCHW.float() / 127.5 - 1).to(self.vae.dtype))
        shift = config.shift_factor or 0.0
        latents: Tensor = (posterior.latent_dist.mean.float() - shift) * config.scaling_factor
        return latents

    def noised(self, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """The latents at the noise level of each row's timestep (Ho et al. 2020, eq. 4)."""
        alpha_B111 = self.alphas_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha_B111.sqrt() * latents_BChw + (1 - alpha_B111).sqrt() * noise_BChw

    def target(self, latents_BChw: Tensor, noise_BChw: Tensor, timesteps_B: Tensor) -> Tensor:
        """What the U-Net is to predict: the noise, or v (Salimans and Ho 2022, section 4)."""
        if not self.predicts_v:
            return noise_BChw
        alpha_B111 = self.alphas_T[timesteps_B].view(-1, 1, 1, 1)
        return alpha_B111.sqrt() * noise_BChw - (1 - alpha_B111).sqrt() * latents_BChw

    def share_of_loss(self, timesteps_B: Tensor, tilt: float) -> Tensor:
        """What makes the squared error against `target` one of the noise, times sigma^tilt, at each row's timestep.

        With a the schedule's cumulative product, sigma^2 = (1 - a) / a, and an error of v is one of the noise divided
        by the root of a. In this order nothing divides by the 0 that a schedule for v may end with.
        """
        alpha_B = self.alphas_T[timesteps_B]
        return (1 - alpha_B) ** (tilt / 2) * alpha_B ** (self.predicts_v - tilt / 2)

    def predict(self, noisy_BChw: Tensor, timesteps_B: Tensor, text: Text) -> Tensor:
        """The U-Net's answer in single precision."""
        added = None
        if text.pooled_BD is not None:
            height, width = (extent * self.facts.latent_factor for extent in noisy_BChw.shape[2:])
            # Original size, crop, target size: what the canvas would be told at drawing.
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device)
            sizes_B6 = sizes.to(self.dtype).expand(len(noisy_BChw), -1)
            added = {"text_embeds": text.pooled_BD, "time_ids": sizes_B6}
        answer: Tensor = self.unet(
            noisy_BChw.to(self.dtype), timesteps_B, text.hidden_BTD, added_cond_kwargs=added
        ).sample
        return answer.float()


@contextlib.contextmanager
def _in_place(
    encoder: TextEncoder, tokens: Sequence[Tokens], values: Sequence[Tensor]
) -> Iterator[None]:
    """Has an encoder read these vectors where the words stand, for one call."""
    rows = [row for row, each in enumerate(values) for _ in range(len(each))]
    places = [
        each.first + number
        for each, of_row in zip(tokens, values, strict=True)
        for number in range(len(of_row))
    ]
    joined = torch.cat(list(values))

    def put(module: Any, args: Any, embedded_STD: Tensor) -> Tensor:
        # A copy for this call: neither the table nor the encoder is changed, and no gradient of the table's size comes
        # into being.
        embedded_STD = embedded_STD.clone()
        embedded_STD[rows, places] = joined.to(embedded_STD.dtype)
        return embedded_STD

    hook = encoder.model.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def read_facts(folder: Path) -> ModelFacts:
    """The facts of a folder, from its configs; no weights are read.

    Raises:
        NotAModel: a config is missing or unreadable.
        UnsupportedModel: another family than U-Net latent diffusion with one or two CLIP text encoders.
    """
    index = _config(folder / "model_index.json")
    for part, kinds in _PARTS.items():
        found = (index.get(part) or (None, None))[1]
        if found not in kinds:
            known = ", ".join(kind or "none" for kind in kinds)
            raise UnsupportedModel(f"{folder.name}: {part} is {found or 'absent'}; known: {known}")
    unet, vae, scheduler = (
        _config(folder / part / name)
        for part, name in (
            ("unet", "config.json"),
            ("vae", "config.json"),
            ("scheduler", "scheduler_config.json"),
        )
    )
    if unet["in_channels"] != vae["latent_channels"]:
        raise UnsupportedModel(
            f"{folder.name}: the U-Net takes {unet['in_channels']} channels, the autoencoder has "
            f"{vae['latent_channels']}; both must be equal"
        )
    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts not in _PREDICTION_TYPES:
        raise UnsupportedModel(
            f"{folder.name}: prediction type {predicts!r}; known: {', '.join(_PREDICTION_TYPES)}"
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = unet["sample_size"]
    return ModelFacts(
        widths=read_widths(folder),
        native_side=factor * (side if isinstance(side, int) else min(side)),
        latent_factor=factor,
        size_multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        scheduler_config=scheduler,
    )


def read_widths(folder: Path) -> dict[str, int]:
    """The widths of a word's vectors, by the name of their text encoder; no weights are read.

    Raises:
        NotAModel: a config is missing or unreadable.
    """
    index = _config(folder / "model_index.json")
    names = TWO if (index.get("text_encoder_2") or (None,))[0] else {"text_encoder": ONE}
    try:
        return {
            name: int(_config(folder / part / "config.json")["hidden_size"])
            for part, name in names.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise NotAModel(f"{folder.name}: a text encoder's config lacks {error}") from error


def load(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Networks:
    """Loads a folder's networks, frozen.

    Raises:
        NotAModel, UnsupportedModel: as `read_facts`, and for weights that cannot be read.
    """
    facts = read_facts(folder)
    # Nobody watches a server's terminal.
    disable_progress_bar()
    unet = _read(UNet2DConditionModel, folder, "unet", torch_dtype=dtype)
    # Once a placement, and half precision overflows in some autoencoders.
    vae = _read(AutoencoderKL, folder, "vae", torch_dtype=torch.float32)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    encoders = tuple(
        TextEncoder(
            name=name,
            model=_read(kind, folder, f"text_encoder{suffix}", dtype=dtype),
            tokenizer=_read(CLIPTokenizer, folder, f"tokenizer{suffix}"),
        )
        for name, kind, suffix in zip(facts.widths, kinds, ("", "_2"), strict=False)
    )
    for part in (unet, vae, *(encoder.model for encoder in encoders)):
        part.eval().requires_grad_(False).to(device)
    scheduler = DDPMScheduler.from_config(facts.scheduler_config)
    return Networks(
        facts=facts,
        unet=unet,
        vae=vae,
        encoders=encoders,
        alphas_T=scheduler.alphas_cumprod.to(device),
        predicts_v=scheduler.config.prediction_type == "v_prediction",
        device=device,
        dtype=dtype,
    )


def _config(path: Path) -> dict[str, Any]:
    name = f"{path.parent.name}/{path.name}"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NotAModel(f"{name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise NotAModel(f"{name} is not a JSON object")
    return config


def _read(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    if kind is not CLIPTokenizer:
        # Weights are never unpickled.
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise NotAModel(f"{folder.name}: {part} cannot be loaded: {error}") from error
