"""Model folders in diffusers format: which ones we can run, their facts, and their parts in memory.

Main types: `ModelFacts`, which is all that planning a job needs, and `LoadedModel`, the facts with the networks.
Nothing about a model is assumed that its folder can say: channels, latent factor, text width, prediction type and
native size come from the configs. This module knows no job and no device policy beyond the one it is told.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from services.common.collage import Extent
from services.common.weights import ModelError, NotAModel
from services.generator.noise import HoldingUniPC

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
_PREDICTION_TYPES = ("epsilon", "v_prediction")

# What a ControlNet shares with the U-Net it is for: the shapes of its inputs and residuals. (Kinds of blocks may
# differ: small ones for SDXL have no attention.)
_SHARED_WITH_UNET = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "addition_embed_type",
)
# Channels of the embedded control picture where a folder does not say: diffusers' own, for pictures 8 times as large.
_EMBEDDING = (16, 32, 96, 256)

SAMPLERS: Mapping[str, type] = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": HoldingUniPC,
    "lcm": LCMScheduler,
}


class UnsupportedModel(ModelError):
    """A whole model, but of a kind that the generator cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """A text as the text encoders take it: begin, the text's tokens, end, padding.

    ids_ET: for each text encoder the token ids, T = the encoders' window; they differ in the padding only. spans: for
    each of the text's own tokens, which start at position 1, the half-open range of characters it stands for; None
    where a learned vector stands for none. words: for each learned word the positions of its vectors.
    """

    ids_ET: tuple[tuple[int, ...], ...]
    spans: tuple[tuple[int, int] | None, ...]
    words: tuple[tuple[int, ...], ...] = ()

    def of_characters(self, start: int, end: int) -> tuple[int, ...]:
        """Positions of the tokens that overlap characters start..end (half-open)."""
        return tuple(
            position
            for position, span in enumerate(self.spans, start=1)
            if span is not None and span[0] < end and start < span[1]
        )

    def insert(self, words: Sequence[tuple[int, int]]) -> "Tokens":
        """The same text with places for learned words, which must fit; the padding gives way.

        Args:
            words: for each word the character it stands before and how many vectors it has. It comes directly before
                the token of that character, or at the text's end; words of one place keep their order.
        """
        end = len(self.spans)
        places = [
            next((i for i, span in enumerate(self.spans) if span and span[1] > start), end)
            for start, _ in words
        ]
        # Where each position's id comes from. A vector's place gets the begin mark's: any would do that is not the end
        # mark's, by which text encoders find where to pool.
        sources = [0]
        spans: list[tuple[int, int] | None] = []
        found: list[tuple[int, ...]] = [()] * len(words)
        for index in range(end + 1):
            for word, (_, count) in enumerate(words):
                if places[word] == index:
                    found[word] = tuple(range(len(sources), len(sources) + count))
                    sources += [0] * count
                    spans += [None] * count
            if index < end:
                sources.append(index + 1)
                spans.append(self.spans[index])
        window = len(self.ids_ET[0])
        sources += range(end + 1, window + end - len(spans))
        assert len(sources) == window and len(spans) < window - 1, "the words do not fit"
        return Tokens(
            ids_ET=tuple(tuple(ids_T[source] for source in sources) for ids_T in self.ids_ET),
            spans=tuple(spans),
            words=tuple(found),
        )


class TextTooLong(Exception):
    """A text of more tokens, vectors of learned words among them, than the text encoder's window holds."""

    def __init__(self, *, tokens: int, limit: int, learned: int = 0) -> None:
        counted = f" with {learned} of learned words" if learned else ""
        super().__init__(
            f"is {tokens} tokens long{counted}, {tokens - limit} more than the {limit} "
            "the model reads"
        )
        self.tokens = tokens
        self.limit = limit


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFacts:
    """What is known about a model without running it.

    latent_factor: pixels to a latent cell, each way. size_multiple: canvas width and height must be multiples of it,
    so that every level of the U-Net halves evenly. native: the canvas the model was trained at. text_widths: of each
    text encoder's token embeddings, two for SDXL. pooled_width: of the pooled text that SDXL's U-Net reads, 0 for
    others. is_empty_zero: whether an empty negative prompt counts as zeros, not as text. token_limit: tokens a prompt
    may have. guidance_width: of the guidance scale's embedding where a U-Net takes it as an input (distilled ones do),
    else None. prediction_type: "epsilon" or "v_prediction". scheduler_config: the folder's noise schedule. tokenizers:
    of each text encoder; they know the same tokens.
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

    def scheduler(self, sampler: str) -> Any:
        """A new diffusers scheduler, one of `SAMPLERS`, over this model's noise schedule."""
        kind = SAMPLERS[sampler]
        # Latents have no bounds to clip to, and a folder whose scheduler does not clip has no reason to say so.
        options = {"clip_sample": False} if kind is DDIMScheduler else {}
        return kind.from_config(self.scheduler_config, **options)  # type: ignore[attr-defined]

    @property
    def native_sampler(self) -> str | None:
        """The sampler that the folder's own scheduler is, where it is one that few-step models are distilled for."""
        return "lcm" if self.scheduler_config.get("_class_name") == "LCMScheduler" else None

    def reads_negative(self, guidance_scale: float) -> bool:
        """Whether a negative prompt counts: with guidance, unless its scale is an input of the U-Net."""
        return guidance_scale > 1 and self.guidance_width is None

    def most_steps(self, sampler: str) -> int:
        """How many steps the schedule can be cut into; LCM's are a choice of those it was distilled from."""
        config = self.scheduler(sampler).config
        return int(
            config.original_inference_steps if sampler == "lcm" else config.num_train_timesteps
        )

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """The networks of one folder on one device in one dtype, and their facts.

    text_encoders: by part name, in the order of `ModelFacts.text_widths`. controlnets, adapters: by kind, and by name,
    the folder or file of what is loaded when it is needed. The autoencoder's own dtype is single precision where the
    folder says that it overflows in half.
    """

    facts: ModelFacts
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: Mapping[str, CLIPTextModel | CLIPTextModelWithProjection]
    dtype: torch.dtype
    device: torch.device
    controlnets: Mapping[str, Path] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)


def load(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    controlnets: Mapping[str, Path] | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> LoadedModel:
    """Loads a model from its folder.

    ControlNets and adapters are noted, by kind or name and where they lie, and not loaded yet.

    Raises:
        NotAModel: a part or a file is missing or unreadable.
        UnsupportedModel: another family than U-Net latent diffusion with a CLIP text encoder, or two as SDXL has them.
    """
    facts = read_facts(folder)
    # Nobody watches a server's terminal.
    disable_progress_bar()
    unet = _read(UNet2DConditionModel, folder, "unet", torch_dtype=dtype)
    must_upcast = facts.pooled_width and _config(folder / "vae" / "config.json").get(
        # As AutoencoderKL has it, and as diffusers' pipelines heed it: for SDXL only.
        "force_upcast",
        True,
    )
    vae = _read(AutoencoderKL, folder, "vae", torch_dtype=torch.float32 if must_upcast else dtype)
    text_encoders = {"text_encoder": _read(CLIPTextModel, folder, "text_encoder", dtype=dtype)}
    if facts.pooled_width:
        text_encoders["text_encoder_2"] = _read(
            CLIPTextModelWithProjection, folder, "text_encoder_2", dtype=dtype
        )
    for part in (unet, vae, *text_encoders.values()):
        # Not requires_grad_(False): torch picks another matrix product for weights that need no gradient, and the
        # last bits would differ from those of a stock diffusers pipeline. The stages run in inference mode anyway.
        part.eval().to(device)
    return LoadedModel(
        facts=facts,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        dtype=dtype,
        device=device,
        controlnets=controlnets or {},
        adapters=adapters or {},
    )


def load_controlnet(folder: Path, *, dtype: torch.dtype, device: torch.device) -> ControlNetModel:
    """Loads a ControlNet that `check_controlnet` has found fit.

    Raises:
        NotAModel: a file is missing or unreadable.
    """
    disable_progress_bar()
    # A step that was not told beforehand asks for it in its midst: weights made in inference mode need no gradient,
    # which would change the last bits of what they give, see `load`.
    with torch.inference_mode(False):
        return _read(ControlNetModel, folder, None, torch_dtype=dtype).eval().to(device)


def check_controlnet(folder: Path, model: Path) -> None:
    """Looks, without reading weights, whether a ControlNet fits a model; both are folders.

    Raises:
        NotAModel: it is not whole.
        UnsupportedModel: it is made for another U-Net or autoencoder, or is of another kind of network.
    """
    config, unet = _config(folder / "config.json"), _config(model / "unet" / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise UnsupportedModel(
            f"{folder.name}: is a {config.get('_class_name')}, not a ControlNetModel"
        )
    if not any(folder.glob("*.safetensors")):
        raise NotAModel(f"{folder.name}: has no weights in safetensors form")
    if misfits := [
        f"{name} is {config.get(name)}, the U-Net's {unet.get(name)}"
        for name in _SHARED_WITH_UNET
        if config.get(name) != unet.get(name)
    ]:
        raise UnsupportedModel(f"{folder.name}: {'; '.join(misfits)}")
    vae = _config(model / "vae" / "config.json")
    factors = [
        2 ** (len(channels) - 1)
        for channels in (
            config.get("conditioning_embedding_out_channels", _EMBEDDING),
            vae["block_out_channels"],
        )
    ]
    if factors[0] != factors[1]:
        raise UnsupportedModel(
            f"{folder.name}: takes pictures {factors[0]} times as large as latents, the autoencoder "
            f"makes them {factors[1]} times as large"
        )
    if config.get("global_pool_conditions") or config.get("conditioning_channels", 3) != 3:
        raise UnsupportedModel(
            f"{folder.name}: pools its residuals or reads no RGB, which is not supported"
        )


def read_facts(folder: Path) -> ModelFacts:
    """The facts of a folder, from its configs and its tokenizer; no weights are read.

    Raises:
        NotAModel, UnsupportedModel: as `load`.
    """
    index = _config(folder / "model_index.json")
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
    unet = _config(folder / "unet" / "config.json")
    vae = _config(folder / "vae" / "config.json")
    tokenizers = [part for part in parts if part.startswith("tokenizer")]
    texts = [_config(folder / part / "config.json") for part in parts if part.startswith("text_")]
    scheduler = _config(folder / "scheduler" / "scheduler_config.json")
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
            tokenizers=tuple(_read(CLIPTokenizer, folder, part) for part in tokenizers),
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
    if vae.get("latents_mean") or vae.get("latents_std"):
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
    if facts.prediction_type not in _PREDICTION_TYPES:
        raise UnsupportedModel(
            f"{folder.name}: prediction type {facts.prediction_type!r}; "
            f"known: {', '.join(_PREDICTION_TYPES)}"
        )
    return facts


def _config(path: Path) -> dict[str, Any]:
    name = f"{path.parent.name}/{path.name}"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise NotAModel(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotAModel(f"{name} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise NotAModel(f"{name} is not a JSON object")
    return config


def _read(kind: Any, folder: Path, part: str | None, **options: Any) -> Any:
    if kind is not CLIPTokenizer:
        # Weights are never unpickled.
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = f"{folder.name}: {part}" if part else folder.name
        raise NotAModel(f"{where} cannot be loaded: {error}") from error
