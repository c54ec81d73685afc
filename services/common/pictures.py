"""Encoded pictures to pixels and back, for every service alike: `decode`, `decode_opaque`, `encode_png`.

Pixels are uint8 sRGB, upright, alpha straight. What a file claims to be is not trusted: the format is sniffed, and
before a pixel is decoded every limit is checked on the header, and the passes over the pixels are counted. What stands
beside the pixels (texts, EXIF, profiles) may be damaged without the picture being so. All bytes of strangers pass
through `_decode`, in a process that can be ended (`Confined`). The gateway decodes no picture and imports none of this.

Suffixes: H, W pixels; 4 = R, G, B, A; 3 = R, G, B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from services.common import jpeg, png
from services.common.color import to_srgb
from services.common.png import Png

# The largest encoded file that is looked at.
MAX_ENCODED_BYTES = 32 * 1024 * 1024
# The largest picture that is decoded: 64 MiB as RGBA.
MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "WEBP", "JPEG")
# Scans of a JPEG; writers make about ten. Each costs a pass over all pixels, however little it holds.
MAX_SCANS = 100
# zlib's own default, named so that a change of Pillow's cannot change digests.
PNG_COMPRESS_LEVEL = 6
# The body of an sRGB chunk: rendering intent "perceptual", the one meant for pictures.
SRGB_PERCEPTUAL = b"\x00"

_ALPHA_MODES = ("LA", "RGBA")
_ORIENTATION = 0x0112
# What brings a picture upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class InvalidPicture(Exception):
    """Bytes that are not a picture this system takes: what they are, and what is allowed."""

    def __init__(self, reason: str, allowed: str) -> None:
        super().__init__(f"{reason}; allowed: {allowed}")
        self.reason = reason
        self.allowed = allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Notes:
    """What a file says of its pixels. key: the transparent colour, one value a channel, where one is named."""

    profiles: Sequence[bytes]
    exif: bytes
    key: tuple[int, ...] | None = None


def decode(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an encoded picture, HW4; one without transparency is wholly opaque.

    Raises:
        InvalidPicture: no whole PNG, WebP or JPEG; an animation; more than 8 bits a channel; or too large.
    """
    if not 1 <= len(data) <= MAX_ENCODED_BYTES:
        raise InvalidPicture(f"has {len(data)} bytes", f"from 1 to {MAX_ENCODED_BYTES} bytes")
    try:
        return _decode(data)
    except (InvalidPicture, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidPicture("has far too many pixels", f"at most {MAX_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise InvalidPicture("is no picture in a known format", "PNG, WebP or JPEG") from error
    # A decoder meets foreign bytes here, and Pillow documents no closed set of what it then raises (OSError,
    # SyntaxError, ValueError, struct.error, zlib.error, EOFError, ...). Sizes were checked: what fails now is the file.
    except Exception as error:
        raise InvalidPicture(
            "cannot be decoded: the file is damaged or cut short", "a whole PNG, WebP or JPEG file"
        ) from error


def decode_opaque(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a background, a parent or a control picture, HW3.

    Raises:
        InvalidPicture: as `decode` does, and for a picture that is transparent anywhere.
    """
    pixels_HW4 = decode(data)
    if pixels_HW4[..., 3].min() < 255:
        raise InvalidPicture("is a picture with transparent pixels", "an opaque picture")
    return np.ascontiguousarray(pixels_HW4[..., :3])


def encode_png(pixels: NDArray[np.uint8], *, compress_level: int = PNG_COMPRESS_LEVEL) -> bytes:
    """A PNG of grey (HW), RGB (HW3) or RGBA (HW4) pixels that says sRGB; equal pixels give equal bytes.

    Args:
        pixels: to be encoded.
        compress_level: zlib's, 0 to 9; each step down takes less time and more bytes.
    """
    chunks = PngInfo()
    chunks.add(b"sRGB", SRGB_PERCEPTUAL)
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        file, "PNG", pnginfo=chunks, compress_level=compress_level
    )
    return file.getvalue()


def _decode(data: bytes) -> NDArray[np.uint8]:
    parts = Png.of(data) if data.startswith(png.SIGNATURE) else None
    if parts and parts.chunks > png.MAX_CHUNKS:
        raise InvalidPicture(f"has more than {png.MAX_CHUNKS} chunks", f"at most {png.MAX_CHUNKS}")
    if data.startswith(jpeg.SIGNATURE) and (scans := jpeg.scans(data)) > MAX_SCANS:
        raise InvalidPicture(f"has {scans} scans or more", f"at most {MAX_SCANS} scans")
    with Image.open(BytesIO(parts.pixels if parts else data), formats=FORMATS) as image:
        _check_header(image, parts)
        image.load()
        if parts:
            notes = _Notes(profiles=parts.profiles, exif=parts.exif, key=parts.key)
        else:
            profile = image.info.get("icc_profile")
            notes = _Notes(profiles=[profile] if profile else [], exif=image.info.get("exif", b""))
        return _to_rgba(image, notes)


def _check_header(image: ImageFile.ImageFile, parts: Png | None) -> None:
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise InvalidPicture(f"is {width} x {height} pixels", f"from 1 to {MAX_PIXELS} pixels")
    # A JPEG of several pictures (MPO, from phones) is a photograph with its previews, and the photograph comes first.
    is_animated = image.format == "WEBP" and getattr(image, "n_frames", 1) != 1
    if is_animated or (parts and parts.is_animated):
        raise InvalidPicture("is an animation", "a still picture")
    if parts and parts.depth == 16:
        raise InvalidPicture("has 16 bits a channel", "8 bits a channel")


def _to_rgba(image: Image.Image, notes: _Notes) -> NDArray[np.uint8]:
    # A palette becomes channels before anything else, or its transparency is lost.
    flat = image.convert("RGBA") if image.mode == "P" else image
    color = to_srgb(flat, notes.profiles)
    if notes.key is not None:
        # Compared before colours are converted, which may make two of them one.
        shades_HWC = np.atleast_3d(np.asarray(flat.convert("L") if flat.mode == "1" else flat))
        color.putalpha(Image.fromarray((shades_HWC != notes.key).any(axis=2)).convert("L"))
    elif flat.mode in _ALPHA_MODES:
        color.putalpha(flat.getchannel("A"))
    turn = _TURNS.get(_orientation(notes.exif))
    upright = color if turn is None else color.transpose(turn)
    return np.asarray(upright.convert("RGBA"))


def _orientation(exif: bytes) -> int:
    try:
        block = Image.Exif()
        block.load(exif)
        return int(block.get(_ORIENTATION, 1))
    # A damaged note is as good as none, and Pillow documents no closed set of what it raises over one.
    except Exception:
        return 1
