"""A model in memory: the networks of one folder on one device in one dtype.

Main type: `LoadedModel`. This module knows no job and no device policy beyond the one it is told.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from services.diffusion.facts import ModelFacts, read_facts
from services.diffusion.folder import outline_network, read_network


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """The networks of one folder on one device in one dtype, and their facts.

    text_encoders: by part name, in the order of `ModelFacts.text_widths`. controlnets, adapters: by kind, and by name,
    the folder or file of what is loaded when it is needed. The autoencoder has a dtype of its own. A network that was
    not asked for is an outline, see `outline_network`.
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
    parts: Collection[str] | None = None,
) -> LoadedModel:
    """Loads a model from its folder.

    Args:
        folder: the model's.
        dtype: of the networks.
        device: where they are put.
        vae_dtype: of the autoencoder; None for what `ModelFacts.vae_dtype` makes of `dtype`.
        controlnets: noted, by kind and where they lie, and not loaded yet.
        adapters: the same, by name.
        parts: those whose weights are loaded, by their folders' names; None for all.

    Raises:
        NotAModel: a part or a file is missing or unreadable.
        UnsupportedModel: another family than U-Net latent diffusion with a CLIP text encoder, or two as SDXL has them.
    """
    facts = read_facts(folder)
    of_vae = vae_dtype or facts.vae_dtype(dtype)

    def network(kind: Any, part: str, dtype: torch.dtype = dtype) -> Any:
        if parts is not None and part not in parts:
            return outline_network(kind, folder, part)
        # Not requires_grad_(False): torch picks another matrix product for weights that need no gradient, and the
        # last bits would differ from those of a stock diffusers pipeline. The stages run in inference mode anyway.
        return read_network(kind, folder, part, dtype=dtype).to(device)

    unet = network(UNet2DConditionModel, "unet")
    vae = network(AutoencoderKL, "vae", of_vae)
    text_encoders = {"text_encoder": network(CLIPTextModel, "text_encoder")}
    if facts.pooled_width:
        text_encoders["text_encoder_2"] = network(CLIPTextModelWithProjection, "text_encoder_2")
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
