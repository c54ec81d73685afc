"""Detectors that are networks: the control picture of a layer by an operator's ONNX file, in one of three forms.

Main function: `open_detectors`. A network is shown a `Window` of the canvas around its layer, alone on neutral ground,
and what it gives is laid back to where the window was. This module knows neither collages nor storage.

Suffixes: H, W canvas pixels; h, w pixels of what a network is shown or gives; N = 1 picture; K keypoints; X, Y bins of
an axis; 3 = R, G, B; 4 = R, G, B, straight alpha.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from services.common.models_file import read_detectors
from services.compositor.network import Network, resized
from services.compositor.pose import keypoints, skeleton
from services.compositor.structure import DETECTORS, Detector, on_ground

# Around what it is shown a convolution sees zeros, and may take that for an edge: it lies outside the layer.
EDGE_PADDING = 17 / 16
# What a top-down network is shown, in boxes of the person: RTMPose is trained so.
POSE_PADDING = 1.25
# From this alpha on, a pixel's depth is the layer's and not the ground's.
_SOLID = 128
# Depths that differ by a smaller part of themselves are one, told apart by rounding alone.
_FLAT = 1e-4

_Given = Sequence[NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The part of a canvas that a network is shown; rows and columns may lie beyond the canvas."""

    rows: range
    columns: range

    @classmethod
    def around(
        cls,
        alpha_HW: NDArray[np.uint8],
        *,
        width: int,
        height: int,
        padding: float = 1.0,
        largest_scale: float = math.inf,
    ) -> "Window":
        """The window around what is not wholly transparent, of the shape of a network's input.

        Args:
            alpha_HW: not all zero.
            width: of the input, pixels.
            height: the same.
            padding: the smallest window, in boxes of the layer.
            largest_scale: input pixels per canvas pixel at most.
        """
        rows, columns = np.flatnonzero(alpha_HW.any(axis=1)), np.flatnonzero(alpha_HW.any(axis=0))
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        scale = min(
            height / (padding * (bottom - top)), width / (padding * (right - left)), largest_scale
        )
        size = (max(1, round(height / scale)), max(1, round(width / scale)))
        starts = ((top + bottom - size[0]) // 2, (left + right - size[1]) // 2)
        return cls(
            rows=range(starts[0], starts[0] + size[0]),
            columns=range(starts[1], starts[1] + size[1]),
        )

    def seen(self, canvas_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """What lies in it. Beyond the canvas its border goes on, so that the cut of a layer there is no edge."""
        rows = np.asarray(self.rows).clip(0, canvas_HW3.shape[0] - 1)
        columns = np.asarray(self.columns).clip(0, canvas_HW3.shape[1] - 1)
        return np.asarray(canvas_HW3[rows[:, None], columns])

    def laid(self, map_hw: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A map of the window on a canvas of this shape, HW, zero around it."""
        height, width = shape
        window_hw = resized(map_hw, width=len(self.columns), height=len(self.rows))
        top, left = max(self.rows.start, 0), max(self.columns.start, 0)
        inside_hw = window_hw[top - self.rows.start :, left - self.columns.start :]
        inside_hw = inside_hw[: height - top, : width - left]
        map_HW = np.zeros((height, width), np.float32)
        map_HW[top : top + inside_hw.shape[0], left : left + inside_hw.shape[1]] = inside_hw
        return map_HW


_Paint = Callable[[Network, _Given, Window, NDArray[np.uint8]], NDArray[np.uint8]]


def open_detectors(models: str, *, threads: int) -> Mapping[str, Detector]:
    """Every detector there is, by kind: those of a models.yaml, opened, and those that are no networks.

    Args:
        models: see `read_detectors`.
        threads: CPU threads of one network; another number may change the last bit of what it draws.

    Raises:
        InvalidSetting: naming the place in the file, what is wrong there and what is required.
    """
    detectors = dict(DETECTORS)
    for source in read_detectors(models):
        if source.kind in DETECTORS:
            raise source.place.wrong("allowed: another kind, as this one is drawn without a file")
        network = Network(source, threads=threads)
        detectors[source.kind] = Detector(
            draw=functools.partial(draw, network), digest=network.digest
        )
    return detectors


def draw(network: Network, pixels_HW4: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The control picture of a layer, HW3, black where the layer is not.

    Args:
        network: of any form.
        pixels_HW4: the layer on the canvas.
    """
    alpha_HW = pixels_HW4[..., 3]
    if not alpha_HW.any():
        return np.zeros((*alpha_HW.shape, 3), np.uint8)
    paint, fit = _FORMS[network.source.form]
    window = Window.around(alpha_HW, width=network.width, height=network.height, **fit)
    given = network.run(window.seen(_on_ground(pixels_HW4)))
    picture_HW3 = paint(network, given, window, alpha_HW)
    picture_HW3[alpha_HW == 0] = 0
    return picture_HW3


def _paint_edges(
    network: Network, given: _Given, window: Window, alpha_HW: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Edges as soft as the network has them: 0 for none, 255 for one."""
    edges_HW = window.laid(_map(given), alpha_HW.shape)
    return _grey(1 - edges_HW if network.source.is_inverted else edges_HW)


def _paint_depth(
    network: Network, given: _Given, window: Window, alpha_HW: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """How near each part is: 0 for the layer's farthest, 255 for its nearest and for all of a flat one."""
    map_HW = window.laid(_map(given), alpha_HW.shape)
    near_HW = -map_HW if network.source.is_inverted else map_HW
    solid_HW = (alpha_HW >= min(_SOLID, int(alpha_HW.max()))).astype(np.uint8)
    # Resampled, the outermost pixels are partly the ground's.
    rim = max(1, math.ceil(len(window.rows) / network.height))
    inner_HW = cv2.erode(solid_HW, np.ones((2 * rim + 1, 2 * rim + 1)))
    depths = near_HW[(inner_HW if inner_HW.any() else solid_HW) > 0]
    low, high = float(depths.min()), float(depths.max())
    if high - low <= _FLAT * max(abs(low), abs(high)):
        return _grey(np.ones_like(near_HW))
    return _grey((near_HW - np.float32(low)) / np.float32(high - low))


def _paint_pose(
    network: Network, given: _Given, window: Window, alpha_HW: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The skeleton of the person that a layer is."""
    simcc_x_NKX, simcc_y_NKY = given
    shown_K2, sure_K = keypoints(
        simcc_x_NKX[0], simcc_y_NKY[0], width=network.width, height=network.height
    )
    scale = (len(window.columns) / network.width, len(window.rows) / network.height)
    # Pixels are as wide as they are: their centres lie half of one inside.
    points_K2 = (shown_K2 + 0.5) * scale - 0.5 + (window.columns.start, window.rows.start)
    height, width = alpha_HW.shape
    return skeleton(points_K2, sure_K >= network.source.confidence, width=width, height=height)


# How each form is painted, and what its network is shown. A layer is never enlarged for its edges: they are as wide on
# the canvas as the network draws them.
_FORMS: Mapping[str, tuple[_Paint, dict[str, float]]] = {
    "edges": (_paint_edges, {"padding": EDGE_PADDING, "largest_scale": 1.0}),
    "depth": (_paint_depth, {}),
    "pose": (_paint_pose, {"padding": POSE_PADDING}),
}


def _map(given: _Given) -> NDArray[np.float32]:
    """The one map of a network that gives one, hw."""
    (map_hw,) = given
    return map_hw.reshape(map_hw.shape[-2:])


def _grey(values_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Values in [0, 1], HW, as greys, HW3."""
    grey_HW = np.rint(np.clip(values_HW, 0, 1) * np.float32(255)).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)


def _on_ground(pixels_HW4: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha_HW = pixels_HW4[..., 3]
    return np.dstack([on_ground(pixels_HW4[..., channel], alpha_HW) for channel in range(3)])
