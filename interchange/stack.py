"""Layers that stand in a file of any tool, gathered into a collage: `Found` and `Stack`.

Names are made unique, groups were flattened by whoever reads the file, blend modes are rendered, and a canvas larger
than the contract's is made smaller. Whatever is not as it was is told as a warning.

Suffixes: H, W picture pixels; 4 = R, G, B, A.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from collage.v1 import collage_pb2
from interchange import bounds
from interchange.blending import NORMAL, Backdrop, is_known
from services.common import limits
from services.common.pictures import encode_png

# What stands in a file of ours beside the layers. Other tools keep names and drop what they do not know.
RESULT_NAME, BACKGROUND_NAME = "Collage Diffusion: result", "Collage Diffusion: background"
# Of the PNGs that are made: a third of the time that the smallest would take.
COMPRESS_LEVEL = 2
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_NAME_CHARACTERS = 64
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The pixels of a layer, HW4 with straight alpha, and the encoded file that they came from if it will do.

    notes: what of the layer is not kept, a reason and a sentence each.
    """

    pixels_HW4: NDArray[np.uint8]
    encoded: bytes = b""
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A layer as it stands in a file; left and top are of its picture, in pixels of the canvas.

    mode: a blend mode's name, see `blending`.
    draw: decodes it.
    notes: what of the file is not kept, a reason and a sentence each.
    settings: what a file of ours says of the layer; it has words, so its name is none.
    is_kept: whether its picture is as we wrote it, so that the transform and the picture of the settings count.
    """

    place: str
    name: str
    left: int
    top: int
    draw: Callable[[], Drawn]
    opacity: float | None = None
    visible: bool | None = None
    mode: str = NORMAL
    notes: tuple[tuple[str, str], ...] = ()
    settings: collage_pb2.Layer = field(default_factory=collage_pb2.Layer)
    is_ours: bool = False
    is_kept: bool = False


class Stack:
    """A collage in the making; layers are laid from the bottom up.

    Args:
        width: of the file's canvas, pixels.
        height: of it.
        is_blended: whether any layer is of another mode than normal, so that what lies below is of interest.
    """

    def __init__(self, width: int, height: int, *, is_blended: bool) -> None:
        self.collage = collage_pb2.Collage()
        self.warnings: list[collage_pb2.Warning] = []
        self._scale = min(1.0, limits.MAX_SIDE / max(width, height))
        self._names: set[str] = set()
        self.tally = bounds.Tally()
        self._backdrop = Backdrop(width, height) if is_blended else None
        size = self.collage.size
        size.width = max(limits.MIN_SIDE, round(width * self._scale))
        size.height = max(limits.MIN_SIDE, round(height * self._scale))
        if self._scale < 1:
            self.warn(
                "CANVAS_SMALLER",
                "collage.size",
                f"the canvas is {width} x {height}; it and all layers are made smaller, to "
                f"{size.width} x {size.height}",
            )

    def warn(self, reason: str, where: str, message: str) -> None:
        """Tells of something that is not as it stands in the file."""
        shown = "".join(each if each.isprintable() else " " for each in message[:400])
        self.warnings.append(collage_pb2.Warning(reason=reason, field=where, message=shown))

    def lay(self, found: Found) -> None:
        """Lays the next layer over those so far, or tells why it is none.

        Raises:
            InvalidRequest: its picture is damaged, or all are too large.
        """
        drawn = found.draw()
        if not found.is_ours and not drawn.pixels_HW4[..., 3].any():
            for reason, message in drawn.notes:
                self.warn(reason, found.place, message)
            self.warn("LAYER_EMPTY", found.place, f"layer {found.name!r} is empty and left out")
            return
        where = f"collage.layers[{len(self.collage.layers)}]"
        for reason, message in (*found.notes, *drawn.notes):
            self.warn(reason, where, message)
        layer = self.collage.layers.add()
        layer.CopyFrom(found.settings)
        layer.name = self._named(found.name)
        if not found.is_ours:
            layer.text = self._words(found.name, layer.name)
        if found.opacity is not None:
            layer.opacity = found.opacity
        if found.visible is not None:
            layer.visible = found.visible
        if not found.is_kept:
            layer.image.data = self._rendered(found, drawn, where)
            layer.transform.CopyFrom(self._transform(found, drawn.pixels_HW4))
        else:
            self._lay(found, drawn.pixels_HW4)
        self.tally.hold(found.place, len(layer.image.data))

    def _rendered(self, found: Found, drawn: Drawn, where: str) -> bytes:
        pixels_HW4, encoded = drawn.pixels_HW4, drawn.encoded
        if found.mode != NORMAL:
            known = is_known(found.mode) and self._backdrop is not None
            if known and self._backdrop is not None:
                pixels_HW4 = self._backdrop.rendered(pixels_HW4, found.left, found.top, found.mode)
                encoded = b""
            told = "rendered into its colours" if known else "unknown here: it is drawn as normal"
            self.warn(
                "BLEND_MODE", where, f"layer {found.name!r} has blend mode {found.mode}, {told}"
            )
        self._lay(found, pixels_HW4)
        return encoded or encode_png(pixels_HW4, compress_level=COMPRESS_LEVEL)

    def _lay(self, found: Found, pixels_HW4: NDArray[np.uint8]) -> None:
        """Where anybody looks at what lies below."""
        if self._backdrop is not None and found.visible is not False:
            opacity = 1.0 if found.opacity is None else found.opacity
            self._backdrop.lay(pixels_HW4, found.left, found.top, opacity)

    def _transform(self, found: Found, pixels_HW4: NDArray[np.uint8]) -> collage_pb2.Transform:
        height, width = pixels_HW4.shape[:2]
        made = collage_pb2.Transform(
            x=(found.left + width / 2) * self._scale, y=(found.top + height / 2) * self._scale
        )
        if self._scale < 1:
            made.scale = self._scale
        return made

    def _named(self, name: str) -> str:
        """The name as the contract has it, and as no other layer has it."""
        plain = name
        if not _NAME.fullmatch(name):
            letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
            plain = re.sub(r"[^A-Za-z0-9_-]+", "-", letters).strip("-_")[:_NAME_CHARACTERS]
            plain = plain or f"layer-{len(self._names) + 1}"
        number, unique = 1, plain
        while unique in self._names:
            number += 1
            ending = f"-{number}"
            unique = plain[: _NAME_CHARACTERS - len(ending)] + ending
        self._names.add(unique)
        return unique

    def _words(self, name: str, fallback: str) -> str:
        text = _CONTROL.sub(" ", name).strip()[: limits.MAX_TEXT_CHARACTERS].strip()
        return text or fallback
