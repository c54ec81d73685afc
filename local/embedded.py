"""All services in one process, real gRPC on loopback: what `collage serve`, `make demo` and the tests run.

Main type: `Embedded`. Each service is wired by its own `build`, exactly as its process is; only storage (a folder) and
queue (SQLite) differ from production, and those are settings.
"""

import asyncio
from pathlib import Path

import gateway.__main__ as gateway
import services.compositor.__main__ as compositor
import services.generator.__main__ as generator
import services.inversion.__main__ as inversion
from local.served import models_setting
from services.common.rpc import Server

# Free ports, on loopback only.
ANY_PORT = "127.0.0.1:0"
# An embedded server is stopped by its one user, who waits.
DRAIN_S = 5.0


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


async def start(
    data: Path, *, address: str = ANY_PORT, model: str = "", threads: int = 0, word_steps: int = 0
) -> Embedded:
    """Starts everything and returns when the gateway serves, the model loaded and warm.

    Args:
        data: folder for blobs and jobs; made when absent, found again when present.
        address: the gateway's host:port.
        model: folder or hub id of the one model to serve, named after its last part; or a models.yaml; empty for the
            bundled model.
        threads: CPU threads of one operation of a network, 0 for one a core.
        word_steps: training steps of a learned word at most, 0 for the default.
    """
    data.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240 once, before anything is served
    blobs = f"folder:{data / 'blobs'}"
    models = models_setting(model)
    servers: list[Server] = []
    try:
        compositing = await compositor.build(
            compositor.Settings(address=ANY_PORT, blobs=blobs, models=models, threads=threads)
        )
        servers.append(compositing)
        await compositing.start()
        inverting = await inversion.build(
            inversion.Settings(
                address=ANY_PORT,
                blobs=blobs,
                models=models,
                threads=threads,
                word_steps=word_steps or inversion.Settings().word_steps,
            )
        )
        servers.append(inverting)
        await inverting.start()
        generating = await generator.build(
            generator.Settings(
                address=ANY_PORT,
                blobs=blobs,
                models=models,
                threads=threads,
            )
        )
        servers.append(generating)
        await generating.start()
        fronting = await gateway.build(
            gateway.Settings(
                address=address,
                compositor=compositing.address,
                inversion=inverting.address,
                generator=generating.address,
                blobs=blobs,
                jobs=f"sqlite:{data / 'jobs.sqlite'}",
            )
        )
        servers.append(fronting)
        await fronting.start()
    except BaseException:
        for server in reversed(servers):
            await server.stop(drain_s=0)
        raise
    return Embedded(servers)
