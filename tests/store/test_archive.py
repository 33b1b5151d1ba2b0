"""Jobs move to the archive whole and once, and only those that nobody needs where they are; where to look is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest

from roost_client import Job, JobState
from roostd.store import statements
from tests.store.rows import (
    CAP,
    Conn,
    add_worker,
    claim,
    connect,
    enqueue,
    public_state,
    rows,
    settlement,
    value,
)

HOUR = 3600.0
SPAN_SIZE = 10_000


def on_database(test: Callable[[Conn], Awaitable[None]]) -> Any:
    """The test with a connection to an empty database."""

    def run(dsn: str) -> None:
        async def main() -> None:
            async with await connect(dsn) as conn:
                await test(conn)

        asyncio.run(main())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


async def end_all(conn: Conn, state: JobState = JobState.COMPLETED, *, hours_ago: float = 2) -> None:
    """Ends every job that is due, and lets hours pass."""
    worker_id = await add_worker(conn)
    while jobs := await claim(conn, worker_id, limit=1000):
        if state is JobState.COMPLETED:
            results = [json.dumps({"n": job.id}) for job in jobs]
            await statements.complete(conn, [job.id for job in jobs], [job.lease for job in jobs], results)
        else:
            await statements.settle(conn, [settlement(job.id, job.lease, state, error="boom") for job in jobs], CAP)
    await conn.execute(
        "UPDATE roost.job_rows SET completed_at = completed_at - h, discarded_at = discarded_at - h,"
        " cancelled_at = cancelled_at - h FROM (SELECT make_interval(secs => 3600 * %s) AS h) AS hours",
        (hours_ago,),
    )


async def ids(conn: Conn, table: str) -> list[int]:
    query: Any = f"SELECT id FROM roost.{table} ORDER BY id"
    return [row["id"] for row in await rows(conn, query)]


@on_database
async def test_a_job_is_in_the_archive_as_it_was(conn: Conn) -> None:
    await enqueue(conn, args='{"a": 1}', tags=["x"], metadata='{"m": 1}', unique_key="k", priority=3, timeout_seconds=5)
    await enqueue(conn)
    await end_all(conn)
    await enqueue(conn)
    await end_all(conn, JobState.DISCARDED)
    fields = ", ".join([*Job.model_fields, "crashes"])
    in_view: Any = f"SELECT {fields} FROM roost.jobs ORDER BY id"
    in_archive: Any = f"SELECT {fields} FROM roost.jobs_archive ORDER BY id"
    before = await rows(conn, in_view)
    assert await statements.archive(conn, 0, HOUR) == 3
    assert await rows(conn, in_view) == []
    assert await rows(conn, in_archive) == before
    assert [row["state"] for row in before] == ["completed", "completed", "discarded"]


@on_database
async def test_what_has_not_ended_or_not_for_long_stays(conn: Conn) -> None:
    old = await enqueue(conn, 2)
    await end_all(conn)
    young = await enqueue(conn, 2)
    await end_all(conn, hours_ago=0)
    waiting = await enqueue(conn, 2) + await enqueue(conn, scheduled_at="2200-01-01Z")
    assert await statements.archive(conn, 1, HOUR) == 0  # another span
    assert await statements.archive(conn, 0, HOUR) == 2
    assert await ids(conn, "jobs_archive") == old
    assert await ids(conn, "job_rows") == young + waiting


@on_database
async def test_a_batch_is_a_thousand(conn: Conn) -> None:
    await enqueue(conn, 2500)
    await end_all(conn)
    assert [await statements.archive(conn, 0, HOUR) for _ in range(4)] == [1000, 1000, 500, 0]
    assert len(await ids(conn, "jobs_archive")) == 2500


def test_two_at_a_time_share_the_work_and_one_that_dies_has_moved_nothing(dsn: str) -> None:
    async def main() -> None:
        async with await connect(dsn) as one, await connect(dsn) as other:
            await enqueue(one, 1500)
            await end_all(one)
            async with one.transaction(force_rollback=True):
                assert await statements.archive(one, 0, HOUR) == 1000
                assert await statements.archive(other, 0, HOUR) == 500
                assert await statements.archive(other, 0, HOUR) == 0
            assert len(await ids(one, "jobs_archive")) == 500
            assert await statements.archive(other, 0, HOUR) == 1000
            assert len(await ids(one, "jobs_archive")) == 1500
            assert await ids(one, "job_rows") == []

    asyncio.run(main())


# Dependencies


@on_database
async def test_a_parent_stays_until_its_dependents_have_been_told(conn: Conn) -> None:
    parents = await enqueue(conn, 2)
    (child,) = await enqueue(conn, depends_on=parents)
    await end_all(conn)
    assert await public_state(conn, child) == "available"
    assert await statements.archive(conn, 0, HOUR) == 0
    await statements.follow_parents(conn)
    assert await statements.archive(conn, 0, HOUR) == 2
    assert [job.id for job in await claim(conn, await add_worker(conn))] == [child]


@on_database
async def test_an_archived_parent_counts_as_what_it_was(conn: Conn) -> None:
    (good,) = await enqueue(conn)
    await end_all(conn)
    (bad,) = await enqueue(conn)
    await end_all(conn, JobState.DISCARDED)
    assert await statements.archive(conn, 0, HOUR) == 2
    (after_good,) = await enqueue(conn, depends_on=[good])
    (after_bad,) = await enqueue(conn, depends_on=[good, bad])
    assert await value(conn, "SELECT count(*) FROM roost.ready WHERE job_id = %s", after_good) == 1
    assert await public_state(conn, after_bad) == "cancelled"
    (row,) = await rows(conn, "SELECT errors FROM roost.jobs WHERE id = %s", after_bad)
    assert f"job {bad}, on which this one depends, was discarded" in row["errors"][0]["error"]
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        await enqueue(conn, depends_on=[4711])


def test_a_parent_that_is_archived_while_an_enqueue_waits_for_it_is_found(dsn: str) -> None:
    async def main() -> None:
        async with await connect(dsn) as one, await connect(dsn) as other:
            (parent,) = await enqueue(one)
            await end_all(one)
            async with one.transaction():
                assert await statements.archive(one, 0, HOUR) == 1
                enqueuing = asyncio.create_task(enqueue(other, depends_on=[parent]))
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = %s"
                while not await value(one, waiting, other.info.backend_pid):
                    await asyncio.sleep(0.01)
            (child,) = await enqueuing
            assert await value(one, "SELECT count(*) FROM roost.ready WHERE job_id = %s", child) == 1

    asyncio.run(main())


def test_a_job_that_an_enqueue_has_locked_stays(dsn: str) -> None:
    async def main() -> None:
        async with await connect(dsn) as one, await connect(dsn) as other:
            (parent,) = await enqueue(one)
            await end_all(one)
            async with other.transaction():
                await enqueue(other, depends_on=[parent])
                assert await statements.archive(one, 0, HOUR) == 0
            assert await statements.archive(one, 0, HOUR) == 1

    asyncio.run(main())


@on_database
async def test_what_an_archived_job_has_cancelled_is_forgotten(conn: Conn) -> None:
    (parent,) = await enqueue(conn)
    await enqueue(conn, 3, depends_on=[parent])
    await end_all(conn, JobState.DISCARDED)
    await statements.follow_parents(conn)
    assert await value(conn, "SELECT count(*) FROM roost.cancelled_dependents") == 3
    assert await statements.archive(conn, 0, HOUR) == 1  # the others were cancelled just now
    assert await value(conn, "SELECT count(*) FROM roost.cancelled_dependents") == 0
    await end_all(conn)
    assert await statements.archive(conn, 0, HOUR) == 3
    await enqueue(conn, depends_on=[parent])  # dead at once
    assert await value(conn, "SELECT count(*) FROM roost.cancelled_dependents") == 1
    await end_all(conn)
    assert await statements.archive(conn, 0, HOUR) == 1
    assert await value(conn, "SELECT count(*) FROM roost.cancelled_dependents") == 0


# Results


@on_database
async def test_old_results_are_cleared_wherever_they_are(conn: Conn) -> None:
    old = await enqueue(conn, 3)
    await end_all(conn)
    await statements.archive(conn, 0, HOUR)
    await enqueue(conn, 3)
    await end_all(conn)
    await enqueue(conn, 2)
    await end_all(conn, hours_ago=0)
    assert await statements.clear_results(conn, 0, HOUR) == 3
    assert await statements.clear_archived_results(conn, HOUR) == 3
    assert await statements.clear_results(conn, 0, HOUR) == await statements.clear_archived_results(conn, HOUR) == 0
    left = await rows(conn, "SELECT id FROM roost.job_rows WHERE result IS NOT NULL")
    assert [row["id"] for row in left] == [7, 8]
    assert await value(conn, "SELECT count(*) FROM roost.jobs_archive WHERE result IS NULL") == len(old)


@on_database
async def test_clearing_a_result_is_a_hot_update(conn: Conn) -> None:
    await enqueue(conn, 20)
    await end_all(conn)
    counts = "SELECT n_tup_upd - n_tup_hot_upd AS cold, n_tup_upd FROM pg_stat_user_tables WHERE relname = 'job_rows'"

    async def updates() -> dict[str, Any]:
        await conn.execute("SELECT pg_stat_force_next_flush()" if conn.info.server_version >= 150000 else "SELECT 1")
        (row,) = await rows(conn, counts)
        return row

    before = await updates()
    assert await statements.clear_results(conn, 0, HOUR) == 20
    while (after := await updates())["n_tup_upd"] < before["n_tup_upd"] + 20:
        await asyncio.sleep(0.05)
    assert after["cold"] == before["cold"]


# The end of the archive


@on_database
async def test_what_was_archived_long_ago_is_deleted_the_oldest_first(conn: Conn) -> None:
    await enqueue(conn, 1200)
    await end_all(conn)
    while await statements.archive(conn, 0, HOUR):
        pass
    young = (await ids(conn, "jobs_archive"))[-50:]
    await conn.execute(
        "UPDATE roost.jobs_archive SET archived_at = archived_at - make_interval(hours => 3, secs => -id)"
        " WHERE id < %s",
        (young[0],),
    )
    deleted, last_at = await statements.delete_archived(conn, HOUR)
    assert deleted == 1000
    assert (await ids(conn, "jobs_archive"))[0] == 1001
    assert (await statements.delete_archived(conn, HOUR, last_at))[0] == 150
    assert await statements.delete_archived(conn, HOUR, last_at) == (0, None)
    assert await ids(conn, "jobs_archive") == young


# Where to look


async def due(conn: Conn, archive_after: float | None = HOUR, result_ttl: float | None = None) -> list[int]:
    spans, _ = await statements.list_spans(conn, archive_after=archive_after, result_ttl=result_ttl)
    return spans


async def look_at_all(conn: Conn) -> None:
    for span in await due(conn):
        await statements.look_at_span(conn, span)
    assert await due(conn) == []


async def pass_time(conn: Conn, hours: float) -> None:
    await conn.execute(
        "UPDATE roost.spans SET looked_at = looked_at - h, oldest_end_at = oldest_end_at - h,"
        " oldest_result_at = oldest_result_at - h FROM (SELECT make_interval(secs => 3600 * %s) AS h) AS hours",
        (hours,),
    )


@on_database
async def test_new_ids_make_new_spans_that_are_looked_at(conn: Conn) -> None:
    assert await due(conn) == []
    await enqueue(conn)
    assert await due(conn) == [0]
    await statements.look_at_span(conn, 0)
    assert await due(conn) == []
    await conn.execute("SELECT setval('roost.job_rows_id_seq', %s)", (3 * SPAN_SIZE,))
    await enqueue(conn)
    assert await due(conn) == [1, 2, 3]


@on_database
async def test_nothing_is_read_of_jobs_that_are_too_young(conn: Conn) -> None:
    await enqueue(conn, 5)
    await end_all(conn, hours_ago=0.5)
    await conn.execute("SELECT setval('roost.job_rows_id_seq', %s)", (2 * SPAN_SIZE,))  # the span is full
    await enqueue(conn, scheduled_at="2200-01-01Z")
    await look_at_all(conn)
    await pass_time(conn, 0.4)
    assert await due(conn) == []
    await pass_time(conn, 0.2)
    assert await due(conn) == [0]
    assert await due(conn, 2 * HOUR) == []
    assert await due(conn, None) == []


@on_database
async def test_a_span_of_jobs_that_may_end_is_looked_at_when_one_could_be_old_enough(conn: Conn) -> None:
    await enqueue(conn, scheduled_at="2200-01-01Z")
    await conn.execute("SELECT setval('roost.job_rows_id_seq', %s)", (2 * SPAN_SIZE,))
    await look_at_all(conn)
    await pass_time(conn, 0.9)
    assert await due(conn) == []
    await pass_time(conn, 0.2)
    assert await due(conn) == [0, 2]  # in the last one, ids are yet to come; in 1 there is nothing
    assert await due(conn, None, 2 * HOUR) == []
    assert await due(conn, None, HOUR) == [0, 2]
    assert await due(conn, 24 * HOUR, HOUR) == [0, 2]


@on_database
async def test_a_span_with_nothing_in_it_is_looked_at_once_a_day(conn: Conn) -> None:
    """A transaction may have kept its ids to itself."""
    await enqueue(conn)
    await conn.execute("SELECT setval('roost.job_rows_id_seq', %s)", (2 * SPAN_SIZE,))
    await look_at_all(conn)
    await pass_time(conn, 23)
    assert 1 not in await due(conn)
    await pass_time(conn, 2)
    assert 1 in await due(conn)


@on_database
async def test_old_results_make_a_span_due(conn: Conn) -> None:
    await enqueue(conn, 2)
    await end_all(conn)
    await conn.execute("SELECT setval('roost.job_rows_id_seq', %s)", (2 * SPAN_SIZE,))
    for span in await due(conn):
        await statements.look_at_span(conn, span)
    assert await due(conn, None, 3 * HOUR) == []
    assert await due(conn, None, HOUR) == [0]
    await statements.clear_results(conn, 0, HOUR)
    await statements.look_at_span(conn, 0)
    assert await due(conn, None, HOUR) == []


@on_database
async def test_a_span_is_named_once_a_round_whatever_could_not_be_done_there(conn: Conn) -> None:
    await enqueue(conn, 2)
    await end_all(conn)
    spans, at = await statements.list_spans(conn, archive_after=HOUR, result_ttl=None)
    assert (spans, at is not None) == ([0], True)
    await statements.look_at_span(conn, 0)
    assert await statements.list_spans(conn, archive_after=HOUR, result_ttl=None, since=at) == ([], None)
    assert await due(conn) == [0]
