"""The ladder's arithmetic, on pictures and points made here; the art and the judge are not needed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.collages import Cutout, Dials, Drawn, Piece, Scene
from benchmarks.ladder import Interval, gap
from benchmarks.measures import _islands, adherence, crops, edges, layer_edges

RNG = np.random.default_rng(0)


def scene(*noises: float) -> Scene:
    cutout = Cutout(key="sushi", look="noto")
    return Scene(
        pieces=tuple(
            Piece(cutout=cutout, x=32 + 64 * index, y=64, width=40, rotation=0, noise=noise)
            for index, noise in enumerate(noises)
        ),
        ground="on sand",
        colour=(200, 180, 140),
        told=tuple(range(len(noises))),
        seed=0,
    )


def drawn(picture_HWC: np.ndarray, composite_HWC: np.ndarray) -> Drawn:
    """Two layers: the left and the right square of the canvas."""
    mask_LHW = np.zeros((2, 128, 128), np.float32)
    mask_LHW[0, 44:84, 12:52] = 1
    mask_LHW[1, 44:84, 76:116] = 1
    return Drawn(picture_HWC=picture_HWC, composite_HWC=composite_HWC, mask_LHW=mask_LHW, png=b"")


def boxes(shift: int = 0) -> np.ndarray:
    """A dark box in each layer, moved down."""
    picture_HWC = np.full((128, 128, 3), 220, np.uint8)
    for left in (22, 86):
        picture_HWC[54 + shift : 74 + shift, left : left + 20] = 40
    return picture_HWC


def test_edges_agree_with_themselves_within_the_tolerance_and_not_beyond() -> None:
    assert edges(drawn(boxes(), boxes())) == 1
    assert edges(drawn(boxes(1), boxes())) == 1
    assert edges(drawn(boxes(6), boxes())) < 0.8
    assert edges(drawn(np.full((128, 128, 3), 220, np.uint8), boxes())) == 0


def test_edges_are_told_layer_by_layer() -> None:
    picture_HWC = boxes()
    picture_HWC[:, :64] = 220
    lost, kept = layer_edges(drawn(picture_HWC, boxes()))
    assert (lost, kept) == (0, 1)
    nothing, some = layer_edges(drawn(boxes(), picture_HWC))
    assert math.isnan(nothing) and some == 1


def test_structure_on_every_second_layer() -> None:
    dials = Dials(noise=0.9, structure="canny")
    for only, expected in ((None, [1, 1, 1]), (0, [1, 0, 1]), (1, [0, 1, 0])):
        has_it = [replace(dials, only=only).is_structured(index) for index in range(3)]
        assert has_it == expected
    assert not Dials(noise=0.9).is_structured(0)


@pytest.mark.parametrize(("noises", "sign"), [((0.9, 0.3), 1), ((0.3, 0.9), -1)])
def test_adherence_follows_the_layer_that_was_asked_to_change(
    noises: tuple[float, float], sign: int
) -> None:
    changed_HWC = boxes().astype(np.int16)
    changed_HWC[44:84, 12:52] += RNG.integers(-30, 31, (40, 40, 3), np.int16)
    after = drawn(np.clip(changed_HWC, 0, 255).astype(np.uint8), boxes())
    assert adherence(scene(*noises), after, boxes()) * sign > 0.8


def test_adherence_is_not_defined_where_one_noise_is_asked_for() -> None:
    assert np.isnan(adherence(scene(0.5, 0.5), drawn(boxes(), boxes()), boxes()))


def test_islands_touch_along_sides_only() -> None:
    mask_hw = np.asarray([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]], bool)
    islands = _islands(mask_hw)
    assert sorted(int(island_hw.sum()) for island_hw in islands) == [2, 3]
    assert (np.sum(islands, axis=0) == mask_hw).all()


def test_a_crop_is_a_square_around_its_mask_with_room() -> None:
    (left, right) = crops(boxes(), drawn(boxes(), boxes()).mask_LHW)
    assert left.shape == (64, 64, 3) and (left == right).all()
    dark_HW = left.mean(axis=2) < 130
    # Twenty of the forty pixels that the mask is wide, and a quarter more room.
    assert np.ptp(np.nonzero(dark_HW)[1]) + 1 == pytest.approx(64 * 20 / 50, abs=1.5)


def test_the_gap_to_a_curve() -> None:
    curve = [(1.0, 0.2), (0.6, 0.6), (0.2, 0.8)]

    def points(fidelity: float, harmonious: float) -> np.ndarray:
        return np.repeat(np.asarray([(fidelity, harmonious), *curve])[..., None], 3, axis=2)

    assert gap(points(0.9, 0.4)) == pytest.approx(0.1)
    assert gap(points(0.5, 0.6)) == pytest.approx(-0.1)
    # More harmonious than the curve ever is: compared with its most harmonious point.
    assert gap(points(0.3, 0.9)) == pytest.approx(0.1)


def test_an_interval_holds_its_mean_and_leaves_out_what_is_missing() -> None:
    values = np.asarray([0.0, 1.0, 1.0, np.nan, 1.0, 0.0, 1.0, 1.0])
    found = Interval.of(values)
    assert found.mean == pytest.approx(5 / 7)
    assert found.low < found.mean < found.high
    assert Interval.of(np.ones(5)) == Interval(mean=1, low=1, high=1)
