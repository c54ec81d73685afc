"""`SqliteJobs`: the queue and its event logs in one SQLite file, for any processes on one machine.

A change is told at once to those in this process who wait for that job; what other processes
changed is found by a short poll, one for all who wait, and read once for each job watched here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from gateway.jobs import (
    Ahead,
    Claim,
    ClaimLost,
    Event,
    JobRecord,
    JobState,
    JobsUnavailable,
    QueuePolicy,
)
from gateway.jobs.database import Database
from gateway.jobs.news import News
from gateway.jobs.table import Table, record_of
from gateway.jobs.tails import Seen, Tails

_T = TypeVar("_T")

# Seconds between looks for what other processes wrote.
_POLL_S = 0.05


class SqliteJobs:
    """See `Jobs`. Open with `SqliteJobs.open`."""

    def __init__(self, database: Database, policy: QueuePolicy) -> None:
        self._database = database
        self._news = News(database)
        self._table = Table(database, self._news, policy)
        self._tails = Tails(self._places)
        # Set when there may be a job to claim that was not.
        self._queue = asyncio.Event()
        self._poll: asyncio.Task[None]

    @classmethod
    async def open(cls, path: Path, policy: QueuePolicy) -> SqliteJobs:
        """Open the queue in this file, creating it and its folder where absent."""
        jobs = cls(await Database.open(path), policy)
        await jobs._database.run(jobs._news.skip)
        jobs._poll = asyncio.create_task(jobs._watch_other_processes())
        return jobs

    async def submit(self, request_id: str, body: bytes) -> JobRecord:
        """See `Jobs.submit`."""
        record = await self._change(lambda: self._table.submit(request_id, body))
        self._ring_queue()
        return record

    async def claim(self, worker: str, *, wait_s: float) -> Claim | None:
        """See `Jobs.claim`."""
        deadline = time.monotonic() + wait_s
        while True:
            queue = self._queue
            free_in_s = await self._database.run(self._table.free_in_s)
            if free_in_s == 0:
                taking = asyncio.ensure_future(self._take(worker))
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
            if free_in_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(queue.wait(), min(remaining_s, free_in_s))

    async def extend(self, claim: Claim) -> bool:
        """See `Jobs.extend`."""
        return await self._change(lambda: self._table.extend(claim))

    async def release(self, claim: Claim, *, rest_s: float = 0) -> None:
        """See `Jobs.release`."""
        with contextlib.suppress(ClaimLost):
            await self._change(lambda: self._table.release(claim, rest_s))
            self._ring_queue()
            self._turn(claim.job.id, is_ahead_void=True)

    async def stand(self, claim: Claim, ahead: int) -> None:
        """See `Jobs.stand`."""
        await self._change(lambda: self._table.stand(claim, ahead))
        if (tail := self._tails.watched(claim.job.id)) is not None:
            tail.stand(ahead)

    async def cancelled(self, claim: Claim) -> None:
        """See `Jobs.cancelled`."""
        tail = self._tails.of(claim.job.id)
        while True:
            turn = tail.turn
            if (await self._database.run(lambda: self._table.held(claim)))["cancel_requested"]:
                return
            await turn.wait()

    async def append(self, claim: Claim, payload: bytes, *, key: str | None = None) -> int:
        """See `Jobs.append`."""
        sequence, event = await self._change(lambda: self._table.append(claim, payload, key))
        self._tell(claim.job.id, event)
        return sequence

    async def finish(
        self, claim: Claim, state: JobState, payload: bytes, *, result: bytes = b""
    ) -> None:
        """See `Jobs.finish`."""
        if not state.is_final:
            raise ValueError(f"state is {state}, must be a final one")
        event = await self._change(lambda: self._table.finish(claim, state, payload, result))
        self._tell(claim.job.id, event)
        self._turn(claim.job.id)

    async def events(
        self, job_id: str, *, after: int = 0, live: bool = True
    ) -> AsyncIterator[Event]:
        """See `Jobs.events`."""
        if live:
            async for told in self.watch(job_id, after=after):
                if isinstance(told, Event):
                    yield told
            return
        while events := await self._read(job_id, after):
            for event in events:
                yield event
            after = events[-1].sequence

    def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event | Ahead]:
        """See `Jobs.watch`."""
        return self._tails.watch(
            job_id,
            after,
            lambda: self._look(job_id),
            lambda behind: self._read(job_id, behind),
        )

    async def cancel(self, job_id: str, *, payload: bytes) -> JobRecord:
        """See `Jobs.cancel`."""
        record, event = await self._change(lambda: self._table.cancel(job_id, payload))
        self._tell(job_id, event)
        self._turn(job_id)
        return record

    async def get(self, job_id: str) -> JobRecord:
        """See `Jobs.get`."""
        return await self._database.run(lambda: record_of(self._table.present(job_id)))

    async def list(
        self, *, page_size: int, page_token: str = ""
    ) -> tuple[tuple[JobRecord, ...], str]:
        """See `Jobs.list`. A token is the number of the last job listed."""
        if page_token and not page_token.isdecimal():
            raise ValueError(f"page_token is {page_token[:40]!r}, must be one that list answered")
        # SQLite holds 64 bits; no number is above half of that.
        below = min(int(page_token), 1 << 62) if page_token else 1 << 62

        def page() -> tuple[tuple[JobRecord, ...], str]:
            rows = self._table.page(below, page_size + 1)
            page = rows[:page_size]
            next_token = str(page[-1]["number"]) if len(rows) > page_size else ""
            return tuple(map(record_of, page)), next_token

        return await self._database.run(page)

    async def counts(self) -> dict[JobState, int]:
        """See `Jobs.counts`."""
        return await self._database.run(self._table.counts)

    async def oldest_waiting(self) -> float | None:
        """See `Jobs.oldest_waiting`."""
        return await self._database.run(self._table.oldest_waiting)

    async def position(self, job_id: str) -> int:
        """See `Jobs.position`."""
        return await self._database.run(lambda: self._table.position(job_id))

    async def ready(self) -> None:
        """See `Jobs.ready`: a change, which needs room as any other."""
        await self._change(self._database.touch)

    async def close(self) -> None:
        """See `Jobs.close`."""
        self._poll.cancel()
        await asyncio.gather(self._poll, return_exceptions=True)
        await self._database.close()
        # Whoever waits finds the queue closed.
        await self._tails.close()
        self._ring_queue()

    async def _take(self, worker: str) -> Claim | None:
        claim = await self._change(lambda: self._table.take(worker))
        if claim is not None:
            self._turn(claim.job.id, is_ahead_void=True)
        return claim

    async def _look(self, job_id: str) -> Seen:
        return await self._database.run(lambda: self._table.look(job_id))

    async def _read(self, job_id: str, after: int) -> Sequence[Event]:
        return await self._database.run(lambda: self._table.read(job_id, after))

    async def _places(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        return await self._database.run(lambda: self._table.places(job_ids))

    async def _change(self, work: Callable[[], _T]) -> _T:
        """Run `work` as one transaction."""

        def noted() -> _T:
            self._news.begin()
            return work()

        return await self._database.change(noted, then=self._news.written)

    def _tell(self, job_id: str, event: Event | None) -> None:
        """Tell those who watch the job here of an event that was stored."""
        if event is not None and (tail := self._tails.watched(job_id)) is not None:
            tail.tell(event)

    def _turn(self, job_id: str, *, is_ahead_void: bool = False) -> None:
        """The job was cancelled, given to somebody, given back, or has ended."""
        self._tails.moved()
        if (tail := self._tails.watched(job_id)) is not None:
            if is_ahead_void:
                tail.stand(None)
            tail.call()

    def _ring_queue(self) -> None:
        rung, self._queue = self._queue, asyncio.Event()
        rung.set()

    async def _watch_other_processes(self) -> None:
        """Tell who waits here of what another connection has written to the file."""
        version = None
        while True:
            with contextlib.suppress(JobsUnavailable):
                seen = await self._database.run(
                    lambda: self._database.execute("PRAGMA data_version").fetchone()[0]
                )
                if seen != version:
                    version = seen
                    await self._catch_up()
            await asyncio.sleep(_POLL_S)

    async def _catch_up(self) -> None:
        jobs = await self._database.run(self._news.read)
        if jobs is not None and not jobs:
            return
        self._ring_queue()
        self._tails.moved()
        for job_id, tail in self._tails.all():
            if jobs is not None and job_id not in jobs:
                continue
            tail.call()
            if tail.last is None:
                # Nobody reads along.
                continue
            seen = await self._look(job_id)
            while tail.last < seen.last and (events := await self._read(job_id, tail.last)):
                for event in events:
                    tail.tell(event)
            tail.stand(seen.ahead)
