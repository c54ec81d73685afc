"""What a PNG says beside its pixels, and the file without it: `Png.of`.

Decoders disagree on these chunks, and stumble over ones that no pixel depends on: texts, profiles and clocks that are
damaged or unpack to megabytes. So they are read here, each bounded, each passed over where it is broken, and the
decoder of pixels sees only what pixels are made of. This module decodes none.
"""

import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from services.common import color

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The largest ICC profile that is unpacked; those of displays have kilobytes, those with tables a few megabytes.
MAX_PROFILE_BYTES = 16 * 1024 * 1024
# Powers of light that some screen or camera has; gAMA chunks with others are slips of a writer.
GAMMAS = (0.1, 10.0)
GREY, RGB, PALETTE = 0, 2, 3
# Chunks that are looked at. Writers make one of every few kilobytes of pixels, or of every row.
MAX_CHUNKS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Png:
    """A PNG taken apart.

    pixels: a PNG of the same pixels and nothing else.
    depth: bits a channel, or of a palette's index.
    chunks: how many it has; above `MAX_CHUNKS` the rest was not looked at.
    is_animated: whether it has more pictures than one.
    key: the one transparent colour of a grey or RGB picture, as its channels at 8 bits.
    profiles: ICC profiles of its colours, the most binding first; none for sRGB.
    exif: its EXIF block, empty where there is none.
    """

    pixels: bytes
    depth: int
    chunks: int
    is_animated: bool
    key: tuple[int, ...] | None
    profiles: tuple[bytes, ...]
    exif: bytes

    @classmethod
    def of(cls, data: bytes) -> "Png":
        """The parts of an encoded file that begins with `SIGNATURE`; what is damaged in its pixels stays so."""
        kept: list[bytes] = [SIGNATURE]
        beside: dict[bytes, bytes] = {}
        depth, kind, chunks = 0, -1, 0
        for name, body, whole in itertools.islice(_chunks(data), MAX_CHUNKS + 1):
            chunks += 1
            if name == b"IHDR" and len(body) == 13:
                depth, kind = body[8], body[9]
            # A capital letter in front marks what no decoder may pass over; a palette's transparency is a part of it.
            if not name[0] & 0x20 or (name == b"tRNS" and kind == PALETTE):
                kept.append(whole)
            elif zlib.crc32(name + body) == int.from_bytes(whole[-4:], "big"):
                beside.setdefault(name, body)
        return cls(
            pixels=b"".join(kept),
            depth=depth,
            chunks=chunks,
            # APNG: number of frames, number of rounds.
            is_animated=beside.get(b"acTL", b"")[:4] not in (b"", b"\0\0\0\1"),
            key=_key(beside.get(b"tRNS", b""), depth, kind),
            profiles=tuple(_profiles(beside)),
            exif=beside.get(b"eXIf", b""),
        )


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Name, body and the whole of each chunk; the last may be cut short."""
    at = len(SIGNATURE)
    name = b""
    while name != b"IEND" and at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        yield name, data[at + 8 : at + 8 + length], data[at : at + 12 + length]
        at += 12 + length


def _key(body: bytes, depth: int, kind: int) -> tuple[int, ...] | None:
    """The transparent colour: 16 bits a channel in the file, of which as many count as the picture has."""
    channels = {GREY: 1, RGB: 3}.get(kind, 0)
    if depth not in (1, 2, 4, 8) or not channels or len(body) != 2 * channels:
        return None
    most = 2**depth - 1
    return tuple((value & most) * 255 // most for value in struct.unpack(f">{channels}H", body))


def _profiles(beside: dict[bytes, bytes]) -> Iterator[bytes]:
    """An embedded profile binds before the claim to be sRGB, that before gamma and chromaticities (PNG, 4.3)."""
    _, _, packed = beside.get(b"iCCP", b"").partition(b"\0")
    if embedded := _unpacked(packed[1:]):
        yield embedded
    if b"sRGB" in beside:
        return
    gamma = color.SRGB_GAMMA
    xy: tuple[tuple[float, float], ...] = color.SRGB_XY
    if len(body := beside.get(b"gAMA", b"")) == 4 and (told := int.from_bytes(body, "big")):
        # The file holds the inverse, in 100,000ths.
        gamma = 100_000 / told if GAMMAS[0] <= 100_000 / told <= GAMMAS[1] else gamma
    if len(body := beside.get(b"cHRM", b"")) == 32:
        numbers = [value / 100_000 for value in struct.unpack(">8I", body)]
        xy = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    if (gamma, xy) != (color.SRGB_GAMMA, color.SRGB_XY):
        try:
            yield color.profile(gamma, xy)
        except ValueError:
            # Chromaticities of no light; the gamma beside them may still be right.
            yield color.profile(gamma)


def _unpacked(packed: bytes) -> bytes:
    """A profile as it was; nothing where it is damaged, cut short or beyond `MAX_PROFILE_BYTES`."""
    stream = zlib.decompressobj()
    try:
        profile = stream.decompress(packed, MAX_PROFILE_BYTES)
    except zlib.error:
        return b""
    return profile if stream.eof else b""
