"""What this gateway hears of all logs, handed to those who wait for a job here.

Main type: `NatsNews`. One feed of the log stream a gateway, however many watch; of a job that is
watched each event is read once, and not at all where it was written here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from nats.aio.msg import Msg

from gateway.jobs import JobsUnavailable
from gateway.jobs.nats_census import Census
from gateway.jobs.nats_claims import job_id_of_subject
from gateway.jobs.nats_log import Entry, Logged, NatsLog
from gateway.jobs.nats_stream import Feed, JetStream
from gateway.jobs.tails import Tails
from services.common.telemetry import log


class NatsNews:
    """`places` as in `Tails`."""

    def __init__(
        self,
        stream: JetStream,
        log: NatsLog,
        places: Callable[[Sequence[str]], Awaitable[Mapping[str, int]]],
    ) -> None:
        self._stream = stream
        self._log = log
        self.tails = Tails(places)
        self.census = Census()
        self._feed = Feed(stream, log.stream_name, log.all_subjects, self._take)
        # How many writes to a job's log are under way here.
        self._writing: Counter[str] = Counter()
        # Number and place of events that are still to be read, by job.
        self._unread: dict[str, deque[tuple[int, int]]] = {}
        self._reading: dict[str, asyncio.Task[None]] = {}

    async def caught_up(self) -> None:
        """Return when everything that is stored now was heard of."""
        await self._feed.reached(await self._stream.last(self._log.stream_name))

    def restart(self) -> None:
        """The connection was broken."""
        self._feed.restart()

    @contextlib.contextmanager
    def writing(self, job_id: str) -> Iterator[None]:
        """Around a write whose event is told here: until then it is not read, should it be heard of first."""
        self._writing[job_id] += 1
        try:
            yield
        finally:
            self._writing[job_id] -= 1
            if not self._writing[job_id]:
                del self._writing[job_id]
            self._read_on(job_id)

    def tell(self, job_id: str, logged: Logged) -> None:
        """This process has stored an event."""
        if (tail := self.tails.watched(job_id)) is not None:
            tail.tell(logged.event)

    async def close(self) -> None:
        """Whoever waits finds that it is closed."""
        await self._feed.close()
        reading = list(self._reading.values())
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)
        await self.tails.close()

    def _take(self, message: Msg) -> None:
        job_id, entry = job_id_of_subject(message.subject), Entry.load(message.headers)
        self.census.take(job_id, entry)
        is_turn = entry.kind in ("claimed", "released", "cancel") or entry.state.is_final
        if is_turn:
            self.tails.moved()
        if (tail := self.tails.watched(job_id)) is None:
            return
        if entry.kind in ("claimed", "released"):
            tail.stand(None)
        elif entry.kind == "placed":
            tail.stand(entry.ahead)
        elif entry.kind == "event":
            place = (entry.sequence, message.metadata.sequence.stream)
            self._unread.setdefault(job_id, deque()).append(place)
            self._read_on(job_id)
        if is_turn:
            tail.call()

    def _read_on(self, job_id: str) -> None:
        """See to it that the job's unread events are read, each once and in order."""
        if job_id in self._writing or job_id in self._reading:
            return
        tail, unread = self.tails.watched(job_id), self._unread.get(job_id)
        while unread and (tail is None or (tail.last or 0) >= unread[0][0]):
            unread.popleft()
        if not unread:
            self._unread.pop(job_id, None)
            return
        task = asyncio.create_task(self._read(job_id, unread))
        self._reading[job_id] = task
        task.add_done_callback(lambda _: self._reading.pop(job_id))

    async def _read(self, job_id: str, unread: deque[tuple[int, int]]) -> None:
        while unread and (tail := self.tails.watched(job_id)) is not None:
            sequence, position = unread.popleft()
            if (tail.last or 0) >= sequence:
                continue
            try:
                logged = await self._log.at(position)
            except JobsUnavailable as error:
                log.warning("event not read", job=job_id, message=str(error))
                logged = None
            if logged is not None:
                tail.tell(logged.event)
        unread.clear()
        self._unread.pop(job_id, None)
