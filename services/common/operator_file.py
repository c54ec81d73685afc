"""A YAML file that an operator writes, read strictly: what is wrong in it is told with its exact place.

Main type: `Place`, a value and the path to it. It knows no file's meaning; only plain data is read, never objects.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from services.common.settings import InvalidSetting

_NAME = r"[A-Za-z0-9_.-]{1,64}"
_NAME_RULE = "1 to 64 of A-Z a-z 0-9 _ . -, in quotes if it looks like a number"

Value = TypeVar("Value")


def read_file(file: Path) -> "Place":
    """The whole content.

    Raises:
        InvalidSetting: no such file, no YAML, or a key that stands twice.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        # Of a key that stands twice the content holds only the last.
        _refuse_doubles(yaml.compose(text, Loader=yaml.SafeLoader), file.name)
    except OSError as error:
        raise InvalidSetting(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidSetting(f"{file}: is no YAML: {error}") from error
    return Place(file, "", content)


def resolve(source: str, folder: Path) -> Path | str:
    """What an operator means by a source: the folder or file of that name, seen from `folder`; else a hub id, the text.

    Asked once, where the text is read: seen from another folder, the same text may mean something else.
    """
    local = (folder / Path(source).expanduser()).absolute()
    return local if local.exists() else source


class Place:
    """A value of a YAML file and the path to it; None for one that is not there."""

    def __init__(self, file: Path, path: str, value: Any) -> None:
        self._file = file
        self._path = path
        self._value = value

    def wrong(self, problem: str) -> InvalidSetting:
        """The error that names this place and its value."""
        shown = "is missing" if self._value is None else f"is {self._value!r}"
        return self._error(f"{shown}; {problem}")

    def _error(self, text: str) -> InvalidSetting:
        where = f"{self._file.name}: {self._path}" if self._path else self._file.name
        return InvalidSetting(f"{where}: {text}")

    def get(self, key: str) -> "Place":
        """What stands under a key."""
        inner = self._value.get(key) if isinstance(self._value, dict) else None
        return Place(self._file, f"{self._path}.{key}" if self._path else key, inner)

    def keys(self, *known: str) -> None:
        """Refuses what is no mapping, or has other keys than these."""
        if self._value is None:
            return
        if not isinstance(self._value, dict):
            raise self.wrong(f"required: a mapping with the keys {', '.join(known)}")
        for key in self._value:
            if key not in known:
                raise self._error(f"has the key {key!r}; allowed: {', '.join(known)}")

    def items(self) -> "list[Place]":
        """The places of a list that holds something."""
        if not isinstance(self._value, list) or not self._value:
            raise self.wrong("required: a list of at least one")
        return [
            Place(self._file, f"{self._path}[{index}]", value)
            for index, value in enumerate(self._value)
        ]

    def optional(self, read: "Callable[[Place], Value]") -> Value | None:
        """What `read` makes of it, None where nothing stands."""
        return None if self._value is None else read(self)

    def name(self) -> str:
        """A name."""
        return self.matching(_NAME, _NAME_RULE)

    def matching(self, pattern: str, rule: str) -> str:
        """A text that matches a regular expression as a whole; `rule` says in words which ones do."""
        if not isinstance(self._value, str) or not re.fullmatch(pattern, self._value, re.ASCII):
            raise self.wrong(f"allowed: {rule}")
        return self._value

    def one_of(self, known: Sequence[str]) -> str:
        """One of these words."""
        if self._value not in known:
            raise self.wrong(f"allowed: {', '.join(known)}")
        return str(self._value)

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        # A bool is an int in Python, and `yes` is a bool in YAML.
        if type(self._value) is not int or not low <= self._value <= high:
            raise self.wrong(f"allowed: a whole number from {low} to {high}")
        return int(self._value)

    def number(self, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        if type(self._value) not in (int, float) or not low <= self._value <= high:
            raise self.wrong(f"allowed: a number from {low:g} to {high:g}")
        return float(self._value)

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self._value, bool):
            raise self.wrong("allowed: true, false")
        return self._value

    def file(self) -> Path:
        """A file, relative to the YAML file; whether it is there shows when it is opened."""
        if not isinstance(self._value, str) or not self._value.strip():
            raise self.wrong("required: a file")
        return self._file.parent / Path(self._value).expanduser()

    def source(self) -> Path | str:
        """A folder or file, relative to the YAML file; or a hub id, where there is no such one. See `resolve`."""
        if not isinstance(self._value, str) or not self._value.strip():
            raise self.wrong("required: a folder, or a hub id OWNER/NAME or OWNER/NAME@REVISION")
        return resolve(self._value, self._file.parent)

    def sources(self) -> dict[str, Path | str]:
        """Sources by name; none where nothing stands."""
        return {name: place.source() for name, place in self.named().items()}

    def named(self) -> "dict[str, Place]":
        """The places of a mapping by name; none where nothing stands."""
        if self._value is None:
            return {}
        if not isinstance(self._value, dict):
            raise self.wrong("required: a mapping of names")
        for name in self._value:
            if not isinstance(name, str) or not re.fullmatch(_NAME, name, re.ASCII):
                raise self._error(f"has the name {name!r}; allowed: {_NAME_RULE}")
        return {name: self.get(name) for name in self._value}


def _refuse_doubles(node: yaml.Node | None, file: str) -> None:
    """Refuses a key that stands twice in one mapping, anywhere below `node`."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_doubles(child, file)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, child in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InvalidSetting(f"{file}: line {line}: the key {key.value!r} stands twice")
            seen.add(key.value)
            _refuse_doubles(child, file)
