"""A work and its encoded pictures to an encoded composition: `make`, and `confined` as a process of its own does it.

Such a process also cuts objects out of pictures.

Pictures of strangers are decoded here, and nowhere else in a compositor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collage.v1 import collage_pb2, compositor_service_pb2
from services.common import wire
from services.common.collage import DIALS, Collage, Extent, Point
from services.common.confined import Work as ConfinedWork
from services.common.errors import InvalidRequest, Violation
from services.common.pictures import InvalidPicture, decode, decode_opaque, encode_png
from services.compositor.compose import ComposedLayer, Composition, compose
from services.compositor.cutout import Cutter, NothingFound, cut, open_cutters
from services.compositor.detector import open_detectors
from services.compositor.placement import stretch
from services.compositor.structure import DETECTORS, Detector
from services.compositor.work import CUT, Work, parse, parse_cut

# Is told the field path of each picture as it is begun on.
Begin = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """An encoded composition: the plate, and PNGs of the composite and of each layer's mask."""

    composition: Composition
    plate: bytes
    composite: bytes
    masks: tuple[bytes, ...]


def confined(models: str, threads: str) -> ConfinedWork:
    """What a process of its own does, by the word that its first part is.

    `COMPOSE`: in come the request and, in the order of their digests, the stored pictures that it refers to; out go the
    answer without references, the plate, the composite and the masks. `CUT`: in come the request and its picture; out
    goes a PNG of its object.

    Args:
        models: see `open_detectors`.
        threads: of one detector's network.
    """
    detectors = open_detectors(models, threads=int(threads))
    digests = {kind: detector.digest for kind, detector in detectors.items()}

    cutters = open_cutters(models, threads=int(threads))
    takes_points = {name: cutter.takes_points for name, cutter in cutters.items()}

    def work(parts: list[bytes], begin: Begin) -> list[bytes]:
        word, request, *pictures = parts
        if word == CUT:
            (picture,) = pictures
            begin("image")
            asked_cut = parse_cut(
                compositor_service_pb2.CutRequest.FromString(request), takes_points
            )
            return [cut_out(cutters[asked_cut.model], picture, asked_cut.points)]
        asked = parse(compositor_service_pb2.ComposeRequest.FromString(request), digests)
        stored = dict(zip(asked.stored(), pictures, strict=True))
        data = {
            path: picture if isinstance(picture, bytes) else stored[picture.sha256]
            for path, picture in asked.pictures().items()
        }
        files = make(asked, data, detectors, begin)
        answer = _render(files.composition).SerializeToString()
        return [answer, files.plate, files.composite, *files.masks]

    return work


def make(
    work: Work,
    data: Mapping[str, bytes],
    detectors: Mapping[str, Detector] = DETECTORS,
    begin: Begin = lambda _: None,
) -> Files:
    """Decodes, composes, encodes.

    Args:
        work: what to make.
        data: its encoded pictures, by field path.
        detectors: by kind, those of the work.
        begin: see `Begin`.

    Raises:
        InvalidRequest: naming every picture that cannot be used.
    """
    composition = compose(
        work.collage,
        _cutouts(work.collage, data, begin),
        _under(work, data, begin),
        latent_factor=work.latent_factor,
        redo=work.redo,
        supplied=lambda index, number: _control(work.collage, data, index, number, begin),
        detectors=detectors,
    )
    return Files(
        composition=composition,
        plate=composition.plate.to_bytes(),
        composite=encode_png(composition.plate.composite_HWC),
        masks=tuple(encode_png(layer.mask(work.collage.size)) for layer in composition.layers),
    )


def cut_out(cutter: Cutter, data: bytes, points: Sequence[Point]) -> bytes:
    """The object of an encoded picture, as an RGBA PNG.

    Raises:
        InvalidRequest: it cannot be used, or nothing is found in it.
    """
    try:
        return encode_png(cut(cutter, decode(data), points))
    except InvalidPicture as error:
        raise InvalidRequest.of("image", str(error)) from error
    except NothingFound as error:
        raise InvalidRequest.of(
            "image",
            f"is a picture in which {cutter.name} finds no object{' there' if points else ''}; "
            "required: one that stands out from its ground",
            reason="NOTHING_FOUND",
        ) from error


def _cutouts(
    collage: Collage, data: Mapping[str, bytes], begin: Begin
) -> Iterator[NDArray[np.uint8]]:
    """The layers' pictures from the top down."""
    for index in reversed(range(len(collage.layers))):
        path = f"collage.layers[{index}].image"
        begin(path)
        try:
            pixels_HW4 = decode(data[path])
        except InvalidPicture as error:
            raise InvalidRequest(_faults(collage, data)) from error
        yield pixels_HW4


def _control(
    collage: Collage, data: Mapping[str, bytes], index: int, number: int, begin: Begin
) -> NDArray[np.uint8]:
    """The control picture that came with structure `number` of layer `index`."""
    path = f"collage.layers[{index}].structure[{number}].image"
    begin(path)
    try:
        return decode_opaque(data[path])
    except InvalidPicture as error:
        raise InvalidRequest(_faults(collage, data)) from error


def _faults(collage: Collage, data: Mapping[str, bytes]) -> list[Violation]:
    """What is wrong with which cut-outs and control pictures, in the order of the layers."""
    faults = []
    for below in collage.pictures():
        path = f"collage.{below}"
        if below.startswith("layers"):
            check = decode_opaque if ".structure[" in below else decode
            try:
                check(data[path])
            except InvalidPicture as error:
                faults.append(Violation(field=path, description=str(error)))
    return faults


def _under(work: Work, data: Mapping[str, bytes], begin: Begin) -> NDArray[np.uint8]:
    """What lies under all layers, of the canvas' size."""
    size = work.collage.size
    if work.redo is not None:
        parent_HWC = _opaque("redo.parent", data, begin)
        height, width = parent_HWC.shape[:2]
        if Extent(width=width, height=height) != size:
            raise InvalidRequest.of(
                "redo.parent",
                f"is {width} x {height} pixels; required: the canvas' {size.width} x {size.height}",
            )
        return parent_HWC
    if isinstance(work.collage.background, tuple):
        return np.full((size.height, size.width, 3), work.collage.background, np.uint8)
    background_HWC = _opaque("collage.background.image", data, begin)
    return stretch(background_HWC, width=size.width, height=size.height)


def _opaque(path: str, data: Mapping[str, bytes], begin: Begin) -> NDArray[np.uint8]:
    begin(path)
    try:
        return decode_opaque(data[path])
    except InvalidPicture as error:
        raise InvalidRequest.of(path, str(error)) from error


def _render(composition: Composition) -> compositor_service_pb2.ComposeResponse:
    """The answer, but for the references to what is yet to be stored."""
    return compositor_service_pb2.ComposeResponse(
        layers=map(_render_layer, composition.layers),
        warnings=[
            collage_pb2.Warning(reason=notice.reason, field=notice.field, message=notice.message)
            for notice in composition.notices
        ],
        largest_noise=float(composition.plate.strength_hw.max()),
    )


def _render_layer(part: ComposedLayer) -> collage_pb2.LayerPlan:
    return collage_pb2.LayerPlan(
        name=part.layer.name,
        opacity=part.layer.opacity,
        **{dial: getattr(part.dials, dial) for dial in DIALS},
        visible_fraction=part.visible_fraction,
        unoccluded_fraction=part.unoccluded_fraction,
        transform=wire.render_transform(part.transform),
    )
