"""What is broken off costs a model server nothing.

A Triton server runs the networks of a system in this process. After some pictures on it, jobs are cancelled and
deadlines pass, each at a random moment of its drawing, several at a time. Then a system that has stored nothing draws
the same pictures on the same server:

    digests   they are those of before, byte for byte
    memory    the server and its stages' processes together take at most 1.1 times what they took before
    shared    as many shared-memory regions as before, and none once the server has ended

    python -m benchmarks.cancels --cancels 500 --deadlines 100 --pictures 20
"""

import argparse
import asyncio
import collections
import functools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import grpc

from benchmarks.chaos import distinct_works
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from collage_client import AsyncCollageClient
from local import embedded, triton
from services.common.rpc import connect
from services.common.settings import variable
from testing.servers import TritonServer, stage_processes, triton_server

MEMORY_BAR = 1.1
AT_ONCE = 4


async def drawn(address: str, works: Sequence[pb.GenerateWork]) -> tuple[list[list[str]], float]:
    """Digests of every picture of each work, and the seconds of the median one, one after the other."""
    digests, seconds = [], []
    async with AsyncCollageClient(address) as client:
        for work in works:
            start_s = time.monotonic()
            job = await client.generate(work.collage, work.sampling)
            events = [event async for event in job]
            seconds.append(time.monotonic() - start_s)
            digests.append([each.image.blob.sha256 for each in events if each.HasField("image")])
    return digests, statistics.median(seconds)


async def cancelled(address: str, work: pb.GenerateWork, after_s: float) -> str:
    """How a job ended that is cancelled so long after it was sent."""
    async with AsyncCollageClient(address) as client:
        job = await client.create_job(work)
        await asyncio.sleep(after_s)
        await client.cancel(job.name)
        async for event in client.watch(job.name):
            if event.WhichOneof("kind") in ("done", "failed", "cancelled"):
                return str(event.WhichOneof("kind"))
    return "no end"


async def overdue(address: str, work: pb.GenerateWork, after_s: float) -> str:
    """How a call ended whose deadline is so long after it was sent; its job goes with it."""
    async with connect(address) as channel:
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)
        request = pb.GenerateImagesRequest(
            collage=work.collage,
            sampling=work.sampling,
            on_disconnect=pb.DISCONNECT_POLICY_CANCEL,
        )
        try:
            async for _ in stub.GenerateImages(request, timeout=after_s):
                pass
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
    return "done"


async def all_of(tries: Sequence[Callable[[], Awaitable[str]]]) -> collections.Counter[str]:
    """How each ended, a few at a time."""
    waiting = collections.deque(tries)
    ends = collections.Counter[str]()

    async def work() -> None:
        while waiting:
            ends[await waiting.popleft()()] += 1

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return ends


def held_bytes(server: TritonServer) -> int:
    """What the server and its stages' processes take, shared pages in shares."""
    pids = [server.process.pid, *stage_processes(server.process.pid)]
    lines = [
        line
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Pss:")
    ]
    return sum(int(line.split()[1]) * 1024 for line in lines)


def regions() -> list[str]:
    """Shared memory of all servers of ours that are here."""
    return sorted(each.name for each in triton.SHARED.glob(f"{triton.PREFIX}_*"))


async def run(args: argparse.Namespace, folder: Path) -> int:
    """The whole benchmark; answers the exit code."""
    rng = random.Random(args.seed)
    works = distinct_works(args.pictures, rng, side=64)
    wrong = []
    async with triton_server(folder / "triton", "") as server:
        os.environ[variable("stages")] = f"triton:{server.url}"
        system = await embedded.start(folder / "before", threads=1)
        try:
            before, seconds = await drawn(system.address, works)
            memory, shared = held_bytes(server), regions()
            print(f"{args.pictures} works on a fresh server: {seconds:.2f} s each", flush=True)
            kinds = [cancelled] * args.cancels + [overdue] * args.deadlines
            rng.shuffle(kinds)
            broken = distinct_works(len(kinds), rng, side=64)
            tries = [
                functools.partial(kind, system.address, work, rng.uniform(0, AT_ONCE * seconds))
                for kind, work in zip(kinds, broken, strict=True)
            ]
            ends = await all_of(tries)
            print("broken off: " + ", ".join(f"{n} {end}" for end, n in sorted(ends.items())))
            wrong += [f"{n} ended {end}" for end, n in ends.items() if end in ("failed", "no end")]
        finally:
            await system.stop()
        system = await embedded.start(folder / "after", threads=1)
        try:
            after, _ = await drawn(system.address, works)
        finally:
            await system.stop()
        ratio = held_bytes(server) / memory
        print(f"memory: {memory / 2**20:.0f} MiB, then {ratio:.3f} times (bar: {MEMORY_BAR})")
        print(f"shared regions: {len(shared)}, then {len(regions())}")
        wrong += ["other pictures than before"] * (after != before)
        wrong += ["more memory than allowed"] * (ratio > MEMORY_BAR)
        wrong += ["a shared region more"] * (len(regions()) > len(shared))
    left = [each for each in regions() if each in shared]
    print(f"after the server's end: {len(left)}")
    wrong += ["shared regions are left"] * bool(left)
    print(*wrong or ["every bar holds"], sep="\n")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cancels", type=int, default=500)
    parser.add_argument("--deadlines", type=int, default=100)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
