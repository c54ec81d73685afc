"""Pictures as PNG bytes: 8-bit sRGB, the same bytes for the same pixels."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from services.common.collage import Extent

# zlib's own default, named so that a change of Pillow's cannot change digests.
COMPRESS_LEVEL = 6
# The body of an sRGB chunk: rendering intent "perceptual", the one meant for pictures.
SRGB_PERCEPTUAL = b"\x00"
# Longest side of a preview, as the contract promises.
PREVIEW_SIDE = 256


def encode_png(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """One RGB picture (H, W, 3) as a PNG."""
    return _save(Image.fromarray(pixels_HWC))


def encode_preview(pixels_HWC: NDArray[np.uint8], canvas: Extent) -> bytes:
    """A picture of any size in the shape of the canvas, at most `PREVIEW_SIDE` pixels a side."""
    scale = min(1.0, PREVIEW_SIDE / max(canvas.width, canvas.height))
    size = (max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale)))
    return _save(Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC))


def _save(picture: Image.Image) -> bytes:
    chunks = PngInfo()
    chunks.add(b"sRGB", SRGB_PERCEPTUAL)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=chunks, compress_level=COMPRESS_LEVEL)
    return file.getvalue()
