"""PSD and PSB files: `read` makes a collage of one, `written` a PSD of a collage's rendered layers.

`Outline` looks at what a file claims before psd-tools reads it: the canvas, and every layer's rectangle and channels.

Suffixes: H, W picture pixels; 4 = R, G, B, A.
"""

import logging
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from psd_tools import ParseLimitError, ParseLimits, PSDImage
from psd_tools.composite.utils import has_fill
from psd_tools.composite.vector import draw_vector_mask
from psd_tools.compression import PSDDecompressionWarning
from psd_tools.constants import BlendMode, ChannelID, ColorMode, Compression

from collage.v1 import collage_pb2
from interchange import bounds
from interchange.blending import NORMAL
from interchange.bounds import FILE, Tally
from interchange.drawing import Scene, opaque, set_background
from interchange.stack import BACKGROUND_NAME, RESULT_NAME, Drawn, Found, Stack
from services.common.errors import InvalidRequest
from services.common.field import Field

SIGNATURE = b"8BPS"
_LAYERS = Field("file")["layers"]
# One of 16 or 32 bits keeps its layers in a block of these names.
_DEEP = (b"Lr16", b"Lr32", b"Layr")
# Blocks whose lengths have 8 bytes in a PSB.
_LONG: tuple[bytes, ...] = (
    b"LMsk",
    b"Lr16",
    b"Lr32",
    b"Layr",
    b"Mt16",
    b"Mt32",
    b"Mtrn",
    b"Alph",
    b"FMsk",
)
_LONG += (b"lnk2", b"FEid", b"FXid", b"PxSD", b"lnkE", b"pths")
_MODES = frozenset(ColorMode) - {ColorMode.MULTICHANNEL}
_MAX_CHANNELS = 56
# Of objects and nesting that psd-tools reads: texts and effects of a layer have some thousands.
_LIMITS = ParseLimits(
    max_objects=500_000, max_nesting_depth=32, max_total_bytes=4 * bounds.MAX_FILE_BYTES
)
# What psd-tools may take for the pixels of one layer, its copies counted.
_ALLOCATED_BYTES = 2**30
_MAX_GROUPS = 32
# Kinds of layers that say what they look like, and may have no pixels.
_PAINTED = ("shape", "solidcolorfill", "gradientfill", "patternfill")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer with what its groups give it, and the one it is cut to.

    is_painted: whether it has no pixels, so that what it says of itself is painted.
    """

    layer: Any
    opacity: float
    visible: bool
    masks: tuple[Any, ...]
    base: Any
    is_painted: bool
    notes: tuple[tuple[str, str], ...]


class Outline:
    """What a file says of itself: its canvas, and the rectangles of its layers.

    Raises:
        InvalidRequest: anything in it is larger than allowed, or longer than the file.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        if len(data) < 26:
            raise InvalidRequest.of(FILE, f"has {len(data)} bytes; a PSD has 26 and more")
        version, channels = self._get(">H", 4), self._get(">H", 12)
        self.height, self.width = self._get(">I", 14), self._get(">I", 18)
        depth, mode = self._get(">H", 22), self._get(">H", 24)
        if version not in (1, 2):
            raise InvalidRequest.of(FILE["version"], f"is {version}; allowed: 1 (PSD), 2 (PSB)")
        if not 1 <= channels <= _MAX_CHANNELS:
            raise InvalidRequest.of(
                FILE["channels"], f"is {channels}; allowed: from 1 to {_MAX_CHANNELS}"
            )
        if depth not in (1, 8, 16, 32):
            raise InvalidRequest.of(FILE["depth"], f"is {depth}; allowed: 1, 8, 16, 32")
        if mode not in _MODES:
            names = ", ".join(sorted(each.name for each in _MODES))
            raise InvalidRequest.of(FILE["mode"], f"is {mode}; allowed: {names}")
        bounds.check_canvas(FILE, self.width, self.height)
        self._is_large = version == 2
        self._tally = Tally()
        at = self._section(26, 4, FILE["color_mode_data"])
        at = self._section(at, 4, FILE["resources"])
        end = self._section(at, 8 if self._is_large else 4, FILE["layers"])
        start = at + (8 if self._is_large else 4)
        self.layers = self._layers(start, end)

    def _get(self, form: str, at: int) -> int:
        if at + struct.calcsize(form) > len(self._data):
            raise InvalidRequest.of(FILE, "is cut short")
        value: int = struct.unpack_from(form, self._data, at)[0]
        return value

    def _length(self, at: int, is_long: bool) -> tuple[int, int]:
        """A length, and where what has it begins."""
        return (self._get(">Q", at), at + 8) if is_long else (self._get(">I", at), at + 4)

    def _section(self, at: int, size: int, field: Field) -> int:
        length, start = self._length(at, size == 8)
        if start + length > len(self._data):
            left = len(self._data) - start
            raise InvalidRequest.of(
                field, f"is said to have {length} bytes; the file has {left} more"
            )
        return start + length

    def _layers(self, at: int, end: int) -> int:
        """How many layers are listed; all of them looked at."""
        if at >= end:
            return 0
        length, start = self._length(at, self._is_large)
        if start + length > end:
            raise InvalidRequest.of(_LAYERS, f"are said to have {length} bytes; too many")
        if length:
            return self._records(start, start + length)
        at = start + length
        if at + 4 <= end:
            at += 4 + self._get(">I", at)
        while at + 12 <= end:
            key = self._data[at + 4 : at + 8]
            length, start = self._length(at + 8, self._is_large and key in _LONG)
            if start + length > end:
                break
            if key in _DEEP and length >= 2:
                return self._records(start, start + length)
            at = start + length + (-length) % 4
        return 0

    def _records(self, at: int, end: int) -> int:
        count = abs(self._get(">h", at))
        if count > bounds.MAX_LISTED:
            raise InvalidRequest.of(
                _LAYERS, f"lists {count} layers; allowed: at most {bounds.MAX_LISTED}"
            )
        at += 2
        claimed = 0
        for index in range(count):
            field = _LAYERS[index]
            self._rectangle(at, field)
            channels = self._get(">H", at + 16)
            if channels > _MAX_CHANNELS:
                raise InvalidRequest.of(
                    field, f"has {channels} channels; allowed: at most {_MAX_CHANNELS}"
                )
            at += 18
            for _ in range(channels):
                length, at = self._length(at + 2, self._is_large)
                claimed += length
            if claimed > end - at:
                raise InvalidRequest.of(
                    field, f"brings the layers to {claimed} bytes; there are {end - at}"
                )
            extra = self._get(">I", at + 12)
            at += 16
            if at + extra > end:
                raise InvalidRequest.of(field, f"is said to have {extra} bytes; too many")
            if extra >= 4 and self._get(">I", at) >= 16:
                self._rectangle(at + 4, field["mask"])
            at += extra
        return count

    def _rectangle(self, at: int, field: Field) -> None:
        top, left, bottom, right = (self._get(">i", at + 4 * number) for number in range(4))
        bounds.check_place(field, left, top)
        if right > left and bottom > top:
            self._tally.add(field, right - left, bottom - top)


def read(data: bytes) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
    """The collage of a PSD file, and what of the file is not in it.

    Raises:
        InvalidRequest: at the place of the file that is wrong.
    """
    outline = Outline(data)
    # It writes to the log what it thinks of a file; what counts is told as a warning of ours.
    logging.getLogger("psd_tools").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pixels that cannot be unpacked would be black.
            warnings.simplefilter("error", PSDDecompressionWarning)
            return _collage(data, outline)
    except (InvalidRequest, MemoryError):
        raise
    except ParseLimitError as error:
        raise InvalidRequest.of(FILE, f"holds too much: {error}") from error
    # Foreign bytes meet a parser that documents no closed set of what it raises over damaged ones.
    except Exception as error:
        raise InvalidRequest.of(
            FILE,
            f"cannot be read as a PSD ({type(error).__name__}); allowed: a whole PSD or PSB file",
        ) from error


def written(collage: collage_pb2.Collage, result: bytes = b"") -> bytes:
    """A PSD file of pixel layers, for tools; what of a collage is no pixel is not in it, see `ora` and `folder`.

    Args:
        collage: its pictures inline.
        result: the drawn picture, of the canvas' size; none where it is empty.

    Raises:
        InvalidRequest: at the field that no file can be made of.
    """
    scene = Scene(collage, result)
    size = (collage.size.width, collage.size.height)
    file = PSDImage.new("RGBA", size)
    if result:
        _add(file, RESULT_NAME, scene.result_HW4)
    # From the top down: one at a time is held as pixels.
    for sheet in scene.sheets():
        layer = _add(
            file,
            collage.layers[sheet.index].name,
            sheet.pixels_HW4,
            left=sheet.left,
            top=sheet.top,
            opacity=round(scene.opacity(sheet.index) * 255),
        )
        layer.visible = scene.is_visible(sheet.index)
    _add(file, BACKGROUND_NAME, opaque(scene.under_HW3))
    merged_HW4 = scene.result_HW4 if result else opaque(scene.composite_HW3())
    return _bytes(file, merged_HW4)


def _add(file: Any, name: str, pixels_HW4: NDArray[np.uint8], **options: Any) -> Any:
    """A layer below all others."""
    layer = file.create_pixel_layer(Image.fromarray(pixels_HW4), name=name, **options)
    return layer.move_to(file, index=0)


def _bytes(file: Any, merged_HW4: NDArray[np.uint8]) -> bytes:
    """The file with this picture of all its layers.

    `save` would blend them again for it, which takes longer than all the rest; so the record is written that it writes.
    """
    record = file._record
    record.image_data.compression = Compression.RLE
    planes = [np.ascontiguousarray(merged_HW4[..., plane]).tobytes() for plane in range(4)]
    record.image_data.set_data(planes, record.header)
    made = BytesIO()
    record.write(made)
    return made.getvalue()


def _collage(
    data: bytes, outline: Outline
) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
    file = PSDImage.open(BytesIO(data), parse_limits=_LIMITS, max_alloc_bytes=_ALLOCATED_BYTES)
    left_out: list[tuple[str, str, str]] = []
    layers = list(_flattened(file, 1.0, True, (), (), left_out, 0))
    result = _taken(layers, -1, RESULT_NAME)
    background = _taken(layers, 0, BACKGROUND_NAME)
    if len(layers) > bounds.MAX_LAYERS:
        bounds.check_count(_LAYERS, len(layers))
    is_blended = any(_mode(each.layer) != NORMAL for each in layers)
    stack = Stack(file.width, file.height, is_blended=is_blended)
    for reason, name, told in left_out:
        stack.warn(reason, str(_LAYERS), f"layer {name!r} {told}")
    if file.depth > 8:
        stack.warn("DEPTH", str(FILE["depth"]), f"{file.depth} bits a channel are made 8")
    if result:
        stack.warn("RESULT_LEFT_OUT", str(_LAYERS), "the drawn picture is no layer")
    if background:
        _read_background(background, stack.collage)
    for each in layers:
        stack.lay(_found(each))
    if not stack.collage.layers:
        _lay_flat(file, stack, is_listed=bool(outline.layers))
    return stack.collage, stack.warnings


def _lay_flat(file: Any, stack: Stack, *, is_listed: bool) -> None:
    """Lays the whole picture as the one layer."""
    if is_listed:
        stack.warn("FLAT", str(_LAYERS), "no layer has pixels; the whole picture is taken")
    Tally().add(FILE, file.width, file.height)
    picture = file.topil()
    if picture is not None:
        drawn = _drawn(picture, None)
        stack.lay(Found(place=str(FILE), name="picture", left=0, top=0, draw=lambda: drawn))
    if not stack.collage.layers:
        bounds.check_count(_LAYERS, 0)


def _flattened(
    group: Any,
    opacity: float,
    visible: bool,
    masks: tuple[Any, ...],
    notes: tuple[tuple[str, str], ...],
    left_out: list[tuple[str, str, str]],
    depth: int,
) -> Iterator[_Layer]:
    """The layers of a group from the bottom up, each with what the groups around it give it."""
    if depth > _MAX_GROUPS:
        raise InvalidRequest.of(_LAYERS, f"has groups {depth} deep; allowed: {_MAX_GROUPS}")
    base = None
    for layer in group:
        own = layer.opacity / 255
        shown = visible and layer.visible
        if layer.is_group():
            inner = notes
            mode = _mode(layer)
            if mode not in (NORMAL, "pass-through"):
                inner += (("GROUP_MODE", f"group {layer.name!r} has blend mode {mode}, not kept"),)
            if own < 1 and len(layer) > 1:
                told = f"opacity {own:g} of group {layer.name!r} is given to each of its layers"
                inner += (("GROUP_OPACITY", told),)
            if layer.kind == "artboard":
                told = f"artboard {layer.name!r} cuts nothing here, and its colour is not kept"
                inner += (("ARTBOARD", told),)
            below = (*masks, layer) if _has_mask(layer) else masks
            yield from _flattened(layer, opacity * own, shown, below, inner, left_out, depth + 1)
            notes, base = (), None
            continue
        is_painted = not layer.has_pixels() and layer.kind in _PAINTED
        if not (layer.has_pixels() or is_painted) or layer.width < 1 or layer.height < 1:
            told = f"has no pixels of its own ({layer.kind}) and is left out"
            left_out.append(("LAYER_LEFT_OUT", layer.name, told))
            continue
        is_cut = bool(getattr(layer, "clipping", False))
        found = [*notes, *_losses(layer)]
        if is_cut and base is None:
            told = f"layer {layer.name!r} is cut to a group below it, which is not kept"
            found.append(("CLIPPED", told))
        elif is_cut:
            found.append(("CLIPPED", f"layer {layer.name!r} is cut to the one below it"))
        yield _Layer(
            layer=layer,
            # What is painted has its own opacity in its pixels.
            opacity=opacity if is_painted else opacity * own * layer.fill_opacity / 255,
            visible=shown,
            masks=masks,
            base=base if is_cut else None,
            is_painted=is_painted,
            notes=tuple(found),
        )
        base = base if is_cut else layer
        notes = ()


def _losses(layer: Any) -> Iterator[tuple[str, str]]:
    """What a layer has beside its pixels that is not in them."""
    if layer.has_effects():
        yield "EFFECTS", f"effects of layer {layer.name!r} are not kept"
    if layer.has_stroke() and layer.stroke is not None and layer.stroke.enabled:
        yield "STROKE", f"the stroke of layer {layer.name!r} is not kept"


def _mode(layer: Any) -> str:
    """The mode by the name that `blending` has for it."""
    mode: BlendMode = layer.blend_mode
    return mode.name.lower().replace("_", "-")


def _has_mask(layer: Any) -> bool:
    return layer.mask is not None and not layer.mask.disabled


def _taken(layers: list[_Layer], at: int, name: str) -> _Layer | None:
    """Takes the layer of that name out of the list: of several the one nearest to `at`."""
    found = [number for number, each in enumerate(layers) if each.layer.name == name]
    return layers.pop(found[at]) if found else None


def _found(each: _Layer) -> Found:
    layer = each.layer
    return Found(
        place=f"{_LAYERS}[{layer.name[:40]!r}]",
        name=layer.name,
        left=layer.left,
        top=layer.top,
        draw=lambda: _pixels(each),
        opacity=None if each.opacity == 1 else each.opacity,
        visible=None if each.visible else False,
        mode=_mode(layer),
        notes=each.notes,
    )


def _pixels(each: _Layer) -> Drawn:
    """The stored pixels, their alpha multiplied by every mask."""
    layer = each.layer
    notes: list[tuple[str, str]] = []
    if each.is_painted:
        drawn, factors = _painted(layer, notes), []
    else:
        drawn = _stored(layer)
        factors = [] if _repeats(layer, drawn) else _own(layer, layer, notes)
    for group in each.masks:
        factors += _own(group, layer, notes)
    if each.base is not None and each.base.has_pixels():
        below = _stored(each.base)
        factors.append(_over(Image.fromarray(below.pixels_HW4[..., 3]), each.base, layer, 0))
        factors += [] if _repeats(each.base, below) else _own(each.base, layer, notes)
    if not factors:
        return Drawn(pixels_HW4=drawn.pixels_HW4, notes=tuple(notes))
    alpha_HW = drawn.pixels_HW4[..., 3].astype(np.float32)
    for factor_HW in factors:
        alpha_HW *= factor_HW / np.float32(255)
    pixels_HW4 = drawn.pixels_HW4.copy()
    pixels_HW4[..., 3] = np.rint(alpha_HW).astype(np.uint8)
    return Drawn(pixels_HW4=pixels_HW4, notes=tuple(notes))


def _stored(layer: Any) -> Drawn:
    """The pixels that the file holds of a layer."""
    return _drawn(layer.topil(), layer.topil(ChannelID.TRANSPARENCY_MASK))


def _painted(layer: Any, notes: list[tuple[str, str]]) -> Drawn:
    """A fill or a shape without pixels, where it lies."""
    try:
        picture = layer.composite(viewport=layer.bbox, layer_filter=lambda other: other is layer)
        return _drawn(picture, None)
    except MemoryError:
        raise
    # psd-tools paints what it can, with libraries that may be missing.
    except Exception as error:
        told = f"layer {layer.name!r} cannot be painted ({type(error).__name__})"
        notes.append(("LAYER_LEFT_OUT", told))
        return Drawn(pixels_HW4=np.zeros((layer.height, layer.width, 4), np.uint8))


def _repeats(layer: Any, drawn: Drawn) -> bool:
    """Whether the mask of a shape or fill is its alpha once more."""
    if layer.kind not in _PAINTED or not _has_mask(layer) or layer.mask.bbox != layer.bbox:
        return False
    picture = layer.mask.topil()
    return picture is not None and np.array_equal(
        np.asarray(picture.convert("L")), drawn.pixels_HW4[..., 3]
    )


def _own(owner: Any, layer: Any, notes: list[tuple[str, str]]) -> list[NDArray[np.float32]]:
    """The masks of a layer or group where `layer` is, 0 to 255."""
    if not _has_mask(owner):
        return []
    found = [_mask(owner, layer)]
    path = owner.vector_mask
    # Where there are pixels of a fill, or of both masks together, the path is in them.
    if path is None or path.disabled or owner.mask.has_real() or has_fill(owner):
        return found
    try:
        covered_HW = draw_vector_mask(owner, layer.bbox).reshape(layer.height, layer.width)
    except MemoryError:
        raise
    # As above.
    except Exception as error:
        told = f"the vector mask of {owner.name!r} is not kept ({type(error).__name__})"
        notes.append(("VECTOR_MASK", told))
        return found
    parameters = owner.mask.parameters
    density = parameters.vector_mask_density if parameters else None
    share = 1.0 if density is None else density / 255
    # As psd-tools has it, the path's density is that of both.
    return [255 * (share * found[0] / 255 * covered_HW + (1 - share)).astype(np.float32)]


def _mask(owner: Any, layer: Any) -> NDArray[np.float32]:
    """The mask of a layer or group where `layer` is, 0 to 255."""
    mask = owner.mask
    data = mask.data
    if mask.has_real():
        place = (data.real_left or 0, data.real_top or 0)
        outside = data.real_background_color
    else:
        place, outside = (data.left, data.top), None
    outside = data.background_color if outside is None else outside
    picture = mask.topil()
    if picture is None:
        made_HW = np.full((layer.height, layer.width), outside, np.float32)
    else:
        made_HW = _over(picture.convert("L"), place, layer, outside)
    density = None
    if mask.parameters:
        density = mask.parameters.user_mask_density
        density = mask.parameters.vector_mask_density if density is None else density
    if density is not None:
        made_HW = 255 - (255 - made_HW) * np.float32(density / 255)
    return made_HW


def _over(picture: Image.Image, place: Any, layer: Any, outside: int) -> NDArray[np.float32]:
    """A picture that stands at `place`, as far as it covers a layer, and `outside` of it that value."""
    left, top = place if isinstance(place, tuple) else (place.left, place.top)
    full = Image.new("L", (layer.width, layer.height), outside)
    full.paste(picture, (left - layer.left, top - layer.top))
    return np.asarray(full).astype(np.float32)


def _drawn(picture: Image.Image | None, alpha: Image.Image | None) -> Drawn:
    if picture is None:
        raise InvalidRequest.of(_LAYERS, "has a layer whose pixels cannot be read")
    if alpha is None and picture.mode in ("LA", "RGBA"):
        alpha = picture.getchannel("A")
    colour = picture.convert("RGB")
    if alpha is not None:
        colour.putalpha(alpha.convert("L"))
    return Drawn(pixels_HW4=np.asarray(colour.convert("RGBA")))


def _read_background(each: _Layer, collage: collage_pb2.Collage) -> None:
    """Ours below all layers."""
    if not each.visible:
        return
    layer = each.layer
    pixels_HW4 = _stored(layer).pixels_HW4
    set_background(collage, pixels_HW4, layer.left, layer.top)
