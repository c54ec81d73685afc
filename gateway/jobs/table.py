"""The jobs and their events as rows: every step of a job's life as statements of one transaction.

Main type: `Table`. All of it runs in the thread of its `Database`; it waits for nobody and wakes
nobody.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.jobs import (
    Claim,
    ClaimLost,
    Event,
    JobMissing,
    JobRecord,
    JobState,
    QueueFull,
    QueuePolicy,
    RequestReused,
    job_id_of,
)
from gateway.jobs.database import Database
from gateway.jobs.news import News
from gateway.jobs.tails import Seen

_EVENTS_PER_READ = 256
_RECORD = (
    "SELECT id, request_id, state, attempt, lost, created_at, started_at, finished_at, body,"
    " result, cancel_requested, ahead, number, token FROM jobs "
)
# Answered from the index alone, as long as only its columns are asked for.
_OPEN = "FROM jobs INDEXED BY open_jobs WHERE state IN ('queued', 'running') "
_HELD = "(held_at IS NOT NULL AND held_at <= :now AND :now < held_at + held_s) "


class Table:
    """What others may wait for is noted in the news."""

    def __init__(self, database: Database, news: News, policy: QueuePolicy) -> None:
        self._database = database
        self._news = news
        self._policy = policy

    def submit(self, request_id: str, body: bytes) -> JobRecord:
        """See `Jobs.submit`."""
        job_id = job_id_of(request_id)
        row = self._row(job_id)
        if row is None:
            (waiting,) = self._one(f"SELECT count(*) {_OPEN} AND state = 'queued'")
            if waiting >= self._policy.max_queued:
                raise QueueFull(waiting, self._policy.retry_after_s)
            self._database.execute(
                "INSERT INTO jobs (id, request_id, state, attempt, created_at, body,"
                " cancel_requested) VALUES (?, ?, 'queued', 0, ?, ?, 0)",
                (job_id, request_id, time.time(), body),
            )
            row = self.present(job_id)
            self._news.note(row["number"])
        record = record_of(row)
        if record.body != body:
            raise RequestReused(request_id)
        return record

    def free_in_s(self) -> float:
        """Seconds until there may be a job to claim, 0 where there is one."""
        now = {"now": time.monotonic()}
        if self._database.execute(f"SELECT 1 {_OPEN} AND NOT {_HELD} LIMIT 1", now).fetchone():
            return 0.0
        (first,) = self._one(f"SELECT min(held_at + held_s) {_OPEN} AND {_HELD}", now)
        # A claim that another process makes from now on lasts as long.
        longest_s = self._policy.lease_s
        return longest_s if first is None else min(max(first - now["now"], 0.001), longest_s)

    def take(self, worker: str) -> Claim | None:
        """The oldest job that nobody holds, now held; ends those on the way that were lost too often."""
        while True:
            now = {"now": time.monotonic()}
            free = self._database.execute(
                f"SELECT id {_OPEN} AND NOT {_HELD} ORDER BY number LIMIT 1", now
            ).fetchone()
            if free is None:
                return None
            row = self.present(free["id"])
            if row["state"] == JobState.RUNNING.value:
                self._database.execute(
                    "UPDATE jobs SET lost = lost + 1 WHERE number = ?", (row["number"],)
                )
                row = self.present(free["id"])
            if row["lost"] >= self._policy.max_lost:
                payload = self._policy.exhausted(record_of(row))
                self._end(row, JobState.FAILED, payload, b"")
                continue
            token = uuid.uuid4().hex
            self._database.execute(
                "UPDATE jobs SET state = 'running', attempt = attempt + 1, token = ?, ahead = NULL,"
                " held_at = ?, held_s = ?, started_at = coalesce(started_at, ?) WHERE number = ?",
                (token, now["now"], self._policy.lease_s, time.time(), row["number"]),
            )
            self._news.note(row["number"])
            job = record_of(self.present(row["id"]))
            return Claim(job=job, worker=worker, token=token, lease_s=self._policy.lease_s)

    def held(self, claim: Claim) -> sqlite3.Row:
        """Number and cancel_requested of the claimed job; raises `ClaimLost` unless it stands."""
        row: sqlite3.Row | None = self._database.execute(
            "SELECT number, cancel_requested FROM jobs WHERE id = ? AND token = ?",
            (claim.job.id, claim.token),
        ).fetchone()
        if row is None:
            raise ClaimLost(claim)
        return row

    def extend(self, claim: Claim) -> bool:
        """See `Jobs.extend`. No news."""
        row = self.held(claim)
        self._database.execute(
            "UPDATE jobs SET held_at = ? WHERE number = ?", (time.monotonic(), row["number"])
        )
        return bool(row["cancel_requested"])

    def release(self, claim: Claim, rest_s: float) -> None:
        """See `Jobs.release`."""
        number = self.held(claim)["number"]
        self._database.execute(
            "UPDATE jobs SET state = 'queued', token = NULL, ahead = NULL, held_at = ?, held_s = ?"
            " WHERE number = ?",
            (time.monotonic(), rest_s, number),
        )
        self._news.note(number)

    def stand(self, claim: Claim, ahead: int) -> None:
        """See `Jobs.stand`."""
        number = self.held(claim)["number"]
        self._database.execute("UPDATE jobs SET ahead = ? WHERE number = ?", (ahead, number))
        self._news.note(number)

    def append(self, claim: Claim, payload: bytes, key: str | None) -> tuple[int, Event | None]:
        """The event's number, and the event unless it stood there before. See `Jobs.append`."""
        number = self.held(claim)["number"]
        if key is not None:
            present = self._database.execute(
                "SELECT sequence FROM events WHERE job = ? AND key = ?", (number, key)
            ).fetchone()
            if present:
                return int(present[0]), None
        event = self._log(number, payload, key=key)
        return event.sequence, event

    def finish(self, claim: Claim, state: JobState, payload: bytes, result: bytes) -> Event:
        """See `Jobs.finish`."""
        return self._end(self.held(claim), state, payload, result)

    def cancel(self, job_id: str, payload: bytes) -> tuple[JobRecord, Event | None]:
        """The record and the terminal event where this was the end. See `Jobs.cancel`."""
        row = self.present(job_id)
        state = JobState(row["state"])
        event = None
        if state is JobState.QUEUED:
            event = self._end(row, JobState.CANCELLED, payload, b"")
        if not state.is_final:
            self._database.execute("UPDATE jobs SET cancel_requested = 1 WHERE id = ?", (job_id,))
            self._news.note(row["number"])
        return record_of(self.present(job_id)), event

    def read(self, job_id: str, after: int) -> Sequence[Event]:
        """Events behind this one, up to 256. Raises `JobMissing`."""
        (number,) = self._one("SELECT min(number) FROM jobs WHERE id = ?", (job_id,))
        if number is None:
            raise JobMissing(job_id)
        rows = self._database.execute(
            "SELECT sequence, at, payload, final FROM events"
            " WHERE job = ? AND sequence > ? ORDER BY sequence LIMIT ?",
            (number, after, _EVENTS_PER_READ),
        )
        return [
            Event(
                sequence=row["sequence"],
                at=row["at"],
                payload=bytes(row["payload"]),
                final=JobState(row["final"]) if row["final"] else None,
            )
            for row in rows
        ]

    def look(self, job_id: str) -> Seen:
        """What a watcher needs to know first. Raises `JobMissing`."""
        row = self._database.execute(
            "SELECT number, state, ahead FROM jobs WHERE id = ?", (job_id,)
        ).fetchone()
        if row is None:
            raise JobMissing(job_id)
        (last,) = self._one(
            "SELECT coalesce(max(sequence), 0) FROM events WHERE job = ?", (row["number"],)
        )
        state = JobState(row["state"])
        if state is JobState.QUEUED:
            ahead: int | None = self._place(row["number"]) - 1
        else:
            ahead = row["ahead"]
        return Seen(last=last, is_over=state.is_final, ahead=ahead)

    def position(self, job_id: str) -> int:
        """See `Jobs.position`."""
        row = self.present(job_id)
        return self._place(row["number"]) if row["state"] == JobState.QUEUED.value else 0

    def places(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        """The jobs ahead of each of these that waits."""
        rows = self._database.execute(f"SELECT id {_OPEN} AND state = 'queued' ORDER BY number")
        wanted = set(job_ids)
        return {row["id"]: ahead for ahead, row in enumerate(rows) if row["id"] in wanted}

    def page(self, below: int, size: int) -> list[sqlite3.Row]:
        """Rows of the newest jobs below this number."""
        return self._database.execute(
            _RECORD + "WHERE number < ? ORDER BY number DESC LIMIT ?", (below, size)
        ).fetchall()

    def counts(self) -> dict[JobState, int]:
        """See `Jobs.counts`."""
        counted = dict.fromkeys(JobState, 0)
        for state, count in self._database.execute(
            "SELECT state, count(*) FROM jobs GROUP BY state"
        ):
            counted[JobState(state)] = count
        return counted

    def oldest_waiting(self) -> float | None:
        """See `Jobs.oldest_waiting`."""
        (first,) = self._one(f"SELECT min(number) {_OPEN} AND state = 'queued'")
        if first is None:
            return None
        (created_at,) = self._one("SELECT created_at FROM jobs WHERE number = ?", (first,))
        return float(created_at)

    def present(self, job_id: str) -> sqlite3.Row:
        """The whole row. Raises `JobMissing`."""
        if (row := self._row(job_id)) is None:
            raise JobMissing(job_id)
        return row

    def _row(self, job_id: str) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._database.execute(
            _RECORD + "WHERE id = ?", (job_id,)
        ).fetchone()
        return row

    def _one(self, statement: str, values: tuple[Any, ...] | dict[str, Any] = ()) -> sqlite3.Row:
        row: sqlite3.Row = self._database.execute(statement, values).fetchone()
        return row

    def _place(self, number: int) -> int:
        (place,) = self._one(
            f"SELECT count(*) {_OPEN} AND state = 'queued' AND number <= ?", (number,)
        )
        return int(place)

    def _log(
        self,
        number: int,
        payload: bytes,
        *,
        key: str | None = None,
        final: JobState | None = None,
    ) -> Event:
        at = time.time()
        (sequence,) = self._one(
            "INSERT INTO events (job, sequence, at, payload, key, final)"
            " SELECT ?1, 1 + coalesce(max(sequence), 0), ?2, ?3, ?4, ?5 FROM events WHERE job = ?1"
            " RETURNING sequence",
            (number, at, payload, key, final.value if final else None),
        )
        self._news.note(number)
        return Event(sequence=sequence, at=at, payload=payload, final=final)

    def _end(self, row: sqlite3.Row, state: JobState, payload: bytes, result: bytes) -> Event:
        event = self._log(row["number"], payload, final=state)
        self._database.execute(
            "UPDATE jobs SET state = ?, finished_at = ?, token = NULL, ahead = NULL, held_at = NULL,"
            " result = ? WHERE number = ?",
            (state.value, time.time(), result, row["number"]),
        )
        return event


def record_of(row: sqlite3.Row) -> JobRecord:
    """A whole row as the record it is.

    Raises `sqlite3.DatabaseError` where it is none: damage that SQLite cannot see.
    """
    try:
        return JobRecord(
            id=row["id"],
            request_id=row["request_id"],
            state=JobState(row["state"]),
            attempt=row["attempt"],
            lost=row["lost"],
            created_at=float(row["created_at"]),
            started_at=row["started_at"],
            finished_at=row["finished_at"],
            body=bytes(row["body"]),
            result=bytes(row["result"]),
            cancel_requested=bool(row["cancel_requested"]),
            ahead=row["ahead"],
        )
    except (ValueError, TypeError) as error:
        raise sqlite3.DatabaseError(f"a row is no job: {error}") from error
