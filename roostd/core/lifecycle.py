"""Which states a job has, and what moves it out of each: every rule of a job's life, in one table.

`executing` is not written into the job's row: it is the state of a job that a claim stands for (see the first
migration). RELEASE and RESCUE of a claim therefore leave or set the state that the row goes back to.
"""

from __future__ import annotations

import enum

from roost_client import JobState

AVAILABLE, EXECUTING, RETRYABLE = JobState.AVAILABLE, JobState.EXECUTING, JobState.RETRYABLE
COMPLETED, DISCARDED, CANCELLED = JobState.COMPLETED, JobState.DISCARDED, JobState.CANCELLED

TERMINAL = frozenset({COMPLETED, DISCARDED, CANCELLED})
WAITING = frozenset({AVAILABLE, RETRYABLE})


class Event(enum.Enum):
    """What can happen to a job, and who makes it happen."""

    CLAIM = "claim"  # a worker with a free child
    COMPLETE = "complete"  # the worker, with the handler's result
    FAIL = "fail"  # the worker, attempts left
    DISCARD = "discard"  # the worker, no attempts left or too many crashes
    SNOOZE = "snooze"  # the handler
    RELEASE = "release"  # the worker, for a job that it did not start or was told to let go
    RESCUE = "rescue"  # another worker, or the same host's next one, after the claim's worker died
    CANCEL = "cancel"  # an application or an operator; for a running job carried out by its worker
    RETRY = "retry"  # an operator
    REQUEUE = "requeue"  # an operator, in bulk


# (state, event) -> the states it may lead to. A pair that is missing changes nothing.
TRANSITIONS: dict[tuple[JobState, Event], frozenset[JobState]] = {
    (AVAILABLE, Event.CLAIM): frozenset({EXECUTING}),
    (RETRYABLE, Event.CLAIM): frozenset({EXECUTING}),
    (EXECUTING, Event.COMPLETE): frozenset({COMPLETED}),
    (EXECUTING, Event.FAIL): frozenset({RETRYABLE, CANCELLED}),  # cancelled: a cancel was asked for meanwhile
    (EXECUTING, Event.DISCARD): frozenset({DISCARDED}),
    (EXECUTING, Event.SNOOZE): frozenset({AVAILABLE, CANCELLED}),
    (EXECUTING, Event.RELEASE): frozenset({AVAILABLE, RETRYABLE, CANCELLED}),
    (EXECUTING, Event.RESCUE): frozenset({RETRYABLE, DISCARDED, CANCELLED}),
    (EXECUTING, Event.CANCEL): frozenset({EXECUTING, CANCELLED}),  # executing: asked for, not yet carried out
    (AVAILABLE, Event.CANCEL): frozenset({CANCELLED}),
    (RETRYABLE, Event.CANCEL): frozenset({CANCELLED}),
    (AVAILABLE, Event.RETRY): frozenset({AVAILABLE}),
    (RETRYABLE, Event.RETRY): frozenset({RETRYABLE}),
    (DISCARDED, Event.RETRY): frozenset({AVAILABLE}),
    (CANCELLED, Event.RETRY): frozenset({AVAILABLE}),
    (DISCARDED, Event.REQUEUE): frozenset({AVAILABLE}),
}
