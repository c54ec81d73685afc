"""Whose composition is worked out next. No pictures, and a clock that is set by hand."""

import asyncio

import pytest

from services.common.errors import Overloaded
from services.compositor import turns
from services.compositor.turns import HALF_LIFE_S, LITTLE_S, Turns


class Clock:
    """Stands in for the module's clock."""

    def __init__(self):
        self.now_s = 1000.0

    def monotonic(self):
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


class Room:
    """A compositor's places, and who came to have one, in order."""

    def __init__(self, clock, **bounds):
        self.clock = clock
        self.turns = Turns(**{"running": 3, "waiting": 100, "caller_waiting": 50, **bounds})
        self.begun = []
        self._ends = {}
        self.tasks = []

    async def come(self, caller, count=1):
        for _ in range(count):
            self.tasks.append(asyncio.create_task(self._take(caller)))
        await settled()

    async def end(self, caller, after_s=0.0):
        """Its oldest turn ends."""
        self.clock.now_s += after_s
        self._ends[caller].pop(0).set()
        await settled()

    async def _take(self, caller):
        async with self.turns.turn(caller):
            self.begun.append(caller)
            end = asyncio.Event()
            self._ends.setdefault(caller, []).append(end)
            await end.wait()

    async def close(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def room(clock):
    room = Room(clock)
    yield room
    await room.close()


async def test_a_lone_caller_has_all_places_but_the_one_that_is_kept(room):
    await room.come("a", 5)
    assert room.begun == ["a", "a"]
    await room.end("a", 10)
    assert room.begun == ["a"] * 3


async def test_whoever_asked_for_little_has_the_kept_place_at_once(room):
    await room.come("a", 20)
    await room.come("b")
    assert room.begun == ["a", "a", "b"]
    # The kept place is free again once it is left, for the next of that kind, and not for what waits.
    await room.end("b")
    assert room.begun == ["a", "a", "b"]
    await room.come("c")
    assert room.begun[-1] == "c"


async def test_the_kept_place_is_for_one_call_of_a_caller(room):
    await room.come("a", 2)
    await room.come("b", 3)
    assert room.begun == ["a", "a", "b"]


async def test_who_has_used_least_is_next(room):
    await room.come("a", 2)
    await room.end("a", 8)
    await room.end("a")
    await room.come("b", 2)
    await room.end("b", 3)
    await room.end("b")
    await room.come("c", 2)
    room.begun.clear()
    await room.come("a", 2)
    await room.come("b", 2)
    await room.end("c", 4)
    await room.end("c")
    # By then c has used 8 s, b 6, a 16.
    assert room.begun == ["b", "a"]


async def test_what_was_used_is_forgotten_with_time(room):
    await room.come("a")
    await room.end("a", 8 * LITTLE_S)
    await room.come("other", 2)
    await room.come("a")
    assert room.begun[-1] == "other"
    await room.come("b")
    await room.end("b")
    room.clock.now_s += 4 * HALF_LIFE_S
    await room.come("b")
    await room.end("b")
    assert room.begun[-1] == "a"


async def test_callers_that_have_gone_are_forgotten(room):
    for number in range(50):
        await room.come(f"caller {number}")
        await room.end(f"caller {number}", 0.1)
    room.clock.now_s += 20 * HALF_LIFE_S
    await room.come("last")
    await room.end("last")
    assert len(room.turns._callers) <= 1


async def test_too_many_are_refused_and_the_places_are_not_lost(clock):
    room = Room(clock, waiting=4, caller_waiting=3)
    await room.come("a", 2)
    await room.come("a", 3)
    with pytest.raises(Overloaded, match="3 of this caller; allowed: 4, 3 of one"):
        async with room.turns.turn("a"):
            pass
    await room.come("b", 2)
    assert room.begun == ["a", "a", "b"]
    with pytest.raises(Overloaded, match="4 collages wait"):
        async with room.turns.turn("c"):
            pass
    for caller in "abaabab":
        if room._ends.get(caller):
            await room.end(caller)
    await room.close()
    assert room.turns._free == 3
    assert room.turns._waiting == 0


async def test_who_leaves_while_waiting_or_just_as_it_is_called_loses_no_place(room):
    await room.come("a", 3)
    room.tasks[2].cancel()
    await settled()
    assert room.turns._waiting == 0
    await room.come("a")
    called = room.tasks[3]
    # It leaves in the moment before, or after, its turn is given.
    for is_before in (True, False):
        if is_before:
            called.cancel()
        room._ends["a"].pop(0).set()
        await asyncio.sleep(0)
        called.cancel()
        await settled()
        await room.come("a", 2)
        called = room.tasks[-1]
    await room.close()
    assert room.turns._free == 3
