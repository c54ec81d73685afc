"""The scheduler's policy under a clock that the test moves: order, joining, expiry, limits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.generator.scheduler import (
    DropReason,
    QueueFull,
    Scheduler,
    Shape,
    Ticket,
)

SMALL = Shape(model="mini", grid_height=16, grid_width=16)
WIDE = Shape(model="mini", grid_height=16, grid_width=24)


def ticket(number, *, shape=SMALL, rows=1, steps=10, deadline_s=math.inf):
    return Ticket(id=number, shape=shape, rows=rows, steps=steps, deadline_s=deadline_s)


def ids(tickets):
    return [each.id for each in tickets]


def run_to_end(scheduler, *, now_s=0.0):
    """Steps until idle; answers the batches in order and the step at which each job ended."""
    left, batches, ended = {}, [], {}
    while not scheduler.is_idle:
        turn = scheduler.turn(now_s=now_s)
        left.update({each.id: each.steps for each in turn.joined})
        batches.append(ids(turn.batch))
        if turn.batch:
            scheduler.stepped(turn.batch, rows=sum(each.rows for each in turn.batch), seconds=1.0)
        for each in turn.batch:
            left[each.id] -= 1
            if left[each.id] <= 0:
                scheduler.remove(each.id)
                ended[each.id] = len(batches)
    return batches, ended


def test_by_default_every_job_is_alone_and_in_order():
    scheduler = Scheduler()
    for number in range(3):
        scheduler.admit(ticket(number, steps=2, rows=2), now_s=0)
    batches, _ = run_to_end(scheduler)
    assert batches == [[0], [0], [1], [1], [2], [2]]


def test_equal_shapes_join_up_to_the_rows_allowed():
    scheduler = Scheduler(max_rows=4)
    for number in range(3):
        scheduler.admit(ticket(number, rows=2), now_s=0)
    assert ids(scheduler.turn(now_s=0).batch) == [0, 1]


def test_a_job_joins_between_steps_when_room_appears():
    scheduler = Scheduler(max_rows=2)
    scheduler.admit(ticket(0, steps=1), now_s=0)
    scheduler.admit(ticket(1, steps=5), now_s=0)
    scheduler.admit(ticket(2, steps=5), now_s=0)
    first = scheduler.turn(now_s=0)
    scheduler.stepped(first.batch, rows=sum(each.rows for each in first.batch), seconds=1.0)
    scheduler.remove(0)
    second = scheduler.turn(now_s=1)
    assert ids(second.batch) == [1, 2]
    assert ids(second.joined) == [2]


def test_a_job_larger_than_the_limit_runs_alone():
    scheduler = Scheduler(max_rows=4)
    scheduler.admit(ticket(0, rows=16, steps=1), now_s=0)
    scheduler.admit(ticket(1, rows=1, steps=1), now_s=0)
    assert run_to_end(scheduler)[0] == [[0], [1]]


def test_other_shapes_wait_for_the_end_of_the_batch():
    scheduler = Scheduler(max_rows=8)
    scheduler.admit(ticket(0, steps=3), now_s=0)
    scheduler.admit(ticket(1, shape=WIDE, steps=1), now_s=0)
    assert run_to_end(scheduler)[0] == [[0], [0], [0], [1]]


def test_a_later_job_passes_only_where_the_earlier_one_waits_no_longer_for_it():
    scheduler = Scheduler(max_rows=8)
    scheduler.admit(ticket(0, steps=5), now_s=0)
    scheduler.admit(ticket(1, shape=WIDE, steps=1), now_s=0)
    scheduler.admit(ticket(2, steps=5), now_s=0)
    scheduler.admit(ticket(3, steps=6), now_s=0)
    assert ids(scheduler.turn(now_s=0).batch) == [0, 2]


def test_nobody_passes_a_job_that_waits_for_rows():
    scheduler = Scheduler(max_rows=4)
    scheduler.admit(ticket(0, rows=3, steps=5), now_s=0)
    scheduler.admit(ticket(1, rows=2, steps=1), now_s=0)
    scheduler.admit(ticket(2, rows=1, steps=1), now_s=0)
    assert ids(scheduler.turn(now_s=0).batch) == [0]


def test_a_stream_of_joining_jobs_does_not_starve_another_shape():
    scheduler = Scheduler(max_rows=2, max_waiting=100)
    scheduler.admit(ticket(0, steps=10), now_s=0)
    scheduler.admit(ticket(1, shape=WIDE, steps=1), now_s=0)
    for number in range(2, 40):
        scheduler.admit(ticket(number, steps=4), now_s=0)
    _, ended = run_to_end(scheduler)
    # The wide job runs in the very step after the first batch would have ended by itself.
    assert ended[1] == 11
    assert len(ended) == 40


def test_expired_jobs_are_dropped_before_they_cost_a_step():
    scheduler = Scheduler(max_rows=1)
    scheduler.admit(ticket(0), now_s=0)
    scheduler.admit(ticket(1, deadline_s=5), now_s=0)
    scheduler.admit(ticket(2), now_s=0)
    scheduler.turn(now_s=0)
    scheduler.remove(0)
    turn = scheduler.turn(now_s=5)
    assert [(each.id, why) for each, why in turn.dropped] == [(1, DropReason.EXPIRED)]
    assert ids(turn.batch) == [2]


def test_a_running_job_leaves_the_batch_at_its_deadline_or_when_cancelled():
    scheduler = Scheduler(max_rows=3)
    scheduler.admit(ticket(0, deadline_s=2), now_s=0)
    scheduler.admit(ticket(1), now_s=0)
    scheduler.admit(ticket(2), now_s=0)
    assert ids(scheduler.turn(now_s=1).batch) == [0, 1, 2]
    scheduler.cancel(1)
    turn = scheduler.turn(now_s=2)
    assert {(each.id, why) for each, why in turn.dropped} == {
        (0, DropReason.EXPIRED),
        (1, DropReason.CANCELLED),
    }
    assert ids(turn.batch) == [2]


def test_cancelled_work_is_no_reason_to_turn_a_job_away():
    # Found by the system test: the job after a cancelled one was told to come back in a minute.
    scheduler = Scheduler()
    scheduler.admit(ticket(0, steps=1000), now_s=0)
    scheduler.stepped(scheduler.turn(now_s=0).batch, rows=1, seconds=10)
    scheduler.admit(ticket(1, steps=1000), now_s=0)
    with pytest.raises(QueueFull):
        scheduler.admit(ticket(2, deadline_s=3600), now_s=0)
    scheduler.cancel(0)
    with pytest.raises(QueueFull):
        scheduler.admit(ticket(2, deadline_s=3600), now_s=0)
    scheduler.cancel(1)
    scheduler.admit(ticket(2, deadline_s=3600), now_s=0)


def test_cancelling_what_is_not_here_changes_nothing():
    scheduler = Scheduler()
    scheduler.cancel(7)
    scheduler.admit(ticket(7), now_s=0)
    assert ids(scheduler.turn(now_s=0).batch) == [7]


def test_a_full_queue_says_when_to_come_back():
    scheduler = Scheduler(max_waiting=2)
    scheduler.admit(ticket(0, steps=11), now_s=0)
    scheduler.stepped(scheduler.turn(now_s=0).batch, rows=1, seconds=3.0)
    scheduler.admit(ticket(1), now_s=0)
    scheduler.admit(ticket(2), now_s=0)
    with pytest.raises(QueueFull) as full:
        scheduler.admit(ticket(3), now_s=0)
    # Ten steps of three seconds are left of the running job.
    assert full.value.retry_after_s == pytest.approx(30.0)
    assert scheduler.places() == {1: 1, 2: 2}


def test_a_job_that_cannot_start_before_its_deadline_is_refused_at_once():
    scheduler = Scheduler()
    scheduler.admit(ticket(0, steps=11), now_s=0)
    scheduler.stepped(scheduler.turn(now_s=0).batch, rows=1, seconds=1.0)
    with pytest.raises(QueueFull):
        scheduler.admit(ticket(1, deadline_s=9), now_s=0)
    scheduler.admit(ticket(2, deadline_s=11), now_s=0)
    assert scheduler.places() == {2: 1}


def test_pace_scales_with_rows_cells_and_steps_and_is_zero_when_unknown():
    pace = Scheduler().pace
    assert pace.seconds(SMALL, rows=1, steps=10) == 0.0
    pace.record(SMALL, rows=2, seconds=4.0)
    assert pace.seconds(SMALL, rows=1, steps=10) == pytest.approx(20.0)
    assert pace.seconds(WIDE, rows=2, steps=1) == pytest.approx(6.0)


@given(
    jobs=st.lists(
        st.tuples(st.sampled_from([SMALL, WIDE]), st.integers(1, 6), st.integers(0, 8)),
        min_size=1,
        max_size=12,
    ),
    max_rows=st.integers(1, 6),
)
def test_every_job_ends_no_later_than_without_any_passing(jobs, max_rows):
    scheduler = Scheduler(max_rows=max_rows, max_waiting=len(jobs))
    for number, (shape, rows, steps) in enumerate(jobs):
        scheduler.admit(ticket(number, shape=shape, rows=rows, steps=steps), now_s=0)
    batches, ended = run_to_end(scheduler)
    assert set(ended) == set(range(len(jobs)))
    for batch in batches:
        shapes = {jobs[number][0] for number in batch}
        rows = sum(jobs[number][1] for number in batch)
        assert len(shapes) <= 1
        assert rows <= max_rows or len(batch) == 1
    # One after another takes every step (and at least one turn) of every job ahead.
    for number in range(len(jobs)):
        assert ended[number] <= sum(max(1, steps) for _, _, steps in jobs[: number + 1])
