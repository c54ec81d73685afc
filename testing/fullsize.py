"""Model folders of the published shapes of Stable Diffusion 1.5 and SDXL base, with random weights in half precision.

    python -m testing.fullsize sd15|sdxl FOLDER

2.1 and 6.9 GB, made in about a minute. No network is ever there in single precision, and one at a time in half. The
weights are scaled so that values keep their size from layer to layer: what such a model draws is noise, but finite
noise, also in half precision. The tokenizer is the toys'.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from testing import toy

# Numbers that the weights are, as published.
NUMBERS = {
    "sd15": 859_520_964 + 83_653_863 + 123_060_480,
    "sdxl": 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840,
}
# Beside the weights: tokenizers and configs.
_OTHER_BYTES = 2**20

# Published folders name these marks, which are not the tokenizer's.
_MARKS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
# CLIP ViT-L/14, and OpenCLIP ViT-bigG/14; the other numbers are the classes' own.
_CLIP_L = {
    **_MARKS,
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_BIGG = {
    **_MARKS,
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5: canvas 512 px."""
    _check_disk(folder, "sd15")
    unet = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    _save(folder / "unet", lambda: UNet2DConditionModel(**unet))
    _save(folder / "vae", lambda: AutoencoderKL(**_VAE, sample_size=512))
    _save(folder / "text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L)))
    _save_tokenizer(folder, "tokenizer")
    PNDMScheduler(**toy.SCHEDULE, skip_prk_steps=True).save_pretrained(folder / "scheduler")
    _save_index(
        folder,
        "StableDiffusionPipeline",
        scheduler=("diffusers", "PNDMScheduler"),
        safety_checker=(None, None),
        feature_extractor=(None, None),
    )
    return folder


def sdxl(folder: Path) -> Path:
    """Stable Diffusion XL base 1.0: canvas 1024 px."""
    _check_disk(folder, "sdxl")
    unet = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    _save(folder / "unet", lambda: UNet2DConditionModel(**unet))
    _save(
        folder / "vae",
        lambda: AutoencoderKL(**_VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
    )
    _save(folder / "text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**_CLIP_L)))
    _save(
        folder / "text_encoder_2",
        lambda: CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_BIGG)),
    )
    _save_tokenizer(folder, "tokenizer")
    _save_tokenizer(folder, "tokenizer_2", pad_token="!")
    schedule = {key: toy.SCHEDULE[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    EulerDiscreteScheduler(**schedule, steps_offset=1, timestep_spacing="leading").save_pretrained(
        folder / "scheduler"
    )
    _save_index(
        folder,
        "StableDiffusionXLPipeline",
        text_encoder_2=("transformers", "CLIPTextModelWithProjection"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
        scheduler=("diffusers", "EulerDiscreteScheduler"),
        force_zeros_for_empty_prompt=True,
    )
    return folder


MAKERS = {"sd15": sd15, "sdxl": sdxl}


def _check_disk(folder: Path, name: str) -> None:
    needed = NUMBERS[name] * torch.float16.itemsize + _OTHER_BYTES
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{folder}: {name} takes {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} are free"
        )


def _save(folder: Path, make: Callable[[], Any]) -> None:
    with torch.device("meta"):
        network = make()
    network = network.half().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.dim() > 1:
            # So that a sum over a row of inputs has the size of one of them.
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        else:
            # Norms pass on what they get, and biases add nothing.
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    network.save_pretrained(folder)


def _save_tokenizer(folder: Path, part: str, **options: str) -> None:
    toy.save_tokenizer(folder, part, **options).save_pretrained(folder / part)


def _save_index(folder: Path, kind: str, **parts: object) -> None:
    index = {
        "_class_name": kind,
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        **parts,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    MAKERS[arguments.model](arguments.folder)
