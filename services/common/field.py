"""Where a field stands in a request, as a value: written `collage.layers[3].noise` when a caller is told of it.

Main type: `Field`. What stands in a message of one service may have come from another message of the caller's:
`Places` says which place is which, so that an error is told at the caller's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """A place in a request; the empty one is the request itself. `field["layers"][3]["noise"]` goes down."""

    text: str = ""

    def __getitem__(self, part: str | int) -> "Field":
        """The part of that name, or the element of that index."""
        if isinstance(part, int):
            return Field(f"{self.text}[{part}]")
        return self.below(part)

    def below(self, path: str) -> "Field":
        """The place whose path, seen from here, is `path`; an empty path is here."""
        separator = "." if self.text and path and not path.startswith("[") else ""
        return Field(f"{self.text}{separator}{path}")

    def __str__(self) -> str:
        return self.text


# Places of one request by the paths they have in another.
Places = Mapping[str, Field]


def moved(path: str, places: Places) -> str:
    """A path in one request as its place in another: that of the longest part that is known, and what lies below it."""
    inner = (end for end in reversed(range(len(path))) if path[end] in ".[")
    for end in (len(path), *inner):
        if path[:end] in places:
            return str(places[path[:end]].below(path[end:].removeprefix(".")))
    return path
