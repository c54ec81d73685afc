"""The inversion process: `python -m services.inversion`."""

import asyncio
import math
import os
from dataclasses import replace

from collage.v1 import inversion_service_pb2_grpc
from services.common.decoder import Decoder
from services.common.rpc import Server
from services.common.settings import InversionSettings as Settings
from services.common.settings import open_blobs, read, run
from services.common.telemetry import serve_metrics, start_logging
from services.inversion.engine import Engine
from services.inversion.learn import Recipe
from services.inversion.networks import read_catalog
from services.inversion.service import InversionServicer


async def build(settings: Settings) -> Server:
    """The service, wired and not yet started. A model is loaded with the first word that is learned for it."""
    blobs = await open_blobs(settings.blobs)
    catalog = await asyncio.to_thread(read_catalog, settings.models)
    memory_bytes = settings.model_memory * 2**30 or math.inf
    catalog.check_memory(memory_bytes)
    engine = Engine(
        catalog,
        recipe=replace(Recipe(), steps=settings.word_steps),
        threads=settings.threads or len(os.sched_getaffinity(0)),
        joint_rows=settings.joint_rows,
        max_waiting=settings.max_waiting,
        checkpoint_s=settings.checkpoint_s,
        memory_bytes=memory_bytes,
    )
    decoder = Decoder()
    server = Server("inversion", settings.address, drain=engine.drain)
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(
        InversionServicer(engine, blobs, decoder, limit_s=settings.max_work_s), server.grpc
    )
    server.add("collage.v1.InversionService")
    server.depends_on(engine.working)
    server.on_stopped(blobs.close)
    server.on_stopped(decoder.close)
    server.on_stopped(engine.close)
    server.before_serving(blobs.ready)
    return server


async def main() -> None:
    """Serves until SIGTERM."""
    settings = read(Settings)
    start_logging("inversion", level=settings.log_level)
    serve_metrics(settings.metrics_port, settings.address)
    await (await build(settings)).run()


if __name__ == "__main__":
    run(main)
