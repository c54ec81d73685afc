"""What strangers send: pictures, texts and word files of the kinds that public reports and an attack were made of.

Each of the three draws one from a random generator. Nothing here says what should become of it.
"""

from __future__ import annotations

import io
import random
import struct
import unicodedata
import zlib

import numpy as np
from PIL import Image, PngImagePlugin
from safetensors.numpy import save

from testing.system import chunk, claimed_png, png

# The toy's width, and others.
WIDTHS = (32, 32, 32, 48, 768)
# Ten scripts, those without spaces and those that join or order what stands beside a letter among them.
SCRIPTS = (
    "a sushi and a cake",
    "суши и торт",
    "σούσι και κέικ",
    "寿司とケーキ",
    "寿司和蛋糕",
    "초밥과 케이크",
    "सुशी और केक",
    "سوشي وكعكة",
    "סושי ועוגה",
    "ซูชิและเค้ก",
    "Bánh ngọt và sushi ﬁn",
    "🍣 und 👩‍👩‍👧 mit 🎂\ufe0f",
)
SPACES = "\t\n\r\v\f\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u2029\u200b\u200d\u202f\u205f\u3000\ufeff"
# Of other tools, whole and cut off.
SYNTAX = (
    "(sushi:1.3)",
    "((cake",
    "[sushi:cake:0.5]",
    "sushi AND cake",
    "<lora:x:0.8>",
    "embedding:bad",
    "cake BREAK sushi",
    "{sushi|cake}",
    "__wildcard__",
    "sushi++ cake--",
    "\\(a\\)",
    "<|endoftext|>",
    "$$a{",
)


def text(rng: random.Random) -> str:
    """A prompt or a layer's words."""
    words = rng.choice(SCRIPTS)
    if rng.random() < 0.4:
        words += rng.choice(SPACES) + rng.choice(SYNTAX)
    if rng.random() < 0.5:
        words = words.replace(" ", rng.choice(SPACES) * rng.choice((0, 1, 3)))
    if rng.random() < 0.1:
        words += rng.choice(
            ("\u0301", "\u202e", "\U000e0041", "\0", "\x7f", "\ue000")
        ) * rng.choice((1, 900))
    return unicodedata.normalize(rng.choice(("NFC", "NFD", "NFKC", "NFKD")), words)


def picture(rng: random.Random) -> bytes:
    """The bytes of a file that says it is a picture."""
    return rng.choice((_jpeg, _animation, _plain_png, _chunked, _profiled, _text_bomb, _bmp))(rng)


def word(rng: random.Random) -> bytes:
    """The bytes of a file that says it is of learned words, or of an adapter."""
    width = rng.choice(WIDTHS)
    dtype = rng.choice((np.float16, np.float32, np.float64, np.int8))
    shape = rng.choice(((2, width), (width,), (0, width), (9, width), (1, 1, width)))
    with np.errstate(invalid="ignore"):
        vectors = np.full(shape, rng.choice((0.1, np.nan, np.inf, 1e4)), np.float32).astype(dtype)
    names = rng.choice(
        (
            ("emb_params",),
            ("clip_l", "clip_g"),
            ("clip_g",),
            ("<x>", "<y>"),
            ("string_to_param.*",),
            ("lora_unet_down_blocks_0.lora_up.weight", "lora_unet_down_blocks_0.alpha"),
            ("",),
            (),
        )
    )
    data = save(dict.fromkeys(names, vectors), metadata={"format": "pt"})
    ways = rng.random()
    if ways < 0.15:
        return data[: rng.randrange(len(data))]
    if ways < 0.3:
        # A head that says it is longer than the file, or longer than memory.
        return struct.pack("<Q", rng.choice((0, 2**20, 2**40, 2**64 - 1))) + data[8:]
    if ways < 0.4:
        head = b'{"x":{"dtype":"F32","shape":[-1,4294967296],"data_offsets":[8,0]}}'
        return struct.pack("<Q", len(head)) + head + bytes(64)
    if ways < 0.5:
        return b"\x80\x02}q\x00." + data
    return data


def _pixels(rng: random.Random, mode: str) -> Image.Image:
    side = rng.choice((1, 2, 20, 33, 300))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(
        0, 256, (side, side, 4), dtype=np.uint8
    )
    return Image.fromarray(noise).convert(mode)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _jpeg(rng: random.Random) -> bytes:
    """Scans that stand there again and again, of CMYK or grey, turned by EXIF, or cut."""
    mode = rng.choice(("RGB", "L", "CMYK"))
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 6, 8, 9, 300))
    data = _encoded(_pixels(rng, mode), "JPEG", progressive=True, exif=exif)
    last = data[data.rindex(b"\xff\xda") : -2]
    data = data[:-2] + last * rng.choice((0, 1, 50, 400)) + data[-2:]
    return data[: rng.choice((len(data), len(data) // 2, len(data) - 2))]


def _animation(rng: random.Random) -> bytes:
    frames = [_pixels(rng, "RGBA").resize((40, 40)) for _ in range(rng.choice((1, 2, 60)))]
    form = rng.choice(("WEBP", "GIF", "PNG"))
    return _encoded(frames[0], form, save_all=True, append_images=frames[1:])


def _plain_png(rng: random.Random) -> bytes:
    """Any colour type at any depth, with too few bytes or too many, interlaced or not."""
    width, height = rng.choice(((3, 5), (1, 1), (17, 2), (30_000, 30_000), (0, 4)))
    bits, kind = rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5))
    more = b""
    if rng.random() < 0.5:
        more += chunk(b"PLTE", rng.randbytes(rng.choice((3, 6, 768, 4))))
    if rng.random() < 0.5:
        more += chunk(b"tRNS", rng.randbytes(rng.choice((1, 2, 6, 256))))
    data = claimed_png(
        width, height, bits=bits, kind=kind, more=more, data=bytes(rng.choice((0, 10, 500)))
    )
    # The byte of the header that says it is interlaced; its sum is right or not.
    return data[:28] + bytes([rng.choice((0, 1, 2))]) + data[29:] if rng.random() < 0.3 else data


def _chunked(rng: random.Random) -> bytes:
    """Very many chunks before the pixels, or text that unpacks to much."""
    data = png(np.zeros((20, 20, 4), np.uint8))
    at = data.index(b"IDAT") - 4
    small = chunk(rng.choice((b"teXt", b"acTL", b"sBIT", b"IDAT")))
    return data[:at] + small * rng.choice((1, 300, 20_000)) + data[at:]


def _text_bomb(rng: random.Random) -> bytes:
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "a" * rng.choice((10, 10**6, 2 * 10**7)), zip=True)
    return _encoded(_pixels(rng, "RGBA"), "PNG", pnginfo=told)


def _profiled(rng: random.Random) -> bytes:
    """Profiles, gammas and chromaticities that are none, or are another kind of picture's."""
    data = png(np.full((20, 20, 4), 90, np.uint8))
    at = data.index(b"IDAT") - 4
    more = rng.choice(
        (
            chunk(b"gAMA", struct.pack(">I", rng.choice((0, 1, 45455, 10**5, 2**32 - 1)))),
            chunk(
                b"cHRM", struct.pack(">8I", *(rng.choice((0, 1, 31270, 2**31)) for _ in range(8)))
            ),
            chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(rng.choice((0, 128, 10**7))))),
            chunk(b"iCCP", b"x\0\0" + rng.randbytes(60)),
            chunk(b"sRGB", bytes([rng.choice((0, 9, 255))])),
            chunk(b"eXIf", b"MM\0*" + rng.randbytes(30)),
        )
    )
    return data[:at] + more * rng.choice((1, 2)) + data[at:]


def _bmp(rng: random.Random) -> bytes:
    form = rng.choice(("BMP", "TIFF", "ICO", "PPM"))
    return _encoded(_pixels(rng, "RGB"), form)
