import cv2
import numpy as np
import pytest

from services.common.collage import Extent
from services.compositor.structure import ControlPicture, canny

EVERYWHERE = (slice(0, 12), slice(0, 16))


def layer(colour, *, hidden=(0, 0, 0), box=(slice(3, 9), slice(4, 12)), shape=(12, 16)):
    """A rectangle of one colour; `hidden` is the colour kept under its transparent surroundings."""
    pixels_HW4 = np.zeros((*shape, 4), np.uint8)
    pixels_HW4[..., :3] = hidden
    pixels_HW4[box] = (*colour, 255)
    return pixels_HW4


def outline(box, shape=(12, 16)):
    """The outermost pixels of a rectangle."""
    edges = np.zeros(shape, bool)
    edges[box] = True
    rows, columns = box
    edges[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1] = False
    return edges


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("grey", [0, 128, 255])
def test_a_silhouette_is_an_edge_whatever_its_colour_and_never_outside(grey, hidden):
    box = (slice(3, 9), slice(4, 12))
    edges = canny(layer((grey,) * 3, hidden=hidden, box=box))
    assert edges.dtype == np.uint8 and set(np.unique(edges)) == {0, 255}
    assert np.array_equal(edges, np.repeat(outline(box)[..., None] * np.uint8(255), 3, axis=2))


def test_what_lies_under_transparent_pixels_has_no_edges():
    pixels = layer((200, 200, 200))
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    noisy = np.where(pixels[..., 3:] == 0, noise, pixels)
    noisy[..., 3] = pixels[..., 3]
    assert np.array_equal(canny(noisy), canny(pixels))


def test_the_canvas_border_is_no_edge():
    edges = canny(layer((255, 255, 255), box=(slice(0, 9), slice(4, 16))))[..., 0] > 0
    assert edges[8, 4:].all() and edges[:9, 4].all()
    assert edges.sum() == 12 + 8
    assert not canny(layer((90, 90, 90), box=EVERYWHERE)).any()


def test_an_opaque_layer_gives_the_edges_of_its_grey():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    grey = cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), cv2.COLOR_RGB2GRAY)
    expected = cv2.Canny(grey, 100, 200)
    assert 0 < (expected > 0).mean() < 1
    assert np.array_equal(canny(pixels)[..., 0], expected)


def test_a_soft_silhouette_is_drawn_where_it_is_half_opaque_and_a_fading_one_not_at_all():
    y, x = np.mgrid[:40, :40]
    away = np.hypot(x - 19.5, y - 19.5)
    for width, is_drawn in ((1, True), (4, True), (60, False)):
        alpha = np.clip(0.5 + (12.3 - away) / width, 0, 1)
        pixels = np.full((40, 40, 4), 128, np.uint8)
        pixels[..., 3] = np.rint(alpha * 255)
        edges = canny(pixels)[..., 0] > 0
        assert edges.any() == is_drawn
        if is_drawn:
            assert np.abs(away[edges] - 12.3).max() < 1.3 + width / 4


def test_each_pixel_shows_the_layer_seen_most_there():
    joined = ControlPicture(Extent(width=16, height=12))
    front, back = (np.full((12, 16, 3), value, np.uint8) for value in (1, 2))
    v_front = np.tile(np.repeat(np.float32([1, 0.5, 0.25, 0]), 2), (12, 1))
    joined.slide_under(front, (slice(0, 12), slice(4, 12)), v_front)
    joined.slide_under(back, (slice(0, 12), slice(4, 14)), 1 - np.pad(v_front, ((0, 0), (0, 2))))
    expected = [0] * 4 + [1] * 4 + [2] * 6 + [0] * 2
    assert np.array_equal(joined.pixels_HW3, np.tile(np.uint8(expected)[:, None], (12, 1, 3)))
