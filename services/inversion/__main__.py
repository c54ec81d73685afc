"""The inversion process: `python -m services.inversion`."""

import asyncio
from dataclasses import dataclass

from collage.v1 import inversion_service_pb2_grpc
from services.common.rpc import Server
from services.common.settings import read
from services.common.telemetry import serve_metrics, start_logging
from services.inversion.service import InversionServicer


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the inversion service needs to know; each field is read from `COLLAGE_<NAME>`."""

    address: str = "127.0.0.1:50053"
    # Prometheus port, 0 for none.
    metrics_port: int = 0
    log_level: str = "INFO"


async def build(settings: Settings) -> Server:
    """The service, wired and not yet started."""
    server = Server("inversion", settings.address)
    inversion_service_pb2_grpc.add_InversionServiceServicer_to_server(
        InversionServicer(), server.grpc
    )
    server.add("collage.v1.InversionService")
    return server


async def main() -> None:
    """Serves until SIGTERM."""
    settings = read(Settings)
    start_logging("inversion", level=settings.log_level)
    serve_metrics(settings.metrics_port)
    await (await build(settings)).run()


if __name__ == "__main__":
    asyncio.run(main())
