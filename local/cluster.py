"""The production shape on one machine: NATS, SeaweedFS and every service as a process of its own, on loopback.

Main type: `Cluster`; the command `collage cluster` runs `serve`. A process counts as started when it has done real
work, and one that dies is started again on the same data and port, as Kubernetes would. What the processes say to one
another is none of its business.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collage.v1 import blob_pb2, collage_pb2, collage_service_pb2, collage_service_pb2_grpc
from local.layout import Layout, Part, Web, lay_out
from local.processes import ProcessFailed
from services.common.rpc import connect
from services.common.telemetry import log

# A generator reads its model and draws a picture before it serves.
START_LIMIT_S = 180.0
# A process that dies again and again is started at these intervals, doubling from the first to the last.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
# One that ran for so long died of something new.
STEADY_S = 10.0
# Seconds between two looks at whether something runs or works.
LOOK_S = 0.1
# For each call of the first requests.
CHECK_S = 30.0
# Any PNG will do for the first request: this is one white pixel.
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAAC0lEQVR4nGP4DwQACfsD/fteaysAAAAASUVORK5CYII="
)


class Cluster:
    """A supervised system of processes over one data folder.

    Args:
        data: where NATS and SeaweedFS keep theirs, with logs in `logs/`; made when absent, found again when present.
        gateways: how many, at least 1.
        port: of the first gateway, the others following; 0: free ones, the same ones each time for this folder.
        models: what the generator serves, see `COLLAGE_MODELS`; empty for the bundled model.
        threads: of one operation in the generator; 0 for one a core.
        http: where browsers and scripts come in, if they do: by Envoy where it is installed, else by our own door.
        servers: how many Triton servers run the generators' networks; 0 for these themselves.
        generators: how many.
        tell: hears of every process that died and was started again.
    """

    def __init__(
        self,
        data: Path,
        *,
        gateways: int = 1,
        port: int = 0,
        models: str = "",
        threads: int = 0,
        http: Web | None = None,
        servers: int = 0,
        generators: int = 1,
        tell: Callable[[str], None] = log.info,
    ) -> None:
        if gateways < 1:
            raise ValueError(f"gateways is {gateways}, must be at least 1")
        self._data = data.absolute()
        self._gateways = gateways
        self._port = port
        self._models = models
        self._threads = threads
        self._http = http
        self._servers = servers
        self._generators = generators
        self._tell = tell
        self._open = contextlib.ExitStack()
        self._layout = Layout(stages=(), addresses=(), blobs="", jobs="", metrics={})
        self._parts: dict[str, Part] = {}
        self._keepers: list[asyncio.Task[None]] = []
        # Times each process was started again, by name.
        self.restarts: dict[str, int] = {}

    @property
    def addresses(self) -> tuple[str, ...]:
        """The gateways' host:port."""
        return self._layout.addresses

    @property
    def blobs(self) -> str:
        """Where blobs are, as `COLLAGE_BLOBS` takes it."""
        return self._layout.blobs

    @property
    def jobs(self) -> str:
        """Where jobs are, as `COLLAGE_JOBS` takes it."""
        return self._layout.jobs

    @property
    def metrics(self) -> Mapping[str, int]:
        """The Prometheus port of each process that has one: where `COLLAGE_METRICS_PORT` names the first."""
        return self._layout.metrics

    @property
    def names(self) -> tuple[str, ...]:
        """The processes, in the order they were started."""
        return tuple(self._parts)

    def pid(self, name: str) -> int:
        """The id of a process, for as long as it is not started again."""
        return self._parts[name].process.pid

    async def serves(self, name: str) -> bool:
        """Whether a process does real work now."""
        try:
            await self._parts[name].probe()
        except Exception:
            return False
        return True

    def kill(self, name: str) -> None:
        """Ends a process as a crash would (SIGKILL); it is started again."""
        self._parts[name].process.kill()

    async def start(self) -> None:
        """Starts everything and returns when a plan was made through every gateway.

        Raises:
            ProcessFailed: with the end of the failed process' log. Nothing runs any more then.
            OSError: the folder belongs to a running cluster, or cannot be written.
        """
        try:
            self._lay_out()
            for stage in self._layout.stages:
                await self._start(stage)
            await self.working()
        except BaseException:
            self.kill_all()
            await self._forget()
            raise

    async def working(self) -> None:
        """Returns when every process does real work and every gateway made a plan; raises `ProcessFailed`."""
        deadline = time.monotonic() + START_LIMIT_S
        for look in (*(part.probe for part in self._parts.values()), self._check_gateways):
            while True:
                try:
                    await look()
                    break
                except Exception as error:
                    if time.monotonic() > deadline:
                        raise ProcessFailed(f"the cluster does not work: {error}") from error
                await asyncio.sleep(LOOK_S)

    async def stop(self) -> None:
        """Ends everything in order: gateways finish their jobs, then services, then storage; each has a deadline."""
        await self._leave()
        for stage in reversed(self._layout.stages):
            ends = (part.process.terminate(grace_s=part.grace_s) for part in stage)
            await asyncio.gather(*ends)
        await self._forget()

    def kill_all(self) -> None:
        """Ends everything at once. Jobs are safe: they are taken up again with the next start."""
        for keeper in self._keepers:
            keeper.cancel()
        for part in self._parts.values():
            part.process.kill()

    def table(self) -> str:
        """What runs where, a line a process."""
        rows = [
            (part.name, part.where, f"{part.process.pid}", str(part.process.log))
            for part in self._parts.values()
        ]
        return _aligned([("process", "address", "pid", "log"), *rows])

    def _lay_out(self) -> None:
        """Takes hold of the folder and says what is to run."""
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._open.enter_context((self._data / "lock").open("w"))
        # Every child inherits the file, so the lock also tells of what a killed cluster left running.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"a cluster runs on this folder already: {self._data} (fuser {lock.name})"
            ) from None
        self._layout = lay_out(
            self._data,
            gateways=self._gateways,
            port=self._port,
            models=self._models,
            threads=self._threads,
            servers=self._servers,
            generators=self._generators,
            inherited=(lock.fileno(),),
            http=self._http,
        )
        self._parts = {part.name: part for stage in self._layout.stages for part in stage}
        self.restarts = dict.fromkeys(self._parts, 0)

    async def _start(self, parts: Sequence[Part]) -> None:
        """Starts some together, and has each kept running from then on."""
        starting = [
            asyncio.create_task(part.process.start(part.probe, timeout_s=START_LIMIT_S))
            for part in parts
        ]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            raise
        self._keepers += [asyncio.create_task(self._keep(part)) for part in parts]

    async def _keep(self, part: Part) -> None:
        """Starts a process again whenever it has ended; ends only by being cancelled."""
        pause_s, since = FIRST_PAUSE_S, time.monotonic()
        while True:
            # A child's end is no event of the loop.
            while part.process.is_running:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            if time.monotonic() - since > STEADY_S:
                pause_s = FIRST_PAUSE_S
            self._tell(f"{part.name} ended ({part.process.ending}), started again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self.restarts[part.name] += 1
            since = time.monotonic()
            try:
                await part.process.start(part.probe, timeout_s=START_LIMIT_S)
            except ProcessFailed:
                # What it said last stands in its log; how it ended is told next.
                self._tell(f"{part.name} did not start")
            else:
                self._tell(f"{part.name} works again after {time.monotonic() - since:.1f} s")

    async def _check_gateways(self) -> None:
        await asyncio.gather(*map(_check_whole, self.addresses))

    async def _leave(self) -> None:
        """Starts nothing again from now on."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers.clear()

    async def _forget(self) -> None:
        await self._leave()
        self._open.close()


async def _check_whole(address: str) -> None:
    """Asks a gateway for what takes every part but the inversion."""
    async with connect(address) as channel:
        gateway: Any = collage_service_pb2_grpc.CollageServiceStub(channel)  # type: ignore[no-untyped-call]
        await gateway.ListJobs(collage_service_pb2.ListJobsRequest(), timeout=CHECK_S)
        listed = await gateway.ListModels(collage_service_pb2.ListModelsRequest(), timeout=CHECK_S)
        side = listed.models[0].native_side
        size = collage_pb2.Size(width=side, height=side)
        layer = collage_pb2.Layer(name="pixel", text="box", image=blob_pb2.Image(data=_PIXEL))
        collage = collage_pb2.Collage(size=size, prompt="a {pixel}", layers=[layer])
        plan = collage_service_pb2.PlanCollageRequest(collage=collage)
        await gateway.PlanCollage(plan, timeout=CHECK_S)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


async def serve(cluster: Cluster, *, tell: Callable[[str], None]) -> int:
    """Runs until SIGTERM or SIGINT, a second of which does not wait for anybody; the exit code.

    `tell` hears of the way; the table of what runs where goes to standard output.
    """
    asked, urged = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (urged if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    tell("starting; the generator takes a while to read its model")
    starting = asyncio.create_task(cluster.start())
    try:
        if not await _finished(starting, asked):
            return 0
        starting.result()
    except (OSError, ProcessFailed) as error:
        sys.stderr.write(f"collage cluster: {error}\n")
        return 1
    tell(cluster.table())
    tell(f"ready: collage generate PATH --out DIR --server {cluster.addresses[0]}")
    await asked.wait()
    tell("stopping: gateways, services, storage")
    if not await _finished(asyncio.create_task(cluster.stop()), urged):
        cluster.kill_all()
    tell("stopped")
    return 0


async def _finished(task: asyncio.Task[None], event: asyncio.Event) -> bool:
    """Whether the task ended before the event; cancelled where it did not."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        return True
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return False
