"""ControlNets (Zhang et al. 2023): whether one fits a model, and its network in memory."""

from pathlib import Path

import torch
from diffusers import ControlNetModel

from services.common.weights import NotAModel, find
from services.diffusion.folder import UnsupportedModel, read_config, read_network

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


def load_controlnet(folder: Path, *, dtype: torch.dtype, device: torch.device) -> ControlNetModel:
    """Loads a ControlNet that `check_controlnet` has found fit.

    Raises:
        NotAModel: a file is missing or unreadable.
    """
    network: ControlNetModel = read_network(ControlNetModel, folder, None, dtype=dtype)
    with torch.inference_mode(False):
        return network.to(device)


def check_controlnet(folder: Path, model: Path) -> None:
    """Looks, without reading weights, whether a ControlNet fits a model; both are folders.

    Raises:
        NotAModel: it is not whole.
        UnsupportedModel: it is made for another U-Net or autoencoder, or is of another kind of network.
    """
    config, unet = read_config(folder / "config.json"), read_config(model / "unet" / "config.json")
    if config.get("_class_name") != "ControlNetModel":
        raise UnsupportedModel(
            f"{folder.name}: is a {config.get('_class_name')}, not a ControlNetModel"
        )
    find(folder)
    if misfits := [
        f"{name} is {config.get(name)}, the U-Net's {unet.get(name)}"
        for name in _SHARED_WITH_UNET
        if config.get(name) != unet.get(name)
    ]:
        raise UnsupportedModel(f"{folder.name}: {'; '.join(misfits)}")
    embedding = config.get("conditioning_embedding_out_channels", _EMBEDDING)
    if not isinstance(embedding, list | tuple) or not embedding:
        raise NotAModel(
            f"{folder.name}: conditioning_embedding_out_channels is {embedding!r}; required: a list"
        )
    vae = read_config(model / "vae" / "config.json")
    factors = [2 ** (len(channels) - 1) for channels in (embedding, vae["block_out_channels"])]
    if factors[0] != factors[1]:
        raise UnsupportedModel(
            f"{folder.name}: takes pictures {factors[0]} times as large as latents, the autoencoder "
            f"makes them {factors[1]} times as large"
        )
    if config.get("global_pool_conditions") or config.get("conditioning_channels", 3) != 3:
        raise UnsupportedModel(
            f"{folder.name}: pools its residuals or reads no RGB, which is not supported"
        )
