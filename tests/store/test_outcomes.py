"""Ending claims: completions and settlements, late, repeated, contested, and with every kind of text."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from roost_client import JobState
from roostd.core.job import ClaimedJob
from roostd.core.lifecycle import AVAILABLE, CANCELLED, COMPLETED, DISCARDED, EXECUTING, RETRYABLE
from roostd.core.outcome import MAX_DELAY_SECONDS, Settlement
from roostd.store import statements
from tests.store.rows import (
    Conn,
    add_worker,
    assert_each_job_is_in_its_place,
    claim,
    connect,
    enqueue,
    job_row,
    places,
    public_state,
    rows,
    settlement,
    value,
)

CAP = 10


def run(dsn: str, test: Callable[[Conn, UUID], Awaitable[None]]) -> None:
    """Runs `test` with a connection and a registered worker, then looks whether every job is in its place."""

    async def main() -> None:
        async with await connect(dsn) as conn:
            await test(conn, await add_worker(conn))
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


async def claimed(conn: Conn, worker_id: UUID, count: int = 1, **columns: Any) -> list[ClaimedJob]:
    await enqueue(conn, count, **columns)
    return await claim(conn, worker_id, count)


async def complete(conn: Conn, jobs: list[ClaimedJob], results: list[str | None] | None = None) -> set[int]:
    ids, leases = [job.id for job in jobs], [job.lease for job in jobs]
    ours, _ = await statements.complete(conn, ids, leases, results or [None] * len(jobs))
    return ours


async def settle(conn: Conn, *settlements: Settlement, cap: int = CAP) -> dict[int, JobState]:
    states, _ = await statements.settle(conn, settlements, cap)
    return states


async def everything(conn: Conn) -> list[list[dict[str, Any]]]:
    queries: Any = [f"SELECT * FROM roost.{t} ORDER BY job_id" for t in ("ready", "scheduled", "claims")]
    return [await rows(conn, query) for query in ("SELECT *, xmin FROM roost.job_rows ORDER BY id", *queries)]


# -- what is written


def test_a_completion_writes_result_attempt_and_times(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        texts = ['{"b": [1, null]}', "null", '"\\u00e9"', None, "0"]
        jobs = await claimed(conn, worker_id, len(texts))
        claims = await rows(conn, "SELECT * FROM roost.claims ORDER BY job_id")
        assert await complete(conn, jobs, texts) == {job.lease for job in jobs}
        for job, text, claim_row in zip(jobs, texts, claims, strict=True):
            row = await job_row(conn, job.id)
            assert (row["state"], row["attempt"], row["attempted_at"]) == ("completed", 1, claim_row["claimed_at"])
            assert row["completed_at"] > row["attempted_at"]
            if text is None:
                assert row["result"] is None
            else:
                assert await value(conn, "SELECT result::text FROM roost.job_rows WHERE id = %s", job.id) is not None
                assert row["result"] == json.loads(text)

    run(clean_dsn, test)


def test_results_that_are_all_none_are_not_sent_and_a_short_array_means_none(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 3)
        parameters = {"job_ids": [j.id for j in jobs], "leases": [j.lease for j in jobs], "results": ["1"]}
        cursor = await conn.execute(statements.SQL["complete"], parameters)
        assert len(await cursor.fetchall()) == 3
        assert [row["result"] for row in await rows(conn, "SELECT result FROM roost.job_rows ORDER BY id")] == [
            1,
            None,
            None,
        ]
        others = await claimed(conn, worker_id, 2)
        assert len(await complete(conn, others, [None, None])) == 2
        assert [(await job_row(conn, job.id))["result"] for job in others] == [None, None]

    run(clean_dsn, test)


def test_a_result_that_jsonb_refuses_changes_nothing_of_its_batch(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 2)
        before = await everything(conn)
        for bad in ('"\\u0000"', "{", '"\\ud800"'):
            with pytest.raises(psycopg.DataError):
                await complete(conn, jobs, ["1", bad])
        assert await everything(conn) == before

    run(clean_dsn, test)


def test_what_each_ending_counts(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        async def end(state: JobState | None, **keywords: Any) -> tuple[str, int, int, bool, int]:
            (job,) = await claim(conn, worker_id)
            assert job.attempt == (await job_row(conn, job.id))["attempt"] + 1
            await settle(conn, settlement(job.id, job.lease, state, **keywords))
            row = await job_row(conn, job.id)
            claimed_once = row["attempted_at"] is not None
            return row["state"], row["attempt"], row["crashes"], claimed_once, len(row["errors"] or [])

        await enqueue(conn)
        assert await end(AVAILABLE) == ("available", 0, 0, False, 0)  # snoozed
        assert await end(None) == ("available", 0, 0, False, 0)  # released
        assert await end(RETRYABLE, error="e") == ("retryable", 1, 0, True, 1)
        assert await end(None) == ("retryable", 1, 0, True, 1)
        assert await end(RETRYABLE, error="e", counts_crash=True) == ("retryable", 2, 1, True, 2)
        assert await end(AVAILABLE) == ("available", 2, 1, True, 2)
        assert await end(DISCARDED, error="e", counts_crash=True) == ("discarded", 3, 2, True, 3)

    run(clean_dsn, test)


def test_a_release_puts_the_job_back_where_it_was_in_the_order(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        await enqueue(conn, 3)
        await enqueue(conn, 2, priority=-1)
        order = await rows(conn, "SELECT * FROM roost.ready ORDER BY job_id")
        jobs = await claim(conn, worker_id)
        await settle(conn, *(settlement(job.id, job.lease, None) for job in reversed(jobs)))
        assert await rows(conn, "SELECT * FROM roost.ready ORDER BY job_id") == order
        assert [job.id for job in await claim(conn, worker_id)] == [job.id for job in jobs]

    run(clean_dsn, test)


@pytest.mark.parametrize("state", [AVAILABLE, RETRYABLE])
def test_a_delay_counts_from_the_database_s_now(clean_dsn: str, state: JobState) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        delays = [0.0, 0.25, 3600.0, MAX_DELAY_SECONDS]
        jobs = await claimed(conn, worker_id, len(delays))
        before = await value(conn, "SELECT now()")
        await settle(conn, *(settlement(j.id, j.lease, state, d) for j, d in zip(jobs, delays, strict=True)))
        after = await value(conn, "SELECT now()")
        for job, delay in zip(jobs, delays, strict=True):
            at = (await job_row(conn, job.id))["scheduled_at"]
            assert before <= at - timedelta(seconds=delay) <= after
            assert list(await places(conn, job.id)) == ["scheduled" if delay else "ready"]

    run(clean_dsn, test)


def test_a_snooze_of_a_hundred_years_is_promoted_at_its_time(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        (job,) = await claimed(conn, worker_id)
        await settle(conn, settlement(job.id, job.lease, AVAILABLE, MAX_DELAY_SECONDS))
        row = await job_row(conn, job.id)
        assert row["scheduled_at"] > datetime.now(UTC) + timedelta(days=100 * 365)
        jobs, next_in_seconds, *_ = await statements.promote(conn)
        assert jobs == 0
        assert next_in_seconds == pytest.approx(MAX_DELAY_SECONDS, abs=60)

    run(clean_dsn, test)


# -- late and repeated reports


ENDINGS: list[JobState | None] = [None, AVAILABLE, RETRYABLE, DISCARDED, CANCELLED]


@pytest.mark.parametrize("ended", ["running again", "waiting", "completed", "discarded"])
def test_a_late_result_of_an_earlier_lease_changes_nothing(clean_dsn: str, ended: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        (late,) = await claimed(conn, worker_id)
        await settle(conn, settlement(late.id, late.lease, RETRYABLE, error="e"))
        if ended != "waiting":
            (job,) = await claim(conn, worker_id)
            assert job.lease > late.lease
        if ended == "completed":
            await complete(conn, [job], ["1"])
        if ended == "discarded":
            await settle(conn, settlement(job.id, job.lease, DISCARDED, error="e"))
        before = await everything(conn)
        assert await complete(conn, [late], ["2"]) == set()
        for state in ENDINGS:
            assert (
                await settle(conn, settlement(late.id, late.lease, state, 5.0, error="late", counts_crash=True)) == {}
            )
        assert await everything(conn) == before

    run(clean_dsn, test)


def test_a_lease_counts_only_for_its_own_job(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        one, two = await claimed(conn, worker_id, 2)
        before = await everything(conn)
        assert await complete(conn, [one._replace(lease=two.lease), two._replace(lease=one.lease)]) == set()
        for state in ENDINGS:
            assert await settle(conn, settlement(one.id, two.lease, state), settlement(two.id, one.lease, state)) == {}
        assert await everything(conn) == before

    run(clean_dsn, test)


def test_a_claim_that_stands_for_a_finished_job_changes_nothing_of_it(clean_dsn: str) -> None:
    """No statement makes such a claim; one made by hand must not end a job twice, or bring it back."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 3)
        await complete(conn, jobs, ["1"] * 3)
        before = await everything(conn)
        for job in jobs:
            await conn.execute("INSERT INTO roost.claims VALUES (%s, %s, gen_random_uuid(), now(), 1)", job[:2])
        assert await complete(conn, jobs[:1], ["2"]) == set()
        assert await settle(conn, settlement(jobs[1].id, jobs[1].lease, RETRYABLE, error="e")) == {}
        assert await statements.rescue(conn, reason="gone", error_cap=CAP) == {}
        assert await everything(conn) == before

    run(clean_dsn, test)


def test_a_repeated_batch_changes_nothing(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 20)
        await complete(conn, jobs[:10], ["1"] * 10)
        endings = [(state, delay) for state in ENDINGS for delay in (0.0, 9.0)]
        settlements = [
            settlement(job.id, job.lease, state, delay, error="e", counts_crash=True)
            for job, (state, delay) in zip(jobs[10:], endings, strict=True)
        ]
        assert len(await settle(conn, *settlements)) == 10
        before = await everything(conn)
        assert await complete(conn, jobs[:10], ["2"] * 10) == set()
        assert await settle(conn, *settlements) == {}
        assert await everything(conn) == before

    run(clean_dsn, test)


def test_a_batch_that_is_late_in_part_does_the_rest(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 6)
        assert await complete(conn, jobs[:2]) == {job.lease for job in jobs[:2]}
        assert await complete(conn, jobs[:4]) == {job.lease for job in jobs[2:4]}
        settlements = [settlement(job.id, job.lease, RETRYABLE) for job in jobs]
        assert await settle(conn, *settlements) == {job.lease: RETRYABLE for job in jobs[4:]}

    run(clean_dsn, test)


def test_a_job_twice_in_one_batch_ends_once(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        one, two = await claimed(conn, worker_id, 2)
        assert await complete(conn, [one, one]) == {one.lease}
        both = [settlement(two.id, two.lease, state, error="e") for state in (RETRYABLE, DISCARDED)]
        assert len(await settle(conn, *both)) == 1
        assert len((await job_row(conn, two.id))["errors"]) == 1

    run(clean_dsn, test)


# -- errors


def test_errors_keep_the_newest_in_order_with_attempt_and_time(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        await enqueue(conn)
        for number in range(1, 8):
            (job,) = await claim(conn, worker_id)
            before = await value(conn, "SELECT now()")
            await settle(conn, settlement(job.id, job.lease, RETRYABLE, error=f"number {number}"), cap=4)
            errors = (await job_row(conn, job.id))["errors"]
            kept = range(max(1, number - 3), number + 1)
            assert [(e["error"], e["trace"], e["attempt"]) for e in errors] == [
                (f"number {n}", "trace", n) for n in kept
            ]
            assert all(set(e) == {"at", "attempt", "error", "trace"} for e in errors)
            times = [datetime.fromisoformat(e["at"]) for e in errors]
            assert times == sorted(times)
            assert before <= times[-1] <= before + timedelta(minutes=1)
        (job,) = await claim(conn, worker_id)
        await settle(conn, settlement(job.id, job.lease, RETRYABLE, error="last"), cap=1)
        assert [e["error"] for e in (await job_row(conn, job.id))["errors"]] == ["last"]

    run(clean_dsn, test)


@pytest.mark.parametrize(
    "text",
    [
        "",
        'it\'s "quoted" \\ {braces} $1 %s %(errors)s',
        "'; DROP TABLE roost.job_rows; --",
        "line\nline\r\n\ttab\x01\x1f\x7f",
        "\u00e9\U0001f41d\u202e\ufeff\ufffe",
        "{1,2,NULL}",
        "NULL",
        "x" * 1_000_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_the_text_of_an_error_is_kept_as_it_is(clean_dsn: str, text: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 2)
        await settle(conn, *(settlement(j.id, j.lease, s, error=text) for j, s in zip(jobs, ENDINGS[2:], strict=False)))
        for job in jobs:
            (entry,) = (await job_row(conn, job.id))["errors"]
            assert (entry["error"], entry["attempt"]) == (text, 1)

    run(clean_dsn, test)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"], ids=["NUL", "lone surrogate"])
def test_a_text_that_jsonb_refuses_changes_nothing_of_its_batch(clean_dsn: str, text: str) -> None:
    """The writer then splits the batch and reports the bad one with a plain text."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        good, bad = await claimed(conn, worker_id, 2)
        before = await everything(conn)
        with pytest.raises(psycopg.DataError):
            await settle(
                conn,
                settlement(good.id, good.lease, RETRYABLE, error="e"),
                settlement(bad.id, bad.lease, RETRYABLE, error=text),
            )
        assert await everything(conn) == before

    run(clean_dsn, test)


# -- against a cancel


def test_a_cancel_asked_for_beats_every_state_but_the_terminal_ones(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, len(ENDINGS) + 1)
        for job in jobs:
            assert await value(conn, "SELECT roost.cancel(%s)", job.id) == "executing"
            assert await public_state(conn, job.id) is EXECUTING
        answered = await settle(
            conn, *(settlement(j.id, j.lease, s, 60.0) for j, s in zip(jobs, ENDINGS, strict=False))
        )
        assert list(answered.values()).count(DISCARDED) == 1
        await complete(conn, jobs[-1:])
        for job, state in zip(jobs, [*ENDINGS, COMPLETED], strict=True):
            row = await job_row(conn, job.id)
            assert row["state"] == (state if state in (COMPLETED, DISCARDED) else CANCELLED)
            assert answered.get(job.lease, COMPLETED) == row["state"]
            assert row["cancel_requested"] is True
            assert await places(conn, job.id) == {}

    run(clean_dsn, test)


def test_a_cancel_that_a_settlement_waits_for_is_seen_by_it(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        (job,) = await claimed(conn, worker_id)
        async with await connect(clean_dsn) as other:
            async with other.transaction():
                await other.execute("SELECT roost.cancel(%s)", (job.id,))
                ending = asyncio.create_task(settle(conn, settlement(job.id, job.lease, RETRYABLE, 60.0)))
                pid = conn.info.backend_pid
                await _until(other, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s", pid)
            assert await ending == {job.lease: CANCELLED}

    run(clean_dsn, test)


def test_a_cancel_that_waits_for_a_settlement_cancels_the_job_it_finds_then(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        retried, completed = await claimed(conn, worker_id, 2)
        for job, after in ((retried, "cancelled"), (completed, "completed")):
            async with await connect(clean_dsn) as other, await connect(clean_dsn) as watcher:
                async with conn.transaction():
                    if job is retried:
                        await settle(conn, settlement(job.id, job.lease, RETRYABLE, 60.0))
                    else:
                        await complete(conn, [job])
                    cancelling = asyncio.create_task(value(other, "SELECT roost.cancel(%s)", job.id))
                    pid = other.info.backend_pid
                    await _until(watcher, "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s", pid)
                assert await cancelling == after
                assert await public_state(conn, job.id) == after

    run(clean_dsn, test)


# -- against a cancel in a transaction that stays open


def test_the_claims_that_another_transaction_has_locked_are_told_from_those_that_are_gone(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 300)
        gone, stale, cancelled = jobs[0], jobs[1]._replace(lease=jobs[2].lease), jobs[200]
        await complete(conn, [gone])
        async with await connect(clean_dsn) as app, await connect(clean_dsn) as third:
            async with app.transaction():
                await app.execute("SELECT roost.cancel(%s)", (cancelled.id,))
                async with conn.transaction():
                    asked = [gone, stale, *jobs[2:], jobs[3]]
                    assert await lock_claims(conn, asked) == {cancelled.lease}
                    unlocked = await rows(third, "SELECT job_id FROM roost.claims FOR UPDATE SKIP LOCKED")
                    assert [row["job_id"] for row in unlocked] == [stale.id]
                    free = [job for job in asked if job is not cancelled]
                    assert await complete(conn, free) == {job.lease for job in jobs[2:] if job is not cancelled}
            async with conn.transaction():
                assert await lock_claims(conn, [cancelled]) == set()
                answer = await settle(conn, settlement(cancelled.id, cancelled.lease, RETRYABLE, 60.0))
                assert answer == {cancelled.lease: CANCELLED}

    run(clean_dsn, test)


def test_a_completion_and_a_settlement_give_way_to_a_lock_and_have_changed_nothing(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 3)
        async with await connect(clean_dsn) as app, await connect(clean_dsn) as writer:
            await writer.execute(statements.WRITE_SESSION)
            await writer.execute("SET deadlock_timeout = '1s'")
            async with app.transaction():
                await app.execute("SELECT roost.cancel(%s)", (jobs[1].id,))
                before = await everything(conn)
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    await complete(writer, jobs)
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    await settle(writer, *(settlement(j.id, j.lease, RETRYABLE, error="e") for j in jobs))
                assert await everything(conn) == before
            assert await complete(writer, jobs) == {job.lease for job in jobs}
            assert (await job_row(conn, jobs[1].id))["state"] == "completed"

    run(clean_dsn, test)


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_a_rescue_leaves_a_locked_claim_to_a_later_one(clean_dsn: str, commits: bool) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        jobs = await claimed(conn, worker_id, 3)
        await statements.remove_workers(conn, [worker_id])
        async with await connect(clean_dsn) as app:
            async with app.transaction(force_rollback=not commits):
                await app.execute("SELECT roost.cancel(%s)", (jobs[1].id,))
                freed = await statements.rescue(conn, reason="gone", error_cap=CAP)
                assert freed == {jobs[0].id: RETRYABLE, jobs[2].id: RETRYABLE}
        freed = await statements.rescue(conn, reason="gone", error_cap=CAP)
        assert freed == {jobs[1].id: CANCELLED if commits else RETRYABLE}

    run(clean_dsn, test)


async def lock_claims(conn: Conn, jobs: list[ClaimedJob]) -> set[int]:
    return await statements.lock_claims(conn, [j.id for j in jobs], [j.lease for j in jobs])


async def _until(conn: Conn, query: str, *parameters: Any) -> None:
    async with asyncio.timeout(30):
        while not await value(conn, query, *parameters):
            await asyncio.sleep(0.005)


# -- what it costs, and what it may meet


def test_the_updates_of_job_rows_are_hot(dsn: str) -> None:
    """A run updates the job's row once, and where the page has room without a new entry in any index.

    But for one that failed: there is an index of those.
    """

    async def test(conn: Conn, worker_id: UUID) -> None:
        await conn.execute("ALTER TABLE roost.job_rows SET (autovacuum_enabled = false)")
        jobs = (await claimed(conn, worker_id, 400))[::4]  # the fillfactor leaves room for a few versions on a page
        await complete(conn, jobs[:40], ['{"n": 1}'] * 40)
        await settle(conn, *(settlement(j.id, j.lease, AVAILABLE, 9.0) for j in jobs[40:60]))
        await settle(conn, *(settlement(j.id, j.lease, None) for j in jobs[60:70]))
        query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_all_tables WHERE relid = 'roost.job_rows'::regclass"
        await conn.execute("SELECT pg_stat_force_next_flush()")
        assert await rows(conn, query) == [{"n_tup_upd": 70, "n_tup_hot_upd": 70}]
        await settle(conn, *(settlement(j.id, j.lease, RETRYABLE, 9.0, error="e") for j in jobs[70:]))
        await conn.execute("SELECT pg_stat_force_next_flush()")
        assert await rows(conn, query) == [{"n_tup_upd": 100, "n_tup_hot_upd": 70}]

    run(dsn, test)


def test_a_page_full_of_jobs_has_room_for_the_completion_of_each(dsn: str) -> None:
    """A row grows by what its completion adds; a fillfactor that leaves too little costs an entry in the index."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        await conn.execute("ALTER TABLE roost.job_rows SET (autovacuum_enabled = false)")
        jobs = await claimed(conn, worker_id, 400)
        await complete(conn, jobs)
        await conn.execute("SELECT pg_stat_force_next_flush()")
        query = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_all_tables WHERE relid = 'roost.job_rows'::regclass"
        assert await rows(conn, query) == [{"n_tup_upd": 400, "n_tup_hot_upd": 400}]

    run(dsn, test)


def test_overlapping_batches_in_opposite_order_never_deadlock(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        ids = await enqueue(conn, 60)
        chance = random.Random(7)
        async with await connect(clean_dsn) as one, await connect(clean_dsn) as two, await connect(clean_dsn) as three:
            for c in (one, two, three):
                await c.execute("SET deadlock_timeout = '20ms'")

            async def meddle() -> None:
                for job_id in chance.sample(ids, 20):
                    await three.execute("SELECT roost.cancel(%s)", (job_id,))
                for job_id in chance.sample(ids, 20):
                    await three.execute("SELECT roost.retry(%s)", (job_id,))

            async def end(c: Conn, jobs: list[ClaimedJob], completes: bool, looks: bool = False) -> None:
                if looks:
                    async with c.transaction():
                        locked = await lock_claims(c, jobs)
                        await end(c, [job for job in jobs if job.lease not in locked], completes)
                elif completes:
                    await complete(c, jobs)
                else:
                    await settle(c, *(settlement(j.id, j.lease, RETRYABLE, error="e") for j in jobs))

            for number in range(60):
                jobs = await claim(conn, worker_id)
                await asyncio.gather(
                    end(one, jobs, number % 3 == 0, number % 2 == 0),
                    end(two, jobs[::-1], number % 3 == 1),
                    meddle(),
                )
                await assert_each_job_is_in_its_place(conn)
                # Whatever has ended starts over, so that every round has jobs to fight for.
                await conn.execute(
                    "UPDATE roost.job_rows SET state = 'discarded', completed_at = NULL, discarded_at = now()"
                    " WHERE state = 'completed'"
                )
                await conn.execute("SELECT roost.retry(id) FROM roost.job_rows")

    run(clean_dsn, test)
