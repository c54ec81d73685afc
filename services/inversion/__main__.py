"""The inversion process: `python -m services.inversion`."""

import asyncio
import math
import os
from dataclasses import dataclass, replace

from collage.v1 import inversion_service_pb2_grpc
from services.common.rpc import Server
from services.common.settings import open_blobs, read
from services.common.telemetry import serve_metrics, start_logging
from services.inversion.engine import DEFAULT_MAX_WAITING, Engine
from services.inversion.learn import Recipe
from services.inversion.networks import read_catalog
from services.inversion.service import InversionServicer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the inversion service needs to know; each field is read from `COLLAGE_<NAME>`."""

    address: str = "127.0.0.1:50053"
    # `folder:PATH` or `s3://KEY:SECRET@HOST:PORT/BUCKET`.
    blobs: str = "folder:data/blobs"
    # The generator's models, see there; empty for the bundled model.
    models: str = ""
    # CPU threads of one operation, 0 for one a core. Another number gives words that differ in their last bits.
    threads: int = 0
    # Training steps of a word at most. Part of what names a word: another number learns every word anew.
    word_steps: int = Recipe().steps
    # Rows trained together at most, four a word; the words of a call beyond that are learned after them. 0: as many as
    # make 1.2 million pixels. Another number gives words that differ in their last bits.
    joint_rows: int = 0
    # Calls that may wait for their turn.
    max_waiting: int = DEFAULT_MAX_WAITING
    # Seconds between two checkpoints: what a crash may cost.
    checkpoint_s: float = 3.0
    # GiB that weights may take on each device, 0 for no limit: models are loaded with the first word that is learned
    # for them, and those used least recently give way.
    model_memory: float = 0.0
    # Prometheus port, 0 for none.
    metrics_port: int = 0
    log_level: str = "INFO"


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
    server = Server("inversion", settings.address, drain=engine.drain)
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(
        InversionServicer(engine, blobs), server.grpc
    )
    server.add("collage.v1.InversionService")
    server.depends_on(engine.working)
    server.on_stopped(blobs.close)
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
    asyncio.run(main())
