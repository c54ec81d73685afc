"""`SqliteJobs`: the queue and its event logs in one SQLite file, for any processes on one machine.

Every change is one transaction, so no crash can fall between two of its writes. All statements run
in one thread. Waiting callers wake through a tick within the process; changes by other processes
are found by a short poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from gateway.jobs import (
    Claim,
    ClaimLost,
    Event,
    JobMissing,
    JobRecord,
    JobState,
    JobsUnavailable,
    QueueFull,
    QueuePolicy,
    RequestReused,
    job_id_of,
)

_T = TypeVar("_T")

# Seconds between looks for what other processes wrote.
_POLL_S = 0.05
# Seconds a waiting claim sleeps at most before it looks for leases that ran out.
_LEASE_POLL_S = 0.25
# Seconds a transaction waits for another process's.
_BUSY_S = 30.0
_EVENTS_PER_READ = 256
_SCHEMA_VERSION = 1
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
    token TEXT,
    lease_until REAL
);
CREATE INDEX open_jobs ON jobs (number) WHERE state IN ('queued', 'running');
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
_RECORD = (
    "SELECT id, request_id, state, attempt, created_at, started_at, finished_at, body,"
    " cancel_requested, number, token FROM jobs "
)


class SqliteJobs:
    """See `Jobs`. Open with `SqliteJobs.open`."""

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy = policy
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._database: sqlite3.Connection
        self._tick = asyncio.Event()
        self._poll: asyncio.Task[None]
        self._is_closed = False

    @classmethod
    async def open(cls, path: Path, policy: QueuePolicy) -> SqliteJobs:
        """Open the queue in this file, creating it and its folder where absent."""
        jobs = cls(policy)
        try:
            jobs._database = await jobs._run(lambda: _connect(path))
        except BaseException:
            jobs._executor.shutdown(wait=False)
            raise
        jobs._poll = asyncio.create_task(jobs._watch_other_processes())
        return jobs

    async def submit(self, request_id: str, body: bytes) -> JobRecord:
        """See `Jobs.submit`."""
        job_id = job_id_of(request_id)

        def submit() -> JobRecord:
            row = self._row(job_id)
            if row is None:
                (waiting,) = self._database.execute(
                    "SELECT count(*) FROM jobs WHERE state = 'queued'"
                ).fetchone()
                if waiting >= self._policy.max_queued:
                    raise QueueFull(waiting, self._policy.retry_after_s)
                self._database.execute(
                    "INSERT INTO jobs (id, request_id, state, attempt, created_at, body,"
                    " cancel_requested) VALUES (?, ?, 'queued', 0, ?, ?, 0)",
                    (job_id, request_id, time.time(), body),
                )
                row = self._row(job_id)
            record = _record(row)
            if record.body != body:
                raise RequestReused(request_id)
            return record

        return await self._change(submit)

    async def claim(self, worker: str, *, wait_s: float) -> Claim | None:
        """See `Jobs.claim`."""
        deadline = time.monotonic() + wait_s
        while True:
            tick = self._tick
            if await self._run(self._has_claimable):
                taking = asyncio.ensure_future(self._change(lambda: self._take(worker)))
                try:
                    claim = await asyncio.shield(taking)
                except asyncio.CancelledError:
                    # The caller is gone, so nobody would work on what the thread has taken.
                    if (claim := await taking) is not None:
                        await self.release(claim)
                    raise
                if claim is not None:
                    return claim
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            await _wait(tick, min(remaining_s, _LEASE_POLL_S))

    async def extend(self, claim: Claim) -> bool:
        """See `Jobs.extend`."""

        def extend() -> bool:
            record = self._held(claim)
            self._database.execute(
                "UPDATE jobs SET lease_until = ? WHERE id = ?",
                (time.time() + claim.lease_s, claim.job.id),
            )
            return record.cancel_requested

        return await self._change(extend)

    async def release(self, claim: Claim) -> None:
        """See `Jobs.release`."""
        await self._change(
            lambda: self._database.execute(
                "UPDATE jobs SET state = 'queued', token = NULL, lease_until = NULL"
                " WHERE id = ? AND token = ?",
                (claim.job.id, claim.token),
            )
        )

    async def cancelled(self, claim: Claim) -> None:
        """See `Jobs.cancelled`."""
        while True:
            tick = self._tick
            if (await self._run(lambda: self._held(claim))).cancel_requested:
                return
            await tick.wait()

    async def append(self, claim: Claim, payload: bytes, *, key: str | None = None) -> int:
        """See `Jobs.append`."""

        def append() -> int:
            self._held(claim)
            present = self._database.execute(
                "SELECT sequence FROM events JOIN jobs ON job = number WHERE id = ? AND key = ?",
                (claim.job.id, key),
            ).fetchone()
            return int(present[0]) if present else self._log(claim.job.id, payload, key=key)

        return await self._change(append)

    async def finish(self, claim: Claim, state: JobState, payload: bytes) -> None:
        """See `Jobs.finish`."""
        if not state.is_final:
            raise ValueError(f"state is {state}, must be a final one")

        def finish() -> None:
            self._held(claim)
            self._end(claim.job.id, state, payload)

        await self._change(finish)

    async def events(
        self, job_id: str, *, after: int = 0, live: bool = True
    ) -> AsyncIterator[Event]:
        """See `Jobs.events`."""
        number = (await self._run(lambda: self._present(job_id)))["number"]

        def read() -> list[sqlite3.Row]:
            return self._database.execute(
                "SELECT sequence, at, payload, final FROM events"
                " WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (number, after, _EVENTS_PER_READ),
            ).fetchall()

        def is_over() -> bool:
            return _record(self._present(job_id)).state.is_final

        while True:
            tick = self._tick
            rows = await self._run(read)
            for row in rows:
                after = row["sequence"]
                final = JobState(row["final"]) if row["final"] else None
                yield Event(
                    sequence=after, at=row["at"], payload=bytes(row["payload"]), final=final
                )
                if final:
                    return
            if not rows and not live:
                return
            if not rows:
                # A reader that comes back after the terminal event has nothing to wait for.
                if await self._run(is_over) and not await self._run(read):
                    return
                await tick.wait()

    async def cancel(self, job_id: str, *, payload: bytes) -> JobRecord:
        """See `Jobs.cancel`."""

        def cancel() -> JobRecord:
            state = _record(self._present(job_id)).state
            if state is JobState.QUEUED:
                self._end(job_id, JobState.CANCELLED, payload)
            if not state.is_final:
                self._database.execute(
                    "UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,)
                )
            return _record(self._present(job_id))

        return await self._change(cancel)

    async def get(self, job_id: str) -> JobRecord:
        """See `Jobs.get`."""
        return _record(await self._run(lambda: self._present(job_id)))

    async def list(
        self, *, page_size: int, page_token: str = ""
    ) -> tuple[tuple[JobRecord, ...], str]:
        """See `Jobs.list`. A token is the number of the last job listed."""
        if page_token and not page_token.isdecimal():
            raise ValueError(f"page_token is {page_token[:40]!r}, must be one that list answered")
        # SQLite holds 64 bits; no number is above half of that.
        below = min(int(page_token), 1 << 62) if page_token else 1 << 62
        rows = await self._run(
            lambda: self._database.execute(
                _RECORD + "WHERE number < ? ORDER BY number DESC LIMIT ?", (below, page_size + 1)
            ).fetchall()
        )
        page = rows[:page_size]
        next_token = str(page[-1]["number"]) if len(rows) > page_size else ""
        return tuple(_record(row) for row in page), next_token

    async def counts(self) -> dict[JobState, int]:
        """See `Jobs.counts`."""
        rows = await self._run(
            lambda: self._database.execute(
                "SELECT state, count(*) FROM jobs GROUP BY state"
            ).fetchall()
        )
        counted = {JobState(state): int(count) for state, count in rows}
        return {state: counted.get(state, 0) for state in JobState}

    async def position(self, job_id: str) -> int:
        """See `Jobs.position`."""

        def position() -> int:
            row = self._present(job_id)
            if row["state"] != JobState.QUEUED.value:
                return 0
            (ahead,) = self._database.execute(
                "SELECT count(*) FROM jobs WHERE state = 'queued' AND number <= ?",
                (row["number"],),
            ).fetchone()
            return int(ahead)

        return await self._run(position)

    async def ready(self) -> None:
        """See `Jobs.ready`: takes the write lock once."""
        await self._change(lambda: None)

    async def close(self) -> None:
        """See `Jobs.close`."""
        self._poll.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._poll
        await self._run(self._database.close)
        self._is_closed = True
        self._executor.shutdown(wait=False)
        # Whoever waits finds the queue closed.
        self._ring()

    def _row(self, job_id: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._database.execute(
            _RECORD + "WHERE id = ?", (job_id,)
        ).fetchone()
        return row

    def _present(self, job_id: str) -> sqlite3.Row:
        if (row := self._row(job_id)) is None:
            raise JobMissing(job_id)
        return row

    def _held(self, claim: Claim) -> JobRecord:
        """The claimed job; raises `ClaimLost` unless the claim still stands."""
        row = self._row(claim.job.id)
        if row is None or row["token"] != claim.token:
            raise ClaimLost(claim)
        return _record(row)

    def _has_claimable(self) -> bool:
        return self._claimable() is not None

    def _claimable(self) -> JobRecord | None:
        row = self._database.execute(
            _RECORD + "WHERE state IN ('queued', 'running')"
            " AND (state = 'queued' OR lease_until < ?) ORDER BY number LIMIT 1",
            (time.time(),),
        ).fetchone()
        return None if row is None else _record(row)

    def _take(self, worker: str) -> Claim | None:
        while (record := self._claimable()) is not None:
            if record.attempt >= self._policy.max_attempts:
                self._end(record.id, JobState.FAILED, self._policy.exhausted(record))
                continue
            token = uuid.uuid4().hex
            now = time.time()
            self._database.execute(
                "UPDATE jobs SET state = 'running', attempt = attempt + 1, token = ?,"
                " lease_until = ?, started_at = coalesce(started_at, ?) WHERE id = ?",
                (token, now + self._policy.lease_s, now, record.id),
            )
            job = _record(self._present(record.id))
            return Claim(job=job, worker=worker, token=token, lease_s=self._policy.lease_s)
        return None

    def _log(
        self, job_id: str, payload: bytes, *, key: str | None = None, final: JobState | None = None
    ) -> int:
        (sequence,) = self._database.execute(
            "INSERT INTO events (job, sequence, at, payload, key, final)"
            " SELECT number, 1 + (SELECT coalesce(max(sequence), 0) FROM events"
            " WHERE job = number), ?, ?, ?, ? FROM jobs WHERE id = ? RETURNING sequence",
            (time.time(), payload, key, final.value if final else None, job_id),
        ).fetchone()
        return int(sequence)

    def _end(self, job_id: str, state: JobState, payload: bytes) -> None:
        self._log(job_id, payload, final=state)
        self._database.execute(
            "UPDATE jobs SET state = ?, finished_at = ?, token = NULL, lease_until = NULL"
            " WHERE id = ?",
            (state.value, time.time(), job_id),
        )

    async def _change(self, work: Callable[[], _T]) -> _T:
        """Run `work` as one transaction, then wake whoever waits."""

        def transaction() -> _T:
            with _transaction(self._database):
                return work()

        result = await self._run(transaction)
        self._ring()
        return result

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._is_closed:
            raise JobsUnavailable("jobs database: closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except sqlite3.OperationalError as error:
            raise JobsUnavailable(f"jobs database: {error}") from error

    def _ring(self) -> None:
        rung, self._tick = self._tick, asyncio.Event()
        rung.set()

    async def _watch_other_processes(self) -> None:
        """Ring when another connection has changed the file."""
        version = None
        while True:
            with contextlib.suppress(JobsUnavailable):
                seen = await self._run(
                    lambda: self._database.execute("PRAGMA data_version").fetchone()[0]
                )
                if seen != version:
                    version = seen
                    self._ring()
            await asyncio.sleep(_POLL_S)


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    with _transaction(database):
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif version != _SCHEMA_VERSION:
            raise ValueError(f"{path} has schema {version}, this program reads {_SCHEMA_VERSION}")
    return database


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _record(row: sqlite3.Row | None) -> JobRecord:
    assert row is not None, "a row that was just written is there"
    return JobRecord(
        id=row["id"],
        request_id=row["request_id"],
        state=JobState(row["state"]),
        attempt=row["attempt"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        body=bytes(row["body"]),
        cancel_requested=bool(row["cancel_requested"]),
    )


async def _wait(tick: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(tick.wait(), timeout_s)
