"""Pictures in and out of a file: `decoded` reads one, `Scene` shows a collage as other tools are to see it.

Suffixes: H, W pixels of a picture or the canvas; 4 = R, G, B, A; 3 = R, G, B.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from collage.v1 import collage_pb2
from interchange.stack import COMPRESS_LEVEL, Drawn
from services.common import png, wire
from services.common.collage import DEFAULT_BACKGROUND, Transform
from services.common.errors import InvalidRequest
from services.common.field import Field
from services.common.pictures import MAX_PIXELS, InvalidPicture, decode, decode_opaque, encode_png
from services.common.png import Png
from services.compositor.compose import Stack
from services.compositor.placement import place, stretch

# As the compositor has it: a shift this near to whole pixels is one.
_WHOLE_PIXELS = 1e-6
# A picture of more than so many canvases is cut to its canvas, so that a file of photographs is not ten times as large.
_WHOLE_CANVASES = 2
_HEAD_BYTES = 33
_DEPTH_AT = 24


def png_head(data: bytes, field: Field) -> tuple[int, int]:
    """Width and height that a PNG claims to have.

    Raises:
        InvalidRequest: it is none.
    """
    if len(data) < _HEAD_BYTES or not data.startswith(png.SIGNATURE) or data[12:16] != b"IHDR":
        raise InvalidRequest.of(field, "is no PNG; allowed: PNG files")
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def decoded(data: bytes, field: Field) -> Drawn:
    """The pixels of a picture. One of 16 bits a channel, which the service does not take, is made one of 8.

    Raises:
        InvalidRequest: it is none, or damaged, or too large.
    """
    try:
        if data.startswith(png.SIGNATURE) and data[_DEPTH_AT : _DEPTH_AT + 1] == b"\x10":
            data = _eight_bits(data, field)
        return Drawn(pixels_HW4=decode(data), encoded=data)
    except InvalidPicture as error:
        raise InvalidRequest.of(field, str(error)) from error


def opaque(pixels_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture with an alpha that is full everywhere, HW4."""
    return np.dstack([pixels_HW3, np.full(pixels_HW3.shape[:2], 255, np.uint8)])


def set_background(
    collage: collage_pb2.Collage, pixels_HW4: NDArray[np.uint8], left: int, top: int
) -> None:
    """Makes a picture that lies below all layers the background: a colour, where it has but one."""
    canvas = Image.new("RGB", (collage.size.width, collage.size.height), DEFAULT_BACKGROUND)
    picture = Image.fromarray(pixels_HW4)
    canvas.paste(picture, (left, top), picture)
    found_HW3 = np.asarray(canvas)
    if (found_HW3 == found_HW3[0, 0]).all():
        red, green, blue = (int(each) for each in found_HW3[0, 0])
        color = collage_pb2.Color(red=red, green=green, blue=blue)
        collage.background.CopyFrom(collage_pb2.Background(color=color))
    else:
        collage.background.image.data = encode_png(found_HW3, compress_level=COMPRESS_LEVEL)


def is_plain(data: bytes) -> bool:
    """Whether every tool sees in these bytes what the compositor sees: a PNG of sRGB pixels and nothing else."""
    if not data.startswith(png.SIGNATURE):
        return False
    parts = Png.of(data)
    return parts.depth == 8 and not (parts.profiles or parts.exif or parts.is_animated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A layer as it stands on the canvas: its pixels, HW4, and where their corner is.

    is_whole: whether they are those of its picture, none left out.
    """

    index: int
    pixels_HW4: NDArray[np.uint8]
    left: int
    top: int
    is_whole: bool


class Scene:
    """A collage with inline pictures, and the picture drawn of it where there is one.

    Raises:
        InvalidRequest: at the field that cannot be shown. What is merely missing yet, such as words, is no fault.
    """

    def __init__(self, collage: collage_pb2.Collage, result: bytes = b"") -> None:
        self._message = collage
        self._collage = wire.parse_collage(_outline(collage))
        canvas = self._collage.size
        self._stack = Stack(canvas)
        self.result_HW4 = np.zeros((0, 0, 4), np.uint8)
        if result:
            self.result_HW4 = decoded(result, Field("result")).pixels_HW4
            height, width = self.result_HW4.shape[:2]
            if (width, height) != (canvas.width, canvas.height):
                raise InvalidRequest.of(
                    "result",
                    f"is {width} x {height} pixels; allowed: the canvas' {canvas.width} x {canvas.height}",
                )

    def sheets(self) -> Iterator[Sheet]:
        """The layers from the top down, one in memory at a time; `composite_HW3` is right once all were taken."""
        canvas = self._collage.size
        for index in reversed(range(len(self._collage.layers))):
            layer = self._collage.layers[index]
            field = Field("collage")["layers"][index]["image"]
            pixels_HW4 = decoded(self._message.layers[index].image.data, field).pixels_HW4
            placed = place(pixels_HW4, layer.transform, canvas)
            if layer.visible:
                self._stack.slide_under(placed, opacity=layer.opacity)
            height, width = pixels_HW4.shape[:2]
            corner = _corner(layer.transform, width, height, canvas.width, canvas.height)
            if corner and width * height <= _WHOLE_CANVASES * canvas.pixels:
                left, top = corner
                yield Sheet(index=index, pixels_HW4=pixels_HW4, left=left, top=top, is_whole=True)
            else:
                yield _cut(index, placed.on(canvas))

    @cached_property
    def under_HW3(self) -> NDArray[np.uint8]:
        """What lies below all layers."""
        size, background = self._collage.size, self._collage.background
        if isinstance(background, tuple):
            return np.full((size.height, size.width, 3), background, np.uint8)
        field = Field("collage")["background"]["image"]
        try:
            picture_HW3 = decode_opaque(self._message.background.image.data)
        except InvalidPicture as error:
            raise InvalidRequest.of(field, str(error)) from error
        return stretch(picture_HW3, width=size.width, height=size.height)

    def opacity(self, index: int) -> float:
        """Of a layer, 1 where it is unset."""
        return self._collage.layers[index].opacity

    def is_visible(self, index: int) -> bool:
        """Of a layer, true where it is unset."""
        return self._collage.layers[index].visible

    def composite_HW3(self) -> NDArray[np.uint8]:
        """All of it, as the compositor makes it."""
        return self._stack.over(self.under_HW3)


def _outline(collage: collage_pb2.Collage) -> collage_pb2.Collage:
    """The collage as it may be asked for, with a byte for each picture, and words where none are yet."""
    copy = collage_pb2.Collage()
    copy.CopyFrom(collage)
    images = [copy.background.image] if copy.background.WhichOneof("kind") == "image" else []
    for layer in copy.layers:
        layer.text = layer.text if layer.text.strip() else "words"
        images.append(layer.image)
        images += [each.image for each in layer.structure if each.HasField("image")]
    for image in images:
        if image.WhichOneof("source") == "data" and image.data:
            image.data = b"\0"
    return copy


def _corner(
    transform: Transform, width: int, height: int, canvas_width: int, canvas_height: int
) -> tuple[int, int] | None:
    """Left and top of a picture that is only moved, by whole pixels; None for any other."""
    is_turned = transform.rotation % 360 or transform.flip_horizontal or transform.flip_vertical
    x = canvas_width / 2 if transform.x is None else transform.x
    y = canvas_height / 2 if transform.y is None else transform.y
    left, top = x - width / 2, y - height / 2
    is_whole = max(abs(left - round(left)), abs(top - round(top))) < _WHOLE_PIXELS
    # Other tools hold a corner in 32 bits, and Photoshop has canvases of 300,000 pixels at most.
    is_near = max(abs(left), abs(top)) < 2**15
    if is_turned or transform.scale != 1 or not is_whole or not is_near:
        return None
    return round(left), round(top)


def _cut(index: int, canvas_HW4: NDArray[np.uint8]) -> Sheet:
    """What is not wholly transparent; one transparent pixel where all is."""
    rows = np.flatnonzero(canvas_HW4[..., 3].any(axis=1))
    columns = np.flatnonzero(canvas_HW4[..., 3].any(axis=0))
    top, bottom = (int(rows[0]), int(rows[-1]) + 1) if rows.size else (0, 1)
    left, right = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, 1)
    cut_HW4 = np.ascontiguousarray(canvas_HW4[top:bottom, left:right])
    return Sheet(index=index, pixels_HW4=cut_HW4, left=left, top=top, is_whole=False)


def _eight_bits(data: bytes, field: Field) -> bytes:
    """A PNG of 16 bits a channel as one of 8, its profile kept."""
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InvalidPicture(
                    f"is {image.width} x {image.height} pixels", f"at most {MAX_PIXELS} pixels"
                )
            profile = image.info.get("icc_profile")
            made: Image.Image = image
            if image.mode.startswith("I"):
                made = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
            file = BytesIO()
            made.save(file, "PNG", icc_profile=profile)
            return file.getvalue()
    except InvalidPicture:
        raise
    # As in `pictures.decode`: Pillow documents no closed set of what it raises over foreign bytes.
    except Exception as error:
        raise InvalidRequest.of(field, "is a damaged PNG") from error
