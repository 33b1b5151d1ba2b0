"""AsyncRoost: every operation, for code that waits by await. The same statements as Roost's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar
from uuid import UUID

import psycopg
from psycopg.rows import tuple_row
from pydantic import BaseModel

from . import schema, statements
from .backoff import BackoffStrategy
from .connections import AsyncConnections
from .daemon import part_of_daemon
from .explain import Explanation
from .fields import UNSET, shows_documented_defaults
from .hooks import Hooks
from .registry import DEFAULT_HANDLERS, HandlerRegistry
from .statements import JobFilter, Statement
from .types import AddedCount, Job, JobInsert, JobOutcome, JobState, QueueInfo, RequeuedCount, WorkerInfo
from .waiting import Waiter, Waits

T = TypeVar("T")


class JobRunner(Protocol):
    """What AsyncRoost.worker() makes: a roostd.Worker, as far as this library knows of it."""

    async def run(self) -> None: ...
    async def run_once(self) -> int: ...
    def request_stop(self) -> None: ...


class AsyncRoost:
    """Roost on psycopg's AsyncConnection: the same operations, which mean, return and raise the same.

    May be used in several event loops, one after the other or each in its thread, and lives through a fork.
    """

    def __init__(self, dsn: str, *, registry: HandlerRegistry | None = None) -> None:
        self._dsn = dsn
        self._connections = AsyncConnections(dsn)
        self._waits = Waits(dsn)
        self._registry = DEFAULT_HANDLERS if registry is None else registry

    async def close(self) -> None:
        """As Roost.close."""
        self._waits.close()
        self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def setup_schema(self, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        """As Roost.setup_schema."""
        if conn is not None:
            await schema.apply_migrations_async(statements.usable(conn, psycopg.AsyncConnection, "set up the schema"))
            return
        async with self._connections.borrow() as own:
            await schema.apply_migrations_async(own)

    @shows_documented_defaults
    async def enqueue(
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
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> int:
        """As Roost.enqueue."""
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
        return await self._run(statements.enqueue(self._registry, job, on_duplicate), conn)

    async def enqueue_many(
        self, jobs: Iterable[JobInsert], *, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> AddedCount:
        """As Roost.enqueue_many."""
        jobs = list(jobs)
        return await self._run(statements.enqueue_many(self._registry, jobs), conn) if jobs else AddedCount(0)

    async def wait_for(
        self,
        job_id: int,
        *,
        timeout: float | None = 30.0,
        poll_interval: float = 1.0,
        raise_on_failure: bool = True,
    ) -> JobOutcome:
        """As Roost.wait_for."""
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:
                pass  # the loop was closed, and this task with it

        waiter = Waiter(job_id, timeout, poll_interval, wake)
        try:
            self._waits.join(waiter)
            while waiter.end is None:
                seconds = self._waits.seconds_left(waiter)
                try:
                    async with asyncio.timeout(seconds):
                        await news.wait()
                except TimeoutError:
                    continue  # unless that was all of them
                news.clear()
        finally:
            self._waits.leave(waiter)
        return waiter.outcome(raise_on_failure)

    async def cancel(self, job_id: int, *, conn: psycopg.AsyncConnection[Any] | None = None) -> JobState:
        """As Roost.cancel."""
        return await self._run(statements.cancel(job_id), conn)

    async def retry(
        self, job_id: int, *, with_dependents: bool = False, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> JobState:
        """As Roost.retry."""
        return await self._run(statements.retry(job_id, with_dependents), conn)

    async def get_job(self, job_id: int, *, conn: psycopg.AsyncConnection[Any] | None = None) -> Job:
        """As Roost.get_job."""
        return await self._run(statements.get_job(job_id), conn)

    async def explain(
        self, job_id: int, *, stale_after: float = 300.0, conn: psycopg.AsyncConnection[Any] | None = None
    ) -> Explanation:
        """As Roost.explain."""
        return await self._run(statements.explain(job_id, stale_after), conn)

    async def list_jobs(
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
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[Job]:
        """As Roost.list_jobs."""
        which = JobFilter(queue, task, tag, older_than, newer_than, error)
        return await self._run(statements.list_jobs(which, state, archived, before_id, limit), conn)

    async def status(self, *, conn: psycopg.AsyncConnection[Any] | None = None) -> dict[str, dict[str, int]]:
        """As Roost.status."""
        return await self._run(statements.status(), conn)

    async def pause_queue(self, name: str, *, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        """As Roost.pause_queue."""
        await self._run(statements.set_paused(name, True), conn)

    async def resume_queue(self, name: str, *, conn: psycopg.AsyncConnection[Any] | None = None) -> None:
        """As Roost.resume_queue."""
        await self._run(statements.set_paused(name, False), conn)

    async def list_queues(self, *, conn: psycopg.AsyncConnection[Any] | None = None) -> list[QueueInfo]:
        """As Roost.list_queues."""
        return await self._run(statements.list_queues(), conn)

    async def list_workers(self, *, conn: psycopg.AsyncConnection[Any] | None = None) -> list[WorkerInfo]:
        """As Roost.list_workers."""
        return await self._run(statements.list_workers(), conn)

    async def request_reload(
        self,
        *,
        worker_ids: Sequence[UUID | str] | None = None,
        hostname: str | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> UUID:
        """As Roost.request_reload."""
        return await self._run(statements.request_reload(worker_ids, hostname), conn)

    async def request_drain(
        self,
        *,
        worker_ids: Sequence[UUID | str] | None = None,
        hostname: str | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> list[UUID]:
        """As Roost.request_drain."""
        return await self._run(statements.request_drain(worker_ids, hostname), conn)

    async def count_discarded(
        self,
        queue: str | None = None,
        task: str | None = None,
        *,
        tag: str | None = None,
        older_than: timedelta | None = None,
        newer_than: timedelta | None = None,
        error: str | None = None,
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> int:
        """As Roost.count_discarded."""
        which = JobFilter(queue, task, tag, older_than, newer_than, error)
        return await self._run(statements.count_discarded(which), conn)

    async def requeue_discarded(
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
        conn: psycopg.AsyncConnection[Any] | None = None,
    ) -> RequeuedCount:
        """As Roost.requeue_discarded."""
        requeue = statements.Requeue(JobFilter(queue, task, tag, older_than, newer_than, error), limit)
        while (batch := requeue.next()) is not None:
            if requeue.took(await self._run(batch, conn)) and progress is not None:
                progress(requeue.done)
        return requeue.done

    def worker(
        self,
        *,
        queues: Iterable[str] = ("default",),
        concurrency: int = 4,
        prefetch: int | None = None,
        poll_interval: float = 1.0,
        retry_strategy: BackoffStrategy | None = None,
        run_cron: bool = True,
        heartbeat_interval: float = 15.0,
        orphan_reaper_interval: float = 30.0,
        orphan_stale_after: float = 300.0,
        shutdown_timeout: float = 30.0,
        listen_reconnect_delay: float = 1.0,
        error_cap: int = 20,
        archive_after_seconds: float | None = None,
        archive_interval: float = 60.0,
        result_ttl_seconds: float | None = None,
        startup_max_retries: int = 30,
        startup_retry_delay: float = 1.0,
        hooks: Hooks | None = None,
    ) -> JobRunner:
        """Make a roostd.Worker for the database and the handlers of this client; see there for what the options mean.

        Raises ValueError for an option that can't be used, RoostError where roostd isn't installed.
        """
        options = {name: value for name, value in locals().items() if name != "self"}
        worker: JobRunner = part_of_daemon("worker", "make a worker")(self._dsn, registry=self._registry, **options)
        return worker

    async def _run(self, statement: Statement[T], conn: psycopg.AsyncConnection[Any] | None) -> T:
        if conn is not None:
            return await execute(statements.usable(conn, psycopg.AsyncConnection, statement.what), statement)
        async with self._connections.borrow() as own:
            return await execute(own, statement)


async def execute(conn: psycopg.AsyncConnection[Any], statement: Statement[T]) -> T:
    # A cursor of our own choosing: the connection's factories may be any, also server-side cursors.
    cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
    try:
        await cursor.execute(statement.sql, statement.parameters, prepare=statement.prepare)
        rows = await cursor.fetchall()
    except (psycopg.Error, UnicodeEncodeError) as error:
        clearer = statements.explained(error, statement.what, conn)
        if clearer is None:
            raise
        raise clearer from error
    return statement.read(rows)
