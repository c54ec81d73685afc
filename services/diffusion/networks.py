"""A model in memory: the networks of one folder on one device in one dtype.

Main type: `LoadedModel`. This module knows no job and no device policy beyond the one it is told.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from services.diffusion.facts import ModelFacts, read_facts
from services.diffusion.folder import read_network


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """The networks of one folder on one device in one dtype, and their facts.

    text_encoders: by part name, in the order of `ModelFacts.text_widths`. controlnets, adapters: by kind, and by name,
    the folder or file of what is loaded when it is needed. The autoencoder has a dtype of its own.
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
    vae_dtype: torch.dtype | None = None,
    controlnets: Mapping[str, Path] | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> LoadedModel:
    """Loads a model from its folder.

    Args:
        folder: the model's.
        dtype: of the networks.
        device: where they are put.
        vae_dtype: of the autoencoder; None for what `ModelFacts.vae_dtype` makes of `dtype`.
        controlnets: noted, by kind and where they lie, and not loaded yet.
        adapters: the same, by name.

    Raises:
        NotAModel: a part or a file is missing or unreadable.
        UnsupportedModel: another family than U-Net latent diffusion with a CLIP text encoder, or two as SDXL has them.
    """
    facts = read_facts(folder)
    unet = read_network(UNet2DConditionModel, folder, "unet", dtype=dtype)
    vae = read_network(AutoencoderKL, folder, "vae", dtype=vae_dtype or facts.vae_dtype(dtype))
    text_encoders = {
        "text_encoder": read_network(CLIPTextModel, folder, "text_encoder", dtype=dtype)
    }
    if facts.pooled_width:
        text_encoders["text_encoder_2"] = read_network(
            CLIPTextModelWithProjection, folder, "text_encoder_2", dtype=dtype
        )
    for part in (unet, vae, *text_encoders.values()):
        # Not requires_grad_(False): torch picks another matrix product for weights that need no gradient, and the
        # last bits would differ from those of a stock diffusers pipeline. The stages run in inference mode anyway.
        part.to(device)
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
