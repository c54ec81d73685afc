"""Whose composition is worked out next: `Turns`.

Of the callers that wait it is the one who has used least of late, and one place is kept for those who have used little:
whoever floods the compositor waits for himself. This module knows no pictures.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from services.common.errors import Overloaded

# What was used counts half after so many seconds.
HALF_LIFE_S = 30.0
# Who has used less than so many seconds has used little.
LITTLE_S = 1.0
# What is left of a use that is as good as forgotten.
_FORGOTTEN_S = 0.01


@dataclass(slots=True)
class _Caller:
    """used_s: what it used, as of `at_s`. waiting: its calls, the oldest first."""

    used_s: float = 0.0
    at_s: float = 0.0
    running: int = 0
    waiting: list[asyncio.Event] = field(default_factory=list)

    def used(self, now_s: float) -> float:
        return self.used_s * math.exp2((self.at_s - now_s) / HALF_LIFE_S)


class Turns:
    """The places of a compositor.

    Args:
        running: how many there are; one of them is kept for callers who have used little.
        waiting: calls that may wait, of all callers.
        caller_waiting: the same, of one.
    """

    def __init__(self, *, running: int, waiting: int, caller_waiting: int) -> None:
        self._free = running
        self._most_waiting, self._most_caller_waiting = waiting, caller_waiting
        self._waiting = 0
        self._callers: dict[str, _Caller] = {}

    @asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """One place, once it is this caller's turn.

        Raises:
            Overloaded: too many wait.
        """
        known = self._callers.setdefault(caller, _Caller())
        turn = asyncio.Event()
        known.waiting.append(turn)
        self._waiting += 1
        self._next()
        if not turn.is_set() and (
            self._waiting > self._most_waiting or len(known.waiting) > self._most_caller_waiting
        ):
            self._leave(known, turn)
            raise Overloaded(
                f"{self._waiting} collages wait to be composed, {len(known.waiting)} of this caller; "
                f"allowed: {self._most_waiting}, {self._most_caller_waiting} of one",
                retry_after_s=2.0,
            )
        try:
            await turn.wait()
        except asyncio.CancelledError:
            if turn.is_set():
                self._end(known, 0.0)
            else:
                self._leave(known, turn)
            raise
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._end(known, time.monotonic() - start_s)

    def _leave(self, caller: _Caller, turn: asyncio.Event) -> None:
        caller.waiting.remove(turn)
        self._waiting -= 1

    def _end(self, caller: _Caller, used_s: float) -> None:
        now_s = time.monotonic()
        caller.used_s, caller.at_s = caller.used(now_s) + used_s, now_s
        caller.running -= 1
        self._free += 1
        self._next()
        self._forget(now_s)

    def _next(self) -> None:
        """Gives the free places away."""
        now_s = time.monotonic()
        while self._free:
            waiting = [caller for caller in self._callers.values() if caller.waiting]
            if self._free == 1:
                # What runs counts too, or whoever comes with many at once would have them all.
                waiting = [
                    each for each in waiting if each.used(now_s) < LITTLE_S and not each.running
                ]
            if not waiting:
                return
            caller = min(waiting, key=lambda each: (each.running, each.used(now_s)))
            turn = caller.waiting.pop(0)
            self._waiting -= 1
            self._free -= 1
            caller.running += 1
            turn.set()

    def _forget(self, now_s: float) -> None:
        self._callers = {
            name: each
            for name, each in self._callers.items()
            if each.running or each.waiting or each.used(now_s) > _FORGOTTEN_S
        }
