"""How much of the generated picture replaces the composite in each pixel: `release_all_but`, `release_only`.

uint8, HW: 0 keeps the composite's own bytes, 255 takes the generated pixel as it is. This module knows no noise levels,
only which masks keep their pixels and which are drawn again.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from services.common.collage import Extent
from services.compositor.noise import Visible


def release_all_but(kept: Iterable[Visible], *, canvas: Extent) -> NDArray[np.uint8]:
    """For a generation: everything is released but the kept layers, each in proportion to its visible mask."""
    return _to_bytes(1 - _united(kept, canvas))


def release_only(redone: Iterable[Visible], *, feather: float, canvas: Extent) -> NDArray[np.uint8]:
    """For a redo: the visible masks of the redone layers, with a soft edge that lies wholly inside them.

    Where no mask is the release is exactly 0; `feather` pixels further in it follows the mask. The edge rises with the
    distance to the nearest pixel outside; the canvas' own border is no edge.

    Args:
        redone: what is drawn again.
        feather: width of the edge in pixels, at least 0.
        canvas: extent of the answer.
    """
    mask_HW = _united(redone, canvas)
    rows, columns = (np.flatnonzero(mask_HW.any(axis=axis)) for axis in (1, 0))
    if rows.size:
        # One pixel more than the masks' bounds holds every pixel outside that can be the nearest.
        box = (
            slice(max(rows[0] - 1, 0), rows[-1] + 2),
            slice(max(columns[0] - 1, 0), columns[-1] + 2),
        )
        depth_hw = _depth(mask_HW[box] > 0, math.ceil(feather) + 1)
        mask_HW[box] = np.minimum(mask_HW[box], depth_hw / (feather + 1))
    return _to_bytes(mask_HW)


def _united(masks: Iterable[Visible], canvas: Extent) -> NDArray[np.float32]:
    """Visible masks never overlap by more than the whole, so their union is their sum."""
    united_HW = np.zeros((canvas.height, canvas.width), np.float32)
    for visible in masks:
        visible.add_to(united_HW)
    return united_HW


def _to_bytes(release_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint(np.clip(release_HW, 0, 1) * 255).astype(np.uint8)


def _depth(inside_hw: NDArray[np.bool_], reach: int) -> NDArray[np.float32]:
    """Euclidean distance of each pixel to the nearest one that is not inside, in pixels, at most `reach`."""
    height, width = inside_hw.shape
    far = width + reach
    column = np.arange(width)
    before = np.maximum.accumulate(np.where(inside_hw, -far, column), axis=1)
    after = np.minimum.accumulate(np.where(inside_hw, width + far, column)[:, ::-1], axis=1)
    across = np.minimum(column - before, after[:, ::-1] - column)
    squared_hw = np.minimum(across, reach).astype(np.float32) ** 2
    nearest_hw = squared_hw.copy()
    for step in range(1, min(reach, height)):
        below, above = squared_hw[step:] + step**2, squared_hw[:-step] + step**2
        np.minimum(nearest_hw[:-step], below, out=nearest_hw[:-step])
        np.minimum(nearest_hw[step:], above, out=nearest_hw[step:])
    return np.sqrt(np.minimum(nearest_hw, np.float32(reach**2)))
