"""The SQLite file of a queue: its schema, and the one thread all statements run in.

Main type: `Database`. Every change is one transaction, so no crash can fall between two of its
writes. It knows tables, and no jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gateway.jobs import JobsUnavailable

_T = TypeVar("_T")

# Seconds a transaction waits for another process's.
_BUSY_S = 30.0
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


class Database:
    """Open with `Database.open`."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._connection: sqlite3.Connection
        self._is_closed = False

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open the file, creating it and its folder where absent. ValueError for a newer schema."""
        database = cls()
        try:
            database._connection = await database.run(lambda: _connect(path))
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
        except sqlite3.OperationalError as error:
            raise JobsUnavailable(f"jobs database: {error}") from error

    async def change(self, work: Callable[[], _T], *, then: Callable[[], None]) -> _T:
        """The same as one transaction; `then` runs in the same thread once it is stored."""

        def transaction() -> _T:
            with _transaction(self._connection):
                result = work()
            then()
            return result

        return await self.run(transaction)

    async def close(self) -> None:
        """Waits for the statement under way; those that wait behind it are refused."""

        def close() -> None:
            self._is_closed = True
            self._connection.close()

        if not self._is_closed:
            await asyncio.get_running_loop().run_in_executor(self._executor, close)
            self._executor.shutdown(wait=False)


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    with _transaction(connection):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise ValueError(f"{path} has schema {version}, this program reads {_SCHEMA_VERSION}")
        for statement in ";".join((_SCHEMA, _SECOND)[version:]).split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
