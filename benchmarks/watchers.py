"""What watching costs: 1,000 watchers of 100 jobs on one gateway, over real gRPC, on SQLite and on a NATS server.

    python -m benchmarks.watchers [--watchers 1000] [--jobs 100] [--rate 100] [--seconds 20]

The gateway is a process of its own, the watchers another one. Half of the jobs are worked on in the gateway's process,
the other half in the watchers', as by a second gateway. For each store it prints

    cost      statements (SQLite) or messages (NATS, both ways) of the gateway for one event of a job with ten watchers,
              alone and beside all the others
    delay     from an event's writing to its arrival at each watcher, p50, p99 and the longest, while `rate` events are
              written every second: those written in the gateway, and those written elsewhere
    memory    of the gateway for each watcher
    GetJob    of a job that is done and whose log has 300 events, previews among them

Exits 1 when a watcher missed an event, a cost grows by more than 1 with the watchers of other jobs, a delay's p99 is
above 250 ms, or the median of GetJob above 20 ms.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gateway.__main__ as gateway
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from gateway.jobs import Claim, Jobs, JobState
from gateway.jobs.nats import NatsJobs
from gateway.jobs.sqlite import SqliteJobs
from services.common.rpc import connect
from services.common.telemetry import start_logging
from testing.servers import nats_server

LIMIT_DELAY_S, LIMIT_GET_S = 0.25, 0.02
LIMIT_GROWTH = 1.0
COUNTED = 50
LOGGED = 300
PREVIEW_BYTES = 20_000
# Longer than the benchmark: nobody extends.
LEASE_S = 600.0
STEP = pb.JobEvent(step=pb.Step(step=1, total=50)).SerializeToString()


class Writer:
    """A worker as far as the log is concerned: claims jobs and appends events."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self.claims: list[Claim] = []
        self._statements = 0

    async def take(self, count: int) -> list[str]:
        """So many new jobs, claimed, each with a first event; their ids."""
        ids = []
        for _ in range(count):
            await self.jobs.submit(str(uuid.uuid4()), b"body")
            claim = await self.jobs.claim("benchmark", wait_s=10)
            assert claim is not None, "a job was just queued"
            await self.jobs.append(claim, STEP)
            self.claims.append(claim)
            ids.append(claim.job.id)
        return ids

    async def write(self, count: int, rate: float, *, first_only: bool) -> None:
        """Events in turn over the jobs, so many a second; 0: as fast as it goes."""
        began = time.monotonic()
        for number in range(count):
            claim = self.claims[0 if first_only else number % len(self.claims)]
            await self.jobs.append(claim, STEP)
            if rate:
                await asyncio.sleep(max(0.0, began + (number + 1) / rate - time.monotonic()))

    async def meter(self) -> None:
        """Counts SQLite's statements from now on."""
        if isinstance(self.jobs, SqliteJobs):
            database = self.jobs._database
            await database.run(lambda: database._connection.set_trace_callback(self._count))

    def cost(self) -> int:
        """Statements, or messages in both directions, so far."""
        if isinstance(self.jobs, NatsJobs):
            stats = self.jobs._stream.client.stats
            return int(stats["in_msgs"] + stats["out_msgs"])
        return self._statements

    def _count(self, statement: str) -> None:
        # The look for what other processes wrote is one for all, whoever waits.
        self._statements += "data_version" not in statement

    async def end(self, number: int) -> str:
        """Fills the log of a job and ends it; the job's name."""
        claim = self.claims[number]
        preview = pb.JobEvent(preview=pb.Preview(step=1, png=os.urandom(PREVIEW_BYTES)))
        for each in range(LOGGED):
            await self.jobs.append(claim, STEP if each % 10 else preview.SerializeToString())
        image = pb.GeneratedImage(index=0, seed=1, blob={"sha256": "0" * 64})
        told = pb.Job(images=[image]).SerializeToString()
        done = pb.JobEvent(done=pb.Done()).SerializeToString()
        await self.jobs.finish(claim, JobState.DONE, done, result=told)
        return f"jobs/{claim.job.id}"


async def serve(where: str, folder: Path) -> None:
    """The gateway's process: serves, and does what it is told on standard input, a line of JSON each."""
    start_logging("watchers", level="ERROR")
    settings = gateway.Settings(
        address="127.0.0.1:0",
        blobs=f"folder:{folder / 'blobs'}",
        jobs=where,
        slots=0,
        lease_s=LEASE_S,
        max_queued=100_000,
    )
    opened: list[Jobs] = []
    open_jobs = gateway.open_jobs

    async def noted(settings: gateway.Settings) -> Jobs:
        opened.append(await open_jobs(settings))
        return opened[-1]

    gateway.open_jobs = noted
    server = await gateway.build(settings)
    await server.start()
    writer = Writer(opened[0])
    await writer.meter()
    print(json.dumps(server.address), flush=True)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    while line := await lines.readline():
        verb, *words = json.loads(line)
        answer: Any = None
        match verb:
            case "take":
                answer = await writer.take(*words)
            case "write":
                await writer.write(words[0], words[1], first_only=False)
            case "cost":
                before = writer.cost()
                await writer.write(COUNTED, 0, first_only=True)
                await asyncio.sleep(0.5)
                answer = (writer.cost() - before) / COUNTED
            case "end":
                answer = await writer.end(*words)
            case "memory":
                answer = resident_bytes()
        print(json.dumps(answer), flush=True)
    await server.stop(drain_s=0)


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Gateway:
    """The gateway's process as its parent sees it."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, where: str, folder: Path) -> AsyncIterator["Gateway"]:
        """Starts one on the queue `where`, and ends it with the context."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.watchers", "--serve", where, str(folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert process.stdout is not None
        try:
            yield cls(process, json.loads(await process.stdout.readline()))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()

    async def tell(self, *words: Any) -> Any:
        """Its answer to one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        return json.loads(await self._process.stdout.readline())


class Watchers:
    """Streams of WatchJob, all in this process."""

    def __init__(self, stub: collage_service_pb2_grpc.CollageServiceStub) -> None:
        self._stub = stub
        self._tasks: list[asyncio.Task[None]] = []
        self.heard = 0
        # While set: seconds from writing to arrival, by job.
        self.delays: dict[str, list[float]] | None = None

    async def watch(self, job: str, count: int) -> None:
        """So many more watchers of a job; returns when each has its first event."""
        before, self.heard = self.heard, 0
        started = [asyncio.Event() for _ in range(count)]
        self._tasks += [asyncio.create_task(self._watch(job, event)) for event in started]
        await asyncio.gather(*(event.wait() for event in started))
        self.heard += before

    async def _watch(self, job: str, started: asyncio.Event) -> None:
        async for answer in self._stub.WatchJob(pb.WatchJobRequest(name=f"jobs/{job}")):
            if answer.event.HasField("queued"):
                continue
            started.set()
            self.heard += 1
            if self.delays is not None:
                written = answer.event.time.ToNanoseconds() / 1e9
                self.delays.setdefault(job, []).append(time.time() - written)

    async def close(self) -> None:
        """Hangs up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(where: str, args: argparse.Namespace, folder: Path) -> bool:
    """One store; whether every bar holds."""
    each = max(1, args.watchers // args.jobs)
    settings = gateway.Settings(jobs=where, lease_s=LEASE_S, max_queued=100_000)
    async with Gateway.running(where, folder) as server, connect(server.address) as channel:
        here = await server.tell("take", args.jobs // 2)
        elsewhere = Writer(await gateway.open_jobs(settings))
        there = await elsewhere.take(args.jobs - len(here))
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)
        watchers = Watchers(stub)
        await watchers.watch(here[0], each)
        alone = await server.tell("cost")
        before = await server.tell("memory")
        for job in [*here[1:], *there]:
            await watchers.watch(job, each)
        await asyncio.sleep(2)
        count = each * (args.jobs - 1)
        a_watcher = (await server.tell("memory") - before) / count
        beside = await server.tell("cost")

        watchers.heard, watchers.delays = 0, {}
        events = int(args.rate * args.seconds / 2)
        began = time.monotonic()
        await asyncio.gather(
            server.tell("write", events, args.rate / 2),
            elsewhere.write(events, args.rate / 2, first_only=False),
        )
        rate = 2 * events / (time.monotonic() - began)
        await asyncio.sleep(1)
        expected, heard = 2 * events * each, watchers.heard
        delays = watchers.delays
        watchers.delays = None

        name = await server.tell("end", 1)
        times = []
        for _ in range(50):
            start = time.perf_counter()
            told = await stub.GetJob(pb.GetJobRequest(name=name))
            times.append(time.perf_counter() - start)
            assert len(told.job.images) == 1
        await watchers.close()
        await elsewhere.jobs.close()

    kind = "statements" if where.startswith("sqlite") else "messages"
    print(f"{where.partition(':')[0]}: {each * args.jobs} watchers of {args.jobs} jobs")
    print(f"  cost      {alone:6.2f} {kind} an event with {each} watchers of its job")
    print(f"            {beside:6.2f} beside {count} watchers of other jobs")
    holds = beside <= alone + LIMIT_GROWTH and heard == expected
    print(f"  delay     {heard} of {expected} arrived, {rate:.0f} events a second")
    for text, ids in (("written in the gateway", here), ("written elsewhere", there)):
        all_s = sorted(one for job in ids for one in delays.get(job, ()))
        p50, p99 = (1000 * all_s[int(q * (len(all_s) - 1))] for q in (0.5, 0.99))
        holds &= p99 <= 1000 * LIMIT_DELAY_S
        print(
            f"            p50 {p50:6.1f} ms, p99 {p99:6.1f} ms, longest {1000 * all_s[-1]:6.1f} ms, {text}"
        )
    print(f"  memory    {a_watcher / 1024:6.1f} KiB a watcher")
    get_s = statistics.median(times)
    holds &= get_s <= LIMIT_GET_S
    print(
        f"  GetJob    {1000 * get_s:6.1f} ms (longest of 50 {1000 * max(times):.1f}), {LOGGED} events logged"
    )
    return holds


async def main(args: argparse.Namespace) -> int:
    start_logging("watchers", level="ERROR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        holds = await measure(f"sqlite:{folder / 'jobs.sqlite'}", args, folder)
        (folder / "nats").mkdir()
        async with nats_server(folder / "nats") as server:
            holds &= await measure(server.url, args, folder)
    print("every bar holds" if holds else "MISSED")
    return 0 if holds else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--rate", type=float, default=100, help="events a second, over all jobs")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--serve", nargs=2, metavar=("JOBS", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.serve[0], Path(chosen.serve[1])))
    else:
        sys.exit(asyncio.run(main(chosen)))
