"""Control pictures: what a ControlNet is shown of the layers, in the form its kind reads.

Main types: `Detector`, which makes a kind's picture from a layer's own pixels, and `ControlPicture`, where all layers
of one kind are put together. Pure functions of uint8 arrays: no collage, no storage, no network.

Suffixes: H, W canvas pixels; h, w a layer's box; 3 = R, G, B; 4 = R, G, B, straight alpha.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from services.common.collage import Extent

# Thresholds of Canny's hysteresis, as in the released code of Collage Diffusion and the ControlNets trained for it.
CANNY_LOW, CANNY_HIGH = 100, 200
# What a layer lies on while it is looked at: no grey is farther from it than half of the whole range.
_GROUND = np.float32(128)
# Less than this shows in no 8-bit mask.
_HIDDEN_BELOW = 0.5 / 255
_FULL = np.float32(255)


def canny(pixels_HW4: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The edges of one layer, HW3, 255 on an edge and 0 elsewhere (Canny 1986).

    Edges are sought in the layer's grey and in its alpha together: at each pixel the stronger gradient counts. So the
    silhouette is an edge whatever the colour inside, the colour that a file keeps under transparent pixels never is
    one, and a faded border is one as far as it is steep. A silhouette's edge runs along the outermost pixels that are
    at least about half opaque, never outside; where the layer is cut off by the array it has none. An opaque layer
    gives the edges of its grey, exactly.

    Args:
        pixels_HW4: the layer on the canvas, so that edges are one canvas pixel wide.
    """
    grey_HW = np.asarray(
        cv2.cvtColor(np.ascontiguousarray(pixels_HW4[..., :3]), cv2.COLOR_RGB2GRAY), np.uint8
    )
    alpha_HW = np.ascontiguousarray(pixels_HW4[..., 3])
    flat_HW = on_ground(grey_HW, alpha_HW)
    # Both sides of a hard step have the same gradient. The mean with the eroded alpha is steepest on the inner side,
    # where it then rises above that of the grey on the outer side as well.
    inner_HW = cv2.erode(alpha_HW, np.ones((3, 3), np.uint8))
    slope_HW = ((alpha_HW.astype(np.uint16) + inner_HW) // 2).astype(np.uint8)
    edges_HW = cv2.Canny(np.dstack([flat_HW, slope_HW, slope_HW]), CANNY_LOW, CANNY_HIGH)
    edges_HW[alpha_HW == 0] = 0
    return np.repeat(edges_HW[..., None], 3, axis=2)


def on_ground(values_HW: NDArray[np.uint8], alpha_HW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """One channel of a layer, of straight alpha, over the neutral ground that layers are looked at on."""
    share_HW = alpha_HW.astype(np.float32) / _FULL
    return np.asarray(np.rint(values_HW * share_HW + _GROUND * (1 - share_HW)), np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """Draws the control picture of one kind.

    draw: from a layer on the canvas, HW4, to its control picture, HW3, black outside the layer; takes calls from
    several threads at once. digest: names what else the picture depends on, a file and its settings; empty for nothing.
    """

    draw: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
    digest: str = ""


# What is drawn without a network, by kind.
DETECTORS: Mapping[str, Detector] = {"canny": Detector(draw=canny)}


class ControlPicture:
    """The control picture of one kind, HW3, black where no layer of this kind is seen.

    Each pixel shows the picture of the layer that is seen there most, of equals the front one. Pictures are not mixed:
    they are drawings in a code (an edge, a distance, a limb), and halfway between two lies a third meaning. How much a
    layer counts is in the scale map, not here.
    """

    def __init__(self, canvas: Extent) -> None:
        self.pixels_HW3 = np.zeros((canvas.height, canvas.width, 3), np.uint8)
        self._most_HW = np.full((canvas.height, canvas.width), _HIDDEN_BELOW, np.float32)

    def slide_under(
        self,
        picture_HW3: NDArray[np.uint8],
        box: tuple[slice, slice],
        mask_hw: NDArray[np.float32],
    ) -> None:
        """Adds the next layer below those so far.

        Args:
            picture_HW3: its control picture, of the canvas' size.
            box: where its visible mask lies.
            mask_hw: its visible mask there, in [0, 1].
        """
        is_most_hw = mask_hw > self._most_HW[box]
        self.pixels_HW3[box][is_most_hw] = picture_HW3[box][is_most_hw]
        self._most_HW[box][is_most_hw] = mask_hw[is_most_hw]
