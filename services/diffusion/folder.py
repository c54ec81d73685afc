"""A folder in diffusers format: its configs and its parts, read the same way by all who open one.

Main functions: `read_config` and `read_network`. Weights are read as safetensors and never unpickled.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.logging import disable_progress_bar

from services.common.weights import ModelError, NotAModel, find, other_kind
from services.diffusion import device

_BUILDING = threading.Lock()


class UnsupportedModel(ModelError):
    """A whole model, but of a kind that cannot be run here."""


def read_config(path: Path) -> dict[str, Any]:
    """A part's config.

    Raises:
        NotAModel: it is missing, or no JSON object.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotAModel(f"{name} cannot be read: {error.strerror}") from error
    return parse_config(content, name)


def parse_config(content: bytes, name: str) -> dict[str, Any]:
    """A config's values.

    Args:
        content: as it was read.
        name: what messages call it.

    Raises:
        NotAModel: it is something else.
    """
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotAModel(f"{name} {other_kind(content) or f'is not JSON: {error}'}") from error
    if not isinstance(config, dict):
        raise NotAModel(f"{name} is not a JSON object")
    return config


def read_tokenizer(folder: Path, part: str) -> CLIPTokenizer:
    """A tokenizer of a model.

    Raises:
        NotAModel: a file is missing or unreadable.
    """
    return _read(CLIPTokenizer, folder, part)


def read_network(kind: Any, folder: Path, part: str | None, *, dtype: torch.dtype) -> Any:
    """A network of a model, in evaluation mode on the CPU, by its class' own `from_pretrained`.

    Args:
        kind: a class of diffusers or transformers.
        folder: the model's.
        part: the network's folder in it; None where `folder` is the network's own.
        dtype: of its weights.

    Raises:
        NotAModel: a file is missing, damaged or something else, or a tensor is missing or of another shape.
    """
    own = folder / part if part else folder
    found = find(own)
    # They are built before their weights are looked at, one by one.
    for key, value in read_config(own / "config.json").items():
        if "layers" in key and (layers := _most(value)) > len(found.shapes):
            raise NotAModel(
                f"{_where(folder, part)} cannot be loaded: its config's {key} says {layers} layers, of which its "
                f"weights have {len(found.shapes)} tensors"
            )
    # While they build a network both libraries change settings of the whole process: torch's default dtype, which
    # others compute with meanwhile, so it is left at single precision; and how modules make their parameters, so one is
    # built at a time. Outside inference mode: weights made in it need no gradient, and torch picks another matrix
    # product for those.
    with _BUILDING, torch.inference_mode(False), quiet():
        network, report = _read(
            kind,
            folder,
            part,
            torch_dtype=torch.float32,
            use_safetensors=True,
            variant=found.variant,
            output_loading_info=True,
            # Both would make up what is missing, or tell what does not fit in no words of ours.
            ignore_mismatched_sizes=True,
        )
        if problem := _told_of(report):
            raise NotAModel(f"{_where(folder, part)} cannot be loaded: {problem}")
        # As of any module: diffusers' own `to` warns of parts that it would keep, of which these have none.
        return torch.nn.Module.to(network, dtype).eval()


def outline_network(kind: Any, folder: Path, part: str) -> Any:
    """A network without its weights: its config and shapes, on torch's meta device, where nothing is computed.

    Args:
        kind: a class of diffusers or transformers.
        folder: the model's.
        part: the network's folder in it.

    Raises:
        NotAModel: its config is missing, or none of such a network.
    """
    read_config(folder / part / "config.json")
    with _BUILDING, torch.inference_mode(False), quiet(), torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder, subfolder=part)).eval()
        return kind(kind.config_class.from_pretrained(folder, subfolder=part)).eval()


def is_outline(network: torch.nn.Module) -> bool:
    """Whether it is an outline, see `outline_network`."""
    return next(network.parameters()).device.type == "meta"


def _told_of(report: Mapping[str, Any]) -> str | None:
    """What is wrong with weights as a library found them; None where each tensor had its place."""
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"its weights lack {missing[0]}{more}, which its config asks for"
    if misfits := sorted(report["mismatched_keys"]):
        name, held, wanted = misfits[0]
        return f"its weights hold {name} of shape {list(held)}; its config asks for {list(wanted)}"
    return "; ".join(report["error_msgs"]) or None


def _most(value: Any) -> int:
    """The largest whole number of a config's value, which may be a list of them, or lists."""
    if isinstance(value, list):
        return max(map(_most, value), default=0)
    return value if type(value) is int else 0


def _where(folder: Path, part: str | None) -> str:
    return f"{folder.name}: {part}" if part else folder.name


def _read(kind: Any, folder: Path, part: str | None, **options: Any) -> Any:
    # Nobody watches a server's terminal.
    disable_progress_bar()
    try:
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
    except Exception as error:
        if device.is_out_of_memory(error):
            raise
        # What a library says of a config of any content; they document no closed set.
        problem = str(error).strip() or type(error).__name__
        raise NotAModel(f"{_where(folder, part)} cannot be loaded: {problem}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries from printing what they did not find: we look closer before and after."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
