"""`NatsJobs`: the queue and its event logs on a NATS JetStream server, for any number of machines.

A request is one message in a file-backed stream, created once ever (expected last sequence of its
subject: 0), so that queueing and recording are one write. What becomes of a job stands in its log
alone (`gateway.jobs.nats_log`); who works on it is settled there too (`gateway.jobs.nats_claims`).
Who waits here hears of it by one feed of all logs (`gateway.jobs.nats_news`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import nats
import nats.errors
from nats.aio.client import Client
from nats.js import api
from nats.js.errors import NotFoundError

from gateway.jobs import (
    Ahead,
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
from gateway.jobs.nats_claims import REQUEST_HEADER, Claims, Held, job_id_of_subject, record_of
from gateway.jobs.nats_connection import connect
from gateway.jobs.nats_log import Entry, Logged, NatsLog
from gateway.jobs.nats_news import NatsNews
from gateway.jobs.nats_stream import REQUEST_S, TRANSIENT, JetStream
from gateway.jobs.tails import Read, Seen, Tail

_JOB_ID = re.compile(r"job-[0-9a-f]{32}")
# Requests under way at once when many jobs are looked at.
_PARALLEL = 32
# Seconds for which a place in the queue is told from what is known of it.
_PLACES_S = 0.25
# Seconds for which a full queue is taken to stay full, so that refusing stays cheap.
_FULL_S = 0.25


class NatsJobs:
    """See `Jobs`. Open with `NatsJobs.open`."""

    def __init__(self, client: Client, policy: QueuePolicy, *, name: str, retry_s: float) -> None:
        self._client = client
        self._policy = policy
        self._name = name
        self._requests = f"{name}-requests"
        self._stream = JetStream(client, retry_s=retry_s)
        self._log = NatsLog(self._stream, name=name)
        self._claims = Claims(self._stream, self._log, policy, requests=self._requests)
        self._news: NatsNews
        # Numbers of the watched jobs that waited when they were looked at.
        self._numbers: weakref.WeakKeyDictionary[Tail, int] = weakref.WeakKeyDictionary()
        self._asking = asyncio.Lock()
        self._asked_at, self._answer = -math.inf, 0
        self._full_until = 0.0

    @classmethod
    async def open(
        cls,
        url: str,
        policy: QueuePolicy,
        *,
        name: str = "collage",
        replicas: int = 1,
        retry_s: float = 75.0,
    ) -> NatsJobs:
        """Connect, and create the streams and the consumer where absent.

        `name` (letters, digits, `-`) separates queues on one server. `replicas` is how many servers
        keep each new stream. `retry_s` bounds how long an operation waits for a server that is
        away. Raises as `gateway.jobs.nats_connection.connect`.
        """
        opened: list[NatsJobs] = []

        def on_reconnect() -> None:
            for jobs in opened:
                jobs._news.restart()

        client = await connect(url, retry_s=retry_s, on_reconnect=on_reconnect)
        jobs = cls(client, policy, name=name, retry_s=retry_s)
        try:
            for stream, subjects in (
                (jobs._log.stream_name, jobs._log.all_subjects),
                (jobs._requests, jobs._subject("*")),
            ):
                await jobs._stream.create_stream(stream, subjects, replicas=replicas)
            await jobs._claims.open()
        except BaseException:
            await client.close()
            raise
        jobs._news = NatsNews(jobs._stream, jobs._log, jobs._places)
        opened.append(jobs)
        return jobs

    async def submit(self, request_id: str, body: bytes) -> JobRecord:
        """See `Jobs.submit`. Gateways that submit in one instant may exceed the limit together."""
        job_id = job_id_of(request_id)
        try:
            record = await self.get(job_id)
        except JobMissing:
            await self._check_room()
            head = json.dumps({"request_id": request_id, "created_at": time.time()})
            # Whether this or a racing call created it, the job is there afterwards.
            await self._stream.store(
                self._subject(job_id), body, headers={REQUEST_HEADER: head}, behind=0
            )
            record = await self.get(job_id)
        if record.body != body:
            raise RequestReused(request_id)
        return record

    async def claim(self, worker: str, *, wait_s: float) -> Claim | None:
        """See `Jobs.claim`."""
        deadline = time.monotonic() + wait_s
        while True:
            remaining_s = deadline - time.monotonic()
            message = await self._claims.pull(remaining_s)
            if message is not None:
                taking = asyncio.ensure_future(self._claims.take(worker, message))
                try:
                    claim = await asyncio.shield(taking)
                except asyncio.CancelledError:
                    # The caller is gone, so nobody would work on what was taken.
                    if (claim := await taking) is not None:
                        await self.release(claim)
                    raise
                self._full_until = 0.0
                if claim is not None:
                    return claim
            elif remaining_s <= 0:
                return None

    async def extend(self, claim: Claim) -> bool:
        """See `Jobs.extend`."""
        held = self._claims.holding(claim)

        def extend(newest: Entry) -> Entry | None:
            self._claims.check(claim, newest)
            # Whoever works aloud need not say so.
            is_silent = time.monotonic() - held.spoke_at > self._policy.lease_s / 4
            return newest.then("extended") if is_silent else None

        spoke_at = time.monotonic()
        newest = await self._log.advance(claim.job.id, extend)
        if newest.entry.kind == "extended":
            held.spoke_at = spoke_at
        await self._stream.ask(held.message.in_progress)
        return newest.entry.cancel_requested

    async def release(self, claim: Claim, *, rest_s: float = 0) -> None:
        """See `Jobs.release`."""

        def release(newest: Entry) -> Entry:
            self._claims.check(claim, newest)
            return newest.then(
                "released", state=JobState.QUEUED, token="", ahead=None, rest_s=rest_s
            )

        with contextlib.suppress(ClaimLost):
            held = self._claims.holding(claim)
            await self._log.advance(claim.job.id, release)
            # Where this is lost the job comes round when the lease has run out.
            await self._stream.ask(lambda: held.message.nak(delay=rest_s))
        self._claims.drop(claim)

    async def stand(self, claim: Claim, ahead: int) -> None:
        """See `Jobs.stand`."""
        held = self._claims.holding(claim)
        async with held.lock:
            await self._write(claim, held, lambda newest: newest.then("placed", ahead=ahead))

    async def cancelled(self, claim: Claim) -> None:
        """See `Jobs.cancelled`."""
        tail = self._news.tails.of(claim.job.id)
        while True:
            turn = tail.turn
            newest = (await self._log.newest(claim.job.id)).entry
            self._claims.check(claim, newest)
            if newest.cancel_requested:
                return
            await turn.wait()

    async def append(self, claim: Claim, payload: bytes, *, key: str | None = None) -> int:
        """See `Jobs.append`."""
        held = self._claims.holding(claim)
        async with held.lock:
            if key is not None:
                if held.keys is None:
                    held.keys = await self._log.keys(claim.job.id)
                if key in held.keys:
                    self._claims.check(claim, (await self._log.newest(claim.job.id)).entry)
                    return held.keys[key]
            # Unknown until the answer is here: a cancelled call may have stored the event or not.
            keys, held.keys = held.keys, None
            stored = await self._write(claim, held, lambda newest: newest.then_event(key), payload)
            sequence = stored.entry.sequence
            held.keys = keys if keys is None or key is None else keys | {key: sequence}
            return sequence

    async def finish(
        self, claim: Claim, state: JobState, payload: bytes, *, result: bytes = b""
    ) -> None:
        """See `Jobs.finish`. A result for which the message has no room is left out."""
        if not state.is_final:
            raise ValueError(f"state is {state}, must be a final one")
        if len(payload) + len(result) > self._stream.limit_bytes:
            result = b""
        held = self._claims.holding(claim)
        async with held.lock:
            await self._write(
                claim, held, lambda newest: newest.then_end(state), payload, result=result
            )
        self._claims.drop(claim)
        # Where this is lost the job comes round once more, is seen to have ended and leaves the
        # queue then.
        await self._stream.ask(held.message.ack)

    async def events(
        self, job_id: str, *, after: int = 0, live: bool = True
    ) -> AsyncIterator[Event]:
        """See `Jobs.events`."""
        if live:
            async for told in self.watch(job_id, after=after):
                if isinstance(told, Event):
                    yield told
            return
        _, newest = await self._record(job_id)
        read = self._reader(job_id)
        while after < newest.entry.sequence and (events := await read(after)):
            for event in events:
                yield event
            after = events[-1].sequence

    def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event | Ahead]:
        """See `Jobs.watch`."""

        async def look() -> Seen:
            request, newest = await self._record(job_id)
            entry = newest.entry
            ahead = entry.ahead
            if entry.state is JobState.QUEUED:
                self._numbers[self._news.tails.of(job_id)] = request.seq or 0
                ahead = self._ahead(request.seq or 0, await self._handed_out(within_s=_PLACES_S))
                # Told from what may be old; corrected where it is.
                self._news.tails.moved()
            return Seen(last=entry.sequence, is_over=entry.state.is_final, ahead=ahead)

        return self._news.tails.watch(job_id, after, look, self._reader(job_id))

    async def cancel(self, job_id: str, *, payload: bytes) -> JobRecord:
        """See `Jobs.cancel`."""
        request, _ = await self._record(job_id)

        def cancel(newest: Entry) -> Entry | None:
            if newest.state is JobState.QUEUED:
                return newest.then_end(
                    JobState.CANCELLED, cancel_requested=True, number=request.seq or 0
                )
            if newest.state.is_final or newest.cancel_requested:
                return None
            return newest.then("cancel", cancel_requested=True)

        await self._log.advance(job_id, cancel, payload)
        self._full_until = 0.0
        return await self.get(job_id)

    async def get(self, job_id: str) -> JobRecord:
        """See `Jobs.get`."""
        request, newest = await self._record(job_id)
        return record_of(request, newest.entry, newest.result)

    async def list(
        self, *, page_size: int, page_token: str = ""
    ) -> tuple[tuple[JobRecord, ...], str]:
        """See `Jobs.list`. A token is the stream sequence of the last job listed."""
        if page_token and not page_token.isdecimal():
            raise ValueError(f"page_token is {page_token[:40]!r}, must be one that list answered")
        state = (await self._stream.ask(lambda: self._stream.api.stream_info(self._requests))).state
        end = min(int(page_token), state.last_seq + 1) if page_token else state.last_seq + 1
        start = max(end - page_size, state.first_seq, 1)
        turn = asyncio.Semaphore(_PARALLEL)

        async def record(position: int) -> JobRecord | None:
            async with turn:
                request = await self._stream.find(self._requests, seq=position)
                if request is None:
                    return None
                newest = await self._log.newest(job_id_of_subject(request.subject or ""))
                return record_of(request, newest.entry, newest.result)

        found = await asyncio.gather(*(record(each) for each in range(end - 1, start - 1, -1)))
        records = tuple(each for each in found if each is not None)
        return records, str(start) if start > max(state.first_seq, 1) else ""

    async def counts(self) -> dict[JobState, int]:
        """See `Jobs.counts`."""
        await self._news.caught_up()
        requests = await self._stream.ask(lambda: self._stream.api.stream_info(self._requests))
        counted = self._news.census.counts()
        # A job nobody has touched has no log.
        counted[JobState.QUEUED] += requests.state.messages - sum(counted.values())
        return counted

    async def oldest_waiting(self) -> float | None:
        """See `Jobs.oldest_waiting`."""
        await self._news.caught_up()
        last = await self._stream.last(self._requests)
        number = self._news.census.first_waiting(handed_out=await self._handed_out(), up_to=last)
        if number is None:
            return None
        request = await self._stream.find(self._requests, seq=number)
        return None if request is None else record_of(request, Entry()).created_at

    async def position(self, job_id: str) -> int:
        """See `Jobs.position`."""
        request, newest = await self._record(job_id)
        if newest.entry.state is not JobState.QUEUED:
            return 0
        await self._news.caught_up()
        return self._ahead(request.seq or 0, await self._handed_out()) + 1

    async def ready(self) -> None:
        """See `Jobs.ready`: asks for both streams and the consumer, once."""
        try:
            await self._claims.info()
            await self._stream.api.stream_info(self._log.stream_name)
        except (*TRANSIENT, NotFoundError) as error:
            raise JobsUnavailable(f"nats: {error}") from error

    async def close(self) -> None:
        """See `Jobs.close`."""
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            # So that acknowledgements still on their way out are sent.
            await asyncio.wait_for(self._client.flush(), REQUEST_S)
        await self._client.close()
        # Whoever waits finds the connection closed.
        await self._news.close()

    async def _record(self, job_id: str) -> tuple[api.RawStreamMsg, Logged]:
        """The job's request and its newest entry. Raises `JobMissing`."""
        if not _JOB_ID.fullmatch(job_id):
            raise JobMissing(job_id)
        request, newest = await asyncio.gather(
            self._stream.find(self._requests, subject=self._subject(job_id)),
            self._log.newest(job_id),
        )
        if request is None:
            raise JobMissing(job_id)
        return request, newest

    async def _write(
        self,
        claim: Claim,
        held: Held,
        step: Callable[[Entry], Entry],
        payload: bytes = b"",
        *,
        result: bytes = b"",
    ) -> Logged:
        """Write to the log of a claimed job, under the lock of its claim. Raises `ClaimLost`."""

        def checked(newest: Entry) -> Entry:
            self._claims.check(claim, newest)
            return step(newest)

        job_id, spoke_at = claim.job.id, time.monotonic()
        with self._news.writing(job_id):
            held.newest = await self._log.advance(
                job_id, checked, payload, result=result, known=held.newest
            )
            held.spoke_at = spoke_at
            if held.newest.entry.kind == "event":
                self._news.tell(job_id, held.newest)
        return held.newest

    def _reader(self, job_id: str) -> Read:
        """Reads of one watcher, each from where the one before ended."""
        known = (0, 0)

        async def read(after: int) -> Sequence[Event]:
            nonlocal known
            sequence, position = known
            if sequence != after:
                position = await self._log.position(job_id, after)
            while page := await self._log.entries(job_id, behind=position):
                position = page[-1].position
                events = [each.event for each in page if each.entry.kind == "event"]
                if events:
                    known = (events[-1].sequence, position)
                    return events
            return ()

        return read

    def _ahead(self, number: int, handed_out: int) -> int:
        """Jobs that wait before the one of this number."""
        return max(0, self._news.census.waiting(handed_out=handed_out, up_to=number) - 1)

    async def _places(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        handed_out = await self._handed_out()
        places = {}
        for job_id in job_ids:
            tail = self._news.tails.watched(job_id)
            number = 0 if tail is None else self._numbers.get(tail, 0)
            if number and self._news.census.state(job_id) is not JobState.RUNNING:
                places[job_id] = self._ahead(number, handed_out)
        return places

    async def _handed_out(self, *, within_s: float = 0) -> int:
        """The highest number of a job that was given to a worker, as it was so many seconds ago at most."""
        async with self._asking:
            if time.monotonic() - self._asked_at > within_s:
                info = await self._stream.ask(self._claims.info)
                self._asked_at, self._answer = time.monotonic(), info.delivered.stream_seq
            return self._answer

    async def _check_room(self) -> None:
        limit = self._policy.max_queued
        waiting = limit
        if time.monotonic() >= self._full_until:
            await self._news.caught_up()
            last = await self._stream.last(self._requests)
            waiting = self._news.census.waiting(handed_out=await self._handed_out(), up_to=last)
            if waiting < limit:
                return
            self._full_until = time.monotonic() + _FULL_S
        raise QueueFull(waiting, self._policy.retry_after_s)

    def _subject(self, job_id: str) -> str:
        return f"{self._name}.requests.{job_id}"
