"""The job that runs here, as its handler sees it, and the transaction in which a handler completes it.

Knows the process that runs the job as a `Runner` alone; that says by `set_current` what is current. Never imports
roostd.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import MutableMapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, LiteralString, Protocol, Self, overload

import psycopg
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from .errors import LeaseLostError, RoostError
from .results import encode_result
from .statements import explained, usable
from .types import read_json

_COMPLETE: LiteralString = "SELECT roost.complete(%s::bigint, %s::bigint, %s::jsonb)"
_logger = logging.getLogger("roost.job")


class Completion(enum.Enum):
    """What is known of a completion in the handler's own transaction."""

    OPEN = "open"  # there was none, or it was rolled back
    UNSURE = "unsure"  # its block ended well, but the commit is still to come, or its answer was lost
    COMMITTED = "committed"


class Runner(Protocol):
    """What the job asks of the process that runs it."""

    max_result_bytes: int

    def cancel_requested(self, lease: int) -> bool: ...

    def hold(self, lease: int) -> None:
        """From here on the job is not called off, until as many calls of let_go."""

    def let_go(self, lease: int) -> None:
        """May raise in the handler what was held back."""


class CurrentJob:
    """The job that runs: `id, attempt, lease, queue, task`.

    `deadline` is when its time is up, on the clock of time.monotonic() (and so of an event loop), None without
    timeout_seconds: `deadline - time.monotonic()` seconds are left, whatever becomes of the wall clock meanwhile. It
    counts from where this process took the job up, before `before_job`; what its worker measures may be some
    milliseconds off. `completion` is what is known of a transaction() of the job's.
    """

    __slots__ = (
        "_labels",
        "_labels_text",
        "_runner",
        "attempt",
        "completion",
        "deadline",
        "id",
        "lease",
        "queue",
        "task",
    )

    def __init__(
        self,
        runner: Runner,
        id: int,
        attempt: int,
        lease: int,
        queue: str,
        task: str,
        labels: bytes = b"",
        deadline: float | None = None,
    ) -> None:
        """`labels` is JSON: {"tags": [...] or null, "metadata": {...} or null}; empty for a job without either."""
        # One is made for every job that runs: what takes longer than to keep a value is done where it is asked for.
        self.id = id
        self.attempt = attempt
        self.lease = lease
        self.queue = queue
        self.task = task
        self.deadline = deadline
        self.completion = Completion.OPEN
        self._runner = runner
        self._labels_text = labels
        self._labels: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<job {self.id} {self.task!r}, attempt {self.attempt}>"

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self._read_labels().get("tags") or ())

    @property
    def metadata(self) -> dict[str, Any]:
        """What was enqueued with the job and is no argument, such as trace ids."""
        metadata: dict[str, Any] = self._read_labels().get("metadata") or {}
        return metadata

    def _read_labels(self) -> dict[str, Any]:
        if self._labels is None:
            self._labels = read_json(self._labels_text.decode()) if self._labels_text else {}
        return self._labels

    @property
    def cancel_requested(self) -> bool:
        """Whether a cancel of this run has reached its process, also where the handler has yet to see the exception."""
        return self._runner.cancel_requested(self.lease)

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines bear job_id, attempt, lease, queue and task; under roostd they go to its own log."""
        bound = {name: getattr(self, name) for name in ("attempt", "lease", "queue", "task")}
        return _JobLog(_logger, {"job_id": self.id, **bound})

    @overload
    def transaction(self, conn: psycopg.Connection[Any]) -> JobTransaction: ...
    @overload
    def transaction(self, conn: psycopg.AsyncConnection[Any]) -> AsyncJobTransaction: ...
    def transaction(
        self, conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]
    ) -> JobTransaction | AsyncJobTransaction:
        """A block on `conn` whose writes are committed together with the job's completion, or not at all.

        `with` for a Connection, `async with` for an AsyncConnection, to the database that the job is in. The job
        completes as the last statement of the block, with what was assigned to `result` of the block's target (what the
        handler returns is not kept then), and only if this run still holds the job: otherwise the block is rolled back
        and raises LeaseLostError. An exception in the block rolls it back, and the job is as if the block had not been.
        In a transaction that is open already the block is a savepoint: the job completes when that transaction commits.

        Raises RoostError when the job is completed already; BadResult (a ValueError), at the block's end, for a result
        that can't be kept.
        """
        if isinstance(conn, psycopg.AsyncConnection):
            return AsyncJobTransaction(self, conn)
        return JobTransaction(self, conn)


class _JobLog(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class _Block:
    """What the two kinds of block have in common: all but the waiting."""

    def __init__(self, job: CurrentJob) -> None:
        self.result: Any = None
        self._job = job
        self._what = f"complete job {job.id} in a transaction"

    def _refuse_second(self) -> None:
        if self._job.completion is Completion.COMMITTED:
            raise RoostError(f"cannot {self._what}: it has been completed in an earlier one")

    def _parameters(self) -> tuple[str, str, str | None]:
        job = self._job
        # Only the text of null is spared: it is what a job without a result has.
        result = None if self.result is None else encode_result(self.result, job._runner.max_result_bytes).decode()
        return str(job.id), str(job.lease), result

    def _check(self, row: tuple[Any, ...] | None) -> None:
        if row is None or not row[0]:
            raise LeaseLostError(
                f"cannot {self._what}: its lease {self._job.lease} is no longer that of a claim; the job was taken from"
                " its worker, or has ended, maybe by another block of this transaction, or conn leads to another"
                " database; what the block has written is rolled back"
            )

    def _committing(self) -> None:
        """From the COMMIT on it is for the database to say, whatever this process learns of it."""
        self._job.completion = Completion.UNSURE

    def _answered(self, conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], *, committed: bool) -> None:
        """Takes in the answer to the COMMIT: with the connection idle again, one that can be relied upon."""
        if conn.pgconn.transaction_status == TransactionStatus.IDLE:
            self._job.completion = Completion.COMMITTED if committed else Completion.OPEN


class JobTransaction(_Block):
    """What CurrentJob.transaction() makes for a Connection."""

    def __init__(self, job: CurrentJob, conn: psycopg.Connection[Any]) -> None:
        super().__init__(job)
        self._conn = conn

    def __enter__(self) -> Self:
        self._refuse_second()
        self._block = usable(self._conn, psycopg.Connection, self._what).transaction()
        self._block.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        # A call-off raised between the job's completion and the answer to the COMMIT would leave both unknown.
        self._job._runner.hold(self._job.lease)
        try:
            if error is None:
                return self._commit()
            return self._roll_back(error)
        finally:
            self._job._runner.let_go(self._job.lease)

    def _commit(self) -> bool | None:
        try:
            self._complete()
        except BaseException as failure:
            self._roll_back(failure)
            raise
        self._committing()
        try:
            swallowed = self._block.__exit__(None, None, None)
        except psycopg.Error:
            self._answered(self._conn, committed=False)
            raise
        self._answered(self._conn, committed=True)
        return swallowed

    def _complete(self) -> None:
        try:
            cursor = psycopg.Cursor(self._conn, row_factory=tuple_row)
            self._check(cursor.execute(_COMPLETE, self._parameters()).fetchone())
        except (psycopg.Error, UnicodeEncodeError) as error:
            if (clearer := explained(error, self._what, self._conn)) is not None:
                raise clearer from error
            raise

    def _roll_back(self, error: BaseException) -> bool | None:
        pgconn = self._conn.pgconn
        if pgconn.transaction_status == TransactionStatus.ACTIVE and pgconn.pipeline_status == PipelineStatus.OFF:
            # A statement was cut short by a signal's exception. The connection takes no other now, not even a rollback,
            # and its transaction would keep its locks for as long as it is open.
            self._conn.close()
        return self._block.__exit__(type(error), error, error.__traceback__)


class AsyncJobTransaction(_Block):
    """What CurrentJob.transaction() makes for an AsyncConnection."""

    def __init__(self, job: CurrentJob, conn: psycopg.AsyncConnection[Any]) -> None:
        super().__init__(job)
        self._conn = conn

    async def __aenter__(self) -> Self:
        self._refuse_second()
        self._block = usable(self._conn, psycopg.AsyncConnection, self._what).transaction()
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._job._runner.hold(self._job.lease)
        try:
            if error is None:
                return await self._commit()
            return await self._block.__aexit__(kind, error, trace)
        finally:
            self._job._runner.let_go(self._job.lease)

    async def _commit(self) -> bool | None:
        try:
            await self._complete()
        except BaseException as failure:
            await self._block.__aexit__(type(failure), failure, failure.__traceback__)
            raise
        self._committing()
        try:
            swallowed = await self._block.__aexit__(None, None, None)
        except psycopg.Error:
            self._answered(self._conn, committed=False)
            raise
        self._answered(self._conn, committed=True)
        return swallowed

    async def _complete(self) -> None:
        try:
            cursor = psycopg.AsyncCursor(self._conn, row_factory=tuple_row)
            await cursor.execute(_COMPLETE, self._parameters())
            self._check(await cursor.fetchone())
        except (psycopg.Error, UnicodeEncodeError) as error:
            if (clearer := explained(error, self._what, self._conn)) is not None:
                raise clearer from error
            raise


# The frames of these in which no call-off may be raised, whatever they have called or are about to: between the
# block's end and `hold`, or `let_go` and the handler.
UNINTERRUPTED = (JobTransaction.__exit__,)

_current: ContextVar[CurrentJob | None] = ContextVar("roost_current_job", default=None)


def current_job() -> CurrentJob:
    """Return the job that runs, in its handler and all that calls or awaits: helpers, tasks, asyncio.to_thread().

    A thread that the handler starts by itself has no current job: hand it the object. Raises RoostError outside a job.
    """
    job = _current.get()
    if job is None:
        raise RoostError(
            "cannot return the current job: no job runs here; call current_job() in a handler, and hand the object to"
            " the threads that it starts"
        )
    return job


# What runs jobs says so here, before and after each; a function, because a child calls it for every job.
set_current = _current.set
