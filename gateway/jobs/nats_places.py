"""Who stands where in the queue on NATS, and whether it is full.

Main type: `Places`. It counts from what the census knows and how far the queue was handed out, which
it asks for once for all who want to know.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping

from gateway.jobs import JobState, QueueFull, QueuePolicy
from gateway.jobs.nats_census import Census
from gateway.jobs.nats_claims import Claims
from gateway.jobs.nats_requests import Requests
from gateway.jobs.nats_stream import JetStream
from gateway.jobs.tails import Tail

# Seconds for which a full queue is taken to stay full, so that refusing stays cheap.
_FULL_S = 0.25


class Places:
    """Of one queue."""

    def __init__(
        self,
        stream: JetStream,
        claims: Claims,
        requests: Requests,
        census: Census,
        policy: QueuePolicy,
    ) -> None:
        self._stream = stream
        self._claims = claims
        self._requests = requests
        self._census = census
        self._policy = policy
        self._asking = asyncio.Lock()
        self._asked_at = -math.inf
        self._handed_out = 0
        self._full_until = 0.0

    async def ahead(self, number: int, *, within_s: float = 0) -> int:
        """Jobs that wait before the one of this number, as it was so many seconds ago at most."""
        await self._ask(within_s)
        return self._ahead(number)

    async def of(self, watched: Mapping[str, Tail]) -> Mapping[str, int]:
        """See `tails.Places`. Of jobs that were looked at while they waited."""
        await self._ask(0)
        return {
            job_id: self._ahead(tail.number)
            for job_id, tail in watched.items()
            if tail.number and self._census.state(job_id) is not JobState.RUNNING
        }

    async def check_room(self) -> None:
        """Raises `QueueFull`. The census has caught up."""
        waiting = self._policy.max_queued
        if time.monotonic() >= self._full_until:
            await self._ask(0)
            last = await self._requests.last()
            waiting = self._census.waiting(handed_out=self._handed_out, up_to=last)
            if waiting < self._policy.max_queued:
                return
            self._full_until = time.monotonic() + _FULL_S
        raise QueueFull(waiting, self._policy.retry_after_s)

    def left(self) -> None:
        """A job has left the queue: there may be room."""
        self._full_until = 0.0

    def _ahead(self, number: int) -> int:
        return max(0, self._census.waiting(handed_out=self._handed_out, up_to=number) - 1)

    async def _ask(self, within_s: float) -> None:
        async with self._asking:
            if time.monotonic() - self._asked_at > within_s:
                info = await self._stream.ask(self._claims.info)
                self._handed_out = info.delivered.stream_seq
                self._asked_at = time.monotonic()
