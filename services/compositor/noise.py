"""How far each place of a collage may move from its pixels: `resolve_dials` and `strength_map`.

The map is the paper's (Sarukkai et al., Collage Diffusion, WACV 2024): strengths painted through the visible masks,
blurred, sampled at the latent cells. It is kept in float64, because a generator multiplies it by the steps and cuts.

Suffixes: H, W canvas pixels; h, w latent cells or a layer's box.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.common.collage import Dials, Extent, Layer

# Standard deviation of the blur, as a fraction of the canvas' shorter side: 10 pixels at 512.
BLUR = 10 / 512
# The blur's kernel ends after so many standard deviations.
_BLUR_REACH = 4
# A value this near to a strength that was asked for is that strength: masks are 32-bit floats, and
# int(steps * strength) must not fall one short because of their last bit.
_SNAP = 1e-6
# Automatic noise of the top-most layer, the one in front of everything, whatever its size.
_TOPMOST_NOISE = 0.4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Visible:
    """What can be seen of one layer.

    box: rows and columns of the canvas.
    mask_hw: float32 in [0, 1], v_i = a_i * (1 - A_{>i}) inside the box; it is zero outside.
    """

    box: tuple[slice, slice]
    mask_hw: NDArray[np.float32]

    def add_to(self, plane_HW: NDArray[np.floating], weight: float = 1.0) -> None:
        """Adds the mask, times `weight`, to an array of the canvas' size."""
        plane_HW[self.box] += self.mask_hw * np.asarray(weight, plane_HW.dtype)


def resolve_dials(layer: Layer, *, size: float, is_topmost: bool) -> Dials:
    """The layer's own dials, and the size heuristic of the paper's code for those that are unset.

    Args:
        layer: whose dials.
        size: the larger of its width and height as fractions of the canvas'; above 1 counts as 1.
        is_topmost: whether no visible layer lies above it.
    """
    ratio = min(max(size, 0.0), 1.0)
    noise = _TOPMOST_NOISE if is_topmost else 0.5 + 0.2 * ratio
    return Dials(
        noise=noise if layer.noise is None else layer.noise,
        attract=0.2 + 0.4 * (1 - ratio) if layer.attract is None else layer.attract,
        repel=0.9 - 0.5 * ratio if layer.repel is None else layer.repel,
    )


def strength_map(
    painted: Sequence[tuple[Visible, float]], *, ground: float, canvas: Extent, latent_factor: int
) -> NDArray[np.float64]:
    """The noise map, hw, in [0, 1].

    `ground` everywhere, each strength painted through its mask, blurred with repeated edges, sampled at the cells'
    centres. Painting back to front through a_i and adding up v_i are one and the same. Places with one strength all
    around have exactly that strength. Two departures from the paper's code: the blur is a true Gaussian evaluated at
    the centre of a cell, where that takes the pixel right of and below it; and it only ever holds back, so that no cell
    is freer than what is painted there: a layer's dial is an upper bound up to its border.

    Args:
        painted: masks and strengths.
        ground: the strength of what no mask covers.
        canvas: its sides are multiples of `latent_factor`.
        latent_factor: pixels from canvas to cell, each way.
    """
    # Painting differences from the ground leaves the ground exact.
    difference_HW = np.zeros((canvas.height, canvas.width), np.float64)
    for visible, strength in painted:
        visible.add_to(difference_HW, strength - ground)
    painted_hw = ground + _cell_means(difference_HW, latent_factor)
    deviation = BLUR * min(canvas.width, canvas.height)
    down_hH = _blur_matrix(canvas.height, latent_factor, deviation)
    across_wW = _blur_matrix(canvas.width, latent_factor, deviation)
    blurred_hw = ground + down_hH @ difference_HW @ across_wW.T
    strength_hw = np.clip(np.minimum(blurred_hw, painted_hw), 0, 1)
    return _snapped(strength_hw, {ground, *(strength for _, strength in painted)})


def cell_means(visible: Visible, *, canvas: Extent, latent_factor: int) -> NDArray[np.float32]:
    """The visible mask averaged over each latent cell, hw."""
    mask_HW = np.zeros((canvas.height, canvas.width), np.float32)
    visible.add_to(mask_HW)
    return np.asarray(_cell_means(mask_HW, latent_factor), np.float32)


def _cell_means(plane_HW: NDArray[np.floating], latent_factor: int) -> NDArray[np.floating]:
    height, width = plane_HW.shape
    grid = (height // latent_factor, latent_factor, width // latent_factor, latent_factor)
    return np.asarray(plane_HW.reshape(grid).mean(axis=(1, 3)))


def _blur_matrix(length: int, latent_factor: int, deviation: float) -> NDArray[np.float64]:
    """Maps a line of pixels to Gaussian means at its cells' centres; rows sum to 1, edge pixels repeat outwards."""
    reach = math.ceil(_BLUR_REACH * deviation)
    pixels = np.arange(-reach, length + reach) + 0.5
    centres = (np.arange(length // latent_factor) + 0.5) * latent_factor
    distance = (pixels[None, :] - centres[:, None]) / deviation
    weights = np.where(np.abs(distance) <= _BLUR_REACH, np.exp(-0.5 * distance**2), 0.0)
    matrix = weights[:, reach : reach + length].copy()
    matrix[:, 0] += weights[:, :reach].sum(axis=1)
    matrix[:, -1] += weights[:, reach + length :].sum(axis=1)
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True), np.float64)


def _snapped(strength_hw: NDArray[np.float64], strengths: Iterable[float]) -> NDArray[np.float64]:
    for strength in strengths:
        strength_hw[np.abs(strength_hw - strength) <= _SNAP] = strength
    return strength_hw
