"""Cutting out: what the network finds is refined so that nothing of the old ground stays."""

import numpy as np
import pytest

from services.common.models_file import BUNDLED_CUTOUT_NAME
from services.compositor.cutout import NothingFound, cut, open_cutters
from services.compositor.network import resized
from testing.photographs import OBJECTS, halo, photograph


@pytest.fixture(scope="module")
def network():
    return open_cutters("", threads=1)[BUNDLED_CUTOUT_NAME].network


def opaque(pixels_HW3):
    return np.dstack([pixels_HW3, np.full(pixels_HW3.shape[:2], 255, np.uint8)])


def test_no_halo_of_the_old_ground_stays(network):
    """Bars are a quarter above what was measured: 3.6 seen and 3.5 of colour, against 7.9 and 9.5 unrefined."""
    found, plain = [], []
    for seed, name in enumerate(OBJECTS):
        truth = photograph(name, side=384, seed=seed)
        found.append(halo(cut(network, opaque(truth.pixels_HW3)), truth))
        (map_hw,) = network.run(truth.pixels_HW3)
        alpha_HW = resized(map_hw[0, 0], width=384, height=384)
        unrefined = np.dstack([truth.pixels_HW3, np.rint(alpha_HW * 255).astype(np.uint8)])
        plain.append(halo(unrefined, truth))
    seen, colour = np.mean(found, axis=0)
    seen_plain, colour_plain = np.mean(plain, axis=0)
    assert seen < 4.5 and seen < 0.57 * seen_plain
    assert colour < 4.4 and colour < 0.47 * colour_plain


@pytest.mark.parametrize(("height", "width"), [(1, 1), (300, 200), (2, 900), (4000, 4000)], ids=str)
def test_in_a_picture_of_one_colour_nothing_is_found(network, height, width):
    with pytest.raises(NothingFound):
        cut(network, np.full((height, width, 4), 255, np.uint8))


def test_what_is_transparent_already_stays_so(network):
    truth = photograph("cookie-noto", side=256)
    pixels_HW4 = opaque(truth.pixels_HW3)
    plain_HW4 = cut(network, pixels_HW4)
    pixels_HW4[:, :128, 3] = 100
    found_HW4 = cut(network, pixels_HW4)
    assert found_HW4[:, :128, 3].max() == 100
    assert np.array_equal(found_HW4[..., :3][~found_HW4[..., 3].astype(bool)].max(initial=0), 0)
    # Of what it shows through a veil colours stay as they are.
    seen_HW = found_HW4[:, :128, 3] > 0
    assert np.array_equal(found_HW4[:, :128, :3][seen_HW], truth.pixels_HW3[:, :128][seen_HW])
    assert np.abs(plain_HW4[:, 160:].astype(int) - found_HW4[:, 160:]).mean() < 4


def test_a_cut_out_that_is_cut_out_again_stays(network):
    truth = photograph("cookie-noto", side=256)
    once_HW4 = cut(network, opaque(truth.pixels_HW3))
    twice_HW4 = cut(network, once_HW4)
    assert np.abs(once_HW4[..., 3].astype(int) - twice_HW4[..., 3]).mean() < 2


def test_equal_pictures_give_equal_cut_outs():
    truth = photograph("sushi-noto", side=256)
    first, second = (
        cut(open_cutters("", threads=1)[BUNDLED_CUTOUT_NAME].network, opaque(truth.pixels_HW3))
        for _ in range(2)
    )
    assert np.array_equal(first, second)
