"""A picture on its way, made small: `encode_preview`."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.common.collage import Extent
from services.common.pictures import encode_png

# Longest side of a preview, as the contract promises.
PREVIEW_SIDE = 256


def encode_preview(pixels_HWC: NDArray[np.uint8], canvas: Extent) -> bytes:
    """A PNG of a picture of any size in the shape of the canvas, at most `PREVIEW_SIDE` pixels a side."""
    scale = min(1.0, PREVIEW_SIDE / max(canvas.width, canvas.height))
    size = (max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale)))
    resized = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC)
    return encode_png(np.asarray(resized))
