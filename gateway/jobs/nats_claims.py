"""Claims on NATS: a durable pull consumer hands jobs out, their logs say whose they are.

Main type: `Claims`. A claim is an entry in the job's log, it lasts while its worker writes to the
log, and the entry of a later claim fences it off. How long ago that was is the difference of two
times of the server's: no clock of a worker's counts. A message is acknowledged after its job has
ended; where that is lost, the job comes round again, is seen to have ended, and leaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

import nats.errors
from nats.aio.msg import Msg
from nats.js import api

from gateway.jobs import Claim, ClaimLost, JobRecord, JobState, JobsUnavailable, QueuePolicy
from gateway.jobs.nats_log import Entry, Logged, NatsLog
from gateway.jobs.nats_stream import TRANSIENT, JetStream

REQUEST_HEADER = "Collage-Request"
_CONSUMER = "workers"
# Seconds after which a pull is sent again: one that was lost with the server costs no more than
# this.
_PULL_S = 2.0
# Seconds beyond a pull's own end after which its answer is not waited for.
_PULL_GRACE_S = 0.5
# Jobs that may be claimed or rest at once over all gateways.
_MAX_CLAIMED = 4096
# What is left of a lease when its job comes round, in seconds, up to which it is waited for. The job was sent back
# before, for at least 50 ms, in which leases that ran out later passed it by.
_ENDING_S = 0.25


@dataclass(slots=True, kw_only=True)
class Held:
    """What this process knows of a claim it made. The lock puts what it writes in a row."""

    message: Msg
    newest: Logged
    # None where they are to be read.
    keys: dict[str, int] | None
    # When this claim last wrote to the log, monotonic.
    spoke_at: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Claims:
    """Those of this process."""

    def __init__(
        self, stream: JetStream, log: NatsLog, policy: QueuePolicy, *, requests: str
    ) -> None:
        self._stream = stream
        self._log = log
        self._policy = policy
        self._requests = requests
        self._held: dict[str, Held] = {}

    async def open(self) -> None:
        """Create the consumer where absent."""
        config = api.ConsumerConfig(
            durable_name=_CONSUMER,
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=self._policy.lease_s,
            # The log counts what was lost; the server must never drop a job on its own.
            max_deliver=-1,
            max_ack_pending=_MAX_CLAIMED,
        )
        await self._stream.ask(lambda: self._stream.api.add_consumer(self._requests, config))

    async def info(self) -> api.ConsumerInfo:
        """The consumer as it stands; raises what the client raises."""
        return await self._stream.api.consumer_info(self._requests, _CONSUMER)

    async def pull(self, wait_s: float) -> Msg | None:
        """The next message of the queue, or None after `wait_s` (at most 2 s)."""
        wait_s = min(max(wait_s, 0.05), _PULL_S)
        client = self._stream.client
        try:
            inbox = await client.subscribe(client.new_inbox(), max_msgs=1)
            try:
                await client.publish(
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
            if client.is_closed:
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

    async def take(self, worker: str, message: Msg) -> Claim | None:
        """Claim the job of a delivered message, unless it has ended or is held."""
        job_id = job_id_of_subject(message.subject)
        while True:
            newest = await self._log.newest(job_id)
            if newest.entry.state.is_final:
                await self._stream.ask(message.ack)
                return None
            left_s = await self._left_s(newest)
            if left_s > _ENDING_S:
                # To be looked at again when its lease, as the log knows it, has run out.
                await self._stream.ask(functools.partial(message.nak, delay=left_s))
                return None
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            before = newest.entry
            lost = before.lost + (before.state is JobState.RUNNING)
            number = message.metadata.sequence.stream
            if lost >= self._policy.max_lost:
                entry = before.then_end(JobState.FAILED, lost=lost, number=number)
                payload = self._policy.exhausted(record_of(message, entry))
                await self._log.write(job_id, entry, behind=newest, payload=payload)
                continue
            entry = before.then(
                "claimed",
                state=JobState.RUNNING,
                attempt=before.attempt + 1,
                lost=lost,
                token=uuid.uuid4().hex,
                rest_s=0.0,
                ahead=None,
                started_at=before.started_at or time.time(),
                number=number,
            )
            written = await self._log.write(job_id, entry, behind=newest)
            if written is None:
                continue
            self._held[entry.token] = Held(
                message=message,
                newest=written,
                keys=None if entry.attempt > 1 else {},
                spoke_at=time.monotonic(),
            )
            return Claim(
                job=record_of(message, entry),
                worker=worker,
                token=entry.token,
                lease_s=self._policy.lease_s,
            )

    def holding(self, claim: Claim) -> Held:
        """What is known of a claim; raises `ClaimLost` where it is void."""
        if (held := self._held.get(claim.token)) is None:
            raise ClaimLost(claim)
        return held

    def check(self, claim: Claim, newest: Entry) -> None:
        """Raises `ClaimLost` unless the claim stands in the job's newest entry."""
        if newest.token != claim.token:
            self.drop(claim)
            raise ClaimLost(claim)

    def drop(self, claim: Claim) -> None:
        """The claim is of the past."""
        self._held.pop(claim.token, None)

    async def _left_s(self, newest: Logged) -> float:
        """Seconds for which nobody may claim the job; not above 0 where anyone may.

        Not every delivery of a running job means that its worker is gone: a server that was killed delivers anew what
        came behind the last message it saw extended, and a delivery may lie about until the job went to somebody else.
        """
        running = newest.entry.state is JobState.RUNNING
        held_s = self._policy.lease_s if running else newest.entry.rest_s
        if held_s <= 0:
            return 0.0
        return held_s - (await self._log.now() - newest.time)


def job_id_of_subject(subject: str) -> str:
    """The job that a message is of, whichever stream holds it."""
    return subject.rsplit(".", 1)[1]


def record_of(message: Msg | api.RawStreamMsg, newest: Entry, result: bytes = b"") -> JobRecord:
    """A request and the newest entry of its job's log as the record they are."""
    headers: Mapping[str, str] = message.headers or {}
    head = json.loads(headers[REQUEST_HEADER])
    return JobRecord(
        id=job_id_of_subject(message.subject or ""),
        request_id=head["request_id"],
        state=newest.state,
        attempt=newest.attempt,
        lost=newest.lost,
        created_at=head["created_at"],
        started_at=newest.started_at,
        finished_at=newest.finished_at,
        body=message.data or b"",
        result=result,
        cancel_requested=newest.cancel_requested,
        ahead=newest.ahead,
    )
