"""Where a model lies: in a folder, or on a hub from which it is fetched.

The hub's client is imported with the first source that needs it: who serves folders needs none.
"""

from collections.abc import Sequence
from pathlib import Path

from services.common.operator_file import HUB
from services.common.weights import (
    ADAPTER_FILES,
    MODEL_FILES,
    PICKLED,
    SECOND_COPIES,
    VARIANTS,
    NotAModel,
    told_of_file,
    without_weights,
)


def locate(source: Path | str, files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model, fetched from the hub where the source says so.

    Args:
        source: a folder, or as a text `hub:owner/name` or `hub:owner/name@revision` (a branch, a tag or a commit).
            Without `hub:` nothing is fetched: a mistyped folder may have the form of a stranger's repository.
        files: patterns of what is fetched.

    Raises:
        NotAModel: there is no such folder, and the hub does not know it either; or it is a file.
    """
    if isinstance(source, Path):
        if source.is_file():
            raise NotAModel(told_of_file(source))
        if not source.is_dir():
            raise NotAModel(
                f"{source}: no such folder; a model on a hub is told as {HUB}OWNER/NAME@REVISION"
            )
        return source
    name, _, revision = source.removeprefix(HUB).partition("@")
    parts = name.split("/")
    if not source.startswith(HUB) or len(parts) != 2 or not all(parts):
        raise NotAModel(f"{source}: no such folder, and not of the form {HUB}OWNER/NAME@REVISION")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise NotAModel(
            f"{source}: models are fetched from a hub only where huggingface_hub is installed"
        ) from error

    def fetch(patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )

    try:
        folder = fetch(files, SECOND_COPIES)
        for variant in VARIANTS:
            if bare := without_weights(folder, files):
                fetch([f"{Path(part) / f'*.{variant}'}[.-]*" for part in bare])
        return folder
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise NotAModel(f"{source}: the hub says: {error}") from error


def locate_adapter(source: Path | str) -> Path:
    """The safetensors file of an adapter.

    Args:
        source: the file; or a folder or a hub's, as `locate` takes it, that holds one such file.

    Raises:
        NotAModel: no such file or folder, or not one file in it.
    """
    if isinstance(source, Path) and source.is_file():
        if source.suffix in PICKLED:
            raise NotAModel(
                f"{source}: is not a .safetensors file but a pickled one, which may run any code when it is read; "
                "convert it where you trust it"
            )
        if source.suffix != ".safetensors":
            raise NotAModel(f"{source}: is not a .safetensors file")
        return source
    found = sorted(locate(source, ADAPTER_FILES).glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise NotAModel(f"{source}: must hold one .safetensors file; it holds: {names}")
    return found[0]
