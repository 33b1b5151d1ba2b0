"""Runs jobs in the process of a test and on its connection, in its transaction: what roost_client.testing calls.

All of it is the daemon's own: the run of a handler and what is reported of it (child/running.py), what a failure
becomes (core/outcome.py), the statements that write it (store/). What is left out is what takes processes: nothing is
called off, no timeout is enforced, no limit on memory, and a handler that ends its process ends the test.

One coroutine does it for both kinds of connection. On a blocking one nothing in it ever waits, so it needs no loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, cast
from uuid import uuid4

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from roost_client import (
    DEFAULT_HANDLERS,
    BackoffStrategy,
    HandlerRegistry,
    Hooks,
    Job,
    JobStateError,
    RoostError,
    exponential,
)
from roost_client import statements as of_clients
from roostd.child.invoke import Invoker
from roostd.child.running import Runs
from roostd.config import WorkerConfig
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Report, settle
from roostd.master.reports import report_of_frame
from roostd.master.writer import ROW_ERRORS, refused_result
from roostd.store import statements
from roostd.wire.frames import FrameKind
from roostd.wire.packets import JobPacket

Conn = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

_SAVEPOINT = "roost_testing"


def run(
    conn: Conn,
    *,
    job_id: int | None,
    queues: Sequence[str] | None,
    max_jobs: int | None,
    early: bool,
    registry: HandlerRegistry | None,
    hooks: Hooks | None,
    retry_strategy: BackoffStrategy | None,
) -> list[Job] | Awaitable[list[Job]]:
    """Runs the job named, or else those that are due, one after the other, each as it is then; an awaitable for an
    AsyncConnection."""
    bench = _Bench(conn, registry, hooks, retry_strategy)
    work = bench.run_one(job_id) if job_id is not None else bench.drain(queues, max_jobs, early)
    if isinstance(conn, psycopg.AsyncConnection):
        return work
    try:
        work.send(None)
    except StopIteration as stop:
        ran: list[Job] = stop.value
        return ran
    raise AssertionError("it waited for something on a connection that blocks")


class _Answer:
    """What store/statements.py asks of a cursor."""

    def __init__(self, description: Any, rows: list[Any]) -> None:
        self.description = description
        self._rows = rows

    async def fetchall(self) -> list[Any]:
        return self._rows


class _TestsConnection:
    """What store/statements.py asks of a connection, on the test's own, whatever its factories."""

    def __init__(self, conn: Conn) -> None:
        self._conn = conn

    async def execute(self, query: Any, parameters: Any = None, **_: Any) -> _Answer:
        if isinstance(self._conn, psycopg.AsyncConnection):
            waiting = psycopg.AsyncCursor(self._conn, row_factory=tuple_row)
            await waiting.execute(query, parameters)
            return _Answer(waiting.description, await waiting.fetchall() if waiting.description else [])
        blocking = psycopg.Cursor(self._conn, row_factory=tuple_row)
        blocking.execute(query, parameters)
        return _Answer(blocking.description, blocking.fetchall() if blocking.description else [])


class _Log:
    def event(self, level: str, name: str, **values: Any) -> None:
        error = values.pop("exc_info", None)
        told = " ".join([name, *(f"{key}={value}" for key, value in values.items())])
        logging.getLogger("roost.testing").log(logging.getLevelNamesMapping()[level.upper()], told, exc_info=error)


class _Bench:
    def __init__(
        self,
        conn: Conn,
        registry: HandlerRegistry | None,
        hooks: Hooks | None,
        retry_strategy: BackoffStrategy | None,
    ) -> None:
        what = "run jobs"
        if isinstance(conn, psycopg.AsyncConnection):
            of_clients.usable(conn, psycopg.AsyncConnection, what)
        else:
            of_clients.usable(conn, psycopg.Connection, what)
            if _has_running_loop():
                raise RoostError(
                    f"cannot {what} on a blocking connection in a coroutine: pass an AsyncConnection, and await"
                )
        if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
            raise RoostError(
                f"cannot {what} on a connection that commits each statement: do it in `with conn.transaction():`, or"
                " connect without autocommit"
            )
        self._conn = conn
        self._store = cast(psycopg.AsyncConnection, _TestsConnection(conn))
        self._settings = WorkerConfig()
        self._retry_delay = retry_strategy or exponential()
        self._worker_id = uuid4()  # has no row: were its claims committed, a worker would free them
        self._runs = Runs(Invoker(None, self._settings.max_result_bytes), registry or DEFAULT_HANDLERS, hooks, _Log())

    async def run_one(self, job_id: int) -> list[Job]:
        before = await self._read(job_id)
        await self._follow_parents()
        job = await statements.claim_one(self._store, self._worker_id, job_id=job_id, queues=None, early=True)
        if job is None:
            now = await self._read(job_id)
            why = "it waits for jobs on which it depends" if now.state == "available" else f"it is {now.state}"
            raise JobStateError(f"cannot run job {job_id}: {why}", before.state)
        return [await self._run(job)]

    async def drain(self, queues: Sequence[str] | None, max_jobs: int | None, early: bool) -> list[Job]:
        ran: list[Job] = []
        while max_jobs is None or len(ran) < max_jobs:
            await self._follow_parents()
            job = await statements.claim_one(self._store, self._worker_id, job_id=None, queues=queues, early=early)
            if job is None:
                break
            ran.append(await self._run(job))
        await self._follow_parents()
        return ran

    async def _follow_parents(self) -> None:
        while (await statements.follow_parents(self._store))[0]:
            pass

    async def _run(self, job: ClaimedJob) -> Job:
        labels = b"" if job.labels is None else job.labels.encode()
        args = job.args.encode()
        packet = JobPacket(
            job.id, job.lease, job.attempt, job.queue, job.task, args, job.timeout_seconds, labels, job.start_by
        )
        # What the handler's last statement may have left is an aborted transaction: the savepoint makes it usable.
        await self._store.execute(f"SAVEPOINT {_SAVEPOINT}")
        if isinstance(self._conn, psycopg.AsyncConnection):  # its loop is not the handler's, as under a worker
            kind, body = await asyncio.to_thread(self._runs.run, packet)
        else:
            kind, body = contextvars.copy_context().run(self._runs.run, packet)
        self._runs.end_copy()
        await self._close_savepoint(job)
        if kind is FrameKind.COMPLETED:
            await self._complete(job, body.decode() if body else None)
        elif kind is not FrameKind.COMMITTED:
            await self._settle(job, report_of_frame(kind, body))
        return await self._read(job.id)

    async def _close_savepoint(self, job: ClaimedJob) -> None:
        status = self._conn.info.transaction_status
        if status == TransactionStatus.INERROR:
            await self._store.execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
        elif status != TransactionStatus.INTRANS:
            raise RoostError(
                f"cannot go on after job {job.id}: its handler has ended the test's own transaction; let it use"
                " conn.transaction(), or a connection of its own"
            )
        await self._store.execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")

    async def _complete(self, job: ClaimedJob, result: str | None) -> None:
        await self._store.execute(f"SAVEPOINT {_SAVEPOINT}")
        try:
            await statements.complete(self._store, [job.id], [job.lease], [result])
        except ROW_ERRORS as error:
            await self._store.execute(f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            await self._settle(job, refused_result(error))
        await self._store.execute(f"RELEASE SAVEPOINT {_SAVEPOINT}")

    async def _settle(self, job: ClaimedJob, report: Report) -> None:
        settlement = settle(job, report, retry_delay=self._retry_delay, max_crashes=self._settings.max_crashes)
        await statements.settle(self._store, [settlement], self._settings.error_cap)

    async def _read(self, job_id: int) -> Job:
        statement = of_clients.get_job(job_id)
        cursor = await self._store.execute(statement.sql, statement.parameters)
        return statement.read(await cursor.fetchall())


def _has_running_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
