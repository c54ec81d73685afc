"""A folder in diffusers format: its configs and its parts, read the same way by all who open one.

Main functions: `read_config` and `read_network`. Weights are read as safetensors and never unpickled.
"""

import json
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from services.common.weights import ModelError, NotAModel

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
        config = json.loads(path.read_text())
    except OSError as error:
        raise NotAModel(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise NotAModel(f"{name} is not JSON: {error}") from error
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
        NotAModel: a file is missing or unreadable.
    """
    # While they build a network both libraries change settings of the whole process: torch's default dtype, which
    # others compute with meanwhile, so it is left at single precision; and how modules make their parameters, so one is
    # built at a time. Outside inference mode: weights made in it need no gradient, and torch picks another matrix
    # product for those.
    with _BUILDING, torch.inference_mode(False):
        network = _read(kind, folder, part, torch_dtype=torch.float32, use_safetensors=True)
        # As of any module: diffusers' own `to` warns of parts that it would keep, of which these have none.
        return torch.nn.Module.to(network, dtype).eval()


def _read(kind: Any, folder: Path, part: str | None, **options: Any) -> Any:
    # Nobody watches a server's terminal.
    disable_progress_bar()
    try:
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = f"{folder.name}: {part}" if part else folder.name
        raise NotAModel(f"{where} cannot be loaded: {error}") from error
