"""Real NATS, S3 and Triton servers for tests, on free ports, over data folders that outlive a crash."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from local import triton
from local.processes import (
    Process,
    free_port,
    nats_command,
    probe_nats,
    seaweed_command,
)
from services.common.s3 import S3BlobStore

ACCESS_KEY = "collage"
SECRET_KEY = "collage-secret"


@dataclass(slots=True)
class Server:
    """A running server. `crash` is a `kill -9`, `restart` starts it on the same data and ports."""

    url: str
    process: Process

    def crash(self) -> None:
        self.process.kill()

    async def restart(self) -> None:
        await self.process.start(self.probe)

    async def probe(self) -> None:
        raise NotImplementedError


class NatsServer(Server):
    async def probe(self) -> None:
        await probe_nats(self.url)


class SeaweedServer(Server):
    async def probe(self) -> None:
        store = await S3BlobStore.open(
            self.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY, bucket="probe", retry_s=0
        )
        try:
            await store.ready()
        finally:
            await store.close()


@contextlib.asynccontextmanager
async def nats_server(data: Path) -> AsyncIterator[Server]:
    port = free_port()
    process = Process("nats", nats_command(data, port=port), log=data / "nats.log")
    server = NatsServer(f"nats://127.0.0.1:{port}", process)
    try:
        await server.restart()
        yield server
    finally:
        await process.terminate(grace_s=3)


@contextlib.asynccontextmanager
async def seaweed(data: Path) -> AsyncIterator[Server]:
    port, *others = (free_port() for _ in range(12))
    command = seaweed_command(
        data, port=port, access_key=ACCESS_KEY, secret_key=SECRET_KEY, other_ports=others
    )
    process = Process("seaweedfs", command, log=data / "weed.log")
    server = SeaweedServer(f"http://127.0.0.1:{port}", process)
    try:
        await server.restart()
        yield server
    finally:
        await process.terminate(grace_s=3)


@dataclass(slots=True)
class TritonServer(Server):
    repository: Path

    async def probe(self) -> None:
        await triton.answers(self.url)

    def kill_stage(self, stage: str) -> None:
        """Ends the process of a stage at once; the server itself goes on."""
        for pid in stage_processes(self.process.pid, stage):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def stage_processes(server: int, stage: str = "") -> list[int]:
    """Ids of the processes that a Triton server, whose own id is told, has for a stage; for all where none is told."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            line = Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace")
            is_its = os.getsid(int(pid)) == server and "triton_python_backend_stub" in line
            if is_its and (not stage or f".{stage}/" in line):
                found.append(int(pid))
    return found


@contextlib.asynccontextmanager
async def triton_server(data: Path, models: str) -> AsyncIterator[TritonServer]:
    """A Triton server of these models (see `COLLAGE_MODELS`), with one thread an operation."""
    port = free_port()
    process = Process(
        "triton",
        (sys.executable, "-m", "local.triton", str(data / "repository"), f"--port={port}"),
        log=data / "triton.log",
        environment={**os.environ, "COLLAGE_MODELS": models, "COLLAGE_THREADS": "1"},
    )
    server = TritonServer(f"127.0.0.1:{port}", process, data / "repository")
    try:
        await process.start(server.probe, timeout_s=240)
        yield server
    finally:
        # It gives what it has under way 30 s.
        await process.terminate(grace_s=35)
