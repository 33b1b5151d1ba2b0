"""What becomes of a job whose run ended in any way but success: errors, timeouts, crashes, cancels, snoozes.

The one place that decides it. Completion has no choices and does not pass through here; the rescue of a dead
worker's jobs is decided in store/sql/rescue.sql, because the worker that would ask is gone: as LOST is here, but that a
cancel which was asked for beats a last attempt, too.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from roost_client import JobState
from roostd.core.job import ClaimedJob

# Far enough for every use, near enough that PostgreSQL can add it to now().
MAX_DELAY_SECONDS = 100 * 366 * 86_400.0


class SoftReason(enum.IntEnum):
    """Why a running job is called off; its child raises the matching exception in the handler."""

    TIMEOUT = 1
    CANCEL = 2
    SHUTDOWN = 3


class Ending(enum.Enum):
    """How a run ended, other than by completing."""

    FAILED = "failed"  # the handler raised, or its arguments or result were no good
    TIMED_OUT = "timed out"  # overran timeout_seconds, whether it stopped by itself or was killed
    CANCELLED = "cancelled"  # was asked to stop by a cancel
    CRASHED = "crashed"  # its process vanished under it
    LOST = "lost"  # its process was taken down by the loss of another one of ours (template, master)
    SNOOZED = "snoozed"  # asked to run later
    RELEASED = "released"  # never started, or interrupted by a shutdown
    # Its handler returned after completing it in a transaction of its own, of which nobody knows whether it committed.
    UNCONFIRMED = "unconfirmed"


@dataclass(frozen=True, slots=True)
class Report:
    """An ending with its particulars. `error` and `trace` are text; `seconds` is the snooze."""

    ending: Ending
    error: str = ""
    trace: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Settlement:
    """A row of store/sql/settle.sql. `state` None keeps the state that the row had before the claim.

    An `unconfirmed` one takes effect only if what it stands for did not: the lease tells.
    """

    job_id: int
    lease: int
    state: JobState | None
    delay_seconds: float
    error: str | None
    counts_attempt: bool
    counts_crash: bool
    unconfirmed: bool = False


def settle(job: ClaimedJob, report: Report, *, retry_delay: Callable[[int], float], max_crashes: int) -> Settlement:
    """The settlement of `job`. `retry_delay` maps the attempt (from 1) to seconds; a bad answer counts as 0."""

    def to(state: JobState | None, delay: float = 0.0, *, error: bool, attempt: bool = True) -> Settlement:
        return Settlement(
            job_id=job.id,
            lease=job.lease,
            state=state,
            delay_seconds=delay,
            error=error_entry(report.error, report.trace) if error else None,
            counts_attempt=attempt,
            counts_crash=report.ending is Ending.CRASHED,
            unconfirmed=report.ending is Ending.UNCONFIRMED,
        )

    match report.ending:
        case Ending.RELEASED:
            return to(None, error=False, attempt=False)
        case Ending.SNOOZED:
            return to(JobState.AVAILABLE, bounded_delay(report.seconds), error=False, attempt=False)
        case Ending.CANCELLED:
            # An error tells where the handler was; without one it had not started.
            return to(JobState.CANCELLED, error=bool(report.error), attempt=bool(report.error))
        case Ending.CRASHED if job.crashes + 1 >= max_crashes:
            return to(JobState.DISCARDED, error=True)
        case _ if job.attempt >= job.max_attempts:
            return to(JobState.DISCARDED, error=True)
        case Ending.LOST:
            return to(JobState.RETRYABLE, error=True)
        case _:
            return to(JobState.RETRYABLE, bounded_delay(retry_delay(job.attempt)), error=True)


def bounded_delay(seconds: float) -> float:
    """`seconds` as a delay that the database can add: not negative, not NaN, at most a hundred years."""
    if math.isnan(seconds) or seconds <= 0:
        return 0.0
    return min(seconds, MAX_DELAY_SECONDS)


def error_entry(error: str, trace: str) -> str:
    """The JSON of an entry of `errors`, to which the database adds attempt and time."""
    return json.dumps({"error": error, "trace": trace})
