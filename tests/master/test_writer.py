"""The writer against claims that an open transaction has locked: only their outcomes wait, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from roost_client import JobState
from roostd.core.job import ClaimedJob
from roostd.core.lifecycle import CANCELLED, COMPLETED, DISCARDED, EXECUTING, RETRYABLE
from roostd.core.outcome import Report, Settlement
from roostd.master.database import Link
from roostd.master.writer import MAX_BATCH, Writer
from roostd.store import statements
from tests.store.rows import Conn, add_worker, claim, connect, enqueue, job_row, settlement, value


def run(dsn: str, test: Callable[[Conn, Writer, UUID], Awaitable[None]], lock_timeout: str = "50ms") -> None:
    """Runs `test` with a connection of its own, a writer that runs, and a registered worker."""

    async def main() -> None:
        async with await connect(dsn) as conn, _writer(dsn, lock_timeout) as writer, asyncio.timeout(30):
            await test(conn, writer, await add_worker(conn))

    asyncio.run(main())


@asynccontextmanager
async def _writer(dsn: str, lock_timeout: str) -> AsyncIterator[Writer]:
    def decide(job: ClaimedJob, report: Report) -> Settlement:
        return settlement(job.id, job.lease, DISCARDED, error=report.error)

    assert "lock_timeout = '50ms'" in statements.WRITE_SESSION
    session: Any = statements.WRITE_SESSION.replace("50ms", lock_timeout)
    link = Link(dsn, "write", session=session)
    writer = Writer(
        link,
        error_cap=lambda: 10,
        retry_seconds=0.1,
        decide=decide,
        on_settled=lambda *_: None,
        on_parents=lambda parents: None,
        on_ended=lambda _: None,
    )
    task = asyncio.create_task(writer.run())
    try:
        yield writer
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await link.close()


async def claimed(conn: Conn, worker_id: UUID, count: int) -> list[ClaimedJob]:
    await enqueue(conn, count)
    return await claim(conn, worker_id, count)


async def until_ended(conn: Conn, count: int) -> None:
    query = "SELECT count(*) FROM roost.jobs WHERE state IN ('completed', 'retryable', 'discarded', 'cancelled')"
    while await value(conn, query) < count:
        await asyncio.sleep(0.01)


async def states(conn: Conn, jobs: list[ClaimedJob]) -> list[JobState]:
    query = "SELECT array_agg(state ORDER BY id) FROM roost.jobs WHERE id = ANY (%s)"
    return [JobState(state) for state in await value(conn, query, [job.id for job in jobs])]


async def looks_for_locks(conn: Conn, writer: Writer, worker_id: UUID) -> bool:
    """Whether a completion is more than its one statement, by the last that its connection sent."""
    (job,) = await claimed(conn, worker_id, 1)
    writer.complete(job, None)
    await writer.wait_empty()
    query = (
        "SELECT query FROM pg_stat_activity WHERE application_name = 'roostd write' AND datname = current_database()"
    )
    return "-- Completes claimed jobs" not in await value(conn, query)


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_only_the_outcomes_of_locked_claims_wait(dsn: str, commits: bool) -> None:
    async def test(conn: Conn, writer: Writer, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 3 * MAX_BATCH)
        locked = [jobs[0], jobs[700], jobs[-2], jobs[-1]]
        retried = {jobs[-3].lease, jobs[-2].lease, jobs[-1].lease}
        async with await connect(dsn) as app:
            async with app.transaction(force_rollback=not commits):
                for job in locked:
                    await app.execute("SELECT roost.cancel(%s)", (job.id,))
                for job in jobs:
                    if job.lease in retried:
                        writer.settle(settlement(job.id, job.lease, RETRYABLE, 60.0, error="e"))
                    else:
                        writer.complete(job, '"done"')
                writer.flush_within(0)
                await until_ended(conn, len(jobs) - len(locked))
                for _ in range(3):  # what comes later doesn't wait either
                    later = await claimed(conn, worker_id, 20)
                    for job in later:
                        writer.complete(job, None)
                    writer.flush_within(0)
                    while set(await states(conn, later)) != {COMPLETED}:
                        await asyncio.sleep(0.01)
                assert set(await states(conn, locked)) == {EXECUTING}
                assert sorted(writer.locked_jobs()) == [job.id for job in locked]
                assert writer.pending == len(locked)
                assert writer.pending_leases() == {job.lease for job in locked}
                ending = asyncio.create_task(writer.wait_empty())
                written = writer.written
                (one_more,) = await claimed(conn, worker_id, 1)
                writer.complete(one_more, None)
                writer.flush_within(0)
                while writer.written == written:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.01)  # so that `ending` has its turn
                assert not ending.done()
            await ending
            waiting = CANCELLED if commits else RETRYABLE
            assert await states(conn, locked) == [COMPLETED, COMPLETED, waiting, waiting]
            assert (await job_row(conn, locked[0].id))["cancel_requested"] is commits
            assert (writer.pending, writer.locked_jobs(), writer.written) == (0, [], len(jobs) + 61)
        assert not await looks_for_locks(conn, writer, worker_id)

    run(dsn, test)


@pytest.mark.parametrize("fails", [False, True], ids=["written", "failed"])
def test_what_comes_while_a_batch_is_written_is_waited_for_too(dsn: str, fails: bool) -> None:
    waits = (
        "SELECT max(pid) FROM pg_stat_activity WHERE application_name = 'roostd write' AND datname = current_database()"
        " AND wait_event_type = 'Lock'"
    )

    async def test(conn: Conn, writer: Writer, worker_id: UUID) -> None:
        first, second = jobs = await claimed(conn, worker_id, 2)
        async with await connect(dsn) as app, app.transaction():
            await app.execute("LOCK TABLE roost.claims IN SHARE MODE")
            writer.complete(first, None)
            writer.flush_within(0)
            while not (pid := await value(conn, waits)):
                await asyncio.sleep(0.01)
            writer.complete(second, None)
            writer.flush_within(0)
            ending = asyncio.create_task(writer.wait_empty())
            if fails:
                await conn.execute("SELECT pg_terminate_backend(%s)", (pid,))
                while await value(conn, waits) in (None, pid):
                    await asyncio.sleep(0.01)
            assert not ending.done()
        await ending
        assert writer.pending == 0
        assert await states(conn, jobs) == [COMPLETED, COMPLETED]

    run(dsn, test, lock_timeout="20s")


def test_an_open_transaction_is_met_once_and_costs_later_batches_no_wait(dsn: str) -> None:
    async def test(conn: Conn, writer: Writer, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 40)
        with capture_logs() as logs:
            async with await connect(dsn) as app, app.transaction():
                for number, job in enumerate(jobs):
                    await app.execute("SELECT roost.cancel(%s)", (job.id,))
                    writer.complete(job, None)
                    writer.flush_within(0)
                    while len(writer.locked_jobs()) <= number:
                        await asyncio.sleep(0.001)
            await writer.wait_empty()
        found = [job_id for entry in logs if entry["event"] == "outcomes.locked" for job_id in entry["jobs"]]
        assert found == [job.id for job in jobs]  # each told once, however often it was tried
        assert not [entry for entry in logs if entry["event"] != "outcomes.locked"]

        assert not await looks_for_locks(conn, writer, worker_id)

    run(dsn, test, lock_timeout="1s")  # of which each of the 40 would cost one


def test_a_lease_that_was_lost_is_reported_beside_one_that_is_locked(dsn: str) -> None:
    async def test(conn: Conn, writer: Writer, worker_id: UUID) -> None:
        good, lost, locked = await claimed(conn, worker_id, 3)
        with capture_logs() as logs:
            async with await connect(dsn) as app, app.transaction():
                await app.execute("SELECT roost.cancel(%s)", (locked.id,))
                for job in (good, lost._replace(lease=lost.lease + 100), locked):
                    writer.complete(job, None)
                writer.flush_within(0)
                await until_ended(conn, 1)
                while not writer.locked_jobs():
                    await asyncio.sleep(0.01)
            await writer.wait_empty()
        reported = [(entry["event"], entry.get("job_id", entry.get("jobs"))) for entry in logs]
        assert reported == [("outcomes.locked", [locked.id]), ("job.lease_lost", lost.id)]
        assert await states(conn, [good, lost, locked]) == [COMPLETED, EXECUTING, COMPLETED]

    run(dsn, test)


def test_a_locked_claim_whose_result_is_refused_fails_when_the_lock_is_gone(dsn: str) -> None:
    async def test(conn: Conn, writer: Writer, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 30)
        bad, bad_and_locked, locked = jobs[3], jobs[9], jobs[20]
        async with await connect(dsn) as app:
            async with app.transaction():
                for job in (bad_and_locked, locked):
                    await app.execute("SELECT roost.cancel(%s)", (job.id,))
                for job in jobs:
                    writer.complete(job, '"\\u0000"' if job in (bad, bad_and_locked) else None)
                writer.flush_within(0)
                await until_ended(conn, 28)
                assert set(await states(conn, [bad_and_locked, locked])) == {EXECUTING}
            await writer.wait_empty()
            assert await states(conn, [bad, bad_and_locked, locked]) == [DISCARDED, DISCARDED, COMPLETED]
            assert writer.locked_jobs() == []

    run(dsn, test)


def test_a_locked_claim_whose_settlement_is_refused_in_every_form_is_given_up(dsn: str) -> None:
    async def test(conn: Conn, writer: Writer, worker_id: UUID) -> None:
        (job,) = await claimed(conn, worker_id, 1)
        async with await connect(dsn) as app, app.transaction(force_rollback=True):
            await app.execute("SELECT roost.cancel(%s)", (job.id,))
            writer.settle(settlement(job.id, job.lease, RETRYABLE, float("inf")))
            writer.flush_within(0)
            while not writer.locked_jobs():
                await asyncio.sleep(0.01)
        await writer.wait_empty()
        assert await states(conn, [job]) == [EXECUTING]
        assert not await looks_for_locks(conn, writer, worker_id)

    run(dsn, test)
