"""The generator process: `python -m services.generator`."""

import asyncio
import math
import os

from collage.v1 import generator_service_pb2_grpc
from services.common.decoder import Decoder
from services.common.rpc import Server
from services.common.settings import GeneratorSettings as Settings
from services.common.settings import open_blobs, read, run
from services.common.telemetry import serve_metrics, start_logging
from services.generator.engine import Engine
from services.generator.folder_card import load_stages, read_catalog
from services.generator.scheduler import Scheduler
from services.generator.service import GeneratorServicer


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
    decoder = Decoder()
    server = Server("generator", settings.address, drain=engine.drain)
    generator_service_pb2_grpc.add_GeneratorServiceServicer_to_server(
        GeneratorServicer(
            engine,
            blobs,
            decoder,
            limit_bytes=settings.request_memory * 2**30,
            limit_s=settings.max_work_s,
        ),
        server.grpc,
    )
    server.add("collage.v1.GeneratorService")
    server.depends_on(engine.working)
    server.on_stopped(blobs.close)
    server.on_stopped(decoder.close)
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
    run(main)
