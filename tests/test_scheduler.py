"""The scheduler's policy under a clock that the test moves: order, rows, slices, models, expiry, limits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.generator.scheduler import (
    MEMORY_LESSON_S,
    DropReason,
    QueueFull,
    Scheduler,
    Shape,
    Ticket,
)

SMALL = Shape(model="mini", grid_height=16, grid_width=16)
WIDE = Shape(model="mini", grid_height=16, grid_width=24)
OTHER = Shape(model="other", grid_height=16, grid_width=16)
MODELS = ("mini", "other")


def ticket(number, *, shape=SMALL, rows=1, steps=10, deadline_s=math.inf, parts=1):
    return Ticket(
        id=number, shape=shape, rows=rows, steps=steps, deadline_s=deadline_s, parts=parts
    )


def admitted(*tickets, **settings):
    scheduler = Scheduler(**{"max_waiting": 100, **settings})
    for each in tickets:
        scheduler.admit(each, now_s=0)
    return scheduler


def turn(scheduler, now_s=0.0, in_memory=MODELS, coming=()):
    return scheduler.turn(now_s=now_s, in_memory=in_memory, coming=coming)


def ids(parts):
    return [each.ticket.id for each in parts]


def finish(scheduler, batch):
    """Has the parts without a step left end, and with its last part a job; answers the jobs that ended."""
    ended = []
    for part in batch:
        left = scheduler._left(part)
        if left is not None and left[part.index] == 0:
            scheduler.ended(part)
            if all(steps < 0 for steps in left):
                scheduler.remove(part.ticket.id)
                ended.append(part.ticket.id)
    return ended


def take(scheduler, now_s, *, seconds=1.0, in_memory=MODELS):
    """One step; answers its batch and the jobs that ended with it."""
    batch = turn(scheduler, now_s, in_memory).batch
    if batch:
        rows = sum(each.ticket.rows for each in batch)
        scheduler.stepped(batch, rows=rows, seconds=seconds)
    return batch, finish(scheduler, batch)


def run_to_end(scheduler):
    """Steps of a second each until nothing is here; answers the batches in order and when each job ended."""
    batches, ended = [], {}
    while not scheduler.is_empty:
        batch, over = take(scheduler, float(len(batches)))
        batches.append(ids(batch))
        ended.update(dict.fromkeys(over, len(batches)))
    return batches, ended


# Rows


def test_by_default_every_job_is_alone_and_in_order():
    scheduler = admitted(*(ticket(number, steps=2, rows=2) for number in range(3)))
    assert run_to_end(scheduler)[0] == [[0], [0], [1], [1], [2], [2]]
    assert scheduler.together(4) == 1


def test_equal_shapes_join_up_to_the_rows_allowed():
    scheduler = admitted(*(ticket(number, rows=2) for number in range(3)), max_rows=4)
    assert ids(turn(scheduler).batch) == [0, 1]


def test_the_pictures_of_a_job_fill_what_others_leave():
    scheduler = admitted(
        ticket(0, steps=2, rows=2), ticket(1, steps=2, rows=2, parts=4), max_rows=6
    )
    assert scheduler.together(4) == 4
    batches, ended = run_to_end(scheduler)
    assert batches == [[0, 1, 1], [0, 1, 1], [1, 1], [1, 1]]
    assert ended == {0: 2, 1: 4}


def test_a_job_of_many_pictures_is_drawn_so_many_at_a_time():
    scheduler = admitted(ticket(0, steps=3, rows=2, parts=5), max_rows=4)
    batches, _ = run_to_end(scheduler)
    assert [len(batch) for batch in batches] == [2] * 3 + [2] * 3 + [1] * 3


def test_a_job_joins_between_steps_when_room_appears():
    scheduler = admitted(ticket(0, steps=1), ticket(1, steps=5), ticket(2, steps=5), max_rows=2)
    assert ids(take(scheduler, 0)[0]) == [0, 1]
    assert ids(turn(scheduler, 1).batch) == [1, 2]


def test_a_job_larger_than_the_limit_runs_alone():
    scheduler = admitted(ticket(0, rows=16, steps=1), ticket(1, steps=1), max_rows=4)
    assert run_to_end(scheduler)[0] == [[0], [1]]


def test_nobody_passes_a_job_of_its_shape_that_waits_for_rows():
    scheduler = admitted(
        ticket(0, rows=3, steps=5), ticket(1, rows=2, steps=1), ticket(2, steps=1), max_rows=4
    )
    assert ids(turn(scheduler).batch) == [0]


def test_memory_that_ran_out_teaches_how_many_rows_fit():
    jobs = [ticket(number, steps=50) for number in range(8)]
    wide = ticket(8, shape=WIDE, steps=50)
    scheduler = admitted(*jobs, wide, ticket(9, shape=WIDE, steps=50), max_rows=8, slice_s=5)
    batch = turn(scheduler).batch
    assert len(batch) == 8
    scheduler.ran_out(batch, now_s=0)
    assert ids(turn(scheduler, 1).batch) == [0, 1, 2, 3]
    scheduler.ran_out(turn(scheduler, 1).batch, now_s=1)
    assert ids(turn(scheduler, 2).batch) == [0, 1]
    # Of a canvas half as large again less fits: one row, which is always tried.
    assert ids(turn(scheduler, 6).batch) == [8]
    # What took the memory may be gone by then.
    assert len(turn(scheduler, 6 + MEMORY_LESSON_S).batch) == 8


# Slices


def test_a_long_job_makes_way_for_another_canvas_and_goes_on():
    scheduler = admitted(ticket(0, steps=8), ticket(1, shape=WIDE, steps=2), slice_s=3)
    batches, ended = run_to_end(scheduler)
    assert batches == [[0]] * 3 + [[1]] * 2 + [[0]] * 5
    assert ended == {1: 5, 0: 10}


def test_without_another_canvas_nothing_is_interrupted():
    scheduler = admitted(ticket(0, steps=8), ticket(1, steps=8), slice_s=3)
    assert run_to_end(scheduler)[0] == [[0]] * 8 + [[1]] * 8


@given(
    jobs=st.lists(
        st.tuples(
            st.sampled_from([(16, 16), (16, 24), (24, 16), (8, 8)]),
            st.integers(1, 6),
            st.integers(0, 30),
            st.integers(1, 3),
            st.integers(0, 20),
        ),
        min_size=1,
        max_size=12,
    ),
    max_rows=st.integers(1, 6),
    slice_s=st.integers(1, 5),
)
def test_every_canvas_is_stepped_within_the_bound_and_every_job_ends(jobs, max_rows, slice_s):
    scheduler = Scheduler(max_rows=max_rows, max_waiting=len(jobs), slice_s=slice_s)
    coming = sorted(enumerate(jobs), key=lambda each: each[1][4])
    now_s, waiting_since, ended = 0.0, {}, []
    others = len({size for size, *_ in jobs}) - 1
    while coming or not scheduler.is_empty:
        while coming and (coming[0][1][4] <= now_s or scheduler.is_empty):
            number, ((height, width), rows, steps, parts, _) = coming.pop(0)
            shape = Shape(model="mini", grid_height=height, grid_width=width)
            scheduler.admit(
                ticket(number, shape=shape, rows=rows, steps=steps, parts=parts), now_s=now_s
            )
            waiting_since.setdefault(shape, now_s)
        batch, over = take(scheduler, now_s)
        ended += over
        (shape,) = {part.ticket.shape for part in batch}
        rows = sum(part.ticket.rows for part in batch)
        assert rows <= max_rows or len(batch) == 1
        assert now_s - waiting_since.pop(shape) <= others * (slice_s + 1)
        now_s += 1
        for each in scheduler._lines:
            waiting_since.setdefault(each, now_s)
        if shape in waiting_since:
            waiting_since[shape] = now_s
    assert sorted(ended) == list(range(len(jobs)))


def test_jobs_of_one_shape_end_in_the_order_they_came():
    scheduler = admitted(*(ticket(number, steps=3, rows=2) for number in range(6)), max_rows=4)
    assert list(run_to_end(scheduler)[1]) == list(range(6))


# Models


def test_jobs_of_a_model_in_memory_go_first_but_not_for_ever():
    scheduler = admitted(
        ticket(0, shape=OTHER, steps=1),
        *(ticket(number, steps=4) for number in range(1, 9)),
        patience_s=10,
        slice_s=2,
    )
    seen, now_s = [], 0.0
    while (made := turn(scheduler, now_s, in_memory=("mini",))).batch:
        assert made.wanted == "other", "it is told from the first, should there be room for it"
        seen += ids(made.batch)
        take(scheduler, now_s, in_memory=("mini",))
        now_s += 1
    assert now_s == 10, "its patience"
    assert seen == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert (made.batch, made.wanted) == ((), "other")
    # While it is loaded, what is in memory still is stepped; then it has its turn, and the rest goes on.
    assert ids(turn(scheduler, 11, in_memory=("mini",), coming=("other",)).batch) == [3]
    assert ids(take(scheduler, 14)[0]) == [0]
    assert ids(turn(scheduler, 15).batch) == [3]


def test_with_nothing_in_memory_the_first_jobs_model_is_wanted():
    scheduler = admitted(ticket(0, shape=OTHER), ticket(1))
    made = turn(scheduler, in_memory=())
    assert (made.batch, made.wanted) == ((), "other")
    made = turn(scheduler, in_memory=(), coming=("other",))
    assert (made.batch, made.wanted) == ((), "mini")
    assert scheduler.first_of("other").id == 0
    assert scheduler.first_of("third") is None


# Leaving


def test_expired_jobs_are_dropped_before_they_cost_a_step():
    scheduler = admitted(ticket(0), ticket(1, deadline_s=5), ticket(2))
    turn(scheduler)
    scheduler.remove(0)
    made = turn(scheduler, 5)
    assert [(each.id, why) for each, why in made.dropped] == [(1, DropReason.EXPIRED)]
    assert ids(made.batch) == [2]


def test_a_running_job_leaves_the_batch_at_its_deadline_or_when_cancelled():
    scheduler = admitted(ticket(0, deadline_s=2), ticket(1), ticket(2), max_rows=3)
    assert ids(turn(scheduler, 1).batch) == [0, 1, 2]
    scheduler.cancel(1)
    made = turn(scheduler, 2)
    assert {(each.id, why) for each, why in made.dropped} == {
        (0, DropReason.EXPIRED),
        (1, DropReason.CANCELLED),
    }
    assert ids(made.batch) == [2]


def test_a_job_whose_pictures_are_finished_elsewhere_can_still_be_cancelled():
    scheduler = admitted(ticket(0, steps=1))
    batch = turn(scheduler).batch
    scheduler.stepped(batch, rows=1, seconds=1.0)
    scheduler.ended(batch[0])
    assert scheduler.is_idle
    assert not scheduler.is_empty
    scheduler.cancel(0)
    assert not scheduler.is_idle
    assert [each.id for each, _ in turn(scheduler).dropped] == [0]
    assert scheduler.is_empty


def test_cancelled_work_is_no_reason_to_turn_a_job_away():
    # Found by the system test: the job after a cancelled one was told to come back in a minute.
    scheduler = admitted(ticket(0, steps=1000))
    scheduler.stepped(turn(scheduler).batch, rows=1, seconds=10)
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
    assert ids(turn(scheduler).batch) == [7]


# Limits


def test_a_full_queue_says_when_to_come_back():
    scheduler = admitted(ticket(0, steps=11), max_waiting=2)
    scheduler.stepped(turn(scheduler).batch, rows=1, seconds=3.0)
    scheduler.admit(ticket(1), now_s=0)
    scheduler.admit(ticket(2), now_s=0)
    with pytest.raises(QueueFull) as full:
        scheduler.admit(ticket(3), now_s=0)
    # Ten steps of three seconds are left of the running job.
    assert full.value.retry_after_s == pytest.approx(30.0)
    assert scheduler.places() == {1: 1, 2: 2}


def test_what_was_begun_and_makes_way_takes_a_place():
    scheduler = admitted(ticket(0), ticket(1, shape=WIDE), max_waiting=2, slice_s=1)
    turn(scheduler)
    scheduler.admit(ticket(2, shape=WIDE), now_s=0)
    assert ids(turn(scheduler, 1).batch) == [1]
    with pytest.raises(QueueFull):
        scheduler.admit(ticket(3), now_s=1)
    assert scheduler.places() == {2: 1}


def test_a_job_that_cannot_start_before_its_deadline_is_refused_at_once():
    scheduler = admitted(ticket(0, steps=11))
    scheduler.stepped(turn(scheduler).batch, rows=1, seconds=1.0)
    with pytest.raises(QueueFull):
        scheduler.admit(ticket(1, deadline_s=9), now_s=0)
    scheduler.admit(ticket(2, deadline_s=11), now_s=0)
    assert scheduler.places() == {2: 1}


def test_another_canvas_need_not_wait_for_a_long_job():
    scheduler = admitted(ticket(0, steps=1001), slice_s=10)
    scheduler.stepped(turn(scheduler).batch, rows=1, seconds=1.0)
    with pytest.raises(QueueFull, match="about 1000"):
        scheduler.admit(ticket(1, deadline_s=60), now_s=0)
    with pytest.raises(QueueFull, match="about 10"):
        scheduler.admit(ticket(1, shape=WIDE, steps=5, deadline_s=9), now_s=0)
    scheduler.admit(ticket(1, shape=WIDE, steps=5, deadline_s=60), now_s=0)
