"""Adapters (LoRA, Hu et al. 2021): low-rank changes of a model's weights, and which of them are on.

Main types: `AdapterFile`, a file read, and `AdapterSwitch`, which turns adapters of one loaded model on and off. Files
come in the forms of diffusers, PEFT and kohya; what other methods write (LoHa, DoRA, ...) is told by its name. It knows
no job and no device policy.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
from diffusers.utils.peft_utils import (
    delete_adapter_layers,
    set_adapter_layers,
    set_weights_and_activate_adapters,
)
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file

from services.common.collage import Adapter
from services.common.weights import ModelError, digest_file, find, tensors
from services.diffusion.folder import is_outline, parse_config, quiet, read_config

# Parts of a model that an adapter may change.
_PARTS = ("unet", "text_encoder", "text_encoder_2")
# In kohya's form, what multiplies a change is alpha / rank.
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_KOHYA_TENSOR = re.compile(r"(?P<module>.+)\.(alpha|lora_(?P<side>up|down)\.weight)")
# In the others', a module's own name, and what ends the name of either half of its change: PEFT's, then diffusers'.
_TENSOR = re.compile(
    r"(?P<module>.+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.default)?|[._]lora(?:_linear_layer|_layer)?[._](?P<side>down|up))\.weight"
)
_HALVES = (".lora_A.weight", ".lora_B.weight")
# PEFT's config, beside its file; it stands before the names of what PEFT saved, and where diffusers keeps its own.
_CONFIG = "adapter_config.json"
_WRAPPED = "base_model.model."
_METADATA = "lora_adapter_metadata"
# How PEFT names modules in patterns, with no more of a regular expression than takes no time.
_MODULES = re.compile(r"\^?[\w.\\*-]{1,200}\$?", re.ASCII)
# What a part's modules are called first, in files that do not say which part they are for.
_FIRST_OF_TEXT = ("text_model", "encoder", "embeddings", "final_layer_norm", "text_projection")
# What other methods call their tensors; the first counts.
_FOREIGN = (
    (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.boft_", "BOFT"),
    (r"\.oft_", "OFT"),
    (r"\.ia3_|\.on_input$", "IA3"),
    (r"(^|\.)vera_", "VeRA"),
    (r"\.hra_", "HRA"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.lora_mid\.", "LoCon with a core tensor (Tucker decomposition)"),
    (r"\.lora_E($|\.)", "AdaLoRA"),
    (r"\.lora_embedding_", "LoRA of token embeddings"),
    (r"^lora_controlnet$", "Control-LoRA"),
    (r"\.lora_(B|up)\.bias$|\.lora\.up\.bias$", "LoRA with biases"),
    (r"^bundle_emb\.", "LoRA with words in one file"),
    (r"\.diff(_b)?$", "whole differences (full)"),
    (r"\.[wb]_norm$", "changes of norms"),
)
_FORMS = "LoRA as diffusers, PEFT (adapter_model) and kohya write it"
# Ways of PEFT's to begin that change the model's own weights, beside the LoRA.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What else a PEFT config may ask for.
_ASKED = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save")


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
    def read(
        cls, file: Path, unet_config: Mapping[str, Any], text_widths: Mapping[str, int]
    ) -> "AdapterFile":
        """Reads a safetensors file of any of the forms.

        Args:
            file: its config beside it, where PEFT wrote it.
            unet_config: of the model that it is for.
            text_widths: of that model's text encoders, by part.

        Raises:
            NotAModel: it is no safetensors file, or not a whole one.
            UnsupportedAdapter: it holds something else than a LoRA, or one for another family.
        """
        names = tensors(file)
        config = _config(file, names)
        for sign, what in _FOREIGN:
            if held := next((name for name in names if re.search(sign, name)), None):
                raise UnsupportedAdapter(
                    f"{file.name}: is {what} (it holds {held}); known: {_FORMS}"
                )
        raw = load_file(file)
        if not raw or any("lora" not in name and not name.endswith(".alpha") for name in raw):
            other = next((name for name in raw if "lora" not in name), "nothing")
            raise UnsupportedAdapter(
                f"{file.name}: is no LoRA: it holds {other!r}; known: {_FORMS}"
            )
        for name, tensor in raw.items():
            if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
                raise UnsupportedAdapter(f"{file.name}: {name} holds what is no finite number")
        try:
            if all(name.startswith(_KOHYA) for name in raw):
                found = _of_kohya(raw, unet_config)
            else:
                found = _of_modules(raw, config, text_widths)
        # What tensors of any names, shapes and values lead to, here and in diffusers.
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
            re.error,
        ) as error:
            raise UnsupportedAdapter(f"{file.name}: {error}") from error
        changed = {name.partition(".")[0] for name in found.tensors}
        if unknown := changed - set(_PARTS):
            raise UnsupportedAdapter(
                f"{file.name}: changes {', '.join(sorted(unknown))}; supported: {', '.join(_PARTS)}"
            )
        return found

    def check(self, folder: Path) -> None:
        """Looks whether each change has its place in the model of that folder.

        Raises:
            UnsupportedAdapter: naming the tensor that has none.
        """
        for part in self.parts:
            if not (folder / part).is_dir():
                raise UnsupportedAdapter(f"is for a {part}, which the model does not have")
            shapes = {_plain(name): shape for name, shape in find(folder / part).shapes.items()}
            own = self._in_peft_form(part)
            for name, tensor in own.items():
                module = _plain(name)
                for half in _HALVES:
                    module = module.removesuffix(half)
                base = shapes.get(f"{module}.weight")
                # The first half reads the inputs of the layer it changes, the second half gives its outputs.
                is_first = name.endswith(_HALVES[0])
                side = 1 if is_first else 0
                if not name.endswith(_HALVES) or base is None or len(base) != tensor.ndim:
                    raise UnsupportedAdapter(f"{part}.{name} has no place in the model")
                if tensor.shape[side] != base[side]:
                    raise UnsupportedAdapter(
                        f"{part}.{name} is for a layer of width {tensor.shape[side]}; "
                        f"the model's has {base[side]}"
                    )
                half = _HALVES[0] if is_first else _HALVES[1]
                other = own.get(name.removesuffix(half) + _HALVES[is_first])
                if other is None or other.shape[side] != tensor.shape[1 - side]:
                    raise UnsupportedAdapter(f"{part}.{name} lacks its other half, of one rank")

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
        """Adds the adapter under a name to these networks of a model, by part; it is on at once."""
        options = {
            "network_alphas": self.alphas,
            "metadata": self.metadata,
            "adapter_name": name,
            "low_cpu_mem_usage": True,
        }
        with quiet():
            for part in self.parts:
                if part not in networks:
                    continue
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
        """`networks`: the parts of one model by name; outlines are left alone. `files`: its adapters by name."""
        self._networks = networks
        self._here = {part: each for part, each in networks.items() if not is_outline(each)}
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
                widths = {
                    part: network.config.hidden_size
                    for part, network in self._networks.items()
                    if part != "unet"
                }
                config = self._networks["unet"].config
                file = AdapterFile.read(self._files[adapter.name], config, widths)
                try:
                    file.load_into(self._here, self._inner_name(adapter.name))
                except BaseException:
                    # What is half there would stand in the way of the next try.
                    self._forget(self._inner_name(adapter.name))
                    raise
                self._parts[adapter.name] = file.parts
        names = [self._inner_name(adapter.name) for adapter in adapters]
        changed = {part for adapter in adapters for part in self._parts[adapter.name]}
        for part, network in self._here.items():
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

    def _forget(self, inner_name: str) -> None:
        """Takes an adapter out of every network that it got into."""
        for network in self._here.values():
            delete_adapter_layers(network, inner_name)
            getattr(network, "peft_config", {}).pop(inner_name, None)


def digest(file: Path) -> str:
    """sha256 of an adapter's file, and of the config beside it where that says how strong it is; hex."""
    config = file.with_name(_CONFIG)
    if not config.is_file() or not _is_wrapped(tensors(file)):
        return digest_file(file)
    both = f"{digest_file(file)} {digest_file(config)}"
    return hashlib.sha256(both.encode()).hexdigest()


def _is_wrapped(names: Mapping[str, Any]) -> bool:
    return any(name.startswith(_WRAPPED) for name in names)


def _config(file: Path, names: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is said of the LoRA beside its tensors: by PEFT in a file of its own, by diffusers in the same.

    Raises:
        NotAModel, UnsupportedAdapter: it is missing where it is needed, or asks for what cannot be done.
    """
    if _is_wrapped(names):
        if not file.with_name(_CONFIG).is_file():
            raise UnsupportedAdapter(
                f"{file.name}: was saved by PEFT; its {_CONFIG}, which says how strong it is, must lie beside it"
            )
        config = read_config(file.with_name(_CONFIG))
        if (kind := config.get("peft_type", "LORA")) != "LORA":
            raise UnsupportedAdapter(f"{file.name}: is {kind}, says its {_CONFIG}; known: {_FORMS}")
        _check_asked(file, config)
        return config
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA)
    if text is None:
        return None
    config = parse_config(text.encode(), f"{file.name}: its {_METADATA}")
    for part in _PARTS:
        _check_asked(file, _of_part(config, part))
    return config


def _of_part(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a config says of one part; all of it where it is of one alone."""
    if not any(key.startswith(tuple(f"{each}." for each in _PARTS)) for key in config):
        return dict(config)
    prefix = f"{part}."
    return {
        key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)
    }


def _check_asked(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses what would draw something else than its tensors say."""
    if asked := [key for key in _ASKED if config.get(key)]:
        raise UnsupportedAdapter(
            f"{file.name}: asks for {asked[0]}, which is not supported; known: {_FORMS}"
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapter(f"{file.name}: changes biases, which is not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UnsupportedAdapter(
            f"{file.name}: begins as {start}, which changes the model's own weights; convert it to a plain LoRA with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _of_kohya(raw: Mapping[str, torch.Tensor], unet_config: Mapping[str, Any]) -> AdapterFile:
    """A file in kohya's form, by diffusers' own reading."""
    with quiet():
        found, alphas, metadata = Loader.lora_state_dict(
            _without_uneven_alphas(raw)
            if any(name.endswith(".alpha") for name in raw)
            else dict(raw),
            return_lora_metadata=True,
            use_safetensors=True,
            **({"unet_config": unet_config} if unet_config.get("addition_embed_type") else {}),
        )
    return AdapterFile(
        tensors=found, alphas=alphas or None, metadata=metadata, parts=_parts_of(found)
    )


def _of_modules(
    raw: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None,
    text_widths: Mapping[str, int],
) -> AdapterFile:
    """A file whose tensors are named as the modules they change, in PEFT's form and with the scale of each."""
    found: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    bare = _part_of_bare(raw, text_widths)
    for name, tensor in raw.items():
        inner = name.removeprefix(_WRAPPED).replace(".processor.", ".")
        if inner.partition(".")[0] not in _PARTS and bare is not None:
            inner = f"{bare}.{inner}"
        if inner.endswith(".alpha"):
            alphas[inner.removesuffix(".alpha")] = float(tensor)
            continue
        match = _TENSOR.fullmatch(inner)
        if match is None:
            raise ValueError(f"{name} has no place in the model")
        half = match["peft"] or {"down": "A", "up": "B"}[match["side"]]
        # Attention processors of old, whose layer was a list.
        module = re.sub(r"\.to_out$", ".to_out.0", match["module"])
        found[f"{module}.lora_{half}.weight"] = tensor
    parts = _parts_of(found)
    told = {
        f"{part}.{key}": value
        for part in parts
        for key, value in _scales(part, found, alphas, _of_part(config or {}, part)).items()
    }
    return AdapterFile(tensors=found, alphas=None, metadata=told, parts=parts)


def _parts_of(found: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    changed = {name.partition(".")[0] for name in found}
    return tuple(part for part in _PARTS if part in changed)


def _part_of_bare(raw: Mapping[str, torch.Tensor], text_widths: Mapping[str, int]) -> str | None:
    """The part that a file is for which names none; None where it names them."""
    firsts = {name.removeprefix(_WRAPPED).partition(".")[0] for name in raw}
    if not firsts.isdisjoint(_PARTS):
        return None
    if firsts.isdisjoint(_FIRST_OF_TEXT):
        return "unet" if any(first.endswith(("block", "blocks")) for first in firsts) else None
    # Two text encoders call their layers alike; their widths differ.
    widths = {
        tensor.shape[1]
        for name, tensor in raw.items()
        if tensor.ndim == 2 and re.search(r"[qkv]_proj[._].*(lora_A|down)", name)
    }
    fitting = [part for part, width in text_widths.items() if widths == {width}]
    return fitting[0] if fitting else "text_encoder"


def _scales(
    part: str,
    found: Mapping[str, torch.Tensor],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """How strong each module's change is, as PEFT is told: alpha / rank, or alpha / root of rank."""
    ranks = {
        name.removesuffix(_HALVES[1]): tensor.shape[1]
        for name, tensor in found.items()
        if name.startswith(f"{part}.") and name.endswith(_HALVES[1]) and tensor.ndim > 1
    }
    if not ranks:
        return {}
    patterns = config.get("alpha_pattern") or {}
    if (
        not isinstance(patterns, dict)
        or not all(map(_is_strength, patterns.values()))
        or not all(map(_MODULES.fullmatch, patterns))
    ):
        raise ValueError(f"alpha_pattern is {patterns!r}; required: names of modules, and numbers")
    alpha = config.get("lora_alpha")
    if alpha is not None and not _is_strength(alpha):
        raise ValueError(f"lora_alpha is {alpha!r}; required: a number")
    told = {}
    for module, rank in ranks.items():
        inner = module.removeprefix(f"{part}.")
        said = patterns.get(get_pattern_key(list(patterns), inner), alpha)
        told[module] = alphas.get(module, rank if said is None else said)
    rank, scale = (
        Counter(ranks.values()).most_common()[0][0],
        Counter(told.values()).most_common()[0][0],
    )
    return {
        "r": rank,
        "lora_alpha": scale,
        "rank_pattern": {_pattern(part, each): n for each, n in ranks.items() if n != rank},
        "alpha_pattern": {_pattern(part, each): n for each, n in told.items() if n != scale},
        "use_rslora": bool(config.get("use_rslora")),
        "target_modules": [_plain(each.removeprefix(f"{part}.")) for each in ranks],
    }


def _is_strength(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _pattern(part: str, module: str) -> str:
    """A module in PEFT's patterns: of a text encoder, with the level before it or without."""
    inner = re.escape(_plain(module.removeprefix(f"{part}.")))
    return f"^{inner}" if part == "unet" else inner


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
