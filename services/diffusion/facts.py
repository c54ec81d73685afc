"""What is known of a model from its folder, before any weight is read, and which models can be run here.

Main type: `ModelFacts`, which is all that planning a job needs. Nothing is assumed that a folder can say: channels,
latent factor, text width, prediction type and native size come from its configs. This module knows no job.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from services.common.collage import Extent
from services.common.weights import LONE_FILES, NotAModel, told_of_file
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
# Levels that any network has, and the largest number that any config says: a text encoder's vocabulary.
_MOST_LEVELS = 8
_LARGEST = 2**24
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
    if lone := _lone_file(folder):
        raise NotAModel(told_of_file(lone))
    index = read_config(folder / "model_index.json")
    is_xl = _class(index, "text_encoder_2") is not None
    parts = {**_PARTS, **_SECOND_PARTS} if is_xl else _PARTS
    for part, kinds in parts.items():
        kind = _class(index, part)
        if kind is None:
            raise NotAModel(f"{folder.name}: model_index.json names no {part}")
        if kind not in kinds:
            raise UnsupportedModel(f"{folder.name}: {part} is a {kind}; known: {', '.join(kinds)}")
    if foreign := [part for part in _FOREIGN_PARTS if _class(index, part) is not None]:
        raise UnsupportedModel(f"{folder.name}: has {', '.join(foreign)}, which is not supported")
    unet, vae = (_Config.read(folder, part) for part in ("unet", "vae"))
    tokenizers = [part for part in parts if part.startswith("tokenizer")]
    texts = [_Config.read(folder, part) for part in parts if part.startswith("text_")]
    schedule = read_schedule(folder)
    factor = 2 ** (len(vae.wholes("block_out_channels")) - 1)
    levels = len(unet.wholes("block_out_channels"))
    channels = unet.whole("in_channels")
    side = unet.values.get("sample_size")
    height, width = (
        unet.wholes("sample_size") if isinstance(side, list) else 2 * [unet.whole("sample_size")]
    )
    vae.factor("scaling_factor")
    facts = ModelFacts(
        latent_channels=channels,
        latent_factor=factor,
        size_multiple=factor * 2 ** (levels - 1),
        native=Extent(width=width * factor, height=height * factor),
        text_widths=tuple(text.whole("hidden_size") for text in texts),
        pooled_width=texts[1].whole("projection_dim") if is_xl else 0,
        is_empty_zero=is_xl and bool(index.get("force_zeros_for_empty_prompt", True)),
        # Begin and end take two places of the window.
        token_limit=min(text.whole("max_position_embeddings") for text in texts) - 2,
        guidance_width=unet.whole("time_cond_proj_dim", may_lack=True) or None,
        prediction_type=schedule.get("prediction_type", "epsilon"),
        scheduler_config=schedule,
        tokenizers=tuple(read_tokenizer(folder, part) for part in tokenizers),
        # As AutoencoderKL has it where the folder is silent, and as diffusers' pipelines heed it: for SDXL only.
        upcasts_vae=is_xl and bool(vae.values.get("force_upcast", True)),
    )
    given = unet.whole("out_channels"), vae.whole("latent_channels")
    if (channels, channels) != given:
        raise UnsupportedModel(
            f"{folder.name}: the U-Net takes {channels} channels and gives {given[0]}, "
            f"the autoencoder has {given[1]}; all three must be equal"
        )
    # What else a U-Net is fed beside the time; SDXL's is fed the pooled text and the sizes.
    added = unet.values.get("addition_embed_type")
    numbers = _SIZE_NUMBERS * unet.whole("addition_time_embed_dim", may_lack=True)
    numbers += facts.pooled_width
    held = unet.whole("projection_class_embeddings_input_dim", may_lack=True)
    is_fed = added == "text_time" and held == numbers
    if not is_fed if is_xl else added is not None:
        raise UnsupportedModel(
            f"{folder.name}: the U-Net takes {added or 'nothing'} beside the time, "
            f"{held} numbers wide; this is "
            f"supported with two text encoders, as SDXL base models have it, {numbers} wide"
        )
    if any(vae.values.get(key) for key in ("latents_mean", "latents_std", "shift_factor")):
        raise UnsupportedModel(
            f"{folder.name}: the autoencoder shifts its latents, which is not supported"
        )
    for name, tokenizer, text in zip(tokenizers, facts.tokenizers, texts, strict=True):
        # Without its files, transformers makes up a tokenizer that knows no word at all.
        if not any((folder / name / file).is_file() for file in _TOKENIZER_FILES):
            raise NotAModel(f"{folder.name}: {name} has neither of {', '.join(_TOKENIZER_FILES)}")
        if len(tokenizer) > (known := text.whole("vocab_size")):
            raise NotAModel(
                f"{folder.name}: the {name} has {len(tokenizer)} tokens, the text encoder {known}"
            )
    if is_xl and facts.tokenizers[0].get_vocab() != facts.tokenizers[1].get_vocab():
        raise UnsupportedModel(f"{folder.name}: the two tokenizers know different tokens")
    return facts


def _class(index: Mapping[str, Any], part: str) -> Any:
    """The class that a model_index.json names for a part; None where it has no such part."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 and entry[0] else None


def _lone_file(folder: Path) -> Path | None:
    """The checkpoint in a folder that holds nothing in diffusers format."""
    if (folder / "model_index.json").exists():
        return None
    lone = [file for ending in LONE_FILES for file in sorted(folder.glob(f"*{ending}"))]
    return next(iter(lone), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    """A network's config, whose numbers are held to be some. where: as messages name it."""

    where: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path, part: str) -> "_Config":
        values = read_config(folder / part / "config.json")
        return cls(where=f"{folder.name}: {part}/config.json", values=values)

    def whole(self, key: str, *, may_lack: bool = False) -> int:
        """A whole number above 0; 0 for none where it may lack."""
        value = self.values.get(key)
        if value is None and may_lack:
            return 0
        return self._checked(key, value)

    def wholes(self, key: str) -> list[int]:
        """At least one such number."""
        values = self.values.get(key)
        if not isinstance(values, list) or not 1 <= len(values) <= _MOST_LEVELS:
            raise self._wrong(key, f"a list of 1 to {_MOST_LEVELS} whole numbers")
        return [self._checked(key, value) for value in values]

    def factor(self, key: str) -> None:
        """Refuses what is no number above 0, and there."""
        value = self.values.get(key, 1.0)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(key, "a number above 0")

    def _checked(self, key: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise self._wrong(key, "a whole number above 0")
        return int(value)

    def _wrong(self, key: str, required: str) -> NotAModel:
        told = f"is {self.values[key]!r}" if key in self.values else "is missing"
        return NotAModel(f"{self.where}: {key} {told}; required: {required}")
