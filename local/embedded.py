"""All services in one process, real gRPC on loopback: what `collage serve`, `make demo` and the tests run.

Main type: `Embedded`. Each service is wired by its own `build`, exactly as its process is; only storage (a folder) and
queue (SQLite) differ from production, and those are settings.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import gateway.__main__ as gateway
import services.compositor.__main__ as compositor
import services.generator.__main__ as generator
import services.inversion.__main__ as inversion
from collage.v1.collage_service_pb2 import JobError, JobEvent
from gateway.jobs import JobsError, JobState
from local.residence import Kind, Residence, Resident, model_key, program, seen
from local.served import model_files, models_setting
from local.variables import settings
from services.common.blobs import BlobStoreError
from services.common.errors import Cancelled
from services.common.rpc import Server
from services.common.settings import (
    CompositorSettings,
    GatewaySettings,
    GeneratorSettings,
    InversionSettings,
)
from services.common.telemetry import serve_metrics

# Free ports, on loopback only.
ANY_PORT = "127.0.0.1:0"
# An embedded server is stopped by its one user, who waits.
DRAIN_S = 5.0
_LIVE = (JobState.QUEUED, JobState.RUNNING)


class Embedded:
    """A whole running system. `address` is the gateway's."""

    def __init__(self, servers: list[Server]) -> None:
        self._servers = servers
        self.address = servers[-1].address

    async def failed(self) -> None:
        """Returns when a service has lost what it cannot work without."""
        watching = [asyncio.create_task(server.failed()) for server in self._servers]
        try:
            await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in watching:
                task.cancel()

    async def stop(self) -> None:
        """Drains the gateway first, then what it calls."""
        for server in reversed(self._servers):
            await server.stop(drain_s=DRAIN_S)


@asynccontextmanager
async def living(
    residence: Residence,
    *,
    kind: Kind,
    inputs: Mapping[str, list[int]],
    address: str = ANY_PORT,
    sockets: Path | None = None,
    model: str = "",
    threads: int = 0,
    takes_up: bool = False,
) -> AsyncIterator[Embedded]:
    """The one server of a data folder, for as long as the context is entered; within `residence.held`.

    Args:
        residence: where it says what it is, once it is ready.
        kind: see `Resident`.
        inputs: what `residence.seen` said of its code before that was imported.
        address: see `start`, as the rest.
        sockets: see `start`.
        model: see `start`.
        threads: see `start`.
        takes_up: whether jobs that an earlier server left are taken up; "serve" takes them up always.
    """
    seen_files = {**inputs, **seen(model_files(model))}
    server = await start(
        residence.data,
        address=address,
        sockets=sockets,
        model=model,
        threads=threads,
        is_fresh=kind != "serve" and not takes_up,
    )
    try:
        residence.describe(
            Resident(
                pid=os.getpid(),
                address=server.address,
                kind=kind,
                model=model_key(model),
                program=program(),
                started_at=time.time(),
                inputs=seen_files,
            )
        )
        yield server
    finally:
        await server.stop()


async def start(
    data: Path,
    *,
    address: str = ANY_PORT,
    sockets: Path | None = None,
    model: str = "",
    threads: int = 0,
    word_steps: int = 0,
    is_fresh: bool = False,
) -> Embedded:
    """Starts everything and returns when the gateway serves, the model loaded and warm.

    Args:
        data: folder for blobs and jobs; made when absent, found again when present.
        address: the gateway's host:port.
        sockets: a folder on whose unix sockets all listen instead, so that its permissions say who may call.
        model: folder of the one model to serve, or hub:OWNER/NAME@REVISION, named after its last part; or a
            models.yaml; empty for the bundled model.
        threads: CPU threads of one operation of a network, 0 for what `COLLAGE_THREADS` says, or one a core.
        word_steps: training steps of a learned word at most, 0 for what `COLLAGE_WORD_STEPS` says, or the default.
        is_fresh: whether jobs that an earlier server left are cancelled rather than taken up, because the commands that
            asked for them ended with it. Only for the one server of its data folder.

    Raises:
        OSError: what the data folder holds cannot be used, and what to do.
    """

    def at(service: str, address: str = ANY_PORT) -> str:
        return address if sockets is None else f"unix:{sockets / service}"

    data.mkdir(mode=0o700, parents=True, exist_ok=True)  # noqa: ASYNC240 once, before anything is served
    common = {"blobs": f"folder:{data / 'blobs'}"}
    networks = {"models": models_setting(model), **({"threads": threads} if threads else {})}
    words = {"word_steps": word_steps} if word_steps else {}
    servers: list[Server] = []
    try:
        compositing = await compositor.build(
            settings(CompositorSettings, **common, **networks, address=at("compositor"))
        )
        servers.append(compositing)
        await compositing.start()
        inverting = await inversion.build(
            settings(InversionSettings, **common, **networks, **words, address=at("inversion"))
        )
        servers.append(inverting)
        await inverting.start()
        generating = await generator.build(
            settings(GeneratorSettings, **common, **networks, address=at("generator"))
        )
        servers.append(generating)
        await generating.start()
        own = settings(
            GatewaySettings,
            **common,
            address=at("gateway", address),
            compositor=compositing.address,
            inversion=inverting.address,
            generator=generating.address,
            jobs=f"sqlite:{data / 'jobs.sqlite'}",
        )
        if is_fresh:
            await _abandon(own)
        fronting = await gateway.build(own)
        servers.append(fronting)
        serve_metrics(own.metrics_port, own.address)
        await fronting.start()
    except BaseException as error:
        for server in reversed(servers):
            await server.stop(drain_s=0)
        if isinstance(error, BlobStoreError | JobsError):
            raise OSError(str(error)) from error
        raise
    return Embedded(servers)


async def _abandon(settings: GatewaySettings) -> None:
    """Cancels the jobs that an earlier server left; one that was at work ends so when its lease has run out."""
    error = Cancelled("abandoned: the server it was given to has ended", reason="JOB_ABANDONED")
    told = JobError(code=error.code, message=error.message, details=error.details())
    payload = JobEvent(cancelled=told).SerializeToString()
    jobs = await gateway.open_jobs(settings)
    try:
        counts = await jobs.counts()
        left, token = sum(counts[state] for state in _LIVE), ""
        while left > 0:
            page, token = await jobs.list(page_size=100, page_token=token)
            for job in page:
                if job.state in _LIVE:
                    await jobs.cancel(job.id, payload=payload)
                    left -= 1
            if not token:
                return
    finally:
        await jobs.close()
