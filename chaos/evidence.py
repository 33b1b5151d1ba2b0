"""What a campaign leaves for the checker. Times are monotonic, but epoch seconds where the database told them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from chaos.ledger import Change, Effect, Run
from chaos.plan import Plan


@dataclass(slots=True)
class Pause:
    """When a queue was paused for certain, by the database's clock."""

    began_at: float
    ended_at: float = float("inf")


@dataclass(slots=True)
class Enqueued:
    """What the database has acknowledged: ids by key."""

    ids: dict[int, int] = field(default_factory=dict)
    pauses: list[Pause] = field(default_factory=list)


@dataclass(slots=True)
class Injected:
    """A fault that was injected. `formula` bounds `recovery_seconds`; `failure` says what went wrong.

    `workers` are those that were registered as it began, of all masters: what registers later it has not hit.
    """

    fault: str
    target: str
    began_at: float
    ended_at: float = float("inf")
    formula: str | None = None
    recovery_seconds: float | None = None
    failure: str | None = None
    workers: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Alarm:
    """What a master logged that it may never have to log in a campaign."""

    master: str
    event: str
    what: str


@dataclass(frozen=True, slots=True)
class Stray:
    """A process that lived on without its parents ("orphan"), or stayed a zombie, for too long."""

    at: float
    pid: int
    title: str
    how: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at a moment at which its master was at rest: whole, with the processes of the sample before."""

    at: float
    role: str  # "master", "template" or "child"
    master: str
    pid: int
    files: tuple[str, ...]  # what is open, in words
    rss_bytes: int


@dataclass(slots=True, kw_only=True)
class Evidence:
    plan: Plan
    told: Enqueued
    runs: Sequence[Run] = ()
    changes: Sequence[Change] = ()
    effects: Sequence[Effect] = ()
    rows: Mapping[int, str] = field(default_factory=dict)  # job id -> state
    waiting: Mapping[int, str] = field(default_factory=dict)  # job id -> the table that holds it still
    injected: Sequence[Injected] = ()
    killed_pids: frozenset[int] = frozenset()  # children that faults killed
    masters_of_workers: Mapping[str, str] = field(default_factory=dict)  # worker id -> name of the master
    strays: Sequence[Stray] = ()
    samples: Sequence[Sample] = ()
    clock_offset: float = 0.0  # epoch minus monotonic
    cron_since: Mapping[str, float] = field(default_factory=dict)  # entry -> when it became known; epoch, as all here
    cron_rows: Mapping[tuple[str, float], int | None] = field(default_factory=dict)  # entry and slot -> job id
    cron_jobs: Sequence[tuple[str, float, int]] = ()  # entry and slot that a job says it is of, and its id
    left_processes: Sequence[str] = ()
    left_workers: Mapping[str, str] = field(default_factory=dict)  # worker id -> name, of rows still there at the end
    alarms: Sequence[Alarm] = ()
    exit_statuses: Mapping[str, int | None] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)  # faults that this machine does not allow, and why
    seconds: float = 0.0  # that it took, from the first start to the last check
    postgres_version: str = ""
