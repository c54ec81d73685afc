"""Whose work is next: `Turns`.

Of the callers that wait it is the one who has used least of late, and some places are kept for those whose turns are
short and who used no more than their share: whoever sends much waits for himself, and nobody waits long behind it. This
module knows no work.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum

from services.common.errors import Overloaded

# What was used counts half after so many seconds.
HALF_LIFE_S = 30.0
# Turns that take less on an average are short, seconds.
SHORT_S = 0.25
# What is left of a use that is as good as forgotten.
_FORGOTTEN_S = 0.01


class Place(Enum):
    """Where a turn is spent: in a place that is kept for callers of short turns and few, or in one for all."""

    KEPT = "kept"
    OPEN = "open"


@dataclass(slots=True)
class _Waiting:
    """One call; `place` is where its turn is to be spent, once it has come."""

    come: asyncio.Event = field(default_factory=asyncio.Event)
    place: Place = Place.OPEN


@dataclass(slots=True)
class _Caller:
    """used_s, turns: what it used, and in how many turns, as of `at_s`. waiting: its calls, the oldest first."""

    used_s: float = 0.0
    turns: float = 0.0
    at_s: float = 0.0
    running: int = 0
    waiting: list[_Waiting] = field(default_factory=list)

    def used(self, now_s: float) -> float:
        return self.used_s * self._left(now_s)

    def use(self, used_s: float, now_s: float) -> None:
        self.used_s = self.used(now_s) + used_s
        self.turns = self.turns * self._left(now_s) + 1
        self.at_s = now_s

    @property
    def is_short(self) -> bool:
        """Whether its turns are; those of whom nothing is known are taken to be."""
        return self.used_s < SHORT_S * max(1.0, self.turns)

    def _left(self, now_s: float) -> float:
        return math.exp2((self.at_s - now_s) / HALF_LIFE_S)


class Turns:
    """Places, and who waits for one.

    Args:
        what: waits, for refusals: "collages to be composed".
        running: places for all.
        kept: places for callers whose turns are short and who used at most the mean of all that are known, one each.
            They are the first to be given to these.
        caller_running: turns of one caller at once.
        waiting: calls that may wait, of all callers.
        caller_waiting: the same, of one.
    """

    def __init__(
        self,
        what: str,
        *,
        running: int,
        kept: int,
        caller_running: int,
        waiting: int,
        caller_waiting: int,
    ) -> None:
        self.what = what
        self._free = {Place.OPEN: running, Place.KEPT: kept}
        self._caller_running = caller_running
        self._most_waiting, self._most_caller_waiting = waiting, caller_waiting
        self._waiting = 0
        self._callers: dict[str, _Caller] = {}

    @asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[Place]:
        """One place, once it is this caller's turn.

        Raises:
            Overloaded: too many wait.
        """
        known = self._callers.setdefault(caller, _Caller())
        call = _Waiting()
        known.waiting.append(call)
        self._waiting += 1
        self._next()
        if not call.come.is_set() and (
            self._waiting > self._most_waiting or len(known.waiting) > self._most_caller_waiting
        ):
            self._leave(known, call)
            raise Overloaded(
                f"{self._waiting} {self.what} wait, {len(known.waiting)} of this caller; "
                f"allowed: {self._most_waiting}, {self._most_caller_waiting} of one",
                retry_after_s=2.0,
            )
        try:
            await call.come.wait()
        except asyncio.CancelledError:
            if call.come.is_set():
                self._end(known, call.place, 0.0)
            else:
                self._leave(known, call)
            raise
        start_s = time.monotonic()
        try:
            yield call.place
        finally:
            self._end(known, call.place, time.monotonic() - start_s)

    def _leave(self, caller: _Caller, call: _Waiting) -> None:
        caller.waiting.remove(call)
        self._waiting -= 1
        self._forget(time.monotonic())

    def _end(self, caller: _Caller, place: Place, used_s: float) -> None:
        now_s = time.monotonic()
        caller.use(used_s, now_s)
        caller.running -= 1
        self._free[place] += 1
        self._next()
        self._forget(now_s)

    def _next(self) -> None:
        """Gives the free places away."""
        now_s = time.monotonic()
        for place in (Place.KEPT, Place.OPEN):
            while self._free[place]:
                waiting = [
                    each
                    for each in self._callers.values()
                    if each.waiting and self._may(each, place, now_s)
                ]
                if not waiting:
                    break
                caller = min(waiting, key=lambda each: (each.running, each.used(now_s)))
                call = caller.waiting.pop(0)
                self._waiting -= 1
                self._free[place] -= 1
                caller.running += 1
                call.place = place
                call.come.set()

    def _may(self, caller: _Caller, place: Place, now_s: float) -> bool:
        if place is Place.OPEN:
            return caller.running < self._caller_running
        # What runs counts too, or whoever comes with many at once would have all that are kept.
        return not caller.running and caller.is_short and self._has_share_left(caller, now_s)

    def _has_share_left(self, caller: _Caller, now_s: float) -> bool:
        """Whether it used at most the mean of all: many short turns are as much as few long ones."""
        total_s = sum(each.used(now_s) for each in self._callers.values())
        return caller.used(now_s) * len(self._callers) <= total_s + _FORGOTTEN_S

    def _forget(self, now_s: float) -> None:
        self._callers = {
            name: each
            for name, each in self._callers.items()
            if each.running or each.waiting or each.used(now_s) > _FORGOTTEN_S
        }
