"""What an application's tests do with jobs: see what was enqueued, and run it here and now.

All of it happens on the test's own connection and in its transaction, so that a rollback undoes it, and no worker ever
sees it. On an AsyncConnection each function returns an awaitable. Never imports roostd: what runs jobs is found as an
entry point of its distribution.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeAlias, TypeVar, overload

import psycopg
from pydantic import BaseModel

from . import aclient, client, fields, statements
from .arguments import object_text
from .backoff import BackoffStrategy
from .daemon import part_of_daemon
from .fields import Refused
from .hooks import Hooks
from .registry import DEFAULT_HANDLERS, HandlerRegistry
from .statements import Statement
from .types import Job

Task: TypeAlias = str | Callable[..., Any]
Args: TypeAlias = dict[str, Any] | BaseModel
Span: TypeAlias = datetime | tuple[datetime, datetime]
Sync: TypeAlias = psycopg.Connection[Any]
Async: TypeAlias = psycopg.AsyncConnection[Any]

T = TypeVar("T")

_SHOWN = 10  # jobs in the message of a failure
_NEAR = 200  # the newest jobs that it chooses them from
_MOST = 100_000  # jobs of one task that are looked through
_A_SECOND = timedelta(seconds=1)


# -- what was enqueued


@overload
def assert_enqueued(
    conn: Sync,
    *,
    task: Task | None = None,
    args: Args | None = None,
    queue: str | None = None,
    tags: Iterable[str] | None = None,
    scheduled_at: Span | None = None,
    count: int | None = None,
    registry: HandlerRegistry | None = None,
) -> list[Job]: ...
@overload
def assert_enqueued(
    conn: Async,
    *,
    task: Task | None = None,
    args: Args | None = None,
    queue: str | None = None,
    tags: Iterable[str] | None = None,
    scheduled_at: Span | None = None,
    count: int | None = None,
    registry: HandlerRegistry | None = None,
) -> Awaitable[list[Job]]: ...
def assert_enqueued(
    conn: Sync | Async,
    *,
    task: Task | None = None,
    args: Args | None = None,
    queue: str | None = None,
    tags: Iterable[str] | None = None,
    scheduled_at: Span | None = None,
    count: int | None = None,
    registry: HandlerRegistry | None = None,
) -> list[Job] | Awaitable[list[Job]]:
    """Return the jobs that have yet to run and are like this, in order of id; AssertionError if there are none.

    `args` and `tags` are those that a job must have, besides others. `scheduled_at` is when it is due, to the second,
    or the earliest and the latest time. With `count` there must be as many such jobs. The error tells which jobs there
    are, the nearest first, and in what they differ.
    """
    __tracebackhide__ = True
    wanted = _Wanted.of(task, args, queue, tags, scheduled_at, registry)
    if count is not None:
        try:
            fields.integer("count", count, least=0)
        except Refused as refused:
            raise refused.as_invalid_job("look for jobs") from None
    found: list[Job] | Awaitable[list[Job]] = _run(conn, _check(wanted, count))
    return found


@overload
def assert_not_enqueued(
    conn: Sync,
    *,
    task: Task | None = None,
    args: Args | None = None,
    queue: str | None = None,
    tags: Iterable[str] | None = None,
    scheduled_at: Span | None = None,
    registry: HandlerRegistry | None = None,
) -> None: ...
@overload
def assert_not_enqueued(
    conn: Async,
    *,
    task: Task | None = None,
    args: Args | None = None,
    queue: str | None = None,
    tags: Iterable[str] | None = None,
    scheduled_at: Span | None = None,
    registry: HandlerRegistry | None = None,
) -> Awaitable[None]: ...
def assert_not_enqueued(
    conn: Sync | Async,
    *,
    task: Task | None = None,
    args: Args | None = None,
    queue: str | None = None,
    tags: Iterable[str] | None = None,
    scheduled_at: Span | None = None,
    registry: HandlerRegistry | None = None,
) -> Awaitable[None] | None:
    """AssertionError, which tells them, if there are jobs that assert_enqueued would return."""
    __tracebackhide__ = True
    wanted = _Wanted.of(task, args, queue, tags, scheduled_at, registry)
    nothing: Awaitable[None] | None = _run(conn, _check_none(wanted))
    return nothing


class _ClientOn(client.Roost):
    def __init__(self, conn: Sync, dsn: str, registry: HandlerRegistry | None) -> None:
        super().__init__(dsn, registry=registry)
        self._conn = conn

    def _run(self, statement: Statement[T], conn: Sync | None) -> T:
        return super()._run(statement, self._conn if conn is None else conn)


def client_on(conn: Sync, dsn: str = "", *, registry: HandlerRegistry | None = None) -> client.Roost:
    """Return a Roost whose operations are part of the transaction of `conn`, where they are not passed another.

    For code that is given its client. What wait_for waits for by a connection of its own, to `dsn`, has to be
    committed: drain() is what a test wants instead.
    """
    return _ClientOn(conn, dsn, registry)


# -- running it


@overload
def run_job(
    conn: Sync,
    job_id: int,
    *,
    registry: HandlerRegistry | None = None,
    hooks: Hooks | None = None,
    retry_strategy: BackoffStrategy | None = None,
) -> Job: ...
@overload
def run_job(
    conn: Async,
    job_id: int,
    *,
    registry: HandlerRegistry | None = None,
    hooks: Hooks | None = None,
    retry_strategy: BackoffStrategy | None = None,
) -> Awaitable[Job]: ...
def run_job(
    conn: Sync | Async,
    job_id: int,
    *,
    registry: HandlerRegistry | None = None,
    hooks: Hooks | None = None,
    retry_strategy: BackoffStrategy | None = None,
) -> Job | Awaitable[Job]:
    """Run a waiting job once, also one that is due later or in a paused queue; return it as the run has left it.

    What a worker would write is written: the state, the result, the error of a failure, which is not raised here, and
    when it is to run again. The handler runs in this process and thread (for an AsyncConnection in another thread, with
    an event loop of its own), with current_job(). No timeout is enforced, nor any limit of its task's.

    Raises JobNotFoundError, and JobStateError for a job that has ended or waits for others.
    """
    statements.get_job(job_id)  # refuses what can't be an id
    _check_runners(registry, hooks, retry_strategy)
    ran = _runner()(
        conn,
        job_id=job_id,
        queues=None,
        max_jobs=1,
        early=True,
        registry=registry,
        hooks=hooks,
        retry_strategy=retry_strategy,
    )
    if not isinstance(ran, list):
        return _first(ran)
    job: Job = ran[0]
    return job


@overload
def drain(
    conn: Sync,
    *,
    queue: str | Iterable[str] | None = None,
    max_jobs: int | None = None,
    with_scheduled: bool = False,
    registry: HandlerRegistry | None = None,
    hooks: Hooks | None = None,
    retry_strategy: BackoffStrategy | None = None,
) -> list[Job]: ...
@overload
def drain(
    conn: Async,
    *,
    queue: str | Iterable[str] | None = None,
    max_jobs: int | None = None,
    with_scheduled: bool = False,
    registry: HandlerRegistry | None = None,
    hooks: Hooks | None = None,
    retry_strategy: BackoffStrategy | None = None,
) -> Awaitable[list[Job]]: ...
def drain(
    conn: Sync | Async,
    *,
    queue: str | Iterable[str] | None = None,
    max_jobs: int | None = None,
    with_scheduled: bool = False,
    registry: HandlerRegistry | None = None,
    hooks: Hooks | None = None,
    retry_strategy: BackoffStrategy | None = None,
) -> list[Job] | Awaitable[list[Job]]:
    """Run jobs as run_job does, in a worker's order, until none is due; return each run's job as the run has left it.

    Of `queue`, one or several, or of all; none of a paused queue. Jobs that these enqueue run too, and those that
    depend on them. Time stands still in a transaction: with `with_scheduled`, what is due later runs when nothing else
    is left, retries included; a job that always snoozes then runs until `max_jobs`.
    """
    _check_runners(registry, hooks, retry_strategy)
    try:
        queues = None if queue is None else [queue] if isinstance(queue, str) else _listed("queue", queue)
        for each in queues or ():
            fields.name("queue", each)
        if max_jobs is not None:
            fields.integer("max_jobs", max_jobs, least=0)
    except Refused as refused:
        raise refused.as_invalid_job("run jobs") from None
    ran: list[Job] | Awaitable[list[Job]] = _runner()(
        conn,
        job_id=None,
        queues=queues,
        max_jobs=max_jobs,
        early=bool(with_scheduled),
        registry=registry,
        hooks=hooks,
        retry_strategy=retry_strategy,
    )
    return ran


def _check_runners(
    registry: HandlerRegistry | None, hooks: Hooks | None, retry_strategy: BackoffStrategy | None
) -> None:
    try:
        if registry is not None and not isinstance(registry, HandlerRegistry):
            raise Refused("registry", f"must be a HandlerRegistry, not {fields.shown(registry)}")
        if hooks is not None and not isinstance(hooks, Hooks):
            raise Refused("hooks", f"must be a Hooks, not {fields.shown(hooks)}")
        if retry_strategy is not None and not callable(retry_strategy):
            raise Refused("retry_strategy", f"must be a function of the attempt, not {fields.shown(retry_strategy)}")
    except Refused as refused:
        raise refused.as_invalid_job("run jobs") from None


def _listed(path: str, value: object) -> list[Any]:
    if not isinstance(value, Iterable):
        raise Refused(path, f"must be a list of strings, not {fields.shown(value)}")
    return list(value)


def _runner() -> Callable[..., Any]:
    return part_of_daemon("run_in_test", "run jobs here")


async def _first(ran: Awaitable[list[Job]]) -> Job:
    return (await ran)[0]


# -- looking


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a job must be like; None: any."""

    task: str | None
    args: dict[str, Any] | None
    queue: str | None
    tags: frozenset[str]
    due: tuple[datetime, datetime] | None
    shown: str

    @classmethod
    def of(
        cls,
        task: Task | None,
        args: Args | None,
        queue: str | None,
        tags: Iterable[str] | None,
        scheduled_at: Span | None,
        registry: HandlerRegistry | None,
    ) -> _Wanted:
        try:
            name = None if task is None else statements.task_name(registry or DEFAULT_HANDLERS, task)
            # As the database has it: a pydantic model as its JSON, tuples as lists.
            given = None if args is None else json.loads(object_text("args", args))
            labels = (
                () if tags is None else fields.tags("tags", tags if isinstance(tags, str) else _listed("tags", tags))
            )
            if queue is not None:
                fields.name("queue", queue)
            due = _span(scheduled_at)
        except Refused as refused:
            raise refused.as_invalid_job("look for jobs") from None
        wishes = {"task": name, "queue": queue, "args": given, "tags": labels or None, "scheduled_at": scheduled_at}
        shown = ", ".join(f"{key}={value!r}" for key, value in wishes.items() if value is not None) or "any"
        return cls(name, given, queue, frozenset(labels), due, shown)

    def differences(self, job: Job) -> list[str]:
        """In what a job is not like this."""
        found = []
        if self.task not in (None, job.task):
            found.append("task")
        if self.queue not in (None, job.queue):
            found.append("queue")
        for key, value in (self.args or {}).items():
            if key not in job.args or job.args[key] != value:
                found.append(f"args.{key}")
        found += [f"tag {tag}" for tag in sorted(self.tags - set(job.tags))]
        if self.due is not None and not self.due[0] <= job.scheduled_at <= self.due[1]:
            found.append("scheduled_at")
        return found


def _span(scheduled_at: Span | None) -> tuple[datetime, datetime] | None:
    if scheduled_at is None:
        return None
    if isinstance(scheduled_at, datetime):
        fields.time("scheduled_at", scheduled_at)
        return scheduled_at - _A_SECOND, scheduled_at + _A_SECOND
    if not isinstance(scheduled_at, (tuple, list)) or len(scheduled_at) != 2:
        raise Refused("scheduled_at", "must be a datetime, or the earliest and the latest")
    earliest, latest = scheduled_at
    for each in (earliest, latest):
        fields.time("scheduled_at", each)
    return earliest, latest


_Search: TypeAlias = Generator[Statement[list[Job]], list[Job], T]


def _find(wanted: _Wanted) -> _Search[list[Job]]:
    jobs = yield statements.waiting_jobs(wanted.task, _MOST)
    return [job for job in reversed(jobs) if not wanted.differences(job)]


def _check(wanted: _Wanted, count: int | None) -> _Search[list[Job]]:
    __tracebackhide__ = True
    found = yield from _find(wanted)
    if found if count is None else len(found) == count:
        return found
    if count is None or not found:
        said = f"no job is enqueued with {wanted.shown}"
    else:
        said = f"{len(found)} jobs are enqueued with {wanted.shown}, not {count}"
    others = yield statements.waiting_jobs(None, _NEAR)
    raise AssertionError("\n".join([f"{said}; {_intro(others)}", *_lines(wanted, others)]))


def _check_none(wanted: _Wanted) -> _Search[None]:
    __tracebackhide__ = True
    found = yield from _find(wanted)
    if found:
        raise AssertionError("\n".join([f"enqueued with {wanted.shown}:", *_lines(wanted, found)]))


def _intro(jobs: list[Job]) -> str:
    return "those that are, the nearest first:" if jobs else "there are none at all"


def _lines(wanted: _Wanted, jobs: list[Job]) -> list[str]:
    nearest = sorted(((wanted.differences(job), job) for job in jobs), key=lambda each: (len(each[0]), -each[1].id))
    lines = []
    for differences, job in nearest[:_SHOWN]:
        told = f"  job {job.id}: {job.task!r} in queue {job.queue!r}, args {job.args!r}"
        told += f", tags {job.tags!r}" if job.tags else ""
        told += f", scheduled at {job.scheduled_at.isoformat()}" if job.scheduled_at != job.inserted_at else ""
        lines.append(told + (f": differs in {', '.join(differences)}" if differences else ""))
    return lines + ([f"  and {len(jobs) - _SHOWN} more"] if len(jobs) > _SHOWN else [])


def _run(conn: Sync | Async, search: _Search[T]) -> Any:
    __tracebackhide__ = True
    if isinstance(conn, psycopg.AsyncConnection):
        return _run_async(statements.usable(conn, psycopg.AsyncConnection, "look for jobs"), search)
    conn = statements.usable(conn, psycopg.Connection, "look for jobs")
    try:
        statement = next(search)
        while True:
            statement = search.send(client.execute(conn, statement))
    except StopIteration as stop:
        return stop.value


async def _run_async(conn: Async, search: _Search[T]) -> Any:
    __tracebackhide__ = True
    try:
        statement = next(search)
        while True:
            statement = search.send(await aclient.execute(conn, statement))
    except StopIteration as stop:
        return stop.value
