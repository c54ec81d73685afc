"""Objects cut out of photographs: a network says where the object is, its edge is then found from the colours.

Main functions: `open_cutters` and `cut`. This module knows neither messages nor storage.

Suffixes: H, W pixels of the picture; h, w what a network gives; 3 = R, G, B; 4 = R, G, B, straight alpha.
"""

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from services.common.models_file import BUNDLED_CUTOUT, DetectorSource, read_cutouts
from services.compositor.matting import matte
from services.compositor.network import Network, digest_of, file_of
from services.compositor.structure import on_ground

# Part of every digest: raise it when the same picture and network give another cut-out.
VERSION = 1
# A network whose alpha is nowhere above this has found nothing.
_FOUND = 0.5
# How far the edge that a network finds may lie from the true one, in pixels of what it is shown.
_REACH = 1.5


class NothingFound(Exception):
    """The network sees no object in the picture."""


class Cutter:
    """One network that cuts objects out, opened when it is first needed.

    name: what requests call it. digest: names its file, its settings and what is made of its alpha.
    """

    def __init__(self, source: DetectorSource, *, threads: int) -> None:
        self.name = source.kind
        self.digest = f"{VERSION} {digest_of(source, file_of(source))}"
        self._source = source
        self._threads = threads

    @functools.cached_property
    def network(self) -> Network:
        """The opened file.

        Raises:
            InvalidSetting: it is not what its operator says.
        """
        return Network(self._source, threads=self._threads)


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
            _ = cutter.network
    return cutters


def cut(network: Network, pixels_HW4: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The object of a picture, HW4, without the ground's colour at its edge.

    What is transparent already stays so: of both alphas the smaller counts, and colours are changed where the picture
    is opaque only. Under alpha 0 all is black.

    Args:
        network: of form "cutout".
        pixels_HW4: the picture.

    Raises:
        NothingFound: there is no object in it.
    """
    own_HW = pixels_HW4[..., 3]
    opaque_HW3 = np.ascontiguousarray(pixels_HW4[..., :3])
    is_opaque = bool(own_HW.min() == 255)
    if not is_opaque:
        for channel in range(3):
            opaque_HW3[..., channel] = on_ground(pixels_HW4[..., channel], own_HW)
    (map_hw,) = network.run(opaque_HW3)
    first_hw = map_hw.reshape(map_hw.shape[-2:])
    if network.source.is_inverted:
        first_hw = 1 - first_hw
    if float(first_hw.max()) < _FOUND:
        raise NothingFound
    alpha_HW, object_HW3 = matte(opaque_HW3, first_hw, reach=_REACH / network.width)
    alpha_HW = np.rint(alpha_HW * np.float32(255)).astype(np.uint8)
    if not is_opaque:
        object_HW3 = np.where((own_HW == 255)[..., None], object_HW3, pixels_HW4[..., :3])
        alpha_HW = np.minimum(alpha_HW, own_HW)
    if not alpha_HW.any():
        raise NothingFound
    object_HW3[alpha_HW == 0] = 0
    return np.dstack([object_HW3, alpha_HW])
