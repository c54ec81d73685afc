"""What a cluster consists of: which processes, on which ports, over which data, with which settings.

Main types: `Layout` and its `Part`s. A part's probe shows that it does real work. Nothing here starts or watches
anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from local import triton
from local.edge import check, configure, names
from local.processes import (
    Process,
    free_port,
    nats_command,
    probe_nats,
    program,
    seaweed_command,
    seaweed_keys,
    write_private,
)
from local.variables import settings
from services.common.rpc import connect
from services.common.s3 import S3BlobStore
from services.common.settings import PARTS, GatewaySettings, InvalidSetting, variable

BUCKET = "collage"
QUEUE_USER = "collage"
SERVICES = ("compositor", "inversion", "generator")
# What SeaweedFS' parts say to one another takes so many ports.
SEAWEED_PORTS = 11
# Deadlines in seconds for an orderly end. A gateway first finishes the jobs it works on; SeaweedFS has been seen to
# take minutes, and loses nothing when killed.
GATEWAY_GRACE_S, SERVICE_GRACE_S, STORAGE_GRACE_S = 45.0, 10.0, 5.0
DOOR_GRACE_S = 5.0
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
class Web:
    """Where HTTP is answered (`address`, host:port), and to whom: see `door.origins.Guard`."""

    address: str
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All parts in stages: those of a stage start together, after the stages before, and stop in reverse.

    `addresses`: the gateways' host:port. `blobs` and `jobs`: as `COLLAGE_BLOBS` and `COLLAGE_JOBS` take them.
    `metrics`: the Prometheus port of each process that has one.
    """

    stages: tuple[tuple[Part, ...], ...]
    addresses: tuple[str, ...]
    blobs: str
    jobs: str
    metrics: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deed:
    """What a data folder keeps of its cluster, readable by its owner only.

    SeaweedFS finds its own parts again by their ports, so these belong to the data.
    """

    access_key: str
    secret_key: str
    queue_password: str
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
            queue_password=found.get("queue_password") or secrets.token_hex(20),
            ports=ports,
        )
        write_private(file, json.dumps(asdict(deed), indent=1))
        return deed


def lay_out(
    data: Path,
    *,
    gateways: int,
    port: int,
    models: str,
    threads: int,
    servers: int,
    generators: int,
    inherited: Sequence[int],
    http: Web | None = None,
) -> Layout:
    """The cluster of a data folder, the same one each time.

    Args:
        data: absolute path of an existing folder.
        gateways: how many.
        port: of the first gateway, the others following; 0 for free ones.
        models: see `COLLAGE_MODELS`.
        threads: see `COLLAGE_THREADS`; 0 for what that says.
        servers: how many Triton servers run the generators' networks; 0 for these themselves.
        generators: how many.
        inherited: open files that every process keeps.
        http: where browsers and scripts come in, if they do.

    Raises:
        InvalidSetting: a variable of the environment is wrong, or one that is told here.
    """
    fronts = [f"gateway-{number + 1}" for number in range(gateways)]
    internal = [f"seaweedfs-{number}" for number in range(SEAWEED_PORTS)]
    models_at = [f"triton-{number + 1}" for number in range(servers)]
    drawing = ["generator", *(f"generator-{number + 1}" for number in range(1, generators))]
    services = {name: f"services.{name}" for name in SERVICES}
    services |= dict.fromkeys(drawing, "services.generator")
    parts = ["nats", "seaweedfs", *internal, *models_at, *services, *fronts, "door"]
    deed = _Deed.of(data / "cluster.json", parts)
    ports = dict(deed.ports)
    if port:
        ports |= {name: port + number for number, name in enumerate(fronts)}
    at = {name: f"127.0.0.1:{each}" for name, each in ports.items()}
    s3 = f"http://{at['seaweedfs']}"
    jobs = f"nats://{QUEUE_USER}:{deed.queue_password}@{at['nats']}"
    blobs = f"s3://{deed.access_key}:{deed.secret_key}@{at['seaweedfs']}/{BUCKET}"
    told: dict[str, Any] = {"blobs": blobs, "jobs": jobs, "models": models}
    told |= {name: at[name] for name in SERVICES} | ({"threads": threads} if threads else {})
    told["generator"] = ",".join(at[name] for name in drawing)
    if servers:
        if variable("stages") in os.environ:
            raise InvalidSetting(
                f"{variable('stages')} and --stages both say who runs the networks"
            )
        told["stages"] = f"triton:{','.join(at[name] for name in models_at)}"
    metrics = _metrics_ports([*models_at, *services, *fronts])

    def process(name: str, command: Sequence[str], **told: str) -> Process:
        return Process(
            name,
            command,
            log=data / "logs" / f"{name}.log",
            environment={**os.environ, **told},
            inherited=inherited,
        )

    def part(name: str, module: str, grace_s: float) -> Part:
        all_told = {**told, "address": at[name], "metrics_port": metrics[name]}
        return ours(name, module, all_told, grace_s, lambda: check_health(at[name]))

    def ours(
        name: str, module: str, all_told: Mapping[str, Any], grace_s: float, probe: Probe
    ) -> Part:
        """One of our processes, told what it takes of all that."""
        kind = PARTS[module.rpartition(".")[2]]
        own = {each.name: all_told[each.name] for each in fields(kind) if each.name in all_told}
        # What is wrong stops the start here, in words, and not in the log of a part.
        settings(kind, **own)
        command = (sys.executable, "-m", module)
        return Part(
            name=name,
            where=all_told["address"],
            process=process(
                name, command, **{variable(key): str(value) for key, value in own.items()}
            ),
            probe=probe,
            grace_s=grace_s,
        )

    def web(http: Web) -> tuple[tuple[Part, ...], ...]:
        """Our door, and Envoy before it where it is installed."""
        try:
            envoy = program("envoy")
        except FileNotFoundError:
            envoy = ""
        place = at["door"] if envoy else http.address
        hosts = (*http.hosts, *names(http.address))
        told = {
            "address": place,
            "gateway": ",".join(at[name] for name in fronts),
            "http_hosts": ",".join(hosts),
            "http_origins": ",".join(http.origins),
        }
        door = ours("door", "door", told, DOOR_GRACE_S, lambda: asyncio.to_thread(check, place))
        if not envoy:
            return ((door,),)
        arguments = configure(
            data / "envoy" / "envoy.json",
            address=http.address,
            gateways=[at[name] for name in fronts],
            door=place,
            hosts=http.hosts,
            origins=http.origins,
        )
        edge = Part(
            name="envoy",
            where=f"http://{http.address}",
            process=process("envoy", (envoy, *arguments)),
            probe=lambda: asyncio.to_thread(check, http.address),
            grace_s=DOOR_GRACE_S,
        )
        return ((door,), (edge,))

    def model_server(name: str) -> Part:
        repository = str(data / "triton" / name)
        line = (sys.executable, "-m", "local.triton", repository, f"--port={ports[name]}")
        own = {key: str(told[key]) for key in ("models", "threads") if key in told}
        return Part(
            name=name,
            where=at[name],
            process=process(
                name,
                (*line, f"--metrics-port={metrics[name]}"),
                **{variable(key): value for key, value in own.items()},
            ),
            probe=lambda: triton.answers(at[name]),
            grace_s=SERVICE_GRACE_S,
        )

    nats = nats_command(
        data / "nats",
        port=ports["nats"],
        more=f"authorization {{ user: {QUEUE_USER}, password: {deed.queue_password} }}\n",
    )
    queue = Part(
        name="nats",
        where=f"nats://{at['nats']}",
        process=process("nats", nats),
        probe=lambda: probe_nats(jobs),
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
        process=process("seaweedfs", seaweed, **seaweed_keys(deed.secret_key)),
        probe=lambda: _check_s3(s3, deed),
        grace_s=STORAGE_GRACE_S,
    )
    return Layout(
        stages=(
            (queue, storage, *map(model_server, models_at)),
            tuple(part(name, module, SERVICE_GRACE_S) for name, module in services.items()),
            tuple(part(name, "gateway", GATEWAY_GRACE_S) for name in fronts),
            *(web(http) if http else ()),
        ),
        addresses=tuple(at[name] for name in fronts),
        blobs=blobs,
        jobs=jobs,
        metrics={name: port for name, port in metrics.items() if port},
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


def _metrics_ports(names: Sequence[str]) -> dict[str, int]:
    """A port for each of our processes, counted on from the one that the environment names; 0 for none."""
    first = settings(GatewaySettings).metrics_port
    if first + len(names) - 1 > 65535:
        raise InvalidSetting(
            f"{variable('metrics_port')} is {first}; allowed: at most {65536 - len(names)}, because each of the "
            f"{len(names)} processes has one of its own"
        )
    return {name: first and first + number for number, name in enumerate(names)}
