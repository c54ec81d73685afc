"""Decoding one picture where it can be ended: `Decoder`, for services that read a stranger's picture now and then.

The pixels cross as they are. This module knows no file formats.
"""

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from services.common.confined import Confined, Work
from services.common.pictures import InvalidPicture, decode, decode_opaque

# Longest that one picture may take; no sound one takes more than two or three.
LIMIT_S = 30.0
# Most that a process may take: a picture of the largest size in the three forms it passes through.
MEMORY_BYTES = 1 * 2**30
_SHAPE = struct.Struct(">III")
_WAYS = {b"any": decode, b"opaque": decode_opaque}


class Decoder:
    """One process that decodes, started with the first picture."""

    def __init__(self) -> None:
        self._work = Confined(
            "services.common.decoder:confined",
            processes=1,
            limit_s=LIMIT_S,
            memory_bytes=MEMORY_BYTES,
        )

    async def decode(
        self, data: bytes, field: str, *, is_opaque: bool = False
    ) -> NDArray[np.uint8]:
        """See `pictures.decode` and, where only an opaque one will do, `decode_opaque`.

        Args:
            data: the encoded picture.
            field: its path, for what is told of one that takes too long or too much.
            is_opaque: whether transparent pixels are refused.

        Raises:
            InvalidPicture: as they do.
            InvalidRequest: at `field`, where it takes too long or too much memory.
        """
        way = b"opaque" if is_opaque else b"any"
        shape, answer = await self._work.run([way, data], field)
        if not shape:
            reason, _, allowed = answer.decode().partition("\0")
            raise InvalidPicture(reason, allowed)
        return np.frombuffer(answer, np.uint8).reshape(_SHAPE.unpack(shape))

    async def close(self) -> None:
        """Ends the process."""
        await self._work.close()


def confined() -> Work:
    """What the process does: a way and a picture in, shape and pixels out, or nothing and what is wrong."""

    def work(parts: list[bytes], begin: Callable[[str], None]) -> list[bytes]:
        way, data = parts
        try:
            pixels_HWC = _WAYS[way](data)
        except InvalidPicture as error:
            return [b"", f"{error.reason}\0{error.allowed}".encode()]
        return [_SHAPE.pack(*pixels_HWC.shape), pixels_HWC.tobytes()]

    return work
