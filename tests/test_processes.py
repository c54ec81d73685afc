"""Child processes: what a start that fails says, and that every end has a bound."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from local.processes import Process, ProcessFailed, free_port, program


async def at_once() -> None:
    """A probe of a server that is always ready."""


async def never() -> None:
    raise ConnectionError("not yet")


def python(tmp_path: Path, code: str) -> Process:
    return Process("child", [sys.executable, "-u", "-c", code], log=tmp_path / "log" / "child.log")


async def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    process = python(tmp_path, "raise SystemExit('no such disk')")
    with pytest.raises(ProcessFailed, match="no such disk"):
        await process.start(never, timeout_s=20)
    assert not process.is_running


async def test_a_process_that_never_gets_ready_is_ended(tmp_path: Path) -> None:
    process = python(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ProcessFailed, match="not yet"):
        await process.start(never, timeout_s=0.2)
    assert not process.is_running


async def test_a_process_that_ignores_the_request_is_killed_with_its_children(
    tmp_path: Path,
) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', "
        "'import time\\nwhile True: print(1, flush=True); time.sleep(.02)'])\n"
        "time.sleep(60)\n"
    )
    process = python(tmp_path, code)

    async def child_speaks() -> None:
        if not process.log.read_bytes():
            raise ConnectionError("silent")

    await process.start(child_speaks)
    began = time.monotonic()
    await process.terminate(grace_s=0.3)
    assert time.monotonic() - began < 5
    assert not process.is_running
    size = process.log.stat().st_size
    await asyncio.sleep(0.2)
    assert process.log.stat().st_size == size


async def test_a_process_starts_again_after_its_end(tmp_path: Path) -> None:
    process = python(tmp_path, "import time; time.sleep(60)")
    for _ in range(2):
        await process.start(at_once)
        assert process.is_running
        process.kill()
        assert not process.is_running
    await process.terminate()


def test_free_ports_differ() -> None:
    assert len({free_port() for _ in range(50)}) == 50


def test_a_missing_program_names_the_extra() -> None:
    with pytest.raises(FileNotFoundError, match="local"):
        program("no-such-program")
