"""Bars 2 and 5: waiting costs no job its life, and a quiet stream is no dead one.

    python -m benchmarks.outage [--jobs nats] [--scale 300]
    python -m benchmarks.outage --step-s 200

A whole system of processes on a toy model whose steps are slowed, every time constant of the product divided by `scale`
(an hour of work is 12 s then). Of jobs that each take three quarters of what a request may:

    at once    four, on a generator that draws one at a time
    in turns   four, of two canvases, which make way for one another
    full       four, at a generator in which one may wait: the others are refused again and again
    away       two, whose generator is killed and stays away for longer than the patience of 20 attempts
    drains     two, whose generator is asked to end while it draws, and started again
    crash      two, whose gateway is killed while they are drawn, and started again

All must be done, with one attempt each; two where the gateway crashed. And `too long`, one that takes twice what it
may, must be refused at the door. `--only NAME ...` runs some of them.

With `--step-s` one job of one such step is drawn instead, in real time, and watched by our own `connect()`, by the
client library, and by a plain stub without keepalive: all must hear of its end, of one drawing and one attempt. Exit
code 1 when anything of this does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

import gateway.__main__ as gateway
import services.generator.__main__ as generator
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from collage_client import AsyncCollageClient
from gateway import stages, worker
from local.layout import SERVICES, check_health
from local.processes import Process, free_port, nats_command, probe_nats
from services.common.errors import from_rpc, from_status
from services.common.rpc import connect
from services.common.settings import GatewaySettings, GeneratorSettings, read
from services.common.telemetry import start_logging
from services.generator import engine, scheduler
from services.generator.stages import TorchStages
from testing import toy
from testing.system import collage

# What a request may take, before it is divided.
WORK_S = 3600.0
# Part of it that each job takes.
PART = 0.75
# Of a slowed step.
STEP_S = 0.2
# Attempts whose patience a generator stays away for.
ATTEMPTS = 20
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one scenario's jobs; `wrong` is empty where all is as it should be."""

    name: str
    states: Sequence[str]
    attempts: Sequence[int]
    seconds: float
    wrong: str


class System:
    """Gateway, services and queue as processes over one folder; `scale` divides the product's constants."""

    def __init__(self, folder: Path, *, scale: float, step_s: float, nats: bool) -> None:
        self.at = {name: f"127.0.0.1:{free_port()}" for name in (*SERVICES, "gateway")}
        port = free_port()
        self._nats_url = f"nats://127.0.0.1:{port}"
        told = {
            "blobs": f"folder:{folder / 'blobs'}",
            "jobs": self._nats_url if nats else f"sqlite:{folder / 'jobs.sqlite'}",
            "models": f"toy={toy.mini(folder / 'toy')}",
            "threads": "1",
            "lease_s": str(max(1.0, 10 / scale)),
            "max_work_s": str(WORK_S / scale),
            **{name: self.at[name] for name in SERVICES},
        }
        self._told = told
        self._nats = (
            Process("nats", nats_command(folder, port=port), log=folder / "nats.log")
            if nats
            else None
        )
        slowed = (sys.executable, "-m", "benchmarks.outage", "--scale", str(scale))
        commands = {
            "gateway": (*slowed, "--part", "gateway"),
            "generator": (*slowed, "--part", "generator", "--step-s", str(step_s)),
            "compositor": (sys.executable, "-m", "services.compositor"),
            "inversion": (sys.executable, "-m", "services.inversion"),
        }
        self._commands, self._folder = commands, folder
        self.processes: dict[str, Process] = {}

    async def start(self, *names: str, **more: str) -> None:
        """Starts processes; `more` are settings beside the others."""
        if self._nats is not None and not self._nats.is_running:
            await self._nats.start(lambda: probe_nats(self._nats_url))
        for name in names or self.at:
            told = {**self._told, **more, "address": self.at[name]}
            variables = {f"COLLAGE_{key.upper()}": value for key, value in told.items()}
            self.processes[name] = Process(
                name,
                self._commands[name],
                log=self._folder / f"{name}.log",
                environment={**os.environ, "OMP_NUM_THREADS": "1", **variables},
            )
        await asyncio.gather(
            *(
                self.processes[name].start(
                    lambda name=name: check_health(self.at[name]), timeout_s=120
                )
                for name in names or self.at
            )
        )

    async def stop(self) -> None:
        """Ends all."""
        await asyncio.gather(*(each.terminate(grace_s=5) for each in self.processes.values()))
        if self._nats is not None:
            await self._nats.terminate(grace_s=5)


@contextlib.asynccontextmanager
async def running(
    *, scale: float, step_s: float, nats: bool, **more: str
) -> AsyncIterator[tuple[System, collage_service_pb2_grpc.CollageServiceStub]]:
    """A system that is up, with a stub of its gateway."""
    with tempfile.TemporaryDirectory() as folder:
        system = System(Path(folder), scale=scale, step_s=step_s, nats=nats)
        try:
            await system.start(**more)
            async with connect(system.at["gateway"]) as channel:
                yield system, collage_service_pb2_grpc.CollageServiceStub(channel)
        finally:
            await system.stop()


def asked(steps: int, *, seed: int = 0, side: int = 32) -> pb.CreateJobRequest:
    """A job of so many steps, whose layers have the noise of all of them."""
    scene = collage(size={"width": side, "height": side})
    for layer in scene.layers:
        layer.noise = 1.0
    return pb.CreateJobRequest(
        generate={"collage": scene, "sampling": {"steps": steps, "seed": seed}}
    )


async def send(
    stub: collage_service_pb2_grpc.CollageServiceStub, requests: Sequence[pb.CreateJobRequest]
) -> list[str]:
    """The names of the jobs."""
    created = await asyncio.gather(*(stub.CreateJob(each, timeout=60) for each in requests))
    return [each.job.name for each in created]


async def ended(
    stub: collage_service_pb2_grpc.CollageServiceStub, jobs: Sequence[str]
) -> list[pb.Job]:
    """The jobs when all have ended, whatever becomes of the gateway meanwhile."""
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            told = [(await stub.GetJob(pb.GetJobRequest(name=job), timeout=10)).job for job in jobs]
            finals = (pb.JOB_STATE_DONE, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
            if all(job.state in finals for job in told) or time.monotonic() > deadline_s:
                return told
        await asyncio.sleep(0.2)


async def begun(stub: collage_service_pb2_grpc.CollageServiceStub, job: str) -> None:
    """Returns with the job's first step."""
    call = stub.WatchJob(pb.WatchJobRequest(name=job), timeout=LIMIT_S)
    async for answer in call:
        if answer.event.HasField("step"):
            call.cancel()
            return


def row(name: str, jobs: Sequence[pb.Job], since_s: float, *, most: int = 1) -> Row:
    """What became of jobs that should all be done, taken up `most` times at most."""
    wrong = [
        f"{from_status(job.error).reason}: {job.error.message}"
        if job.HasField("error")
        else "has not ended"
        for job in jobs
        if job.state != pb.JOB_STATE_DONE
    ]
    if not all(1 <= job.attempts <= most for job in jobs):
        wrong.append(f"attempts are not from 1 to {most}")
    return Row(
        name=name,
        states=[pb.JobState.Name(job.state).removeprefix("JOB_STATE_") for job in jobs],
        attempts=[job.attempts for job in jobs],
        seconds=time.monotonic() - since_s,
        wrong="; ".join(wrong),
    )


async def scenarios(*, scale: float, nats: bool, names: Sequence[str]) -> list[Row]:
    """Every scenario on a system of its own."""
    work_s = WORK_S / scale
    steps = int(PART * work_s / STEP_S)
    away_s = ATTEMPTS * (stages.PATIENCE_S / scale + worker.LONGEST_REST_S / scale)
    told: list[Row] = []

    async def scenario(
        name: str,
        requests: Sequence[pb.CreateJobRequest],
        fault: Callable[[System], Awaitable[None]] | None = None,
        *,
        most: int = 1,
        **more: str,
    ) -> None:
        if names and name not in names:
            return
        async with running(scale=scale, step_s=STEP_S, nats=nats, **more) as (system, stub):
            since_s = time.monotonic()
            jobs = await send(stub, requests)
            if fault is not None:
                await begun(stub, jobs[0])
                await fault(system)
            told.append(row(name, await ended(stub, jobs), since_s, most=most))

    async def away(system: System) -> None:
        system.processes["generator"].kill()
        await asyncio.sleep(away_s)
        await system.start("generator")

    async def drains(system: System) -> None:
        # Longer than what it has admitted takes.
        await system.processes["generator"].terminate(grace_s=3 * work_s)
        await system.start("generator")

    async def crash(system: System) -> None:
        system.processes["gateway"].kill()
        await system.start("gateway")

    four = [asked(steps, seed=seed) for seed in range(4)]
    turns = [asked(steps, seed=seed, side=32 + 16 * (seed % 2)) for seed in range(4)]
    await scenario("at once", four)
    await scenario("in turns", turns)
    await scenario("full", four, max_waiting="1")
    await scenario("away", four[:2], away)
    await scenario("drains", four[:2], drains)
    await scenario("crash", four[:2], crash, most=2)
    if not names or "too long" in names:
        told.append(await too_long(scale=scale, nats=nats, steps=int(2 * work_s / STEP_S)))
    return told


async def too_long(*, scale: float, nats: bool, steps: int) -> Row:
    """A job of twice what it may take is refused at the door, for that reason."""
    async with running(scale=scale, step_s=STEP_S, nats=nats) as (_, stub):
        since_s = time.monotonic()
        try:
            await stub.CreateJob(asked(steps), timeout=60)
            wrong = "it was accepted"
        except grpc.aio.AioRpcError as failure:
            error = from_rpc(failure)
            wrong = "" if error.reason == "TOO_LONG" else f"{error.reason}: {error.message}"
        seconds = time.monotonic() - since_s
    return Row(name="too long", states=["REFUSED"], attempts=[], seconds=seconds, wrong=wrong)


async def quiet(step_s: float) -> list[Row]:
    """One job of one step that long, and who watches it; in real time."""
    async with running(scale=1, step_s=step_s, nats=False) as (system, stub):
        since_s = time.monotonic()
        (job,) = await send(stub, [asked(1)])
        address = system.at["gateway"]
        request = pb.WatchJobRequest(name=job)

        async def read(watched: collage_service_pb2_grpc.CollageServiceStub) -> list[pb.JobEvent]:
            return [answer.event async for answer in watched.WatchJob(request)]

        async def plain() -> list[pb.JobEvent]:
            async with grpc.aio.insecure_channel(address) as channel:
                return await read(collage_service_pb2_grpc.CollageServiceStub(channel))

        async def library() -> list[pb.JobEvent]:
            async with AsyncCollageClient(address) as client:
                return [event async for event in client.watch(job)]

        logs = await asyncio.gather(read(stub), library(), plain(), return_exceptions=True)
        told = await ended(stub, [job])
        rows = [row("drawn", told, since_s)]
        for name, log in zip(("connect()", "library", "plain stub"), logs, strict=True):
            if isinstance(log, BaseException):
                wrong = f"was cut off: {log}"
            else:
                drawings = [
                    e
                    for e in log
                    if e.HasField("stage_started") and e.stage_started.stage == "generate"
                ]
                is_whole = log[-1].HasField("done") and len(drawings) == 1
                wrong = "" if is_whole else f"ended with {log[-1]}, after {len(drawings)} drawings"
            rows.append(
                Row(
                    name=name,
                    states=["WATCHED"],
                    attempts=[],
                    seconds=time.monotonic() - since_s,
                    wrong=wrong,
                )
            )
    return rows


# Below: the parts whose constants are divided.


async def part(name: str, *, scale: float, step_s: float) -> None:
    """A process of the system, as its own `main` runs it."""
    if name == "gateway":
        for module, constants in (
            (stages, ("PATIENCE_S", "LONGEST_PAUSE_S", "FIRST_PAUSE_S")),
            (worker, ("FIRST_REST_S", "LONGEST_REST_S")),
        ):
            for constant in constants:
                setattr(module, constant, getattr(module, constant) / scale)
        stages.SILENCE_S = max(2.0, stages.SILENCE_S / scale)
        settings = read(GatewaySettings)
        start_logging(name, level=settings.log_level)
        await (await gateway.build(settings)).run()
        return
    engine.ALIVE_EVERY_S = max(0.2, engine.ALIVE_EVERY_S / scale)
    scheduler.DEFAULT_SLICE_S /= scale
    is_real = scale == 1
    predict, seen = TorchStages.predict, 0

    def slow(self: TorchStages, rows: object) -> object:
        nonlocal seen
        seen += 1
        # A warm-up of steps that long would take half an hour.
        if not is_real or seen > engine.WARM_UP_STEPS + engine.SMALL_WARM_UP_STEPS:
            time.sleep(step_s)
        return predict(self, rows)

    TorchStages.predict = slow
    settings_of = read(GeneratorSettings)
    start_logging(name, level=settings_of.log_level)
    await (await generator.build(settings_of)).run()


def show(rows: Sequence[Row]) -> int:
    """Prints the table; the exit code."""
    print(f"{'scenario':<12} {'states':<36} {'attempts':<12} {'seconds':>8}  verdict")
    for each in rows:
        attempts = " ".join(map(str, each.attempts))
        print(
            f"{each.name:<12} {' '.join(each.states):<36} {attempts:<12} {each.seconds:8.1f}  "
            f"{each.wrong or 'holds'}"
        )
    return int(any(each.wrong for each in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", choices=("sqlite", "nats"), default="sqlite")
    parser.add_argument("--scale", type=float, default=300.0)
    parser.add_argument("--step-s", type=float)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--part", choices=("gateway", "generator"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        asyncio.run(part(args.part, scale=args.scale, step_s=args.step_s or 0.0))
        return
    if args.step_s is not None:
        raise SystemExit(show(asyncio.run(quiet(args.step_s))))
    run = scenarios(scale=args.scale, nats=args.jobs == "nats", names=args.only)
    raise SystemExit(show(asyncio.run(run)))


if __name__ == "__main__":
    main()
