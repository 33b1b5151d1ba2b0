"""The table of a job's life holds together: nothing in it is a dead end by mistake, or comes from nowhere.

That the statements do what the table says is tested on rows, in tests/store.
"""

from __future__ import annotations

import pytest

from roost_client import JobState
from roostd.core.lifecycle import AVAILABLE, COMPLETED, EXECUTING, TERMINAL, TRANSITIONS, WAITING, Event

BY_WORKERS = {Event.CLAIM, Event.COMPLETE, Event.FAIL, Event.DISCARD, Event.SNOOZE, Event.RELEASE, Event.RESCUE}


def reachable(state: JobState) -> set[JobState]:
    found, new = {state}, {state}
    while new:
        new = {to for (at, _), targets in TRANSITIONS.items() if at in new for to in targets} - found
        found |= new
    return found


def test_every_state_is_waiting_running_or_terminal() -> None:
    assert {EXECUTING} | WAITING | TERMINAL == set(JobState)
    assert not WAITING & TERMINAL


def test_the_terminal_states_are_those_that_the_client_calls_so() -> None:
    assert {state for state in JobState if state.is_terminal} == TERMINAL


@pytest.mark.parametrize("state", JobState)
def test_every_state_has_something_that_moves_a_job_out_of_it_or_is_terminal(state: JobState) -> None:
    leads_on = any(at is state and targets - {state} for (at, _), targets in TRANSITIONS.items())
    assert leads_on or state in TERMINAL


@pytest.mark.parametrize("state", JobState)
def test_every_state_can_be_reached_by_a_new_job_and_leads_to_an_end(state: JobState) -> None:
    assert state in reachable(AVAILABLE)
    assert reachable(state) & TERMINAL


@pytest.mark.parametrize("event", Event)
def test_every_event_happens_in_some_state(event: Event) -> None:
    assert any(each is event for _, each in TRANSITIONS)


def test_no_pair_leads_nowhere() -> None:
    assert all(TRANSITIONS.values())


def test_only_a_claim_makes_a_job_run_and_only_of_a_waiting_one() -> None:
    starts = {(at, event) for (at, event), to in TRANSITIONS.items() if EXECUTING in to and at is not EXECUTING}
    assert starts == {(state, Event.CLAIM) for state in WAITING}


@pytest.mark.parametrize("event", [event for event in Event if event in BY_WORKERS - {Event.CLAIM}])
def test_only_of_a_claimed_job_can_a_worker_report_anything(event: Event) -> None:
    assert {at for at, each in TRANSITIONS if each is event} == {EXECUTING}


def test_a_worker_s_report_always_ends_the_claim() -> None:
    for (_, event), targets in TRANSITIONS.items():
        if event in BY_WORKERS - {Event.CLAIM}:
            assert EXECUTING not in targets


def test_only_an_operator_brings_a_finished_job_back_and_never_a_completed_one() -> None:
    assert {event for at, event in TRANSITIONS if at in TERMINAL} == {Event.RETRY, Event.REQUEUE}
    assert not any(at is COMPLETED for at, _ in TRANSITIONS)


def test_every_job_that_is_not_finished_can_be_cancelled() -> None:
    assert {at for at, event in TRANSITIONS if event is Event.CANCEL} == WAITING | {EXECUTING}


def test_a_cancel_may_overtake_every_end_of_a_run_that_would_make_the_job_wait() -> None:
    for event in (Event.FAIL, Event.SNOOZE, Event.RELEASE, Event.RESCUE):
        assert JobState.CANCELLED in TRANSITIONS[EXECUTING, event]
