"""When a pool asks for jobs, wants hints, and has due jobs looked for. With random schedules in test_simulation."""

from __future__ import annotations

import pytest

from roostd.core.demand import (
    BUSY_POLL_SECONDS,
    EMPTY_POLLS,
    FULL_SECONDS,
    HINTS_PER_SECOND,
    PROMOTE_BATCH,
    Demand,
    promote_in,
)

POLL_INTERVAL = 1.0


def empty_poll(demand: Demand, now: float) -> float:
    """A claim that finds nothing; returns when the next one is due."""
    demand.claimed(10, 0, now, now)
    return max(now, demand.claim_at())


def idle(now: float = 0.0) -> Demand:
    """One that has announced itself idle and looked once more after that."""
    demand = Demand(POLL_INTERVAL)
    while not demand.wants_hints:
        now = empty_poll(demand, now)
    empty_poll(demand, now)
    return demand


def test_a_new_pool_asks_at_once_and_wants_no_hints_yet() -> None:
    demand = Demand(POLL_INTERVAL)
    assert demand.claim_at() == 0
    assert not demand.wants_hints


def test_it_calls_itself_idle_only_after_several_empty_answers_at_growing_intervals() -> None:
    demand, now, waits = Demand(POLL_INTERVAL), 100.0, []
    for _ in range(EMPTY_POLLS):
        following = empty_poll(demand, now)
        waits.append(round(following - now, 9))
        assert not demand.wants_hints
        now = following
    assert waits == [BUSY_POLL_SECONDS * 2**number for number in range(EMPTY_POLLS)]
    empty_poll(demand, now)
    assert demand.wants_hints


def test_it_asks_once_more_after_saying_so_because_a_job_enqueued_before_sent_no_hint() -> None:
    demand, now = Demand(POLL_INTERVAL), 100.0
    while not demand.wants_hints:
        now = empty_poll(demand, now)
    assert demand.claim_at() == 0
    demand.claimed(10, 0, now, now)
    assert demand.claim_at() == now + POLL_INTERVAL


def test_an_idle_pool_asks_at_every_poll_interval_whatever_becomes_of_hints() -> None:
    demand = idle()
    for now in (200.0, 201.0, 202.0):
        demand.claimed(10, 0, now, now)
        assert demand.claim_at() == now + POLL_INTERVAL
    assert demand.wants_hints


def test_a_hint_makes_it_ask_at_once() -> None:
    demand = idle()
    demand.hinted(50.0)
    assert demand.claim_at() == 0


def test_a_hint_that_comes_while_a_claim_is_under_way_leads_to_another() -> None:
    demand = idle()
    demand.hinted(50.002)
    demand.claimed(10, 0, 50.0, 50.004)
    assert demand.claim_at() == 0
    demand.claimed(10, 1, 50.004, 50.006)
    assert demand.claim_at() == 50.006 + POLL_INTERVAL


def test_a_few_jobs_leave_it_idle() -> None:
    demand = idle()
    for now in (50.0, 50.1, 50.2, 50.3):
        demand.hinted(now)
        demand.claimed(10, 1, now, now + 0.001)
    assert demand.wants_hints


def test_an_answer_that_is_full_makes_it_ask_again_at_once() -> None:
    demand = Demand(POLL_INTERVAL)
    demand.claimed(10, 10, 100.0, 100.0)
    assert demand.claim_at() == 0


def test_answers_that_stay_full_make_it_busy() -> None:
    demand = idle()
    demand.claimed(10, 10, 100.0, 100.0)
    demand.claimed(10, 10, 100.0, 100.0 + FULL_SECONDS * 0.9)
    assert demand.wants_hints
    demand.claimed(10, 10, 100.0, 100.0 + FULL_SECONDS * 1.1)
    assert not demand.wants_hints


def test_full_answers_with_others_between_them_do_not() -> None:
    demand = idle()
    for number in range(20):
        now = 100.0 + number * FULL_SECONDS
        demand.claimed(10, 10, now, now)
        demand.claimed(10, 3, now, now + 0.001)
    assert demand.wants_hints


def test_a_busy_pool_that_found_something_asks_again_soon() -> None:
    demand = Demand(POLL_INTERVAL)
    for _ in range(10 * EMPTY_POLLS):
        demand.claimed(10, 1, 100.0, 100.0)
        assert demand.claim_at() == 100.0 + BUSY_POLL_SECONDS
        demand.claimed(10, 0, 100.0, 100.0)
    assert not demand.wants_hints, "one empty answer between others is not idleness"


def test_a_storm_of_hints_makes_it_busy() -> None:
    demand, now = idle(), 100.0
    for _ in range(HINTS_PER_SECOND):
        demand.hinted(now)
        now += 0.5 / HINTS_PER_SECOND
    assert not demand.wants_hints
    demand.claimed(10, 1, now, now)
    assert demand.claim_at() == now + BUSY_POLL_SECONDS


def test_a_steady_trickle_of_hints_does_not() -> None:
    demand, now = idle(), 100.0
    for _ in range(1000):
        demand.hinted(now)
        now += 2.0 / HINTS_PER_SECOND
    assert demand.wants_hints


def test_after_a_storm_it_becomes_idle_again_in_the_usual_way() -> None:
    demand, now = idle(), 100.0
    for _ in range(HINTS_PER_SECOND):
        demand.hinted(now)
    for _ in range(EMPTY_POLLS):
        now = empty_poll(demand, now)
        assert not demand.wants_hints
    empty_poll(demand, now)
    assert demand.wants_hints


@pytest.mark.parametrize(
    ("promoted", "next_due_seconds", "wait"),
    [
        (0, None, 1.0),
        (10, None, 1.0),
        (0, 0.25, 0.25),
        (0, 5.0, 1.0),
        (0, 0.000001, 0.005),  # many due microseconds apart: together, not in a transaction each
        (PROMOTE_BATCH - 1, 0.0, 0.005),
        (PROMOTE_BATCH, 0.25, 0.0),  # there may be more
    ],
)
def test_due_jobs_are_looked_for_when_the_next_is_due_and_not_more_often_than_a_busy_pool_claims(
    promoted: int, next_due_seconds: float | None, wait: float
) -> None:
    assert promote_in(promoted, next_due_seconds, POLL_INTERVAL) == wait


def test_a_poll_interval_below_the_floor_is_kept() -> None:
    assert promote_in(0, 0.000001, 0.001) == 0.001
