"""How large a file may be, and every part of it: all checked on heads and lists, before anything is unpacked.

`Tally` counts what the parts take together. A field of a file is written `file`, `file[data/1.png]` for an entry of an
archive, `file.layers[3].opacity` for what stands in a PSD.
"""

from interchange.asking import MAX_FILE_BYTES as MAX_FILE_BYTES
from services.common import limits
from services.common.errors import InvalidRequest
from services.common.field import Field
from services.common.pictures import MAX_ENCODED_BYTES, MAX_PIXELS

# Entries of an archive: a collage of 32 layers with all their control pictures has some 300.
MAX_ENTRIES = 1000
# Of an archive's list of entries, looked at before it is read.
MAX_DIRECTORY_BYTES = 2**19
MAX_NAME_CHARACTERS = 200
# One entry unpacked, and all of them.
MAX_ENTRY_BYTES = MAX_ENCODED_BYTES
MAX_UNPACKED_BYTES = 640 * 2**20
# Unpacked bytes to a packed one, of an entry above a megabyte. Pictures are packed already.
MAX_RATIO, RATIO_FROM_BYTES = 100, 2**20
# A description of layers: 32 of them with all their words and dials take a tenth.
MAX_XML_BYTES = 2**20
MAX_ELEMENTS = 1000
MAX_DEPTH = 32
# A canvas of another tool; it is made smaller to what the contract allows.
MAX_CANVAS_SIDE, MAX_CANVAS_PIXELS = 30_000, 64_000_000
# Layers that a file may list: groups, marks of their ends, and what holds no pixels count.
MAX_LISTED = 1000
# Those that become layers of a collage.
MAX_LAYERS = limits.MAX_LAYERS
# The contract's, of one layer; and of all together, with what is none in the end.
MAX_LAYER_PIXELS = MAX_PIXELS
MAX_ALL_PIXELS = MAX_LAYERS * MAX_LAYER_PIXELS
# How far from the canvas a layer may stand, each way.
MAX_OFFSET = 100_000
# All pictures of a collage, encoded.
MAX_COLLAGE_BYTES = 128 * 2**20

FILE = Field("file")


def entry(name: str) -> Field:
    """The field of an archive's entry."""
    shown = "".join(each if each.isprintable() else "?" for each in name[:80])
    return Field(f"file[{shown}]")


class Tally:
    """Adds up pixels and bytes of pictures, and refuses the one that is too large or one too many."""

    def __init__(self) -> None:
        self.pixels = 0
        self.held_bytes = 0

    def add(self, field: Field | str, width: int, height: int) -> None:
        """Counts a picture of that size in pixels.

        Raises:
            InvalidRequest: it is too large, or all are.
        """
        if width < 1 or height < 1 or width * height > MAX_LAYER_PIXELS:
            raise InvalidRequest.of(
                field, f"is {width} x {height} pixels; allowed: from 1 to {MAX_LAYER_PIXELS} pixels"
            )
        self.pixels += width * height
        if self.pixels > MAX_ALL_PIXELS:
            raise InvalidRequest.of(
                field,
                f"brings all layers to {self.pixels} pixels; allowed: at most {MAX_ALL_PIXELS}",
            )

    def hold(self, field: Field | str, size_bytes: int) -> None:
        """Counts an encoded picture of the collage, each time that it is in it.

        Raises:
            InvalidRequest: all are too large.
        """
        self.held_bytes += size_bytes
        if self.held_bytes > MAX_COLLAGE_BYTES:
            raise InvalidRequest.of(
                field,
                f"brings all pictures to {self.held_bytes} bytes; allowed: at most {MAX_COLLAGE_BYTES}",
            )


def check_canvas(field: Field, width: int, height: int) -> None:
    """Refuses a canvas that no picture is drawn on, or that is too large to look at."""
    for name, side in (("width", width), ("height", height)):
        if not limits.MIN_SIDE <= side <= MAX_CANVAS_SIDE:
            raise InvalidRequest.of(
                field[name], f"is {side}; allowed: from {limits.MIN_SIDE} to {MAX_CANVAS_SIDE}"
            )
    if width * height > MAX_CANVAS_PIXELS:
        raise InvalidRequest.of(
            field, f"is {width} x {height} pixels; allowed: at most {MAX_CANVAS_PIXELS} pixels"
        )


def check_count(field: Field, count: int) -> None:
    """Refuses a number of layers that no collage has."""
    if not 1 <= count <= MAX_LAYERS:
        raise InvalidRequest.of(
            field,
            f"has {count} layers with pixels; allowed: from 1 to {MAX_LAYERS}, merge some and save again",
        )


def check_place(field: Field, left: int, top: int) -> None:
    """Refuses a layer that stands far from any canvas."""
    if max(abs(left), abs(top)) > MAX_OFFSET:
        raise InvalidRequest.of(
            field, f"stands at {left}, {top}; allowed: up to {MAX_OFFSET} pixels from the corner"
        )
