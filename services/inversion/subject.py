"""One layer to learn: its cut-out, its words, and the small pictures it is learned from.

Main types: `Subject` and its `Placement`s. A single picture would teach its own place, size and ground along with the
object, so the cut-out is set at random places and sizes on random grounds. This module knows no network.

Suffixes: H, W pixels; 4 = R, G, B, A; 3 = R, G, B.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# No model is trained on larger canvases, so a larger cut-out would only be shrunk again and again.
MAX_SIDE = 1024
# Longer side of the object on its canvas, as a fraction of the canvas' side.
SCALES = (0.45, 0.9)
# Cells of the coarse noise that makes a ground uneven.
GROUND_CELLS = 5


class InvalidSubject(Exception):
    """A picture that nothing can be learned from: what it is, and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """The object on one ground. pixels_HW3: uint8. alpha_HW: float32, how much of each pixel is the object's."""

    pixels_HW3: NDArray[np.uint8]
    alpha_HW: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A cut-out, cropped to what is visible of it, and the words that name it. See `Subject.of`.

    seed: follows from pixels, text and number of vectors; every draw made for this subject follows from it.
    """

    pixels_HW4: NDArray[np.uint8]
    text: str
    vectors: int
    seed: bytes

    @classmethod
    def of(cls, picture: Image.Image, text: str, *, vectors: int = 1) -> "Subject":
        """The subject that a picture shows; the whole of one that is opaque.

        Args:
            picture: mode RGBA, straight alpha.
            text: the words that name it.
            vectors: how many are to be learned.

        Raises:
            InvalidSubject: nothing of it is visible.
        """
        box = picture.getchannel("A").getbbox()
        if box is None:
            raise InvalidSubject("is transparent everywhere; required: a visible object")
        crop = picture.crop(box)
        if max(crop.size) > MAX_SIDE:
            crop = _resized(crop, MAX_SIDE / max(crop.size))
        pixels_HW4 = np.asarray(crop)
        digest = hashlib.sha256(f"{crop.size} {vectors} {text}\0".encode() + pixels_HW4.tobytes())
        return cls(pixels_HW4=pixels_HW4, text=text, vectors=vectors, seed=digest.digest())

    def place(self, number: int, side: int) -> Placement:
        """Its placement of that number on a square canvas; always the same one."""
        rng = np.random.default_rng([*self.seed, number])
        height, width = self.pixels_HW4.shape[:2]
        scale = rng.uniform(*SCALES) * side / max(height, width)
        scaled = np.asarray(_resized(Image.fromarray(self.pixels_HW4), scale), np.float32)
        height, width = scaled.shape[:2]
        top, left = (int(rng.integers(side - extent + 1)) for extent in (height, width))
        alpha_HW = np.zeros((side, side), np.float32)
        alpha_HW[top : top + height, left : left + width] = scaled[..., 3] / 255
        color_HW3 = np.zeros((side, side, 3), np.float32)
        color_HW3[top : top + height, left : left + width] = scaled[..., :3]
        alpha_HW1 = alpha_HW[..., None]
        pixels_HW3 = color_HW3 * alpha_HW1 + _ground(rng, side) * (1 - alpha_HW1)
        return Placement(pixels_HW3=pixels_HW3.round().astype(np.uint8), alpha_HW=alpha_HW)


def _resized(picture: Image.Image, scale: float) -> Image.Image:
    """The picture scaled with antialiasing, in premultiplied form, so that hidden colours do not bleed in."""
    size = tuple(max(1, round(extent * scale)) for extent in picture.size)
    scaled = picture.convert("RGBa").resize((size[0], size[1]), Image.Resampling.BICUBIC)
    return scaled.convert("RGBA")


def _ground(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """A ground with nothing on it: one colour, shaded unevenly, HW3, 0..255."""
    color_3 = rng.uniform(20, 235, 3)
    contrast = rng.uniform(0, 90)
    coarse = rng.uniform(-1, 1, (GROUND_CELLS, GROUND_CELLS, 3)).astype(np.float32)
    # One shade for all channels, and a little of each one's own.
    coarse = 0.8 * coarse[..., :1] + 0.2 * coarse
    channels = [
        np.asarray(Image.fromarray(coarse[..., k]).resize((side, side), Image.Resampling.BICUBIC))
        for k in range(3)
    ]
    grain = rng.normal(0, rng.uniform(0, 6), (side, side, 1))
    ground = color_3 + contrast * np.stack(channels, axis=-1) + grain
    return np.clip(ground, 0, 255).astype(np.float32)
