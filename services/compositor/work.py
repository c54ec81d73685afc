"""What a compositor is asked for: `parse` makes a checked `Work` of a request, `parse_cut` a checked `Cutting`.

Its digest names its inputs, so that the same request is answered without being worked out again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from collage.v1 import compositor_service_pb2
from services.common import limits, wire
from services.common.blobs import BlobRef
from services.common.collage import Collage, Picture, Point, Redo, Structure
from services.common.errors import InvalidRequest, quote
from services.compositor.structure import DETECTORS

# Part of every digest of inputs: raise it when the same inputs give another composition.
VERSION = 3
MAX_LATENT_FACTOR = 64
# What a process that works is asked for, before what it is asked with.
COMPOSE, CUT = b"compose", b"cut"
# The kinds that are drawn without a file.
DRAWN = {kind: detector.digest for kind, detector in DETECTORS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A checked request.

    detectors: the digests, by kind, of what draws the control pictures that it does not bring.
    """

    collage: Collage
    latent_factor: int
    redo: Redo | None
    detectors: Mapping[str, str] = field(default_factory=lambda: DRAWN)

    def pictures(self) -> dict[str, Picture]:
        """Every picture by its field path."""
        found = {f"collage.{path}": picture for path, picture in self.collage.pictures().items()}
        if self.redo is not None:
            found["redo.parent"] = self.redo.parent
            # What lies under all layers is the parent.
            found.pop("collage.background.image", None)
        return found

    def stored(self) -> list[str]:
        """The digests of its pictures that are not inline, in order, each once."""
        return sorted(
            {
                picture.sha256
                for picture in self.pictures().values()
                if not isinstance(picture, bytes)
            }
        )

    def digest(self) -> str:
        """Names the inputs: what the composition does not depend on, such as the words, is left out.

        Of structure it depends on the kinds and the control pictures, or what draws them, not on how much and when they
        count.
        """
        layers = tuple(
            replace(
                layer,
                text="",
                structure=tuple(
                    Structure(kind=structure.kind, image=structure.image)
                    for structure in sorted(layer.structure, key=lambda structure: structure.kind)
                ),
                appearance=None,
                seed=None,
            )
            for layer in self.collage.layers
        )
        collage = replace(self.collage, prompt="", negative_prompt="", layers=layers)
        message = compositor_service_pb2.ComposeRequest(
            collage=wire.render_collage(collage), latent_factor=self.latent_factor
        )
        if self.redo is not None:
            message.redo.parent.CopyFrom(wire.render_blob(self.redo.parent))
            message.redo.layers.extend(self.redo.layers)
            message.redo.feather = self.redo.feather
            message.redo.restore_cutout = self.redo.restore_cutout
        # No kind begins as a message does, so these words cannot be taken for a part of one.
        words = [f"{VERSION}", *(f"{kind}={digest}" for kind, digest in self._drawn())]
        inputs = " ".join([*words, ""]).encode() + message.SerializeToString(deterministic=True)
        return hashlib.sha256(inputs).hexdigest()

    def _drawn(self) -> list[tuple[str, str]]:
        """The kinds that are drawn with a file, and the digests of their detectors."""
        kinds = {
            structure.kind
            for layer in self.collage.layers
            for structure in layer.structure
            if structure.image is None
        }
        return [(kind, digest) for kind in sorted(kinds) if (digest := self.detectors[kind])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """A checked request to cut an object out.

    points: those of an object for a model that takes points, else none.
    """

    model: str
    picture: BlobRef
    points: tuple[Point, ...]


def parse_cut(
    request: compositor_service_pb2.CutRequest, takes_points: Mapping[str, bool]
) -> Cutting:
    """The cutting that a request asks for.

    Args:
        request: as it came.
        takes_points: whether it does, by the name of each model, the default first.

    Raises:
        InvalidRequest: naming every wrong field.
    """
    fitting = [name for name, takes in takes_points.items() if takes == bool(request.points)]
    model = request.model or next(iter(fitting), "")
    if request.model and request.model not in takes_points:
        raise InvalidRequest.of(
            "model",
            f"is {quote(request.model)}; allowed: {', '.join(takes_points)}",
            reason="UNKNOWN_MODEL",
        )
    check = wire.Checker()
    picture = wire.parse_blob(request.image, "image")
    count = len(request.points)
    if model not in fitting:
        named = f"of {model}" if model else "here"
        allowed = f"1 to {limits.MAX_POINTS}" if not request.points else f"0 {named}"
        check.refuse("points", f"has {count}; allowed: {allowed}")
    elif count > limits.MAX_POINTS:
        check.refuse("points", f"has {count}; allowed: at most {limits.MAX_POINTS}")
    check.done()
    points = tuple(
        Point(
            x=check.number(f"points[{index}].x", point.x, 0, 1),
            y=check.number(f"points[{index}].y", point.y, 0, 1),
            outside=point.outside,
        )
        for index, point in enumerate(request.points)
    )
    if points and all(point.outside for point in points):
        check.refuse("points", "are all outside; required: one that lies on the object")
    check.done()
    return Cutting(model=model, picture=picture, points=points)


def parse(
    request: compositor_service_pb2.ComposeRequest, detectors: Mapping[str, str] = DRAWN
) -> Work:
    """The work a request asks for.

    Args:
        request: as it came.
        detectors: their digests by kind; a structure of any other kind needs an image.

    Raises:
        InvalidRequest: naming every wrong field.
    """
    collage = wire.parse_collage(request.collage)
    check = wire.Checker()
    factor = int(check.number("latent_factor", request.latent_factor, 1, MAX_LATENT_FACTOR))
    check.done()
    for name, side in (("width", collage.size.width), ("height", collage.size.height)):
        below, above = side // factor * factor, -(-side // factor) * factor
        nearest = [
            f"{near}" for near in (below, above) if limits.MIN_SIDE <= near <= limits.MAX_SIDE
        ]
        if below != above:
            check.refuse(
                f"collage.size.{name}",
                f"is {side}; allowed: multiples of {factor}, the nearest: {' and '.join(nearest)}",
            )
    for index, layer in enumerate(collage.layers):
        for number, structure in enumerate(layer.structure):
            if structure.image is None and structure.kind not in detectors:
                check.refuse(
                    f"collage.layers[{index}].structure[{number}].kind",
                    f"is {quote(structure.kind)}, which needs an image: control pictures are made here "
                    f"only of kind {', '.join(detectors)}",
                )
    redo = _parse_redo(request.redo, collage, check) if request.HasField("redo") else None
    check.done()
    return Work(collage=collage, latent_factor=factor, redo=redo, detectors=detectors)


def _parse_redo(
    message: compositor_service_pb2.Redo, collage: Collage, check: wire.Checker
) -> Redo:
    names = {layer.name for layer in collage.layers}
    if not message.layers:
        check.refuse("redo.layers", "is empty; required: the names of the layers to draw again")
    for index, name in enumerate(message.layers):
        if name not in names:
            check.refuse(
                f"redo.layers[{index}]",
                f"is {quote(name)}; allowed: the collage's layers, {', '.join(sorted(names))}",
            )
    return Redo(
        parent=wire.parse_blob(message.parent, "redo.parent"),
        layers=tuple(message.layers),
        feather=check.number("redo.feather", message.feather, 0, limits.MAX_FEATHER),
        restore_cutout=message.restore_cutout,
    )
