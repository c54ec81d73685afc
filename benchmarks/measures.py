"""What is measured of a picture drawn from a collage: one number a measure, the mean over the collage's layers.

Main function: `measure`. The judge's answers are taken as they come: no threshold here was set by looking at pictures
that the system drew. Suffixes: L layers; B pictures; H, W pixels; h, w the judge's cells of 4 pixels; C = 3;
4 = premultiplied RGB and alpha.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 its usual name
from numpy.typing import NDArray
from PIL import Image

from benchmarks.collages import SIDE, Drawn, Scene
from benchmarks.judge import CELL, CROP, KEYS, NAMES, Judge

# A crop is this much wider than what it shows, and no smaller than this many pixels.
ROOM, SMALLEST = 1.25, 28
# A cell or pixel belongs to a layer of which more than this can be seen there.
INSIDE = 0.5
# A layer is there where something stands in this share of its cells, and once more where so many cells together, apart
# from every layer, show it: a quarter of the smallest layers' area.
FOUND, AGAIN = 0.25, 16
# What lies within so many cells of a layer's mask still counts as in it.
NEAR = 1
# A shadow is looked for within so many pixels of a layer, on ground that no layer covers, and compared with the ground
# farther than FAR from all. DARKER is the ratio of their darkest fifths at which, on the judge's own composed scenes,
# as many layers with a shadow are missed as layers without are told to have one: 27 %.
SHADE, FAR, DARKER = 7, 12, 1.045
# Edges agree within so many pixels; Canny's two thresholds on the gradient of [0, 1] grey values, his blur in pixels.
TOLERANCE, WEAK, STRONG, BLUR = 2, 0.06, 0.15, 1.0
# The two axes of the figure: means of these.
SCORES = {
    "fidelity": ("right", "own nearest", "edges"),
    "harmony": ("one look", "shadow", "seamless"),
}
# Half the width of the band around a layer's border in which seams are looked for, pixels.
BAND = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Which rendering of its concept one drawn object is nearest to.

    own: whether it is its own layer's, by the judge's features; own_pixels: the same by plain pixels at 16 x 16;
    margin: cosine to its own less that to the nearest other; nearest: the look it is nearest to, by features.
    """

    own: bool
    own_pixels: bool
    margin: float
    nearest: str


def measure(
    judge: Judge, scene: Scene, drawn: Drawn, through_HWC: NDArray[np.uint8] | None = None
) -> dict[str, float]:
    """Every measure of one picture; NaN where a collage has nothing to measure.

    Args:
        judge: who names things.
        scene: what was asked for.
        drawn: what came back.
        through_HWC: the composite once through the autoencoder, from which change is counted; none, no "adherence".
    """
    found = spatial(judge, scene, drawn)
    likenesses = [likeness(judge, scene, drawn, index) for index in range(len(scene.pieces))]
    found["own nearest"] = _mean(each.own for each in likenesses)
    found["own nearest, pixels"] = _mean(each.own_pixels for each in likenesses)
    found["margin"] = _mean(each.margin for each in likenesses)
    found["edges"] = edges(drawn)
    found |= harmony(judge, scene, drawn)
    if through_HWC is not None:
        found["adherence"] = adherence(scene, drawn, through_HWC)
    for name, parts in SCORES.items():
        found[name] = float(np.nanmean([found[part] for part in parts]))
    return found


def spatial(judge: Judge, scene: Scene, drawn: Drawn) -> dict[str, float]:
    """What the judge finds in the layers' masks, and outside.

    right: layers whose crop is named rightly, of all concepts; filled: share of a mask's cells where something stands;
    missing: layers with too few of these; leaked: cells outside all masks where something stands, as a share of the
    masks; again: how often something outside, large enough, is named as one of the layers, a layer.
    """
    concepts = np.asarray([KEYS.index(piece.cutout.key) for piece in scene.pieces])
    named = judge.crops(crops(drawn.picture_HWC, drawn.mask_LHW)).concept_BN.argmax(axis=1)
    (stands_hw,), _ = judge.cells(drawn.picture_HWC[None])
    mask_Lhw = _cells(drawn.mask_LHW)
    filled = [
        stands_hw[mask_hw > INSIDE].mean() for mask_hw in mask_Lhw if (mask_hw > INSIDE).any()
    ]
    covered_hw = mask_Lhw.max(axis=0) > 0
    stray_hw = stands_hw & ~_grown(covered_hw, NEAR)
    islands = [island_hw for island_hw in _islands(stray_hw) if island_hw.sum() >= AGAIN]
    again = 0
    if islands:
        mask_NHW = np.stack(islands).repeat(CELL, axis=1).repeat(CELL, axis=2).astype(np.float32)
        strays = judge.crops(crops(drawn.picture_HWC, mask_NHW)).concept_BN.argmax(axis=1)
        again = int(np.isin(strays, concepts).sum())
    return {
        "right": float((named == concepts).mean()),
        "filled": _mean(filled),
        "missing": _mean(share < FOUND for share in filled),
        "leaked": float(stray_hw.sum() / max(1, covered_hw.sum())),
        "again": again / len(concepts),
    }


def likeness(judge: Judge, scene: Scene, drawn: Drawn, index: int) -> Likeness:
    """Compares the object of one layer with all renderings of its concept, each put where the layer stands.

    All are seen through one window, all renderings' shapes together where the layers above leave it free, on the drawn
    picture's own ground colour: neither silhouette nor ground speaks for one of them.
    """
    own = scene.pieces[index].cutout
    candidates = [own, *own.others()]
    alone_NHW4 = np.stack([scene.alone(index, cutout) for cutout in candidates])
    free_HW1 = np.clip(1 - drawn.mask_LHW[index + 1 :].sum(axis=0), 0, 1)[..., None]
    window_HW1 = alone_NHW4[..., 3:].max(axis=0) * free_HW1
    picture_HWC = drawn.picture_HWC / np.float32(255)
    ground_HW = drawn.mask_LHW.sum(axis=0) < 0.02
    ground_C = np.median(picture_HWC[ground_HW], axis=0) if ground_HW.any() else np.full(3, 0.6)
    shown = [picture_HWC * window_HW1 + ground_C * (1 - window_HW1)]
    for alone_HW4 in alone_NHW4:
        share_HW1 = alone_HW4[..., 3:] * free_HW1
        shown.append(alone_HW4[..., :3] * free_HW1 + ground_C * (1 - share_HW1))
    seen_BHWC = np.rint(np.clip(np.stack(shown), 0, 1) * 255).astype(np.uint8)
    crop_BHWC = np.concatenate(
        [crops(seen_HWC, window_HW1[None, ..., 0]) for seen_HWC in seen_BHWC]
    )
    features_BD = judge.crops(crop_BHWC).features_BD
    cosines = features_BD[1:] @ features_BD[0]
    small = F.avg_pool2d(torch.from_numpy(crop_BHWC).permute(0, 3, 1, 2).float(), CROP // 16)
    distances = (small[1:] - small[:1]).square().mean(dim=(1, 2, 3)).numpy()
    return Likeness(
        own=bool(cosines.argmax() == 0),
        own_pixels=bool(distances.argmin() == 0),
        margin=float(cosines[0] - cosines[1:].max()),
        nearest=candidates[int(cosines.argmax())].look,
    )


def edges(drawn: Drawn) -> float:
    """F1 of the picture's edges against the composite's inside each visible mask, within a tolerance."""
    return _mean(agreement for agreement in layer_edges(drawn) if not math.isnan(agreement))


def layer_edges(drawn: Drawn) -> list[float]:
    """The same for each layer, NaN for one without an edge."""
    asked_HW, made_HW = _canny(drawn.composite_HWC), _canny(drawn.picture_HWC)
    found = []
    for mask_HW in drawn.mask_LHW:
        inside_HW = mask_HW > INSIDE
        asked, made = asked_HW & inside_HW, made_HW & inside_HW
        if asked.any():
            recall = (_grown(made_HW, TOLERANCE) & asked).sum() / asked.sum()
            precision = (_grown(asked_HW, TOLERANCE) & made).sum() / max(1, made.sum())
            found.append(float(2 * precision * recall / max(1e-9, precision + recall)))
        else:
            found.append(math.nan)
    return found


def harmony(judge: Judge, scene: Scene, drawn: Drawn) -> dict[str, float]:
    """Whether the picture is one.

    one look: pairs of objects that the judge takes for one artist's, told their concepts; shadow: layers beside which
    the ground is darker than elsewhere; shadow cells: share of the cells beside them that the judge sees in shadow;
    seamless: mean gradient off the layers' borders (within them and around) as a share of that and the mean gradient on
    them: one half where borders cannot be told, 0 where there is nothing but borders.
    """
    concepts = [KEYS.index(piece.cutout.key) for piece in scene.pieces]
    verdict = judge.crops(crops(drawn.picture_HWC, drawn.mask_LHW))
    looks = verdict.rendering_BNL[np.arange(len(concepts)), concepts].argmax(axis=1)
    _, (dark_hw,) = judge.cells(drawn.picture_HWC[None])
    dark_HW = dark_hw.repeat(CELL, axis=0).repeat(CELL, axis=1)
    grey_HW = drawn.picture_HWC.mean(axis=2, dtype=np.float32) / 255
    gradient_HW = np.hypot(*np.gradient(grey_HW))
    covered_HW = drawn.mask_LHW.max(axis=0) > INSIDE / 2
    bare_HW, far_HW = ~_grown(covered_HW, 1), ~_grown(covered_HW, FAR)
    shadows, cells, seams = [], [], []
    for mask_HW in drawn.mask_LHW:
        solid_HW = mask_HW > INSIDE
        if not solid_HW.any():
            continue
        beside_HW = _grown(solid_HW, SHADE) & bare_HW
        if beside_HW.any() and far_HW.any():
            near, far = (np.quantile(grey_HW[part_HW], 0.2) for part_HW in (beside_HW, far_HW))
            shadows.append(far > DARKER * near)
            cells.append(dark_HW[beside_HW].mean())
        band_HW = _grown(solid_HW, BAND) & _grown(~solid_HW, BAND)
        off_HW = _grown(solid_HW, 4 * BAND) & ~band_HW
        on, off = float(gradient_HW[band_HW].mean()), float(gradient_HW[off_HW].mean())
        seams.append(off / max(1e-9, on + off))
    return {
        "one look": _mean(first == second for first, second in combinations(looks, 2)),
        "shadow": _mean(shadows),
        "shadow cells": _mean(cells),
        "seamless": _mean(seams),
    }


def adherence(scene: Scene, drawn: Drawn, through_HWC: NDArray[np.uint8]) -> float:
    """Correlation, over the cells inside layers, of each layer's own noise with how much the picture changed there."""
    change_HW = np.abs(drawn.picture_HWC.astype(np.float32) - through_HWC).mean(axis=2)
    mask_Lhw, (change_hw,) = _cells(drawn.mask_LHW), _cells(change_HW[None])
    inside_hw = mask_Lhw.max(axis=0) > INSIDE
    noise_L = np.asarray([piece.noise for piece in scene.pieces])
    asked = noise_L[mask_Lhw.argmax(axis=0)][inside_hw]
    if len(asked) < 2 or asked.std() == 0:
        return math.nan
    return float(np.corrcoef(asked, change_hw[inside_hw])[0, 1])


def crops(picture_HWC: NDArray[np.uint8], mask_LHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A square around each mask, with room, [L, CROP, CROP, 3]; beyond the frame its edge is repeated."""
    padded_HWC = np.pad(picture_HWC, ((SIDE, SIDE), (SIDE, SIDE), (0, 0)), mode="edge")
    found = []
    for mask_HW in mask_LHW:
        rows, columns = np.nonzero(mask_HW > INSIDE / 2)
        if not len(rows):
            rows = columns = np.asarray([0, SIDE - 1])
        reach = max(np.ptp(rows) + 1, np.ptp(columns) + 1, SMALLEST) * ROOM / 2
        y, x = (
            SIDE + (rows.min() + rows.max() + 1) / 2,
            SIDE + (columns.min() + columns.max() + 1) / 2,
        )
        box = (x - reach, y - reach, x + reach, y + reach)
        crop = Image.fromarray(padded_HWC).resize((CROP, CROP), Image.Resampling.BILINEAR, box=box)
        found.append(np.asarray(crop))
    return np.stack(found)


def names(judge: Judge, picture_BHWC: NDArray[np.uint8]) -> list[str]:
    """What the judge calls pictures of one object: it finds where something is, and names the crop around that."""
    cells_Bhw, _ = judge.cells(picture_BHWC)
    found = []
    for picture_HWC, cells_hw in zip(picture_BHWC, cells_Bhw, strict=True):
        mask_hw = cells_hw.astype(np.float32)
        mask_HW = mask_hw.repeat(CELL, axis=0).repeat(CELL, axis=1)
        found.append(crops(picture_HWC, mask_HW[None])[0])
    top = judge.crops(np.stack(found)).concept_BN.argmax(axis=1)
    return [NAMES[index] if index < len(NAMES) else "nothing" for index in top]


def _canny(picture_HWC: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Canny's edges (1986): blur, gradient, its ridges, and of the weak ones those that touch a strong one."""
    grey = torch.from_numpy(picture_HWC.mean(axis=2, dtype=np.float32))[None, None] / 255
    at = torch.arange(-3, 4)
    weight = torch.exp(-0.5 * (at / BLUR) ** 2)
    weight = weight / weight.sum()
    padded = F.pad(grey, (3, 3, 3, 3), mode="replicate")
    grey_HW = F.conv2d(F.conv2d(padded, weight.view(1, 1, 1, -1)), weight.view(1, 1, -1, 1))[
        0, 0
    ].numpy()
    down_HW, right_HW = np.gradient(grey_HW)
    size_HW = np.hypot(down_HW, right_HW)
    turn_HW = np.rint(np.arctan2(down_HW, right_HW) / (math.pi / 4)).astype(int) % 4
    padded_HW = np.pad(size_HW, 1)
    ridge_HW = np.zeros(size_HW.shape, bool)
    for turn, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded_HW[1 + dy : SIDE + 1 + dy, 1 + dx : SIDE + 1 + dx]
        behind = padded_HW[1 - dy : SIDE + 1 - dy, 1 - dx : SIDE + 1 - dx]
        ridge_HW |= (turn_HW == turn) & (size_HW >= ahead) & (size_HW > behind)
    weak_HW = ridge_HW & (size_HW > WEAK)
    edge_HW = ridge_HW & (size_HW > STRONG)
    while True:
        more_HW = weak_HW & _grown(edge_HW, 1)
        if (more_HW == edge_HW).all():
            return edge_HW
        edge_HW = more_HW


def _grown(mask_HW: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """True within so many steps, diagonals counted as one."""
    plane = torch.from_numpy(np.ascontiguousarray(mask_HW)).float()[None, None]
    return np.asarray(F.max_pool2d(plane, 2 * reach + 1, 1, reach)[0, 0].numpy() > 0)


def _islands(mask_hw: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The connected parts, corners not counted as touching."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask_hw), strict=True)}
    islands = []
    while left:
        edge, island_hw = [left.pop()], np.zeros(mask_hw.shape, bool)
        while edge:
            y, x = edge.pop()
            island_hw[y, x] = True
            near = {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} & left
            left -= near
            edge += near
        islands.append(island_hw)
    return islands


def _cells(plane_LHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means over the judge's cells."""
    count = len(plane_LHW)
    grid = (count, SIDE // CELL, CELL, SIDE // CELL, CELL)
    return np.asarray(plane_LHW.reshape(grid).mean(axis=(2, 4)))


def _mean(values: object) -> float:
    listed = [float(value) for value in values]  # type: ignore[attr-defined]
    return float(np.mean(listed)) if listed else math.nan
