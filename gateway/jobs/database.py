"""The SQLite file of a queue: its schema, and the one thread all statements run in.

Main type: `Database`. Every change is one transaction, so no crash can fall between two of its
writes. It knows tables, and no jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gateway.jobs import JobsFull, JobsUnavailable, JobsUnusable
from services.common.telemetry import log

_T = TypeVar("_T")

# Seconds a transaction waits for another process's.
_BUSY_S = 30.0
# Seconds that a start looks for damage at most, and how many of SQLite's steps pass between two looks at the clock.
_LOOK_S, _STEPS_PER_LOOK = 2.0, 10_000
# No page of SQLite is smaller.
_LEAST_PAGE_BYTES = 512
# What the file beside the database takes that its processes share; with less on the disk SQLite opens nothing.
_LEAST_ROOM_BYTES = 64 * 1024
_SCHEMA_VERSION = 2
# A job is held from `held_at` for `held_s`: by its worker while it runs, by nobody while it waits. Both are of the
# host's monotonic clock, which all its processes share and nobody sets; a time that is still to come is of an earlier
# boot, and holds nothing. `news` names jobs in the order in which anything happened to them that somebody may wait for.
_SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    request_id TEXT NOT NULL,
    state TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    body BLOB NOT NULL,
    cancel_requested INTEGER NOT NULL,
    token TEXT
);
CREATE TABLE events (
    job INTEGER NOT NULL REFERENCES jobs (number),
    sequence INTEGER NOT NULL,
    at REAL NOT NULL,
    payload BLOB NOT NULL,
    key TEXT,
    final TEXT,
    PRIMARY KEY (job, sequence),
    UNIQUE (job, key)
);
"""
# From version 1, whose queue lease_until was on the wall clock: whoever held a job then is gone.
_SECOND = """
ALTER TABLE jobs ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN held_at REAL;
ALTER TABLE jobs ADD COLUMN held_s REAL;
ALTER TABLE jobs ADD COLUMN ahead INTEGER;
ALTER TABLE jobs ADD COLUMN result BLOB NOT NULL DEFAULT x'';
DROP INDEX IF EXISTS open_jobs;
CREATE INDEX open_jobs ON jobs (number, state, held_at, held_s, id)
    WHERE state IN ('queued', 'running');
CREATE TABLE news (number INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL);
"""
_TABLES = {"jobs", "events"}
# No part of the schema's version: it makes counting quick, and nobody misses it.
_COUNTED = "CREATE INDEX IF NOT EXISTS states ON jobs (state)"


class Database:
    """Open with `Database.open`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._connection: sqlite3.Connection
        # Device and inode, for a file of the same name is another one; and its size, which only grows.
        self._place: tuple[int, int] | None = None
        self._size_bytes = 0
        self._is_closed = False

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open the file, creating it and its folder where absent.

        Raises:
            JobsUnavailable: it cannot be opened now; `JobsFull`, `JobsUnusable`: and why.
        """
        database = cls(path)
        try:
            await database.run(database._connect)
        except BaseException:
            database._executor.shutdown(wait=False)
            raise
        return database

    def execute(
        self, statement: str, values: tuple[Any, ...] | dict[str, Any] = ()
    ) -> sqlite3.Cursor:
        """One statement, from within what `run` and `change` are given."""
        return self._connection.execute(statement, values)

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` answers, in the thread of the connection. Raises `JobsUnavailable`."""

        def unless_closed() -> _T:
            # What was asked for before the close may have its turn after it.
            if self._is_closed:
                raise JobsUnavailable("jobs database: closed")
            return work()

        if self._is_closed:
            raise JobsUnavailable("jobs database: closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, unless_closed)
        except (sqlite3.DatabaseError, OSError) as error:
            told = self._failure(error)
            if told is None:
                raise
            raise told from error

    async def change(self, work: Callable[[], _T], *, then: Callable[[], None]) -> _T:
        """The same as one transaction; `then` runs in the same thread once it is stored."""

        def transaction() -> _T:
            with _transaction(self._connection):
                result = work()
                # What is written to a file without a name is lost with the process.
                if (lost := self._lost()) is not None:
                    raise lost
            then()
            return result

        return await self.run(transaction)

    def touch(self) -> None:
        """A change that changes nothing, from within what `change` is given: it needs room as any other."""
        self.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    async def close(self) -> None:
        """Waits for the statement under way; those that wait behind it are refused."""

        def close() -> None:
            self._is_closed = True
            self._connection.close()

        if not self._is_closed:
            await asyncio.get_running_loop().run_in_executor(self._executor, close)
            self._executor.shutdown(wait=False)

    def _connect(self) -> None:
        path = self._path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            # Its owner's alone; SQLite gives the files beside it the same mode.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            size_bytes = path.stat().st_size
            if size_bytes == 0:
                log.warning("the jobs database is empty: a new queue begins", path=str(path))
            elif size_bytes < _LEAST_PAGE_BYTES:
                # SQLite takes it for an empty one, and writes over it.
                raise sqlite3.DatabaseError("file is not a database") from None
        self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise
        state = path.stat()
        self._place = (state.st_dev, state.st_ino)
        self._size_bytes = state.st_size

    def _prepare(self) -> None:
        self._connection.row_factory = sqlite3.Row
        self.execute("PRAGMA journal_mode = WAL")
        self.execute("PRAGMA synchronous = FULL")
        self._look_through()
        with _transaction(self._connection):
            (version,) = self.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise JobsUnusable(
                    f"{self._path} is of a newer version of this program (schema {version}; this one reads "
                    f"{_SCHEMA_VERSION}): start that version, or move the file away to begin with an empty queue"
                )
            tables = {
                row["name"]
                for row in self.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            }
            if bool(tables) != (version > 0) or (version and not tables >= _TABLES):
                raise JobsUnusable(
                    f"{self._path} is the database of another program: name another file, or move it away"
                )
            for statement in ";".join((_SCHEMA, _SECOND)[version:]).split(";"):
                self.execute(statement)
            self.execute(_COUNTED)
            self.touch()

    def _look_through(self) -> None:
        """Looks for damage, for as long as a start may take; what is not reached is met when it is used."""
        end = time.monotonic() + _LOOK_S
        self._connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS_PER_LOOK)
        try:
            (found,) = self.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                raise
            log.info("jobs database looked through in part: it is large", path=str(self._path))
            return
        finally:
            self._connection.set_progress_handler(None, 0)
        if found != "ok":
            raise sqlite3.DatabaseError(found.splitlines()[-1])

    def _lost(self) -> JobsUnusable | None:
        """What to say where the file is not the one that was opened, or not all of it; None where it is."""
        if self._place is None:
            return None
        what = "deleted or replaced"
        with contextlib.suppress(FileNotFoundError):
            state = self._path.stat()
            if (state.st_dev, state.st_ino) == self._place:
                if state.st_size >= self._size_bytes:
                    self._size_bytes = state.st_size
                    return None
                what = "cut short"
        return JobsUnusable(
            f"{self._path} was {what} while it was served: put back what was there, or start the server again, which "
            "goes on with what it finds then, or begins with an empty queue"
        )

    def _failure(self, error: sqlite3.DatabaseError | OSError) -> JobsUnavailable | None:
        """What an error of SQLite or of the file means; None for a bug of ours."""
        path = self._path
        if isinstance(error, OSError):
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            is_closed = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            kind, detail = 0, error.strerror
        else:
            # Without a code: what was read is no job of ours.
            kind = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            is_full = kind == sqlite3.SQLITE_FULL or (
                kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _is_full(path.parent)
            )
            is_closed = kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
            detail = str(error)
        if is_full:
            return JobsFull(
                f"no space is left for {path}: free some, or move the data to a larger disk"
            )
        if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._lost() or JobsUnusable(
                f"{path} is damaged, or no database ({detail}): move it away, with {path.name}-wal and -shm, "
                f"to begin with an empty queue; `sqlite3 {path} .recover | sqlite3 NEW` saves what can be read. "
                "Stored pictures are not touched"
            )
        if is_closed:
            return JobsUnusable(
                f"{path} is closed to this process ({detail}), which must be able to read and write the file and "
                "its folder"
            )
        if isinstance(error, sqlite3.OperationalError | OSError):
            return JobsUnavailable(f"jobs database: {detail}")
        return None


def _is_full(folder: Path) -> bool:
    try:
        state = os.statvfs(folder)
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < _LEAST_ROOM_BYTES


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has done so itself after some errors.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
