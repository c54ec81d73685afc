"""What an honest caller feels while eight others send hostile pictures, and whether the server comes back to itself.

    python -m benchmarks.siege [--seconds 120] [--quiet-seconds 30]

`collage serve` runs on the bundled model in a process of its own. One caller plans the bento example, a layer elsewhere
each time, first alone and then beside eight hostile callers, each with a connection and a process of its own: JPEGs of
a hundred scans and of thousands, at 16 megapixels, given up after a second; PNGs of sixty thousand chunks; WebP
animations; uploads of a byte every eight seconds, and messages that never come; 150 plans of 3 MB at once, again and
again; stacks of 32 layers of 16 megapixels. Then the server is sent SIGTERM while they go on. The callers' own work
would be other machines': they run at the lowest priority.

Bars: the honest caller's p99 stays below twice its quiet p99 and 0.2 s; the server's memory, its children's with it, is
back within 1.2 times of before; SIGTERM ends it within the grace.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from pathlib import Path

import grpc
import numpy as np
from PIL import Image

from collage.v1 import blob_pb2
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc as pb_grpc
from collage_client import files
from services.common.rpc import DRAIN_S

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 60.0
BARS = {"latency": 2.0, "latency_s": 0.2, "memory": 1.2}
SIDE = 4000
# What memory is given to come back after the last call.
SETTLING_S = 20.0
# Until the hostile callers have made their pictures and begun.
STARTING_S = 15.0

Stub = pb_grpc.CollageServiceStub


def percentile(values: list[float], part: float) -> float:
    """The value below which that part of them lies."""
    return float(np.quantile(np.array(values), part))


# The hostile pictures.


def jpeg(scans: int) -> bytes:
    """A progressive JPEG of 16 megapixels whose last scan stands there so often."""
    file = BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 100, 50)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * scans + data[-2:]


def chunk(name: bytes, data: bytes = b"") -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(side: int, *, chunks: int = 0) -> bytes:
    """A plain PNG with so many empty chunks before its pixels."""
    file = BytesIO()
    Image.new("RGBA", (side, side), (9, 90, 200, 255)).save(file, "PNG")
    data = file.getvalue()
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(b"teXt") * chunks + data[at:]


def animation() -> bytes:
    """A WebP of two hundred pictures."""
    file = BytesIO()
    frames = [Image.new("RGB", (200, 200), (n, 255 - n, 7 * n % 256)) for n in range(200)]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def collage(
    picture: blob_pb2.Image, *, layers: int = 1, background: bytes = b""
) -> pb.PlanCollageRequest:
    """A plan that has not been asked for before."""
    request = pb.PlanCollageRequest()
    request.collage.size.width = request.collage.size.height = 256
    request.collage.prompt = f"a table {uuid.uuid4()}"
    for index in range(layers):
        layer = request.collage.layers.add(name=f"l{index}", text=f"thing {index}")
        layer.image.CopyFrom(picture)
        layer.transform.x = 128 + np.random.default_rng().uniform(-40, 40)
        layer.transform.y = 128
    if background:
        request.collage.background.image.data = background
    return request


def inline(data: bytes) -> blob_pb2.Image:
    """A picture within its message."""
    return blob_pb2.Image(data=data)


# The callers.


class Hostile:
    """One hostile caller: it does one of its `WAYS`, again and again, until it is ended."""

    WAYS = (
        "scans",
        "more_scans",
        "chunks",
        "animations",
        "slow_uploads",
        "slow_messages",
        "many",
        "stacks",
    )

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(
            address, options=[("grpc.max_send_message_length", 2**26)]
        )
        self.stub = Stub(self.channel)
        self.answers: Counter[str] = Counter()

    async def call(self, request: pb.PlanCollageRequest, *, patience_s: float = LIMIT_S) -> None:
        """One plan, given up after that time; how it ended is counted."""
        try:
            await self.stub.PlanCollage(request, timeout=patience_s)
            self.answers["OK"] += 1
        except grpc.aio.AioRpcError as error:
            self.answers[error.code().name] += 1

    async def scans(self) -> None:
        """Eighty scans: taken, and a second's work."""
        background = jpeg(80)
        while True:
            request = collage(inline(png(16)), background=background)
            await asyncio.gather(*(self.call(request, patience_s=1.0) for _ in range(4)))

    async def more_scans(self) -> None:
        """Four thousand: refused."""
        background = jpeg(4000)
        while True:
            request = collage(inline(png(16)), background=background)
            await asyncio.gather(*(self.call(request, patience_s=1.0) for _ in range(4)))

    async def chunks(self) -> None:
        """Sixty thousand chunks."""
        picture = inline(png(64, chunks=60_000))
        while True:
            await asyncio.gather(*(self.call(collage(picture)) for _ in range(4)))

    async def animations(self) -> None:
        """Refused, from their heads."""
        picture = inline(animation()[:1_000_000])
        while True:
            await asyncio.gather(*(self.call(collage(picture)) for _ in range(8)))

    async def slow_uploads(self) -> None:
        """Forty at a time, each of a byte every eight seconds."""

        async def trickle() -> None:
            async def messages() -> AsyncIterator[pb.PutBlobRequest]:
                blob = blob_pb2.BlobRef(sha256="ab" * 32, size_bytes=2**26, media_type="image/png")
                yield pb.PutBlobRequest(header=blob)
                while True:
                    yield pb.PutBlobRequest(chunk=b"x")
                    await asyncio.sleep(8)

            with contextlib.suppress(grpc.aio.AioRpcError):
                await self.stub.PutBlob(messages(), timeout=LIMIT_S)

        while True:
            await asyncio.gather(*(trickle() for _ in range(40)))

    async def slow_messages(self) -> None:
        """Calls whose message never comes."""
        method = "/collage.v1.CollageService/PlanCollage"
        while True:
            calls = [self.channel.stream_unary(method)(timeout=20) for _ in range(100)]
            await asyncio.gather(*(call.code() for call in calls))

    async def many(self) -> None:
        """150 plans of 3 MB at once."""
        # Noise, so that it stays as large.
        file = BytesIO()
        noise = np.random.default_rng(1).integers(0, 256, (440, 440, 4), dtype=np.uint8)
        Image.fromarray(noise).save(file, "PNG")
        pictures = inline(file.getvalue())
        while True:
            await asyncio.gather(*(self.call(collage(pictures, layers=4)) for _ in range(150)))

    async def stacks(self) -> None:
        """32 layers of 16 megapixels."""
        picture = inline(png(SIDE))
        while True:
            await self.call(collage(picture, layers=32))


async def hostile(way: str, address: str, seconds: float) -> None:
    """What a hostile process does; it prints how its calls ended."""
    os.nice(19)
    caller = Hostile(address)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await getattr(caller, way)()
    print(f"{way:<16}{dict(caller.answers)}", flush=True)


async def honest(address: str, seconds: float) -> list[float]:
    """Plans for that long, four a second; seconds each took. A refused one is an error."""
    took = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = Stub(channel)
        example = files.attach(files.load(ROOT / "examples" / "bento"))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            request = pb.PlanCollageRequest(collage=example)
            request.collage.layers[0].transform.x += np.random.default_rng().uniform(-5, 5)
            start = time.monotonic()
            await stub.PlanCollage(request, timeout=LIMIT_S)
            took.append(time.monotonic() - start)
            await asyncio.sleep(0.25)
    return took


# The server.


def memory_bytes(pid: int) -> int:
    """What a process and its children have in memory; what they share counts once."""
    total = 0
    for each in (pid, *children(pid)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            told = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += 1024 * int(told.split("\nPss:")[1].split()[0])
    return total


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found += [int(each) for each in (task / "children").read_text().split()]
    return found


def serve(data: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A running server, and its address."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "collage_client.cli",
                "serve",
                "--data",
                str(data),
                "--address",
                "127.0.0.1:0",
            ],
            stdout=subprocess.PIPE,
            stderr=output,
        )
    assert server.stdout is not None, "opened so"
    for line in server.stdout:
        for word in line.decode().split():
            if word.startswith("127.0.0.1:"):
                return server, word.rstrip(".,;")
    raise SystemExit(f"the server did not start: {log.read_text()}")


@contextlib.contextmanager
def callers(address: str, seconds: float) -> Iterator[None]:
    """Eight hostile ones, for that long; returns when they have ended."""
    command = (sys.executable, "-m", "benchmarks.siege")
    started = [
        subprocess.Popen(
            (*command, "--hostile", way, "--address", address, "--seconds", f"{seconds}")
        )
        for way in Hostile.WAYS
    ]
    try:
        yield
    finally:
        for caller in started:
            caller.wait()


async def watched(pid: int, peak: list[int]) -> None:
    """Notes the most memory that a process has, until it is cancelled."""
    while True:
        peak[0] = max(peak[0], memory_bytes(pid))
        await asyncio.sleep(0.5)


async def besiege(args: argparse.Namespace, folder: Path) -> int:
    """The whole course of it; 1 where a bar is missed."""
    server, address = serve(folder / "data", folder / "log")
    try:
        await honest(address, 5)
        quiet = await honest(address, args.quiet_seconds)
        before_bytes, peak = memory_bytes(server.pid), [0]
        watching = asyncio.create_task(watched(server.pid, peak))
        with callers(address, args.seconds + STARTING_S):
            await asyncio.sleep(STARTING_S)
            besieged = await honest(address, args.seconds)
        watching.cancel()
        await asyncio.sleep(SETTLING_S)
        after_bytes = memory_bytes(server.pid)
        again = await honest(address, 10)
        with callers(address, 2 * STARTING_S):
            await asyncio.sleep(STARTING_S)
            start = time.monotonic()
            server.send_signal(signal.SIGTERM)
            code = await asyncio.to_thread(server.wait, 120)
            ended_s = time.monotonic() - start
    finally:
        server.kill()
    for name, took in (("quiet", quiet), ("besieged", besieged), ("after", again)):
        print(
            f"{name:<10}{len(took):>5} plans  p50 {percentile(took, 0.5):.3f} s  p99 {percentile(took, 0.99):.3f} s"
            f"  max {max(took):.3f} s"
        )
    bar_s = BARS["latency"] * percentile(quiet, 0.99) + BARS["latency_s"]
    ratio = after_bytes / before_bytes
    print(
        f"p99 besieged {percentile(besieged, 0.99):.3f} s (bar: {bar_s:.3f} s)\n"
        f"memory {before_bytes / 2**20:.0f} MiB before, {peak[0] / 2**20:.0f} at most, "
        f"{after_bytes / 2**20:.0f} after: {ratio:.2f} times (bar: {BARS['memory']})\n"
        f"SIGTERM under siege: status {code} after {ended_s:.1f} s (grace: {DRAIN_S:g} s)"
    )
    is_held = (
        percentile(besieged, 0.99) < bar_s
        and ratio < BARS["memory"]
        and code == 0
        and ended_s < DRAIN_S
    )
    return 0 if is_held else 1


def main() -> int:
    """Prints the three measures; exits 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--quiet-seconds", type=float, default=30.0)
    parser.add_argument("--hostile", help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.hostile:
        asyncio.run(hostile(args.hostile, args.address, args.seconds))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(besiege(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
