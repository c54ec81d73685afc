"""One picture put where its transform says: `place` gives a `Placed`, premultiplied, only as large as its box.

The map from picture to canvas is exact to sub-pixels: flip, scale, rotate clockwise, move. Resampling is bilinear; a
picture made smaller is averaged over areas first. This module knows no collage and no other layer.

Suffixes: H, W picture pixels; h, w pixels of the box on the canvas; 3 = R, G, B; 4 = R, G, B, A.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from services.common.collage import Extent, Transform

# Cosines are rounded to so many digits, so that quarter turns are exact.
_ANGLE_DIGITS = 15
# A shift this near to whole pixels is one: a thousandth of what eight bits can show.
_WHOLE_PIXELS = 1e-6
# Canvas pixels per picture pixel below which the largest picture is a speck that nothing shows of. What divides by the
# scale stays finite above.
_SMALLEST_SCALE = 1e-9
_FULL = np.float32(255)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """A picture on the canvas.

    top, left: the box's first row and column; the box lies inside the canvas and may be empty.
    paint_3hw: float32 in [0, 1], colour times alpha.
    alpha_hw: float32 in [0, 1], a_i.
    area: the sum of alpha on an unbounded canvas, in canvas pixels.
    width, height: extent on an unbounded canvas of what is not wholly transparent, in canvas pixels.
    """

    top: int
    left: int
    paint_3hw: NDArray[np.float32]
    alpha_hw: NDArray[np.float32]
    area: float
    width: float
    height: float

    @property
    def box(self) -> tuple[slice, slice]:
        """Where it lies in an array of the canvas' size."""
        height, width = self.alpha_hw.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def on(self, canvas: Extent) -> NDArray[np.uint8]:
        """The picture as pixels of the canvas, HW4 with straight alpha, transparent black around."""
        pixels_HW4 = np.zeros((canvas.height, canvas.width, 4), np.uint8)
        # Where nothing is, black is divided by the smallest alpha there is.
        colour_3hw = self.paint_3hw / np.maximum(self.alpha_hw, np.finfo(np.float32).tiny)
        planes_4hw = np.concatenate([colour_3hw.clip(0, 1), self.alpha_hw[None]])
        pixels_HW4[self.box] = np.rint(planes_4hw * _FULL).astype(np.uint8).transpose(1, 2, 0)
        return pixels_HW4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """A picture's rectangle on the canvas: centre (canvas pixels), size (picture pixels), scale, direction."""

    x: float
    y: float
    width: int
    height: int
    scale: float
    cosine: float
    sine: float

    def part(self, rows: slice, columns: slice) -> "_Frame":
        """The rectangle of a part of the picture; it may reach beyond the picture."""
        right = (columns.start + columns.stop - self.width) / 2
        down = (rows.start + rows.stop - self.height) / 2
        return replace(
            self,
            x=self.x + self.scale * (self.cosine * right - self.sine * down),
            y=self.y + self.scale * (self.sine * right + self.cosine * down),
            width=columns.stop - columns.start,
            height=rows.stop - rows.start,
        )

    def bounds(self) -> tuple[float, float]:
        """Width and height of the upright box around the rectangle, canvas pixels."""
        width, height = self.scale * self.width, self.scale * self.height
        cosine, sine = abs(self.cosine), abs(self.sine)
        return cosine * width + sine * height, sine * width + cosine * height


def place(pixels_HW4: NDArray[np.uint8], transform: Transform, canvas: Extent) -> Placed:
    """The picture under `transform`, cut to the canvas.

    Args:
        pixels_HW4: sRGB with straight alpha.
        transform: where its centre goes, and how it is turned and sized.
        canvas: what it is cut to.
    """
    angle = math.radians(transform.rotation)
    frame = _Frame(
        x=canvas.width / 2 if transform.x is None else transform.x,
        y=canvas.height / 2 if transform.y is None else transform.y,
        width=pixels_HW4.shape[1],
        height=pixels_HW4.shape[0],
        scale=max(transform.scale, _SMALLEST_SCALE),
        cosine=round(math.cos(angle), _ANGLE_DIGITS),
        sine=round(math.sin(angle), _ANGLE_DIGITS),
    )
    if transform.flip_horizontal:
        pixels_HW4 = pixels_HW4[:, ::-1]
    if transform.flip_vertical:
        pixels_HW4 = pixels_HW4[::-1]
    alpha_HW = pixels_HW4[..., 3]
    rows, columns = _solid(alpha_HW, axis=1), _solid(alpha_HW, axis=0)
    width, height = frame.part(rows, columns).bounds()
    area = float(alpha_HW.sum(dtype=np.int64)) / 255 * frame.scale**2
    # The transparent rim of one pixel belongs to what is resampled: edges fade into it.
    rows_seen, columns_seen = _seen(frame, canvas)
    rows = _common(slice(rows.start - 1, rows.stop + 1), rows_seen, frame.height)
    columns = _common(slice(columns.start - 1, columns.stop + 1), columns_seen, frame.width)
    part = frame.part(rows, columns)
    part_HW4 = pixels_HW4[rows, columns]
    box_rows, box_columns = _box(part, canvas)
    planes_4hw = np.zeros((4, 0, 0), np.float32)
    if part_HW4.size and area > 0:
        if part.scale < 1:
            planes_4HW, part = _shrunk(part_HW4, part)
        else:
            planes_4HW = np.empty((4, *part_HW4.shape[:2]), np.float32)
            for plane_HW, premultiplied_HW in zip(
                planes_4HW, _premultiplied(part_HW4), strict=True
            ):
                plane_HW[:] = premultiplied_HW
        planes_4hw = _sampled(planes_4HW, part, box_rows, box_columns)
    return Placed(
        top=box_rows.start,
        left=box_columns.start,
        paint_3hw=planes_4hw[:3],
        alpha_hw=planes_4hw[3],
        area=area,
        width=width if area > 0 else 0.0,
        height=height if area > 0 else 0.0,
    )


def stretch(pixels_HW3: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """An opaque picture resampled to another size, antialiased; the same bytes if it has that size already."""
    image = Image.fromarray(pixels_HW3)
    if image.size == (width, height):
        return pixels_HW3
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _solid(alpha_HW: NDArray[np.uint8], *, axis: int) -> slice:
    """The rows (axis 1) or columns (axis 0) that are not wholly transparent."""
    found = np.flatnonzero(alpha_HW.any(axis=axis))
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, 0)


def _seen(frame: _Frame, canvas: Extent) -> tuple[slice, slice]:
    """Rows and columns of the picture, not cut to it, outside of which nothing can reach the canvas."""
    right, down = canvas.width / 2 - frame.x, canvas.height / 2 - frame.y
    cosine, sine = abs(frame.cosine), abs(frame.sine)
    # Two canvas pixels or two picture pixels, whichever is wider, are beyond the reach of any sample.
    margin = 2.0 + 2.0 / frame.scale
    x = (frame.cosine * right + frame.sine * down) / frame.scale + frame.width / 2
    y = (frame.cosine * down - frame.sine * right) / frame.scale + frame.height / 2
    half_width = (cosine * canvas.width + sine * canvas.height) / frame.scale / 2 + margin
    half_height = (sine * canvas.width + cosine * canvas.height) / frame.scale / 2 + margin
    return (
        slice(math.floor(y - half_height), math.ceil(y + half_height)),
        slice(math.floor(x - half_width), math.ceil(x + half_width)),
    )


def _common(first: slice, second: slice, length: int) -> slice:
    """What two slices share inside an axis of this length."""
    start = min(max(first.start, second.start, 0), length)
    return slice(start, max(start, min(first.stop, second.stop, length)))


def _box(frame: _Frame, canvas: Extent) -> tuple[slice, slice]:
    """Rows and columns of the canvas that the rectangle can touch."""
    width, height = frame.bounds()
    # An edge between pixels is spread over the two of them.
    rows = slice(math.floor(frame.y - height / 2) - 1, math.ceil(frame.y + height / 2) + 1)
    columns = slice(math.floor(frame.x - width / 2) - 1, math.ceil(frame.x + width / 2) + 1)
    return (
        _common(rows, slice(0, canvas.height), canvas.height),
        _common(columns, slice(0, canvas.width), canvas.width),
    )


def _premultiplied(pixels_HW4: NDArray[np.uint8]) -> Iterator[NDArray[np.float32]]:
    """R, G, B times alpha, and alpha, one plane HW after the other: whole, a large picture is too large."""
    alpha_HW = pixels_HW4[..., 3].astype(np.float32) / _FULL
    for channel in range(3):
        yield pixels_HW4[..., channel].astype(np.float32) / _FULL * alpha_HW
    yield alpha_HW


def _shrunk(pixels_HW4: NDArray[np.uint8], frame: _Frame) -> tuple[NDArray[np.float32], _Frame]:
    """The picture averaged over canvas-sized cells, premultiplied, with the frame (of scale 1) it then has.

    Cells are aligned with the canvas' pixels where nothing is rotated, so that nothing needs resampling after this. A
    ring of empty cells is left around.
    """
    # Where the first picture pixel starts in its cell, in [0, 1).
    phase_x = (frame.x - frame.scale * frame.width / 2) % 1.0
    phase_y = (frame.y - frame.scale * frame.height / 2) % 1.0
    planes_4HW = np.stack(
        [
            np.pad(
                _averaged(_averaged(plane_HW, frame.scale, phase_y).T, frame.scale, phase_x).T, 1
            )
            for plane_HW in _premultiplied(pixels_HW4)
        ]
    )
    height, width = planes_4HW.shape[1:]
    right = width / 2 - 1 - phase_x - frame.scale * frame.width / 2
    down = height / 2 - 1 - phase_y - frame.scale * frame.height / 2
    shrunk = replace(
        frame,
        x=frame.x + frame.cosine * right - frame.sine * down,
        y=frame.y + frame.sine * right + frame.cosine * down,
        width=width,
        height=height,
        scale=1.0,
    )
    return planes_4HW, shrunk


def _averaged(plane_HW: NDArray[np.float32], scale: float, phase: float) -> NDArray[np.float32]:
    """Rows averaged into cells of 1 / scale rows, the first row starting `phase` cells after the first cell.

    Exact area weights: whole rows are summed, the rows that a cell's edges cut are weighted.
    """
    length = plane_HW.shape[0]
    cells = math.ceil(phase + length * scale)
    edges = np.clip((np.arange(cells + 1) - phase) / scale, 0, length)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    sums_hW = np.add.reduceat(plane_HW, whole[:-1], axis=0, dtype=np.float64)
    # `reduceat` answers one row where there is none to sum, and sums the last cell to the end.
    sums_hW[whole[:-1] == whole[1:]] = 0
    sums_hW[-1] = plane_HW[whole[-2] : whole[-1]].sum(axis=0, dtype=np.float64)
    beyond_hW = (edges - whole)[:, None] * plane_HW[whole]
    averages_hW = (sums_hW + np.diff(beyond_hW, axis=0)) * scale
    return np.asarray(np.clip(averages_hW, 0, 1), np.float32)


def _sampled(
    planes_4HW: NDArray[np.float32], frame: _Frame, rows: slice, columns: slice
) -> NDArray[np.float32]:
    """The picture (scale at least 1) at the canvas pixels of the box, each weighted by how much of it is covered."""
    shape = (4, rows.stop - rows.start, columns.stop - columns.start)
    if 0 in shape:
        return np.zeros(shape, np.float32)
    height, width = planes_4HW.shape[1:]
    left, top = frame.x - width / 2, frame.y - height / 2
    is_shift = frame.scale == 1 and frame.cosine == 1
    if is_shift and max(abs(left - round(left)), abs(top - round(top))) < _WHOLE_PIXELS:
        return _shifted(planes_4HW, rows.start - round(top), columns.start - round(left), shape)
    # Box coordinates to picture coordinates, both continuous; 1 is for the rim, which repeats the edge so that a
    # picture's border is as opaque as its inside. How much of a canvas pixel lies inside is reckoned apart.
    to_x, to_y = columns.start - frame.x, rows.start - frame.y
    cosine, sine = frame.cosine / frame.scale, frame.sine / frame.scale
    matrix = (
        *(cosine, sine, cosine * to_x + sine * to_y + width / 2 + 1),
        *(-sine, cosine, cosine * to_y - sine * to_x + height / 2 + 1),
    )
    rimmed_4HW = np.pad(planes_4HW, ((0, 0), (1, 1), (1, 1)), mode="edge")
    planes_4hw = np.empty(shape, np.float32)
    for plane_HW, plane_hw in zip(rimmed_4HW, planes_4hw, strict=True):
        # Pillow interpolates 32-bit float planes in double precision.
        plane_hw[:] = Image.fromarray(plane_HW).transform(
            (shape[2], shape[1]), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
    # A transparent border has faded out where a pixel begins to lie outside.
    if _has_border(planes_4HW[3]):
        x_w = np.arange(shape[2]) + 0.5 + to_x
        y_h = (np.arange(shape[1]) + 0.5 + to_y)[:, None]
        across_hw = _covered(frame.cosine * x_w + frame.sine * y_h, frame.scale * width)
        along_hw = _covered(frame.cosine * y_h - frame.sine * x_w, frame.scale * height)
        planes_4hw *= (across_hw * along_hw).astype(np.float32)
    return planes_4hw


def _has_border(alpha_HW: NDArray[np.float32]) -> bool:
    edges = (alpha_HW[0], alpha_HW[-1], alpha_HW[:, 0], alpha_HW[:, -1])
    return any(bool(edge.any()) for edge in edges)


def _shifted(
    planes_4HW: NDArray[np.float32], top: int, left: int, shape: tuple[int, int, int]
) -> NDArray[np.float32]:
    """The window of this shape whose corner is at (top, left) of the picture, zero where it reaches beyond."""
    planes_4hw = np.zeros(shape, np.float32)
    rows = _common(slice(top, top + shape[1]), slice(0, planes_4HW.shape[1]), planes_4HW.shape[1])
    columns = _common(
        slice(left, left + shape[2]), slice(0, planes_4HW.shape[2]), planes_4HW.shape[2]
    )
    planes_4hw[
        :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ] = planes_4HW[:, rows, columns]
    return planes_4hw


def _covered(offset_hw: NDArray[np.float64], length: float) -> NDArray[np.float64]:
    """The part of a pixel, `offset_hw` from the middle of a stretch of this length (at least 1), that lies on it."""
    return np.clip(length / 2 + 0.5 - np.abs(offset_hw), 0, 1)
