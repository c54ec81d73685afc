"""What is known of a model from its folder, before any weight is read, and which models can be run here.

Main type: `ModelFacts`, which is all that planning a job needs. Nothing is assumed that a folder can say: channels,
latent factor, text width, prediction type and native size come from its configs. This module knows no job.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from services.common.collage import Extent
from services.common.weights import NotAModel
from services.diffusion.folder import UnsupportedModel, read_config, read_tokenizer
from services.diffusion.schedule import read_schedule
from services.diffusion.tokens import TextTooLong, Tokens

# The parts of a folder and the classes that may fill them, by their names in model_index.json.
_PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# What SDXL has beside them: a second text encoder, whose pooled answer the U-Net reads with the time.
_SECOND_PARTS = {
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Parts of other model families that change what the U-Net is fed.
_FOREIGN_PARTS = ("text_encoder_3", "transformer", "image_encoder", "prior")
# Numbers that SDXL's U-Net reads beside the pooled text: original size, corner of the crop, target size.
_SIZE_NUMBERS = 6
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFacts:
    """What is known about a model without running it.

    latent_factor: pixels to a latent cell, each way. size_multiple: canvas width and height must be multiples of it,
    so that every level of the U-Net halves evenly. native: the canvas the model was trained at. text_widths: of each
    text encoder's token embeddings, two for SDXL. pooled_width: of the pooled text that SDXL's U-Net reads, 0 for
    others. is_empty_zero: whether an empty negative prompt counts as zeros, not as text. token_limit: tokens a prompt
    may have. guidance_width: of the guidance scale's embedding where a U-Net takes it as an input (distilled ones do),
    else None. prediction_type: "epsilon" or "v_prediction". scheduler_config: the folder's noise schedule. tokenizers:
    of each text encoder; they know the same tokens. upcasts_vae: whether the autoencoder overflows in half precision.
    """

    latent_channels: int
    latent_factor: int
    size_multiple: int
    native: Extent
    text_widths: tuple[int, ...]
    pooled_width: int
    is_empty_zero: bool
    token_limit: int
    guidance_width: int | None
    prediction_type: str
    scheduler_config: Mapping[str, Any]
    tokenizers: tuple[CLIPTokenizer, ...]
    upcasts_vae: bool

    def vae_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the autoencoder is drawn with where the other networks are in `dtype`."""
        return torch.float32 if self.upcasts_vae else dtype

    def reads_negative(self, guidance_scale: float) -> bool:
        """Whether a negative prompt counts: with guidance, unless its scale is an input of the U-Net."""
        return guidance_scale > 1 and self.guidance_width is None

    def token_count(self, text: str) -> int:
        """Tokens of the text alone, without begin and end."""
        return len(self.tokenizers[0](text, add_special_tokens=False)["input_ids"])

    def tokenize(self, text: str, words: Sequence[tuple[int, int]] = ()) -> Tokens:
        """The text as tokens, with places for learned words: see `Tokens.insert`.

        Raises:
            TextTooLong: the text and the words do not fit; it says by how much.
        """
        count = self.token_count(text)
        learned = sum(vectors for _, vectors in words)
        if count + learned > self.token_limit:
            raise TextTooLong(tokens=count + learned, limit=self.token_limit, learned=learned)
        encoded = [
            tokenizer(
                text,
                padding="max_length",
                max_length=self.token_limit + 2,
                return_offsets_mapping=True,
            )
            for tokenizer in self.tokenizers
        ]
        spans = encoded[0]["offset_mapping"][1 : count + 1]
        tokens = Tokens(
            ids_ET=tuple(tuple(each["input_ids"]) for each in encoded),
            spans=tuple((int(start), int(end)) for start, end in spans),
        )
        return tokens.insert(words) if words else tokens


def read_facts(folder: Path) -> ModelFacts:
    """The facts of a folder, from its configs and its tokenizer; no weights are read.

    Raises:
        NotAModel: a config or tokenizer is missing or unreadable.
        UnsupportedModel: another family than U-Net latent diffusion with a CLIP text encoder, or two as SDXL has them.
    """
    index = read_config(folder / "model_index.json")
    is_xl = bool((index.get("text_encoder_2") or (None,))[0])
    parts = {**_PARTS, **_SECOND_PARTS} if is_xl else _PARTS
    for part, kinds in parts.items():
        kind = (index.get(part) or (None, None))[1]
        if kind is None:
            raise NotAModel(f"{folder.name}: model_index.json names no {part}")
        if kind not in kinds:
            raise UnsupportedModel(f"{folder.name}: {part} is a {kind}; known: {', '.join(kinds)}")
    if foreign := [part for part in _FOREIGN_PARTS if (index.get(part) or (None,))[0]]:
        raise UnsupportedModel(f"{folder.name}: has {', '.join(foreign)}, which is not supported")
    unet = read_config(folder / "unet" / "config.json")
    vae = read_config(folder / "vae" / "config.json")
    tokenizers = [part for part in parts if part.startswith("tokenizer")]
    texts = [
        read_config(folder / part / "config.json") for part in parts if part.startswith("text_")
    ]
    scheduler = read_schedule(folder)
    try:
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        levels = len(unet["block_out_channels"])
        channels = unet["in_channels"]
        side = unet["sample_size"]
        width, height = (side, side) if isinstance(side, int) else (side[1], side[0])
        facts = ModelFacts(
            latent_channels=channels,
            latent_factor=factor,
            size_multiple=factor * 2 ** (levels - 1),
            native=Extent(width=width * factor, height=height * factor),
            text_widths=tuple(text["hidden_size"] for text in texts),
            pooled_width=texts[1]["projection_dim"] if is_xl else 0,
            is_empty_zero=is_xl and index.get("force_zeros_for_empty_prompt", True),
            # Begin and end take two places of the window.
            token_limit=min(text["max_position_embeddings"] for text in texts) - 2,
            guidance_width=unet.get("time_cond_proj_dim"),
            prediction_type=scheduler.get("prediction_type", "epsilon"),
            scheduler_config=scheduler,
            tokenizers=tuple(read_tokenizer(folder, part) for part in tokenizers),
            # As AutoencoderKL has it where the folder is silent, and as diffusers' pipelines heed it: for SDXL only.
            upcasts_vae=is_xl and vae.get("force_upcast", True),
        )
    except (KeyError, TypeError) as error:
        raise NotAModel(f"{folder.name}: a config lacks {error}") from error
    if (channels, channels) != (unet["out_channels"], vae["latent_channels"]):
        raise UnsupportedModel(
            f"{folder.name}: the U-Net takes {channels} channels and gives {unet['out_channels']}, "
            f"the autoencoder has {vae['latent_channels']}; all three must be equal"
        )
    # What else a U-Net is fed beside the time; SDXL's is fed the pooled text and the sizes.
    added = unet.get("addition_embed_type")
    numbers = _SIZE_NUMBERS * (unet.get("addition_time_embed_dim") or 0) + facts.pooled_width
    is_fed = added == "text_time" and unet.get("projection_class_embeddings_input_dim") == numbers
    if not is_fed if is_xl else added is not None:
        raise UnsupportedModel(
            f"{folder.name}: the U-Net takes {added or 'nothing'} beside the time, "
            f"{unet.get('projection_class_embeddings_input_dim') or 0} numbers wide; this is "
            f"supported with two text encoders, as SDXL base models have it, {numbers} wide"
        )
    if vae.get("latents_mean") or vae.get("latents_std") or vae.get("shift_factor"):
        raise UnsupportedModel(
            f"{folder.name}: the autoencoder shifts its latents, which is not supported"
        )
    for name, tokenizer, text in zip(tokenizers, facts.tokenizers, texts, strict=True):
        # Without its files, transformers makes up a tokenizer that knows no word at all.
        if not any((folder / name / file).is_file() for file in _TOKENIZER_FILES):
            raise NotAModel(f"{folder.name}: {name} has neither of {', '.join(_TOKENIZER_FILES)}")
        if len(tokenizer) > text["vocab_size"]:
            raise NotAModel(
                f"{folder.name}: the {name} has {len(tokenizer)} tokens, "
                f"the text encoder {text['vocab_size']}"
            )
    if is_xl and facts.tokenizers[0].get_vocab() != facts.tokenizers[1].get_vocab():
        raise UnsupportedModel(f"{folder.name}: the two tokenizers know different tokens")
    return facts
