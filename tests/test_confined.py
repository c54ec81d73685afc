"""Work in processes that can be ended: what crosses, what is bounded, and that nobody else is harmed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.common.confined import Confined
from services.common.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from testing.waiting import until
from testing.works import MEMORY_BYTES


@contextlib.asynccontextmanager
async def confined(*arguments, work="testing.works:doing", processes=1, limit_s=30.0):
    pool = Confined(
        work, *arguments, processes=processes, limit_s=limit_s, memory_bytes=MEMORY_BYTES
    )
    try:
        yield pool
    finally:
        await pool.close()


def is_there(pid):
    """Whether the process runs; one that has ended and waits to be looked at does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_bytes_cross_as_they_are_whatever_is_printed():
    async with confined("first", "second") as pool:
        large = bytes(range(256)) * 100_000
        assert await pool.run([b"echo", large, b""], "x") == [large, b"", b"first", b"second"]
        assert await pool.run([b"print", b"1"], "x") == [b"1", b"first", b"second"]
        assert await pool.run([], "x") == []


async def test_an_error_of_ours_is_the_same_on_this_side_and_the_process_stays():
    async with confined() as pool:
        (pid,) = await pool.run([b"pid"], "x")
        with pytest.raises(InvalidRequest) as refused:
            await pool.run([b"refuse"], "x")
        assert [each.field for each in refused.value.violations] == ["a[0]", "a[1]"]
        assert refused.value.reason == "SOME_REASON"
        with pytest.raises(NotFound, match="no such thing"):
            await pool.run([b"miss"], "x")
        with pytest.raises(Exception, match="the server's log has more") as failed:
            await pool.run([b"fail"], "x")
        assert failed.value.reason == "INTERNAL"
        assert await pool.run([b"pid"], "x") == [pid]


async def test_what_hangs_is_ended_at_its_limit_and_named():
    async with confined(limit_s=0.5) as pool:
        with pytest.raises(InvalidRequest) as refused:
            await pool.run([b"hang", b"", b""], "x")
        (violation,) = refused.value.violations
        assert violation.field == "parts[2]"
        assert "when 0.5 s were over" in violation.description
        assert await pool.run([b"echo", b"1"], "x") == [b"1"]


async def test_what_takes_too_much_memory_is_refused():
    async with confined() as pool:
        with pytest.raises(InvalidRequest, match=r"parts\[0\]: takes more memory"):
            await pool.run([b"fill"], "x")
        assert await pool.run([b"echo", b"1"], "x") == [b"1"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (signal.SIGSEGV, InvalidRequest),
        (signal.SIGABRT, InvalidRequest),
        # What the kernel does when memory is short.
        (signal.SIGKILL, Overloaded),
    ],
)
async def test_a_process_that_dies_twice_is_told_for_what_it_died_of(number, kind):
    async with confined() as pool:
        with pytest.raises(kind) as told:
            await pool.run([b"signal", f"{number}".encode()], "x")
        if kind is InvalidRequest:
            (violation,) = told.value.violations
            assert violation.field == "parts[1]"
            assert signal.Signals(number).name in violation.description
        assert await pool.run([b"echo", b"1"], "x") == [b"1"]


async def test_a_process_that_dies_once_costs_its_caller_nothing(tmp_path):
    async with confined() as pool:
        mark = os.fsencode(tmp_path / "mark")
        assert await pool.run([b"crash once", mark], "x") == [mark]


async def test_abandoned_work_ends_and_its_turn_goes_on():
    async with confined() as pool:
        (pid,) = await pool.run([b"pid"], "x")
        hanging = asyncio.create_task(pool.run([b"hang"], "x"))
        waiting = asyncio.create_task(pool.run([b"echo", b"1"], "x"))
        await until(lambda: pool._busy)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        assert await waiting == [b"1"]
        assert not is_there(int(pid))


async def test_whoever_leaves_while_waiting_for_a_turn_takes_none():
    async with confined() as pool:
        await pool.ready()
        hanging = asyncio.create_task(pool.run([b"hang"], "x"))
        leaving = asyncio.create_task(pool.run([b"echo"], "x"))
        await until(lambda: pool._busy)
        leaving.cancel()
        hanging.cancel()
        assert await pool.run([b"echo", b"1"], "x") == [b"1"]


async def test_no_more_processes_than_are_allowed_work_at_once():
    async with confined(processes=2) as pool:
        answers = await asyncio.gather(*(pool.run([b"pid"], "x") for _ in range(20)))
        assert 1 <= len({pid for (pid,) in answers}) <= 2


async def test_a_process_that_does_not_start_is_unavailable():
    async with confined(work="nowhere_at_all:doing") as pool:
        with pytest.raises(Unavailable, match="does not start"):
            await pool.run([b"echo"], "x")


async def test_closing_ends_what_runs_and_what_waits():
    async with confined(processes=2) as pool:
        (pid,) = await pool.run([b"pid"], "x")
        hanging = [asyncio.create_task(pool.run([b"hang"], "x")) for _ in range(3)]
        await until(lambda: len(pool._busy) == 2)
        children = [child._process.pid for child in pool._busy]
        await pool.close()
        for task in hanging:
            with pytest.raises(Unavailable):
                await task
    assert not any(map(is_there, (*children, int(pid))))


async def test_closing_ends_what_has_a_turn_and_no_thread_yet(monkeypatch):
    async with confined(processes=2) as pool:
        monkeypatch.setattr(pool, "_threads", ThreadPoolExecutor(1))
        hanging = [asyncio.create_task(pool.run([b"hang"], "x")) for _ in range(2)]
        await until(lambda: len(pool._busy) == 2)
        await pool.close()
        for task in hanging:
            with pytest.raises(Unavailable):
                await task


async def test_what_lies_in_the_current_folder_is_not_run(tmp_path, monkeypatch):
    for name in ("struct", "numpy", "services"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    async with confined() as pool:
        assert await pool.run([b"echo", b"1"], "x") == [b"1"]


def test_a_process_whose_parent_was_killed_ends():
    program = (
        "import asyncio\n"
        "from services.common.confined import Confined\n"
        "async def main():\n"
        "    pool = Confined('testing.works:doing', processes=1, limit_s=9.0, memory_bytes=2**29)\n"
        "    print((await pool.run([b'pid'], 'x'))[0].decode(), flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        (sys.executable, "-c", program),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_there(pid)
        parent.kill()
        asyncio.run(until(lambda: not is_there(pid)))
