import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from services.compositor import pictures
from services.compositor.pictures import InvalidPicture, decode_cutout, decode_opaque, encode_png

RNG = np.random.default_rng(7)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims this size and holds next to nothing."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def sixteen_bit_png(color_type):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, color_type, 0, 0, 0))
    body = zlib.compress((b"\0" + b"\x12\x34" * 2 * channels) * 2)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_cutout_comes_back_exactly(kind):
    data = encoded(Image.fromarray(RGBA), kind, lossless=True, exact=True)
    assert np.array_equal(decode_cutout(data), RGBA)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "P"])
def test_a_cutout_without_alpha_is_refused_with_its_mode_named(mode):
    data = encoded(Image.new(mode, (4, 4)), "JPEG" if mode == "CMYK" else "PNG")
    with pytest.raises(InvalidPicture, match=rf"mode {mode},.*alpha") as caught:
        decode_cutout(data)
    assert "RGBA" in caught.value.allowed


def test_grey_with_alpha_is_converted():
    grey = RNG.integers(0, 256, (3, 4, 2), dtype=np.uint8)
    pixels = decode_cutout(encoded(Image.fromarray(grey, "LA")))
    assert np.array_equal(pixels[..., :3], np.repeat(grey[..., :1], 3, axis=-1))
    assert np.array_equal(pixels[..., 3], grey[..., 1])


def test_a_palette_with_transparency_is_converted():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    pixels = decode_cutout(encoded(image, transparency=bytes([0, 128])))
    assert pixels.tolist() == [[[10, 20, 30, 0], [200, 100, 50, 128]]]


@pytest.mark.parametrize(("mode", "key", "other"), [("RGB", (1, 2, 3), (9, 9, 9)), ("L", 5, 9)])
def test_a_transparent_colour_is_converted(mode, key, other):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), other)
    assert decode_cutout(encoded(image, transparency=key))[0, :, 3].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_an_opaque_picture_may_be_of_any_mode(mode):
    color = {"RGBA": (9, 9, 9, 255), "LA": (9, 255)}.get(mode, 0)
    data = encoded(Image.new(mode, (4, 3), color), "JPEG" if mode == "CMYK" else "PNG")
    assert decode_opaque(data).shape == (3, 4, 3)


def test_an_opaque_picture_is_not_transparent():
    with pytest.raises(InvalidPicture, match=r"transparent pixels.*opaque"):
        decode_opaque(encoded(Image.fromarray(RGBA)))


@pytest.mark.parametrize("color_type", [0, 2, 4, 6])
def test_sixteen_bits_a_channel_are_refused(color_type):
    for decode in (decode_cutout, decode_opaque):
        with pytest.raises(InvalidPicture, match=r"16 bits.*8 bits"):
            decode(sixteen_bit_png(color_type))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(InvalidPicture, match="PNG, WebP or JPEG"):
        decode_cutout(encoded(Image.new("RGB", (4, 4)), kind))


@pytest.mark.parametrize("data", [b"x", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(InvalidPicture):
        decode_cutout(data)


@pytest.mark.parametrize("size", [0, pictures.MAX_ENCODED_BYTES + 1])
def test_the_encoded_size_is_capped(size):
    with pytest.raises(InvalidPicture, match=rf"has {size} bytes.*from 1 to {2**25}"):
        decode_cutout(bytes(size))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_a_file_cut_short_is_refused(kind):
    image = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(image, kind)
    with pytest.raises(InvalidPicture, match=r"damaged|no picture"):
        decode_opaque(data[: len(data) // 2])


# 100 megapixels, and more than Pillow itself opens. Pillow warns of the first while we refuse it.
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000), (4001, 4000)])
def test_a_bomb_is_refused_from_its_header(width, height, monkeypatch):
    def load(_):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(InvalidPicture, match=r"pixels; allowed: .*16000000"):
        decode_cutout(png_header(width, height))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(InvalidPicture):
        decode_cutout(png_header(0, 4))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind):
    frames = [Image.new("RGBA", (4, 4), (shade, 0, 0, 255)) for shade in (0, 255)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidPicture, match=r"animation.*still"):
        decode_cutout(data)


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_exif_orientation_is_honoured(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGBA), "PNG", exif=exif)
    assert np.array_equal(decode_cutout(data), np.rot90(RGBA, turned))


def test_a_profile_is_converted_to_srgb():
    # No wide-gamut profile is at hand everywhere, so XYZ stands in for one: its numbers mean other colours.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert np.array_equal(
        decode_cutout(encoded(Image.fromarray(RGBA), icc_profile=profile)), RGBA
    ), "a profile of another colour space than the picture's is as good as none"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode_cutout(encoded(Image.fromarray(RGBA), icc_profile=srgb)), RGBA)
    # The sRGB profile with red and green exchanged.
    swapped = srgb.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 77))
    pixels = decode_cutout(encoded(image, icc_profile=swapped))
    assert np.abs(pixels[0, 0].astype(int) - (0, 255, 0, 77)).max() <= 2


def test_a_broken_profile_changes_nothing():
    data = encoded(Image.fromarray(RGBA), icc_profile=b"nonsense" * 20)
    assert np.array_equal(decode_cutout(data), RGBA)


@given(
    position=st.integers(0, 10_000),
    value=st.integers(0, 255),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_byte_gives_a_picture_or_a_refusal(position, value, kind):
    data = bytearray(encoded(Image.fromarray(RGBA[..., :3]), kind))
    data[position % len(data)] = value
    try:
        assert decode_opaque(bytes(data)).dtype == np.uint8
    except InvalidPicture as error:
        assert error.reason
        assert error.allowed


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3), (3, 4, 4)])
def test_encoding_is_exact_and_repeatable(shape):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    data = encode_png(pixels)
    assert np.array_equal(np.asarray(Image.open(BytesIO(data))), pixels)
    assert encode_png(pixels.copy()) == data


def test_stretching_to_its_own_size_changes_nothing():
    pixels = np.ascontiguousarray(RGBA[..., :3])
    assert pictures.stretch(pixels, width=7, height=5) is pixels
    assert pictures.stretch(pixels, width=14, height=20).shape == (20, 14, 3)
