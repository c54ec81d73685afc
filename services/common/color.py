"""What a picture's numbers say of light, and the same light as sRGB: `to_srgb`; `profile` of light told in numbers.

A profile is judged by what it does to colours, never by its name: one that moves nothing is sRGB, and pixels under it
are left exactly as they are; all others go through littleCMS. This module knows no file format.
"""

import struct
from collections.abc import Sequence
from functools import cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

# x and y of white, red, green and blue in sRGB (IEC 61966-2-1).
SRGB_XY = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
# Gamma of files made for screens like sRGB's: what the PNG specification has writers put beside an sRGB chunk.
SRGB_GAMMA = 2.2
# A gamma so near to that one, as a fraction, means sRGB's own curve: libpng's threshold.
_SAME_GAMMA = 0.05
# Levels of 255 that a profile may move a colour by and still be sRGB: its tables and littleCMS's arithmetic round.
_SAME_LEVELS = 2
# The mode littleCMS wants for each colour space a profile may be in.
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}
# The white of the space that profiles connect through, as XYZ (ICC.1, 7.2.16).
_D50_3 = np.array([0.9642, 1.0, 0.8249])
# XYZ to the responses of cones, in which one white is exchanged for another (Bradford).
_CONES_33 = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
# sRGB's curve in the form of an ICC parametric curve, function 3: g, a, b, c, d.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def to_srgb(image: Image.Image, profiles: Sequence[bytes]) -> Image.Image:
    """The colours of a picture as RGB in sRGB; what alpha it has is dropped.

    Args:
        image: of mode RGB, RGBA, L, LA, 1 or CMYK.
        profiles: ICC profiles its file has, the most binding first. The first one that can be used counts; one that
            cannot is as good as none. Without any the numbers are sRGB's already.
    """
    plain = image.convert({"RGBA": "RGB", "LA": "L", "1": "L"}.get(image.mode, image.mode))
    for data in profiles:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(data))
            mode = _MODES.get(source.profile.xcolor_space.strip())
            # A shade of grey is a colour of three equal parts, which is how optimisers come by grey files.
            fitting = plain.convert("RGB") if (plain.mode, mode) == ("L", "RGB") else plain
            if fitting.mode == mode:
                return (
                    fitting.convert("RGB") if _is_srgb(source, mode) else _through(fitting, source)
                )
        except (ImageCms.PyCMSError, OSError):
            continue
    return plain.convert("RGB")


def profile(gamma: float = SRGB_GAMMA, xy: Sequence[tuple[float, float]] = SRGB_XY) -> bytes:
    """An ICC profile of RGB light.

    Args:
        gamma: the light is the number to this power; one within 5 % of `SRGB_GAMMA` stands for sRGB's curve.
        xy: chromaticities of white, red, green and blue.

    Raises:
        ValueError: no light has these chromaticities.
    """
    if not all(0 <= x <= 1 and 0 < y <= 1 for x, y in xy):
        raise ValueError(f"chromaticities {xy} are outside what can be seen")
    white_3, *primaries = (np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in xy)
    primaries_33 = np.stack(primaries, axis=1)
    if abs(np.linalg.det(primaries_33)) < 1e-6:
        raise ValueError(f"chromaticities {xy} span no gamut")
    primaries_33 = primaries_33 * np.linalg.solve(primaries_33, white_3)
    gains_3 = (_CONES_33 @ _D50_3) / (_CONES_33 @ white_3)
    adapted_33 = np.linalg.inv(_CONES_33) @ (gains_3[:, None] * _CONES_33) @ primaries_33
    is_srgb = abs(gamma / SRGB_GAMMA - 1) <= _SAME_GAMMA
    kind, numbers = (3, _SRGB_CURVE) if is_srgb else (0, (gamma,))
    curve = struct.pack(">4sIHH", b"para", 0, kind, 0) + _fixed(numbers)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50_3)}
    for column, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(adapted_33[:, column])
        tags[name + b"TRC"] = curve
    return _file(tags)


def _through(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None, "only an in-place conversion answers nothing"
    return converted


def _is_srgb(source: ImageCms.ImageCmsProfile, mode: str) -> bool:
    """Whether the profile moves no colour of a sample: every grey, every shade of each primary, and a grid."""
    if mode == "CMYK":
        return False
    sample = Image.fromarray(_sample())
    before = sample.getchannel("R") if mode == "L" else sample
    moved = np.asarray(_through(before, source)).astype(int) - np.asarray(before.convert("RGB"))
    return bool(np.abs(moved).max() <= _SAME_LEVELS)


@cache
def _sample() -> NDArray[np.uint8]:
    ramp = np.arange(256)
    ramps = ramp[:, None, None] * np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    grid = np.stack(np.meshgrid(*3 * [np.linspace(0, 255, 8)], indexing="ij"), axis=-1)
    return np.concatenate([ramps.reshape(-1, 3), grid.reshape(-1, 3)])[None].astype(np.uint8)


def _file(tags: dict[bytes, bytes]) -> bytes:
    """An ICC file, version 4.2: a display's profile from RGB to XYZ."""
    table, body = [struct.pack(">I", len(tags))], b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table.append(struct.pack(">4sII", name, start + len(body), len(data)))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x04200000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return (head + _fixed(_D50_3)).ljust(128, b"\0") + b"".join(table) + body


def _fixed(values: Sequence[float] | NDArray[np.float64]) -> bytes:
    """Numbers with 16 bits before the point and 16 after."""
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)
