"""Where a pool looks for jobs: every row is looked at, but for those before what was claimed long ago."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.core.frontier import (
    CHEAP_SECONDS,
    HIGHEST,
    KEPT_JOBS,
    KEPT_SECONDS,
    LOWEST,
    MOST_PLACES,
    PAUSE,
    Frontier,
    Looks,
    Range,
    everywhere,
)
from roostd.core.job import ClaimedJob

DEAR_SECONDS = 1.0 + CHEAP_SECONDS
QUEUES = ["a", "b"]
PART = [Range("a", 0, "1", 1, 0)]
Row = tuple[str, int, str, int]  # queue, priority, scheduled_at, id

rows_of_ready = st.tuples(st.sampled_from(QUEUES), st.integers(-2, 2), st.sampled_from("123"), st.integers(1, 9))


def job(row: Row) -> ClaimedJob:
    queue, priority, scheduled_at, job_id = row
    return ClaimedJob(job_id, 1, 1, 1, 0, None, queue, "t", "{}", priority, scheduled_at)


def has(each: Range, row: Row) -> bool:
    """As claim.sql reads it; the times of this test sort as text."""
    start = (each.priority, "" if each.scheduled_at == "-infinity" else each.scheduled_at, each.job_id)
    return row[0] == each.queue and row[1:] > start and row[1] <= each.last_priority


def make_dear(frontier: Frontier) -> None:
    for _ in range(2):
        frontier.claimed(everywhere(QUEUES), [], DEAR_SECONDS, 0.0)
    assert not frontier.looks.due(1.0)


def dear_looks(seconds: float) -> Looks:
    looks = Looks()
    for _ in range(2):
        looks.took(seconds, 0, now=0.0)
    assert looks.is_dear
    return looks


def test_while_it_is_cheap_everything_is_looked_through_every_time() -> None:
    looks = Looks()
    for jobs in (0, 1, 500):
        looks.took(0.002 + jobs * 0.00002, jobs, now=1.0)
        assert looks.due(1.0)


def test_one_dear_look_alone_changes_nothing() -> None:
    looks = Looks()
    for seconds in (DEAR_SECONDS, 0.001, DEAR_SECONDS):
        looks.took(seconds, 1, now=1.0)
        assert looks.due(1.0)


def test_dear_looks_have_a_twentieth_of_the_time() -> None:
    looks = Looks()
    looks.took(DEAR_SECONDS, 0, now=0.0)
    looks.took(DEAR_SECONDS, 0, now=5.0)
    assert looks.dear_seconds == pytest.approx(1.0)
    assert not looks.due(5.0 + PAUSE - 0.1)
    assert looks.due(5.0 + PAUSE + 0.1)
    looks.took(0.001, 0, now=26.0)
    assert looks.due(26.0)


def test_a_slow_way_to_the_database_is_learned_and_makes_no_look_dear() -> None:
    looks = dear_looks(0.020)
    looks.took_elsewhere(0.019, 1)
    for now in (1.0, 2.0, 3.0):
        looks.took(0.021 + 100 * 0.000025, 100, now)
        assert not looks.is_dear
    for _ in range(2):
        looks.took(0.021 + DEAR_SECONDS, 0, now=4.0)
    assert looks.dear_seconds == pytest.approx(DEAR_SECONDS, abs=0.01)


def test_what_looks_for_many_jobs_take_says_nothing_of_the_way() -> None:
    looks = dear_looks(0.020)
    looks.took_elsewhere(0.020, 1000)
    looks.took(0.020, 0, now=1.0)
    assert looks.is_dear


def test_a_way_that_became_short_hides_no_dear_look() -> None:
    looks = dear_looks(0.020)
    looks.took_elsewhere(0.020, 1)
    looks.took(0.020, 0, now=1.0)
    looks.took(0.001, 0, now=2.0)
    for _ in range(2):
        looks.took(0.020, 0, now=3.0)
    assert looks.is_dear


def test_what_was_claimed_last_is_looked_through_again() -> None:
    frontier = Frontier()
    make_dear(frontier)
    first, last = [("a", 0, "1", n) for n in range(1, 11)], [("a", 0, "2", n) for n in range(1, KEPT_JOBS + 1)]
    frontier.claimed(PART, [job(row) for row in first], 0.0, 0.0)
    assert frontier.ranges(QUEUES, 1.0, polling=True) == everywhere(QUEUES)
    frontier.claimed(PART, [job(row) for row in last], 0.0, 0.0)
    ranges = frontier.ranges(QUEUES, 1.0, polling=True)
    assert not any(has(each, row) for each in ranges for row in first)
    assert all(any(has(each, row) for each in ranges) for row in last)


def test_what_was_claimed_a_second_ago_is_passed_over_however_little_it_was() -> None:
    frontier = Frontier()
    make_dear(frontier)
    frontier.claimed(PART, [job(("a", 0, "1", 5))], 0.0, 0.0)
    assert frontier.ranges(QUEUES, 1.0, polling=True) == everywhere(QUEUES)
    frontier.claimed(PART, [job(("a", 0, "2", 6))], 0.0, 1.0 + KEPT_SECONDS)
    ranges = frontier.ranges(QUEUES, 2.0, polling=True)
    assert not any(has(each, ("a", 0, "1", 5)) for each in ranges)
    assert any(has(each, ("a", 0, "2", 6)) for each in ranges)


def test_a_look_everywhere_teaches_where_each_place_begins() -> None:
    frontier = Frontier()
    found = [job(("a", 0, "2", 5)), job(("a", 0, "3", 1)), job(("a", 7, "1", 1))]
    frontier.claimed(everywhere(QUEUES), found, DEAR_SECONDS, 0.0)
    frontier.claimed(everywhere(QUEUES), [], DEAR_SECONDS, 0.0)
    assert frontier.ranges(["a"], 0.5, polling=True) == [
        Range("a", LOWEST, "-infinity", 0, -1),
        Range("a", 0, "2", 5, 6, KEPT_SECONDS),
        Range("a", 7, "1", 1, HIGHEST, KEPT_SECONDS),
    ]


def test_a_missed_poll_is_made_up_for_by_the_next_claim_alone() -> None:
    frontier = Frontier()
    make_dear(frontier)
    for second in (1, 2):
        frontier.claimed(PART, [job(("a", 0, "1", second))] * KEPT_JOBS, 0.0, 0.0)
    past = frontier.ranges(["a"], 1.0, polling=False)
    assert past != everywhere(["a"])
    frontier.miss_poll()
    assert frontier.ranges(["a"], 1.0 + PAUSE, polling=False) == everywhere(["a"])
    assert frontier.ranges(["a"], 1.0 + PAUSE, polling=False) == past
    frontier.miss_poll()
    assert frontier.ranges(["a"], 1.0, polling=False) == past  # so soon after the last it is too dear


def test_a_glance_goes_only_where_that_is_cheap_and_takes_no_poll_from_the_next_claim() -> None:
    frontier = Frontier()
    assert frontier.cheap_ranges(["a"]) == everywhere(["a"])
    make_dear(frontier)
    for second in (1, 2):
        frontier.claimed(PART, [job(("a", 0, "1", second))] * KEPT_JOBS, 0.0, 0.0)
    frontier.miss_poll()
    assert frontier.cheap_ranges(["a"]) != everywhere(["a"])
    assert frontier.ranges(["a"], 1.0 + PAUSE, polling=False) == everywhere(["a"])


def test_the_number_of_ranges_is_bounded() -> None:
    frontier = Frontier()
    make_dear(frontier)
    most = 0
    for priority in range(10_000):
        frontier.claimed(PART, [job(("a", priority, "1", 1))] * 100, 0.0, 0.0)
        most = max(most, len(frontier.ranges(["a"], 1.0, polling=True)))
    assert 50 < most <= MOST_PLACES + 1


@given(st.lists(st.lists(rows_of_ready, min_size=1, max_size=5), max_size=5), rows_of_ready)
def test_every_row_is_in_one_range_unless_it_lies_before_what_was_claimed(claims: list[list[Row]], row: Row) -> None:
    frontier = Frontier()
    make_dear(frontier)
    ends: dict[
        tuple[str, int], Row
    ] = {}  # the last that was claimed of each queue and priority, but for the last claim
    for number, claimed in enumerate(claims):
        best_first = sorted(claimed, key=lambda each: each[1:])
        many = [best_first[-1]] * KEPT_JOBS  # so that this is the only claim that is looked through again
        frontier.claimed(PART, [job(each) for each in best_first + many], 0.0, 0.0)
        if number < len(claims) - 1:
            ends |= {each[:2]: each for each in best_first}
    behind = row[:2] in ends and row <= ends[row[:2]]
    assert sum(has(each, row) for each in frontier.ranges(QUEUES, 1.0, polling=True)) == (not behind)
    assert frontier.ranges(QUEUES, 1.0 + PAUSE, polling=True) == everywhere(QUEUES)
    assert frontier.ranges(QUEUES, 1.0 + PAUSE, polling=False) == frontier.ranges(QUEUES, 1.0, polling=True)
