"""A person's pose: from what a SimCC network gives to the drawing that pose ControlNets read.

Main functions: `keypoints` (Li et al., SimCC, ECCV 2022, as in RTMPose) and `skeleton` (OpenPose's body of 18 points,
in its colours). Pure functions of arrays.

Suffixes: H, W canvas pixels; K keypoints of a network; P the 18 points of a skeleton; 2 = x, y in pixels, the centre of
the first one being 0; X, Y bins of an axis; 3 = R, G, B.
"""

import colorsys
import math

import cv2
import numpy as np
from numpy.typing import NDArray

# Keypoints of networks whose first 17 are COCO's: COCO itself, Halpe's body with feet, COCO's whole body.
KEYPOINTS = (17, 26, 133)
# Where a skeleton's points stand among COCO's: nose, neck, arms, legs, eyes, ears, of each the right before the left.
# COCO has no neck; what stands in its place is not used.
_COCO_P = (0, 0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_NECK, _SHOULDERS = 1, (5, 6)
# Pairs of points, in the order they are drawn in; limb i has the colour of point i.
LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10)),
    *((1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
# Once around the circle of hues.
COLOURS = tuple(
    tuple(round(255 * part) for part in colorsys.hsv_to_rgb(point / len(_COCO_P), 1, 1))
    for point in range(len(_COCO_P))
)
# A limb's share of its colour, so that points stand out.
LIMB_SHADE = 0.6
# Half the width of a limb, and the radius of a point, on a canvas whose shorter side is 512 pixels.
HALF_WIDTH, NATIVE_SIDE = 4, 512


def keypoints(
    simcc_x_KX: NDArray[np.float32], simcc_y_KY: NDArray[np.float32], *, width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Where each keypoint is in what the network was shown, K2, and how sure of it the network is, K.

    Args:
        simcc_x_KX: for each keypoint the response along x, in bins of equal width.
        simcc_y_KY: the same along y.
        width: of what was shown, pixels.
        height: the same.
    """
    bins_K2 = np.stack([simcc_x_KX.argmax(axis=1), simcc_y_KY.argmax(axis=1)], axis=1)
    bins_a_pixel = (simcc_x_KX.shape[1] / width, simcc_y_KY.shape[1] / height)
    # A point counts as far as both of its coordinates do.
    sure_K = np.minimum(simcc_x_KX.max(axis=1), simcc_y_KY.max(axis=1))
    return bins_K2 / bins_a_pixel, sure_K


def skeleton(
    points_K2: NDArray[np.float64], is_seen_K: NDArray[np.bool_], *, width: int, height: int
) -> NDArray[np.uint8]:
    """The drawing of a person, HW3, on black. What is not seen is left out, with the limbs that end there.

    Args:
        points_K2: keypoints on the canvas, COCO's 17 first.
        is_seen_K: which of them are drawn.
        width: of the canvas, pixels; lines are as wide for it as those that ControlNets are trained on.
        height: the same.
    """
    points_P2, is_seen_P = points_K2[list(_COCO_P)], is_seen_K[list(_COCO_P)]
    points_P2[_NECK] = points_K2[list(_SHOULDERS)].mean(axis=0)
    is_seen_P[_NECK] = is_seen_K[list(_SHOULDERS)].all()
    half_width = max(1, round(HALF_WIDTH * min(width, height) / NATIVE_SIDE))
    picture_HW3 = np.zeros((height, width, 3), np.uint8)
    for (one, other), colour in zip(LIMBS, COLOURS, strict=False):
        if is_seen_P[one] and is_seen_P[other]:
            middle = (points_P2[one] + points_P2[other]) / 2
            across, down = points_P2[other] - points_P2[one]
            ellipse = (
                (float(middle[0]), float(middle[1])),
                (math.hypot(across, down), 2.0 * half_width),
                math.degrees(math.atan2(down, across)),
            )
            cv2.ellipse(picture_HW3, ellipse, [int(LIMB_SHADE * part) for part in colour], -1)
    for (x, y), is_seen, colour in zip(points_P2, is_seen_P, COLOURS, strict=True):
        if is_seen:
            cv2.circle(picture_HW3, (round(x), round(y)), half_width, colour, -1)
    return picture_HW3
