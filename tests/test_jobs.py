"""One suite for both queues: SQLite in a folder and a real NATS server."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from nats.js import api
from prometheus_client import REGISTRY

from gateway.jobs import (
    Claim,
    ClaimLost,
    Event,
    JobMissing,
    JobRecord,
    Jobs,
    JobsFull,
    JobState,
    JobsUnavailable,
    QueueFull,
    QueuePolicy,
    RequestReused,
)
from gateway.jobs.nats import NatsJobs
from gateway.jobs.sqlite import SqliteJobs
from gateway.words import Words
from gateway.worker import QUEUE_AGE_S, Worker
from services.common.blobs import FolderBlobStore
from testing.servers import Server, nats_server

pytestmark = pytest.mark.asyncio(loop_scope="module")


def new_id() -> str:
    return str(uuid.uuid4())


def exhausted(job: JobRecord) -> bytes:
    return f"gave up after {job.attempt}".encode()


async def open_jobs(where: str, **limits: float) -> Jobs:
    """A queue as one more process would open it; `where` is a file or a server and a name."""
    policy = QueuePolicy(exhausted=exhausted, **limits)  # type: ignore[arg-type]
    if where.startswith("nats:"):
        url, name = where.split("#")
        return await NatsJobs.open(url, policy, name=name)
    return await SqliteJobs.open(Path(where), policy)


class Queue:
    """A fresh queue, and the processes that opened it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.opened: list[Jobs] = []

    async def open(self, **limits: float) -> Jobs:
        self.opened.append(await open_jobs(self.where, **limits))
        return self.opened[-1]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with nats_server(tmp_path_factory.mktemp("nats")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", params=["sqlite", "nats"])
async def queue(
    request: pytest.FixtureRequest, server: Server, tmp_path: Path
) -> AsyncIterator[Queue]:
    name = f"test-{uuid.uuid4().hex[:8]}"
    place = f"{server.url}#{name}" if request.param == "nats" else str(tmp_path / "jobs.sqlite")
    fresh = Queue(place)
    yield fresh
    for jobs in fresh.opened:
        await jobs.close()


async def claimed(jobs: Jobs, worker: str = "w", wait_s: float = 5) -> Claim:
    claim = await jobs.claim(worker, wait_s=wait_s)
    assert claim is not None
    return claim


async def history(jobs: Jobs, job_id: str, after: int = 0) -> list[Event]:
    return [event async for event in jobs.events(job_id, after=after, live=False)]


async def test_a_request_is_one_job(queue: Queue) -> None:
    one, other = await queue.open(), await queue.open()
    request_id = new_id()
    records = await asyncio.gather(
        *(jobs.submit(request_id, b"body") for jobs in (one, other) for _ in range(8))
    )
    assert {record.id for record in records} == {f"job-{uuid.UUID(request_id).hex}"}
    assert len({record.created_at for record in records}) == 1
    assert (await one.counts())[JobState.QUEUED] == 1
    with pytest.raises(RequestReused):
        await other.submit(request_id, b"another body")
    record = await other.get(records[0].id)
    assert record.request_id == request_id
    assert record.body == b"body"
    assert record.state is JobState.QUEUED
    assert (record.attempt, record.started_at, record.finished_at) == (0, None, None)
    assert not record.cancel_requested
    with pytest.raises(ValueError, match="UUID"):
        await one.submit("../x", b"")
    await one.ready()


async def test_racing_requests_with_two_bodies_leave_one(queue: Queue) -> None:
    jobs = await queue.open()
    request_id = new_id()
    answers = await asyncio.gather(
        *(jobs.submit(request_id, bytes([i])) for i in range(6)), return_exceptions=True
    )
    accepted = [answer for answer in answers if isinstance(answer, JobRecord)]
    refused = [answer for answer in answers if isinstance(answer, RequestReused)]
    assert (len(accepted), len(refused)) == (1, 5)


async def test_an_unknown_job_is_missing(queue: Queue) -> None:
    jobs = await queue.open()
    for job_id in (f"job-{uuid.uuid4().hex}", "*", "a.b", ""):
        with pytest.raises(JobMissing):
            await jobs.get(job_id)
        with pytest.raises(JobMissing):
            await jobs.cancel(job_id, payload=b"")
        with pytest.raises(JobMissing):
            await jobs.position(job_id)
        with pytest.raises(JobMissing):
            await history(jobs, job_id)


async def test_two_workers_do_fifty_jobs_once_each_in_order(queue: Queue) -> None:
    one, other = await queue.open(), await queue.open()
    ids = [(await one.submit(new_id(), b"%d" % i)).id for i in range(50)]
    taken: list[list[int]] = [[], []]

    async def work(jobs: Jobs, mine: list[int]) -> None:
        while (claim := await jobs.claim("w", wait_s=0.3)) is not None:
            mine.append(int(claim.job.body))
            assert await jobs.append(claim, b"step") == 1
            await jobs.finish(claim, JobState.DONE, b"done")

    await asyncio.gather(work(one, taken[0]), work(other, taken[1]))
    assert sorted(taken[0] + taken[1]) == list(range(50))
    assert taken[0] == sorted(taken[0])
    assert taken[1] == sorted(taken[1])
    counts = await other.counts()
    assert counts == {state: 50 if state is JobState.DONE else 0 for state in JobState}
    for job_id in ids[::10]:
        events = await history(other, job_id)
        assert [(e.sequence, e.payload, e.final) for e in events] == [
            (1, b"step", None),
            (2, b"done", JobState.DONE),
        ]


async def test_a_dead_workers_job_goes_to_another_and_its_claim_is_void(queue: Queue) -> None:
    dying, healthy = await queue.open(lease_s=0.7), await queue.open(lease_s=0.7)
    job = await dying.submit(new_id(), b"")
    old = await claimed(dying, "dying")
    assert old.attempt == 1
    await dying.append(old, b"half", key="half")
    assert await healthy.claim("healthy", wait_s=0.3) is None
    new = await claimed(healthy, "healthy")
    assert new.job.id == job.id
    assert new.attempt == 2
    assert new.job.started_at == old.job.started_at
    # Nothing was written since: the claim itself must fence.
    with pytest.raises(ClaimLost):
        await dying.append(old, b"late")
    with pytest.raises(ClaimLost):
        await dying.append(old, b"late", key="half")
    with pytest.raises(ClaimLost):
        await dying.extend(old)
    with pytest.raises(ClaimLost):
        await asyncio.wait_for(dying.cancelled(old), 2)
    with pytest.raises(ClaimLost):
        await dying.finish(old, JobState.DONE, b"late")
    await dying.release(old)
    assert await healthy.append(new, b"half again", key="half") == 1
    assert await healthy.append(new, b"rest", key="rest") == 2
    await healthy.finish(new, JobState.DONE, b"end")
    with pytest.raises(ClaimLost):
        await healthy.finish(new, JobState.FAILED, b"twice")
    events = await history(dying, job.id)
    assert [e.payload for e in events] == [b"half", b"rest", b"end"]
    assert (await dying.get(job.id)).state is JobState.DONE


async def test_extending_keeps_a_claim(queue: Queue) -> None:
    jobs = await queue.open(lease_s=0.8)
    await jobs.submit(new_id(), b"")
    claim = await claimed(jobs)
    waiting = asyncio.create_task(jobs.claim("other", wait_s=1.5))
    for _ in range(8):
        assert not await jobs.extend(claim)
        await asyncio.sleep(0.2)
    assert await waiting is None
    await jobs.finish(claim, JobState.DONE, b"")


async def test_a_released_job_is_claimed_at_once_in_its_old_place(queue: Queue) -> None:
    jobs, other = await queue.open(), await queue.open()
    first = await jobs.submit(new_id(), b"first")
    await jobs.submit(new_id(), b"second")
    claim = await claimed(jobs)
    await jobs.release(claim)
    record = await jobs.get(first.id)
    assert record.state is JobState.QUEUED
    assert record.attempt == 1
    assert await jobs.position(first.id) == 1
    with pytest.raises(ClaimLost):
        await jobs.append(claim, b"")
    began = time.monotonic()
    again = await claimed(other)
    assert time.monotonic() - began < 1
    assert (again.job.id, again.attempt) == (first.id, 2)


async def test_a_cancelled_claim_call_takes_no_job_away(queue: Queue) -> None:
    jobs = await queue.open(lease_s=3)
    chance = random.Random(0)
    for _ in range(20):
        task = asyncio.create_task(jobs.claim("gone", wait_s=5))
        await asyncio.sleep(0.01)
        submitting = asyncio.create_task(jobs.submit(new_id(), b""))
        await asyncio.sleep(chance.random() * 0.01)
        task.cancel()
        await asyncio.wait([task])
        await submitting
        if not task.cancelled() and (claim := task.result()) is not None:
            await jobs.finish(claim, JobState.DONE, b"")
    while (await jobs.counts())[JobState.DONE] < 20:
        await jobs.finish(await claimed(jobs), JobState.DONE, b"")


async def test_parallel_appends_are_numbered_without_gaps(queue: Queue) -> None:
    jobs = await queue.open()
    job = await jobs.submit(new_id(), b"")
    claim = await claimed(jobs)
    numbers = await asyncio.gather(
        *(jobs.append(claim, b"%d" % i, key=str(i % 10)) for i in range(20)),
        *(jobs.append(claim, b"free") for _ in range(10)),
        jobs.cancel(job.id, payload=b"unused"),
    )
    assert sorted(set(numbers[:-1])) == list(range(1, 21))
    assert numbers[:10] == numbers[10:20]
    assert [e.sequence for e in await history(jobs, job.id)] == list(range(1, 21))


async def test_events_resume_and_are_followed_by_many(queue: Queue) -> None:
    jobs, other = await queue.open(), await queue.open()
    job = await jobs.submit(new_id(), b"")

    async def follow(via: Jobs, after: int) -> list[tuple[int, bytes, float]]:
        return [
            (e.sequence, e.payload, time.time() - e.at)
            async for e in via.events(job.id, after=after)
        ]

    early = [asyncio.create_task(follow(via, 0)) for via in (jobs, jobs, other)]
    claim = await claimed(jobs)
    for i in range(1, 10):
        await jobs.append(claim, b"%d" % i)
        await asyncio.sleep(0.02)
    late = [asyncio.create_task(follow(other, 4)), asyncio.create_task(follow(other, 9))]
    assert [e.sequence for e in await history(other, job.id, after=7)] == [8, 9]
    await asyncio.sleep(0.05)
    await jobs.finish(claim, JobState.FAILED, b"10")
    everything = [(i, b"%d" % i) for i in range(1, 11)]
    delays: list[float] = []
    for task in early:
        seen = await asyncio.wait_for(task, 5)
        assert [event[:2] for event in seen] == everything
        delays += [event[2] for event in seen]
    # The median, because one slow disk flush is no slow notification.
    assert sorted(delays)[len(delays) // 2] < 0.1
    assert [event[:2] for event in await late[0]] == everything[4:]
    assert [event[:2] for event in await late[1]] == everything[9:]
    assert [event[:2] for event in await follow(other, 9)] == everything[9:]
    assert await asyncio.wait_for(follow(other, 10), 5) == []


async def test_cancel_ends_a_waiting_job_and_no_other(queue: Queue) -> None:
    jobs = await queue.open()
    ids = [(await jobs.submit(new_id(), b"%d" % i)).id for i in range(3)]
    watching = asyncio.create_task(anext(aiter(jobs.events(ids[1]))))
    record = await jobs.cancel(ids[1], payload=b"never mind")
    assert record.state is JobState.CANCELLED
    assert record.cancel_requested
    assert record.finished_at is not None
    event = await asyncio.wait_for(watching, 2)
    assert (event.sequence, event.payload, event.final) == (1, b"never mind", JobState.CANCELLED)
    assert await jobs.cancel(ids[1], payload=b"again") == record
    assert [(await claimed(jobs)).job.body for _ in range(2)] == [b"0", b"2"]
    assert await jobs.claim("w", wait_s=0.2) is None
    assert len(await history(jobs, ids[1])) == 1


async def test_cancel_reaches_the_running_worker(queue: Queue) -> None:
    jobs, other = await queue.open(), await queue.open()
    for i in range(2):
        await jobs.submit(new_id(), b"%d" % i)
    claim, bystander = await claimed(jobs), await claimed(jobs)
    told = asyncio.create_task(jobs.cancelled(claim))
    untold = asyncio.create_task(jobs.cancelled(bystander))
    await asyncio.sleep(0.1)
    record = await other.cancel(claim.job.id, payload=b"unused")
    assert record.state is JobState.RUNNING
    assert record.cancel_requested
    await asyncio.wait_for(told, 1)
    assert await jobs.extend(claim)
    assert await jobs.append(claim, b"tidying up") == 1
    await jobs.finish(claim, JobState.CANCELLED, b"stopped")
    assert not await jobs.extend(bystander)
    assert not untold.done()
    untold.cancel()
    done = await other.get(claim.job.id)
    assert done.state is JobState.CANCELLED
    assert await other.cancel(claim.job.id, payload=b"more") == done
    assert [e.payload for e in await history(other, done.id)] == [b"tidying up", b"stopped"]


async def test_a_cancel_request_outlives_the_worker(queue: Queue) -> None:
    dying, healthy = await queue.open(lease_s=0.5), await queue.open(lease_s=0.5)
    job = await dying.submit(new_id(), b"")
    await claimed(dying)
    await healthy.cancel(job.id, payload=b"unused")
    again = await claimed(healthy)
    assert again.job.cancel_requested
    await asyncio.wait_for(healthy.cancelled(again), 1)


async def test_a_full_queue_refuses(queue: Queue) -> None:
    jobs = await queue.open(max_queued=3, retry_after_s=7)
    request_ids = [new_id() for _ in range(3)]
    ids = [(await jobs.submit(request_id, b"")).id for request_id in request_ids]
    with pytest.raises(QueueFull) as refused:
        await jobs.submit(new_id(), b"")
    assert refused.value.retry_after_s == 7
    assert refused.value.retryable
    # A job that exists is answered all the same.
    assert (await jobs.submit(request_ids[0], b"")).id == ids[0]
    await jobs.cancel(ids[1], payload=b"")
    await jobs.submit(new_id(), b"")
    with pytest.raises(QueueFull):
        await jobs.submit(new_id(), b"")
    await claimed(jobs)
    await jobs.submit(new_id(), b"")


async def test_a_job_that_kills_its_workers_ends_failed(queue: Queue) -> None:
    jobs = await queue.open(lease_s=0.3, max_lost=2)
    job = await jobs.submit(new_id(), b"")
    for attempt in (1, 2):
        assert (await claimed(jobs)).attempt == attempt
    assert await jobs.claim("w", wait_s=0.9) is None
    record = await jobs.get(job.id)
    assert record.state is JobState.FAILED
    assert record.attempt == 2
    (event,) = await history(jobs, job.id)
    assert (event.payload, event.final) == (b"gave up after 2", JobState.FAILED)


async def test_listing_pages_newest_first(queue: Queue) -> None:
    jobs = await queue.open()
    assert await jobs.list(page_size=5) == ((), "")
    ids = [(await jobs.submit(new_id(), b"")).id for _ in range(7)]
    await jobs.finish(await claimed(jobs), JobState.DONE, b"")
    seen: list[JobRecord] = []
    token = ""
    pages = 0
    while True:
        page, token = await jobs.list(page_size=3, page_token=token)
        seen += page
        pages += 1
        if pages == 1:
            # A job that comes meanwhile shifts nothing.
            await jobs.submit(new_id(), b"")
        if not token:
            break
    assert pages == 3
    assert [record.id for record in seen] == ids[::-1]
    assert seen[-1].state is JobState.DONE
    with pytest.raises(ValueError, match="page_token"):
        await jobs.list(page_size=3, page_token="x")


async def test_counts_and_positions(queue: Queue) -> None:
    jobs = await queue.open()
    ids = [(await jobs.submit(new_id(), b"")).id for _ in range(6)]
    assert [await jobs.position(job_id) for job_id in ids] == [1, 2, 3, 4, 5, 6]
    done, failed, _running = [await claimed(jobs) for _ in range(3)]
    await jobs.finish(done, JobState.DONE, b"")
    await jobs.finish(failed, JobState.FAILED, b"")
    await jobs.cancel(ids[4], payload=b"")
    assert [await jobs.position(job_id) for job_id in ids] == [0, 0, 0, 1, 0, 2]
    assert await jobs.counts() == {
        JobState.QUEUED: 2,
        JobState.RUNNING: 1,
        JobState.DONE: 1,
        JobState.FAILED: 1,
        JobState.CANCELLED: 1,
    }


async def test_the_first_that_waits_tells_how_long_the_queue_is_not_served(queue: Queue) -> None:
    jobs = await queue.open()
    assert await jobs.oldest_waiting() is None
    first, second, third = [await jobs.submit(new_id(), b"") for _ in range(3)]
    assert await jobs.oldest_waiting() == first.created_at
    taken = await claimed(jobs)
    assert await jobs.oldest_waiting() == second.created_at
    await jobs.cancel(second.id, payload=b"")
    assert await jobs.oldest_waiting() == third.created_at
    # Given back it waits again, as old as it is.
    await jobs.release(taken)
    assert await jobs.oldest_waiting() == first.created_at
    for _ in range(2):
        await jobs.finish(await claimed(jobs), JobState.DONE, b"")
    assert await jobs.oldest_waiting() is None


async def test_a_gateway_tells_prometheus_how_many_wait_and_for_how_long(
    queue: Queue, tmp_path: Path
) -> None:
    jobs = await queue.open()
    for _ in range(2):
        await jobs.submit(new_id(), b"")
    # No slots: nobody takes them up, and no pipeline is asked.
    worker = Worker(jobs, None, Words(FolderBlobStore(tmp_path / "blobs")), slots=0)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(10):
            # A metric rings no bell.
            while not REGISTRY.get_sample_value("collage_queue_age_seconds"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        await worker.stop()
    assert REGISTRY.get_sample_value("collage_jobs", {"state": "queued"}) == 2
    assert 0 < (REGISTRY.get_sample_value("collage_queue_age_seconds") or 0) < 10
    QUEUE_AGE_S.set(0)


async def test_everything_is_there_after_reopening(queue: Queue) -> None:
    jobs = await queue.open(lease_s=0.5)
    job = await jobs.submit(new_id(), b"\x00body")
    later = await jobs.submit(new_id(), b"later")
    claim = await claimed(jobs)
    await jobs.append(claim, b"\x00event", key="k")
    await jobs.close()
    queue.opened.clear()
    reopened = await queue.open(lease_s=0.5)
    assert (await claimed(reopened)).job.id == later.id
    again = await claimed(reopened)
    assert (again.job.id, again.job.body) == (job.id, b"\x00body")
    assert await reopened.append(again, b"", key="k") == 1
    assert [e.payload for e in await history(reopened, job.id)] == [b"\x00event"]


async def test_closing_ends_every_wait(queue: Queue) -> None:
    jobs = await queue.open()
    job = await jobs.submit(new_id(), b"")
    claim = await claimed(jobs)
    waits = [
        asyncio.create_task(anext(aiter(jobs.events(job.id)))),
        asyncio.create_task(jobs.cancelled(claim)),
        asyncio.create_task(jobs.claim("w", wait_s=60)),
    ]
    await asyncio.sleep(0.2)
    await jobs.close()
    queue.opened.clear()
    for wait in waits:
        with pytest.raises(JobsUnavailable):
            await asyncio.wait_for(wait, 5)
    with pytest.raises(JobsUnavailable):
        await jobs.ready()


async def work_until_killed(where: str) -> None:
    """What the killed process runs: claim, log two events, finish, as fast as it can."""
    jobs = await open_jobs(where, lease_s=0.5)
    print("up", flush=True)  # noqa: T201
    while True:
        if (claim := await jobs.claim("doomed", wait_s=5)) is not None:
            for key in ("one", "two"):
                await jobs.append(claim, key.encode(), key=key)
            await jobs.finish(claim, JobState.DONE, b"end")
            print(claim.job.id, flush=True)  # noqa: T201


async def test_workers_killed_at_any_point_leave_whole_jobs(queue: Queue) -> None:
    jobs = await queue.open(lease_s=0.5)
    ids = [(await jobs.submit(new_id(), b"")).id for _ in range(120)]
    chance = random.Random(1)
    acknowledged: set[str] = set()
    for _ in range(2):
        worker = subprocess.Popen(  # noqa: ASYNC220 # fork and exec only, no wait
            [
                sys.executable,
                "-c",
                "import asyncio, sys; from tests.test_jobs import work_until_killed;"
                "asyncio.run(work_until_killed(sys.argv[1]))",
                queue.where,
            ],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PYTHONPATH": "."},
        )
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == b"up\n"
        await asyncio.sleep(0.02 + chance.random() * 0.1)
        worker.kill()
        said = (await asyncio.to_thread(worker.stdout.read)).decode().split("\n")
        worker.wait()
        acknowledged |= {line for line in said if len(line) == len(ids[0])}
    assert acknowledged
    counts = await jobs.counts()
    assert counts[JobState.DONE] >= len(acknowledged)
    while (await jobs.counts())[JobState.DONE] < len(ids):
        claim = await claimed(jobs)
        assert claim.job.id not in acknowledged
        for key in ("one", "two"):
            await jobs.append(claim, key.encode(), key=key)
        await jobs.finish(claim, JobState.DONE, b"end")
    for job_id in ids:
        events = await history(jobs, job_id)
        assert [e.sequence for e in events] == [1, 2, 3]
        assert [e.payload for e in events] == [b"one", b"two", b"end"]


async def test_nats_refuses_an_old_delivery_of_a_job_that_moved_on(server: Server) -> None:
    queue = Queue(f"{server.url}#stale")
    slow, quick = await queue.open(lease_s=0.5), await queue.open(lease_s=0.5)
    assert isinstance(slow, NatsJobs)
    await slow.submit(new_id(), b"")
    lying_about = await slow._claims.pull(2)
    assert lying_about is not None
    claim = await claimed(quick)
    # It came first, but the job was delivered anew before anyone acted on it.
    assert await slow._claims.take("slow", lying_about) is None
    await quick.append(claim, b"mine still")
    await quick.finish(claim, JobState.DONE, b"")
    for jobs in queue.opened:
        await jobs.close()


async def test_nats_takes_no_job_from_a_worker_that_writes(server: Server) -> None:
    """A server that was killed delivers anew what is being worked on; a nak makes it do so at once."""
    queue = Queue(f"{server.url}#kept")
    holder, other = await queue.open(lease_s=1.5), await queue.open(lease_s=1.5)
    assert isinstance(holder, NatsJobs)
    await holder.submit(new_id(), b"")
    claim = await claimed(holder)
    for number in range(1, 4):
        await holder._client.publish(holder._claims._held[claim.token].message.reply, b"-NAK")
        waiting = asyncio.create_task(other.claim("other", wait_s=0.5))
        if number == 2:
            await holder.extend(claim)
        else:
            assert await holder.append(claim, b"mine", key=str(number)) == (number + 1) // 2
        assert await waiting is None
    # Silent from now on, and so given to the other when the lease has run out.
    began = time.monotonic()
    assert (await claimed(other)).attempt == 2
    assert time.monotonic() - began < 2.5
    for jobs in queue.opened:
        await jobs.close()


async def test_nats_finds_its_own_entry_when_the_answer_was_lost(server: Server) -> None:
    """Both writes of a repeated request arrive; the second is refused and must count as done."""
    queue = Queue(f"{server.url}#twice")
    jobs = await queue.open()
    assert isinstance(jobs, NatsJobs)
    once = jobs._stream.api.publish

    async def lose_the_answer(*args: object, **kwargs: object) -> object:
        jobs._stream.api.publish = once
        await once(*args, **kwargs)
        raise TimeoutError

    def lose_next_answer() -> None:
        jobs._stream.api.publish = lose_the_answer

    lose_next_answer()
    job = await jobs.submit(new_id(), b"")
    claim = await claimed(jobs)
    lose_next_answer()
    assert await jobs.append(claim, b"one") == 1
    assert await jobs.append(claim, b"two") == 2
    lose_next_answer()
    await jobs.finish(claim, JobState.DONE, b"end")
    assert [e.payload for e in await history(jobs, job.id)] == [b"one", b"two", b"end"]
    await jobs.close()


async def test_nats_killed_in_mid_traffic_loses_nothing(server: Server) -> None:
    queue = Queue(f"{server.url}#crash")
    gateways = [await queue.open(lease_s=3) for _ in range(2)]
    acknowledged: dict[str, list[bytes]] = {}
    finished: Counter[str] = Counter()
    stopping = asyncio.Event()

    async def submit(jobs: Jobs) -> None:
        while not stopping.is_set():
            acknowledged[(await jobs.submit(new_id(), b"")).id] = []
            await asyncio.sleep(0.01)

    async def work(jobs: Jobs) -> None:
        # A submission under way when the others stop still is to be worked on.
        while not all(task.done() for task in submitting) or len(finished) < len(acknowledged):
            if (claim := await jobs.claim("w", wait_s=0.5)) is None:
                continue
            for i in range(3):
                assert await jobs.append(claim, b"%d" % i, key=str(i)) == i + 1
            await jobs.finish(claim, JobState.DONE, b"end")
            finished[claim.job.id] += 1

    async def follow(jobs: Jobs, job_id: str) -> list[int]:
        return [e.sequence async for e in jobs.events(job_id)]

    watched = (await gateways[0].submit(new_id(), b"")).id
    acknowledged[watched] = []
    watching = asyncio.create_task(follow(gateways[1], watched))
    submitting = [asyncio.create_task(submit(jobs)) for jobs in gateways]
    working = [asyncio.create_task(work(jobs)) for jobs in gateways]
    for _ in range(2):
        await asyncio.sleep(0.7)
        server.crash()
        await asyncio.sleep(0.5)
        await server.restart()
    await asyncio.sleep(0.5)
    stopping.set()
    await asyncio.wait_for(asyncio.gather(*submitting, *working), 30)
    assert await asyncio.wait_for(watching, 5) == [1, 2, 3, 4]
    assert len(acknowledged) > 20
    counts = await gateways[0].counts()
    assert counts[JobState.DONE] == sum(counts.values()) >= len(acknowledged)
    for job_id in acknowledged:
        events = await history(gateways[0], job_id)
        assert [e.payload for e in events] == [b"0", b"1", b"2", b"end"]
    for jobs in gateways:
        await jobs.close()


async def test_a_file_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    """Its leases were on the wall clock; who held one is gone."""
    path = tmp_path / "jobs.sqlite"
    database = sqlite3.connect(path)
    database.executescript(
        "CREATE TABLE jobs (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
        " request_id TEXT NOT NULL, state TEXT NOT NULL, attempt INTEGER NOT NULL,"
        " created_at REAL NOT NULL, started_at REAL, finished_at REAL, body BLOB NOT NULL,"
        " cancel_requested INTEGER NOT NULL, token TEXT, lease_until REAL);"
        "CREATE INDEX open_jobs ON jobs (number) WHERE state IN ('queued', 'running');"
        "CREATE TABLE events (job INTEGER NOT NULL REFERENCES jobs (number), sequence INTEGER"
        " NOT NULL, at REAL NOT NULL, payload BLOB NOT NULL, key TEXT, final TEXT,"
        " PRIMARY KEY (job, sequence), UNIQUE (job, key));"
        "INSERT INTO jobs VALUES (1, 'job-a', 'a', 'running', 1, 5.0, 6.0, NULL, x'01', 0, 't', 9e9);"
        "INSERT INTO jobs VALUES (2, 'job-b', 'b', 'done', 1, 5.0, 6.0, 7.0, x'02', 0, NULL, NULL);"
        "INSERT INTO events VALUES (1, 1, 6.0, x'03', 'k', NULL), (2, 1, 7.0, x'04', NULL, 'done');"
        "PRAGMA user_version = 1"
    )
    database.close()
    for _ in range(2):
        jobs = await open_jobs(str(path), lease_s=0.5)
        claim = await claimed(jobs)
        assert (claim.job.id, claim.job.body) == ("job-a", b"\x01")
        assert await jobs.append(claim, b"", key="k") == 1
        assert [e.payload for e in await history(jobs, "job-b")] == [b"\x04"]
        assert (await jobs.get("job-b")).result == b""
        await jobs.close()


async def test_nats_without_room_says_full_and_goes_on(server: Server) -> None:
    """It was tried again for more than a minute, and then did "not answer"."""
    queue = Queue(f"{server.url}#small")
    jobs = await queue.open()
    assert isinstance(jobs, NatsJobs)
    await jobs.submit(new_id(), b"x")
    config = (await jobs._stream.api.stream_info("small-requests")).config
    limits = {"max_bytes": 20_000, "discard": api.DiscardPolicy.NEW}
    await jobs._stream.api.update_stream(config.evolve(**limits))
    with pytest.raises(JobsFull, match="no room"):
        await jobs.submit(new_id(), bytes(50_000))
    assert (await jobs.counts())[JobState.QUEUED] == 1
    await jobs._stream.api.update_stream(config)
    await jobs.submit(new_id(), bytes(50_000))
    await jobs.close()
