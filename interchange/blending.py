"""Blend modes of other tools, rendered into a layer: `Backdrop`.

A collage lays layers over one another and knows nothing else. What a layer of another mode shows over what lies below
is, at each pixel, (1 - A) C + A B(C, c): A and C of what lies below, c of the layer, B the mode's formula. With that
for its colours and its own alpha, laid over as any other, it shows the same. The formulas are psd-tools'.

Suffixes: H, W canvas pixels; h, w of a layer's part; 4 = R, G, B, A; 3 = R, G, B.
"""

import numpy as np
from numpy.typing import NDArray
from psd_tools.composite.blend import BLEND_FUNC
from psd_tools.constants import BlendMode

NORMAL = "normal"
# Our names of the modes, which are those of CSS and SVG where these have them.
_MODES = {
    mode.name.lower().replace("_", "-"): mode
    for mode in BLEND_FUNC
    # A pattern of dots that the tool draws at random.
    if mode is not BlendMode.DISSOLVE
}
# Rows worked on at once: the formulas make a dozen copies.
_ROWS = 128
_FULL = np.float32(255)


def is_known(mode: str) -> bool:
    """Whether `Backdrop` can render it."""
    return mode in _MODES


class Backdrop:
    """What lies below the next layer, on a canvas of this size, with straight colours."""

    def __init__(self, width: int, height: int) -> None:
        self._colour_HW3 = np.zeros((height, width, 3), np.float32)
        self._alpha_HW = np.zeros((height, width), np.float32)

    def rendered(
        self, pixels_hw4: NDArray[np.uint8], left: int, top: int, mode: str
    ) -> NDArray[np.uint8]:
        """The layer as one of mode normal that shows the same here."""
        function = BLEND_FUNC[_MODES[mode]]
        rendered_hw4 = pixels_hw4.copy()
        for part_hw4, rows, columns in self._parts(rendered_hw4, left, top):
            colour_hw3 = part_hw4[..., :3] / _FULL
            below_hw1 = self._alpha_HW[rows, columns, None]
            blended_hw3 = function(self._colour_HW3[rows, columns], colour_hw3)
            shown_hw3 = (1 - below_hw1) * colour_hw3 + below_hw1 * blended_hw3
            part_hw4[..., :3] = np.rint(np.clip(shown_hw3, 0, 1) * _FULL).astype(np.uint8)
        return rendered_hw4

    def lay(self, pixels_hw4: NDArray[np.uint8], left: int, top: int, opacity: float) -> None:
        """Lays a layer of mode normal over it."""
        for part_hw4, rows, columns in self._parts(pixels_hw4, left, top):
            alpha_hw = part_hw4[..., 3] / _FULL * np.float32(opacity)
            under_hw = self._alpha_HW[rows, columns] * (1 - alpha_hw)
            paint_hw3 = (
                part_hw4[..., :3] / _FULL * alpha_hw[..., None]
                + self._colour_HW3[rows, columns] * under_hw[..., None]
            )
            total_hw = alpha_hw + under_hw
            self._alpha_HW[rows, columns] = total_hw
            self._colour_HW3[rows, columns] = paint_hw3 / np.maximum(total_hw, 1e-6)[..., None]

    def _parts(
        self, pixels_hw4: NDArray[np.uint8], left: int, top: int
    ) -> list[tuple[NDArray[np.uint8], slice, slice]]:
        """Views of what lies on the canvas, a band of rows each, and where they lie."""
        height, width = self._alpha_HW.shape
        first, last = max(top, 0), min(top + pixels_hw4.shape[0], height)
        start, stop = max(left, 0), min(left + pixels_hw4.shape[1], width)
        if stop <= start:
            return []
        return [
            (
                pixels_hw4[row - top : min(row + _ROWS, last) - top, start - left : stop - left],
                slice(row, min(row + _ROWS, last)),
                slice(start, stop),
            )
            for row in range(first, last, _ROWS)
        ]
