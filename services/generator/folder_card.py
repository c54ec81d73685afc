"""Models in folders, run by torch in this process: their cards, and their stages.

Main type: `FolderCard`; `read_catalog` makes those of a setting and `load_stages` puts one's networks on its device.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict

from services.common.hub import locate, locate_adapter
from services.common.models_file import ModelSource
from services.common.weights import (
    CONTROLNET_FILES,
    ModelError,
    digest,
    find,
    tensors,
)
from services.diffusion import device
from services.diffusion.catalog import Catalog, weights_bytes
from services.diffusion.facts import read_facts
from services.diffusion.folder import read_config
from services.diffusion.memory import device_bytes
from services.diffusion.networks import load
from services.generator import schedule
from services.generator.adapters import AdapterFile
from services.generator.adapters import digest as adapter_digest
from services.generator.card import GeneratorCard
from services.generator.controlnet import check_controlnet
from services.generator.stages import Stages, TorchStages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FolderCard(GeneratorCard):
    """A model in a folder. controlnet_folders, adapter_files: of `controlnets` and `adapters`."""

    folder: Path
    dtype: torch.dtype
    controlnet_folders: Mapping[str, Path]
    adapter_files: Mapping[str, Path]

    @classmethod
    def read(cls, source: ModelSource, *, is_elsewhere: bool = False) -> "FolderCard":
        """The card of a served model. Hashes the weights: seconds for a large model.

        Args:
            source: of the model.
            is_elsewhere: its networks run on another machine, whose device it is that the source names.

        Raises:
            ModelError: no model, or none of a supported kind, or a ControlNet or adapter that does not fit it.
        """
        folder = locate(source.source)
        facts = read_facts(folder)
        schedule.check(facts)
        on = device.find("cpu" if is_elsewhere else source.device)
        dtype = _dtype(source.dtype, on)
        vae_dtype = facts.vae_dtype(dtype)
        # Before all that takes long, or lies beside it: what is no model is told at once.
        own_bytes = weights_bytes(folder, dtype=dtype, vae_dtype=vae_dtype)
        controlnets = {
            kind: _find_controlnet(where, folder)
            for kind, where in sorted(source.controlnets.items())
        }
        adapters = {
            name: _find_adapter(name, where, folder, facts.text_widths)
            for name, where in sorted(source.adapters.items())
        }
        beside = sum(find(each).count for each in controlnets.values())
        beside += sum(
            math.prod(shape) for each in adapters.values() for shape in tensors(each).values()
        )
        card = cls(
            name=source.name,
            folder=folder,
            digest=digest(folder),
            facts=facts,
            arithmetic=_arithmetic(dtype, on),
            device_bytes=device_bytes(on),
            unet_channels=_first_block_channels(folder / "unet"),
            vae_channels=_first_block_channels(folder / "vae"),
            unet_value_bytes=_value_bytes(dtype, on),
            vae_value_bytes=_value_bytes(vae_dtype, on),
            controlnets={
                kind: digest(each, CONTROLNET_FILES) for kind, each in controlnets.items()
            },
            controlnet_folders=controlnets,
            dtype=dtype,
            device=on,
            adapters={name: adapter_digest(file) for name, file in adapters.items()},
            adapter_files=adapters,
            weights_bytes=beside * dtype.itemsize + own_bytes,
            limits=source.limits,
            preset=source.defaults,
        )
        card.check_settings()
        return card


def read_catalog(models: str) -> Catalog[FolderCard]:
    """The catalog of a setting, see `Catalog.read`."""
    return Catalog.read(models, FolderCard.read)


def load_stages(card: FolderCard) -> Stages:
    """The model on its device.

    Raises:
        ModelError: it cannot be loaded.
    """
    return TorchStages(
        load(
            card.folder,
            dtype=card.dtype,
            device=card.device,
            controlnets=card.controlnet_folders,
            adapters=card.adapter_files,
        )
    )


def _find_controlnet(where: Path | str, folder: Path) -> Path:
    """Finds a ControlNet and looks whether it fits the model in `folder`."""
    controlnet = locate(where, CONTROLNET_FILES)
    check_controlnet(controlnet, folder)
    return controlnet


def _find_adapter(name: str, where: Path | str, folder: Path, text_widths: Sequence[int]) -> Path:
    """Finds an adapter's file and looks whether it fits the model in `folder`."""
    try:
        file = locate_adapter(where)
        config = read_config(folder / "unet" / "config.json")
        widths = dict(zip(("text_encoder", "text_encoder_2"), text_widths, strict=False))
        # diffusers reads it both as a mapping and by attributes.
        AdapterFile.read(file, FrozenDict(config), widths).check(folder)
    except ModelError as error:
        raise ModelError(f"adapters.{name}: {error}") from error
    return file


def _arithmetic(dtype: torch.dtype, on: torch.device) -> str:
    if on.type == "cuda":
        return f"{dtype} on {torch.cuda.get_device_name(on)}"
    # Sums split over another number of threads round differently, see `device.own`.
    return f"{dtype} on {torch.backends.cpu.get_cpu_capability()}"


def _value_bytes(dtype: torch.dtype, on: torch.device) -> int:
    """Of a value in memory estimates: on the CPU half precision falls back to single."""
    return torch.float32.itemsize if on.type == "cpu" else dtype.itemsize


def _dtype(name: str, on: torch.device) -> torch.dtype:
    """The dtype of that name; for an empty one half precision on a GPU, single precision on the CPU."""
    found = getattr(torch, name or ("float16" if on.type == "cuda" else "float32"))
    assert isinstance(found, torch.dtype), f"{name} is no dtype"
    return found


def _first_block_channels(part: Path) -> int:
    """Channels at full resolution, from the part's config."""
    return int(read_config(part / "config.json")["block_out_channels"][0])
