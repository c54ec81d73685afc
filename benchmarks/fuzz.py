"""Bar 9: whatever bytes come, the servers stay healthy and their memory stays where it was.

An embedded system runs in a process of its own, over a toy model. For a number of minutes every RPC of all four
services is sent random bytes, valid messages with flipped bits, cut, spliced and repeated, with fields that hold what
is extreme or that nobody knows, messages of other methods, streams of a wrong shape, streams that never end, calls that
are given up, large headers; pictures, texts and word files as strangers send them (`testing/strangers.py`), in messages
and as stored blobs, some of which are then damaged in the store; uploads sent slowly, or half; a hundred and fifty
plans at once; and its ports bytes that are no HTTP/2 at all. Meanwhile a right request is drawn every 30 s, and jobs
that the fuzz made by chance are cancelled. Holds:

    codes     no call ends with INTERNAL or UNKNOWN, nor with DATA_LOSS where nothing was damaged, and the server's log
              has no error
    health    every right request is done, and every server's health is SERVING after it
    memory    resident memory at the end is at most 1.2 times that after the warm-up, which is a minute of the same
    end       the server ends on SIGTERM by itself, with status 0

Exit code 1 when anything of this does not hold.

    python -m benchmarks.fuzz --minutes 10 --seed 0
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import hashlib
import json
import random
import re
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import save

from collage.v1 import (
    blob_pb2,
    collage_service_pb2,
    collage_service_pb2_grpc,
    compositor_service_pb2,
    compositor_service_pb2_grpc,
    generator_service_pb2,
    inversion_service_pb2,
)
from collage.v1 import collage_service_pb2 as pb
from local.processes import Process
from services.common.rpc import connect
from testing import strangers, toy
from testing.system import collage, cutout, png, upload

MEMORY_RATIO = 1.2
WARM_UP_S = 60.0
CHECK_EVERY_S = 30.0
SAMPLE_EVERY_S = 5.0
# Jobs that came to be by chance may ask for much; none is to hold the queue for longer.
CANCEL_EVERY_S = 1.0
# A call that is fuzz has so long; a right request, on a queue full of others, so long.
CALL_S, RIGHT_S = 4.0, 25.0
START_S, STOP_S = 120.0, 40.0
WORKERS = 6
# Codes that say the server is at fault.
FAULTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
# What gRPC's own client says, in place of the server's answer, when that came while a message was being written.
CLIENT_FAULT = "Internal error from Core"
# Plans at once.
MANY = 150
# Failures that are printed with their requests.
SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC: its path, the server it is on, its streams, and the type and examples of its request."""

    path: str
    server: str
    client_streams: bool
    server_streams: bool
    kind: Any
    examples: tuple[bytes, ...]


@dataclass(slots=True)
class Record:
    """What was seen."""

    codes: dict[str, collections.Counter[str]] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    failures: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    right: int = 0
    cancelled: int = 0
    connections: int = 0


class Target:
    """The system under fuzz, in a process of its own, and channels to its four servers."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        self._process = Process(
            "collage",
            (
                *(sys.executable, "-c", "import collage_client.cli as c; c.main()"),
                *("serve", "--address", "127.0.0.1:0", "--data", str(folder / "data")),
                *("--model", str(toy.mini(folder / "toy"))),
            ),
            log=folder / "serve.log",
        )
        self.addresses: dict[str, str] = {}
        self.channels: dict[str, grpc.aio.Channel] = {}

    async def start(self) -> None:
        """Returns when all four servers serve."""
        await self._process.start(self._find, timeout_s=START_S)
        self.channels = {name: connect(address) for name, address in self.addresses.items()}

    async def _find(self) -> None:
        self.addresses = {
            line["name"]: line["address"] for line in self.log() if line.get("event") == "serving"
        }
        if len(self.addresses) < 4:
            raise RuntimeError(f"serving so far: {', '.join(self.addresses) or 'nothing'}")

    def log(self) -> Iterator[dict[str, Any]]:
        """The server's log, one mapping a line; a line that is no JSON is an error of somebody's."""
        for line in self._process.log.read_text(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {"level": "plain", "event": line}

    def status(self, name: str) -> int:
        """A figure of the process, from the kernel: kilobytes where it is memory."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    def damage(self, sha256: str, rng: random.Random) -> None:
        """A stored blob is cut, emptied, or holds another byte."""
        for file in self._data.rglob(f"*{sha256}*"):
            if file.is_file() and (data := bytearray(file.read_bytes())):
                data[rng.randrange(len(data))] ^= 1
                file.write_bytes(rng.choice((data, data[: len(data) // 2], b"")))

    def files(self) -> int:
        """Open files and connections."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    async def stop(self) -> str:
        """Asks it to end and tells how it did; empty when it was gone before."""
        was_running = self._process.is_running
        for channel in self.channels.values():
            await channel.close()
        await self._process.terminate(grace_s=STOP_S)
        return self._process.ending if was_running else ""


async def examples(target: Target) -> dict[str, list[Any]]:
    """Right requests by the name of their type, those of the internal services included."""
    gateway = collage_service_pb2_grpc.CollageServiceStub(target.channels["gateway"])
    compositor = compositor_service_pb2_grpc.CompositorServiceStub(target.channels["compositor"])
    blob = (await gateway.PutBlob(upload(cutout()), timeout=RIGHT_S)).blob
    # Of the toy's width.
    vectors = save({"emb_params": np.zeros((2, 32), np.float32)})
    word = (await gateway.PutBlob(upload(vectors), timeout=RIGHT_S)).blob
    scene = collage()
    full = collage(negative_prompt="rice", background={"color": {"red": 5}})
    full.layers[0].image.blob.CopyFrom(blob)
    full.layers[0].appearance.learn = True
    full.layers[1].structure.add(kind="canny", scale=0.5, start=0.1, end=0.9, emphasis=0.5)
    full.layers[1].seed = 7
    stored = collage()
    for layer in stored.layers:
        layer.image.blob.CopyFrom(blob)
    plate = await compositor.Compose(
        compositor_service_pb2.ComposeRequest(collage=stored, latent_factor=4), timeout=RIGHT_S
    )
    settings = {"sampler": "euler", "steps": 1, "guidance_scale": 3.0, "images": 1, "seed": 1}
    parent = {"data": png(np.zeros((48, 32, 3), np.uint8))}
    identity = str(uuid.uuid4())
    created = await gateway.CreateJob(
        pb.CreateJobRequest(generate={"collage": stored, "sampling": settings}), timeout=RIGHT_S
    )
    name = created.job.name
    redo = {"collage": scene, "parent": parent, "layers": ["a"], "feather": 2.0}
    controls = [
        {
            "plan": {"name": "a", "text_start": 2, "text_end": 7, "attract": 0.5, "repel": 0.2},
            "seed": 3,
        },
        {"plan": {"name": "b", "text_start": 14, "text_end": 18}},
    ]
    plain = {"prompt": "a sushi and a cake", "sampling": settings}
    requests = [
        pb.PlanCollageRequest(collage=scene, sampling=settings),
        pb.PlanCollageRequest(collage=full),
        pb.CutOutRequest(image={"data": cutout(3)}),
        pb.CutOutRequest(image={"blob": blob}, model="u2netp"),
        pb.CreateJobRequest(request_id=identity, generate={"collage": full, "sampling": settings}),
        pb.CreateJobRequest(generate={"collage": stored, "sampling": settings}),
        pb.CreateJobRequest(redo={**redo, "sampling": settings}),
        pb.CreateJobRequest(learn={"collage": scene, "layers": ["a"]}),
        pb.GenerateImagesRequest(collage=stored, sampling=settings, on_disconnect=2),
        pb.GenerateImagesRequest(
            request_id=identity, collage=full, sampling={**settings, "images": 2}
        ),
        pb.GetJobRequest(name=name),
        pb.CancelJobRequest(name=name),
        pb.WatchJobRequest(name=name, after_sequence=1),
        pb.ListJobsRequest(page_size=5, page_token="3"),
        pb.ListModelsRequest(page_size=1),
        pb.ListWordsRequest(page_size=1),
        pb.GetWordRequest(name="words/x"),
        pb.DeleteWordRequest(name="words/x"),
        pb.ImportWordRequest(text="cake", model="toy", vectors=word),
        pb.CheckBlobsRequest(sha256=[blob.sha256, "ab" * 32]),
        pb.GetBlobRequest(sha256=blob.sha256),
        *upload(cutout(3)),
        compositor_service_pb2.ComposeRequest(collage=stored, latent_factor=4),
        compositor_service_pb2.ComposeRequest(
            collage=stored,
            latent_factor=4,
            redo={"parent": plate.composite, "layers": ["a"], "feather": 4.0},
        ),
        compositor_service_pb2.CutRequest(image=blob, model="u2netp"),
        compositor_service_pb2.DescribeDetectorsRequest(),
        generator_service_pb2.GenerateRequest(plate=plate.plate, layers=controls, **plain),
        generator_service_pb2.GenerateRequest(
            plate=plate.plate, layers=controls, parent=plate.composite, **plain
        ),
        generator_service_pb2.EstimateRequest(
            size=stored.size, layers=[each["plan"] for each in controls], **plain
        ),
        generator_service_pb2.DescribeModelsRequest(),
        inversion_service_pb2.LearnWordsRequest(
            model="toy",
            subjects=[{"layer": "a", "image": blob, "text": "cake", "vectors": 1}],
            job="fuzz",
        ),
        inversion_service_pb2.EstimateWordsRequest(
            learn={
                "model": "toy",
                "subjects": [{"layer": "a", "image": blob, "text": "cake", "vectors": 2}],
                "job": "fuzz",
            }
        ),
        inversion_service_pb2.AdoptWordRequest(model="toy", text="cake", vectors=word),
    ]
    found = collections.defaultdict(list)
    for request in requests:
        found[request.DESCRIPTOR.full_name].append(request)
    return found


def methods(found: dict[str, list[Any]]) -> list[Method]:
    """Every RPC of the contract."""
    files = {
        "gateway": collage_service_pb2,
        "compositor": compositor_service_pb2,
        "generator": generator_service_pb2,
        "inversion": inversion_service_pb2,
    }
    listed = []
    for server, file in files.items():
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                listed.append(
                    Method(
                        path=f"/{service.full_name}/{method.name}",
                        server=server,
                        client_streams=method.client_streaming,
                        server_streams=method.server_streaming,
                        kind=getattr(file, method.input_type.name),
                        examples=tuple(
                            request.SerializeToString()
                            for request in found[method.input_type.full_name]
                        ),
                    )
                )
                assert found[method.input_type.full_name], f"no example for {method.full_name}"
    return listed


class Mutator:
    """Makes bytes that are nearly right, or not at all."""

    def __init__(self, rng: random.Random, corpus: Sequence[bytes]) -> None:
        self._rng = rng
        self._corpus = corpus

    def message(self, kind: Any, examples: Sequence[bytes]) -> bytes:
        """One message: mostly a mutation of one of the examples."""
        rng = self._rng
        data = rng.choice(examples)
        if rng.random() < 0.5:
            # What parses gets further than what does not.
            message = kind.FromString(data)
            for _ in range(rng.choice((1, 1, 2, 5))):
                self._set(message)
            return bytes(message.SerializeToString())
        ways = (self._flip, self._cut, self._splice, self._repeat, self._number, self._grow)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            data = rng.choice(ways)(data)
        return rng.choices((data, self.noise(), rng.choice(self._corpus)), (12, 2, 1))[0]

    def _set(self, message: Any) -> None:
        """One field that is set, anywhere in the message, comes to hold something extreme, or is taken away."""
        rng = self._rng
        places = list(_fields(message))
        if not places:
            return
        owner, field = rng.choice(places)
        value = getattr(owner, field.name)
        if rng.random() < 0.15:
            owner.ClearField(field.name)
        elif field.is_repeated:
            part = value[rng.randrange(len(value))]
            for _ in range(rng.choice((1, 32, 300))):
                value.append(part)
        elif field.message_type is None:
            new = rng.choice(EXTREMES[type(value)])
            if isinstance(value, str) and rng.random() < 0.5:
                new = strangers.text(rng)
            elif isinstance(value, bytes) and rng.random() < 0.7:
                new = strangers.picture(rng)
            with contextlib.suppress(ValueError):
                setattr(owner, field.name, new)
        else:
            # Fields that nobody has, at any depth.
            value.MergeFromString(rng.choice((b"\x98\x75\x01", b"\xaa\x75\x03abc")))

    def noise(self) -> bytes:
        """Bytes that are nothing."""
        return self._rng.randbytes(self._rng.choice((0, 1, 7, 300, 5000, 200_000)))

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._rng.choice((1, 1, 2, 16)) if data else 0):
            changed[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)

    def _cut(self, data: bytes) -> bytes:
        return data[: self._rng.randint(0, len(data))]

    def _splice(self, data: bytes) -> bytes:
        other = self._rng.choice(self._corpus)
        return self._cut(data) + other[self._rng.randint(0, len(other)) :]

    def _repeat(self, data: bytes) -> bytes:
        start, end = sorted(self._rng.randint(0, len(data)) for _ in range(2))
        times = self._rng.choice((2, 2, 40))
        return data[:start] + data[start:end][:20_000] * times + data[end:]

    def _number(self, data: bytes) -> bytes:
        """Eight bytes become a number that is special."""
        special = np.array(self._rng.choice((np.nan, np.inf, -1.0, 1e308, 5e-324, 0.0, 2.0)))
        at = self._rng.randint(0, max(0, len(data) - 8))
        return data[:at] + special.tobytes() + data[at + 8 :]

    def _grow(self, data: bytes) -> bytes:
        """A field is added: an unknown one, a deep one, or one that claims to be long."""
        deep = b""
        for _ in range(self._rng.choice((1, 50, 150))):
            deep = b"\x0a" + bytes([min(len(deep), 127)]) + deep
        return data + self._rng.choice((b"\x98\x06\x01", deep, b"\x0a\xff\xff\xff\xff\x07"))


# What a field may come to hold, by its Python type; what its own type cannot hold is left out.
EXTREMES: dict[type, tuple[Any, ...]] = {
    float: (np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 5e-324, 1e-9, 1e308, -1.0, 360.0, 64.0, 0.5),
    int: (
        0,
        1,
        -1,
        2,
        7,
        16,
        17,
        33,
        128,
        1000,
        2**31 - 1,
        -(2**31),
        2**63 - 1,
        -(2**63),
        2**64 - 1,
    ),
    bool: (True, False),
    str: (
        "",
        "x",
        "../x",
        "a" * 64,
        "x" * 4000,
        "é" * 900,
        "{a}",
        "{",
        "\0",
        "toy",
        "ddim",
        "9" * 40,
    ),
    bytes: (b"", b"x", b"\x89PNG\r\n\x1a\n", cutout()[:-9], cutout(9, side=1), bytes(2**20)),
}


def _fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Every field that is set, with the message it is in."""
    for part, value in message.ListFields():
        yield message, part
        if part.message_type is not None:
            for inner in value if part.is_repeated else (value,):
                yield from _fields(inner)


class Fuzz:
    """The workers, all drawing from one random generator each."""

    def __init__(self, target: Target, found: dict[str, list[Any]], seed: int, rate: float) -> None:
        self.record = Record()
        self._target = target
        self._methods = methods(found)
        self._corpus = [data for method in self._methods for data in method.examples]
        self._seed = seed
        self._pause_s = WORKERS / rate
        self._gateway = collage_service_pb2_grpc.CollageServiceStub(target.channels["gateway"])

    async def work(self, number: int) -> None:
        """Sends one call after the other."""
        rng = random.Random(f"{self._seed} {number}")
        mutator = Mutator(rng, self._corpus)
        while True:
            start = time.monotonic()
            chance = rng.random()
            if chance < 0.02:
                await self._connect(rng, mutator)
            elif chance < 0.12:
                await self._stranger(rng)
            elif chance < 0.121:
                await self._many(rng)
            else:
                await self._call(rng, mutator, rng.choice(self._methods))
            await asyncio.sleep(max(0.0, self._pause_s - (time.monotonic() - start)))

    async def _call(self, rng: random.Random, mutator: Mutator, method: Method) -> None:
        count = rng.choice((1, 2, 3, 3, 5)) if method.client_streams else 1
        messages = [mutator.message(method.kind, method.examples) for _ in range(count)]
        if method.client_streams and rng.random() < 0.7:
            # What is right comes first, so that what follows is looked at.
            first = rng.randint(1, len(method.examples))
            messages[:first] = method.examples[:first]
        options: dict[str, Any] = {"timeout": CALL_S, "wait_for_ready": False}
        shape = "right"
        chance = rng.random()
        if chance < 0.05:
            options["timeout"] = rng.uniform(0.0005, 0.05)
            shape = "deadline"
        elif chance < 0.10:
            size = rng.choice((10, 1000, 7000, 15_000, 60_000))
            key, value = rng.choice((("x-request-id", "x" * size), ("x-bin", b"x" * size)))
            options["metadata"] = ((key, value),)
            shape = f"metadata {key} of {size}"
        elif chance < 0.20:
            shape = rng.choice(("no message", "two messages", "never half-closed", "given up"))
        code, details = await self._send(method, messages, shape, options)
        name = method.path.removeprefix("/collage.v1.")
        self.record.codes[name][code] += 1
        if code in FAULTS:
            self._fail(f"{code} ({details}) from {name}, shape {shape}: {_shown(method, messages)}")

    async def _send(
        self, method: Method, messages: list[bytes], shape: str, options: dict[str, Any]
    ) -> tuple[str, str]:
        """The code and message the call ends with; GIVEN_UP where it was the caller who ended it."""
        channel = self._target.channels[method.server]
        if shape == "no message":
            messages = []
        elif shape == "two messages":
            messages = [*messages, messages[-1]]
        endless = shape in ("never half-closed", "given up")
        streams = method.client_streams or endless or len(messages) != 1
        kind = ("stream" if streams else "unary") + (
            "_stream" if method.server_streams else "_unary"
        )

        async def sent() -> AsyncIterator[bytes]:
            for message in messages:
                yield message
                if shape == "slow":
                    await asyncio.sleep(0.5)
            if endless or shape == "half":
                await asyncio.sleep(2 * CALL_S)

        call = getattr(channel, kind)(method.path)(sent() if streams else messages[0], **options)
        try:
            async with asyncio.timeout(0.05 if shape == "given up" else options["timeout"] + 10):
                if method.server_streams:
                    async for _ in call:
                        pass
                else:
                    await call
            return "OK", ""
        except grpc.aio.AioRpcError as error:
            if error.details() == CLIENT_FAULT:
                return "OVERTAKEN", ""
            return str(error.code().name), f"{error.details()}; {error.debug_error_string()}"
        except TimeoutError:
            if shape != "given up":
                self._fail(f"no end of {method.path}, shape {shape}: {_shown(method, messages)}")
            return "GIVEN_UP", ""
        finally:
            call.cancel()

    async def _stranger(self, rng: random.Random) -> None:
        """Stores what a stranger sends, whole, slowly or half, has it used, and now and then damages it before."""
        is_word = rng.random() < 0.3
        data = (strangers.word if is_word else strangers.picture)(rng)
        messages = [each.SerializeToString() for each in upload(data)]
        shape = rng.choices(("right", "slow", "half"), (8, 1, 1))[0]
        if shape == "half":
            messages = messages[: rng.randrange(len(messages))]
        await self._told("PutBlob", messages, shape)
        if shape == "half":
            return
        blob = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        damages = rng.random() < 0.15
        if damages:
            self._target.damage(blob["sha256"], rng)
        scene = collage()
        scene.prompt = strangers.text(rng)
        layer = scene.layers[rng.randrange(2)]
        layer.image.Clear()
        layer.image.blob.CopyFrom(blob_pb2.BlobRef(**blob))
        layer.text = strangers.text(rng)
        layer.appearance.learn = rng.random() < 0.3
        drawing = {"collage": scene, "sampling": {"steps": 1}}
        asked = {
            "ImportWord": pb.ImportWordRequest(text=strangers.text(rng), vectors=blob),
            "PlanCollage": pb.PlanCollageRequest(**drawing),
            "CutOut": pb.CutOutRequest(image={"blob": blob}),
            "GenerateImages": pb.GenerateImagesRequest(**drawing),
            "CreateJob": pb.CreateJobRequest(learn={"collage": scene}),
        }
        name = (
            "ImportWord"
            if is_word
            else rng.choice([each for each in asked if each != "ImportWord"])
        )
        await self._told(name, [asked[name].SerializeToString()], "right", may_lose=damages)

    async def _told(
        self, name: str, messages: list[bytes], shape: str, *, may_lose: bool = False
    ) -> None:
        """One call of the gateway's, its code noted."""
        path = f"/collage.v1.CollageService/{name}"
        method = next(each for each in self._methods if each.path == path)
        code, details = await self._send(method, messages, shape, {"timeout": 3 * CALL_S})
        self.record.codes[f"CollageService/{name}"][code] += 1
        if code in FAULTS and not (may_lose and code == "DATA_LOSS"):
            self._fail(f"{code} ({details}) from {name}, {shape}: {_shown(method, messages)}")

    async def _many(self, rng: random.Random) -> None:
        """More plans at once, from a connection of their own, than anybody may have."""
        path = "/collage.v1.CollageService/PlanCollage"
        (method,) = (each for each in self._methods if each.path == path)
        async with connect(self._target.addresses["gateway"]) as channel:
            calls = [
                channel.unary_unary(path)(rng.choice(method.examples), timeout=CALL_S)
                for _ in range(MANY)
            ]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                code = outcome.code().name if isinstance(outcome, grpc.RpcError) else "OK"
                self.record.codes["CollageService/PlanCollage"][code] += 1
                if code in FAULTS:
                    self._fail(f"{code} ({outcome}) from one of {MANY} plans at once")

    async def _connect(self, rng: random.Random, mutator: Mutator) -> None:
        """Speaks to a port as if it were something else."""
        host, _, port = rng.choice(list(self._target.addresses.values())).rpartition(":")
        first = rng.choice((b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                reader, writer = await asyncio.open_connection(host, int(port))
                try:
                    writer.write(first + mutator.noise())
                    await writer.drain()
                    await reader.read(1000)
                finally:
                    writer.close()
        self.record.connections += 1

    async def cancel(self) -> None:
        """Ends the jobs that the fuzz has made, so that the queue is not what is tested."""
        while True:
            await asyncio.sleep(CANCEL_EVERY_S)
            with contextlib.suppress(grpc.aio.AioRpcError):
                page = await self._gateway.ListJobs(
                    pb.ListJobsRequest(page_size=50), timeout=RIGHT_S
                )
                for job in page.jobs:
                    is_open = job.state in (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)
                    if is_open and not job.request_id.startswith(RIGHT_ID):
                        await self._gateway.CancelJob(
                            pb.CancelJobRequest(name=job.name), timeout=RIGHT_S
                        )
                        self.record.cancelled += 1

    async def check(self) -> None:
        """Draws a right request and asks for everybody's health, again and again."""
        while True:
            await self.check_once()
            await asyncio.sleep(CHECK_EVERY_S)

    async def check_once(self) -> None:
        """One right request, done; four servers, healthy."""
        self.record.right += 1
        request = pb.GenerateImagesRequest(
            request_id=RIGHT_ID + str(uuid.uuid4())[len(RIGHT_ID) :],
            collage=collage(),
            sampling={"steps": 2, "seed": self.record.right},
        )
        last, end_s = "no event", time.monotonic() + RIGHT_S
        while True:
            try:
                async for answer in self._gateway.GenerateImages(request, timeout=RIGHT_S):
                    last = str(answer.event.WhichOneof("kind"))
            except grpc.aio.AioRpcError as error:
                last = f"{error.code().name}: {error.details()}"
                # Of the many at once: it is to come again, and does.
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and time.monotonic() < end_s:
                    await asyncio.sleep(1)
                    continue
            break
        if last != "done":
            self._fail(f"right request {self.record.right} ended with {last}")
        for name, channel in self._target.channels.items():
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=RIGHT_S
                )
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    self._fail(f"health of {name} is {answer.status}")
            except grpc.aio.AioRpcError as error:
                self._fail(f"health of {name}: {error.code().name}")

    async def sample(self) -> None:
        """Reads the memory, again and again."""
        start = time.monotonic()
        while True:
            self.record.memory.append((time.monotonic() - start, self._target.status("VmRSS")))
            await asyncio.sleep(SAMPLE_EVERY_S)

    def _fail(self, text: str) -> None:
        self.record.failures.append(text)
        if len(self.record.failures) <= SHOWN:
            print(f"FAILURE {text}", flush=True)


# How the request ids of right requests begin, so that their jobs are left alone.
RIGHT_ID = "60000000-0000"


def _shown(method: Method, messages: Sequence[bytes]) -> str:
    """The messages as text where they are messages, cut."""
    texts = []
    for data in messages:
        try:
            texts.append(" ".join(str(method.kind.FromString(data)).split())[:1500])
        except DecodeError:
            texts.append(repr(data[:200]))
    return " | ".join(texts)


async def run(args: argparse.Namespace, folder: Path) -> int:
    """Fuzzes, reports; the exit code."""
    target = Target(folder)
    await target.start()
    try:
        fuzz = Fuzz(target, await examples(target), args.seed, args.rate)
        tasks = [
            *(asyncio.create_task(fuzz.work(number)) for number in range(WORKERS)),
            *(asyncio.create_task(work()) for work in (fuzz.check, fuzz.sample, fuzz.cancel)),
        ]
        print(f"fuzzing for {args.minutes:g} min, seed {args.seed}", flush=True)
        done, _ = await asyncio.wait(
            tasks, timeout=60 * args.minutes, return_when=asyncio.FIRST_COMPLETED
        )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        await fuzz.check_once()
        peak, threads, files = target.status("VmHWM"), target.status("Threads"), target.files()
    finally:
        ending = await target.stop()
    failures = fuzz.record.failures
    if ending != "exit status 0":
        failures.append(f"the server ended with {ending or 'a crash before it was asked to'}")
    failures += [
        f"the server's log: {line['event']}: {json.dumps(line)[:1500]}"
        for line in target.log()
        if line.get("level") in ("error", "critical") or "Traceback" in line["event"]
    ]
    report(fuzz.record, args, peak, threads, files)
    return 1 if failures else 0


def report(record: Record, args: argparse.Namespace, peak: int, threads: int, files: int) -> None:
    codes = sorted({code for counter in record.codes.values() for code in counter})
    width = max(map(len, record.codes))
    print("\ncalls by method and code")
    for name in sorted(record.codes):
        counter = record.codes[name]
        print(f"  {name:<{width}} {counter.total():6}  ", end="")
        print(", ".join(f"{code} {counter[code]}" for code in codes if counter[code]))
    total = sum(counter.total() for counter in record.codes.values())
    print(f"  {total} calls, {record.connections} connections with no HTTP/2, ", end="")
    print(f"{record.right} right requests, {record.cancelled} jobs cancelled")
    warm_up_s = min(WARM_UP_S, 60 * args.minutes / 2)
    warm = statistics.fmean([kb for at, kb in record.memory if warm_up_s - 10 <= at <= warm_up_s])
    end = statistics.fmean([kb for _, kb in record.memory[-3:]])
    curve = record.memory[:: max(1, len(record.memory) // 20)]
    print(
        "\nmemory, MB at seconds: " + ", ".join(f"{kb / 1e3:.0f} at {at:.0f}" for at, kb in curve)
    )
    print(
        f"after the warm-up ({warm_up_s:.0f} s) {warm / 1e3:.1f} MB, at the end {end / 1e3:.1f} MB: "
        f"{end / warm:.3f} of it (at most {MEMORY_RATIO}); highest {peak / 1e3:.1f} MB; "
        f"{threads} threads, {files} open files"
    )
    if end > MEMORY_RATIO * warm:
        record.failures.append(f"memory grew to {end / warm:.3f} of what it was")
    for text in record.failures[:SHOWN]:
        print(f"FAILURE {text}")
    print(f"FAILED, {len(record.failures)} failures" if record.failures else "PASSED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=100.0, help="calls a second, at most")
    parser.add_argument("--data", type=Path, help="folder to keep data and logs in")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return asyncio.run(run(args, folder))


if __name__ == "__main__":
    sys.exit(main())
