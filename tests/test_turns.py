"""Whose composition is worked out next. No pictures, and a clock that is set by hand."""

import asyncio

import pytest

from services.common import turns
from services.common.errors import Overloaded
from services.common.turns import HALF_LIFE_S, SHORT_S, Turns


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
        usual = {
            "running": 2,
            "kept": 1,
            "caller_running": 2,
            "waiting": 100,
            "caller_waiting": 50,
        }
        self.turns = Turns("collages to be composed", **{**usual, **bounds})
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
        async with self.turns.turn(caller) as place:
            self.begun.append(f"{caller} {place.value}")
            end = asyncio.Event()
            self._ends.setdefault(caller, []).append(end)
            await end.wait()

    def free(self):
        return {place.value: count for place, count in self.turns._free.items()}

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


async def test_a_lone_caller_has_a_kept_place_first_and_no_more_than_one_may(room):
    await room.come("a", 5)
    assert room.begun == ["a kept", "a open"]
    await room.end("a", 10)
    # By then it has used much.
    assert room.begun == ["a kept", "a open", "a open"]
    assert room.free() == {"kept": 1, "open": 0}


async def test_whoever_asked_for_little_has_the_kept_place_at_once(room):
    await heavy(room, "a")
    await room.come("a", 20)
    await room.come("b")
    assert room.begun == ["a open", "a open", "b kept"]
    # It is free again once it is left, for the next of that kind, and not for what waits.
    await room.end("b")
    assert len(room.begun) == 3
    await room.come("c", 3)
    assert room.begun[3:] == ["c kept"]


async def test_who_has_used_least_is_next(room):
    await heavy(room, "a", 30)
    await heavy(room, "b", 5)
    await heavy(room, "c", 50)
    await room.come("c", 2)
    for caller in "abab":
        await room.come(caller)
    room.begun.clear()
    for _ in range(2):
        await room.end("c")
    # One each first: who has a turn waits for who has none.
    assert room.begun == ["b open", "a open"]


async def heavy(room, caller, used_s=20.0):
    """Has a caller use much."""
    await room.come(caller)
    await room.end(caller, used_s)
    room.begun.clear()


async def test_short_turns_are_short_however_many_they_are(room):
    for _ in range(200):
        await room.come("a")
        await room.end("a", SHORT_S / 2)
    await room.come("a")
    assert set(room.begun) == {"a kept"}


async def test_many_short_turns_are_no_claim_to_what_is_kept_for_others(room):
    for _ in range(20):
        await room.come("a")
        await room.end("a", SHORT_S / 2)
    await room.come("b")
    await room.end("b", SHORT_S / 2)
    room.begun.clear()
    # It is the one who used more than the mean: the kept place stays free for the other.
    await room.come("a", 3)
    assert room.begun == ["a open", "a open"]
    await room.come("b")
    assert room.begun[2:] == ["b kept"]


async def test_one_whose_turns_become_short_is_let_in_again(room):
    await heavy(room, "a", 8.0)
    for _ in range(6):
        await room.come("a")
        await room.end("a")
        room.clock.now_s += HALF_LIFE_S
    await room.come("a")
    assert room.begun[0] == "a open"
    assert room.begun[-1] == "a kept"


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
    await heavy(room, "a")
    await room.come("a", 5)
    with pytest.raises(Overloaded, match="3 of this caller; allowed: 4, 3 of one"):
        async with room.turns.turn("a"):
            pass
    await room.come("b", 2)
    assert room.begun == ["a open", "a open", "b kept"]
    with pytest.raises(Overloaded, match="4 collages to be composed wait"):
        async with room.turns.turn("c"):
            pass
    for caller in "abaabab":
        if room._ends.get(caller):
            await room.end(caller)
    await room.close()
    assert room.free() == {"kept": 1, "open": 2}
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
    assert room.free() == {"kept": 1, "open": 2}
