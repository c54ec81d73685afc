"""Objects that somebody points at: SAM 2 (Ravi et al. 2024, arXiv 2408.00714) as two ONNX files, run on the CPU.

Main type: `Selector`. The encoder looks at the picture, once; the decoder says for a set of points which pixels may be
meant: an object, a part of it, and a part of that. Taken is the largest that the points agree with, the object: of flat
art the decoder's own opinion of its answers prefers the part (on ten objects of `testing.photographs`, pointed at in
their middle, 0.02 to 0.97 of the union is then right, of the largest 0.64 to 0.99). A point outside asks for less.
This module knows neither messages nor what is made of the mask.

Suffixes: H, W pixels of the picture; h, w those of the mask; 3 = R, G, B; L = 1 set of points; P points; M masks;
2 = x, y.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.collage import Point
from services.common.models_file import DetectorSource
from services.common.settings import InvalidSetting
from services.compositor.network import MOST_TOLD, Network, file_of, session

# What the encoder gives is given on to the decoder under the same names, with these and nothing else.
_POINTS = ("point_coords", "point_labels", "mask_input", "has_mask_input")
# Sides of a mask that the decoder could be given to go on from, in pixels.
_MASK_SIDE = 256
# Logits beyond this are as good as 0 and 1.
_SURE = 32.0
# What the decoder calls a point on the object and one that is not.
_INSIDE, _OUTSIDE = 1, 0


class Selector:
    """An encoder and its decoder, checked against each other.

    reach: how far the edge of a mask may lie from the true one, in shares of the longer side.
    """

    def __init__(self, source: DetectorSource, *, threads: int) -> None:
        assert source.decoder is not None, "what has none is no selector"
        self._source = source
        self._encoder = Network(source, threads=threads)
        place = source.place.get("decoder")
        self._decoder = session(file_of(source.decoder, place), source.decoder, place, threads)
        grey_HW3 = np.full((self._encoder.height, self._encoder.width, 3), 128, np.uint8)
        mask_hw = self._checked(grey_HW3)
        # One pixel of the mask, and half of one to each side.
        self.reach = 1.5 / max(mask_hw.shape)

    def select(self, pixels_HW3: NDArray[np.uint8], points: Sequence[Point]) -> NDArray[np.float32]:
        """How likely each pixel is meant, in [0, 1], hw.

        Args:
            pixels_HW3: a picture of any size.
            points: at least one that is inside.
        """
        embedded = dict(zip(self._encoder.outputs, self._encoder.run(pixels_HW3), strict=True))
        sides = np.array([self._encoder.width, self._encoder.height], np.float32)
        at_LP2 = np.array([[(point.x, point.y) for point in points]], np.float32) * sides
        labels_LP = np.array(
            [[_OUTSIDE if each.outside else _INSIDE for each in points]], np.float32
        )
        none_L1hw = np.zeros((1, 1, _MASK_SIDE, _MASK_SIDE), np.float32)
        told = zip(_POINTS, (at_LP2, labels_LP, none_L1hw, np.zeros(1, np.float32)), strict=True)
        (logits_LMhw,) = self._decoder.run(["masks"], {**embedded, **dict(told)})
        logits_Mhw = np.clip(np.nan_to_num(logits_LMhw[0], nan=-_SURE), -_SURE, _SURE)
        logits_hw = max(logits_Mhw, key=lambda each_hw: _fit(each_hw > 0, points))
        return np.asarray(1 / (1 + np.exp(-logits_hw)), np.float32)

    def _checked(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """A mask of it. Refuses a decoder that is none for this encoder."""
        required = {*self._encoder.outputs, *_POINTS}
        found = {each.name for each in self._decoder.get_inputs()}
        given = {each.name for each in self._decoder.get_outputs()}
        if found != required or "masks" not in given:
            raise self._misfit(
                f"a SAM 2 decoder, which takes {_listed(required)} and gives masks; "
                f"it takes {_listed(found)} and gives {_listed(given)}"
            )
        try:
            mask_hw = self.select(pixels_HW3, [Point(x=0.5, y=0.5)])
        # onnxruntime documents no closed set of what it raises.
        except Exception as error:
            raise self._misfit(f"the decoder of this encoder; it fails: {error}") from error
        if mask_hw.ndim != 2 or not mask_hw.size:
            raise self._misfit(f"masks of two sides; it gives {mask_hw.shape}")
        return mask_hw

    def _misfit(self, required: str) -> InvalidSetting:
        return self._source.place.get("decoder").wrong(f"required: {required}"[:MOST_TOLD])


def _fit(is_meant_hw: NDArray[np.bool_], points: Sequence[Point]) -> tuple[int, int]:
    """How many points a mask agrees with, then its pixels."""
    height, width = is_meant_hw.shape
    agreeing = sum(
        bool(
            is_meant_hw[min(int(each.y * height), height - 1), min(int(each.x * width), width - 1)]
        )
        != each.outside
        for each in points
    )
    return agreeing, int(is_meant_hw.sum())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
