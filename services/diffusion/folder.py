"""A folder in diffusers format: its configs and its parts, read the same way by all who open one.

Main functions: `read_config` and `read_part`. Weights are read as safetensors and never unpickled.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from services.common.weights import ModelError, NotAModel


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


def read_part(kind: Any, folder: Path, part: str | None, **options: Any) -> Any:
    """A part of a model in memory, on the CPU, by its class' own `from_pretrained`.

    Args:
        kind: a class of diffusers or transformers.
        folder: the model's.
        part: the part's folder in it; None where `folder` is the part's own.
        options: what else `from_pretrained` is told.

    Raises:
        NotAModel: a file is missing or unreadable.
    """
    # Nobody watches a server's terminal.
    disable_progress_bar()
    if kind is not CLIPTokenizer:
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(folder, subfolder=part, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = f"{folder.name}: {part}" if part else folder.name
        raise NotAModel(f"{where} cannot be loaded: {error}") from error
