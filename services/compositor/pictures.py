"""Encoded pictures to pixels and back: `decode_cutout`, `decode_opaque`, `encode_png`.

Pixels are uint8 sRGB, alpha straight. What a file claims to be is not trusted: the format is sniffed, and every limit
is checked on the header, before a pixel is decoded. This module knows neither collages nor where bytes come from.

Suffixes: H, W pixels; 4 = R, G, B, A; 3 = R, G, B.
"""

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

# The largest encoded file that is looked at.
MAX_ENCODED_BYTES = 32 * 1024 * 1024
# The largest picture that is decoded: 64 MiB as RGBA.
MAX_PIXELS = 16_000_000
FORMATS = ("PNG", "WEBP", "JPEG")
# zlib's middle of the road; fixed, because equal pictures are to have equal bytes.
PNG_COMPRESS_LEVEL = 4

_ALPHA_MODES = ("LA", "RGBA")
# The mode ImageCms wants for each colour space a profile may be in.
_CMS_MODES = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}


class InvalidPicture(Exception):
    """Bytes that are not a picture this service takes: what they are, and what is allowed."""

    def __init__(self, reason: str, allowed: str) -> None:
        super().__init__(f"{reason}; allowed: {allowed}")
        self.reason = reason
        self.allowed = allowed


def decode_cutout(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a layer's picture, HW4.

    Raises:
        InvalidPicture: also for a picture that has no alpha channel and no transparent palette entry.
    """
    pixels_HW4, mode, has_alpha = _decode(data)
    if not has_alpha:
        raise InvalidPicture(
            f"is a picture of mode {mode}, without an alpha channel",
            "RGBA, or grey or palette with transparency",
        )
    return pixels_HW4


def decode_opaque(data: bytes) -> NDArray[np.uint8]:
    """The pixels of a background or parent, HW3.

    Raises:
        InvalidPicture: also for a picture that is transparent anywhere.
    """
    pixels_HW4, _, _ = _decode(data)
    if pixels_HW4[..., 3].min() < 255:
        raise InvalidPicture("is a picture with transparent pixels", "an opaque picture")
    return np.ascontiguousarray(pixels_HW4[..., :3])


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of grey (HW), RGB (HW3) or RGBA (HW4) pixels; equal pixels give equal bytes."""
    file = BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(
        file, format="PNG", compress_level=PNG_COMPRESS_LEVEL
    )
    return file.getvalue()


def stretch(pixels_HW3: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """An opaque picture resampled to another size, antialiased; the same bytes if it has that size already."""
    image = Image.fromarray(pixels_HW3)
    if image.size == (width, height):
        return pixels_HW3
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _decode(data: bytes) -> tuple[NDArray[np.uint8], str, bool]:
    """Pixels HW4, the mode the file was in, and whether it can be transparent."""
    if not 1 <= len(data) <= MAX_ENCODED_BYTES:
        raise InvalidPicture(f"has {len(data)} bytes", f"from 1 to {MAX_ENCODED_BYTES} bytes")
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            image.load()
            has_alpha = image.mode in _ALPHA_MODES or "transparency" in image.info
            return _to_rgba(image), image.mode, has_alpha
    except InvalidPicture:
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


def _check_header(image: ImageFile.ImageFile) -> None:
    width, height = image.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise InvalidPicture(f"is {width} x {height} pixels", f"from 1 to {MAX_PIXELS} pixels")
    # A JPEG of several pictures (MPO, from phones) is a photograph with its previews, and the photograph comes first.
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) != 1:
        raise InvalidPicture("is an animation", "a still picture")
    # Pillow reads most 16-bit files as 8-bit modes, and only the raw mode of the data tells.
    if any(";16" in str(tile.args) for tile in image.tile):
        raise InvalidPicture("has 16 bits a channel", "8 bits a channel")


def _to_rgba(image: Image.Image) -> NDArray[np.uint8]:
    """RGBA pixels in sRGB, upright."""
    profile = image.info.get("icc_profile")
    upright = ImageOps.exif_transpose(image)
    # Palettes and colour keys become channels before anything else, or their transparency is lost.
    is_keyed = upright.mode == "P" or "transparency" in upright.info
    flat = upright.convert("RGBA") if is_keyed else upright
    alpha = flat.getchannel("A") if flat.mode in _ALPHA_MODES else None
    color = _to_srgb(flat, profile)
    if alpha is not None:
        color.putalpha(alpha)
    return np.asarray(color.convert("RGBA"))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colour channels as RGB, through the embedded profile where that says something else than sRGB."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            plain = _without_alpha(image)
            fits = _CMS_MODES.get(source.profile.xcolor_space) == plain.mode
            # Through its own profile sRGB would still move by rounding, and pixels that are kept are kept exactly.
            if fits and "sRGB" not in ImageCms.getProfileDescription(source):
                converted = ImageCms.profileToProfile(
                    plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
                )
                assert converted is not None, "only an in-place conversion answers nothing"
                return converted
        # A profile that cannot be used is as good as none.
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _without_alpha(image: Image.Image) -> Image.Image:
    return image.convert({"RGBA": "RGB", "LA": "L", "1": "L"}.get(image.mode, image.mode))
