"""A whole system over the toy model, and small requests for it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from collage.v1 import blob_pb2, collage_pb2, collage_service_pb2_grpc
from collage.v1 import collage_service_pb2 as pb
from local import embedded
from services.common.rpc import connect
from testing import networks, toy

# No call of a test takes longer, on the busiest machine; one that does hangs.
LIMIT_S = 60
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A running system: its gateway's channel and stub."""

    channel: grpc.aio.Channel
    stub: collage_service_pb2_grpc.CollageServiceStub

    async def generate(self, request: pb.GenerateImagesRequest) -> list[pb.JobEvent]:
        """Every event of a GenerateImages call."""
        answers = self.stub.GenerateImages(request, timeout=LIMIT_S)
        return [answer.event async for answer in answers]

    async def watch(self, job: str, *, after: int = 0) -> list[pb.JobEvent]:
        """The job's log to its end, without its place in the queue."""
        request = pb.WatchJobRequest(name=job, after_sequence=after)
        events = [a.event async for a in self.stub.WatchJob(request, timeout=LIMIT_S)]
        return [event for event in events if not event.HasField("queued")]

    async def fetch(self, blob: blob_pb2.BlobRef) -> bytes:
        """The bytes of a blob, held to its digest."""
        request = pb.GetBlobRequest(sha256=blob.sha256)
        parts = [part async for part in self.stub.GetBlob(request, timeout=LIMIT_S)]
        assert parts[0].header.size_bytes == blob.size_bytes
        data = b"".join(part.chunk for part in parts[1:])
        assert hashlib.sha256(data).hexdigest() == blob.sha256
        return data

    async def picture(self, blob: blob_pb2.BlobRef) -> np.ndarray:
        """The pixels of a stored picture."""
        with Image.open(io.BytesIO(await self.fetch(blob))) as image:
            return np.asarray(image)


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    *,
    kinds: Sequence[str] = (),
    detectors: dict | None = None,
    word_steps: int = 4,
) -> AsyncIterator[System]:
    """Starts everything on the toy model with ControlNets and detectors of these kinds, the data in `folder`."""
    # Several threads stall on a machine that has other work.
    model = toy.mini(folder / "toy")
    for kind in kinds:
        toy.controlnet(model, kind)
    served = str(model)
    if detectors is not None:
        served = networks.models_file(folder, detectors, [{"name": "toy", "source": served}])
    server = await embedded.start(folder / "data", model=served, threads=1, word_steps=word_steps)
    try:
        async with connect(server.address) as channel:
            yield System(channel=channel, stub=collage_service_pb2_grpc.CollageServiceStub(channel))
    finally:
        await server.stop()


def png(pixels: np.ndarray) -> bytes:
    """The pixels as a PNG, however they are."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def cutout(seed: int = 0, *, side: int = 20) -> bytes:
    """An RGBA picture of noise with a soft edge."""
    pixels_HW4 = np.random.default_rng(seed).integers(0, 256, (side, side, 4), dtype=np.uint8)
    pixels_HW4[4:-4, 4:-4, 3] = 255
    return png(pixels_HW4)


def claimed_png(
    width: int, height: int, *, bits: int = 8, kind: int = 6, data: bytes = b"", more: bytes = b""
) -> bytes:
    """A PNG whose header claims what it is told, with `more` chunks before the (deflated) `data`."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, data: bytes = b"") -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def collage(**changes: object) -> collage_pb2.Collage:
    """Two layers on a canvas of 32 x 48; `changes` are of its fields."""
    return collage_pb2.Collage(
        **{
            "size": {"width": 32, "height": 48},
            "prompt": "a {a} and a {b}",
            "layers": [layer("a"), layer("b", seed=1, x=22.5, y=30.25)],
            **changes,
        }
    )


def layer(name: str = "a", *, seed: int = 0, x: float = 11, y: float = 14, **changes: object):
    """One right layer; `changes` are of its fields."""
    return collage_pb2.Layer(
        **{
            "name": name,
            "image": {"data": cutout(seed)},
            "text": "cake" if name == "b" else "sushi",
            "transform": {"x": x, "y": y, "rotation": 10},
            "noise": 0.8,
            **changes,
        }
    )


def upload(data: bytes, **header: object) -> Iterator[pb.PutBlobRequest]:
    """The messages of a PutBlob call; `header` overrides what is true."""
    truth = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    yield pb.PutBlobRequest(header=blob_pb2.BlobRef(**{**truth, **header}))
    for start in range(0, len(data), CHUNK_BYTES):
        yield pb.PutBlobRequest(chunk=data[start : start + CHUNK_BYTES])
