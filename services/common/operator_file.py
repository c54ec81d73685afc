"""A YAML file that an operator writes, read strictly: what is wrong in it is told with its exact place.

Main type: `Place`, a value and the path to it. It knows no file's meaning; only plain data is read, never objects.
"""

import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from services.common.settings import InvalidSetting

_NAME = r"[A-Za-z0-9_.-]{1,64}"
_NAME_RULE = "1 to 64 of A-Z a-z 0-9 _ . -, in quotes if it looks like a number"
# How a source is told that is no path: OWNER/NAME, or OWNER/NAME@REVISION, behind it.
HUB = "hub:"
# A file of a hundred models takes a fifth of each.
_MAX_BYTES = 2**20
_MAX_VALUES = 10_000
_MAX_DEPTH = 32
_MAX_SHOWN = 200

Value = TypeVar("Value")


def read_file(file: Path) -> "Place":
    """The whole content.

    Raises:
        InvalidSetting: no such file, no YAML, or a key that stands twice.
    """
    try:
        found = file.stat()
        # Before it is opened: a pipe would wait, a device has no end.
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise InvalidSetting(f"{file}: is no ordinary file")
        if found.st_size > _MAX_BYTES:
            raise InvalidSetting(f"{file}: has more than {_MAX_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
        # Of a key that stands twice the content holds only the last.
        _refuse_doubles(yaml.compose(text, Loader=_Bounded), file.name)
        content = yaml.load(text, Loader=_Bounded)
    except OSError as error:
        raise InvalidSetting(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidSetting(f"{file}: is no YAML: {error}") from error
    return Place(file, "", content)


class _Bounded(yaml.SafeLoader):
    """Composes so many values, so deep, and no more. Of an alias each use counts all that it stands for."""

    _depth = _values = 0

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._depth >= _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_DEPTH} levels", problem_mark=mark)
        # As they come: the size of a list is known only when its last value has been read.
        self._values += 1
        if self._values > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES} values", problem_mark=mark)
        self._depth += 1
        try:
            node = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [each for pair in node.value for each in pair]
        # Within itself a value has no size yet: it has no end.
        size = 1 + sum(self._sizes.get(id(part), _MAX_VALUES) for part in parts)
        if size > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES} values", problem_mark=mark)
        self._sizes[id(node)] = size
        return node


def cut(text: str) -> str:
    """A text as it may stand in a message."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def resolve(source: str, folder: Path) -> Path | str:
    """What an operator means by a source: a folder or file, seen from `folder`; or a hub's, the text as it stands.

    Asked once, where the text is read: seen from another folder, the same text may mean something else.

    Raises:
        InvalidSetting: no path can be so.
    """
    if source.startswith(HUB):
        return source
    try:
        if "\0" in source:
            raise ValueError("it holds a NUL")
        path = (folder / Path(source).expanduser()).absolute()
        path.exists()
    # Longer than a name may be, with what none may hold, or of a user who is not there.
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidSetting(f"{cut(source)}: is no path: {cut(str(error))}") from None
    return path


class Place:
    """A value of a YAML file and the path to it; None for one that is not there."""

    def __init__(self, file: Path, path: str, value: Any) -> None:
        self._file = file
        self._path = path
        self._value = value

    def wrong(self, problem: str) -> InvalidSetting:
        """The error that names this place and its value."""
        shown = "is missing" if self._value is None else f"is {cut(repr(self._value))}"
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
                raise self._error(f"has the key {cut(repr(key))}; allowed: {', '.join(known)}")

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
        """A folder or file, relative to the YAML file; or what `hub:` names. See `resolve`."""
        if not isinstance(self._value, str) or not self._value.strip():
            raise self.wrong(f"required: a folder, or {HUB}OWNER/NAME@REVISION")
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
                raise self._error(f"has the name {cut(repr(name))}; allowed: {_NAME_RULE}")
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
                raise InvalidSetting(
                    f"{file}: line {line}: the key {cut(repr(key.value))} stands twice"
                )
            seen.add(key.value)
            _refuse_doubles(child, file)
