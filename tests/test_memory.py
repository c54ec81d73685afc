"""When freed memory is given back: not while the loop has much to do, and not never."""

import asyncio

from services.common import memory
from testing.waiting import until


async def test_it_waits_for_a_quiet_time_but_not_for_ever(monkeypatch):
    trimmed, computed_s = [], [0.0]
    monkeypatch.setattr(memory, "EVERY_S", 0.01)
    monkeypatch.setattr(memory, "WORTH_BYTES", -1)
    monkeypatch.setattr(memory, "trim", lambda _: trimmed.append(computed_s[0]))
    looks = [0]

    def thread_time():
        """A loop that computes all the time, for the first look at it and the eight that follow."""
        looks[0] += 1
        computed_s[0] += memory.EVERY_S if looks[0] <= 2 * 8 else 0.0
        return computed_s[0]

    monkeypatch.setattr(memory.time, "thread_time", thread_time)
    task = asyncio.create_task(memory.give_back())
    await until(lambda: len(trimmed) >= 3)
    task.cancel()
    # Each look asks twice: at the latest time while it was busy, and then, quiet, each time.
    busy = [each for each in trimmed if each < 2 * 8 * memory.EVERY_S]
    assert [round(each / memory.EVERY_S) for each in busy] == [2 * memory.AT_LATEST]
