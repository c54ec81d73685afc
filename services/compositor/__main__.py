"""The compositor process: `python -m services.compositor`."""

import asyncio
import os

from collage.v1 import compositor_service_pb2_grpc
from services.common.confined import Confined
from services.common.rpc import Server
from services.common.settings import CompositorSettings as Settings
from services.common.settings import open_blobs, read, run
from services.common.telemetry import serve_metrics, start_logging
from services.common.turns import Place
from services.compositor.cutout import open_cutters
from services.compositor.detector import open_detectors
from services.compositor.service import (
    KEPT,
    LIMIT_S,
    MAX_RUNNING,
    MEMORY_BYTES,
    CompositorServicer,
)

# Whoever asks for little goes before whoever asks for much.
OPEN_NICENESS = 10


async def build(settings: Settings) -> Server:
    """The compositor, wired and not yet started."""
    blobs = await open_blobs(settings.blobs)
    threads = settings.threads or len(os.sched_getaffinity(0))
    # Opened here for what is wrong with them, and again by each process that draws with them.
    detectors = await asyncio.to_thread(open_detectors, settings.models, threads=threads)
    digests = {kind: detector.digest for kind, detector in detectors.items()}
    cutters = await asyncio.to_thread(open_cutters, settings.models, threads=threads, checks=True)
    work = {
        place: Confined(
            "services.compositor.making:confined",
            settings.models,
            f"{threads}",
            processes=processes,
            limit_s=LIMIT_S,
            memory_bytes=MEMORY_BYTES,
            niceness=niceness,
        )
        for place, processes, niceness in (
            (Place.KEPT, KEPT, 0),
            (Place.OPEN, MAX_RUNNING, OPEN_NICENESS),
        )
    }
    servicer = CompositorServicer(blobs, digests, cutters, work)
    server = Server("compositor", settings.address)
    compositor_service_pb2_grpc.add_CompositorServiceServicer_to_server(servicer, server.grpc)
    server.add("collage.v1.CompositorService")
    server.on_stopped(blobs.close)
    for each in work.values():
        server.on_stopped(each.close)
    server.before_serving(blobs.ready)
    server.before_serving(work[Place.KEPT].ready)
    return server


async def main() -> None:
    """Serves until SIGTERM."""
    settings = read(Settings)
    start_logging("compositor", level=settings.log_level)
    serve_metrics(settings.metrics_port, settings.address)
    await (await build(settings)).run()


if __name__ == "__main__":
    run(main)
