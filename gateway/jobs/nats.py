"""`NatsJobs`: the queue and its event logs on a NATS JetStream server, for any number of machines.

A request is one message in a file-backed stream, created once ever (expected last sequence of its
subject: 0), so that queueing and recording are one write. What becomes of a job stands in its log
alone (`gateway.jobs.nats_log`); who works on it is settled there too (`gateway.jobs.nats_claims`).
Who waits here hears of it by one feed of all logs (`gateway.jobs.nats_news`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from nats.js.errors import NotFoundError

from gateway.jobs import (
    Ahead,
    Claim,
    Event,
    JobMissing,
    JobRecord,
    JobState,
    JobsUnavailable,
    QueuePolicy,
    RequestReused,
    job_id_of,
)
from gateway.jobs.nats_census import Census
from gateway.jobs.nats_claims import Claims, Held
from gateway.jobs.nats_log import Entry, Logged, NatsLog
from gateway.jobs.nats_news import NatsNews
from gateway.jobs.nats_places import Places
from gateway.jobs.nats_requests import Requests, record_of
from gateway.jobs.nats_stream import TRANSIENT, JetStream
from gateway.jobs.tails import Seen

# Seconds for which a place in the queue is told from what is known of it.
_PLACES_S = 0.25


class NatsJobs:
    """See `Jobs`. Open with `NatsJobs.open`."""

    def __init__(self, stream: JetStream, policy: QueuePolicy, *, name: str) -> None:
        self._stream = stream
        self._policy = policy
        self._log = NatsLog(stream, name=name)
        self._requests = Requests(stream, self._log, name=name)
        self._claims = Claims(stream, self._log, self._requests, policy)
        self._census = Census()
        self._places = Places(stream, self._claims, self._requests, self._census, policy)
        self._news: NatsNews

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
        away.
        """
        stream = await JetStream.connect(url, retry_s=retry_s)
        jobs = cls(stream, policy, name=name)
        try:
            for each in (jobs._log, jobs._requests):
                await stream.create_stream(each.stream_name, each.all_subjects, replicas=replicas)
            await jobs._claims.open()
        except BaseException:
            await stream.close()
            raise
        jobs._news = NatsNews(stream, jobs._log, jobs._census, jobs._places.of)
        return jobs

    async def submit(self, request_id: str, body: bytes) -> JobRecord:
        """See `Jobs.submit`. Gateways that submit in one instant may exceed the limit together."""
        job_id = job_id_of(request_id)
        try:
            record = await self.get(job_id)
        except JobMissing:
            await self._news.caught_up()
            await self._places.check_room()
            await self._requests.add(job_id, request_id, body)
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
                self._places.left()
                if claim is not None:
                    return claim
            elif remaining_s <= 0:
                return None

    async def extend(self, claim: Claim) -> bool:
        """See `Jobs.extend`."""
        return await self._claims.extend(claim)

    async def release(self, claim: Claim, *, rest_s: float = 0) -> None:
        """See `Jobs.release`."""
        await self._claims.release(claim, rest_s)

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
        _, newest = await self._requests.find(job_id)
        read = self._log.reader(job_id)
        while after < newest.entry.sequence and (events := await read(after)):
            for event in events:
                yield event
            after = events[-1].sequence

    def watch(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event | Ahead]:
        """See `Jobs.watch`."""

        async def look() -> Seen:
            request, newest = await self._requests.find(job_id)
            entry = newest.entry
            ahead = entry.ahead
            if entry.state is JobState.QUEUED:
                number = self._news.tails.of(job_id).number = request.seq or 0
                ahead = await self._places.ahead(number, within_s=_PLACES_S)
                # Told from what may be old; corrected where it is.
                self._news.tails.moved()
            return Seen(last=entry.sequence, is_over=entry.state.is_final, ahead=ahead)

        return self._news.tails.watch(job_id, after, look, self._log.reader(job_id))

    async def cancel(self, job_id: str, *, payload: bytes) -> JobRecord:
        """See `Jobs.cancel`."""
        request, _ = await self._requests.find(job_id)

        def cancel(newest: Entry) -> Entry | None:
            if newest.state is JobState.QUEUED:
                return newest.then_end(
                    JobState.CANCELLED, cancel_requested=True, number=request.seq or 0
                )
            if newest.state.is_final or newest.cancel_requested:
                return None
            return newest.then("cancel", cancel_requested=True)

        await self._log.advance(job_id, cancel, payload)
        self._places.left()
        return await self.get(job_id)

    async def get(self, job_id: str) -> JobRecord:
        """See `Jobs.get`."""
        request, newest = await self._requests.find(job_id)
        return record_of(request, newest.entry, newest.result)

    async def list(
        self, *, page_size: int, page_token: str = ""
    ) -> tuple[tuple[JobRecord, ...], str]:
        """See `Jobs.list`."""
        return await self._requests.page(page_size, page_token)

    async def counts(self) -> dict[JobState, int]:
        """See `Jobs.counts`."""
        await self._news.caught_up()
        counted = self._census.counts()
        # A job nobody has touched has no log.
        counted[JobState.QUEUED] += await self._requests.count() - sum(counted.values())
        return counted

    async def position(self, job_id: str) -> int:
        """See `Jobs.position`."""
        request, newest = await self._requests.find(job_id)
        if newest.entry.state is not JobState.QUEUED:
            return 0
        await self._news.caught_up()
        return await self._places.ahead(request.seq or 0) + 1

    async def ready(self) -> None:
        """See `Jobs.ready`: asks for both streams and the consumer, once."""
        try:
            await self._claims.info()
            await self._stream.api.stream_info(self._log.stream_name)
        except (*TRANSIENT, NotFoundError) as error:
            raise JobsUnavailable(f"nats: {error}") from error

    async def close(self) -> None:
        """See `Jobs.close`."""
        await self._stream.close()
        # Whoever waits finds the connection closed.
        await self._news.close()

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
