import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.blobs import BlobRef
from services.common.collage import Collage, Extent, Layer, Redo, Transform
from services.compositor.compose import Stack, compose
from services.compositor.noise import BLUR, Visible, strength_map
from services.compositor.placement import place

RNG = np.random.default_rng(11)
GREY = 150
PARENT = BlobRef(sha256="0" * 64, size_bytes=1, media_type="image/png")


def picture(height, width, alpha=None):
    pixels = RNG.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if alpha is not None:
        pixels[..., 3] = alpha
    return pixels


def layer(name="one", **fields):
    transform = {key: fields.pop(key) for key in list(fields) if key in Transform.__slots__}
    return Layer(name=name, image=b"", text="a thing", transform=Transform(**transform), **fields)


def composed(size, layers, pixels, *, under=None, factor=8, redo=None):
    width, height = size
    collage = Collage(size=Extent(width=width, height=height), prompt="", layers=tuple(layers))
    if under is None:
        under = np.full((height, width, 3), GREY, np.uint8)
    return compose(collage, reversed(pixels), under, latent_factor=factor, redo=redo)


def on_canvas(placed, canvas):
    """Premultiplied R, G, B and alpha of the whole canvas, HW4."""
    full = np.zeros((canvas.height, canvas.width, 4))
    full[placed.box][..., :3] = placed.paint_3hw.transpose(1, 2, 0)
    full[placed.box][..., 3] = placed.alpha_hw
    return full


def mask_of(part, canvas):
    mask = np.zeros((canvas.height, canvas.width), np.float64)
    if part.visible:
        part.visible.add_to(mask)
    return mask


def placed_slowly(pixels, transform, canvas):
    """One canvas pixel after the other: its centre taken back to the picture, four neighbours mixed. Scale >= 1."""
    height, width = pixels.shape[:2]
    values = pixels / 255
    values[..., :3] *= values[..., 3:]
    angle = math.radians(transform.rotation)
    result = np.zeros((canvas.height, canvas.width, 4))
    for row in range(canvas.height):
        for column in range(canvas.width):
            x, y = column + 0.5 - transform.x, row + 0.5 - transform.y
            u = math.cos(angle) * x + math.sin(angle) * y
            v = math.cos(angle) * y - math.sin(angle) * x
            cover = np.clip(transform.scale * width / 2 + 0.5 - abs(u), 0, 1)
            cover *= np.clip(transform.scale * height / 2 + 0.5 - abs(v), 0, 1)
            u, v = u / transform.scale, v / transform.scale
            u = (-u if transform.flip_horizontal else u) + width / 2 - 0.5
            v = (-v if transform.flip_vertical else v) + height / 2 - 0.5
            left, top = math.floor(u), math.floor(v)
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = (u - left if dx else 1 - u + left) * (v - top if dy else 1 - v + top)
                at = min(max(top + dy, 0), height - 1), min(max(left + dx, 0), width - 1)
                result[row, column] += cover * weight * values[at]
    return result


class TestPlacement:
    CANVAS = Extent(width=20, height=16)

    @pytest.mark.parametrize("flip_vertical", [False, True])
    @pytest.mark.parametrize("flip_horizontal", [False, True])
    @pytest.mark.parametrize(
        ("x", "y", "scale", "rotation"),
        [
            (10, 8, 1, 0),
            (9.3, 7.1, 1, 0),
            (10, 8, 1.7, 30),
            (3.2, 2.9, 2.5, -75),
            (19, 15, 4, 200),
            (10, 8, 1, 90),
            (40, 8, 9, 10),
        ],
    )
    def test_every_pixel_is_where_the_transform_says(
        self, x, y, scale, rotation, flip_horizontal, flip_vertical
    ):
        transform = Transform(
            x=x,
            y=y,
            scale=scale,
            rotation=rotation,
            flip_horizontal=flip_horizontal,
            flip_vertical=flip_vertical,
        )
        pixels = picture(6, 5)
        found = on_canvas(place(pixels, transform, self.CANVAS), self.CANVAS)
        expected = placed_slowly(pixels, transform, self.CANVAS)
        assert np.abs(found - expected).max() < 1e-5

    def test_whole_pixels_are_not_resampled(self):
        pixels = picture(6, 5)
        found = on_canvas(place(pixels, Transform(x=7.5, y=8), self.CANVAS), self.CANVAS)
        alpha = pixels[..., 3].astype(np.float32) / np.float32(255)
        assert np.array_equal(found[5:11, 5:10, 3], alpha)
        assert found.sum() == pytest.approx(found[5:11, 5:10].sum())

    def test_half_a_pixel_is_the_mean_of_two(self):
        pixels = picture(6, 5)
        whole = on_canvas(place(pixels, Transform(x=7.5, y=8), self.CANVAS), self.CANVAS)
        half = on_canvas(place(pixels, Transform(x=8, y=8), self.CANVAS), self.CANVAS)
        assert np.abs(half - (whole + np.roll(whole, 1, axis=1)) / 2).max() < 1e-6

    def test_rotation_is_clockwise_about_the_centre(self):
        pixels = picture(4, 6, alpha=255)
        turned = on_canvas(
            place(pixels, Transform(x=10, y=8, rotation=90), self.CANVAS), self.CANVAS
        )
        # The top left corner of the picture comes to the top right.
        assert np.allclose(turned[5:11, 8:12, :3], np.rot90(pixels, -1)[..., :3] / 255, atol=1e-6)
        assert turned[..., 3].sum() == pytest.approx(24)

    def test_flips_come_before_the_rotation(self):
        pixels = picture(4, 6, alpha=255)
        transform = Transform(x=10, y=8, rotation=90, flip_horizontal=True)
        turned = on_canvas(place(pixels, transform, self.CANVAS), self.CANVAS)
        expected = np.rot90(pixels[:, ::-1], -1)[..., :3] / 255
        assert np.allclose(turned[5:11, 8:12, :3], expected, atol=1e-6)

    def test_a_transparent_rim_does_not_move_the_picture(self):
        core = picture(6, 5)
        rimmed = np.zeros((26, 35, 4), np.uint8)
        rimmed[2:8, 20:25] = core
        # The core's centre lies 5 to the right of the rimmed picture's, and 8 above it.
        angle = math.radians(40)
        x = 10 - 1.5 * (5 * math.cos(angle) + 8 * math.sin(angle))
        y = 8 - 1.5 * (5 * math.sin(angle) - 8 * math.cos(angle))
        found = place(rimmed, Transform(x=x, y=y, scale=1.5, rotation=40), self.CANVAS)
        other = place(
            np.pad(core, ((1, 1), (1, 1), (0, 0))),
            Transform(x=10, y=8, scale=1.5, rotation=40),
            self.CANVAS,
        )
        assert np.abs(on_canvas(found, self.CANVAS) - on_canvas(other, self.CANVAS)).max() < 1e-5
        assert found.width == pytest.approx(other.width)

    def test_an_opaque_picture_stays_opaque_up_to_the_border(self):
        canvas = Extent(width=64, height=32)
        placed = place(picture(16, 32, alpha=255), Transform(scale=2), canvas)
        assert placed.alpha_hw.shape == (32, 64)
        assert (placed.alpha_hw == 1).all()

    @pytest.mark.parametrize("rotation", [0, 33])
    @pytest.mark.parametrize("scale", [0.9, 0.51, 0.25, 1 / 64, 0.003])
    def test_a_smaller_picture_is_averaged(self, scale, rotation):
        board = np.indices((640, 640)).sum(axis=0) % 2
        pixels = np.full((640, 640, 4), 255, np.uint8)
        pixels[..., :3] = 255 * board[..., None]
        canvas = Extent(width=900, height=900)
        placed = place(pixels, Transform(scale=scale, rotation=rotation), canvas)
        # Neither light nor area is lost, as far as two pixels turned by 33 degrees can be told from a square.
        tolerance = 0.1 if scale < 1 / 100 and rotation else 1e-3
        assert placed.alpha_hw.sum() == pytest.approx(placed.area, rel=tolerance)
        assert placed.paint_3hw[0].sum() == pytest.approx(placed.area / 2, rel=max(tolerance, 1e-2))
        if scale <= 0.25:
            inside = placed.alpha_hw == 1
            assert np.abs(placed.paint_3hw[0][inside] - 0.5).max(initial=0) < 0.07

    def test_a_whole_fraction_is_the_mean_of_whole_blocks(self):
        pixels = picture(32, 48)
        values = pixels / 255
        values[..., :3] *= values[..., 3:]
        means = values.reshape(8, 4, 12, 4, 4).mean(axis=(1, 3))
        found = on_canvas(place(pixels, Transform(x=10, y=8, scale=0.25), self.CANVAS), self.CANVAS)
        assert np.abs(found[4:12, 4:16] - means).max() < 1e-6

    @given(
        x=st.floats(-32768, 32768) | st.floats(-40, 60),
        y=st.floats(-32768, 32768) | st.floats(-40, 60),
        scale=st.floats(1e-12, 64, exclude_min=True) | st.floats(0.05, 3),
        rotation=st.floats(-360, 360),
        flips=st.tuples(st.booleans(), st.booleans()),
        size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    )
    @settings(max_examples=300, deadline=None)
    def test_any_transform_gives_a_box_in_the_canvas(self, x, y, scale, rotation, flips, size):
        transform = Transform(
            x=x,
            y=y,
            scale=scale,
            rotation=rotation,
            flip_horizontal=flips[0],
            flip_vertical=flips[1],
        )
        pixels = np.full((*size, 4), 255, np.uint8)
        placed = place(pixels, transform, self.CANVAS)
        height, width = placed.alpha_hw.shape
        assert placed.paint_3hw.shape == (3, height, width)
        assert 0 <= placed.top <= placed.top + height <= self.CANVAS.height
        assert 0 <= placed.left <= placed.left + width <= self.CANVAS.width
        assert placed.alpha_hw.min(initial=1) >= 0
        assert placed.alpha_hw.max(initial=0) <= 1
        assert (placed.paint_3hw <= placed.alpha_hw + 1e-6).all()
        assert placed.alpha_hw.sum() <= placed.area * 1.01 + 4 * (1 + scale)


class TestStack:
    @pytest.mark.parametrize(("count", "size"), [(1, (64, 64)), (7, (96, 40)), (32, (40, 96))])
    def test_masks_and_composite_equal_the_definition(self, count, size):
        canvas = Extent(width=size[0], height=size[1])
        layers = [
            layer(
                f"l{index}",
                x=float(RNG.uniform(0, size[0])),
                y=float(RNG.uniform(0, size[1])),
                scale=float(RNG.uniform(0.4, 3)),
                rotation=float(RNG.uniform(-180, 180)),
                opacity=float(RNG.uniform(0.2, 1)),
            )
            for index in range(count)
        ]
        pictures = [picture(17, 23) for _ in layers]
        result = composed(size, layers, pictures)
        planes = [
            on_canvas(place(pixels, one.transform, canvas), canvas) * one.opacity
            for one, pixels in zip(layers, pictures, strict=True)
        ]
        expected = np.full((canvas.height, canvas.width, 3), GREY / 255)
        for plane in planes:
            expected = plane[..., :3] + (1 - plane[..., 3:]) * expected
        assert np.abs(result.plate.composite_HWC - 255 * expected).max() <= 0.5 + 1e-3
        total = np.ones((canvas.height, canvas.width))
        for plane in planes:
            total *= 1 - plane[..., 3]
        for index, part in enumerate(result.layers):
            above = np.ones((canvas.height, canvas.width))
            for plane in planes[index + 1 :]:
                above *= 1 - plane[..., 3]
            mask = mask_of(part, canvas)
            if part.visible:
                assert np.abs(mask - planes[index][..., 3] * above).max() < 1e-5
            cells = mask.reshape(canvas.height // 8, 8, canvas.width // 8, 8).mean(axis=(1, 3))
            assert np.abs(result.plate.visible_Lhw[index] - cells).max() < 1e-6
            assert part.visible_fraction == pytest.approx(mask.mean(), abs=1e-6)
            total += mask
        # A layer that would show in no 8-bit mask is left out, so a few hundredths may be missing under many.
        assert np.abs(total - 1).max() < 1e-2

    def test_masks_and_background_add_up_to_one(self):
        canvas = Extent(width=50, height=70)
        stack = Stack(canvas)
        total = np.zeros((70, 50))
        for _ in range(32):
            transform = Transform(
                x=float(RNG.uniform(0, 50)),
                y=float(RNG.uniform(0, 70)),
                scale=float(RNG.uniform(0.3, 3)),
                rotation=float(RNG.uniform(-180, 180)),
            )
            visible = stack.slide_under(place(picture(20, 20), transform, canvas), opacity=0.7)
            if visible:
                visible.add_to(total)
        assert np.abs(total + stack.transmittance_HW - 1).max() < 1e-6

    def test_soft_alpha_is_linear(self):
        result = composed((16, 16), [layer()], [picture(16, 16, alpha=128)])
        canvas = Extent(width=16, height=16)
        assert (result.layers[0].mask(canvas) == 128).all()
        assert np.abs(result.plate.visible_Lhw - 128 / 255).max() < 1e-6

    def test_opaque_pixels_are_kept_exactly(self):
        pixels = picture(24, 32, alpha=255)
        result = composed((32, 24), [layer()], [pixels])
        assert np.array_equal(result.plate.composite_HWC, pixels[..., :3])

    def test_nothing_lies_on_the_background_where_no_layer_is(self):
        under = picture(32, 32)[..., :3]
        result = composed((32, 32), [layer(x=8, y=8)], [picture(8, 8)], under=under)
        assert np.array_equal(result.plate.composite_HWC[12:], under[12:])

    def test_a_layer_under_others_reports_what_is_left_of_it(self):
        layers = [layer("under", x=16, y=16), layer("over", x=24, y=16)]
        result = composed((32, 32), layers, [picture(16, 16, 255), picture(16, 16, 255)])
        under, over = result.layers
        assert under.unoccluded_fraction == pytest.approx(0.5)
        assert under.visible_fraction == pytest.approx(128 / 1024)
        assert over.unoccluded_fraction == 1
        assert (under.transform.x, over.transform.x) == (16, 24)

    def test_an_unset_centre_is_reported_as_the_canvas_centre(self):
        part = composed((48, 32), [layer()], [picture(8, 8)]).layers[0]
        assert (part.transform.x, part.transform.y) == (24, 16)


class TestNotices:
    @pytest.mark.parametrize(
        ("fields", "alpha", "field", "cause"),
        [
            ({"visible": False}, 255, ".visible", "visible is false"),
            ({"opacity": 0.0}, 255, ".opacity", "opacity is 0"),
            ({}, 0, ".image", "wholly transparent"),
            ({"x": -30.0}, 255, ".transform", "outside the canvas"),
            ({"scale": 1e-4}, 255, ".transform", "too small"),
        ],
    )
    def test_a_hidden_layer_takes_no_part(self, fields, alpha, field, cause):
        pixels = [picture(32, 32, 255), picture(16, 16, alpha)]
        result = composed((32, 32), [layer("seen"), layer("not", noise=1.0, **fields)], pixels)
        assert [(notice.reason, notice.field) for notice in result.notices] == [
            ("LAYER_HIDDEN", f"collage.layers[1]{field}")
        ]
        assert cause in result.notices[0].message
        alone = composed((32, 32), [layer("seen")], pixels[:1]).plate
        assert np.array_equal(result.plate.composite_HWC, alone.composite_HWC)
        assert np.array_equal(result.plate.strength_hw, alone.strength_hw)
        assert not result.plate.visible_Lhw[1].any()
        assert result.layers[1].visible_fraction == result.layers[1].unoccluded_fraction == 0
        assert not result.layers[1].mask(Extent(width=32, height=32)).any()

    def test_a_covered_layer_is_hidden(self):
        layers = [layer("under"), layer("over")]
        result = composed((32, 32), layers, [picture(8, 8, 255), picture(32, 32, 255)])
        assert [(notice.reason, notice.field) for notice in result.notices] == [
            ("LAYER_HIDDEN", "collage.layers[0]")
        ]
        assert "cover" in result.notices[0].message

    def test_a_barely_visible_layer(self):
        layers = [layer("under"), layer("over", x=16.0, y=16.5)]
        pixels = [picture(32, 32, 255), picture(34, 32, 255)]
        pixels[1][:1, :5, 3] = 0
        result = composed((32, 32), [layers[0], layer("over")], pixels)
        assert not result.layers[0].visible
        pixels[1][1:3, :5, 3] = 0
        result = composed((32, 32), [layers[0], layer("over")], pixels)
        assert [(notice.reason, notice.field) for notice in result.notices] == [
            ("LAYER_BARELY_VISIBLE", "collage.layers[0]")
        ]
        assert "0.98%" in result.notices[0].message

    def test_a_tiny_layer(self):
        result = composed((32, 32), [layer()], [picture(7, 9, 255)])
        assert [(notice.reason, notice.field) for notice in result.notices] == [
            ("LAYER_TINY", "collage.layers[0].transform")
        ]
        assert not composed((32, 32), [layer()], [picture(8, 8, 255)]).notices


class TestDials:
    def test_automatic_dials_follow_the_size(self):
        layers = [layer("back"), layer("half", scale=0.5), layer("top", scale=0.25)]
        result = composed((64, 32), layers, [picture(32, 64, 255) for _ in layers])
        back, half, top = (part.dials for part in result.layers)
        assert (back.noise, back.attract, back.repel) == pytest.approx((0.7, 0.2, 0.4))
        assert (half.noise, half.attract, half.repel) == pytest.approx((0.6, 0.4, 0.65))
        assert (top.noise, top.attract, top.repel) == pytest.approx((0.4, 0.5, 0.775))

    def test_the_top_most_visible_layer_is_the_top_most(self):
        layers = [layer("back"), layer("seen"), layer("hidden", visible=False)]
        result = composed((64, 64), layers, [picture(32, 32, 255) for _ in layers])
        assert [part.dials.noise for part in result.layers] == pytest.approx([0.6, 0.4, 0.6])

    def test_a_dial_that_is_set_is_kept_even_at_zero(self):
        part = composed(
            (32, 32), [layer(noise=0.0, attract=0.0, repel=0.0)], [picture(9, 9)]
        ).layers[0]
        assert (part.dials.noise, part.dials.attract, part.dials.repel) == (0, 0, 0)


class TestNoiseMap:
    @pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 0.7, 0.8, 1.0])
    @pytest.mark.parametrize("size", [(64, 96), (96, 64)])
    def test_equal_strengths_give_that_strength_exactly(self, strength, size):
        layers = [
            layer(f"l{index}", noise=strength, rotation=11.0 * index, x=20.0 + 5 * index)
            for index in range(5)
        ]
        plate = composed(size, layers, [picture(40, 40) for _ in layers]).plate
        assert plate.strength_hw.dtype == np.float64
        assert plate.strength_hw.shape == (size[1] // 8, size[0] // 8)
        assert (plate.strength_hw == strength).all()

    @pytest.mark.parametrize("strength", [0.1, 0.3, 0.58])
    def test_far_from_its_edge_a_layer_has_its_strength_exactly(self, strength):
        layers = [
            layer("one", noise=0.9, x=64.0),
            layer("two", noise=strength, x=191.7, rotation=3.0),
        ]
        plate = composed((256, 128), layers, [picture(128, 128, 200), picture(160, 128, 255)]).plate
        # The blur is 2.5 pixels wide here, and reaches 10.
        assert (plate.strength_hw[4:-4, 20:28] == strength).all()
        assert (plate.strength_hw[:, 1:14] == 0.9).all()
        between = plate.strength_hw[8, 14:20]
        assert (np.diff(between) <= 0).all()
        assert plate.strength_hw.min() >= strength
        assert plate.strength_hw.max() <= 0.9

    def test_it_is_the_painted_map_blurred_at_the_cells_centres(self):
        canvas = Extent(width=48, height=64)
        layers = [layer("a", noise=0.9, y=20.0), layer("b", noise=0.2, x=30.0, rotation=20.0)]
        pictures = [picture(30, 30), picture(25, 31)]
        result = composed((48, 64), layers, pictures, factor=2)
        painted = np.full((64, 48), 0.9)
        for one, pixels in zip(layers, pictures, strict=True):
            alpha = on_canvas(place(pixels, one.transform, canvas), canvas)[..., 3]
            painted = painted * (1 - alpha) + one.noise * alpha
        deviation = BLUR * 48
        reach = 20
        rim = np.pad(painted, reach, mode="edge")
        for row, column in ((0, 0), (10, 12), (31, 23), (20, 3)):
            y, x = 2 * row + 1, 2 * column + 1
            rows = np.exp(-0.5 * ((np.arange(-reach, 64 + reach) + 0.5 - y) / deviation) ** 2)
            columns = np.exp(-0.5 * ((np.arange(-reach, 48 + reach) + 0.5 - x) / deviation) ** 2)
            weights = np.outer(rows, columns)
            blurred = (weights * rim).sum() / weights.sum()
            expected = min(blurred, painted[y - 1 : y + 1, x - 1 : x + 1].mean())
            assert result.plate.strength_hw[row, column] == pytest.approx(expected, abs=2e-4)

    def test_the_blur_is_ten_pixels_at_512(self):
        canvas = Extent(width=512, height=512)
        half = Visible(box=(slice(0, 512), slice(0, 256)), mask_hw=np.ones((512, 256), np.float32))
        row = strength_map([(half, 1.0)], ground=0.0, canvas=canvas, latent_factor=8)[32]
        centres = (np.arange(64) + 0.5) * 8
        expected = [0.5 * math.erfc((x - 256) / (10 * math.sqrt(2))) for x in centres]
        assert np.abs(row - expected)[:32].max() < 1e-3
        # It only holds back: what is kept beside the half is kept wholly.
        assert not row[32:].any()

    def test_no_cell_within_a_layer_is_freer_than_its_dial(self):
        layers = [layer("a", noise=0.9, x=24.0), layer("b", noise=0.1, x=56.0)]
        pictures = [picture(40, 40, 255), picture(40, 40, 255)]
        result = composed((96, 64), layers, pictures, factor=4)
        within = result.plate.visible_Lhw[1] == 1
        assert within.sum() > 50
        assert (result.plate.strength_hw[within] == 0.1).all()
        assert result.plate.strength_hw.max() == 0.9

    def test_the_background_is_as_free_as_the_freest_layer(self):
        layers = [layer("a", noise=0.3, x=20.0), layer("b", noise=0.6, x=20.0, y=100.0)]
        plate = composed((256, 128), layers, [picture(20, 20, 255), picture(20, 20, 255)]).plate
        assert (plate.strength_hw[:, 10:] == 0.6).all()


class TestRelease:
    def test_a_generation_replaces_everything(self):
        plate = composed((32, 32), [layer(noise=0.01)], [picture(16, 16)]).plate
        assert (plate.release_HW == 255).all()

    def test_a_layer_with_noise_zero_keeps_its_visible_pixels(self):
        layers = [layer("kept", noise=0.0), layer("over", noise=0.5, x=20.0)]
        pictures = [picture(16, 16), picture(16, 16)]
        result = composed((32, 32), layers, pictures)
        expected = 255 - 255 * mask_of(result.layers[0], Extent(width=32, height=32))
        assert np.abs(result.plate.release_HW - expected).max() <= 0.5 + 1e-4
        pictures[0][..., 3] = 255
        pictures[1][..., 3] = 255
        release = composed((32, 32), layers, pictures).plate.release_HW
        assert (release[8:24, 8:12] == 0).all()
        assert (release[8:24, 12:] == 255).all()

    @pytest.mark.parametrize("noises", [(0.0, 0.0), (0.0, None)])
    def test_all_zero_keeps_everything(self, noises):
        layers = [layer("a", noise=noises[0]), layer("b", noise=noises[1], visible=noises[1] == 0)]
        plate = composed((32, 32), layers, [picture(8, 8), picture(8, 8)]).plate
        assert not plate.release_HW.any()
        assert not plate.strength_hw.any()


class TestRedo:
    SIZE = (96, 64)
    CANVAS = Extent(width=96, height=64)

    def redo(self, layers, pictures, names, *, feather=4.0, restore=False):
        under = RNG.integers(0, 256, (64, 96, 3), dtype=np.uint8)
        redo = Redo(parent=PARENT, layers=names, feather=feather, restore_cutout=restore)
        return composed(self.SIZE, layers, pictures, under=under, redo=redo), under

    @pytest.mark.parametrize("restore", [False, True])
    @pytest.mark.parametrize("feather", [0.0, 0.5, 4.0, 64.0])
    def test_outside_the_mask_the_parent_stays_byte_for_byte(self, feather, restore):
        layers = [layer("a", x=30.0), layer("b", x=50.3, y=30.9, rotation=25.0), layer("c", x=70.0)]
        pictures = [picture(40, 40), picture(40, 40), picture(30, 30)]
        result, parent = self.redo(layers, pictures, ("b",), feather=feather, restore=restore)
        plate = result.plate
        outside = plate.release_HW == 0
        assert np.array_equal(plate.composite_HWC[outside], parent[outside])
        mask = mask_of(result.layers[1], self.CANVAS)
        assert (plate.release_HW[mask == 0] == 0).all()
        assert (plate.release_HW <= np.rint(255 * mask)).all()
        if not restore:
            assert np.array_equal(plate.composite_HWC, parent)
        elif feather <= 4:
            assert not np.array_equal(plate.composite_HWC, parent)
        assert [part.dials.noise for part in result.layers][::2] == [0, 0]

    def test_the_edge_is_soft_inwards(self):
        result, _ = self.redo([layer("a")], [picture(40, 60, 255)], ("a",), feather=4.0)
        release = result.plate.release_HW
        assert release[32, 17:25].tolist() == [0, 51, 102, 153, 204, 255, 255, 255]
        assert release[11:19, 48].tolist() == [0, 51, 102, 153, 204, 255, 255, 255]
        assert (release[16:48, 22:74] == 255).all()

    def test_the_canvas_border_is_no_edge(self):
        result, _ = self.redo([layer("a")], [picture(64, 96, 255)], ("a",), feather=9.0)
        assert (result.plate.release_HW == 255).all()

    def test_a_mask_softer_than_the_feather_is_taken_as_it_is(self):
        pixels = picture(64, 96, 255)
        pixels[..., 3] = np.clip(np.arange(96) * 3, 0, 255)
        result, _ = self.redo([layer("a")], [pixels], ("a",), feather=4.0)
        assert np.array_equal(result.plate.release_HW, pixels[..., 3])

    def test_depth_is_the_distance_to_the_nearest_pixel_outside(self):
        pixels = picture(64, 96, 255)
        holes = [(10, 10), (40, 70), (63, 95), (20, 33)]
        for hole in holes:
            pixels[hole][3] = 0
        result, _ = self.redo([layer("a")], [pixels], ("a",), feather=19.0)
        rows, columns = np.indices((64, 96))
        depth = np.min([np.hypot(rows - y, columns - x) for y, x in holes], axis=0)
        expected = np.rint(255 * np.minimum(depth / 20, 1))
        assert np.abs(result.plate.release_HW - expected).max() <= 1

    def test_the_cutout_is_restored_only_where_it_is_visible(self):
        layers = [layer("a", x=40.0), layer("over", x=60.0)]
        pictures = [picture(30, 40, 255), picture(30, 40, 255)]
        result, parent = self.redo(layers, pictures, ("a",), restore=True)
        composite = result.plate.composite_HWC
        assert np.array_equal(composite[17:47, 20:40], pictures[0][:, :20, :3])
        composite[17:47, 20:40] = parent[17:47, 20:40]
        assert np.array_equal(composite, parent)

    def test_the_noise_map_holds_the_chosen_layers_only(self):
        layers = [layer("a", noise=0.3, x=24.0), layer("b", noise=0.9, x=72.0)]
        pictures = [picture(64, 48, 255), picture(64, 48, 255)]
        result, _ = self.redo(layers, pictures, ("a",))
        strength = result.plate.strength_hw
        assert (strength[:, :5] == 0.3).all()
        assert (strength[:, 7:] == 0).all()
        assert [part.dials.noise for part in result.layers] == [0.3, 0]

    def test_unset_noise_is_automatic_for_the_redone_layer(self):
        layers = [layer("a"), layer("b", scale=0.5)]
        pictures = [picture(32, 48, 255), picture(32, 48, 255)]
        result, _ = self.redo(layers, pictures, ("a",))
        assert [part.dials.noise for part in result.layers] == pytest.approx([0.6, 0])
        result, _ = self.redo(layers, pictures, ("b",))
        assert [part.dials.noise for part in result.layers] == pytest.approx([0, 0.4])

    def test_noise_zero_keeps_the_restored_cutout(self):
        pictures = [picture(32, 32, 255)]
        result, parent = self.redo([layer("a", noise=0.0)], pictures, ("a",), restore=True)
        assert not result.plate.release_HW.any()
        expected = parent.copy()
        expected[16:48, 32:64] = pictures[0][..., :3]
        assert np.array_equal(result.plate.composite_HWC, expected)

    def test_a_hidden_layer_redoes_nothing(self):
        result, parent = self.redo(
            [layer("a", visible=False)], [picture(9, 9)], ("a",), restore=True
        )
        assert not result.plate.release_HW.any()
        assert np.array_equal(result.plate.composite_HWC, parent)
        assert result.notices[0].reason == "LAYER_HIDDEN"
