"""`NatsJobs`: the queue and its event logs on a NATS JetStream server, for any number of machines.

A request is one message in a file-backed stream, created once ever (expected last sequence of its
subject: 0), so that queueing and recording are one write. A durable pull consumer hands the
messages out under a lease (explicit acknowledgement, acknowledgement wait). What becomes of a job
stands in its log alone (`gateway.nats_log`): a claim is an entry there, it lasts while its worker
writes to the log, and the entry of a later claim fences it off. A message is acknowledged after its
job has ended; where that is lost, the job comes round again, is seen to have ended, and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import nats
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api
from nats.js.errors import NotFoundError

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
from gateway.nats_log import REQUEST_S, TRANSIENT, Entry, JetStream, Logged, NatsLog
from services.common.telemetry import log

_JOB_ID = re.compile(r"job-[0-9a-f]{32}")
_CONSUMER = "workers"
_REQUEST_HEADER = "Collage-Request"
# Seconds after which a pull is sent again: one that was lost with the server costs no more than
# this.
_PULL_S = 2.0
# Seconds beyond a pull's own end after which its answer is not waited for.
_PULL_GRACE_S = 0.5
# Requests under way at once when many jobs are looked at.
_PARALLEL = 32
# Jobs that may be claimed at once over all gateways.
_MAX_CLAIMED = 4096
# What is left of a lease when its job comes round, in seconds, up to which it is waited for. The job was sent back
# before, for at least 50 ms, in which leases that ran out later passed it by.
_ENDING_S = 0.25
# Seconds for which a full queue is taken to stay full, so that refusing stays cheap.
_FULL_S = 0.25


@dataclass(slots=True, kw_only=True)
class _Held:
    """What this process knows of a claim it made. The lock puts its appends in a row."""

    message: Msg
    newest: Logged
    keys: dict[str, int] | None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class NatsJobs:
    """See `Jobs`. Open with `NatsJobs.open`."""

    def __init__(self, client: Client, policy: QueuePolicy, *, name: str, retry_s: float) -> None:
        self._client = client
        self._policy = policy
        self._stream = JetStream(client, retry_s=retry_s)
        self._log = NatsLog(self._stream, name=name)
        self._name = name
        self._requests = f"{name}-requests"
        self._held: dict[str, _Held] = {}
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
        away.
        """

        async def on_error(error: Exception) -> None:
            # The client tells of every failed try to connect again.
            log.debug("nats error", error=repr(error))

        async def on_disconnect() -> None:
            if not client.is_closed:
                log.warning("nats connection lost")

        async def on_reconnect() -> None:
            log.warning("nats connected again")

        try:
            client = await asyncio.wait_for(
                nats.connect(
                    url,
                    error_cb=on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=on_reconnect,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.2,
                    connect_timeout=2,
                    ping_interval=10,
                ),
                retry_s,
            )
        except (OSError, nats.errors.Error) as error:
            raise JobsUnavailable(f"nats: no connection ({type(error).__name__})") from error
        jobs = cls(client, policy, name=name, retry_s=retry_s)
        try:
            await jobs._create(replicas)
        except BaseException:
            await client.close()
            raise
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
                self._subject(job_id), body, headers={_REQUEST_HEADER: head}, behind=0
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
            message = await self._pull(min(max(remaining_s, 0.05), _PULL_S))
            if message is not None:
                taking = asyncio.ensure_future(self._take(worker, message))
                try:
                    claim = await asyncio.shield(taking)
                except asyncio.CancelledError:
                    # The caller is gone, so nobody would work on what was taken.
                    if (claim := await taking) is not None:
                        await self.release(claim)
                    raise
                if claim is not None:
                    return claim
            elif remaining_s <= 0:
                return None

    async def extend(self, claim: Claim) -> bool:
        """See `Jobs.extend`."""
        held = self._holding(claim)

        def extend(newest: Entry) -> Entry | None:
            self._check_fence(claim, newest)
            # Whoever works aloud need not say so.
            return newest.then("extended") if _silent_s(newest) > self._policy.lease_s / 4 else None

        newest = await self._log.advance(claim.job.id, extend)
        await self._stream.ask(held.message.in_progress)
        return newest.entry.cancel_requested

    async def release(self, claim: Claim) -> None:
        """See `Jobs.release`."""

        def release(newest: Entry) -> Entry:
            self._check_fence(claim, newest)
            return newest.then("released", state=JobState.QUEUED, token="")

        with contextlib.suppress(ClaimLost):
            held = self._holding(claim)
            await self._log.advance(claim.job.id, release)
            await self._stream.ask(held.message.nak)
        self._held.pop(claim.token, None)

    async def cancelled(self, claim: Claim) -> None:
        """See `Jobs.cancelled`."""
        while True:
            tick = self._log.tick(claim.job.id)
            newest = (await self._log.newest(claim.job.id)).entry
            self._check_fence(claim, newest)
            if newest.cancel_requested:
                return
            await self._log.wait(tick)

    async def append(self, claim: Claim, payload: bytes, *, key: str | None = None) -> int:
        """See `Jobs.append`."""
        held = self._holding(claim)

        def append(newest: Entry) -> Entry:
            self._check_fence(claim, newest)
            return newest.then_event(key)

        async with held.lock:
            if key is not None:
                held.keys = held.keys if held.keys is not None else await self._keys(claim.job.id)
                if key in held.keys:
                    self._check_fence(claim, (await self._log.newest(claim.job.id)).entry)
                    return held.keys[key]
            # Unknown until the answer is here: a cancelled call may have stored the event or not.
            keys, held.keys = held.keys, None
            held.newest = await self._log.advance(claim.job.id, append, payload, known=held.newest)
            sequence = held.newest.entry.sequence
            held.keys = keys if keys is None or key is None else keys | {key: sequence}
            return sequence

    async def finish(self, claim: Claim, state: JobState, payload: bytes) -> None:
        """See `Jobs.finish`."""
        if not state.is_final:
            raise ValueError(f"state is {state}, must be a final one")
        held = self._holding(claim)

        def finish(newest: Entry) -> Entry:
            self._check_fence(claim, newest)
            return newest.then_end(state)

        async with held.lock:
            await self._log.advance(claim.job.id, finish, payload, known=held.newest)
        self._held.pop(claim.token, None)
        # Where this is lost the job comes round once more, is seen to have ended and leaves the
        # queue then.
        await self._stream.ask(held.message.ack)

    async def events(
        self, job_id: str, *, after: int = 0, live: bool = True
    ) -> AsyncIterator[Event]:
        """See `Jobs.events`."""
        await self.get(job_id)
        async for logged in self._log.follow(job_id, live=live):
            entry = logged.entry
            if entry.kind != "event":
                continue
            final = entry.state if entry.state.is_final else None
            if entry.sequence > after:
                yield Event(
                    sequence=entry.sequence, at=entry.at, payload=logged.payload, final=final
                )
            if final:
                return

    async def cancel(self, job_id: str, *, payload: bytes) -> JobRecord:
        """See `Jobs.cancel`."""
        await self.get(job_id)

        def cancel(newest: Entry) -> Entry | None:
            if newest.state is JobState.QUEUED:
                return dataclasses.replace(
                    newest.then_end(JobState.CANCELLED), cancel_requested=True
                )
            if newest.state.is_final or newest.cancel_requested:
                return None
            return newest.then("cancel", cancel_requested=True)

        await self._log.advance(job_id, cancel, payload)
        self._full_until = 0.0
        return await self.get(job_id)

    async def get(self, job_id: str) -> JobRecord:
        """See `Jobs.get`."""
        message, newest = await asyncio.gather(
            self._stream.find(self._requests, subject=self._subject(_check_id(job_id))),
            self._log.newest(job_id),
        )
        if message is None:
            raise JobMissing(job_id)
        return _record(message, newest.entry)

    async def list(
        self, *, page_size: int, page_token: str = ""
    ) -> tuple[tuple[JobRecord, ...], str]:
        """See `Jobs.list`. A token is the stream sequence of the last job listed."""
        if page_token and not page_token.isdecimal():
            raise ValueError(f"page_token is {page_token[:40]!r}, must be one that list answered")
        state = (await self._stream.ask(lambda: self._stream.api.stream_info(self._requests))).state
        end = min(int(page_token), state.last_seq + 1) if page_token else state.last_seq + 1
        start = max(end - page_size, state.first_seq, 1)
        records = await self._records(range(end - 1, start - 1, -1))
        return records, str(start) if start > max(state.first_seq, 1) else ""

    async def counts(self) -> dict[JobState, int]:
        """See `Jobs.counts`. Reads the newest entry of every job."""
        counted = await self._stream.ask(self._log.states)
        requests = await self._stream.ask(lambda: self._stream.api.stream_info(self._requests))
        # A job nobody has touched has no log.
        counted[JobState.QUEUED] += requests.state.messages - sum(counted.values())
        return counted

    async def position(self, job_id: str) -> int:
        """See `Jobs.position`. Jobs given back and not yet taken again do not count as ahead."""
        message = await self._stream.find(self._requests, subject=self._subject(_check_id(job_id)))
        if message is None:
            raise JobMissing(job_id)
        if (await self._log.newest(job_id)).entry.state is not JobState.QUEUED:
            return 0
        return max(1, await self._waiting(up_to=message.seq))

    async def ready(self) -> None:
        """See `Jobs.ready`: asks for both streams and the consumer, once."""
        try:
            await self._stream.api.consumer_info(self._requests, _CONSUMER)
            await self._log.ready()
        except (*TRANSIENT, NotFoundError) as error:
            raise JobsUnavailable(f"nats: {error}") from error

    async def close(self) -> None:
        """See `Jobs.close`."""
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            # So that acknowledgements still on their way out are sent.
            await asyncio.wait_for(self._client.flush(), REQUEST_S)
        await self._client.close()

    async def _create(self, replicas: int) -> None:
        await self._log.open(replicas=replicas)
        await self._stream.create_stream(self._requests, self._subject("*"), replicas=replicas)
        consumer = api.ConsumerConfig(
            durable_name=_CONSUMER,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=self._policy.lease_s,
            # The log counts attempts; the server must never drop a job on its own.
            max_deliver=-1,
            max_ack_pending=_MAX_CLAIMED,
        )
        await self._stream.ask(lambda: self._stream.api.add_consumer(self._requests, consumer))

    async def _pull(self, wait_s: float) -> Msg | None:
        """The next message of the queue, or None after `wait_s`."""
        try:
            inbox = await self._client.subscribe(self._client.new_inbox(), max_msgs=1)
            try:
                await self._client.publish(
                    f"$JS.API.CONSUMER.MSG.NEXT.{self._requests}.{_CONSUMER}",
                    json.dumps({"batch": 1, "expires": int(wait_s * 1e9)}).encode(),
                    reply=inbox.subject,
                )
                # The server says when the wait is over; longer than that only where it is away.
                message = await inbox.next_msg(timeout=wait_s + _PULL_GRACE_S)
            finally:
                with contextlib.suppress(nats.errors.Error):
                    await inbox.unsubscribe()
        except TimeoutError:
            return None
        except TRANSIENT as error:
            if self._client.is_closed:
                raise JobsUnavailable(f"nats: {error}") from error
            await asyncio.sleep(wait_s)
            return None
        status = (message.headers or {}).get("Status")
        if status is None:
            return message
        if status != "408" and status != "404":
            # No such consumer, or the server is about to stop: no reason to ask again at once.
            await asyncio.sleep(min(wait_s, _PULL_GRACE_S))
        return None

    async def _take(self, worker: str, message: Msg) -> Claim | None:
        """Claim the job of a delivered message, unless it has ended or is another worker's."""
        job_id = message.subject.rsplit(".", 1)[1]
        token = uuid.uuid4().hex

        before = await self.get(job_id)
        is_exhausted = before.attempt >= self._policy.max_attempts

        def take(newest: Entry) -> Entry | None:
            if newest.state.is_final or self._left_s(newest) > 0:
                return None
            if is_exhausted:
                return newest.then_end(JobState.FAILED)
            return newest.then(
                "claimed",
                state=JobState.RUNNING,
                attempt=newest.attempt + 1,
                token=token,
                started_at=newest.started_at or time.time(),
            )

        payload = self._policy.exhausted(before) if is_exhausted else b""
        newest = await self._log.advance(job_id, take, payload)
        if newest.entry.token != token and 0 < (left_s := self._left_s(newest.entry)) <= _ENDING_S:
            await asyncio.sleep(left_s)
            newest = await self._log.advance(job_id, take, payload)
        self._full_until = 0.0
        if newest.entry.state.is_final:
            await self._stream.ask(message.ack)
        if newest.entry.token != token:
            if (left_s := self._left_s(newest.entry)) > 0:
                # To be looked at again when its lease, as the log knows it, has run out.
                await self._stream.ask(lambda: message.nak(delay=left_s))
            return None
        self._held[token] = _Held(
            message=message, newest=newest, keys=None if newest.entry.attempt > 1 else {}
        )
        job = dataclasses.replace(
            before,
            state=JobState.RUNNING,
            attempt=newest.entry.attempt,
            started_at=newest.entry.started_at,
            cancel_requested=newest.entry.cancel_requested,
        )
        return Claim(job=job, worker=worker, token=token, lease_s=self._policy.lease_s)

    def _left_s(self, newest: Entry) -> float:
        """Seconds for which the job is its worker's still; not above 0 where anyone may have it.

        Not every delivery of a running job means that its worker is gone: a server that was killed delivers anew what
        came behind the last message it saw extended, and a delivery may lie about until the job went to somebody else.
        """
        if newest.state is not JobState.RUNNING:
            return 0.0
        return self._policy.lease_s - _silent_s(newest)

    def _holding(self, claim: Claim) -> _Held:
        if (held := self._held.get(claim.token)) is None:
            raise ClaimLost(claim)
        return held

    def _check_fence(self, claim: Claim, newest: Entry) -> None:
        if newest.token != claim.token:
            self._held.pop(claim.token, None)
            raise ClaimLost(claim)

    async def _keys(self, job_id: str) -> dict[str, int]:
        """The keyed events of a job's log, by key."""
        return {
            logged.entry.key: logged.entry.sequence
            async for logged in self._log.follow(job_id, live=False)
            if logged.entry.key is not None
        }

    async def _records(self, positions: range) -> tuple[JobRecord, ...]:
        """The jobs at these places of the request stream, in this order."""
        turn = asyncio.Semaphore(_PARALLEL)

        async def record(position: int) -> JobRecord | None:
            async with turn:
                message = await self._stream.find(self._requests, seq=position)
                if message is None:
                    return None
                newest = await self._log.newest(message.subject.rsplit(".", 1)[1])
                return _record(message, newest.entry)

        found = await asyncio.gather(*(record(position) for position in positions))
        return tuple(each for each in found if each is not None)

    async def _waiting(self, *, up_to: int) -> int:
        """Jobs that were never handed out and wait, from the queue's head to this place."""
        consumer = await self._stream.ask(
            lambda: self._stream.api.consumer_info(self._requests, _CONSUMER)
        )
        records = await self._records(range(consumer.delivered.stream_seq + 1, up_to + 1))
        return sum(record.state is JobState.QUEUED for record in records)

    async def _check_room(self) -> None:
        limit = self._policy.max_queued
        waiting = limit
        if time.monotonic() >= self._full_until:
            consumer = await self._stream.ask(
                lambda: self._stream.api.consumer_info(self._requests, _CONSUMER)
            )
            if consumer.num_pending < limit:
                return
            # Some of these were cancelled and only wait to be thrown away.
            requests = await self._stream.ask(lambda: self._stream.api.stream_info(self._requests))
            waiting = await self._waiting(up_to=requests.state.last_seq)
            if waiting < limit:
                return
            self._full_until = time.monotonic() + _FULL_S
        raise QueueFull(waiting, self._policy.retry_after_s)

    def _subject(self, job_id: str) -> str:
        return f"{self._name}.requests.{job_id}"


def _silent_s(newest: Entry) -> float:
    """Seconds since anything was written to a job's log."""
    return time.time() - newest.at


def _check_id(job_id: str) -> str:
    if not _JOB_ID.fullmatch(job_id):
        raise JobMissing(job_id)
    return job_id


def _record(message: api.RawStreamMsg, newest: Entry) -> JobRecord:
    head = json.loads(message.headers[_REQUEST_HEADER])
    return JobRecord(
        id=message.subject.rsplit(".", 1)[1],
        request_id=head["request_id"],
        state=newest.state,
        attempt=newest.attempt,
        created_at=head["created_at"],
        started_at=newest.started_at,
        finished_at=newest.finished_at,
        body=message.data or b"",
        cancel_requested=newest.cancel_requested,
    )
