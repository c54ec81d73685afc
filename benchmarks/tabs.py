"""Twenty browsers on one server, their tabs killed and reloaded at random: what is lost, and what is drawn twice.

    python -m benchmarks.tabs [--tabs 20] [--seconds 120] [--seed 0]

`collage serve --http` runs in a process of its own, on a tiny untrained model, so that many jobs are drawn in the time.
Every browser draws again and again while its tab is reloaded, closed or crashed, some before the server has answered
that it has the job. Then all tabs are opened once more, and what the browsers hold is compared with the server's jobs
and their logs. Needs Chromium, node and studio/node_modules (`make studio`).

Bars: every version of every browser is done, with its pictures; each is one job, and the server has no other; the log
of each job has every step once; the server's memory at the end is at most 1.2 times of what it was after the first
quarter.
"""

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.siege import memory_bytes
from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from local.processes import free_port
from services.common.rpc import connect
from testing import toy

STUDIO = Path(__file__).parents[1] / "studio"
MEMORY_RATIO = 1.2
# After the last tab is closed: what is left is drawn, and every browser waits for its own.
ENDING_S = 300.0
LOOK_S = 2.0


def serve(
    folder: Path, ports: tuple[int, int] | None = None
) -> tuple[subprocess.Popen[bytes], tuple[int, int]]:
    """A running server on what lies in `folder`, and its ports: of gRPC and of the page.

    Args:
        folder: holds the tiny model, made where it is absent, and all that the server keeps.
        ports: those of a server before this one; None: free ones.
    """
    grpc_port, http_port = ports or (free_port(), free_port())
    model, log = folder / "toy", folder / "log"
    if not model.is_dir():
        toy.mini(model)
    command = [sys.executable, "-m", "collage_client.cli", "serve", "--data", str(folder / "data")]
    command += ["--model", str(model), "--threads", "1"]
    command += ["--address", f"127.0.0.1:{grpc_port}", "--http", f"127.0.0.1:{http_port}"]
    with log.open("ab") as output:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output)
    assert server.stdout is not None, "opened so"
    for line in server.stdout:
        if f"127.0.0.1:{http_port}" in line.decode():
            return server, (grpc_port, http_port)
    raise SystemExit(f"the server did not start: {log.read_text()}")


async def remembered(pid: int, seen: list[int]) -> None:
    """Notes what a process has in memory, again and again, until it is cancelled."""
    while True:
        seen.append(await asyncio.to_thread(memory_bytes, pid))
        await asyncio.sleep(LOOK_S)


async def logs(address: str) -> dict[str, list[pb.JobEvent]]:
    """All jobs of a server, by name, with their whole logs."""
    found: dict[str, list[pb.JobEvent]] = {}
    async with connect(address) as channel:
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)  # type: ignore[no-untyped-call]
        token = ""
        while True:
            request = pb.ListJobsRequest(page_size=100, page_token=token)
            page = await stub.ListJobs(request)
            for job in page.jobs:
                stream = stub.WatchJob(pb.WatchJobRequest(name=job.name), timeout=ENDING_S)
                found[job.name] = [answer.event async for answer in stream]
            token = page.next_page_token
            if not token:
                return found


def faults(versions: list[dict], jobs: dict[str, list[pb.JobEvent]]) -> Counter[str]:  # type: ignore[type-arg]
    """What went wrong, by kind; empty where every bar is held."""
    wrong: Counter[str] = Counter()
    for version in versions:
        if version["state"] != "done" or version["images"] == 0:
            wrong[f"lost: {version['state']}, {version.get('why')}"] += 1
    held = Counter(version.get("job") for version in versions)
    wrong["two versions of one job"] = sum(1 for times in held.values() if times > 1)
    wrong["jobs of no version"] = sum(1 for name in jobs if name not in held)
    wrong["versions of no job"] = sum(1 for name in held if name not in jobs)
    for events in jobs.values():
        steps = [event.step.step for event in events if event.WhichOneof("kind") == "step"]
        ends = [event for event in events if event.WhichOneof("kind") == "done"]
        if len(steps) != len(set(steps)) or len(ends) != 1:
            wrong["jobs drawn twice"] += 1
    return +wrong


async def draw(args: argparse.Namespace, folder: Path) -> int:
    """The whole course of it; 1 where a bar is missed."""
    server, (grpc_port, http_port) = serve(folder)
    address, url = f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}/"
    seen: list[int] = []
    looking = asyncio.create_task(remembered(server.pid, seen))
    asked = {"url": url, "tabs": args.tabs, "seconds": args.seconds, "seed": args.seed}
    asked["browser"] = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        process = await asyncio.create_subprocess_exec(
            *("node", "scripts/tabs.mjs", json.dumps(asked)),
            cwd=STUDIO,
            stdout=subprocess.PIPE,
        )
        output, _ = await asyncio.wait_for(process.communicate(), args.seconds + ENDING_S)
        looking.cancel()
        jobs = await logs(address)
    finally:
        looking.cancel()
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(server.wait, 60)
        server.kill()
    told = json.loads(output)
    wrong = faults(told["versions"], jobs)
    quarter = max(1, len(seen) // 4)
    ratio = seen[-1] / seen[quarter]
    steps = sum(1 for events in jobs.values() for e in events if e.WhichOneof("kind") == "step")
    print(
        f"{args.tabs} tabs, {args.seconds:g} s: {told['done']}\n"
        f"{len(told['versions'])} versions, {len(jobs)} jobs, {steps} steps drawn\n"
        f"faults: {dict(wrong) or 'none'}\n"
        f"memory {seen[quarter] / 2**20:.0f} MiB after a quarter, {max(seen) / 2**20:.0f} at most, "
        f"{seen[-1] / 2**20:.0f} at the end: {ratio:.2f} times (bar: {MEMORY_RATIO})"
    )
    return 1 if wrong or ratio > MEMORY_RATIO else 0


def main() -> int:
    """Prints what was drawn, lost and drawn twice; exits 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tabs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(draw(args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
