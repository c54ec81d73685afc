"""What a cluster consists of: which processes, on which ports, over which data, with which settings.

Main types: `Layout` and its `Part`s. A part's probe shows that it does real work. Nothing here starts or watches
anything.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from local.processes import Process, free_port, nats_command, probe_nats, seaweed_command
from services.common.rpc import connect
from services.common.s3 import S3BlobStore
from services.common.settings import PREFIX

BUCKET = "collage"
SERVICES = ("compositor", "inversion", "generator")
# What SeaweedFS' parts say to one another takes so many ports.
SEAWEED_PORTS = 11
# Deadlines in seconds for an orderly end. A gateway first finishes the jobs it works on; SeaweedFS has been seen to
# take minutes, and loses nothing when killed.
GATEWAY_GRACE_S, SERVICE_GRACE_S, STORAGE_GRACE_S = 45.0, 10.0, 5.0
PROBE_S = 2.0

Probe = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process: where it is reached, what shows that it works, how long its end may take (seconds)."""

    name: str
    where: str
    process: Process
    probe: Probe
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All parts in stages: those of a stage start together, after the stages before, and stop in reverse.

    `addresses`: the gateways' host:port. `blobs` and `jobs`: as `COLLAGE_BLOBS` and `COLLAGE_JOBS` take them.
    """

    stages: tuple[tuple[Part, ...], ...]
    addresses: tuple[str, ...]
    blobs: str
    jobs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deed:
    """What a data folder keeps of its cluster, readable by its owner only.

    SeaweedFS finds its own parts again by their ports, so these belong to the data.
    """

    access_key: str
    secret_key: str
    ports: Mapping[str, int]

    @classmethod
    def of(cls, file: Path, names: Iterable[str]) -> _Deed:
        """The folder's deed, drawn up where absent, with a port for each name."""
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        ports: dict[str, int] = found.get("ports", {})
        for name in names:
            if name not in ports:
                ports[name] = free_port()
        deed = cls(
            access_key=found.get("access_key") or secrets.token_hex(10),
            secret_key=found.get("secret_key") or secrets.token_hex(20),
            ports=ports,
        )
        kept = {"access_key": deed.access_key, "secret_key": deed.secret_key, "ports": ports}
        draft = file.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(kept, indent=1))
        draft.replace(file)
        return deed


def lay_out(
    data: Path, *, gateways: int, port: int, models: str, threads: int, inherited: Sequence[int]
) -> Layout:
    """The cluster of a data folder, the same one each time.

    Args:
        data: absolute path of an existing folder.
        gateways: how many.
        port: of the first gateway, the others following; 0 for free ones.
        models: see `COLLAGE_MODELS`.
        threads: see `COLLAGE_THREADS`.
        inherited: open files that every process keeps.
    """
    fronts = [f"gateway-{number + 1}" for number in range(gateways)]
    internal = [f"seaweedfs-{number}" for number in range(SEAWEED_PORTS)]
    deed = _Deed.of(data / "cluster.json", ["nats", "seaweedfs", *internal, *SERVICES, *fronts])
    ports = dict(deed.ports)
    if port:
        ports |= {name: port + number for number, name in enumerate(fronts)}
    at = {name: f"127.0.0.1:{each}" for name, each in ports.items()}
    nats, s3 = f"nats://{at['nats']}", f"http://{at['seaweedfs']}"
    blobs = f"s3://{deed.access_key}:{deed.secret_key}@{at['seaweedfs']}/{BUCKET}"
    settings = {"blobs": blobs, "jobs": nats, "models": models, "threads": str(threads)}
    settings |= {name: at[name] for name in SERVICES}

    def process(name: str, command: Sequence[str], **told: str) -> Process:
        return Process(
            name,
            command,
            log=data / "logs" / f"{name}.log",
            environment=_environment(told),
            inherited=inherited,
        )

    def ours(name: str, module: str, grace_s: float) -> Part:
        command = (sys.executable, "-m", module)
        return Part(
            name=name,
            where=at[name],
            process=process(name, command, **settings, address=at[name]),
            probe=lambda: check_health(at[name]),
            grace_s=grace_s,
        )

    queue = Part(
        name="nats",
        where=nats,
        process=process("nats", nats_command(data / "nats", port=ports["nats"])),
        probe=lambda: probe_nats(nats),
        grace_s=STORAGE_GRACE_S,
    )
    seaweed = seaweed_command(
        data / "seaweedfs",
        port=ports["seaweedfs"],
        access_key=deed.access_key,
        secret_key=deed.secret_key,
        other_ports=[ports[name] for name in internal],
    )
    storage = Part(
        name="seaweedfs",
        where=s3,
        process=process("seaweedfs", seaweed),
        probe=lambda: _check_s3(s3, deed),
        grace_s=STORAGE_GRACE_S,
    )
    return Layout(
        stages=(
            (queue, storage),
            tuple(ours(name, f"services.{name}", SERVICE_GRACE_S) for name in SERVICES),
            tuple(ours(name, "gateway", GATEWAY_GRACE_S) for name in fronts),
        ),
        addresses=tuple(at[name] for name in fronts),
        blobs=blobs,
        jobs=nats,
    )


async def check_health(address: str) -> None:
    """Returns when a server of ours says that it serves, raises while it does not."""
    async with connect(address, is_probe=True) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_S)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise ConnectionError(f"{address} does not serve yet")


async def _check_s3(url: str, deed: _Deed) -> None:
    store = await S3BlobStore.open(
        url, access_key=deed.access_key, secret_key=deed.secret_key, bucket=BUCKET, retry_s=0
    )
    try:
        await store.ready()
    finally:
        await store.close()


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process' environment with these settings and no others of ours."""
    passed = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return passed | {f"{PREFIX}{name.upper()}": value for name, value in settings.items() if value}
