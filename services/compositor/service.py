"""CompositorService over gRPC: requests to compositions, with pictures read from and written to the blob store.

Main type: `CompositorServicer`. A composition is kept under the digest of its inputs, so that the same request is
answered without being worked out again. This module knows no arithmetic on pixels.
"""

import asyncio
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from collage.v1 import collage_pb2, compositor_service_pb2, compositor_service_pb2_grpc
from services.common import limits, wire
from services.common.blobs import (
    BlobCorrupt,
    BlobMissing,
    BlobRef,
    BlobStore,
    BlobTooLarge,
    put_blob,
)
from services.common.collage import DIALS, Collage, Extent, Picture, Redo, Structure
from services.common.errors import (
    Cancelled,
    InvalidRequest,
    MissingBlobs,
    Overloaded,
    Violation,
    quote,
)
from services.common.pictures import (
    MAX_ENCODED_BYTES,
    InvalidPicture,
    decode,
    decode_opaque,
    encode_png,
)
from services.compositor.compose import ComposedLayer, Composition, compose
from services.compositor.placement import stretch
from services.compositor.structure import DETECTORS, Detector

# Part of every digest of inputs: raise it when the same inputs give another composition.
VERSION = 3
# Compositions worked out at once; each takes a core and, at worst, about 1.3 GiB, and what a detector's network takes.
MAX_RUNNING = 2
# Calls that may wait for their turn.
MAX_WAITING = 64
# Encoded pictures of one collage together: they are all held while it is composed.
MAX_COLLAGE_BYTES = 128 * 1024 * 1024
MAX_LATENT_FACTOR = 64
# A kept answer holds 32 layers and their warnings in well under this.
MAX_ANSWER_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A checked request. `detectors`, by kind, draw what control pictures it does not bring."""

    collage: Collage
    latent_factor: int
    redo: Redo | None
    detectors: Mapping[str, Detector] = field(default_factory=lambda: DETECTORS)

    def pictures(self) -> dict[str, Picture]:
        """Every picture by its field path."""
        found = {f"collage.{path}": picture for path, picture in self.collage.pictures().items()}
        if self.redo is not None:
            found["redo.parent"] = self.redo.parent
            # What lies under all layers is the parent.
            found.pop("collage.background.image", None)
        return found

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
        return [(kind, digest) for kind in sorted(kinds) if (digest := self.detectors[kind].digest)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """An encoded composition: the plate, and PNGs of the composite and of each layer's mask."""

    composition: Composition
    plate: bytes
    composite: bytes
    masks: tuple[bytes, ...]


class CompositorServicer(compositor_service_pb2_grpc.CompositorServiceServicer):
    """Composes collages whose pictures lie in `blobs`, with control pictures by `detectors`, by kind."""

    def __init__(self, blobs: BlobStore, detectors: Mapping[str, Detector]) -> None:
        self._blobs = blobs
        self._detectors = detectors
        self._threads = ThreadPoolExecutor(MAX_RUNNING, thread_name_prefix="compose")
        self._turns = asyncio.Semaphore(MAX_RUNNING)
        self._admitted = 0

    async def Compose(
        self, request: compositor_service_pb2.ComposeRequest, context: Any
    ) -> compositor_service_pb2.ComposeResponse:
        """See compositor_service.proto."""
        work = parse(request, self._detectors)
        key = f"plates/{work.digest()}"
        answer = await self._kept(key)
        if answer is None:
            answer = await self._store(await self._make(work))
            data = answer.SerializeToString(deterministic=True)
            await self._blobs.put(key, data, media_type="application/x-protobuf")
        return answer

    async def DescribeDetectors(
        self, request: compositor_service_pb2.DescribeDetectorsRequest, context: Any
    ) -> compositor_service_pb2.DescribeDetectorsResponse:
        """See compositor_service.proto."""
        return compositor_service_pb2.DescribeDetectorsResponse(kinds=sorted(self._detectors))

    async def close(self) -> None:
        """Lets go of the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _make(self, work: Work) -> Files:
        if self._admitted >= MAX_RUNNING + MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} collages wait to be composed", retry_after_s=2.0)
        self._admitted += 1
        try:
            async with self._turns:
                data = await self._fetch(work.pictures())
                loop = asyncio.get_running_loop()
                # A thread cannot be stopped: that of a caller who left ends before its next layer.
                abandoned = threading.Event()
                try:
                    return await loop.run_in_executor(
                        self._threads, make, work, data, abandoned.is_set
                    )
                finally:
                    abandoned.set()
        finally:
            self._admitted -= 1

    async def _kept(self, key: str) -> compositor_service_pb2.ComposeResponse | None:
        """The answer given to these inputs before, if everything it refers to is still there."""
        try:
            data = await self._blobs.get(key, limit_bytes=MAX_ANSWER_BYTES)
            answer = compositor_service_pb2.ComposeResponse.FromString(data)
            told = [answer.plate, answer.composite, *(layer.mask for layer in answer.layers)]
            refs = [
                wire.parse_blob(each, "kept", limit_bytes=limits.MAX_PLATE_BYTES) for each in told
            ]
        # Whatever is not an answer is made anew.
        except (BlobMissing, BlobCorrupt, BlobTooLarge, DecodeError, InvalidRequest):
            return None
        stats = await asyncio.gather(*(self._blobs.stat(ref.key) for ref in refs))
        # One from before there was `largest_noise` is made again, and is the same but for that.
        return answer if answer.HasField("largest_noise") and all(stats) else None

    async def _fetch(self, pictures: Mapping[str, Picture]) -> dict[str, bytes]:
        """The encoded pictures; equal ones are one object.

        Raises:
            MissingBlobs: naming every one that is not stored.
            DataLoss: naming the first that is damaged.
            InvalidRequest: when one, or all together, are too large.
        """
        refs = {path: ref for path, ref in pictures.items() if isinstance(ref, BlobRef)}
        keys = sorted({ref.key for ref in refs.values()})
        stats = dict(
            zip(keys, await asyncio.gather(*(self._blobs.stat(key) for key in keys)), strict=True)
        )
        missing = {path: ref.sha256 for path, ref in refs.items() if stats[ref.key] is None}
        if missing:
            raise MissingBlobs(missing)
        sizes = {key: stat.size_bytes for key, stat in stats.items() if stat is not None}
        if too_large := [
            Violation(
                field=path,
                description=f"has {sizes[ref.key]} bytes; allowed: at most {MAX_ENCODED_BYTES}",
            )
            for path, ref in refs.items()
            if sizes[ref.key] > MAX_ENCODED_BYTES
        ]:
            raise InvalidRequest(too_large)
        if sum(sizes.values()) > MAX_COLLAGE_BYTES:
            raise InvalidRequest.of(
                "collage",
                f"has pictures of {sum(sizes.values())} bytes in all; allowed: at most {MAX_COLLAGE_BYTES}",
            )
        paths = {ref.key: path for path, ref in reversed(refs.items())}
        found = {
            key: await wire.read_blob(self._blobs, refs[path], path, limit_bytes=MAX_ENCODED_BYTES)
            for key, path in paths.items()
        }
        return {
            path: picture if isinstance(picture, bytes) else found[picture.key]
            for path, picture in pictures.items()
        }

    async def _store(self, files: Files) -> compositor_service_pb2.ComposeResponse:
        plate = await put_blob(self._blobs, files.plate, media_type="application/vnd.safetensors")
        composite, *masks = [
            await put_blob(self._blobs, data, media_type="image/png")
            for data in (files.composite, *files.masks)
        ]
        composition = files.composition
        return compositor_service_pb2.ComposeResponse(
            plate=wire.render_blob(plate),
            composite=wire.render_blob(composite),
            layers=[
                _render_layer(layer, mask)
                for layer, mask in zip(composition.layers, masks, strict=True)
            ],
            warnings=[
                collage_pb2.Warning(
                    reason=notice.reason, field=notice.field, message=notice.message
                )
                for notice in composition.notices
            ],
            largest_noise=float(composition.plate.strength_hw.max()),
        )


def parse(
    request: compositor_service_pb2.ComposeRequest, detectors: Mapping[str, Detector] = DETECTORS
) -> Work:
    """The work a request asks for.

    Args:
        request: as it came.
        detectors: by kind; a structure of any other needs an image.

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


def make(
    work: Work, data: Mapping[str, bytes], is_abandoned: Callable[[], bool] = lambda: False
) -> Files:
    """Decodes, composes, encodes: the part that takes a thread.

    Args:
        work: what to make.
        data: its encoded pictures, by field path.
        is_abandoned: whether nobody waits for it any more; asked before each layer.

    Raises:
        Cancelled: it was abandoned.
        InvalidRequest: naming every picture that cannot be used.
    """
    composition = compose(
        work.collage,
        _cutouts(work.collage, data, is_abandoned),
        _under(work, data),
        latent_factor=work.latent_factor,
        redo=work.redo,
        supplied=lambda index, number: _control(work.collage, data, index, number),
        detectors=work.detectors,
    )
    return Files(
        composition=composition,
        plate=composition.plate.to_bytes(),
        composite=encode_png(composition.plate.composite_HWC),
        masks=tuple(encode_png(layer.mask(work.collage.size)) for layer in composition.layers),
    )


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


def _cutouts(
    collage: Collage, data: Mapping[str, bytes], is_abandoned: Callable[[], bool]
) -> Iterator[NDArray[np.uint8]]:
    """The layers' pictures from the top down."""
    for index in reversed(range(len(collage.layers))):
        if is_abandoned():
            raise Cancelled("nobody waits for this composition")
        try:
            pixels_HW4 = decode(data[f"collage.layers[{index}].image"])
        except InvalidPicture as error:
            raise InvalidRequest(_faults(collage, data)) from error
        yield pixels_HW4


def _control(
    collage: Collage, data: Mapping[str, bytes], index: int, number: int
) -> NDArray[np.uint8]:
    """The control picture that came with structure `number` of layer `index`."""
    try:
        return decode_opaque(data[f"collage.layers[{index}].structure[{number}].image"])
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


def _under(work: Work, data: Mapping[str, bytes]) -> NDArray[np.uint8]:
    """What lies under all layers, of the canvas' size."""
    size = work.collage.size
    if work.redo is not None:
        parent_HWC = _opaque("redo.parent", data)
        height, width = parent_HWC.shape[:2]
        if Extent(width=width, height=height) != size:
            raise InvalidRequest.of(
                "redo.parent",
                f"is {width} x {height} pixels; required: the canvas' {size.width} x {size.height}",
            )
        return parent_HWC
    if isinstance(work.collage.background, tuple):
        return np.full((size.height, size.width, 3), work.collage.background, np.uint8)
    background_HWC = _opaque("collage.background.image", data)
    return stretch(background_HWC, width=size.width, height=size.height)


def _opaque(path: str, data: Mapping[str, bytes]) -> NDArray[np.uint8]:
    try:
        return decode_opaque(data[path])
    except InvalidPicture as error:
        raise InvalidRequest.of(path, str(error)) from error


def _render_layer(part: ComposedLayer, mask: BlobRef) -> collage_pb2.LayerPlan:
    return collage_pb2.LayerPlan(
        name=part.layer.name,
        opacity=part.layer.opacity,
        **{dial: getattr(part.dials, dial) for dial in DIALS},
        visible_fraction=part.visible_fraction,
        unoccluded_fraction=part.unoccluded_fraction,
        mask=wire.render_blob(mask),
        transform=wire.render_transform(part.transform),
    )
