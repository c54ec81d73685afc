"""How long calls take: what was measured is told, what was not is told from the nearest, with a wider spread."""

from dataclasses import replace

import pytest

from services.generator.pace import MAX_REMEMBERED, Call, Expected, Pace

STEP = Call(model="mini", work="step", cells=256, rows=2)


def test_what_was_never_done_is_unknown():
    pace = Pace()
    assert pace.expected(STEP) == Expected()
    pace.record(STEP, seconds=1)
    for other in ({"model": "xl"}, {"work": "decode"}):
        assert pace.expected(replace(STEP, **other)) == Expected()


def test_a_call_is_told_by_its_own_kind_and_not_by_others():
    """The same canvas was told 105 s and 678 s a minute apart, after other canvases had been drawn."""
    pace = Pace()
    for _ in range(5):
        pace.record(STEP, seconds=1)
    before = pace.expected(STEP)
    pace.record(replace(STEP, cells=4096), seconds=100)
    pace.record(replace(STEP, rows=32), seconds=3)
    assert pace.expected(STEP) == before == Expected(seconds=1, low=1, high=1)


def test_the_nearest_call_tells_of_one_that_was_never_made():
    pace = Pace()
    pace.record(STEP, seconds=1)
    assert pace.expected(replace(STEP, rows=4)) == Expected(seconds=2, low=1, high=4)
    pace.record(replace(STEP, cells=4096), seconds=100)
    # Twice as large as that, and not 32 times the small one.
    assert pace.expected(replace(STEP, cells=8192)).seconds == pytest.approx(200)
    assert pace.expected(replace(STEP, controlnets=2)).seconds == pytest.approx(2)


def test_the_spread_is_what_was_seen():
    pace = Pace()
    for seconds in (1, 2) * 20:
        pace.record(STEP, seconds=seconds)
    found = pace.expected(STEP)
    assert 0 < found.low < 1.2 < found.seconds < 1.8 < found.high < 3.5


def test_expected_times_add_up():
    one = Expected(seconds=2, low=1, high=4)
    assert one + one.times(2) == one.times(3) == Expected(seconds=6, low=3, high=12)


def test_what_is_remembered_is_bounded_and_the_newest():
    pace = Pace()
    for rows in range(1, MAX_REMEMBERED + 3):
        pace.record(replace(STEP, rows=rows), seconds=rows)
    assert len(pace._seen) == MAX_REMEMBERED
    assert replace(STEP, rows=2) not in pace._seen
    assert replace(STEP, rows=3) in pace._seen
