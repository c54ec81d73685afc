"""The newest events of the jobs that are watched here, each held once for all its watchers.

Main type: `Tails`. Whoever learns that a job's log grew tells its tail; only then is a watcher
woken, and it finds the event here. What lies before the tail a watcher reads from the store. This
module knows no store: a read is passed in.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from gateway.jobs import AHEAD_EVERY_S, Ahead, Event, JobMissing, JobsUnavailable

# What a tail keeps, of which the newest event is a part however large: a watcher that falls back behind it reads the
# store.
_KEPT_EVENTS = 64
_KEPT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a look at a job's record gave. `last` is its log's last sequence number."""

    last: int
    is_over: bool
    ahead: int | None


Look = Callable[[], Awaitable[Seen]]
# The events behind a sequence number, as many as one read gives; none at the end of the log.
Read = Callable[[int], Awaitable[Sequence[Event]]]


class Tail:
    """One job's. Tell it only what is stored already."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._bytes = 0
        # The log's last sequence number, None while nobody looked.
        self.last: int | None = None
        self.is_over = False
        self.ahead: int | None = None
        # Set when there is news for watchers, and for who holds the claim; take one before looking.
        self.news = asyncio.Event()
        self.turn = asyncio.Event()

    def tell(self, event: Event) -> None:
        """The log has this event; one that was told before is passed over."""
        if self.last is not None and event.sequence <= self.last:
            return
        if self._events and event.sequence != self._events[-1].sequence + 1:
            # Some in between are not known here. They are read by who needs them.
            self._events.clear()
            self._bytes = 0
        self._events.append(event)
        self._bytes += len(event.payload)
        while len(self._events) > 1 and (
            len(self._events) > _KEPT_EVENTS or self._bytes > _KEPT_BYTES
        ):
            self._bytes -= len(self._events.popleft().payload)
        self.last = event.sequence
        self.is_over = event.final is not None
        self.ring()

    def settle(self, last: int) -> None:
        """The log was read up to here and had no more."""
        self.last = max(self.last or 0, last)

    def stand(self, ahead: int | None) -> None:
        """So many jobs stand before this one; None where that says nothing any more."""
        if ahead != self.ahead:
            self.ahead = ahead
            self.ring()

    def ring(self) -> None:
        """Wake the watchers."""
        rung, self.news = self.news, asyncio.Event()
        rung.set()

    def call(self) -> None:
        """Wake who holds the claim: the job was cancelled, given to another, or has ended."""
        rung, self.turn = self.turn, asyncio.Event()
        rung.set()

    def after(self, sequence: int) -> Sequence[Event] | None:
        """The events behind this one; None where they are to be read from the store."""
        if self.last is not None and sequence >= self.last:
            return ()
        if not self._events or self._events[0].sequence > sequence + 1:
            return None
        return [event for event in self._events if event.sequence > sequence]


class Tails:
    """Those of one process. `places` answers the jobs ahead of each waiting job among those given."""

    def __init__(self, places: Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]) -> None:
        self._places = places
        # Held by whoever watches, so that a job nobody watches leaves nothing here.
        self._tails: weakref.WeakValueDictionary[str, Tail] = weakref.WeakValueDictionary()
        self._moved = asyncio.Event()
        self._placing = asyncio.create_task(self._place())
        self._is_closed = False

    def of(self, job_id: str) -> Tail:
        """The job's tail, made where nobody has it; it is there for as long as it is held."""
        return self._tails.setdefault(job_id, Tail())

    def watched(self, job_id: str) -> Tail | None:
        """The job's tail where somebody has it."""
        return self._tails.get(job_id)

    def all(self) -> Sequence[tuple[str, Tail]]:
        """Every tail that somebody has, by job."""
        return list(self._tails.items())

    def moved(self) -> None:
        """A job left the queue or came back to it: other jobs' places may have changed."""
        self._moved.set()

    async def watch(
        self, job_id: str, after: int, look: Look, read: Read
    ) -> AsyncIterator[Event | Ahead]:
        """See `Jobs.watch`."""
        tail = self.of(job_id)
        # Looked at only now that the tail is there: what comes later is told to it.
        seen = await look()
        tail.settle(seen.last)
        tail.is_over = tail.is_over or seen.is_over
        if tail.ahead is None:
            tail.ahead = seen.ahead
        told: int | None = None
        while True:
            if self._is_closed:
                raise JobsUnavailable("jobs: closed")
            news = tail.news
            if tail.ahead != told and not tail.is_over:
                told = tail.ahead
                if told is not None:
                    yield Ahead(jobs=told)
            events = tail.after(after)
            if events is None and not (events := await read(after)):
                # It had more a moment ago.
                raise JobMissing(job_id)
            for event in events or ():
                after = event.sequence
                yield event
                if event.final is not None:
                    return
            if not events:
                # A watcher that comes back after the terminal event has nothing to wait for.
                if tail.is_over:
                    return
                await news.wait()

    async def close(self) -> None:
        """Whoever waits finds that it is closed."""
        self._is_closed = True
        self._placing.cancel()
        await asyncio.gather(self._placing, return_exceptions=True)
        for tail in list(self._tails.values()):
            tail.ring()
            tail.call()

    async def _place(self) -> None:
        """Tell watched jobs their place as the queue moves, for all of them together."""
        while True:
            await self._moved.wait()
            self._moved.clear()
            if waiting := [job for job, tail in self.all() if not tail.is_over]:
                try:
                    places = await self._places(waiting)
                except JobsUnavailable:
                    self._moved.set()
                    places = {}
                for job_id, ahead in places.items():
                    if (tail := self.watched(job_id)) is not None:
                        tail.stand(ahead)
            await asyncio.sleep(AHEAD_EVERY_S)
