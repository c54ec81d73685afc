"""The server that a command leaves behind for the next one: how it is found or started, and how it runs.

Main functions: `reach`, for a command; `main`, the process itself (`python -m local.background`), which ends when no
command has used it for a while and no job is at work; `own`, where a command is the server's process. The process
listens on sockets in a folder of its owner alone. Nothing of the services is imported before it runs them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from collage.v1 import collage_service_pb2 as pb
from collage.v1 import collage_service_pb2_grpc
from local.residence import Kind, Occupied, Residence, Resident, code, model_key, seen, sockets
from local.variables import settings
from services.common.settings import CommandSettings, InvalidSetting

if TYPE_CHECKING:
    from local.embedded import Embedded

# The one before may still be draining.
HOLD_S = 30.0
# Seconds between two looks at whether anybody needs the server, at most.
LOOK_S = 5.0
CALL_S = 10.0
# Seconds between two looks at a server that is waited for.
_WAIT_S = 0.2
# Of the log that a failed start shows.
_LOG_LINES = 12


class StartFailed(Exception):
    """The server did not start; `is_setting`: for what the user asked, not for what happened."""

    def __init__(self, message: str, *, is_setting: bool) -> None:
        super().__init__(message)
        self.is_setting = is_setting


@asynccontextmanager
async def reach(
    data: Path,
    model: str | None,
    *,
    idle_s: float,
    tell: Callable[[str], None],
    takes_up: bool = False,
) -> AsyncIterator[str]:
    """The address of a server of this data folder for this model, kept alive for as long as the context is entered.

    One that is there is used again where it is of the same code, files, model and machine settings. One that is not and
    that nobody uses is told to end; one that somebody uses is waited for.

    Args:
        data: the data folder.
        model: see `embedded.start`; None for whichever is served, or else the bundled one.
        idle_s: how long a server that is started here outlives its last command.
        tell: hears what takes time.
        takes_up: whether one that is started here goes on with the jobs that an earlier one left: where somebody still
            waits for them.

    Raises:
        Occupied: a server of somebody's own lives here and is another one.
        StartFailed: it did not start.
        OSError: the folder cannot be used.
    """
    residence = Residence(data)
    key = None if model is None else model_key(model)
    is_told = False
    async with AsyncExitStack() as use:
        while True:
            async with residence.choosing():
                resident = residence.resident()
                if resident is None and not residence.is_occupied():
                    tell(
                        f"starting a server, data in {data}; it stays for the next command and ends after "
                        f"{idle_s / 60:g} idle minutes (`collage server stop` ends it now)"
                    )
                    resident = await _spawned(residence, key or "", idle_s, takes_up=takes_up)
                elif resident is not None and not resident.serves(key):
                    if await make_way(residence):
                        tell(
                            "the server at hand was of another model, or of other code or files: ended"
                        )
                        continue
                    resident = None
                if resident is not None:
                    use.enter_context(residence.using())
                    break
            if not is_told:
                tell(f"waiting for another server that works with {data}")
                is_told = True
            await asyncio.sleep(_WAIT_S)
        yield resident.address


@asynccontextmanager
async def own(
    data: Path,
    model: str,
    *,
    kind: Kind,
    address: str,
    threads: int,
    level: str,
    tell: Callable[[str], None],
) -> AsyncIterator[Embedded]:
    """A server in this process, the only one of its data folder: `collage serve`, or a command that leaves none behind.

    Args:
        data: the data folder.
        model: see `embedded.start`, as `address` and `threads`.
        kind: "serve" or "call".
        address: of the gateway.
        threads: of one operation.
        level: of what is logged, where `COLLAGE_LOG_LEVEL` says nothing.
        tell: hears what takes time.

    Raises:
        Occupied: another server lives there and is in use.
        InvalidSetting: the model is none, or a variable is wrong.
    """
    chosen = settings(CommandSettings)
    residence, inputs = Residence(data), seen(code())
    async with residence.choosing():
        await make_way(residence)
    if residence.is_occupied():
        tell(f"waiting for another server that works with {data}")
    async with residence.held(wait_s=HOLD_S):
        tell(f"starting a server, data in {data} (the model is loaded and tried once)")
        from local import embedded
        from services.common.telemetry import start_logging

        start_logging(kind, level=chosen.log_level or level)
        async with embedded.living(
            residence, kind=kind, inputs=inputs, address=address, model=model, threads=threads
        ) as server:
            yield server


async def make_way(residence: Residence) -> bool:
    """Ends the server that lives here if it was left by a command and nobody uses it; within `choosing`.

    Returns whether it did.

    Raises:
        Occupied: it is somebody's own.
    """
    resident = residence.resident()
    if resident is None:
        return False
    if resident.kind == "serve":
        raise Occupied(
            f"`collage serve` (pid {resident.pid}) works with {residence.data}, on {resident.address}, with another "
            "model or other code: --server uses it, --data names another folder"
        )
    if resident.kind != "background" or residence.is_used():
        return False
    await residence.stop(resident)
    return True


async def _spawned(residence: Residence, model: str, idle_s: float, *, takes_up: bool) -> Resident:
    """Starts the process and returns what it says of itself once it is ready; within `choosing`."""
    command = (sys.executable, "-m", "local.background", "--data", str(residence.data))
    number = os.open(residence.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(number, "w") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 it is waited for below, by its first line
            (
                *(*command, "--model", model, "--idle-s", str(idle_s)),
                *(["--take-up"] if takes_up else []),
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            # A Ctrl-C is for the command alone, and so is the end of its terminal.
            start_new_session=True,
            # What this process imports, from wherever it was started.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), process.stdout
    )
    try:
        line = await reader.readline()
    finally:
        transport.close()
    if not line:
        tail = residence.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        raise StartFailed("\n".join(["the server did not start:", *tail]), is_setting=False)
    told = json.loads(line)
    if "error" in told:
        raise StartFailed(told["error"], is_setting=told["is_setting"])
    resident = residence.resident()
    if resident is None:
        raise StartFailed("the server ended as soon as it was ready", is_setting=False)
    return resident


async def _run(
    data: Path,
    model: str,
    idle_s: float,
    report: Callable[[dict[str, object]], None],
    *,
    takes_up: bool,
) -> None:
    """The process: serves until it is told to stop, a service fails, or nobody needs it."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    chosen = settings(CommandSettings)
    # Before anything is imported: what is changed from now on is another server's.
    inputs = seen(code())
    residence = Residence(data)
    async with residence.held(wait_s=HOLD_S):
        from local import embedded
        from services.common.telemetry import start_logging

        start_logging("background", level=chosen.log_level or "WARNING")
        folder = sockets()
        try:
            async with embedded.living(
                residence,
                kind="background",
                inputs=inputs,
                sockets=folder,
                model=model,
                takes_up=takes_up,
            ) as server:
                report({"ready": server.address})
                ends = [
                    asyncio.create_task(stopped.wait()),
                    asyncio.create_task(server.failed()),
                    asyncio.create_task(_unneeded(residence, server.address, idle_s)),
                ]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in ends:
                    task.cancel()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


async def _unneeded(residence: Residence, address: str, idle_s: float) -> None:
    """Returns when no command has used the server for so long, no job is at work, and none can find it any more.

    Also when the data folder is gone.
    """
    # What starts a server has imported this; what only looks for one need not wait for it.
    from services.common.rpc import connect

    async with connect(address) as channel:
        stub = collage_service_pb2_grpc.CollageServiceStub(channel)  # type: ignore[no-untyped-call]
        while True:
            await asyncio.sleep(min(LOOK_S, max(0.2, idle_s / 4)))
            if not residence.is_home():
                return
            if residence.idle_s() < idle_s:
                continue
            newest = await stub.ListJobs(pb.ListJobsRequest(page_size=100), timeout=CALL_S)
            at_work = (pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING)
            if not any(job.state in at_work for job in newest.jobs) and residence.retire():
                return


def main() -> None:
    """`python -m local.background`: one line of JSON on standard output when it is ready or did not start."""
    parser = argparse.ArgumentParser(prog="python -m local.background")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--idle-s", type=float, required=True)
    parser.add_argument("--take-up", action="store_true")
    args = parser.parse_args()
    # Whoever started this reads one line; what else is printed is for the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(line: dict[str, object]) -> None:
        # It may be gone by now; the next command finds the server all the same.
        with suppress(BrokenPipeError):
            answers.write(f"{json.dumps(line)}\n")
            answers.close()

    try:
        asyncio.run(_run(args.data, args.model, args.idle_s, report, takes_up=args.take_up))
    except InvalidSetting as error:
        report({"error": str(error), "is_setting": True})
    except OSError as error:
        report({"error": str(error), "is_setting": False})
        raise


if __name__ == "__main__":
    main()
