import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from services.common import color, jpeg, pictures, png
from services.common.collage import Extent
from services.common.decoder import Decoder
from services.common.pictures import InvalidPicture, decode, decode_opaque, encode_png
from services.compositor.placement import stretch
from services.generator.preview import encode_preview

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(7)
RGBA = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
# Channels by PNG colour type, and the depths each may have.
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
P3_XY = ((0.3127, 0.3290), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
# The first column and row, columns and rows between samples, of the seven passes of interlacing.
PASSES = [
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
]


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(samples_HWC, kind, depth, *, interlaced=False, before=(), between=()):
    """A PNG of these numbers, with chunks `before` the pixels and `between` them and the end."""
    height, width = samples_HWC.shape[:2]
    data = b""
    for left, top, across, down in PASSES if interlaced else [(0, 0, 1, 1)]:
        for row_WC in samples_HWC[top::down, left::across]:
            if row_WC.size:
                bits = "".join(f"{int(value):0{depth}b}" for value in row_WC.ravel())
                bits += "0" * (-len(bits) % 8)
                data += b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(interlaced))
    middle = [chunk(b"IDAT", zlib.compress(data)), *between]
    return b"".join([png.SIGNATURE, chunk(b"IHDR", head), *before, *middle, chunk(b"IEND", b"")])


def png_header(width, height):
    """A PNG that claims this size and holds next to nothing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return png.SIGNATURE + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def gray_png(*before, between=()):
    """Three grey pixels, 60, 128 and 200, of colour type 2, with these chunks."""
    return raw_png(
        np.repeat(np.array([60, 128, 200], np.uint8), 3).reshape(1, 3, 3),
        2,
        8,
        before=before,
        between=between,
    )


def shades(data):
    pixels_HW4 = decode(data)
    assert (pixels_HW4[..., 0] == pixels_HW4[..., 1]).all()
    return pixels_HW4[0, :, 0].tolist()


def gama(gamma):
    return chunk(b"gAMA", struct.pack(">I", round(100_000 / gamma)))


def chrm(xy):
    return chunk(
        b"cHRM", struct.pack(">8I", *(round(value * 100_000) for xy_2 in xy for value in xy_2))
    )


def iccp(profile, name=b"sRGB built-in, elle's"):
    return chunk(b"iCCP", name + b"\0\0" + zlib.compress(profile))


def named(profile, name):
    """The profile with a description."""
    text = name.encode("utf-16-be")
    body = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    count = struct.unpack_from(">I", profile, 128)[0]
    table = [list(struct.unpack_from(">4sII", profile, 132 + 12 * k)) for k in range(count)]
    moved = [(tag, offset + 12, size) for tag, offset, size in table]
    moved.append((b"desc", len(profile) + 12, len(body)))
    entries = b"".join(struct.pack(">4sII", *entry) for entry in moved)
    rest = profile[132 + 12 * count :]
    whole = profile[4:128] + struct.pack(">I", count + 1) + entries + rest + body
    return struct.pack(">I", len(whole) + 4) + whole


# What 60, 128 and 200 are in sRGB, where they are the light itself.
LINEAR = [133, 188, 229]
PLAIN = [60, 128, 200]
SRGB = chunk(b"sRGB", b"\0")
LINEAR_PROFILE = named(color.profile(1.0), "sRGB-elle-V2-g10")
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(
    ("kind", "depth"), [(k, d) for k, depths in DEPTHS.items() for d in depths]
)
def test_every_kind_of_png_means_what_the_specification_says(kind, depth, keyed, interlaced):
    most = 2**depth - 1
    rng = np.random.default_rng(depth + 16 * kind)
    samples_HWC = rng.integers(0, most + 1, (9, 11, CHANNELS[kind]))
    # Two pixels that are one colour only where some channels, or some bits, are looked at.
    samples_HWC[0, 0] = samples_HWC[0, 1]
    samples_HWC[0, 1, -1] ^= 1
    key = samples_HWC[0, 0]
    palette_N3 = rng.integers(0, 256, (most + 1, 3), dtype=np.uint8)
    palette_alpha = rng.integers(0, 256, most, dtype=np.uint8)
    before = [chunk(b"PLTE", palette_N3.tobytes())] if kind == 3 else []
    if keyed and kind == 3:
        before.append(chunk(b"tRNS", palette_alpha.tobytes()))
    elif keyed and kind in (0, 2):
        # Bits above the depth are to be ignored.
        before.append(
            chunk(b"tRNS", struct.pack(f">{len(key)}H", *(key | (0xFF00 if depth < 16 else 0))))
        )
    data = raw_png(samples_HWC, kind, depth, interlaced=interlaced, before=before)
    if depth == 16:
        for decoded in (decode, decode_opaque):
            with pytest.raises(InvalidPicture, match=r"16 bits.*8 bits"):
                decoded(data)
        return
    alpha_HW = np.full((9, 11), 255)
    if kind == 3:
        color_HW3 = palette_N3[samples_HWC[..., 0]]
        if keyed:
            alpha_HW = np.append(palette_alpha, 255)[samples_HWC[..., 0]]
    else:
        eight_HWC = samples_HWC * 255 // most
        color_HW3 = (
            np.repeat(eight_HWC[..., :1], 3, axis=-1) if kind in (0, 4) else eight_HWC[..., :3]
        )
        if kind in (4, 6):
            alpha_HW = eight_HWC[..., -1]
        elif keyed:
            alpha_HW = np.where((samples_HWC == key).all(axis=-1), 0, 255)
    assert np.array_equal(decode(data), np.dstack([color_HW3, alpha_HW]))


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ([], PLAIN),
        ([SRGB], PLAIN),
        ([gama(2.2)], PLAIN),
        ([gama(2.2), chrm(color.SRGB_XY)], PLAIN),
        ([gama(1.0)], LINEAR),
        ([gama(1.0), chrm(color.SRGB_XY)], LINEAR),
        ([gama(1.0), chrm(P3_XY)], LINEAR),
        # sRGB binds before gamma and chromaticities, a profile before all.
        ([SRGB, gama(1.0), chrm(P3_XY)], PLAIN),
        ([iccp(LINEAR_PROFILE)], LINEAR),
        ([iccp(LINEAR_PROFILE), SRGB, gama(2.2)], LINEAR),
        ([iccp(SRGB_PROFILE), gama(1.0)], PLAIN),
        ([iccp(named(color.profile(), "linear"))], PLAIN),
        # What is broken is as good as none, and what comes after it counts.
        ([iccp(b"nonsense" * 20), gama(1.0)], LINEAR),
        ([iccp(SRGB_PROFILE)[:-9] + b"X" * 9, gama(1.0)], LINEAR),
        ([iccp(bytes(png.MAX_PROFILE_BYTES + 1)), gama(1.0)], LINEAR),
        ([chunk(b"gAMA", bytes(4))], PLAIN),
        ([chunk(b"gAMA", b"\0\0\0\1")], PLAIN),
        ([gama(1.0), chunk(b"cHRM", bytes(32))], LINEAR),
        ([gama(1.0), chrm([(0.3, 0.3)] * 4)], LINEAR),
        ([chunk(b"cHRM", b"short")], PLAIN),
    ],
)
def test_what_a_png_says_of_light_is_weighed(before, expected):
    moved = np.subtract(shades(gray_png(*before)), expected)
    assert np.abs(moved).max() <= (0 if expected is PLAIN else 1), moved


def test_a_grey_file_is_read_as_a_colour_file_of_the_same_shades():
    grey = np.array([[[60], [128], [200]]])
    for before, expected in (([gama(1.0)], LINEAR), ([iccp(LINEAR_PROFILE)], LINEAR)):
        assert np.abs(np.subtract(shades(raw_png(grey, 0, 8, before=before)), expected)).max() <= 1


@pytest.mark.parametrize(
    "told", [[chrm(P3_XY)], [iccp(color.profile(xy=P3_XY))], [gama(2.2), chrm(P3_XY)]]
)
def test_other_primaries_are_converted_whoever_tells_them(told):
    # Display P3's numbers for sRGB's red.
    red = raw_png(np.array([[[234, 51, 35]]]), 2, 8, before=told)
    assert np.abs(decode(red)[0, 0].astype(int) - (255, 0, 0, 255)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_profile_counts_in_every_format(kind):
    image = Image.new("RGB", (8, 8), (60, 60, 60))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, icc_profile=LINEAR_PROFILE, **options)
    assert np.abs(decode(data)[..., :3].astype(int) - LINEAR[0]).max() <= 1


def test_the_same_opaque_picture_is_the_same_layer_however_it_is_written():
    flat = Image.new("RGB", (8, 8), (200, 100, 50))
    files = [
        encoded(flat.convert("RGBA")),
        encoded(flat),
        encoded(flat.convert("P", palette=Image.Palette.ADAPTIVE)),
        encoded(flat, "WEBP", lossless=True),
    ]
    assert all(np.array_equal(decode(data), np.asarray(flat.convert("RGBA"))) for data in files)
    photograph = decode(encoded(flat, "JPEG", quality=95))
    assert (photograph[..., 3] == 255).all()
    assert np.abs(photograph.astype(int) - decode(files[0])).max() <= 3


@pytest.mark.parametrize("place", ["before", "between"])
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000))),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"{" * 1_500_000)),
        chunk(b"zTXt", b"Comment\0\0no zlib at all"),
        chunk(b"tEXt", b"Comment\0x")[:-1] + b"?",
        chunk(b"eXIf", b"II no exif"),
        chunk(b"tIME", b"late"),
        chunk(b"sBIT", b""),
    ],
)
def test_what_no_pixel_depends_on_does_no_harm(text, place):
    more = {"between": [text]} if place == "between" else {}
    assert shades(gray_png(*([] if more else [text]), **more)) == PLAIN


# Pillow warns of it while we pass it over.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_a_broken_exif_block_does_no_harm():
    for kind in ("JPEG", "WEBP"):
        data = encoded(Image.new("RGB", (6, 4), (9, 9, 9)), kind, exif=b"Exif\0\0II*\0nonsense")
        assert decode(data).shape == (4, 6, 4)


def repeated(scans):
    """A progressive JPEG whose last scan stands there so many times: a decoder goes over all pixels for each."""
    data = encoded(Image.new("RGB", (64, 48), (200, 100, 50)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    own = jpeg.scans(data)
    return data[:-2] + last * (scans - own) + data[-2:]


def test_the_scans_of_a_jpeg_are_counted():
    photo = Image.fromarray(RNG.integers(0, 256, (64, 48, 3), dtype=np.uint8))
    assert jpeg.scans(encoded(photo, "JPEG")) == 1
    assert jpeg.scans(encoded(photo, "JPEG", progressive=True)) == 10
    assert jpeg.scans(encoded(photo, "JPEG", restart_marker_blocks=1)) == 1
    # What stands in a segment, such as a preview, is no scan, nor is what follows the picture.
    exif = Image.Exif()
    exif[0x010E] = "\xff\xda" * 200
    assert jpeg.scans(encoded(photo, "JPEG", exif=exif)) == 1
    assert jpeg.scans(encoded(photo, "JPEG") + encoded(photo, "JPEG")) == 1
    assert jpeg.scans(jpeg.SIGNATURE + b"\xff\xe0\0\2" * 1_000_000) == jpeg.MAX_MARKERS
    assert jpeg.scans(jpeg.SIGNATURE) == 0
    assert jpeg.scans(jpeg.SIGNATURE + b"\xff\xda") == 1


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(monkeypatch):
    assert decode(repeated(pictures.MAX_SCANS)).shape == (48, 64, 4)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InvalidPicture, match="has 4000 scans or more; allowed: at most 100 scans"):
        decode(repeated(4000))


def test_a_png_of_very_many_chunks_is_refused_before_it_is_decoded(monkeypatch):
    empty = chunk(b"teXt", b"")
    decode(gray_png(*[empty] * 60_000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(InvalidPicture, match="has more than 65536 chunks; allowed: at most 65536"):
        decode(gray_png(*[empty] * 2_000_000))


async def test_a_decoder_gives_what_decoding_gives():
    decoder = Decoder()
    try:
        sound = encoded(Image.fromarray(RGBA))
        assert np.array_equal(await decoder.decode(sound, "x"), RGBA)
        with pytest.raises(InvalidPicture, match="is a picture with transparent pixels; allowed"):
            await decoder.decode(sound, "x", is_opaque=True)
        opaque = encoded(Image.fromarray(RGBA[..., :3].copy()), "WEBP", lossless=True)
        found_HW3 = await decoder.decode(opaque, "x", is_opaque=True)
        assert np.array_equal(found_HW3, RGBA[..., :3])
        with pytest.raises(InvalidPicture, match="is no picture in a known format"):
            await decoder.decode(b"nothing", "x")
    finally:
        await decoder.close()


def test_every_service_decodes_where_it_can_be_ended():
    """Whoever decodes in its own process cannot end it."""
    within = {
        "services/common/decoder.py",
        "services/common/pictures.py",
        "services/compositor/making.py",
    }
    found = {
        str(path.relative_to(ROOT))
        for folder in ("services", "gateway")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"import .*\bdecode(_opaque)?\b|Image\.open\(|imdecode", path.read_text())
    }
    assert found == within


def test_every_png_says_srgb():
    preview = encode_preview(np.zeros((4, 6, 3), np.uint8), Extent(width=600, height=400))
    assert Image.open(BytesIO(preview)).size == (256, 171)
    for shape in ((3, 4), (3, 4, 3), (3, 4, 4)):
        assert SRGB in encode_png(np.zeros(shape, np.uint8))
    assert SRGB in preview


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_cutout_comes_back_exactly(kind):
    data = encoded(Image.fromarray(RGBA), kind, lossless=True, exact=True)
    assert np.array_equal(decode(data), RGBA)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "P"])
def test_a_picture_without_alpha_is_opaque(mode):
    pixels = decode(encoded(Image.new(mode, (4, 4)), "JPEG" if mode == "CMYK" else "PNG"))
    assert (pixels[..., 3] == 255).all()


def test_grey_with_alpha_is_converted():
    grey = RNG.integers(0, 256, (3, 4, 2), dtype=np.uint8)
    pixels = decode(encoded(Image.fromarray(grey, "LA")))
    assert np.array_equal(pixels[..., :3], np.repeat(grey[..., :1], 3, axis=-1))
    assert np.array_equal(pixels[..., 3], grey[..., 1])


def test_a_palette_with_transparency_is_converted():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    pixels = decode(encoded(image, transparency=bytes([0, 128])))
    assert pixels.tolist() == [[[10, 20, 30, 0], [200, 100, 50, 128]]]


@pytest.mark.parametrize(("mode", "key", "other"), [("RGB", (1, 2, 3), (9, 9, 9)), ("L", 5, 9)])
def test_a_transparent_colour_is_converted(mode, key, other):
    image = Image.new(mode, (2, 1), key)
    image.putpixel((1, 0), other)
    assert decode(encoded(image, transparency=key))[0, :, 3].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_an_opaque_picture_may_be_of_any_mode(mode):
    color = {"RGBA": (9, 9, 9, 255), "LA": (9, 255)}.get(mode, 0)
    data = encoded(Image.new(mode, (4, 3), color), "JPEG" if mode == "CMYK" else "PNG")
    assert decode_opaque(data).shape == (3, 4, 3)


def test_an_opaque_picture_is_not_transparent():
    with pytest.raises(InvalidPicture, match=r"transparent pixels.*opaque"):
        decode_opaque(encoded(Image.fromarray(RGBA)))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO"])
def test_other_formats_are_refused(kind):
    with pytest.raises(InvalidPicture, match="PNG, WebP or JPEG"):
        decode(encoded(Image.new("RGB", (4, 4)), kind))


@pytest.mark.parametrize("data", [b"x", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"])
def test_bytes_that_are_no_picture_are_refused(data):
    with pytest.raises(InvalidPicture):
        decode(data)


@pytest.mark.parametrize("size", [0, pictures.MAX_ENCODED_BYTES + 1])
def test_the_encoded_size_is_capped(size):
    with pytest.raises(InvalidPicture, match=rf"has {size} bytes.*from 1 to {2**25}"):
        decode(bytes(size))


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
        decode(png_header(width, height))


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(InvalidPicture):
        decode(png_header(0, 4))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind):
    frames = [Image.new("RGBA", (4, 4), (shade, 0, 0, 255)) for shade in (0, 255)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(InvalidPicture, match=r"animation.*still"):
        decode(data)


@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_exif_orientation_is_honoured(orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGBA), "PNG", exif=exif)
    assert np.array_equal(decode(data), np.rot90(RGBA, turned))


def test_a_profile_is_converted_to_srgb():
    # No wide-gamut profile is at hand everywhere, so XYZ stands in for one: its numbers mean other colours.
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert np.array_equal(decode(encoded(Image.fromarray(RGBA), icc_profile=profile)), RGBA), (
        "a profile of another colour space than the picture's is as good as none"
    )
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(encoded(Image.fromarray(RGBA), icc_profile=srgb)), RGBA)
    # The sRGB profile with red and green exchanged.
    swapped = srgb.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 77))
    pixels = decode(encoded(image, icc_profile=swapped))
    assert np.abs(pixels[0, 0].astype(int) - (0, 255, 0, 77)).max() <= 2


def test_a_broken_profile_changes_nothing():
    data = encoded(Image.fromarray(RGBA), icc_profile=b"nonsense" * 20)
    assert np.array_equal(decode(data), RGBA)


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
    assert stretch(pixels, width=7, height=5) is pixels
    assert stretch(pixels, width=14, height=20).shape == (20, 14, 3)
