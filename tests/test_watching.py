"""Watching at scale: what a watcher costs, what it is told of its place, and what waiting costs a job. Both queues."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.jobs import Ahead, ClaimLost, Event, Jobs, JobState, JobsUnavailable
from gateway.jobs.nats import NatsJobs
from gateway.jobs.sqlite import SqliteJobs
from tests.test_jobs import Queue, claimed, history, new_id, open_jobs
from tests.test_jobs import queue as queue  # fixtures are found by name
from tests.test_jobs import server as server

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Meter:
    """What a queue sends to its store: SQLite's statements, NATS' messages both ways."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs
        self._statements: list[str] = []

    async def start(self) -> Meter:
        if isinstance(self.jobs, SqliteJobs):
            database = self.jobs._database
            await database.run(
                lambda: database._connection.set_trace_callback(self._statements.append)
            )
        return self

    def read(self) -> int:
        if isinstance(self.jobs, NatsJobs):
            return self.jobs._client.stats["in_msgs"] + self.jobs._client.stats["out_msgs"]
        # The look for other processes' changes is one for all, twenty times a second.
        return sum("data_version" not in each for each in self._statements)

    async def over(self, work: Any) -> int:
        """What `work` costs, with all that it sets off."""
        before = self.read()
        await work
        await asyncio.sleep(0.3)
        return self.read() - before


@contextlib.asynccontextmanager
async def watching(jobs: Jobs, job_id: str, count: int) -> AsyncIterator[list[list[Event | Ahead]]]:
    """So many watchers of a job, past its history; what each was told."""
    told: list[list[Event | Ahead]] = [[] for _ in range(count)]

    async def watch(mine: list[Event | Ahead]) -> None:
        async for each in jobs.watch(job_id):
            mine.append(each)

    tasks = [asyncio.create_task(watch(mine)) for mine in told]
    # Beyond the one telling of places that a look sets off.
    await asyncio.sleep(1.5)
    yield told
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_watchers_of_other_jobs_cost_an_event_nothing(queue: Queue) -> None:
    jobs = await queue.open()
    await jobs.submit(new_id(), b"")
    other = await jobs.submit(new_id(), b"")
    claim = await claimed(jobs)
    meter = await Meter(jobs).start()

    async def twenty() -> None:
        for number in range(20):
            await jobs.append(claim, b"%d" % number)
            await jobs.extend(claim)

    alone = await meter.over(twenty())
    async with watching(jobs, other.id, 60) as told:
        beside = await meter.over(twenty())
    assert [len(mine) for mine in told] == [1] * 60
    # NATS tells twice a second that it lives.
    assert abs(beside - alone) <= 8, (alone, beside)
    assert alone <= 20 * 12


async def test_many_watchers_of_one_job_read_it_once(queue: Queue) -> None:
    jobs, elsewhere = await queue.open(), await queue.open()
    job = await jobs.submit(new_id(), b"")
    claim = await claimed(elsewhere)
    await elsewhere.append(claim, b"before")
    meter = await Meter(jobs).start()
    async with watching(jobs, job.id, 40) as told:
        # Written by another process, an event at a time.
        async def five() -> None:
            for number in range(5):
                await elsewhere.append(claim, b"%d" % number)
                await asyncio.sleep(0.12)

        cost = await meter.over(five())
        assert cost <= 5 * 12 + 4, cost
        leases = await meter.over(elsewhere.extend(claim))
        assert leases <= 4, leases
    everything = [b"before", *(b"%d" % number for number in range(5))]
    assert all([each.payload for each in mine] == everything for mine in told)


async def test_what_is_behind_is_not_read(queue: Queue) -> None:
    jobs = await queue.open()
    job = await jobs.submit(new_id(), b"")
    await jobs.submit(new_id(), b"")
    claim, noise = await claimed(jobs), await claimed(jobs)
    for number in range(150):
        await jobs.append(claim, b"%d" % number)
        await jobs.append(noise, b"")
    meter = await Meter(jobs).start()

    async def tail() -> None:
        for after in (0, 75, 149, 150, 151):
            assert len(await history(jobs, job.id, after=after)) == max(0, 150 - after)

    # The whole history once, and what follows; never more than is asked for, and a search for its place.
    assert await meter.over(tail()) <= 150 + 75 + 1 + 150


async def test_a_watcher_hears_its_place_and_at_a_bounded_rate(queue: Queue) -> None:
    jobs, elsewhere = await queue.open(), await queue.open()
    for _ in range(6):
        job = await jobs.submit(new_id(), b"")
    heard: list[tuple[float, int]] = []
    ended = asyncio.Event()

    async def watch(via: Jobs) -> None:
        async for told in via.watch(job.id):
            if isinstance(told, Ahead):
                heard.append((time.monotonic(), told.jobs))
            elif told.final:
                ended.set()

    for via in (jobs, elsewhere):
        heard.clear()
        ended.clear()
        watcher = asyncio.create_task(watch(via))
        await asyncio.sleep(0.2)
        first = heard[0][1]
        # Two leave at once: that is told together.
        for _ in range(2):
            await jobs.finish(await claimed(jobs), JobState.DONE, b"")
        await asyncio.sleep(2.3)
        assert heard[-1][1] == first - 2
        times = [at for at, _ in heard]
        assert all(b - a > 0.9 for a, b in itertools.pairwise(times[1:])), heard
        watcher.cancel()
    watcher = asyncio.create_task(watch(elsewhere))
    await jobs.finish(await claimed(jobs), JobState.DONE, b"")
    claim = await claimed(jobs)
    assert claim.job.id == job.id
    await asyncio.sleep(0.3)
    # And then where its worker has it wait.
    for ahead in (31, 7, 0):
        await jobs.stand(claim, ahead)
        await asyncio.sleep(0.3)
        assert heard[-1][1] == ahead
    await jobs.stand(claim, 4)
    assert (await elsewhere.get(job.id)).ahead == 4
    async with asyncio.timeout(2):
        async for told in elsewhere.watch(job.id):
            if told == Ahead(jobs=4):
                break
    await jobs.finish(claim, JobState.DONE, b"")
    await asyncio.wait_for(ended.wait(), 2)
    assert [each.payload for each in await history(jobs, job.id)] == [b""]
    with pytest.raises(ClaimLost):
        await jobs.stand(claim, 1)


async def test_a_finished_jobs_record_holds_its_result(queue: Queue) -> None:
    jobs, other = await queue.open(), await queue.open()
    job = await jobs.submit(new_id(), b"")
    assert (await other.get(job.id)).result == b""
    claim = await claimed(jobs)
    await jobs.finish(claim, JobState.DONE, b"end", result=b"\x00all of it")
    assert (await other.get(job.id)).result == b"\x00all of it"
    (event,) = await history(other, job.id)
    assert (event.payload, event.final) == (b"end", JobState.DONE)


async def test_a_job_that_is_given_back_loses_no_attempt(queue: Queue) -> None:
    """A part that was down for 40 minutes failed its jobs as INTERNAL: each try counted as a worker lost."""
    jobs = await queue.open(max_lost=2, lease_s=0.5)
    job = await jobs.submit(new_id(), b"")
    for _ in range(5):
        await jobs.release(await claimed(jobs))
    record = await jobs.get(job.id)
    assert (record.state, record.attempt, record.lost) == (JobState.QUEUED, 5, 0)
    # A worker that dies does count.
    await claimed(jobs)
    again = await claimed(jobs)
    assert (again.attempt, again.job.lost) == (7, 1)
    assert await jobs.claim("w", wait_s=1.2) is None
    record = await jobs.get(job.id)
    assert (record.state, record.attempt, record.lost) == (JobState.FAILED, 7, 2)


async def test_a_job_that_rests_keeps_its_place_and_is_not_claimed(queue: Queue) -> None:
    jobs, other = await queue.open(), await queue.open()
    resting = await jobs.submit(new_id(), b"")
    ids = [(await jobs.submit(new_id(), b"")).id for _ in range(2)]
    began = time.monotonic()
    await jobs.release(await claimed(jobs), rest_s=1.0)
    assert (await jobs.get(resting.id)).state is JobState.QUEUED
    assert await jobs.position(resting.id) == 1
    # It holds nobody up.
    assert (await claimed(other)).job.id == ids[0]
    waited = await jobs.claim("w", wait_s=0.2)
    assert waited is not None
    assert waited.job.id == ids[1]
    again = await claimed(other)
    assert again.job.id == resting.id
    assert 0.9 < time.monotonic() - began < 2.5
    # One that rests can be cancelled.
    await other.release(again, rest_s=30)
    record = await jobs.cancel(resting.id, payload=b"no more")
    assert record.state is JobState.CANCELLED


async def test_leases_do_not_hang_on_a_clock_that_is_set(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an hour forward, a live worker's job was given away; back, a dead one's was kept from all."""
    holder, other = await queue.open(lease_s=1.0), await queue.open(lease_s=1.0)
    job = await holder.submit(new_id(), b"")
    real = time.time
    claim = await claimed(holder)
    monkeypatch.setattr(time, "time", lambda: real() + 1800)
    if isinstance(holder, NatsJobs):
        # Delivered anew before its time, as after a crash of the server.
        reply = holder._claims.holding(claim).message.reply
        await holder._client.publish(reply, b"-NAK")
    assert await other.claim("other", wait_s=0.4) is None
    await holder.append(claim, b"mine still")
    monkeypatch.setattr(time, "time", lambda: real() - 1800)
    began = time.monotonic()
    taken = await claimed(other)
    assert (taken.job.id, taken.attempt) == (job.id, 2)
    assert time.monotonic() - began < 2.5


async def test_what_waits_behind_a_close_is_told_that_it_is_closed(queue: Queue) -> None:
    """SQLite raised its own error to those whose statements were still to come when the file was closed."""
    jobs = await open_jobs(queue.where)
    job = await jobs.submit(new_id(), b"")
    if isinstance(jobs, SqliteJobs):
        jobs._database._executor.submit(time.sleep, 0.3)
    asked = [asyncio.create_task(jobs.get(job.id)) for _ in range(20)]
    await asyncio.sleep(0.05)
    closing = asyncio.create_task(jobs.close())
    await asyncio.sleep(0.05)
    late = [asyncio.create_task(jobs.get(job.id)) for _ in range(20)]
    answers = await asyncio.gather(*asked, *late, return_exceptions=True)
    await closing
    for answer in answers:
        assert answer == job or isinstance(answer, JobsUnavailable), repr(answer)
    assert isinstance(answers[-1], JobsUnavailable)
