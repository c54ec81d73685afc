"""How much a server takes on at once, of each peer and in all: `Admission`, made of `Budget`s.

What is over a budget is refused at once, before more than it is held. A peer is one connection, so that nobody's load
uses up what others may have. This module knows no gRPC.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from services.common.errors import Overloaded

# What a refused caller is told to wait.
RETRY_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server takes on.

    calls, peer_calls: under way at once, streams too.
    held_bytes, peer_held_bytes: of the messages of the calls under way.
    reading, peer_reading: calls whose message is being received; more wait for their turn.
    """

    calls: int
    peer_calls: int
    held_bytes: int
    peer_held_bytes: int
    reading: int
    peer_reading: int


# At the edge callers are strangers; within, all calls of a gateway come over one connection, and messages are small.
EDGE = Limits(
    calls=4096,
    peer_calls=1024,
    held_bytes=256 * 2**20,
    peer_held_bytes=64 * 2**20,
    reading=256,
    # Each of the largest takes the server a hundredth of a second, and others wait for that.
    peer_reading=4,
)
WITHIN = Limits(
    calls=4096,
    peer_calls=4096,
    held_bytes=256 * 2**20,
    peer_held_bytes=256 * 2**20,
    reading=256,
    peer_reading=256,
)


class Budget:
    """An amount that is taken and given back, bounded for each peer and in all.

    Args:
        what: names it in refusals: "calls", "bytes of messages".
        total: in all.
        peer: of one peer.
    """

    def __init__(self, what: str, *, total: int, peer: int) -> None:
        self.what = what
        self._total, self._peer = total, peer
        self._taken: Counter[str] = Counter()
        self.taken = 0

    def take(self, peer: str, amount: int) -> None:
        """Takes that much for a peer; whoever does gives it back.

        Raises:
            Overloaded: it would be over a bound; nothing was taken.
        """
        if self._taken[peer] + amount > self._peer:
            raise Overloaded(
                f"this connection has {self._taken[peer]} {self.what} under way and asks for {amount}; "
                f"allowed: {self._peer}",
                retry_after_s=RETRY_S,
            )
        if self.taken + amount > self._total:
            raise Overloaded(
                f"{self.taken} {self.what} are under way, and {amount} asked for; allowed: {self._total}",
                retry_after_s=RETRY_S,
            )
        self._taken[peer] += amount
        self.taken += amount

    def give(self, peer: str, amount: int) -> None:
        """Gives back what was taken."""
        self._taken[peer] -= amount
        self.taken -= amount
        if not self._taken[peer]:
            del self._taken[peer]


class Admission:
    """The calls a server has under way, and what they hold."""

    def __init__(self, limits: Limits) -> None:
        self._calls = Budget("calls", total=limits.calls, peer=limits.peer_calls)
        self._held = Budget(
            "bytes of messages", total=limits.held_bytes, peer=limits.peer_held_bytes
        )
        self._reading = asyncio.Semaphore(limits.reading)
        self._peer_reading = limits.peer_reading
        # Of each peer that has calls whose message is being received: their turns, and how many hold or await one.
        self._readers: dict[str, tuple[asyncio.Semaphore, list[None]]] = {}

    @contextmanager
    def call(self, peer: str) -> Iterator[None]:
        """One call under way.

        Raises:
            Overloaded: there are too many.
        """
        self._calls.take(peer, 1)
        try:
            yield
        finally:
            self._calls.give(peer, 1)

    @contextmanager
    def message(self, peer: str, size_bytes: int) -> Iterator[None]:
        """One received message, for as long as it is worked on.

        Raises:
            Overloaded: they hold too much.
        """
        self._held.take(peer, size_bytes)
        try:
            yield
        finally:
            self._held.give(peer, size_bytes)

    @asynccontextmanager
    async def reading(self, peer: str) -> AsyncIterator[None]:
        """The receiving of one message: until it is here, nobody knows its size."""
        turns, readers = self._readers.setdefault(peer, (asyncio.Semaphore(self._peer_reading), []))
        readers.append(None)
        try:
            async with turns, self._reading:
                yield
        finally:
            readers.pop()
            if not readers:
                del self._readers[peer]
