"""Bar 8: no job is lost, doubled or changed, whichever process dies.

First every distinct request is done once on a cluster where nothing happens. Then, on a fresh cluster with two
gateways, several clients send all jobs (each distinct request under two request ids) while every few seconds one
process, drawn among all, NATS and SeaweedFS included, is killed with SIGKILL. Afterwards, when everything runs again:

    done      every job's state is DONE
    single    as many jobs are listed as were sent, and sending each again under its id answers the same job
    log       each job's log has one terminal event, as its last entry, and one image event an index
    digests   the pictures are those of the undisturbed run, byte for byte, and can be downloaded

A client sends a request again under its id when the service stays unavailable for longer than the library waits. Exit
code 1 when anything of this does not hold.

    python -m benchmarks.chaos --jobs 200 --clients 16 --kill-every 4 --seed 0

With `--servers N` the generators' networks are on Triton servers, and what is killed is one of these, of their stages'
processes or of the generators. Each request is sent once, and answered U-Net calls are counted, as generators tell of
them five times a second; to these comes, for each server or stage killed, one that each generator may have lost:

    calls     at most 1.1 times as many as undisturbed

    python -m benchmarks.chaos --servers 2 --generators 2 --jobs 60 --clients 8 --kill-every 6
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import hashlib
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nats

from collage.v1 import blob_pb2, collage_pb2
from collage.v1 import collage_service_pb2 as pb
from collage_client import AsyncCollageClient, Full, NotFound, Unavailable
from gateway.jobs import JobState
from gateway.jobs.nats_log import Logged, NatsLog
from gateway.jobs.nats_stream import JetStream
from local.cluster import Cluster
from services.common.settings import variable
from testing.servers import stage_processes

ART = Path(__file__).parents[1] / "examples" / "art"
# Pictures, and words that the toy model spells in one token.
CUTOUTS = {
    "sushi-noto.png": "sushi",
    "birthday-cake-fluent.png": "cake",
    "lemon-flat.png": "lemon",
    "rice-ball-fluent.png": "rice",
    "bento-box-noto.png": "box",
}
GATEWAYS = 2
# What stands between a server's name and the word, where one of its stages' processes is meant.
STAGE = "'s "
# No job takes that long; one that does is lost.
JOB_LIMIT_S = 600.0
# U-Net calls of generators that were answered; at most so many times the undisturbed ones.
CALLS = re.compile(r"^collage_generator_step_seconds_count\{.*\} ([0-9.e+]+)$", re.M)
MOST_CALLS = 1.1
COUNT_EVERY_S = 0.2
# A client's pause before it sends an unanswered request again.
PAUSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job to send. `request` is the number of the distinct request it repeats."""

    request: int
    request_id: str
    work: pb.GenerateWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a client saw of a job: digests of its pictures by index, seconds from sending to the last event."""

    job: str
    digests: dict[int, str]
    seconds: float
    sent: int


@dataclass(slots=True)
class Verdict:
    """Violations found, in words."""

    violations: list[str] = field(default_factory=list)

    def expect(self, holds: bool, text: str) -> None:
        """Notes a violation unless the condition holds."""
        if not holds:
            self.violations.append(text)


def distinct_works(count: int, rng: random.Random, *, side: int) -> list[pb.GenerateWork]:
    """Small collages, each with another arrangement, seed, number of steps and of pictures."""
    works = []
    for _ in range(count):
        chosen = rng.sample(sorted(CUTOUTS), rng.randint(2, 3))
        layers = [
            collage_pb2.Layer(
                name=f"layer{number}",
                text=CUTOUTS[name],
                image=blob_pb2.Image(data=(ART / name).read_bytes()),
                transform=collage_pb2.Transform(
                    x=rng.uniform(0.2, 0.8) * side,
                    y=rng.uniform(0.2, 0.8) * side,
                    scale=rng.uniform(0.2, 0.4) * side / 128,
                    rotation=rng.uniform(-20, 20),
                ),
            )
            for number, name in enumerate(chosen)
        ]
        prompt = " and ".join(f"a {{{layer.name}}}" for layer in layers) + " on the table"
        works.append(
            pb.GenerateWork(
                collage=collage_pb2.Collage(
                    size=collage_pb2.Size(width=side, height=side), prompt=prompt, layers=layers
                ),
                sampling=collage_pb2.Sampling(
                    steps=rng.randint(4, 8),
                    images=rng.choice((1, 1, 1, 2)),
                    seed=rng.getrandbits(32),
                ),
            )
        )
    return works


async def send(client: AsyncCollageClient, order: Order) -> Outcome:
    """Sends one job and follows it to its end, over every break."""
    start, sent = time.monotonic(), 0
    while True:
        sent += 1
        digests: dict[int, str] = {}
        sequence, job = 0, ""
        try:
            following = await client.generate(
                order.work.collage,
                order.work.sampling,
                request_id=order.request_id,
                timeout_s=JOB_LIMIT_S,
            )
            async for event in following:
                if event.HasField("queued"):  # no part of the log
                    continue
                assert event.sequence > sequence, "events come in order"
                sequence, job = event.sequence, event.job
                kind = event.WhichOneof("kind")
                if kind == "image":
                    digests[event.image.index] = event.image.blob.sha256
                if kind in ("failed", "cancelled"):
                    raise RuntimeError(f"{event.job} {kind}: {getattr(event, kind).message}")
            return Outcome(job=job, digests=digests, seconds=time.monotonic() - start, sent=sent)
        except (Unavailable, Full):
            if time.monotonic() - start > JOB_LIMIT_S:
                raise
            await asyncio.sleep(PAUSE_S)


async def send_all(
    addresses: Sequence[str], orders: Sequence[Order], *, clients: int
) -> tuple[dict[str, Outcome], list[str]]:
    """All jobs through so many clients, each of which knows every gateway; outcomes by request id, and failures."""
    waiting = collections.deque(orders)
    outcomes: dict[str, Outcome] = {}
    failures: list[str] = []

    async def work(number: int) -> None:
        # Each client has a favourite gateway and falls back on the others.
        turned = [addresses[(number + k) % len(addresses)] for k in range(len(addresses))]
        async with AsyncCollageClient(f"ipv4:{','.join(turned)}") as client:
            while waiting:
                order = waiting.popleft()
                try:
                    outcomes[order.request_id] = await send(client, order)
                except Exception as error:
                    failures.append(f"request {order.request_id}: {type(error).__name__}: {error}")
                if sys.stderr.isatty():
                    print(f"\r{len(outcomes)} of {len(orders)}", end="", file=sys.stderr)

    await asyncio.gather(*(work(number) for number in range(clients)))
    return outcomes, failures


async def kill_now_and_then(
    cluster: Cluster,
    kills: collections.Counter[str],
    rng: random.Random,
    *,
    every_s: float,
    only_serving: bool,
) -> None:
    """Kills one of what `kills` names every half to one and a half times `every_s`, until cancelled, in shuffled turns.

    `only_serving`: what is down has its turn later. Model servers take longer to start than it is between two kills.
    """
    while True:
        for name in rng.sample(sorted(kills), len(kills)):
            await asyncio.sleep(every_s * rng.uniform(0.5, 1.5))
            if not only_serving or await cluster.serves(name.partition(STAGE)[0]):
                kills[name] += kill(cluster, name, rng)


def kill(cluster: Cluster, name: str, rng: random.Random) -> bool:
    """Kills a process, or one of the processes that a Triton server has for its stages; whether it was there."""
    server, _, is_stage = name.partition(STAGE)
    if not is_stage:
        cluster.kill(name)
        return True
    running = stage_processes(cluster.pid(server))
    if not running:
        return False
    os.kill(rng.choice(running), signal.SIGKILL)
    return True


class Calls:
    """Counts the U-Net calls of a cluster's generators for jobs, over all their lives.

    Each of them draws the same to warm up before it serves, which is what a first look finds.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.total = 0.0
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._ports = ports

    async def count(self) -> None:
        """Asks now and then, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(COUNT_EVERY_S)

    async def look(self) -> None:
        """Asks once."""
        for port in self._ports:
            with contextlib.suppress(OSError):
                now = await asyncio.to_thread(self._told, port)
                first = self._first.setdefault(port, now)
                before = self._last.get(port, first)
                # One that was started anew begins with none.
                self.total += max(0.0, now - (before if now >= before else first))
                self._last[port] = max(now, first)

    @staticmethod
    def _told(port: int) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            return sum(map(float, CALLS.findall(answer.read().decode())))


async def check(
    cluster: Cluster, orders: Sequence[Order], outcomes: dict[str, Outcome], verdict: Verdict
) -> collections.Counter[int]:
    """Looks at the calm cluster; answers how many jobs took how many attempts."""
    async with AsyncCollageClient(f"ipv4:{','.join(cluster.addresses)}") as client:
        for order in orders:
            if order.request_id not in outcomes:
                continue
            outcome = outcomes[order.request_id]
            again = await client.create_job(order.work, request_id=order.request_id)
            verdict.expect(again.name == outcome.job, f"{outcome.job} doubled as {again.name}")
            for digest in outcome.digests.values():
                try:
                    data = await client.fetch(digest)
                    verdict.expect(hashlib.sha256(data).hexdigest() == digest, f"{digest} damaged")
                except NotFound:
                    verdict.expect(False, f"{outcome.job}: picture {digest} is lost")
        listed = await client.jobs(limit=2 * len(orders) + 1)
    verdict.expect(
        len(listed) == len(orders), f"{len(listed)} jobs are listed, {len(orders)} were sent"
    )
    names = {outcome.job for outcome in outcomes.values()}
    verdict.expect(len(names) == len(outcomes), "two requests share a job")
    for job in listed:
        state = pb.JobState.Name(job.state)
        verdict.expect(job.state == pb.JOB_STATE_DONE, f"{job.name} is {state}")
    await check_logs(cluster, orders, outcomes, verdict)
    return collections.Counter(job.attempts for job in listed)


async def check_logs(
    cluster: Cluster, orders: Sequence[Order], outcomes: dict[str, Outcome], verdict: Verdict
) -> None:
    """Reads each job's log as NATS holds it, beyond the terminal event where a watch would stop."""
    connection = await nats.connect(cluster.jobs)
    log = NatsLog(JetStream(connection, retry_s=30), name="collage")
    try:
        for order in orders:
            if order.request_id not in outcomes:
                continue
            outcome = outcomes[order.request_id]
            entries: list[Logged] = []
            behind = 0
            while page := await log.entries(outcome.job.removeprefix("jobs/"), behind=behind):
                entries += page
                behind = page[-1].position
            events = [each for each in entries if each.entry.kind == "event"]
            sequences = [each.entry.sequence for each in events]
            ends = [each for each in events if each.entry.state.is_final]
            last_is_end = bool(ends) and entries[-1] is ends[0]
            told = [pb.JobEvent.FromString(each.payload) for each in events]
            images = collections.Counter(
                event.image.index for event in told if event.WhichOneof("kind") == "image"
            )
            kinds = [
                event.WhichOneof("kind")
                for event in told
                if event.WhichOneof("kind") in ("done", "failed", "cancelled")
            ]
            name = outcome.job
            verdict.expect(sequences == list(range(1, len(events) + 1)), f"{name}: gap in the log")
            verdict.expect(len(ends) == 1 and last_is_end, f"{name}: {len(ends)} terminal events")
            verdict.expect(kinds == ["done"], f"{name} ended {kinds}")
            verdict.expect(
                all(each.entry.state is JobState.DONE for each in ends), f"{name}: not done"
            )
            wanted = dict.fromkeys(range(order.work.sampling.images), 1)
            verdict.expect(dict(images) == wanted, f"{name}: image events {dict(images)}")
    finally:
        await connection.close()


async def run(args: argparse.Namespace, folder: Path) -> int:
    """The whole benchmark; answers the exit code."""
    rng = random.Random(args.seed)
    distinct = args.jobs if args.servers else (args.jobs + 1) // 2
    works = distinct_works(distinct, rng, side=args.side)
    orders = [
        Order(
            request=number % distinct,
            request_id=str(uuid.UUID(int=rng.getrandbits(128), version=4)),
            work=works[number % distinct],
        )
        for number in range(args.jobs)
    ]
    models = "" if args.model is None else f"chosen={args.model}"
    if args.model == Path("toy"):
        # Torch is needed for nothing else here.
        from testing import toy

        models = f"toy={toy.mini(folder / 'model')}"
    shape = {
        "models": models,
        "threads": args.threads,
        "servers": args.servers,
        "generators": args.generators,
    }
    if args.servers:
        os.environ[variable("metrics_port")] = str(free_ports(32, rng))

    print(f"undisturbed: {distinct} requests", flush=True)
    calm = Cluster(folder / "calm", gateways=1, **shape)
    await calm.start()
    start = time.monotonic()
    try:
        async with counted(calm) as calm_calls:
            expected, failures = await send_all(
                calm.addresses, orders[:distinct], clients=min(4, args.clients)
            )
    finally:
        await calm.stop()
    calm_s = time.monotonic() - start
    if failures:
        print(*failures, sep="\n")
        return 1
    digests = {order.request: expected[order.request_id].digests for order in orders[:distinct]}

    print(f"disturbed: {args.jobs} jobs from {args.clients} clients", flush=True)
    verdict, kills = Verdict(), collections.Counter[str]()
    tell = print if args.verbose else _nothing
    cluster = Cluster(folder / "chaos", gateways=GATEWAYS, tell=tell, **shape)
    await cluster.start()
    kills.update(dict.fromkeys(victims(cluster), 0))
    try:
        start = time.monotonic()
        async with counted(cluster) as calls:
            killer = asyncio.create_task(
                kill_now_and_then(
                    cluster,
                    kills,
                    rng,
                    every_s=args.kill_every,
                    only_serving=bool(args.servers),
                )
            )
            outcomes, failures = await send_all(cluster.addresses, orders, clients=args.clients)
            chaos_s = time.monotonic() - start
            killer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await killer
        verdict.violations += failures
        await cluster.working()
        attempts = await check(cluster, orders, outcomes, verdict)
    finally:
        await cluster.stop()
    for order in orders:
        outcome = outcomes.get(order.request_id)
        verdict.expect(outcome is not None, f"request {order.request_id} has no outcome")
        verdict.expect(
            outcome is None or outcome.digests == digests[order.request],
            f"request {order.request_id}: other pictures than undisturbed",
        )
    for name, count in kills.items():
        verdict.expect(count > 0, f"{name} was never killed: raise --jobs or lower --kill-every")
    if args.servers:
        killed = sum(count for name, count in kills.items() if name.startswith("triton"))
        lost = args.generators * killed
        ratio = (calls.total + lost) / calm_calls.total
        print(
            f"U-Net calls: {calm_calls.total:.0f} undisturbed; {calls.total:.0f} disturbed and at most {lost} lost, "
            f"{ratio:.3f} times"
        )
        verdict.expect(ratio <= MOST_CALLS, f"{ratio:.3f} times the U-Net calls; {MOST_CALLS}")
    report(outcomes, attempts, kills, verdict, calm_s=calm_s, chaos_s=chaos_s, jobs=args.jobs)
    return 1 if verdict.violations else 0


def victims(cluster: Cluster) -> list[str]:
    """What is killed: everything, or, where there are model servers, these, their stages' processes, and generators."""
    servers = [name for name in cluster.names if name.startswith("triton")]
    if not servers:
        return list(cluster.names)
    drawing = [name for name in cluster.names if name.startswith("generator")]
    return [*servers, *(f"{name}{STAGE}stages" for name in servers), *drawing]


@contextlib.asynccontextmanager
async def counted(cluster: Cluster) -> AsyncIterator[Calls]:
    """Counts U-Net calls meanwhile; none where nobody tells of them."""
    calls = Calls([port for name, port in cluster.metrics.items() if name.startswith("generator")])
    await calls.look()
    counting = asyncio.create_task(calls.count())
    try:
        yield calls
        await calls.look()
    finally:
        counting.cancel()


def free_ports(count: int, rng: random.Random) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    while True:
        first = rng.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def report(
    outcomes: dict[str, Outcome],
    attempts: collections.Counter[int],
    kills: collections.Counter[str],
    verdict: Verdict,
    *,
    calm_s: float,
    chaos_s: float,
    jobs: int,
) -> None:
    print(f"\nundisturbed {calm_s:.0f} s, disturbed {chaos_s:.0f} s, {kills.total()} kills")
    for name, count in kills.items():
        print(f"  {name:<17} killed {count:3}")
    print("attempts a job: " + ", ".join(f"{n}: {attempts[n]}" for n in sorted(attempts)))
    seconds = sorted(outcome.seconds for outcome in outcomes.values())
    if seconds:
        p50, p99 = (seconds[min(len(seconds) - 1, int(q * len(seconds)))] for q in (0.5, 0.99))
        print(f"latency: p50 {p50:.1f} s, p99 {p99:.1f} s, longest {seconds[-1]:.1f} s")
    again = sum(outcome.sent > 1 for outcome in outcomes.values())
    print(f"requests sent again by the client: {again}")
    images = sum(len(outcome.digests) for outcome in outcomes.values())
    print(f"{len(outcomes)} of {jobs} jobs done, {images} pictures")
    for text in verdict.violations:
        print(f"VIOLATION {text}")
    print("FAILED" if verdict.violations else "PASSED: none lost, none doubled, none changed")


def _nothing(text: str) -> None:
    """A restart is expected here."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kill-every", type=float, default=4.0, metavar="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--servers", type=int, default=0, help="of Triton; 0: generators run their networks"
    )
    parser.add_argument("--generators", type=int, default=1)
    parser.add_argument("--side", type=int, default=128, help="canvas side, pixels")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="of the generator; several stall on a machine that has other work",
    )
    parser.add_argument(
        "--model", type=Path, help="model folder, or toy for one made here; default: bundled"
    )
    parser.add_argument("--data", type=Path, help="folder to keep data and logs in")
    parser.add_argument("--verbose", action="store_true", help="say what is started again")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.data or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return asyncio.run(run(args, folder))


if __name__ == "__main__":
    sys.exit(main())
