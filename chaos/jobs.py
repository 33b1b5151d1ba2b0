"""The kinds of jobs: what each is, how it may end, and what must hold for what it went through. Pure.

A new kind is an entry of KINDS, and a task in `handlers` where none of those there will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from chaos.ledger import Change, Run

QUEUE = "work"
PAUSED_QUEUE = "held"  # is paused for a time, again and again
PROBE_QUEUE = "probe"  # idle but for the jobs that measure how fast one is picked up
ONLY_COMPLETED = frozenset({"completed"})
UNIQUE_KEYS = 8
NEVER = 3_600.0  # seconds of delay, for what must not start
MAX_CONCURRENCY = 3  # of the task chaos_throttled
RATE_PER_MINUTE = 10  # of the task chaos_rated


@dataclass(frozen=True, slots=True)
class Draft:
    """A job to enqueue; `cancel` is None, "waiting" (some time later) or "running" (once it has started).

    `parents` is the number of jobs before it that it depends on.
    """

    task: str
    args: Mapping[str, Any] = field(default_factory=dict)
    queue: str = QUEUE
    delay_seconds: float = 0.0
    max_attempts: int = 50  # more than any campaign's faults may cost one job
    timeout_seconds: int | None = None
    cancel: str | None = None
    unique_key: str | None = None
    parents: int = 0


@dataclass(frozen=True, slots=True)
class Story:
    """All that is known of one job, each in order of time."""

    runs: list[Run]
    changes: list[Change]


@dataclass(frozen=True, slots=True)
class Kind:
    """`weight` is its share among all; `holds` says what is wrong with a story, or nothing."""

    make: Callable[[Random], Draft]
    weight: float
    ends: frozenset[str] = ONLY_COMPLETED
    holds: Callable[[Story], str | None] = lambda story: None


def _ran_after(attempts: int) -> Callable[[Story], str | None]:
    def holds(story: Story) -> str | None:
        good = [run for run in story.runs if run.how == "returned"]
        return (
            None
            if all(run.attempt > attempts for run in good)
            else f"it returned in one of its first {attempts} attempts"
        )

    return holds


def _never_ran(story: Story) -> str | None:
    return f"it ran under lease {story.runs[0].lease} before it was due" if story.runs else None


def _was_not_early(story: Story) -> str | None:
    due_at = next(change.scheduled_at for change in story.changes if change.table == "job_rows")
    claimed = [change for change in story.changes if change.table == "claims" and change.op == "INSERT"]
    if claimed and due_at is not None and claimed[0].at < due_at:
        return f"it was claimed {due_at - claimed[0].at:.3f} s before it was due"
    return None


def _snoozed_once(story: Story) -> str | None:
    snoozes = sum(run.how == "SnoozeJob" for run in story.runs)
    return None if snoozes <= 1 else f"it snoozed {snoozes} times"


def _crashed_thrice(story: Story) -> str | None:
    crashes = max((change.crashes or 0 for change in story.changes), default=0)
    return None if crashes == 3 else f"it was discarded after {crashes} crashes"


def _failed_twice(story: Story) -> str | None:
    spent = max((change.attempt or 0 for change in story.changes if change.table == "job_rows"), default=0)
    return None if spent == 2 else f"it was discarded after {spent} attempts"


KINDS: dict[str, Kind] = {
    "short": Kind(lambda dice: Draft("chaos_sleep"), 66),
    "brief": Kind(lambda dice: Draft("chaos_sleep", {"seconds": round(dice.uniform(0.001, 0.05), 4)}), 20),
    "long": Kind(lambda dice: Draft("chaos_sleep", {"seconds": round(0.2 + 2.8 * dice.random() ** 3, 3)}), 4),
    "longest": Kind(lambda dice: Draft("chaos_sleep", {"seconds": round(dice.uniform(6, 14), 3)}), 0.4),
    "retried": Kind(lambda dice: Draft("chaos_fail", {"until": dice.randint(1, 3)}), 3, holds=_ran_after(1)),
    "failing": Kind(
        lambda dice: Draft("chaos_fail", {"until": 1_000}, max_attempts=2), 1, frozenset({"discarded"}), _failed_twice
    ),
    "snoozed": Kind(
        lambda dice: Draft("chaos_snooze", {"seconds": round(dice.uniform(0.1, 2), 3)}), 1.5, holds=_snoozed_once
    ),
    "scheduled": Kind(
        lambda dice: Draft("chaos_sleep", delay_seconds=round(dice.uniform(0.1, 5), 3)), 2, holds=_was_not_early
    ),
    "timed out": Kind(lambda dice: Draft("chaos_hang", timeout_seconds=1), 0.4, holds=_ran_after(1)),
    "cancelled waiting": Kind(
        lambda dice: Draft("chaos_sleep", delay_seconds=NEVER, cancel="waiting"),
        1,
        frozenset({"cancelled"}),
        _never_ran,
    ),
    "cancelled running": Kind(
        lambda dice: Draft("chaos_sleep", {"seconds": 60.0}, cancel="running"), 0.4, frozenset({"cancelled"})
    ),
    "paused": Kind(lambda dice: Draft("chaos_sleep", queue=PAUSED_QUEUE), 3),
    "crashing": Kind(
        lambda dice: Draft("chaos_crash", {"until": dice.randint(1, 2), "by": dice.choice(["exit", "kill"])}),
        0.6,
        holds=_ran_after(1),
    ),
    "crashing always": Kind(
        lambda dice: Draft("chaos_crash", {"until": 1_000, "by": "exit"}),
        0.2,
        frozenset({"discarded"}),
        _crashed_thrice,
    ),
    "leaving a process": Kind(lambda dice: Draft("chaos_spawn"), 0.6),
    "unique": Kind(
        lambda dice: Draft("chaos_sleep", {"seconds": 0.02}, unique_key=f"key {dice.randrange(UNIQUE_KEYS)}"), 2
    ),
    # Of how each ends that it depends on the checker knows more.
    "dependent": Kind(
        lambda dice: Draft("chaos_sleep", parents=dice.choice([1, 1, 1, 2, 5])),
        4,
        frozenset({"completed", "cancelled"}),
    ),
    "throttled": Kind(lambda dice: Draft("chaos_throttled", {"seconds": round(dice.uniform(0.001, 0.1), 4)}), 3),
    "rated": Kind(lambda dice: Draft("chaos_rated"), 0.3),  # a campaign must not take longer for them
    "transactional": Kind(lambda dice: Draft("chaos_effect"), 3),
    "probe": Kind(lambda dice: Draft("chaos_sleep", queue=PROBE_QUEUE), 0),  # enqueued by the fault that measures
}
