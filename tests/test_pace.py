"""How long calls take: what was measured is told, what was not is told from the nearest, with a wider spread."""

from dataclasses import replace

import pytest

from services.diffusion.pace import MAX_REMEMBERED, Call, Expected, Pace

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
    # One call alone is believed no better than that, its own kind's neither.
    assert pace.expected(STEP) == Expected(seconds=1, low=0.5, high=2)
    assert pace.expected(replace(STEP, rows=4)) == Expected(seconds=2, low=0.5, high=4)
    assert pace.expected(replace(STEP, rows=1)) == Expected(seconds=0.5, low=0.25, high=1)
    pace.record(replace(STEP, cells=4096), seconds=100)
    # Twice as large as that, and not 32 times the small one.
    assert pace.expected(replace(STEP, cells=8192)).seconds == pytest.approx(200)
    assert pace.expected(replace(STEP, controlnets=2)).seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("small_s", "low_s"),
    [
        # Time grows with size: most of what it should take then is certain.
        (0.5, 24),
        # It hardly does, as on a large GPU: 32 times the rows may cost little more.
        (1.0, 1),
        (0.9, (1 + 31 * 0.2) * 0.75),
        # Two calls that stalled are no reason to expect more than all of it.
        (0.0, 24),
    ],
)
def test_what_a_larger_call_takes_at_least_is_told_by_two_smaller_ones(small_s, low_s):
    pace = Pace()
    for _ in range(5):
        pace.record(replace(STEP, rows=1), seconds=small_s)
        pace.record(STEP, seconds=1)
    told = pace.expected(replace(STEP, rows=64))
    assert told == Expected(seconds=32, low=pytest.approx(low_s), high=64)
    # A machine that stalls makes no work impossible.
    for _ in range(2):
        pace.record(STEP, seconds=100)
    assert pace.expected(replace(STEP, rows=64)).low <= low_s * 1.001


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
