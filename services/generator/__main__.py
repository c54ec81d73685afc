"""The generator process: `python -m services.generator`."""

import asyncio
import math
import os
from dataclasses import dataclass

from collage.v1 import generator_service_pb2_grpc
from services.common.rpc import Server
from services.common.settings import open_blobs, read
from services.common.telemetry import serve_metrics, start_logging
from services.generator.engine import Engine
from services.generator.folder_card import load_stages, read_catalog
from services.generator.scheduler import DEFAULT_MAX_ROWS, DEFAULT_MAX_WAITING, Scheduler
from services.generator.service import GeneratorServicer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the generator needs to know; each field is read from `COLLAGE_<NAME>`."""

    address: str = "127.0.0.1:50054"
    # `folder:PATH` or `s3://KEY:SECRET@HOST:PORT/BUCKET`.
    blobs: str = "folder:data/blobs"
    # `NAME=FOLDER` or `NAME=OWNER/NAME`, separated by commas, the default first; or the path of a models.yaml; empty
    # for the bundled model.
    models: str = ""
    # U-Net rows that jobs may share, and the pictures of one; 1 keeps every picture's bytes independent of the load.
    max_rows: int = DEFAULT_MAX_ROWS
    # Jobs that may wait.
    max_waiting: int = DEFAULT_MAX_WAITING
    # CPU threads of one operation, 0 for one a core. Another number gives pictures that differ in their last bits.
    threads: int = 0
    # GiB that one request may take beyond the weights, 0 for half of what they leave of the device's memory: a request
    # that would take more is refused before anything is drawn.
    request_memory: float = 0.0
    # GiB that weights may take on each device, 0 for no limit: models are loaded with their first use, and those used
    # least recently give way.
    model_memory: float = 0.0
    # Prometheus port, 0 for none.
    metrics_port: int = 0
    log_level: str = "INFO"


async def build(settings: Settings) -> Server:
    """The generator, wired and not yet started."""
    blobs = await open_blobs(settings.blobs)
    catalog = await asyncio.to_thread(read_catalog, settings.models)
    memory_bytes = settings.model_memory * 2**30 or math.inf
    catalog.check_memory(memory_bytes)
    engine = Engine(
        catalog,
        load=load_stages,
        scheduler=Scheduler(max_rows=settings.max_rows, max_waiting=settings.max_waiting),
        threads=settings.threads or len(os.sched_getaffinity(0)),
        memory_bytes=memory_bytes,
    )
    server = Server("generator", settings.address, drain=engine.drain)
    generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(
        GeneratorServicer(engine, blobs, limit_bytes=settings.request_memory * 2**30),
        server.grpc,
    )
    server.add("collage.v1.GeneratorService")
    server.depends_on(engine.working)
    server.on_stopped(blobs.close)
    server.before_serving(blobs.ready)
    server.before_serving(engine.warm_up)
    return server


async def main() -> None:
    """Serves until SIGTERM."""
    settings = read(Settings)
    start_logging("generator", level=settings.log_level)
    serve_metrics(settings.metrics_port, settings.address)
    await (await build(settings)).run()


if __name__ == "__main__":
    asyncio.run(main())
