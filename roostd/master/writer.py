"""Writes outcomes in batches, keeps them while the database is away, finds the one bad row that spoils a batch, and
lets no batch wait for a claim that another transaction has locked.

An outcome leaves this list only when the database has acknowledged it. Repeating a batch whose answer was lost is
harmless: every row is guarded by its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import psycopg
import structlog
from psycopg import AsyncConnection

from roost_client import JobState
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Ending, Report, Settlement, error_entry
from roostd.master.database import DatabaseGone, Link
from roostd.store import statements

MAX_BATCH = 500
# What a row may be to blame for: a value, a constraint, a limit. Not the schema and not privileges: those are kept for.
ROW_ERRORS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
_LOCKED_SECONDS = (0.05, 1.0)  # the first pause before what is locked is tried again, doubled up to the longest
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Completion:
    """A row of store/sql/complete.sql; `result` is JSON text."""

    job: ClaimedJob
    result: str | None

    @property
    def job_id(self) -> int:
        return self.job.id

    @property
    def lease(self) -> int:
        return self.job.lease


T = TypeVar("T")
Outcome = TypeVar("Outcome", Completion, Settlement)


def refused_result(error: psycopg.Error) -> Report:
    text = f"{type(error).__name__}: the database refused the result: {error}".replace("\x00", "")
    return Report(Ending.FAILED, text)


class Writer:
    def __init__(
        self,
        link: Link,
        *,
        error_cap: Callable[[], int],
        retry_seconds: float,
        decide: Callable[[ClaimedJob, Report], Settlement],
        on_settled: Callable[[Settlement, JobState], None],
        on_parents: Callable[[list[int]], None],
        on_ended: Callable[[Iterable[int]], None],
    ) -> None:
        self.written = 0
        self._link = link
        self._error_cap = error_cap
        self._retry_seconds = retry_seconds
        self._decide = decide
        self._on_settled = on_settled
        self._on_parents = on_parents
        self._on_ended = on_ended
        self._completions: list[Completion] = []
        self._settlements: list[Settlement] = []
        self._aside: list[Completion | Settlement] = []  # found locked, until _again_at
        self._again_at: float | None = None
        self._pause_seconds = _LOCKED_SECONDS[0]
        self._locked: set[int] = set()  # the leases found locked when last tried, put aside or not
        self._due_at: float | None = None
        self._repeating = False
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._loop = asyncio.get_running_loop()

    @property
    def pending(self) -> int:
        return self._queued + len(self._aside)

    @property
    def _queued(self) -> int:
        return len(self._completions) + len(self._settlements)

    def _outcomes(self) -> Iterator[Completion | Settlement]:
        return chain(self._completions, self._settlements, self._aside)

    def pending_leases(self) -> set[int]:
        return {outcome.lease for outcome in self._outcomes()}

    def locked_jobs(self) -> list[int]:
        """The jobs whose outcome waits for another transaction to end."""
        return [outcome.job_id for outcome in self._outcomes() if outcome.lease in self._locked]

    def complete(self, job: ClaimedJob, result: str | None) -> None:
        self._completions.append(Completion(job, result))

    def settle(self, settlement: Settlement) -> None:
        self._settlements.append(settlement)

    def written_by_handler(self, job_id: int, lease: int) -> None:
        """Takes in that a handler completed its job in a transaction of its own: it is not for us to write."""
        self.written += 1
        self._ended_elsewhere(job_id, lease)

    def _ended_elsewhere(self, job_id: int, lease: int) -> None:
        self._on_ended([lease])
        self._on_parents([job_id])  # whether any job depends on it, only the handler's transaction was told

    def flush_within(self, seconds: float) -> None:
        """Has what is here written at the latest after `seconds`; earlier when the batch is full."""
        if not self.pending:
            return
        self._empty.clear()
        if not self._queued:
            return
        due_at = self._loop.time() + (seconds if self._queued < MAX_BATCH else 0)
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
            self._take_up_again()
            try:
                while self._completions or self._settlements:
                    await self._write_completions(self._completions[:MAX_BATCH])
                    await self._write_settlements(self._settlements[:MAX_BATCH])
                    if self._queued < MAX_BATCH:
                        break
            except (DatabaseGone, psycopg.Error) as error:
                _log.warning("outcomes.kept", pending=self.pending, error=str(error))
                self._repeating = True
                await asyncio.sleep(self._retry_seconds)
                self.flush_within(0)
            if not self.pending:
                self._empty.set()
            elif self._queued and self._due_at is None:
                self.flush_within(0.005)

    async def _wait_due(self) -> None:
        while (at := self._next_at()) is None or at > self._loop.time():
            self._wake.clear()
            timeout = None if at is None else at - self._loop.time()
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                break
        self._due_at = None

    def _next_at(self) -> float | None:
        return min((at for at in (self._due_at, self._again_at) if at is not None), default=None)

    def _take_up_again(self) -> None:
        if self._again_at is None or self._again_at > self._loop.time():
            return
        for outcome in self._aside:
            match outcome:
                case Completion():
                    self._completions.append(outcome)
                case Settlement():
                    self._settlements.append(outcome)
        self._aside.clear()
        self._again_at = None
        self._pause_seconds = min(2 * self._pause_seconds, _LOCKED_SECONDS[1])

    async def _write(
        self, batch: Sequence[Outcome], write: Callable[[AsyncConnection, Sequence[Outcome]], Awaitable[T]]
    ) -> tuple[T, list[Outcome]]:
        """What `write` answers, and what was left out of the batch because another transaction has locked its claim.

        Looking which claims are locked makes a completion half as dear again; so the batch is sent as it is until one
        comes back from a lock, and after that until nothing is known to be locked any more.
        """

        async def attempt(conn: AsyncConnection) -> tuple[T, list[Outcome]]:
            if not self._locked:
                with contextlib.suppress(psycopg.errors.LockNotAvailable):
                    return await write(conn, batch), []
            async with conn.transaction():
                # From here on only a table's lock is waited for, which nothing could be written without.
                await conn.execute("SET LOCAL lock_timeout = 0")
                locked = await statements.lock_claims(conn, [o.job_id for o in batch], [o.lease for o in batch])
                answer = await write(conn, [o for o in batch if o.lease not in locked])
            return answer, [o for o in batch if o.lease in locked]

        return await self._link.run(attempt)

    def _put_aside(self, batch: Sequence[Outcome], locked: Sequence[Outcome]) -> None:
        """Takes note of which of the batch are locked; those are tried again by and by, whatever else is written."""
        found = [outcome.job_id for outcome in locked if outcome.lease not in self._locked]
        if found:
            reason = "a transaction that is still open has locked their claims, as a cancel does"
            _log.warning("outcomes.locked", jobs=found, reason=reason)
        self._locked.difference_update(outcome.lease for outcome in batch)
        self._locked.update(outcome.lease for outcome in locked)
        if not self._locked:
            self._pause_seconds = _LOCKED_SECONDS[0]
        self._aside += locked
        if self._aside and self._again_at is None:
            self._again_at = self._loop.time() + self._pause_seconds

    async def _write_completions(self, batch: Sequence[Completion]) -> None:
        if not batch:
            return
        try:
            (ours, parents), locked = await self._write(
                batch,
                lambda conn, free: statements.complete(
                    conn, [c.job_id for c in free], [c.lease for c in free], [c.result for c in free]
                ),
            )
        except ROW_ERRORS as error:
            if len(batch) > 1:
                half = len(batch) // 2
                await self._write_completions(batch[:half])
                await self._write_completions(batch[half:])
                return
            self._settlements.append(self._decide(batch[0].job, refused_result(error)))
            del self._completions[:1]
            return
        del self._completions[: len(batch)]
        self._put_aside(batch, locked)
        self.written += len(ours)
        self._on_ended(ours)
        if parents:
            self._on_parents(parents)
        repeated, self._repeating = self._repeating, False
        if len(ours) + len(locked) < len(batch) and not repeated:  # a repeated one may have been written the first time
            kept = ours.union(completion.lease for completion in locked)
            self._report_lost([completion.job for completion in batch if completion.lease not in kept])

    async def _write_settlements(self, batch: Sequence[Settlement]) -> None:
        if not batch:
            return
        try:
            (ours, parents), locked = await self._write(
                batch, lambda conn, free: statements.settle(conn, free, self._error_cap())
            )
        except ROW_ERRORS as error:
            if len(batch) > 1:
                half = len(batch) // 2
                await self._write_settlements(batch[:half])
                await self._write_settlements(batch[half:])
                return
            _log.error("outcome.refused", job_id=batch[0].job_id, lease=batch[0].lease, error=str(error))
            plain = error_entry("the database refused the error's own text", "")
            if batch[0].error in (None, plain):
                del self._settlements[:1]  # nothing left to leave out; the claim is freed when this worker ends
                self._locked.discard(batch[0].lease)
            else:
                self._settlements[0] = replace(batch[0], error=plain)
            return
        del self._settlements[: len(batch)]
        self._put_aside(batch, locked)
        self.written += len(ours)
        self._on_ended(ours)
        if parents:
            self._on_parents(parents)
        for settlement in batch:
            state = ours.get(settlement.lease)
            if state is not None:
                self._on_settled(settlement, state)
            elif settlement.lease in self._locked:
                continue
            elif settlement.unconfirmed:
                self.written_by_handler(settlement.job_id, settlement.lease)
            else:  # its handler may have completed it before it failed, or was killed
                self._ended_elsewhere(settlement.job_id, settlement.lease)

    def _report_lost(self, jobs: Sequence[ClaimedJob]) -> None:
        for job in jobs:
            _log.warning("job.lease_lost", job_id=job.id, lease=job.lease, task=job.task)
