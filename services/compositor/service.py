"""CompositorService over gRPC: requests to compositions and cut-outs, pictures read from and written to the blob store.

Main type: `CompositorServicer`. What is made is kept under the digest of its inputs, and equal requests at one time
are worked out once. The work itself is done by processes that can be ended; this module sees no pixel.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError

from collage.v1 import blob_pb2, compositor_service_pb2, compositor_service_pb2_grpc
from services.common import limits, wire
from services.common.blobs import (
    BlobCorrupt,
    BlobMissing,
    BlobRef,
    BlobStore,
    BlobTooLarge,
    put_blob,
)
from services.common.collage import Picture
from services.common.confined import Confined
from services.common.errors import InvalidRequest, MissingBlobs, Violation
from services.common.pictures import MAX_ENCODED_BYTES
from services.common.rpc import caller
from services.common.turns import Place, Turns
from services.compositor.cutout import Cutter
from services.compositor.work import COMPOSE, CUT, Cutting, Work, parse, parse_cut

# Compositions worked out at once, beside one of a caller whose compositions are short. Each takes a core and, at
# worst, about 1.3 GiB, and what a detector's network takes.
MAX_RUNNING, KEPT = 2, 1
# Callers may have so many more wait for their turn, each of them and all together.
MAX_CALLER_WAITING, MAX_WAITING = 32, 256
# Longest that one may take. 32 layers of 16 megapixels take 20 s on two cores; the gateway asks for 100.
LIMIT_S = 90.0
# Most that a process may take that works them out.
MEMORY_BYTES = 3 * 2**30
# Encoded pictures of one collage together: they are all held while it is composed.
MAX_COLLAGE_BYTES = 128 * 1024 * 1024
# A kept answer holds 32 layers and their warnings in well under this.
MAX_ANSWER_BYTES = 256 * 1024


Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Making(Generic[Answer]):
    """An answer that is being made, and how many calls wait for it."""

    task: asyncio.Task[Answer]
    waiting: int = 0


class CompositorServicer(compositor_service_pb2_grpc.CompositorServiceServicer):
    """Composes collages whose pictures lie in `blobs`.

    Args:
        blobs: the pictures, and where what is made of them is put.
        detectors: the digests of what draws control pictures, by kind.
        cutters: what cuts objects out, by name, the default first; none is opened.
        work: the processes of each place.
    """

    def __init__(
        self,
        blobs: BlobStore,
        detectors: Mapping[str, str],
        cutters: Mapping[str, Cutter],
        work: Mapping[Place, Confined],
    ) -> None:
        self._blobs = blobs
        self._detectors = detectors
        self._cutters = cutters
        self._work = work
        self._turns = Turns(
            "collages to be composed",
            running=MAX_RUNNING,
            kept=KEPT,
            caller_running=MAX_RUNNING,
            waiting=MAX_WAITING,
            caller_waiting=MAX_CALLER_WAITING,
        )
        self._making: dict[str, _Making[Any]] = {}

    async def Compose(
        self, request: compositor_service_pb2.ComposeRequest, context: Any
    ) -> compositor_service_pb2.ComposeResponse:
        """See compositor_service.proto."""
        work = parse(request, self._detectors)
        key = f"plates/{work.digest()}"
        answer = await self._kept(key)
        if answer is not None:
            return answer
        return await self._shared(key, lambda: self._make(key, request, work))

    async def Cut(
        self, request: compositor_service_pb2.CutRequest, context: Any
    ) -> compositor_service_pb2.CutResponse:
        """See compositor_service.proto."""
        cutting = parse_cut(
            request, {name: cutter.takes_points for name, cutter in self._cutters.items()}
        )
        points = [(point.x, point.y, point.outside) for point in cutting.points]
        told = (
            f"{self._cutters[cutting.model].digest} {cutting.picture.sha256} {points or ''}".strip()
        )
        key = f"cutouts/{hashlib.sha256(told.encode()).hexdigest()}"
        image = await self._kept_cutout(key)
        if image is None:
            image = await self._shared(key, lambda: self._cut(key, request, cutting))
        return compositor_service_pb2.CutResponse(image=image, model=cutting.model)

    async def DescribeDetectors(
        self, request: compositor_service_pb2.DescribeDetectorsRequest, context: Any
    ) -> compositor_service_pb2.DescribeDetectorsResponse:
        """See compositor_service.proto."""
        answer = compositor_service_pb2.DescribeDetectorsResponse(kinds=sorted(self._detectors))
        for name, cutter in self._cutters.items():
            answer.cut_out_models.add(name=name, takes_points=cutter.takes_points)
        return answer

    async def _shared(self, key: str, make: Callable[[], Coroutine[Any, Any, Answer]]) -> Answer:
        """The answer of the one making of these inputs, which ends when nobody waits for it any more."""
        making: _Making[Answer] | None = self._making.get(key)
        if making is None:
            making = self._making[key] = _Making(asyncio.create_task(make()))
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting:
                making.task.cancel()
                del self._making[key]

    async def _make(
        self, key: str, request: compositor_service_pb2.ComposeRequest, work: Work
    ) -> compositor_service_pb2.ComposeResponse:
        async with self._turns.turn(caller.get()) as place:
            found = await self._fetch(work.pictures())
            parts = await self._work[place].run(
                [
                    COMPOSE,
                    request.SerializeToString(),
                    *(found[digest] for digest in work.stored()),
                ],
                "collage",
            )
        answer = await self._store(parts)
        data = answer.SerializeToString(deterministic=True)
        await self._blobs.put(key, data, media_type="application/x-protobuf")
        return answer

    async def _cut(
        self, key: str, request: compositor_service_pb2.CutRequest, cutting: Cutting
    ) -> blob_pb2.BlobRef:
        async with self._turns.turn(caller.get()) as place:
            found = await self._fetch({"image": cutting.picture})
            parts = [CUT, request.SerializeToString(), found[cutting.picture.sha256]]
            (png,) = await self._work[place].run(parts, "image")
        ref = wire.render_blob(await put_blob(self._blobs, png, media_type="image/png"))
        data = ref.SerializeToString(deterministic=True)
        await self._blobs.put(key, data, media_type="application/x-protobuf")
        return ref

    async def _kept_cutout(self, key: str) -> blob_pb2.BlobRef | None:
        """What was cut out with these inputs before, if it is still there."""
        try:
            data = await self._blobs.get(key, limit_bytes=MAX_ANSWER_BYTES)
            kept = blob_pb2.BlobRef.FromString(data)
            ref = wire.parse_blob(kept, "kept")
        except (BlobMissing, BlobCorrupt, BlobTooLarge, DecodeError, InvalidRequest):
            return None
        return kept if await self._blobs.stat(ref.key) else None

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
        """The stored pictures, by their digests.

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
        paths = {ref.sha256: path for path, ref in reversed(refs.items())}
        return {
            digest: await wire.read_blob(
                self._blobs, refs[path], path, limit_bytes=MAX_ENCODED_BYTES
            )
            for digest, path in paths.items()
        }

    async def _store(self, parts: Sequence[bytes]) -> compositor_service_pb2.ComposeResponse:
        """The answer, with what it refers to stored; `parts` as `making.confined` gives them."""
        rendered, plate, *pictures = parts
        answer = compositor_service_pb2.ComposeResponse.FromString(rendered)
        places = [answer.plate, answer.composite, *(layer.mask for layer in answer.layers)]
        stored = [
            (plate, "application/vnd.safetensors"),
            *((each, "image/png") for each in pictures),
        ]
        refs = await asyncio.gather(
            *(put_blob(self._blobs, data, media_type=kind) for data, kind in stored)
        )
        for place, ref in zip(places, refs, strict=True):
            place.CopyFrom(wire.render_blob(ref))
        return answer
