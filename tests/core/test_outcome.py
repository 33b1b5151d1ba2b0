"""What becomes of a job that did not complete, as a table; delays that are no delays; texts that go to the database."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost_client import JobState
from roostd.core.job import ClaimedJob
from roostd.core.lifecycle import EXECUTING, TRANSITIONS, Event
from roostd.core.outcome import MAX_DELAY_SECONDS, Ending, Report, bounded_delay, error_entry, settle

AVAILABLE, RETRYABLE = JobState.AVAILABLE, JobState.RETRYABLE
DISCARDED, CANCELLED = JobState.DISCARDED, JobState.CANCELLED
MAX_CRASHES = 3
RETRY_SECONDS = 17.0


def job(*, attempt: int = 1, max_attempts: int = 20, crashes: int = 0) -> ClaimedJob:
    return ClaimedJob(7, 99, attempt, max_attempts, crashes, None, "default", "task", "{}")


# ending, attempts left?, crashes before -> state (None: as before the claim), delay, counts attempt, counts crash
TABLE = [
    (Ending.FAILED, True, 0, RETRYABLE, RETRY_SECONDS, True, False),
    (Ending.FAILED, True, 9, RETRYABLE, RETRY_SECONDS, True, False),
    (Ending.FAILED, False, 0, DISCARDED, 0.0, True, False),
    (Ending.TIMED_OUT, True, 0, RETRYABLE, RETRY_SECONDS, True, False),
    (Ending.TIMED_OUT, True, 9, RETRYABLE, RETRY_SECONDS, True, False),
    (Ending.TIMED_OUT, False, 0, DISCARDED, 0.0, True, False),
    (Ending.CRASHED, True, 0, RETRYABLE, RETRY_SECONDS, True, True),
    (Ending.CRASHED, True, 1, RETRYABLE, RETRY_SECONDS, True, True),
    (Ending.CRASHED, True, 2, DISCARDED, 0.0, True, True),
    (Ending.CRASHED, True, 9, DISCARDED, 0.0, True, True),
    (Ending.CRASHED, False, 0, DISCARDED, 0.0, True, True),
    (Ending.LOST, True, 0, RETRYABLE, 0.0, True, False),
    (Ending.LOST, True, 9, RETRYABLE, 0.0, True, False),
    (Ending.LOST, False, 0, DISCARDED, 0.0, True, False),
    (Ending.CANCELLED, True, 0, CANCELLED, 0.0, True, False),
    (Ending.CANCELLED, False, 9, CANCELLED, 0.0, True, False),
    (Ending.SNOOZED, True, 0, AVAILABLE, 5.0, False, False),
    (Ending.SNOOZED, False, 9, AVAILABLE, 5.0, False, False),
    (Ending.UNCONFIRMED, True, 9, RETRYABLE, RETRY_SECONDS, True, False),
    (Ending.UNCONFIRMED, False, 0, DISCARDED, 0.0, True, False),
    (Ending.RELEASED, True, 0, None, 0.0, False, False),
    (Ending.RELEASED, False, 9, None, 0.0, False, False),
]


def test_the_table_covers_every_ending_with_and_without_attempts_left() -> None:
    assert {(row[0], row[1]) for row in TABLE} == {(ending, left) for ending in Ending for left in (True, False)}


@pytest.mark.parametrize(("ending", "left", "crashes", "state", "delay", "attempt", "crash"), TABLE)
def test_what_an_ending_leads_to(
    ending: Ending, left: bool, crashes: int, state: JobState | None, delay: float, attempt: bool, crash: bool
) -> None:
    settlement = settle(
        job(attempt=4, max_attempts=5 if left else 4, crashes=crashes),
        Report(ending, "an error", "its trace", seconds=5.0),
        retry_delay=lambda number: RETRY_SECONDS if number == 4 else math.nan,
        max_crashes=MAX_CRASHES,
    )
    assert (settlement.job_id, settlement.lease) == (7, 99)
    assert (settlement.state, settlement.delay_seconds) == (state, delay)
    assert (settlement.counts_attempt, settlement.counts_crash) == (attempt, crash)
    assert settlement.unconfirmed == (ending is Ending.UNCONFIRMED)
    recorded = ending not in (Ending.SNOOZED, Ending.RELEASED)
    assert (settlement.error is not None) == recorded
    if settlement.error is not None:
        assert json.loads(settlement.error) == {"error": "an error", "trace": "its trace"}


EVENT_OF = {
    AVAILABLE: Event.SNOOZE,
    RETRYABLE: Event.FAIL,
    DISCARDED: Event.DISCARD,
    CANCELLED: Event.CANCEL,
    None: Event.RELEASE,
}


@pytest.mark.parametrize("row", TABLE)
def test_no_ending_leads_where_the_lifecycle_has_no_way(row: tuple[Ending, bool, int, JobState | None]) -> None:
    state = row[3]
    targets = TRANSITIONS[EXECUTING, EVENT_OF[state]]
    assert state in targets if state else {AVAILABLE, RETRYABLE} <= targets


def test_more_attempts_than_allowed_are_as_many_as_allowed() -> None:
    """max_attempts may have been lowered meanwhile."""
    settlement = settle(job(attempt=9, max_attempts=3), Report(Ending.FAILED), retry_delay=float, max_crashes=3)
    assert settlement.state is DISCARDED


def test_a_cancel_without_an_error_records_none() -> None:
    assert settle(job(), Report(Ending.CANCELLED), retry_delay=float, max_crashes=3).error is None


@pytest.mark.parametrize(
    ("seconds", "delay"),
    [
        (0.0, 0.0),
        (-0.0, 0.0),
        (1e-9, 1e-9),
        (3.5, 3.5),
        (-1.0, 0.0),
        (-math.inf, 0.0),
        (math.nan, 0.0),
        (math.inf, MAX_DELAY_SECONDS),
        (1e300, MAX_DELAY_SECONDS),
        (MAX_DELAY_SECONDS, MAX_DELAY_SECONDS),
    ],
)
def test_every_number_makes_a_delay_that_the_database_can_add(seconds: float, delay: float) -> None:
    assert bounded_delay(seconds) == delay
    for ending in (Ending.FAILED, Ending.CRASHED, Ending.SNOOZED):
        settlement = settle(job(), Report(ending, seconds=seconds), retry_delay=lambda _: seconds, max_crashes=3)
        assert settlement.delay_seconds == delay


def test_the_delay_is_asked_for_the_attempt_that_failed() -> None:
    asked: list[int] = []

    def retry_delay(attempt: int) -> float:
        asked.append(attempt)
        return 1.0

    settle(job(attempt=3), Report(Ending.FAILED), retry_delay=retry_delay, max_crashes=3)
    assert asked == [3]


@given(st.text(), st.text())
def test_an_entry_of_errors_is_json_of_ascii_whatever_the_text(error: str, trace: str) -> None:
    entry = error_entry(error, trace)
    assert entry.isascii()
    assert json.loads(entry) == {"error": error, "trace": trace}


def test_a_job_that_is_cancelled_before_it_starts_spends_no_attempt() -> None:
    assert not settle(job(), Report(Ending.CANCELLED), retry_delay=float, max_crashes=3).counts_attempt
