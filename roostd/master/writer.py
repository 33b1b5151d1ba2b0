"""Writes outcomes in batches, keeps them while the database is away, and finds the one bad row that spoils a batch.

An outcome leaves this list only when the database has acknowledged it. Repeating a batch whose answer was lost is
harmless: every row is guarded by its lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import psycopg
import structlog

from roost_client import JobState
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Ending, Report, Settlement, error_entry
from roostd.master.database import DatabaseGone, Link
from roostd.store import statements

MAX_BATCH = 500
# What a row may be to blame for: a value, a constraint, a limit. Not the schema and not privileges: those are kept for.
_ROW_ERRORS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Completion:
    """A row of store/sql/complete.sql; `result` is JSON text."""

    job: ClaimedJob
    result: str | None


class Writer:
    def __init__(
        self,
        link: Link,
        *,
        error_cap: Callable[[], int],
        retry_seconds: float,
        decide: Callable[[ClaimedJob, Report], Settlement],
        on_settled: Callable[[Settlement, JobState], None],
    ) -> None:
        self.written = 0
        self._link = link
        self._error_cap = error_cap
        self._retry_seconds = retry_seconds
        self._decide = decide
        self._on_settled = on_settled
        self._completions: list[Completion] = []
        self._settlements: list[Settlement] = []
        self._due_at: float | None = None
        self._repeating = False
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._loop = asyncio.get_running_loop()

    @property
    def pending(self) -> int:
        return len(self._completions) + len(self._settlements)

    def pending_leases(self) -> set[int]:
        return {c.job.lease for c in self._completions} | {s.lease for s in self._settlements}

    def complete(self, job: ClaimedJob, result: str | None) -> None:
        self._completions.append(Completion(job, result))

    def settle(self, settlement: Settlement) -> None:
        self._settlements.append(settlement)

    def flush_within(self, seconds: float) -> None:
        """Has what is here written at the latest after `seconds`; earlier when the batch is full."""
        if not self.pending:
            return
        self._empty.clear()
        due_at = self._loop.time() + (seconds if self.pending < MAX_BATCH else 0)
        if self._due_at is None or due_at < self._due_at:
            self._due_at = due_at
            self._wake.set()

    async def wait_empty(self) -> None:
        """Returns when everything handed over so far has been written."""
        self.flush_within(0)
        await self._empty.wait()

    async def run(self) -> None:
        while True:
            await self._wait_due()
            try:
                while self._completions or self._settlements:
                    await self._write_completions(self._completions[:MAX_BATCH])
                    await self._write_settlements(self._settlements[:MAX_BATCH])
                    if self.pending < MAX_BATCH:
                        break
            except (DatabaseGone, psycopg.Error) as error:
                _log.warning("outcomes.kept", pending=self.pending, error=str(error))
                self._repeating = True
                await asyncio.sleep(self._retry_seconds)
                self.flush_within(0)
            if self.pending:
                self.flush_within(0.005)
            else:
                self._empty.set()

    async def _wait_due(self) -> None:
        while self._due_at is None or self._due_at > self._loop.time():
            self._wake.clear()
            timeout = None if self._due_at is None else self._due_at - self._loop.time()
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                break
        self._due_at = None

    async def _write_completions(self, batch: Sequence[Completion]) -> None:
        if not batch:
            return
        jobs = [completion.job for completion in batch]
        try:
            ours = await self._link.run(
                lambda conn: statements.complete(
                    conn, [job.id for job in jobs], [job.lease for job in jobs], [c.result for c in batch]
                )
            )
        except _ROW_ERRORS as error:
            if len(batch) > 1:
                half = len(batch) // 2
                await self._write_completions(batch[:half])
                await self._write_completions(batch[half:])
                return
            text = f"{type(error).__name__}: the database refused the result: {error}".replace("\x00", "")
            self._settlements.append(self._decide(jobs[0], Report(Ending.FAILED, text)))
            del self._completions[:1]
            return
        del self._completions[: len(batch)]
        self.written += len(ours)
        repeated, self._repeating = self._repeating, False
        if len(ours) < len(batch) and not repeated:  # a repeated one may have been written the first time
            self._report_lost([job for job in jobs if job.lease not in ours])

    async def _write_settlements(self, batch: Sequence[Settlement]) -> None:
        if not batch:
            return
        try:
            ours = await self._link.run(lambda conn: statements.settle(conn, batch, self._error_cap()))
        except _ROW_ERRORS as error:
            if len(batch) > 1:
                half = len(batch) // 2
                await self._write_settlements(batch[:half])
                await self._write_settlements(batch[half:])
                return
            _log.error("outcome.refused", job_id=batch[0].job_id, lease=batch[0].lease, error=str(error))
            plain = error_entry("the database refused the error's own text", "")
            if batch[0].error in (None, plain):
                del self._settlements[:1]  # nothing left to leave out; the claim is freed when this worker ends
            else:
                self._settlements[0] = replace(batch[0], error=plain)
            return
        del self._settlements[: len(batch)]
        self.written += len(ours)
        for settlement in batch:
            state = ours.get(settlement.lease)
            if state is not None:
                self._on_settled(settlement, state)

    def _report_lost(self, jobs: Sequence[ClaimedJob]) -> None:
        for job in jobs:
            _log.warning("job.lease_lost", job_id=job.id, lease=job.lease, task=job.task)
