"""What pixels at the edge of an object are made of: how much of each is the object, and of which colour that is.

Main function: `matte`. In a photograph an edge pixel shows object and ground mixed; cut out by alpha alone it carries
the old ground along as a halo. Alpha is that of closed-form matting (Levin, Lischinski and Weiss 2008) in its windowed
form (He, Sun and Tang 2010), whose matrix is never built: its product with an alpha is that alpha less its guided
filter. Colours are found by blur fusion (Forte 2021). Pure functions of arrays: no network is run, nothing stored.

Suffixes: H, W pixels of the picture; h, w those that are solved for; 3 = R, G, B; 4 = those and 1; 6 = the upper
triangle of a symmetric 3 x 3. Colours and alpha are float32 in [0, 1].
"""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from services.compositor.network import resized

# The longest side, in pixels, that alpha is solved at. Larger pictures take from it how alpha follows from colour.
SOLVED_SIDE = 640
# Half the width of the windows within which alpha is a plane over colour, pixels.
WINDOW = 2
# Squared differences of colour that are noise.
_NOISE = 1e-5
# How much a first alpha counts against how well alpha fits the colours, where it is not sure.
_TRUST = 1e-3
# The solver ends when its residual is this share of the first, or after so many steps.
_TOLERANCE, _MAX_STEPS = 3e-3, 100
# A first alpha outside these is sure.
_SURE_GROUND, _SURE_OBJECT = 0.1, 0.9
# Alpha that is nearer to nothing or to everything than this is a slip of the solver, no glass.
_SLIP = 0.02
# Radii of the two blurs that colours are fused from, in shares of the longer side.
_WIDE, _NARROW = 0.09, 0.006
_NEVER_ZERO = 1e-5
# What the six numbers of a symmetric matrix stand for.
_ROWS, _COLUMNS = (0, 0, 0, 1, 1, 2), (0, 1, 2, 1, 2, 2)

Floats = NDArray[np.float32]


def matte(
    pixels_HW3: NDArray[np.uint8], first_hw: Floats, *, reach: float
) -> tuple[Floats, NDArray[np.uint8]]:
    """The alpha of a picture's object, HW, and the object's own colours, HW3.

    Args:
        pixels_HW3: an opaque picture, of any size.
        first_hw: a first alpha, of any size.
        reach: how far its edge may lie from the true one, in shares of the longer side.
    """
    height, width = pixels_HW3.shape[:2]
    scale = min(1.0, SOLVED_SIDE / max(height, width))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    seen_hw3 = _sized(pixels_HW3, shape).astype(np.float32) / np.float32(255)
    sure_hw = trimap(_sized(first_hw, shape), reach=max(1, round(reach * max(shape))))
    laplacian = Laplacian(seen_hw3)
    solved_hw = solve(laplacian, _sized(first_hw, shape), sure_hw)
    alpha_HW = solved_hw
    if shape != (height, width):
        plane_hw4 = laplacian.planes(solved_hw)
        alpha_HW = _sized(plane_hw4[..., 3], (height, width))
        for channel in range(3):
            slope_HW = _sized(plane_hw4[..., channel], (height, width))
            alpha_HW += slope_HW * (pixels_HW3[..., channel] / np.float32(255))
        # Where it was sure it still is.
        known_HW = _sized(sure_hw, (height, width))
        alpha_HW = np.where(known_HW == 0, 0, np.where(known_HW == 1, 1, alpha_HW))
    alpha_HW = np.clip((alpha_HW - _SLIP) / (1 - 2 * _SLIP), 0, 1).astype(np.float32)
    return alpha_HW, colours(pixels_HW3, alpha_HW, seen_hw3)


def trimap(first_hw: Floats, *, reach: int) -> Floats:
    """Where a first alpha is sure: 1 for object, 0 for ground, 0.5 for neither.

    Args:
        first_hw: an alpha.
        reach: how far its edge may lie from the true one, pixels.
    """
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    # What lies beyond the picture is no ground: an object may be cut off there.
    is_object_hw, is_ground_hw = (
        cv2.erode(is_sure_hw.astype(np.uint8), disc, borderType=cv2.BORDER_REPLICATE) > 0
        for is_sure_hw in (first_hw > _SURE_OBJECT, first_hw < _SURE_GROUND)
    )
    return np.where(is_object_hw, 1, np.where(is_ground_hw, 0, 0.5)).astype(np.float32)


def solve(laplacian: "Laplacian", first_hw: Floats, sure_hw: Floats) -> Floats:
    """The alpha that fits the colours, by conjugate gradients: as `sure_hw` has it where that is not 0.5."""
    is_open_hw = sure_hw == 0.5
    open_hw = is_open_hw.astype(np.float32)
    start_hw = np.where(is_open_hw, first_hw, sure_hw).astype(np.float32)
    found_hw = np.zeros_like(start_hw)
    trust = np.float32(_TRUST * (2 * WINDOW + 1) ** 2)
    scale_hw = 1 / (laplacian.windows_hw + trust)
    rest_hw = -open_hw * laplacian.times(start_hw)
    step_hw = ahead_hw = scale_hw * rest_hw
    power = first_power = float(np.vdot(rest_hw, ahead_hw))
    for _ in range(_MAX_STEPS):
        if power <= _TOLERANCE**2 * first_power:
            break
        moved_hw = open_hw * (laplacian.times(step_hw) + trust * step_hw)
        length = np.float32(power / float(np.vdot(step_hw, moved_hw)))
        found_hw += length * step_hw
        rest_hw -= length * moved_hw
        ahead_hw = scale_hw * rest_hw
        before, power = power, float(np.vdot(rest_hw, ahead_hw))
        step_hw = ahead_hw + np.float32(power / before) * step_hw
    return np.asarray(np.clip(start_hw + found_hw, 0, 1), np.float32)


def colours(pixels_HW3: NDArray[np.uint8], alpha_HW: Floats, seen_hw3: Floats) -> NDArray[np.uint8]:
    """The object's own colours, HW3: the picture's where alpha is 1, and elsewhere without the ground's.

    Args:
        pixels_HW3: the picture.
        alpha_HW: its object's.
        seen_hw3: the picture, smaller, which is enough to see what colours lie around.
    """
    small_hw = _sized(alpha_HW, seen_hw3.shape[:2])
    wide = max(1, round(_WIDE * max(small_hw.shape)))
    narrow = max(1, round(_NARROW * max(alpha_HW.shape)))
    colours_HW3 = np.empty_like(pixels_HW3)
    # One after the other: of the largest pictures each takes hundreds of megabytes.
    for channel in range(3):
        seen_hw = seen_hw3[..., channel]
        front_hw, back_hw = _fused(seen_hw, seen_hw, seen_hw, small_hw, wide)
        front_HW, _ = _fused(
            pixels_HW3[..., channel].astype(np.float32) / np.float32(255),
            _sized(front_hw, alpha_HW.shape),
            _sized(back_hw, alpha_HW.shape),
            alpha_HW,
            narrow,
        )
        colours_HW3[..., channel] = np.rint(front_HW * np.float32(255))
    return colours_HW3


def _fused(
    seen_HW: Floats, front_HW: Floats, back_HW: Floats, alpha_HW: Floats, radius: int
) -> tuple[Floats, Floats]:
    """One channel of the object and of the ground, each blurred where it is, the object then as `seen_HW` has it."""
    size = (2 * radius + 1, 2 * radius + 1)
    share_HW = cv2.blur(alpha_HW, size)
    front_HW = cv2.blur(front_HW * alpha_HW, size) / (share_HW + _NEVER_ZERO)
    back_HW = cv2.blur(back_HW * (1 - alpha_HW), size) / (1 - share_HW + _NEVER_ZERO)
    off_HW = seen_HW - alpha_HW * front_HW - (1 - alpha_HW) * back_HW
    return np.clip(front_HW + alpha_HW * off_HW, 0, 1), back_HW


class Laplacian:
    """The matting Laplacian of a picture: for any alpha, how far it is from a plane over colour in each window.

    windows_hw: how many pixels the window around each has within the picture.
    """

    def __init__(self, seen_hw3: Floats) -> None:
        self._seen_hw3 = seen_hw3
        self.windows_hw: Floats = _sums(np.ones(seen_hw3.shape[:2], np.float32))
        self._share_hw = 1 / self.windows_hw
        self._mean_hw3 = _sums(seen_hw3) * self._share_hw[..., None]
        # In double precision: of a grey picture only the noise keeps the determinant from zero.
        exact_hw3 = seen_hw3.astype(np.float64)
        mean_hw3 = _sums(exact_hw3) * self._share_hw[..., None]
        spread_hw6 = [
            _sums(exact_hw3[..., i] * exact_hw3[..., j]) * self._share_hw
            - mean_hw3[..., i] * mean_hw3[..., j]
            + (_NOISE if i == j else 0)
            for i, j in zip(_ROWS, _COLUMNS, strict=True)
        ]
        rr, rg, rb, gg, gb, bb = spread_hw6
        # Cofactors; the matrix is symmetric.
        inverse_hw6 = [
            gg * bb - gb * gb,
            rb * gb - rg * bb,
            rg * gb - rb * gg,
            rr * bb - rb * rb,
            rb * rg - rr * gb,
            rr * gg - rg * rg,
        ]
        determinant_hw = rr * inverse_hw6[0] + rg * inverse_hw6[1] + rb * inverse_hw6[2]
        self._inverse_hw6 = [
            (each_hw / determinant_hw).astype(np.float32) for each_hw in inverse_hw6
        ]

    def times(self, alpha_hw: Floats) -> Floats:
        """The product with an alpha, of equal shape: zero where alpha follows from colour."""
        return self.windows_hw * (alpha_hw - self._planar(self.planes(alpha_hw)))

    def planes(self, alpha_hw: Floats) -> NDArray[np.float32]:
        """The mean of the planes of all windows that hold a pixel, hw4: three slopes over colour, and the offset."""
        seen_hw3, mean_hw3 = self._seen_hw3, self._mean_hw3
        told_hw4 = np.empty((*alpha_hw.shape, 4), np.float32)
        for channel in range(3):
            np.multiply(alpha_hw, seen_hw3[..., channel], out=told_hw4[..., channel])
        told_hw4[..., 3] = alpha_hw
        told_hw4 = _sums(told_hw4)
        mean_hw = told_hw4[..., 3] * self._share_hw
        r_hw, g_hw, b_hw = (
            told_hw4[..., channel] * self._share_hw - mean_hw3[..., channel] * mean_hw
            for channel in range(3)
        )
        rr, rg, rb, gg, gb, bb = self._inverse_hw6
        told_hw4[..., 0] = rr * r_hw + rg * g_hw + rb * b_hw
        told_hw4[..., 1] = rg * r_hw + gg * g_hw + gb * b_hw
        told_hw4[..., 2] = rb * r_hw + gb * g_hw + bb * b_hw
        told_hw4[..., 3] = mean_hw
        for channel in range(3):
            told_hw4[..., 3] -= told_hw4[..., channel] * mean_hw3[..., channel]
        return np.asarray(_sums(told_hw4) * self._share_hw[..., None], np.float32)

    def _planar(self, plane_hw4: Floats) -> Floats:
        return np.asarray(
            plane_hw4[..., 0] * self._seen_hw3[..., 0]
            + plane_hw4[..., 1] * self._seen_hw3[..., 1]
            + plane_hw4[..., 2] * self._seen_hw3[..., 2]
            + plane_hw4[..., 3],
            np.float32,
        )


def _sized(pixels: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return resized(pixels, width=shape[1], height=shape[0])


def _sums(values_hwC: NDArray[Any]) -> NDArray[Any]:
    """Over the window around each pixel, within the picture."""
    size = (2 * WINDOW + 1, 2 * WINDOW + 1)
    return np.asarray(
        cv2.boxFilter(values_hwC, -1, size, normalize=False, borderType=cv2.BORDER_CONSTANT)
    )
