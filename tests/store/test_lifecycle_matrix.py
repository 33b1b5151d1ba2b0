"""The lifecycle against real rows: everything that can be done to a job, done to a job in every situation."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from roost_client import JobState
from roostd.core.lifecycle import (
    AVAILABLE,
    CANCELLED,
    COMPLETED,
    DISCARDED,
    EXECUTING,
    RETRYABLE,
    TERMINAL,
    TRANSITIONS,
    Event,
)
from tests.store.rows import (
    Conn,
    Life,
    add_worker,
    assert_each_job_is_in_its_place,
    connect,
    job_row,
    places,
    public_state,
)


class Situation(NamedTuple):
    state: JobState
    place: str | None
    path: tuple[str, ...]  # the steps that lead there from nothing


SITUATIONS = {
    "available": Situation(AVAILABLE, "ready", ("enqueue",)),
    "scheduled": Situation(AVAILABLE, "scheduled", ("enqueue for later",)),
    "scheduled, due": Situation(AVAILABLE, "scheduled", ("enqueue for later", "time passes")),
    "snoozed": Situation(AVAILABLE, "scheduled", ("enqueue", "claim", "snooze")),
    "retryable": Situation(RETRYABLE, "scheduled", ("enqueue", "claim", "fail, retry later")),
    "retryable, due": Situation(RETRYABLE, "scheduled", ("enqueue", "claim", "fail, retry later", "time passes")),
    "retryable, ready": Situation(RETRYABLE, "ready", ("enqueue", "claim", "fail, retry now")),
    "executing": Situation(EXECUTING, "claims", ("enqueue", "claim")),
    "executing a retry": Situation(EXECUTING, "claims", ("enqueue", "claim", "fail, retry now", "claim")),
    "executing the last attempt": Situation(EXECUTING, "claims", ("enqueue with one attempt", "claim")),
    "executing, cancel asked for": Situation(EXECUTING, "claims", ("enqueue", "claim", "cancel")),
    "executing under a later lease": Situation(
        EXECUTING, "claims", ("enqueue", "claim", "release", "claim, and the answer is lost")
    ),
    "completed": Situation(COMPLETED, None, ("enqueue", "claim", "complete")),
    "discarded": Situation(DISCARDED, None, ("enqueue", "claim", "crash for the last time")),
    "cancelled": Situation(CANCELLED, None, ("enqueue", "cancel")),
    "cancelled while it ran": Situation(CANCELLED, None, ("enqueue", "claim", "cancel", "carry out the cancel")),
}

RUNNING = ("executing", "executing a retry", "executing the last attempt")
ASKED = "executing, cancel asked for"
FENCED = "executing under a later lease"
WAITING = ("available", "scheduled", "scheduled, due", "snoozed", "retryable", "retryable, due", "retryable, ready")

Cell = tuple[JobState, str | None]


class Operation(NamedTuple):
    event: Event | None  # None: moves a job between tables and leaves its state
    cells: dict[str, Cell]  # what becomes of a job in that situation; in every other one nothing changes at all
    columns: frozenset[str]  # of job_rows, that it may change


def _operation(event: Event | None, columns: str, *groups: tuple[tuple[str, ...], JobState, str | None]) -> Operation:
    cells: dict[str, Cell] = {name: (state, place) for names, state, place in groups for name in names}
    return Operation(event, cells, frozenset(columns.split()))


RUN = "state attempt attempted_at cancel_requested"
AGAIN = "state attempt crashes scheduled_at cancel_requested cancelled_at discarded_at"

OPERATIONS = {
    "claim": _operation(Event.CLAIM, "", (("available", "retryable, ready"), EXECUTING, "claims")),
    "complete": _operation(Event.COMPLETE, f"{RUN} completed_at result", ((*RUNNING, ASKED), COMPLETED, None)),
    "fail, retry now": _operation(
        Event.FAIL,
        f"{RUN} scheduled_at cancelled_at errors",
        (RUNNING, RETRYABLE, "ready"),
        ((ASKED,), CANCELLED, None),
    ),
    "fail, retry later": _operation(
        Event.FAIL,
        f"{RUN} scheduled_at cancelled_at errors",
        (RUNNING, RETRYABLE, "scheduled"),
        ((ASKED,), CANCELLED, None),
    ),
    "crash for the last time": _operation(
        Event.DISCARD, f"{RUN} discarded_at crashes errors", ((*RUNNING, ASKED), DISCARDED, None)
    ),
    "snooze": _operation(
        Event.SNOOZE,
        "state scheduled_at cancel_requested cancelled_at",
        (RUNNING, AVAILABLE, "scheduled"),
        ((ASKED,), CANCELLED, None),
    ),
    "carry out the cancel": _operation(
        Event.CANCEL, f"{RUN} cancelled_at errors", ((*RUNNING, ASKED), CANCELLED, None)
    ),
    "release": _operation(
        Event.RELEASE,
        "state cancel_requested cancelled_at",
        (("executing", "executing the last attempt"), AVAILABLE, "ready"),
        (("executing a retry",), RETRYABLE, "ready"),
        ((ASKED,), CANCELLED, None),
    ),
    "promote": _operation(
        None, "", (("scheduled, due",), AVAILABLE, "ready"), (("retryable, due",), RETRYABLE, "ready")
    ),
    "rescue": _operation(None, ""),
    "lose the worker and rescue": _operation(
        Event.RESCUE,
        f"{RUN} scheduled_at discarded_at cancelled_at errors",
        (("executing", "executing a retry", FENCED), RETRYABLE, "ready"),
        (("executing the last attempt",), DISCARDED, None),
        ((ASKED,), CANCELLED, None),
    ),
    "cancel": _operation(
        Event.CANCEL,
        "state cancelled_at cancel_requested",
        (WAITING, CANCELLED, None),
        ((*RUNNING, ASKED, FENCED), EXECUTING, "claims"),
    ),
    "retry": _operation(
        Event.RETRY,
        AGAIN,
        (("available", "scheduled", "scheduled, due", "snoozed"), AVAILABLE, "ready"),
        (("retryable", "retryable, due", "retryable, ready"), RETRYABLE, "ready"),
        (("discarded", "cancelled", "cancelled while it ran"), AVAILABLE, "ready"),
    ),
    "requeue": _operation(Event.REQUEUE, AGAIN, (("discarded",), AVAILABLE, "ready")),
}

# Operations that name one job; the others take whatever is there.
TARGETED = OPERATIONS.keys() - {"promote", "lose the worker and rescue"}


@pytest.fixture(scope="module")
def session(shared_dsn: str) -> Iterator[tuple[asyncio.Runner, Conn]]:
    """One connection for all cells of the matrix, with its prepared statements, and the loop it lives in."""
    with asyncio.Runner() as runner:
        conn = runner.run(connect(shared_dsn))
        yield runner, conn
        runner.run(conn.close())


def test_the_matrix_holds_every_transition_and_no_other() -> None:
    shown: defaultdict[tuple[JobState, Event], set[JobState]] = defaultdict(set)
    for operation in OPERATIONS.values():
        for name, (state, _) in operation.cells.items():
            if operation.event is not None:
                shown[SITUATIONS[name].state, operation.event].add(state)
            else:
                assert state == SITUATIONS[name].state
    assert shown == TRANSITIONS


def test_the_matrix_has_a_place_for_every_job_that_is_not_finished() -> None:
    cells = [cell for operation in OPERATIONS.values() for cell in operation.cells.values()]
    cells += [(situation.state, situation.place) for situation in SITUATIONS.values()]
    for state, place in cells:
        allowed = {None} if state in TERMINAL else {"claims"} if state is EXECUTING else {"ready", "scheduled"}
        assert place in allowed
    assert {situation.state for situation in SITUATIONS.values()} == set(JobState)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_on_a_job(session: tuple[asyncio.Runner, Conn], operation: str, situation: str) -> None:
    runner, conn = session
    runner.run(_check(conn, operation, situation))


async def _check(conn: Conn, operation: str, situation: str) -> None:
    async with conn.transaction(force_rollback=True):
        worker_id = await add_worker(conn)
        job, bystander = Life(worker_id, "its own"), Life(worker_id, "another")
        for life in (job, bystander):
            for step in SITUATIONS[situation].path:
                await life.step(conn, step)
        before = await job_row(conn, job.job_id)
        places_before = await places(conn, job.job_id)
        bystander_before = (await job_row(conn, bystander.job_id), await places(conn, bystander.job_id))
        assert (await public_state(conn, job.job_id), *places_before) == _shown(*SITUATIONS[situation][:2])
        await assert_each_job_is_in_its_place(conn)

        await job.step(conn, operation)

        after = await job_row(conn, job.job_id)
        places_after = await places(conn, job.job_id)
        if situation in OPERATIONS[operation].cells:
            state, place = OPERATIONS[operation].cells[situation]
            assert (await public_state(conn, job.job_id), *places_after) == _shown(state, place)
            assert {column for column in after if after[column] != before[column]} <= OPERATIONS[operation].columns
        else:
            assert (after, places_after) == (before, places_before)
        if operation in TARGETED:
            assert (await job_row(conn, bystander.job_id), await places(conn, bystander.job_id)) == bystander_before
        await assert_each_job_is_in_its_place(conn)


def _shown(state: JobState, place: str | None) -> tuple[str, ...]:
    return (state, place) if place else (state,)
