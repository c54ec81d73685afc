"""The generator process: `python -m services.generator`."""

import asyncio
import math
import os
import re
from collections.abc import Callable

from collage.v1 import generator_service_pb2_grpc
from services.common.decoder import Decoder
from services.common.errors import Unavailable
from services.common.rpc import Server
from services.common.settings import GeneratorSettings as Settings
from services.common.settings import InvalidSetting, open_blobs, read, run
from services.common.telemetry import serve_metrics, start_logging
from services.diffusion.catalog import Catalog
from services.generator.engine import Engine
from services.generator.folder_card import FolderCard, load_stages, read_catalog
from services.generator.scheduler import Scheduler
from services.generator.service import GeneratorServicer
from services.generator.stages import Stages

TRITON = "triton:"
_ADDRESS = re.compile(r"\S+:\d{1,5}")


def networks(settings: Settings) -> tuple[Catalog[FolderCard], Callable[[FolderCard], Stages]]:
    """The models that the settings name, and what makes stages of one.

    Raises:
        InvalidSetting: a model cannot be used, or who is to run the networks is nobody.
    """
    if settings.stages == "torch":
        return read_catalog(settings.models), load_stages
    names = settings.stages.removeprefix(TRITON).split(",")
    if not settings.stages.startswith(TRITON) or not all(map(_ADDRESS.fullmatch, names)):
        raise InvalidSetting(
            f"COLLAGE_STAGES is {settings.stages!r}; allowed: torch, triton:HOST:PORT[,HOST:PORT...]"
        )
    # An extra of its own.
    from services.generator.triton.servers import Servers
    from services.generator.triton.stages import TritonStages, as_served

    servers, may_share = Servers(names), settings.max_rows > 1
    try:
        catalog = Catalog.read(
            settings.models,
            lambda source: as_served(FolderCard.read(source, is_elsewhere=True), servers),
        )
    except Unavailable as error:
        raise InvalidSetting(f"COLLAGE_STAGES: {error}") from error
    return catalog, lambda card: TritonStages(card, servers, may_share=may_share)


async def build(settings: Settings) -> Server:
    """The generator, wired and not yet started."""
    blobs = await open_blobs(settings.blobs)
    catalog, load = await asyncio.to_thread(networks, settings)
    memory_bytes = settings.model_memory * 2**30 or math.inf
    catalog.check_memory(memory_bytes)
    engine = Engine(
        catalog,
        load=load,
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
