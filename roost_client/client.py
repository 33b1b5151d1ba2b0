"""Roost: every operation, for code that waits by blocking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from uuid import UUID

import psycopg
from psycopg.rows import tuple_row
from pydantic import BaseModel

from . import schema, statements
from .connections import Connections
from .explain import Explanation
from .fields import UNSET, shows_documented_defaults
from .registry import DEFAULT_HANDLERS, HandlerRegistry
from .statements import JobFilter, Statement
from .types import AddedCount, Job, JobInsert, JobOutcome, JobState, QueueInfo, RequeuedCount, WorkerInfo
from .waiting import Waiter, Waits

T = TypeVar("T")


class Roost:
    """Enqueues jobs and looks after them. May be shared by threads, and lives through a fork.

    Every operation takes `conn=`, a psycopg connection in any state but a failed transaction: the operation is then
    part of the caller's transaction. Without it the operation is committed on return, on a connection of the client's
    own, which it opens at the first need. Raises InvalidJobError for a bad argument before anything is sent,
    SchemaError when the database has no Roost schema or an old one, and what psycopg raises.
    """

    def __init__(self, dsn: str, *, registry: HandlerRegistry | None = None) -> None:
        self._connections = Connections(dsn)
        self._waits = Waits(dsn)
        self._registry = DEFAULT_HANDLERS if registry is None else registry

    def close(self) -> None:
        """Close the client's idle connections; it may still be used and then opens new ones.

        Whoever waits for a job through it gets a RoostError.
        """
        self._waits.close()
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def setup_schema(self, conn: psycopg.Connection[Any] | None = None) -> None:
        """Bring the schema up to date. Idempotent, and safe for many processes at once. Raises SchemaError."""
        if conn is not None:
            schema.apply_migrations(statements.usable(conn, psycopg.Connection, "set up the schema"))
            return
        with self._connections.borrow() as own:
            schema.apply_migrations(own)

    @shows_documented_defaults
    def enqueue(
        self,
        task: str | Callable[..., Any],
        *,
        args: dict[str, Any] | BaseModel | None = None,
        queue: str = UNSET,
        priority: int = UNSET,
        max_attempts: int = UNSET,
        scheduled_at: datetime | None = None,
        unique_key: str | None = None,
        tags: list[str] | None = UNSET,
        timeout_seconds: int | None = UNSET,
        depends_on: list[int] | None = None,
        metadata: dict[str, Any] | None = None,
        on_duplicate: Literal["raise", "return", "replace"] = "raise",
        conn: psycopg.Connection[Any] | None = None,
    ) -> int:
        """Add a job and return its id.

        `task` is a task's name or a function decorated with @job, whose defaults apply to each keyword not passed here.
        `args` is a JSON object of up to 1 MiB, or a pydantic model; `metadata` likewise, for what is no input of the
        handler, such as trace ids. The lower `priority` runs first. `scheduled_at` must be aware; without it the job
        is due at once. `timeout_seconds` counts from the handler's start.

        `unique_key`, of 1 to 512 characters, is that of one active job (available, executing or retryable) at a time;
        the enqueue waits for another transaction that is about to give it to a job. Where one has it, `on_duplicate`
        says to "raise" DuplicateUniqueJobError, which leaves the transaction as it was; to "return" that job's id; or
        to "replace" its args and scheduled_at and return its id, which raises when it is executing already.

        The job runs after all of `depends_on`, ids of jobs, have completed; when one is discarded or cancelled, it is
        cancelled, with the reason in its errors. Until the transaction ends, the end of these jobs is not written.
        Raises InvalidJobError for one that does not exist.
        """
        job = JobInsert(
            task,
            args,
            queue,
            priority,
            max_attempts,
            scheduled_at,
            unique_key,
            tags,
            timeout_seconds,
            depends_on,
            metadata,
        )
        return self._run(statements.enqueue(self._registry, job, on_duplicate), conn)

    def enqueue_many(self, jobs: Iterable[JobInsert], *, conn: psycopg.Connection[Any] | None = None) -> AddedCount:
        """Add jobs in their order, in one round trip and all or none, and return how many.

        A job is left out, and counted in `duplicates` of what is returned, whose unique_key an active job has, or an
        earlier one of the call; what depends on it depends on that job.
        """
        jobs = list(jobs)
        return self._run(statements.enqueue_many(self._registry, jobs), conn) if jobs else AddedCount(0)

    def wait_for(
        self,
        job_id: int,
        *,
        timeout: float | None = 30.0,
        poll_interval: float = 1.0,
        raise_on_failure: bool = True,
    ) -> JobOutcome:
        """Wait until a job has ended, and return its outcome.

        `timeout` is in seconds, None for ever; the job goes on when it is over. The end is told by the database as it
        happens; every `poll_interval` seconds the job is looked at besides. However many wait through one client, they
        share one connection and one query. The job must be committed: not to be used in the transaction that enqueues
        it. Raises JobFailed for a job that was discarded or cancelled, unless `raise_on_failure` is false;
        JobTimeoutError; JobNotFoundError for a job that isn't there, or not yet; RoostError when the client is closed
        meanwhile. A connection that is lost meanwhile is made again until the timeout.
        """
        news = threading.Event()
        waiter = Waiter(job_id, timeout, poll_interval, news.set)
        try:
            self._waits.join(waiter)
            while waiter.end is None:
                news.wait(self._waits.seconds_left(waiter))
                news.clear()
        finally:
            self._waits.leave(waiter)
        return waiter.outcome(raise_on_failure)

    def cancel(self, job_id: int, *, conn: psycopg.Connection[Any] | None = None) -> JobState:
        """Cancel a waiting job, ask for the cancel of a running one, and return the state it is in then.

        A running job stays `executing` until its handler has ended; a finished job keeps its state. Raises
        JobNotFoundError.
        """
        return self._run(statements.cancel(job_id), conn)

    def retry(
        self, job_id: int, *, with_dependents: bool = False, conn: psycopg.Connection[Any] | None = None
    ) -> JobState:
        """Make a waiting, discarded or cancelled job due now, and return the state it was in.

        A finished one starts again at its first attempt and keeps its errors; `with_dependents`, so do those that were
        cancelled for its sake, all the way down, but for one with another dead parent or whose key another job has.
        Raises JobNotFoundError; DuplicateUniqueJobError; and JobStateError for a job that is executing or completed,
        was cancelled for a parent's sake that is dead still, or is in the archive.
        """
        return self._run(statements.retry(job_id, with_dependents), conn)

    def get_job(self, job_id: int, *, conn: psycopg.Connection[Any] | None = None) -> Job:
        """Return a job, also one that is in the archive. Raises JobNotFoundError."""
        return self._run(statements.get_job(job_id), conn)

    def explain(
        self, job_id: int, *, stale_after: float = 300.0, conn: psycopg.Connection[Any] | None = None
    ) -> Explanation:
        """Say why a job isn't running: one code, a sentence, and the command that helps.

        For an id without a job too (code `unknown`). `stale_after` is the workers' `orphan_stale_after`: one that was
        not heard of for longer serves no queue. Cheap, however many jobs there are.
        """
        return self._run(statements.explain(job_id, stale_after), conn)

    def list_jobs(
        self,
        *,
        queue: str | None = None,
        task: str | None = None,
        state: str | Iterable[str] | None = None,
        tag: str | None = None,
        older_than: timedelta | None = None,
        newer_than: timedelta | None = None,
        error: str | None = None,
        archived: bool = False,
        before_id: int | None = None,
        limit: int = 50,
        conn: psycopg.Connection[Any] | None = None,
    ) -> list[Job]:
        """Return the newest jobs that match all filters, newest first.

        `state` is one or several; `tag` one of their tags. `older_than` and `newer_than` are ages of the enqueue
        (`inserted_at`), by the database's clock. `error` is a part of the newest error's text, in letters of either
        case. `archived`: those in the archive, which are left out otherwise. For the page after, pass the id of the
        last one as `before_id`. Where no index leads to what a filter leaves, such as a tag that nobody has, all
        jobs are read.
        """
        which = JobFilter(queue, task, tag, older_than, newer_than, error)
        return self._run(statements.list_jobs(which, state, archived, before_id, limit), conn)

    def status(self, *, conn: psycopg.Connection[Any] | None = None) -> dict[str, dict[str, int]]:
        """Count the jobs of each queue that has any by state, zeros included. Exact, so it reads all jobs."""
        return self._run(statements.status(), conn)

    def pause_queue(self, name: str, *, conn: psycopg.Connection[Any] | None = None) -> None:
        """Stop workers from starting jobs of a queue; those that run go on. Idempotent."""
        self._run(statements.set_paused(name, True), conn)

    def resume_queue(self, name: str, *, conn: psycopg.Connection[Any] | None = None) -> None:
        """Let workers start jobs of a queue again. Idempotent."""
        self._run(statements.set_paused(name, False), conn)

    def list_queues(self, *, conn: psycopg.Connection[Any] | None = None) -> list[QueueInfo]:
        """Return every queue that has an unfinished job or a worker, or was paused once, by name."""
        return self._run(statements.list_queues(), conn)

    def list_workers(self, *, conn: psycopg.Connection[Any] | None = None) -> list[WorkerInfo]:
        """Return the workers, the longest running first."""
        return self._run(statements.list_workers(), conn)

    def request_reload(
        self,
        *,
        worker_ids: Sequence[UUID | str] | None = None,
        hostname: str | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> UUID:
        """Ask workers to reload, all or those given, and return the id of the request.

        A worker answers in its metadata: {"reload": {"request": id, "ok": bool, "error": text, "generation": int}}.
        Raises RoostError when no worker matches.
        """
        return self._run(statements.request_reload(worker_ids, hostname), conn)

    def request_drain(
        self,
        *,
        worker_ids: Sequence[UUID | str] | None = None,
        hostname: str | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> list[UUID]:
        """Ask workers to end, all or those given, and return their ids.

        Each stops claiming, lets what it runs finish, however long that takes, and ends; its row is gone then. Raises
        RoostError when no worker matches.
        """
        return self._run(statements.request_drain(worker_ids, hostname), conn)

    def count_discarded(
        self,
        queue: str | None = None,
        task: str | None = None,
        *,
        tag: str | None = None,
        older_than: timedelta | None = None,
        newer_than: timedelta | None = None,
        error: str | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> int:
        """Count what requeue_discarded would look at."""
        which = JobFilter(queue, task, tag, older_than, newer_than, error)
        return self._run(statements.count_discarded(which), conn)

    def requeue_discarded(
        self,
        queue: str | None = None,
        task: str | None = None,
        limit: int | None = None,
        *,
        tag: str | None = None,
        older_than: timedelta | None = None,
        newer_than: timedelta | None = None,
        error: str | None = None,
        progress: Callable[[RequeuedCount], object] | None = None,
        conn: psycopg.Connection[Any] | None = None,
    ) -> RequeuedCount:
        """Let discarded jobs start again at their first attempt, their errors kept, and return how many.

        Those that match all filters, which are those of list_jobs; `limit` is how many at most. What can't be
        requeued is passed over, and counted in what is returned: see RequeuedCount.
        In batches, each committed by itself unless `conn` is given, so that no lock is held for long; a call that was
        interrupted has done what it did, and another goes on with the rest. `progress` is called after each batch with
        the counts so far.
        """
        requeue = statements.Requeue(JobFilter(queue, task, tag, older_than, newer_than, error), limit)
        while (batch := requeue.next()) is not None:
            if requeue.took(self._run(batch, conn)) and progress is not None:
                progress(requeue.done)
        return requeue.done

    def _run(self, statement: Statement[T], conn: psycopg.Connection[Any] | None) -> T:
        if conn is not None:
            return execute(statements.usable(conn, psycopg.Connection, statement.what), statement)
        with self._connections.borrow() as own:
            return execute(own, statement)


def execute(conn: psycopg.Connection[Any], statement: Statement[T]) -> T:
    # A cursor of our own choosing: the connection's factories may be any, also server-side cursors.
    cursor = psycopg.Cursor(conn, row_factory=tuple_row)
    try:
        cursor.execute(statement.sql, statement.parameters, prepare=statement.prepare)
        rows = cursor.fetchall()
    except (psycopg.Error, UnicodeEncodeError) as error:
        clearer = statements.explained(error, statement.what, conn)
        if clearer is None:
            raise
        raise clearer from error
    return statement.read(rows)
