"""Work on the bytes of strangers, in processes that can be ended: `Confined`.

A decoder cannot be stopped from within, and what it takes cannot be told from a file's head. So such work is done by
child processes with limits of time and memory, which are killed when a limit is passed or when nobody waits for the
answer. Only bytes cross: nothing a child answers is more than read. This module knows no pictures.

As a program, `python -m services.common.confined LIMIT_S MEMORY_BYTES NICENESS MODULE:NAME [ARGUMENT...]`, it is such
a child.
"""

import asyncio
import contextlib
import importlib
import os
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from google.rpc import status_pb2

from services.common.errors import (
    CollageError,
    Internal,
    InvalidRequest,
    Overloaded,
    Unavailable,
    from_status,
)
from services.common.memory import trim
from services.common.telemetry import log

# What a child does: bytes in, bytes out. It calls the function it is given with the field path of what it begins on.
Work = Callable[[list[bytes], Callable[[str], None]], list[bytes]]

# Nobody waits any more: what ends by itself within this keeps its process.
ABANDONED_S = 0.5
# Longest that a process may take to start: its libraries, and whatever the work opens.
START_S = 120.0
# How long a process may take to end whose pipes are closed.
ENDING_S = 5.0
# How long after its limit a child whose parent has died ends by itself.
ORPHAN_S = 5
# Kinds of frames that a child writes: where it has come to, the answer, an error of ours, no memory, anything else.
_AT, _ANSWER, _ERROR, _MEMORY, _FAILED = range(5)
_HEAD, _SIZE = struct.Struct(">BI"), struct.Struct(">Q")


class Confined:
    """Child processes for one kind of work.

    Args:
        work: `MODULE:NAME` of a function that is called once in each child, with `arguments`, and gives its `Work`.
        arguments: of that function.
        processes: at most so many; each is started when it is first needed.
        limit_s: longest a piece of work may take, seconds.
        memory_bytes: most that a child may have of private memory.
        niceness: of each process, see nice(2).
    """

    def __init__(
        self,
        work: str,
        *arguments: str,
        processes: int,
        limit_s: float,
        memory_bytes: int,
        niceness: int = 0,
    ) -> None:
        self.limit_s = limit_s
        self._command = (f"{limit_s}", f"{memory_bytes}", f"{niceness}", work, *arguments)
        self._turns = asyncio.Semaphore(processes)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="confined")
        self._is_closed = False
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()

    async def run(self, parts: Sequence[bytes], field: str) -> list[bytes]:
        """What the work makes of `parts`.

        It takes its turn. Where the caller is cancelled it goes on for `ABANDONED_S` at most, and so does this call.

        Args:
            parts: given to the work.
            field: the path that is at fault where the work has not said which it had begun on.

        Raises:
            CollageError: raised by the work.
            InvalidRequest: it took too long or too much memory, or its process crashed, twice.
            Overloaded: its process was ended from outside, twice: the machine is short of memory.
        """
        try:
            return await self._run_once(parts, field)
        except _Died as died:
            log.warning("a confined process died", signal=died.signal, at=died.field)
        # It may have been the machine's fault, or that of what the process did before.
        try:
            return await self._run_once(parts, field)
        except _Died as died:
            raise died.told() from died

    async def ready(self) -> None:
        """Starts a process and has it answer, so that the first work need not wait for that."""
        await self.run([], "")

    async def close(self) -> None:
        """Ends every process at once."""
        self._is_closed = True
        for child in self._busy:
            child.kill()
        for child in self._idle:
            child.end()
        # What stands before a thread is not cancelled: its process is dead, and its caller is told so.
        self._threads.shutdown(wait=False)

    async def _run_once(self, parts: Sequence[bytes], field: str) -> list[bytes]:
        loop = asyncio.get_running_loop()
        await self._turns.acquire()
        try:
            if self._is_closed:
                raise Unavailable("the server is stopping")
            child = self._idle.pop() if self._idle else _Child(self._command)
        except BaseException:
            self._turns.release()
            raise
        self._busy.add(child)
        limit = loop.call_later(START_S, child.kill)
        abandoned: list[asyncio.TimerHandle] = []
        is_over = False

        def over() -> None:
            nonlocal is_over
            is_over = True
            child.kill()

        def begun() -> None:
            nonlocal limit
            limit.cancel()
            limit = loop.call_later(self.limit_s, over)

        def give_back(ended: asyncio.Future[list[bytes]]) -> None:
            for timer in (limit, *abandoned):
                timer.cancel()
            # Of abandoned work nobody asks how it ended.
            ended.exception()
            self._busy.discard(child)
            if child.is_running:
                self._idle.append(child)
            self._turns.release()

        exchange = loop.run_in_executor(
            self._threads, child.exchange, parts, field, lambda: loop.call_soon_threadsafe(begun)
        )
        exchange.add_done_callback(give_back)
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:
            abandoned.append(loop.call_later(ABANDONED_S, child.kill))
            # Whoever gave the turn must not give it to another before the process is free.
            await asyncio.wait((exchange,))
            raise
        except _Died as died:
            if not is_over:
                raise
            raise InvalidRequest.of(
                died.field,
                f"was being worked on when {self.limit_s:g} s were over; allowed: less for the whole request",
            ) from died


class _Died(Exception):
    """The process ended within its work, or before. field: what it had begun on, None for nothing yet."""

    def __init__(self, field: str | None, code: int) -> None:
        super().__init__(field, code)
        self.field = field or ""
        self.has_begun = field is not None
        self.signal = signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def told(self) -> CollageError:
        if not self.has_begun:
            return Unavailable(f"a process of this server does not start ({self.signal})")
        if self.signal == signal.SIGKILL.name:
            return Overloaded("the machine ended this work, twice", retry_after_s=5.0)
        return InvalidRequest.of(
            self.field, f"ended the process that worked on it ({self.signal}); allowed: sound files"
        )


class _Child:
    """One process, and the pipes to it."""

    def __init__(self, command: Sequence[str]) -> None:
        # Its modules are this process' own; what lies in the folder that a user happens to be in counts for nothing.
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            (sys.executable, "-P", "-m", "services.common.confined", *command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._has_started = False

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it at once; whoever reads from it sees its end."""
        self._process.kill()

    def end(self, *, grace_s: float = 0.0) -> int:
        """Kills it where it runs longer than that, and lets go of it; its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # What was not written to it is nobody's any more.
                with contextlib.suppress(OSError):
                    pipe.close()
        return self._process.wait()

    def exchange(
        self, parts: Sequence[bytes], field: str, begun: Callable[[], object]
    ) -> list[bytes]:
        """The answer to one piece of work; for a thread.

        Args:
            parts: of the work.
            field: see `Confined.run`.
            begun: called once the process has started and is given the work.

        Raises:
            _Died: the process ended.
        """
        given, answered = self._process.stdin, self._process.stdout
        assert given is not None, "opened so"
        assert answered is not None, "opened so"
        at = field if self._has_started else None
        try:
            if not self._has_started:
                _read(answered)
                self._has_started, at = True, field
            begun()
            _write(given, _ANSWER, parts)
            while True:
                kind, answer = _read(answered)
                if kind != _AT:
                    break
                at = answer[0].decode()
        except (OSError, EOFError):
            # Its pipes close before it has ended, and how it ends is of interest.
            raise _Died(at, self.end(grace_s=ENDING_S)) from None
        if kind == _ANSWER:
            return answer
        if kind == _ERROR:
            raise from_status(status_pb2.Status.FromString(answer[0]))
        if kind == _MEMORY:
            raise InvalidRequest.of(at or field, "takes more memory than there is for one request")
        log.error("confined work failed", at=at, traceback=answer[0].decode())
        raise Internal("internal error; the server's log has more under this request id")


def _write(pipe: IO[bytes], kind: int, parts: Sequence[bytes]) -> None:
    pipe.write(_HEAD.pack(kind, len(parts)))
    for part in parts:
        pipe.write(_SIZE.pack(len(part)))
        pipe.write(part)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[int, list[bytes]]:
    kind, count = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    return kind, [_exactly(pipe, _SIZE.unpack(_exactly(pipe, _SIZE.size))[0]) for _ in range(count)]


def _exactly(pipe: IO[bytes], size_bytes: int) -> bytes:
    data = pipe.read(size_bytes)
    if len(data) < size_bytes:
        raise EOFError
    return data


def _serve(
    limit_s: float, memory_bytes: int, niceness: int, name: str, arguments: Sequence[str]
) -> None:
    """What a child does until its parent closes the pipe."""
    os.nice(niceness)
    given, answered = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What some library prints must not stand among the answers.
    os.dup2(2, 1)
    module, _, function = name.partition(":")
    work: Work = getattr(importlib.import_module(module), function)(*arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    _write(answered, _ANSWER, [])
    while True:
        try:
            _, parts = _read(given)
        except EOFError:
            return
        # Not caught: it ends the process even within a library's call.
        signal.alarm(int(limit_s) + ORPHAN_S)
        _write(
            answered, *_answer(work, parts, lambda field: _write(answered, _AT, [field.encode()]))
        )
        signal.alarm(0)
        del parts
        # Pictures come and go in hundreds of megabytes.
        trim(0)


def _answer(
    work: Work, parts: list[bytes], begin: Callable[[str], None]
) -> tuple[int, list[bytes]]:
    try:
        # Nothing to do asks whether the process is there.
        return _ANSWER, work(parts, begin) if parts else []
    except CollageError as error:
        return _ERROR, [error.to_status().SerializeToString()]
    except MemoryError:
        return _MEMORY, []
    except Exception:
        return _FAILED, [traceback.format_exc().encode()]


if __name__ == "__main__":
    _serve(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
