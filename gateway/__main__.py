"""The gateway process: `python -m gateway`."""

import functools
import socket

from collage.v1 import collage_service_pb2_grpc as collage_grpc
from collage.v1 import compositor_service_pb2_grpc as compositor_grpc
from collage.v1 import generator_service_pb2_grpc as generator_grpc
from collage.v1 import inversion_service_pb2_grpc as inversion_grpc
from gateway.jobs import Jobs, JobsError, QueuePolicy
from gateway.models import Models
from gateway.pipeline import Pipeline
from gateway.plan import Planner
from gateway.service import CollageServicer
from gateway.stages import Stages
from gateway.storage import Storage
from gateway.words import Words
from gateway.worker import Worker, exhausted_event
from services.common.memory import give_back
from services.common.rpc import Server, connect
from services.common.settings import GatewaySettings as Settings
from services.common.settings import InvalidSetting, open_blobs, read, run
from services.common.telemetry import log, serve_metrics, start_logging

SERVICE = "collage.v1.CollageService"


async def open_jobs(settings: Settings) -> Jobs:
    """The job queue at the address in the settings."""
    policy = QueuePolicy(
        exhausted=exhausted_event, lease_s=settings.lease_s, max_queued=settings.max_queued
    )
    scheme, _, rest = settings.jobs.partition(":")
    # Each queue's client is imported only by processes that use it.
    if scheme == "sqlite" and rest:
        from pathlib import Path

        from gateway.jobs.sqlite import SqliteJobs

        return await SqliteJobs.open(Path(rest), policy)
    if scheme in ("nats", "tls"):
        from gateway.jobs.nats import NatsJobs

        return await NatsJobs.open(settings.jobs, policy, replicas=settings.job_replicas)
    # It may hold a password.
    raise InvalidSetting(
        "COLLAGE_JOBS is neither sqlite:PATH nor nats://HOST:PORT nor tls://HOST:PORT"
    )


async def build(settings: Settings) -> Server:
    """The gateway, wired and not yet started."""
    blobs = await open_blobs(settings.blobs, public=settings.public_blobs)
    jobs = await open_jobs(settings)
    log.info("queue open; every gateway that opens it shares its jobs")
    compositor, inversion, generator = map(
        connect, (settings.compositor, settings.inversion, settings.generator)
    )
    generating = generator_grpc.GeneratorServiceStub(generator)
    inverting = inversion_grpc.InversionServiceStub(inversion)
    compositing = compositor_grpc.CompositorServiceStub(compositor)
    models, words = Models(generating, compositing), Words(blobs)
    stages = Stages(compositor=compositing, inversion=inverting, generator=generating)
    planner = Planner(blobs=blobs, words=words, stages=stages)
    worker = Worker(jobs, Pipeline(stages), words, slots=settings.slots)
    server = Server("gateway", settings.address, drain=worker.drain, is_edge=True)
    servicer = CollageServicer(
        store=blobs,
        jobs=jobs,
        words=words,
        planner=planner,
        models=models,
        inversion=inverting,
    )
    collage_grpc.add_CollageServiceServicer_to_server(servicer, server.grpc)
    server.add(SERVICE)
    storage = Storage(blobs, jobs, tell=functools.partial(server.able, SERVICE))
    server.depends_on(storage.watch)
    # Here the large messages come in.
    server.depends_on(give_back)
    for close in (
        blobs.close,
        jobs.close,
        compositor.close,
        inversion.close,
        generator.close,
        worker.stop,
        servicer.close,
    ):
        server.on_stopped(close)
    server.before_serving(blobs.ready)
    server.before_serving(jobs.ready)
    return server


async def main() -> None:
    """Serves until SIGTERM."""
    settings = read(Settings)
    start_logging(f"gateway@{socket.gethostname()}", level=settings.log_level)
    serve_metrics(settings.metrics_port, settings.address)
    try:
        await (await build(settings)).run()
    except JobsError as error:
        raise SystemExit(f"gateway: {error}") from None


if __name__ == "__main__":
    run(main)
