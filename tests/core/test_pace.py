"""How the length of jobs decides how many are handed over, claimed and written together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.core.pace import AHEAD_SECONDS, FLUSH_SECONDS, MAX_AHEAD, MAX_WINDOW, WINDOW_SECONDS, Pace


def paced(mean_seconds: float | None) -> Pace:
    pace = Pace()
    pace.mean_seconds = mean_seconds
    return pace


def test_before_anything_is_known_jobs_go_one_by_one() -> None:
    pace = Pace()
    assert (pace.window(), pace.ahead(64), pace.flush_delay(64)) == (1, 0, 0.0)


@pytest.mark.parametrize(
    ("mean_seconds", "window", "ahead"),
    [(3600.0, 1, 0), (0.1, 1, 1), (0.005, 1, 20), (0.001, 8, 100), (0.00005, MAX_WINDOW, MAX_AHEAD)],
)
def test_the_shorter_the_jobs_the_more_go_together(mean_seconds: float, window: int, ahead: int) -> None:
    pace = paced(mean_seconds)
    assert (pace.window(), pace.ahead(2)) == (window, ahead)


def test_outcomes_wait_for_company_only_where_two_more_are_to_be_expected() -> None:
    assert paced(0.001).flush_delay(1) == FLUSH_SECONDS
    assert paced(0.01).flush_delay(1) == FLUSH_SECONDS
    assert paced(0.011).flush_delay(1) == 0.0
    assert paced(0.011).flush_delay(2) == FLUSH_SECONDS
    assert paced(60.0).flush_delay(64) == 0.0


def test_the_first_report_is_taken_as_it_is_and_later_ones_move_the_mean() -> None:
    pace = Pace()
    pace.observe(10, 0.1)
    assert pace.mean_seconds == pytest.approx(0.01)
    pace.observe(1, 0.02)
    assert pace.mean_seconds == pytest.approx(0.011)


def test_ten_reports_of_one_job_weigh_as_much_as_one_of_ten() -> None:
    together, one_by_one = paced(0.01), paced(0.01)
    together.observe(10, 1.0)
    for _ in range(10):
        one_by_one.observe(1, 0.1)
    assert together.mean_seconds == pytest.approx(one_by_one.mean_seconds)


def test_a_job_that_still_runs_counts_with_what_it_has_taken_so_far() -> None:
    pace = Pace()
    pace.at_least(0.5)
    assert pace.mean_seconds == 0.5
    pace.at_least(0.1)
    assert pace.mean_seconds == 0.5


def test_long_jobs_do_not_leave_their_mark_for_ever() -> None:
    pace = paced(3600.0)
    for _ in range(200):
        pace.observe(1, 0.0001)
    assert pace.window() > 1


@given(
    st.lists(st.tuples(st.integers(1, MAX_WINDOW), st.floats(0, 1e9)), max_size=30),
    st.integers(0, 1000),
)
def test_whatever_is_observed_the_numbers_stay_within_their_bounds(
    reports: list[tuple[int, float]], children: int
) -> None:
    pace = Pace()
    for jobs, seconds in reports:
        pace.observe(jobs, seconds)
    assert 1 <= pace.window() <= MAX_WINDOW
    assert 0 <= pace.ahead(children) <= MAX_AHEAD
    assert pace.flush_delay(children) in (0.0, FLUSH_SECONDS)
    assert pace.rest(1) == 0.0
    if pace.mean_seconds is not None:
        assert pace.window() == 1 or pace.window() * pace.mean_seconds <= WINDOW_SECONDS * 1.001
        assert pace.ahead(children) * pace.mean_seconds <= children * AHEAD_SECONDS * 1.001
