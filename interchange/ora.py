"""OpenRaster files: `read` makes a collage of one, `written` one of a collage.

Ours show in every tool what the compositor makes: each layer rendered where it stands, the background below, the result
on top. What other tools do not know stands in attributes of a namespace of ours in stack.xml, and beside the layers'
pictures in `collage/`: texts, dials, transforms, and the original of each picture that had to be rendered. These count
as long as a layer's pixels are those that were written; where another tool changed them, its pixels count, and where it
moved a layer, the layer is moved.

The format: https://www.openraster.org/baseline/. Suffixes: H, W picture pixels; 4 = R, G, B, A; 3 = R, G, B.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import numpy as np
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray
from PIL import Image

from collage.v1 import blob_pb2, collage_pb2
from interchange import bounds
from interchange.archive import Archive, packed
from interchange.blending import NORMAL
from interchange.bounds import Tally, entry
from interchange.drawing import Scene, decoded, is_plain, opaque, png_head, set_background
from interchange.stack import BACKGROUND_NAME, COMPRESS_LEVEL, RESULT_NAME, Found, Stack
from services.common import limits
from services.common.errors import InvalidRequest, quote
from services.common.field import Field
from services.common.pictures import encode_png

MIMETYPE, STACK = "mimetype", "stack.xml"
MEDIA_TYPE = b"image/openraster"
# Attributes of ours. A name, and no address of anything.
NAMESPACE = "urn:collage-diffusion:openraster:1"
_VERSION = "0.0.3"
_THUMBNAIL_SIDE = 256
# Strings that XML cannot hold stand as JSON under the name with this ending.
_JSON = ".json"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What attributes of OpenRaster's own say, and the pictures.
_LAYER_KNOWN = frozenset({"name", "image", "opacity", "visible"})
_COLLAGE_KNOWN = frozenset({"size", "layers"})
_ROLE, _AT, _DIGEST, _ORIGINAL, _SIZE = "role", "at", "digest", "original", "size"
# Modes by the names that tools write; others are those of `blending`.
_MODES = {"src-over": NORMAL, "plus": "linear-dodge", "add": "linear-dodge", "": NORMAL}
_BAD_VALUE = (json_format.ParseError, ValueError, TypeError, RecursionError, OverflowError)


@dataclass(slots=True)
class _Element:
    """One element of stack.xml; `ours` are its attributes in our namespace."""

    tag: str
    attributes: dict[str, str]
    ours: dict[str, str]
    place: Field
    children: list["_Element"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer with what its groups give it."""

    element: _Element
    left: int
    top: int
    opacity: float | None
    visible: bool | None
    mode: str
    notes: tuple[tuple[str, str], ...]


def read(archive: Archive) -> tuple[collage_pb2.Collage, list[collage_pb2.Warning]]:
    """The collage of an OpenRaster file, and what of the file is not in it.

    Raises:
        InvalidRequest: at the entry or the attribute that is wrong.
    """
    image = _parsed(archive.read(STACK, limit_bytes=bounds.MAX_XML_BYTES))
    width, height = (_integer(image, name) for name in ("w", "h"))
    bounds.check_canvas(entry(STACK)["image"], width, height)
    left_out: list[tuple[str, str]] = []
    layers = list(_flattened(image, 0, 0, None, None, (), left_out))
    # Top first, as they stand.
    result = _taken(layers, 0, "result", RESULT_NAME)
    background = _taken(layers, -1, "background", BACKGROUND_NAME)
    bounds.check_count(entry(STACK)["image"]["stack"], len(layers))
    # Sizes of all are known before the first is decoded.
    tally = Tally()
    for layer in (*layers, *([background] if background else [])):
        _weigh(archive, layer, tally)
    stack = Stack(width, height, is_blended=any(layer.mode != NORMAL for layer in layers))
    for name, reason in left_out:
        stack.warn("ELEMENT_LEFT_OUT", f"{entry(STACK)}", f"{reason} {name!r} is left out")
    if result:
        stack.warn("RESULT_LEFT_OUT", str(entry(STACK)), "the drawn picture is no layer")
    _read_fields(image, stack.collage, _COLLAGE_KNOWN, archive, stack.tally)
    if background:
        _read_background(archive, background, stack.collage)
    elif _SIZE in image.ours:
        stack.collage.ClearField("background")
    for layer in reversed(layers):
        stack.lay(_found(archive, layer, (width, height), image.ours.get(_SIZE, ""), stack.tally))
    return stack.collage, stack.warnings


def written(collage: collage_pb2.Collage, result: bytes = b"") -> bytes:
    """An OpenRaster file of a collage whose pictures are inline.

    Args:
        collage: what it holds may be unfinished: words may be missing.
        result: the drawn picture, a PNG of the canvas' size; none where it is empty.

    Raises:
        InvalidRequest: at the field that no file can be made of.
    """
    scene = Scene(collage, result)
    entries: dict[str, bytes] = {MIMETYPE: MEDIA_TYPE, STACK: b""}
    lines: list[str] = []
    for sheet in scene.sheets():
        index = sheet.index
        layer = collage.layers[index]
        name = f"data/{index:02d}-{layer.name}.png"
        entries[name] = (
            layer.image.data
            if sheet.is_whole and is_plain(layer.image.data)
            else (encode_png(sheet.pixels_HW4, compress_level=COMPRESS_LEVEL))
        )
        ours = {_AT: f"{sheet.left} {sheet.top}", _DIGEST: _digest(sheet.pixels_HW4)}
        if entries[name] is not layer.image.data:
            ours[_ORIGINAL] = f"collage/{index:02d}-{layer.name}"
            entries[ours[_ORIGINAL]] = layer.image.data
        ours |= _fields(layer, _LAYER_KNOWN, f"collage/{index:02d}", entries)
        plain = {"name": layer.name, "src": name, "x": sheet.left, "y": sheet.top}
        if layer.HasField("opacity"):
            plain["opacity"] = repr(layer.opacity)
        if layer.HasField("visible"):
            plain["visibility"] = "visible" if layer.visible else "hidden"
        lines.append(_line("layer", plain, ours))
    under_HW3 = scene.under_HW3
    entries["data/background.png"] = encode_png(under_HW3, compress_level=COMPRESS_LEVEL)
    background = {_ROLE: "background", _DIGEST: _digest(opaque(under_HW3))}
    plain = {"name": BACKGROUND_NAME, "src": "data/background.png", "x": 0, "y": 0}
    lines.append(_line("layer", plain, background))
    if result:
        entries["data/result.png"] = (
            result
            if is_plain(result)
            else encode_png(scene.result_HW4, compress_level=COMPRESS_LEVEL)
        )
        plain = {"name": RESULT_NAME, "src": "data/result.png", "x": 0, "y": 0}
        lines.insert(0, _line("layer", plain, {_ROLE: "result"}))
    merged_HW4 = scene.result_HW4 if result else opaque(scene.composite_HW3())
    entries["mergedimage.png"] = encode_png(merged_HW4, compress_level=COMPRESS_LEVEL)
    thumbnail = Image.fromarray(merged_HW4)
    thumbnail.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    entries["Thumbnails/thumbnail.png"] = encode_png(
        np.asarray(thumbnail), compress_level=COMPRESS_LEVEL
    )
    width, height = collage.size.width, collage.size.height
    ours = {_SIZE: f"{width} {height}"}
    ours |= _fields(collage, _COLLAGE_KNOWN, "collage/background", entries)
    plain = {"version": _VERSION, "w": width, "h": height, "xres": 72, "yres": 72}
    plain["xmlns:collage"] = NAMESPACE
    head = _line("image", plain, ours).replace("/>", ">")
    body = "".join(f"  {line}\n" for line in lines)
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n{head}\n <stack>\n{body} </stack>\n</image>\n'
    entries[STACK] = text.encode()
    return packed(entries)


def _parsed(data: bytes) -> _Element:
    """The root of stack.xml. Nothing is declared in it and nothing fetched for it; its size is bounded as it grows."""
    parser = expat.ParserCreate()
    roots: list[_Element] = []
    above: list[_Element] = []
    prefixes: set[str] = set()
    count = 0

    def begin(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > bounds.MAX_ELEMENTS or len(above) >= bounds.MAX_DEPTH:
            most = f"{bounds.MAX_ELEMENTS} elements, {bounds.MAX_DEPTH} within one another"
            raise InvalidRequest.of(entry(STACK), f"has more layers than allowed: at most {most}")
        prefixes.update(
            name.removeprefix("xmlns:")
            for name, value in attributes.items()
            if name.startswith("xmlns:") and value == NAMESPACE
        )
        siblings = above[-1].children if above else roots
        place = above[-1].place if above else entry(STACK)
        number = sum(each.tag == tag for each in siblings)
        made = _Element(tag, {}, {}, place[tag[:40]] if not above else place[tag[:40]][number])
        for name, value in attributes.items():
            prefix, _, local = name.rpartition(":")
            (made.ours if prefix in prefixes else made.attributes)[local or name] = value
        siblings.append(made)
        above.append(made)

    def refuse(*_: object) -> None:
        raise InvalidRequest.of(entry(STACK), "declares a document type; allowed: none")

    parser.StartElementHandler = begin
    parser.EndElementHandler = lambda _: above.pop()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
    # The text may name any encoding, also one that nobody knows or that is none of text.
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise InvalidRequest.of(entry(STACK), f"is no XML ({error})") from error
    if roots[0].tag != "image":
        raise InvalidRequest.of(entry(STACK), f"is {quote(roots[0].tag)}; allowed: an image")
    return roots[0]


def _number(element: _Element, name: str, default: float | None, low: float, high: float) -> float:
    text = element.attributes.get(name)
    if text is None:
        if default is None:
            raise InvalidRequest.of(element.place[name], "is missing")
        return default
    try:
        # Some versions of tools wrote numbers as their user's country does.
        value = float(text.replace(",", "."))
        if low <= value <= high:
            return value
    except ValueError:
        pass
    raise InvalidRequest.of(
        element.place[name], f"is {quote(text)}; allowed: from {low:g} to {high:g}"
    )


def _integer(element: _Element, name: str, default: int | None = None) -> int:
    return round(_number(element, name, default, -bounds.MAX_OFFSET, bounds.MAX_OFFSET))


def _flattened(
    stack: _Element,
    left: int,
    top: int,
    opacity: float | None,
    visible: bool | None,
    notes: tuple[tuple[str, str], ...],
    left_out: list[tuple[str, str]],
) -> Iterator[_Layer]:
    """The layers of a group, top first, each with what the groups around it give it."""
    for child in stack.children:
        if child.tag not in ("layer", "stack"):
            left_out.append((child.attributes.get("name", ""), f"an element {child.tag[:40]}"))
            continue
        name = child.attributes.get("name", "")
        own = _number(child, "opacity", 1.0, 0.0, 1.0) if "opacity" in child.attributes else None
        both = opacity if own is None else own if opacity is None else own * opacity
        shown = visible
        if "visibility" in child.attributes:
            shown = child.attributes["visibility"] != "hidden" and visible is not False
        x, y = left + _integer(child, "x", 0), top + _integer(child, "y", 0)
        bounds.check_place(child.place, x, y)
        mode = _mode(child)
        if child.tag == "layer":
            yield _Layer(child, x, y, both, shown, mode, notes)
            notes = ()
            continue
        if mode != NORMAL:
            notes += (("GROUP_MODE", f"group {name!r} has blend mode {mode}, which is not kept"),)
        if own not in (None, 1.0) and len(child.children) > 1:
            told = f"opacity {own:g} of group {name!r} is given to each of its layers"
            notes += (("GROUP_OPACITY", told),)
        yield from _flattened(child, x, y, both, shown, notes, left_out)
        notes = ()


def _mode(element: _Element) -> str:
    text = element.attributes.get("composite-op", "")
    prefix, _, name = text.rpartition(":")
    if prefix in ("", "svg"):
        return _MODES.get(name, name[:40])
    return text[:40]


def _taken(layers: list[_Layer], at: int, role: str, name: str) -> _Layer | None:
    """Takes the layer of ours that plays that part out of the list: of several the one nearest to `at`."""
    found = [
        number
        for number, layer in enumerate(layers)
        if layer.element.ours.get(_ROLE) == role or layer.element.attributes.get("name") == name
    ]
    return layers.pop(found[at]) if found else None


def _source(layer: _Layer) -> str:
    if "src" not in layer.element.attributes:
        raise InvalidRequest.of(layer.element.place["src"], "is missing")
    return layer.element.attributes["src"].removeprefix("/")


def _weigh(archive: Archive, layer: _Layer, tally: Tally) -> None:
    name = _source(layer)
    tally.add(entry(name), *png_head(archive.read(name), entry(name)))


def _found(
    archive: Archive, layer: _Layer, canvas: tuple[int, int], size: str, tally: Tally
) -> Found:
    """The layer with our settings, where it is one of ours.

    Args:
        archive: the file.
        layer: one of its layers.
        canvas: width and height.
        size: those that a file of ours was written with.
        tally: of the collage's pictures.
    """
    element = layer.element
    source = _source(layer)
    drawn = decoded(archive.read(source), entry(source))
    name = element.attributes.get("name", "")
    settings = collage_pb2.Layer()
    _read_fields(element, settings, _LAYER_KNOWN, archive, tally)
    is_kept = (
        layer.mode == NORMAL
        and max(canvas) <= limits.MAX_SIDE
        and element.ours.get(_DIGEST) == _digest(drawn.pixels_HW4)
    )
    if is_kept:
        settings.image.data = drawn.encoded
        if _ORIGINAL in element.ours:
            original = element.ours[_ORIGINAL]
            settings.image.data = archive.read(original)
            # Nobody has looked at it yet.
            decoded(settings.image.data, entry(original))
        _move(settings, layer, canvas, size)
    else:
        settings.ClearField("transform")
    return Found(
        place=str(element.place),
        name=name,
        left=layer.left,
        top=layer.top,
        draw=lambda: drawn,
        opacity=layer.opacity,
        visible=layer.visible,
        mode=layer.mode,
        notes=layer.notes,
        settings=settings,
        is_ours=_DIGEST in element.ours,
        is_kept=is_kept,
    )


def _move(settings: collage_pb2.Layer, layer: _Layer, canvas: tuple[int, int], size: str) -> None:
    """Moves a layer of ours as another tool moved it, or the edges of its canvas."""
    at = layer.element.ours.get(_AT, "")
    if f"{canvas[0]} {canvas[1]}" == size and at == f"{layer.left} {layer.top}":
        return
    left, top = _pair(at, layer.element.place[_AT])
    width, height = _pair(size, entry(STACK)["image"][_SIZE])
    transform = settings.transform
    x = transform.x if transform.HasField("x") else width / 2
    y = transform.y if transform.HasField("y") else height / 2
    transform.x, transform.y = x + layer.left - left, y + layer.top - top


def _pair(text: str, place: Field) -> tuple[int, int]:
    try:
        first, second = (int(each) for each in text.split())
    except ValueError:
        raise InvalidRequest.of(place, f"is {quote(text)}; allowed: two numbers") from None
    return first, second


def _digest(pixels_HW4: NDArray[np.uint8]) -> str:
    """Of what can be seen: tools differ in the colours of pixels that are wholly transparent."""
    seen_HW4 = np.where(pixels_HW4[..., 3:] > 0, pixels_HW4, 0).astype(np.uint8)
    head = f"{pixels_HW4.shape[1]} {pixels_HW4.shape[0]} ".encode()
    return hashlib.sha256(head + seen_HW4.tobytes()).hexdigest()


def _read_background(archive: Archive, layer: _Layer, collage: collage_pb2.Collage) -> None:
    """What lies below all layers, where another tool changed it."""
    if layer.visible is False:
        collage.ClearField("background")
        return
    name = _source(layer)
    pixels_HW4 = decoded(archive.read(name), entry(name)).pixels_HW4
    is_whole = pixels_HW4.shape[:2] == (collage.size.height, collage.size.width)
    is_in_place = (layer.left, layer.top) == (0, 0)
    if is_whole and is_in_place and layer.element.ours.get(_DIGEST) == _digest(pixels_HW4):
        return
    set_background(collage, pixels_HW4, layer.left, layer.top)


def _line(tag: str, plain: Mapping[str, object], ours: Mapping[str, str]) -> str:
    """One element without children."""
    pairs = [*plain.items(), *((f"collage:{name}", value) for name, value in ours.items())]
    return f"<{tag} {' '.join(f'{name}={quoteattr(str(value))}' for name, value in pairs)}/>"


def _fields(
    message: Message, known: frozenset[str], stem: str, entries: dict[str, bytes]
) -> dict[str, str]:
    """All that is set in a message as attributes, its pictures as entries; the `known` stands elsewhere."""
    copy = type(message)()
    copy.CopyFrom(message)
    for name in known:
        copy.ClearField(name)
    for number, image in enumerate(_images(copy)):
        if image.WhichOneof("source") == "data":
            name = f"{stem}.{number}"
            entries[name] = image.data
            image.path = name
    found = {}
    for name, value in json_format.MessageToDict(copy, preserving_proto_field_name=True).items():
        if isinstance(value, str) and not _NOT_XML.search(value):
            found[name] = value
        elif isinstance(value, str):
            found[name + _JSON] = json.dumps(value)
        else:
            found[name] = json.dumps(value, ensure_ascii=True)
    return found


def _read_fields(
    element: _Element, message: Message, known: frozenset[str], archive: Archive, tally: Tally
) -> None:
    """What `_fields` wrote."""
    fields = message.DESCRIPTOR.fields_by_name
    for attribute, text in element.ours.items():
        name = attribute.removesuffix(_JSON)
        if name not in fields or name in known:
            continue
        try:
            json_format.ParseDict({name: _value(fields[name], attribute, text)}, message)
        except _BAD_VALUE as error:
            raise InvalidRequest.of(
                element.place[attribute], f"is {quote(text)}: {str(error)[:200]}"
            ) from error
    for image in _images(message):
        if image.WhichOneof("source") != "path":
            raise InvalidRequest.of(element.place, "refers to a picture outside of the file")
        data = archive.read(image.path)
        tally.hold(element.place, len(data))
        image.data = data


def _value(field: Any, attribute: str, text: str) -> Any:
    is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING and attribute == field.name
    is_json = field.message_type or field.cpp_type == FieldDescriptor.CPPTYPE_BOOL
    return json.loads(text) if not is_text and (is_json or attribute != field.name) else text


def _images(message: Message) -> list[blob_pb2.Image]:
    """Every picture of a message but a layer's own."""
    if isinstance(message, collage_pb2.Layer):
        return [each.image for each in message.structure if each.HasField("image")]
    assert isinstance(message, collage_pb2.Collage), "nothing else is written"
    is_picture = message.background.WhichOneof("kind") == "image"
    return [message.background.image] if is_picture else []
