"""Adapters (LoRA, Hu et al. 2021): low-rank changes of a model's weights, and which of them are on.

Main types: `AdapterFile`, a file read, and `AdapterSwitch`, which turns adapters of one loaded model on and off. Files
in diffusers' form and in kohya's are read by diffusers' own loader. It knows no job and no device policy.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from services.common.collage import Adapter
from services.common.weights import ModelError, NotAModel, tensor_shapes

# Parts of a model that an adapter may change.
_PARTS = ("unet", "text_encoder", "text_encoder_2")
# In kohya's form, what multiplies a change is alpha / rank.
_KOHYA_TENSOR = re.compile(r"(?P<module>.+)\.(alpha|lora_(?P<side>up|down)\.weight)")
# What ends the name of either half of a low-rank change in PEFT's form.
_HALVES = (".lora_A.weight", ".lora_B.weight")


class UnsupportedAdapter(ModelError):
    """A file that holds no adapter, or one for another model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterFile:
    """A LoRA in diffusers' form. parts: those parts of a model that it changes."""

    tensors: Mapping[str, torch.Tensor]
    alphas: Mapping[str, float] | None
    metadata: Mapping[str, Any] | None
    parts: tuple[str, ...]

    @classmethod
    def read(cls, file: Path, unet_config: Mapping[str, Any]) -> "AdapterFile":
        """Reads a safetensors file of either form.

        Raises:
            UnsupportedAdapter: it holds something else than a LoRA, or one for another family.
        """
        try:
            raw = load_file(file)
        except (OSError, SafetensorError) as error:
            raise NotAModel(f"{file.name} is no safetensors file: {error}") from error
        if others := [name for name in raw if "dora_scale" in name or "lora" not in name]:
            raise UnsupportedAdapter(
                f"{file.name}: holds {others[0]!r}; supported: LoRA (not DoRA, LoHa, LoKr)"
            )
        with _quiet():
            try:
                tensors, alphas, metadata = Loader.lora_state_dict(
                    _without_uneven_alphas(raw)
                    if any(name.endswith(".alpha") for name in raw)
                    else str(file),
                    return_lora_metadata=True,
                    use_safetensors=True,
                    **(
                        {"unet_config": unet_config}
                        if unet_config.get("addition_embed_type")
                        else {}
                    ),
                )
            except (ValueError, KeyError, AttributeError) as error:
                raise UnsupportedAdapter(f"{file.name}: {error}") from error
        found = {name.partition(".")[0] for name in tensors}
        if unknown := found - set(_PARTS):
            raise UnsupportedAdapter(
                f"{file.name}: changes {', '.join(sorted(unknown))}; supported: {', '.join(_PARTS)}"
            )
        parts = tuple(part for part in _PARTS if part in found)
        return cls(tensors=tensors, alphas=alphas or None, metadata=metadata, parts=parts)

    def check(self, folder: Path) -> None:
        """Looks whether each change has its place in the model of that folder.

        Raises:
            UnsupportedAdapter: naming the tensor that has none.
        """
        for part in self.parts:
            shapes = {
                _plain(name): shape
                for file in sorted((folder / part).glob("*.safetensors"))
                for name, shape in tensor_shapes(file).items()
            }
            if not shapes:
                raise UnsupportedAdapter(f"is for a {part}, which the model does not have")
            for name, tensor in self._in_peft_form(part).items():
                module = _plain(name)
                for half in _HALVES:
                    module = module.removesuffix(half)
                base = shapes.get(f"{module}.weight")
                # The first half reads the inputs of the layer it changes, the second half gives its outputs.
                side = 1 if name.endswith(_HALVES[0]) else 0
                if not name.endswith(_HALVES) or base is None or len(base) != tensor.ndim:
                    raise UnsupportedAdapter(f"{part}.{name} has no place in the model")
                if tensor.shape[side] != base[side]:
                    raise UnsupportedAdapter(
                        f"{part}.{name} is for a layer of width {tensor.shape[side]}; "
                        f"the model's has {base[side]}"
                    )

    def _in_peft_form(self, part: str) -> dict[str, torch.Tensor]:
        """One part's tensors, named as PEFT does, without the part's name."""
        tensors = {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(f"{part}.")
        }
        if any(name.endswith(_HALVES) for name in tensors):
            return tensors
        if part == "unet":
            converted: dict[str, torch.Tensor] = convert_unet_state_dict_to_peft(tensors)
            return converted
        try:
            converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
        except ValueError as error:
            raise UnsupportedAdapter(f"{part}: {error}") from error
        return converted

    def load_into(self, networks: Mapping[str, Any], name: str) -> None:
        """Adds the adapter under a name to the networks of a model, by part; it is on at once."""
        options = {
            "network_alphas": self.alphas,
            "metadata": self.metadata,
            "adapter_name": name,
            "low_cpu_mem_usage": True,
        }
        with _quiet():
            for part in self.parts:
                if part == "unet":
                    Loader.load_lora_into_unet(dict(self.tensors), unet=networks[part], **options)
                else:
                    Loader.load_lora_into_text_encoder(
                        dict(self.tensors), text_encoder=networks[part], prefix=part, **options
                    )


class AdapterSwitch:
    """Turns adapters of a loaded model on and off. One thread at a time.

    An adapter is read with its first use and stays in memory. Without adapters the networks compute what they did
    before any was loaded, bit for bit; with some, what a diffusers pipeline computes that loaded the same ones.
    """

    def __init__(self, networks: Mapping[str, Any], files: Mapping[str, Path]) -> None:
        """`networks`: the parts of one model by name; `files`: its adapters by name."""
        self._networks = networks
        self._files = files
        self._parts: dict[str, tuple[str, ...]] = {}
        # None while a switch is under way: one that fails is done again in whole.
        self._on: tuple[Adapter, ...] | None = ()

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Turns on exactly these, with their weights.

        Raises:
            UnsupportedAdapter: a file is not what it was when it was checked.
        """
        if self._on == tuple(adapters):
            return
        self._on = None
        for adapter in adapters:
            if adapter.name not in self._parts:
                config = self._networks["unet"].config
                file = AdapterFile.read(self._files[adapter.name], config)
                try:
                    file.load_into(self._networks, self._inner_name(adapter.name))
                except BaseException:
                    # What is half there would stand in the way of the next try.
                    self._forget(self._inner_name(adapter.name), file.parts)
                    raise
                self._parts[adapter.name] = file.parts
        names = [self._inner_name(adapter.name) for adapter in adapters]
        changed = {part for adapter in adapters for part in self._parts[adapter.name]}
        for part, network in self._networks.items():
            set_adapter_layers(network, enabled=part in changed)
            if part in changed:
                set_weights_and_activate_adapters(
                    network, names, [adapter.weight for adapter in adapters]
                )
            # PEFT freezes what it wraps, and torch picks another matrix product for frozen weights. So the networks
            # are frozen only while a stock pipeline's would be: bits are at stake, not gradients.
            for name, parameter in network.named_parameters():
                if "lora_" not in name:
                    parameter.requires_grad_(part not in changed)
        self._on = tuple(adapters)

    def _inner_name(self, name: str) -> str:
        """What PEFT calls an adapter: it makes module names of it, which may hold no dot and hide no method."""
        return f"adapter_{sorted(self._files).index(name)}"

    def _forget(self, inner_name: str, parts: Sequence[str]) -> None:
        """Takes an adapter out of every network that it got into."""
        for part in parts:
            network = self._networks[part]
            delete_adapter_layers(network, inner_name)
            getattr(network, "peft_config", {}).pop(inner_name, None)


def _without_uneven_alphas(raw: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A kohya file whose layers are not all scaled alike, with each layer's scale taken into its weights.

    diffusers gives all layers the most common scale, without a word. A file of one scale stays as it is.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in raw.items():
        match = _KOHYA_TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"holds {name!r}, which is neither alpha, lora_up nor lora_down")
        tensors.setdefault(match["module"], {})[match["side"] or "alpha"] = tensor
    for module, parts in tensors.items():
        if "up" not in parts or "down" not in parts:
            raise ValueError(f"holds only a part of {module!r}")
    kinds = {
        (len(parts["down"]), float(parts["alpha"]) if "alpha" in parts else float("nan"))
        for parts in tensors.values()
    }
    if len(kinds) == 1:
        return dict(raw)
    evened = {}
    for module, parts in tensors.items():
        scale = float(parts.get("alpha", torch.tensor(len(parts["down"])))) / len(parts["down"])
        up = parts["up"]
        evened[f"{module}.lora_up.weight"] = (up.float() * scale).to(up.dtype)
        evened[f"{module}.lora_down.weight"] = parts["down"]
    return evened


def _plain(name: str) -> str:
    """A module's name without the level that text encoders have or not, by the version they were saved with."""
    return name.removeprefix("text_model.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries from printing what they did not find: we look closer before and after."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
