"""What a job looks like from outside: its row, its states, its outcome, and what an enqueue may say about it.

Only data. Knows neither the database nor the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Self
from uuid import UUID

from pydantic import AfterValidator, BaseModel, ConfigDict

from .fields import DOCUMENTED_DEFAULTS, MAX_INTEGER_DIGITS, UNSET, shows_documented_defaults


class JobState(StrEnum):
    """Every state a job can be in; the last three are terminal."""

    AVAILABLE = "available"
    EXECUTING = "executing"
    RETRYABLE = "retryable"
    COMPLETED = "completed"
    DISCARDED = "discarded"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (JobState.COMPLETED, JobState.DISCARDED, JobState.CANCELLED)


class Job(BaseModel):
    """A row of `roost.jobs`, read-only. `state` is a JobState; `attempt` is 0 before the first run; times are UTC."""

    model_config = ConfigDict(frozen=True)

    id: int
    queue: str
    task: str
    args: dict[str, Any]
    # Typed as text, so that type checkers let it be compared with text. Not the class itself as the validator: its
    # signature differs between versions of Python, and pydantic refuses the one of 3.13.
    state: Annotated[str, AfterValidator(lambda text: JobState(text))]
    priority: int
    attempt: int
    max_attempts: int
    scheduled_at: datetime
    attempted_at: datetime | None
    completed_at: datetime | None
    cancelled_at: datetime | None
    discarded_at: datetime | None
    errors: list[dict[str, Any]]
    unique_key: str | None
    inserted_at: datetime
    tags: list[str]
    timeout_seconds: int | None
    cancel_requested: bool
    result: Any | None
    depends_on: list[int]
    metadata: dict[str, Any]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Make a Job of a row of `roost.jobs`.

        args, errors, result and metadata are JSON text (select them ::text); times are datetimes or ISO text.
        JSON that Python cannot read, as SQL may have put there, becomes an object that says so. Columns that
        Job has no field for are ignored.
        """
        read = {**row, **{name: read_json(row[name]) for name in ("args", "errors", "result", "metadata")}}
        for name in _TIMES:
            if isinstance(read[name], str):
                read[name] = datetime.fromisoformat(read[name]).astimezone(UTC)
        return cls.model_validate(read)


_TIMES = ("scheduled_at", "attempted_at", "completed_at", "cancelled_at", "discarded_at", "inserted_at")


def read_json(text: str | None) -> Any:
    """What Python can make of JSON that the database holds; None for None."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:  # an integer of more digits than Python reads: kept as text
        return json.loads(text, parse_int=lambda digits: digits if len(digits) > MAX_INTEGER_DIGITS else int(digits))
    except RecursionError:
        return {"unreadable": "nested too deeply", "text": text[:1000]}


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """How an awaited job ended. `state` is a JobState, `result` None unless that is `completed`."""

    id: int
    state: str
    result: Any | None
    errors: list[dict[str, Any]]

    @classmethod
    def from_texts(cls, job_id: int, state: str, result: str | None, errors: str | None) -> Self:
        """Make one of JSON texts, as Job.from_row reads them."""
        return cls(job_id, state, read_json(result), read_json(errors) or [])


class AddedCount(int):
    """How many jobs an enqueue_many added; `duplicates` is how many it left out, whose unique_key an active job has."""

    duplicates: int

    def __new__(cls, added: int, duplicates: int = 0) -> Self:
        count = super().__new__(cls, added)
        count.duplicates = duplicates
        return count


class RequeuedCount(int):
    """How many jobs a requeue started again, and how many it passed over.

    `duplicates`: an active job has their unique_key, or one that was requeued before them; `dead_parents`: they depend
    on a job that was discarded or cancelled; `held`: another transaction has locked or changed them.
    """

    duplicates: int
    dead_parents: int
    held: int

    def __new__(cls, requeued: int, duplicates: int = 0, dead_parents: int = 0, held: int = 0) -> Self:
        count = super().__new__(cls, requeued)
        count.duplicates = duplicates
        count.dead_parents = dead_parents
        count.held = held
        return count

    @property
    def skipped(self) -> int:
        return self.duplicates + self.dead_parents + self.held

    def plus(self, other: RequeuedCount) -> RequeuedCount:
        return RequeuedCount(
            self + other,
            self.duplicates + other.duplicates,
            self.dead_parents + other.dead_parents,
            self.held + other.held,
        )


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """What `@job(...)` declares for a task.

    The first five are merged into enqueue calls that don't pass the keyword; the throttles hold for the
    workers.
    """

    queue: str | None = None
    priority: int | None = None
    max_attempts: int | None = None
    tags: tuple[str, ...] | None = None
    timeout_seconds: int | None = None
    rate_per_minute: int | None = None
    max_concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class CronEntry:
    """What `@cron(...)` declares: a job of `task` at each slot of `expression`, by the clock of a zone (None: UTC)."""

    name: str
    expression: str
    task: str
    args: dict[str, Any] = field(default_factory=dict)
    queue: str = "default"
    priority: int = 0
    max_attempts: int = 20
    timezone_name: str | None = None


@dataclass(frozen=True, slots=True)
class QueueInfo:
    """A queue: its jobs that may run now, that wait for a later time, that run, and that wait for other jobs."""

    name: str
    paused: bool
    available: int
    scheduled: int
    executing: int
    blocked: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker, which is a master with its children. `metadata["reload"]` is its answer to `reload_request`."""

    id: UUID
    name: str
    hostname: str
    pid: int
    queues: tuple[str, ...]
    concurrency: int
    inflight: int
    started_at: datetime
    last_seen_at: datetime
    reload_request: UUID | None
    metadata: dict[str, Any]


@dataclass(frozen=True, slots=True, init=False)
class JobInsert:
    """One job of an enqueue_many; the fields are the parameters of `enqueue` and mean the same.

    `depends_on` may also hold other JobInserts, which must come earlier in the same enqueue_many.
    `passed` holds the names of those fields that were passed and so win over the task's `@job` defaults. It
    is kept by dataclasses.replace().
    """

    task: str | Callable[..., Any]
    args: dict[str, Any] | BaseModel | None
    queue: str
    priority: int
    max_attempts: int
    scheduled_at: datetime | None
    unique_key: str | None
    tags: list[str] | None
    timeout_seconds: int | None
    depends_on: Sequence[int | JobInsert] | None
    metadata: dict[str, Any] | None
    passed: frozenset[str] = field(repr=False, compare=False)

    @shows_documented_defaults
    def __init__(
        self,
        task: str | Callable[..., Any],
        args: dict[str, Any] | BaseModel | None = None,
        queue: str = UNSET,
        priority: int = UNSET,
        max_attempts: int = UNSET,
        scheduled_at: datetime | None = None,
        unique_key: str | None = None,
        tags: list[str] | None = UNSET,
        timeout_seconds: int | None = UNSET,
        depends_on: Sequence[int | JobInsert] | None = None,
        metadata: dict[str, Any] | None = None,
        *,
        passed: frozenset[str] | None = None,
    ) -> None:
        put = object.__setattr__
        won = set() if passed is None else set(passed)
        for name, value in (
            ("queue", queue),
            ("priority", priority),
            ("max_attempts", max_attempts),
            ("tags", tags),
            ("timeout_seconds", timeout_seconds),
        ):
            default = DOCUMENTED_DEFAULTS[name]
            if value is UNSET:
                value = default
            # dataclasses.replace() passes every field again: then only a changed one is the caller's own.
            elif passed is None or value != default:
                won.add(name)
            put(self, name, value)
        put(self, "task", task)
        put(self, "args", args)
        put(self, "scheduled_at", scheduled_at)
        put(self, "unique_key", unique_key)
        put(self, "depends_on", depends_on)
        put(self, "metadata", metadata)
        put(self, "passed", frozenset(won) if won else _NOTHING)


_NOTHING: frozenset[str] = frozenset()
