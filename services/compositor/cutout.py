"""Objects cut out of photographs: networks say where the object is, its edge is then found from the colours.

Main functions: `open_cutters` and `cut`. This module knows neither messages nor storage.

Suffixes: H, W pixels of the picture; h, w what a network gives; 3 = R, G, B; 4 = R, G, B, straight alpha.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from services.common.collage import Point
from services.common.models_file import BUNDLED_CUTOUT, DetectorSource, read_cutouts
from services.compositor.matting import matte
from services.compositor.network import Network, digest_of, file_of
from services.compositor.selecting import Selector
from services.compositor.structure import on_ground

# Part of every digest: raise it when the same picture and network give another cut-out.
VERSION = 1
# A network whose alpha is nowhere above this has found nothing.
_FOUND = 0.5
# How far the edge that a network finds may lie from the true one, in pixels of what it is shown.
_REACH = 1.5


class NothingFound(Exception):
    """The model sees no object in the picture."""


class Cutter:
    """One model that cuts objects out, opened when it is first needed.

    name: what requests call it. takes_points: whether it is told which object is meant, else it finds what stands out.
    digest: names its files, their settings and what is made of its alpha.
    """

    def __init__(self, source: DetectorSource, *, threads: int) -> None:
        self.name = source.kind
        self.takes_points = source.decoder is not None
        self.digest = (
            f"{VERSION} {digest_of(source, file_of(source.file, source.place.get('file')))}"
        )
        if source.decoder is not None:
            decoder = file_of(source.decoder, source.place.get("decoder"))
            self.digest += f" {hashlib.sha256(decoder).hexdigest()}"
        self._source = source
        self._threads = threads

    def open(self) -> Network | Selector:
        """The opened files.

        Raises:
            InvalidSetting: they are not what their operator says.
        """
        opens = Selector if self.takes_points else Network
        return opens(self._source, threads=self._threads)

    @functools.cached_property
    def opened(self) -> Network | Selector:
        """As `open`, once."""
        return self.open()

    def find(
        self, pixels_HW3: NDArray[np.uint8], points: Sequence[Point]
    ) -> tuple[NDArray[np.float32], float]:
        """A first alpha of the object, hw, and how far its edge may be off, in shares of the longer side.

        Args:
            pixels_HW3: an opaque picture.
            points: one at least that is not outside, where it takes points; else none.
        """
        if isinstance(self.opened, Selector):
            return self.opened.select(pixels_HW3, points), self.opened.reach
        (map_hw,) = self.opened.run(pixels_HW3)
        first_hw = map_hw.reshape(map_hw.shape[-2:])
        if self._source.is_inverted:
            first_hw = 1 - first_hw
        return first_hw, _REACH / self.opened.width


def open_cutters(models: str, *, threads: int, checks: bool = False) -> Mapping[str, Cutter]:
    """What cuts objects out, by name, the default first.

    Args:
        models: see `read_cutouts`.
        threads: CPU threads of one network.
        checks: whether the operator's own files are opened at once.

    Raises:
        InvalidSetting: naming the place in the file, what is wrong there and what is required.
    """
    cutters = {}
    for source in read_cutouts(models):
        cutters[source.kind] = cutter = Cutter(source, threads=threads)
        if checks and source.file != BUNDLED_CUTOUT:
            cutter.open()
    return cutters


def cut(
    cutter: Cutter, pixels_HW4: NDArray[np.uint8], points: Sequence[Point] = ()
) -> NDArray[np.uint8]:
    """The object of a picture, HW4, without the ground's colour at its edge.

    What is transparent already stays so: of both alphas the smaller counts, and colours are changed where the picture
    is opaque only. Under alpha 0 all is black.

    Args:
        cutter: what finds it.
        pixels_HW4: the picture.
        points: see `Cutter.find`.

    Raises:
        NothingFound: there is no object in it.
    """
    own_HW = pixels_HW4[..., 3]
    opaque_HW3 = np.ascontiguousarray(pixels_HW4[..., :3])
    is_opaque = bool(own_HW.min() == 255)
    if not is_opaque:
        for channel in range(3):
            opaque_HW3[..., channel] = on_ground(pixels_HW4[..., channel], own_HW)
    first_hw, reach = cutter.find(opaque_HW3, points)
    if float(first_hw.max()) < _FOUND:
        raise NothingFound
    alpha_HW, object_HW3 = matte(opaque_HW3, first_hw, reach=reach)
    alpha_HW = np.rint(alpha_HW * np.float32(255)).astype(np.uint8)
    if not is_opaque:
        object_HW3 = np.where((own_HW == 255)[..., None], object_HW3, pixels_HW4[..., :3])
        alpha_HW = np.minimum(alpha_HW, own_HW)
    if not alpha_HW.any():
        raise NothingFound
    object_HW3[alpha_HW == 0] = 0
    return np.dstack([object_HW3, alpha_HW])
