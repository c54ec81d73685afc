"""Files that somebody else wrote, read with care: never more than a bound, never outside a folder, never a device.

`document` composes a YAML text, `text`, `picture` and `read` read, `problem_of_picture` looks before anything is read.
This module knows no collage.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import yaml

# A collage of 32 layers, every field set, takes a tenth of each.
MAX_TEXT_BYTES = 2**20
MAX_VALUES = 20_000
MAX_DEPTH = 32
# The contract's.
MAX_PICTURE_BYTES = 64 * 2**20
_RIFF, _WEBP = b"RIFF", b"WEBP"
_SHOWN = 80


class Unreadable(Exception):
    """A file that is not read, and why."""


def text(file: Path, limit_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file. Raises `Unreadable`."""
    try:
        return read(file, limit_bytes).decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable("not UTF-8 text") from None


def picture(file: Path, within: Sequence[Path] | None = None) -> bytes:
    """The bytes of a picture. `within`: as for `problem_of_picture`. Raises `Unreadable`."""
    if problem := problem_of_picture(file, within):
        raise Unreadable(problem)
    return read(file, MAX_PICTURE_BYTES)


def problem_of_picture(file: Path, within: Sequence[Path] | None = None) -> str:
    """Why a file is no picture to be sent; "" where it is one. Reads its first bytes only.

    Args:
        file: a path.
        within: folders; it must lie below one of them, links followed. None for anywhere.
    """
    try:
        if within is not None:
            place = file.resolve()
            if not any(place.is_relative_to(folder.resolve()) for folder in within):
                return f"{shown(str(file))} lies outside of {within[0]}; --allow DIR allows another folder"
        if not file.exists():
            return f"no such picture: {shown(str(file))}"
        head = read(file, MAX_PICTURE_BYTES, only_bytes=12)
    except Unreadable as error:
        return f"{shown(str(file))}: {error}"
    # Names that are too long or hold what no name holds, and links in a circle.
    except (OSError, ValueError, RuntimeError):
        return f"no such picture: {shown(str(file))}"
    is_webp = head.startswith(_RIFF) and head[8:12] == _WEBP
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff")) or is_webp:
        return ""
    return f"{shown(str(file))} is no PNG, JPEG or WebP file"


def read(file: Path, limit_bytes: int, only_bytes: int | None = None) -> bytes:
    """The bytes of an ordinary file, or its first ones. Raises `Unreadable`, too large a file among others."""
    try:
        # Before it is opened: a pipe without a writer would wait.
        found = file.stat()
        if stat.S_ISDIR(found.st_mode):
            raise Unreadable("is a folder")
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("is no ordinary file")
        if found.st_size > limit_bytes:
            raise Unreadable(f"has {found.st_size} bytes; allowed: {limit_bytes}")
        with file.open("rb") as opened:
            return opened.read(limit_bytes if only_bytes is None else only_bytes)
    except OSError as error:
        raise Unreadable(error.strerror or "cannot be read") from error
    except ValueError as error:
        raise Unreadable(str(error)) from error


def document(text: str) -> tuple[yaml.Node | None, yaml.SafeLoader]:
    """The nodes of a YAML text, and what makes values of its scalars. Raises `yaml.YAMLError`, whatever it holds."""
    loader = _Bounded(text)
    return loader.get_single_node(), loader


class _Bounded(yaml.SafeLoader):
    """Composes so many values, so deep, and no more; each use of an alias is a value."""

    _values = _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._values += 1
        if self._values > MAX_VALUES or self._depth >= MAX_DEPTH:
            most = f"{MAX_VALUES} values" if self._values > MAX_VALUES else f"{MAX_DEPTH} levels"
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"more than {most}", problem_mark=mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def shown(value: object) -> str:
    """A value as it may stand in a line of text: cut, and nothing in it that moves a cursor."""
    written = value if isinstance(value, str) else repr(value)
    cut = written if len(written) <= 3 * _SHOWN else f"{written[: 3 * _SHOWN]}…"
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)
