"""What follows a job's end: its key is free, its dependents are told, and neither waits for what another holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest

from roost_client import HandlerRegistry, JobInsert, JobState
from roost_client import statements as client_statements
from roostd.core.lifecycle import CANCELLED, COMPLETED, DISCARDED, RETRYABLE
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
    async def main() -> None:
        async with await connect(dsn) as conn:
            await test(conn, await add_worker(conn))
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


async def one(conn: Conn, **columns: Any) -> int:
    (job_id,) = await enqueue(conn, **columns)
    return job_id


async def complete_next(conn: Conn, worker_id: UUID, limit: int = 100) -> tuple[list[int], list[int]]:
    """The jobs that could be claimed and were completed, and those that are to be followed."""
    jobs = await claim(conn, worker_id, limit)
    _, parents = await statements.complete(conn, [job.id for job in jobs], [job.lease for job in jobs], [])
    return [job.id for job in jobs], parents


async def end_next(conn: Conn, worker_id: UUID, state: JobState, delay: float = 0.0) -> list[int]:
    jobs = await claim(conn, worker_id)
    _, parents = await statements.settle(conn, [settlement(j.id, j.lease, state, delay, error="no") for j in jobs], CAP)
    return parents


async def follow(conn: Conn, only: list[int] | None = None) -> tuple[int, int]:
    """Follows until there is no more to tell: how many were told, and of how many parents some were held at last."""
    told = 0
    while True:
        more, held, parents = await statements.follow_parents(conn, only)
        only = only and [*only, *parents]
        told += more
        if not more:
            return told, len(held)


# -- keys


@pytest.mark.parametrize("state", [COMPLETED, DISCARDED, CANCELLED])
def test_the_end_of_a_job_frees_its_key(clean_dsn: str, state: JobState) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        await enqueue(conn, unique_key="k")
        if state is COMPLETED:
            await complete_next(conn, worker_id)
        else:
            await end_next(conn, worker_id, state)
        assert await rows(conn, "SELECT * FROM roost.unique_keys") == []
        await enqueue(conn, unique_key="k")

    run(clean_dsn, test)


def test_a_job_that_is_to_run_again_keeps_its_key(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        job_id = await one(conn, unique_key="k")
        await end_next(conn, worker_id, RETRYABLE)
        assert await value(conn, "SELECT job_id FROM roost.unique_keys") == job_id

    run(clean_dsn, test)


def test_a_rescue_that_discards_frees_the_key(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        await enqueue(conn, unique_key="last", max_attempts=1)
        await enqueue(conn, unique_key="again", max_attempts=2)
        await claim(conn, worker_id)
        await statements.remove_workers(conn, [worker_id])
        await statements.rescue(conn, reason="gone", error_cap=CAP)
        assert await value(conn, "SELECT array_agg(unique_key) FROM roost.unique_keys") == ["again"]

    run(clean_dsn, test)


def test_a_late_completion_does_not_free_the_key_of_the_next_job(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        await enqueue(conn, unique_key="k")
        (late,) = await claim(conn, worker_id)
        await statements.settle(conn, [settlement(late.id, late.lease, DISCARDED)], CAP)
        second = await one(conn, unique_key="k")
        assert await statements.complete(conn, [late.id], [late.lease], []) == (set(), [])
        assert await value(conn, "SELECT job_id FROM roost.unique_keys") == second

    run(clean_dsn, test)


# -- dependents


def test_a_job_runs_when_the_last_of_its_parents_has_completed(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parents = await enqueue(conn, 3)
        child = await one(conn, depends_on=parents)
        for left in (2, 1, 0):
            (done,), followed = await complete_next(conn, worker_id, 1)
            assert followed == [done]
            assert await statements.follow_parents(conn, followed) == (1, [], [])
            assert list(await places(conn, child)) == (["blocked"] if left else ["ready"])
        assert (await complete_next(conn, worker_id))[0] == [child]
        for table in ("blocked", "dependencies", "ended_parents"):
            assert await value(conn, f"SELECT count(*) FROM roost.{table}".encode()) == 0

    run(clean_dsn, test)


def test_a_released_job_is_due_when_it_was_to_be(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        later = await one(conn, depends_on=[parent], scheduled_at="2200-01-01Z", priority=5)
        await complete_next(conn, worker_id)
        await follow(conn)
        place = (await places(conn, later))["scheduled"]
        assert (place["priority"], place["scheduled_at"]) == (5, (await job_row(conn, later))["scheduled_at"])

    run(clean_dsn, test)


def test_a_parent_that_is_to_run_again_is_still_waited_for(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        child = await one(conn, depends_on=[await one(conn)])
        assert await end_next(conn, worker_id, RETRYABLE) == []
        assert await follow(conn) == (0, 0)
        assert list(await places(conn, child)) == ["blocked"]

    run(clean_dsn, test)


@pytest.mark.parametrize("how", ["discarded", "cancelled", "rescued", "cancelled by the application"])
def test_a_dead_parent_cancels_all_that_depend_on_it_all_the_way_down(clean_dsn: str, how: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn, max_attempts=1)
        children = await enqueue(conn, 3, depends_on=[parent], unique_key=None)
        down = [await one(conn, depends_on=children, unique_key="k")]
        for _ in range(4):
            down.append(await one(conn, depends_on=[down[-1]]))
        other = await one(conn)
        mixed = await one(conn, depends_on=[other, down[-1]])
        await conn.execute("DELETE FROM roost.ready WHERE job_id = %s", (other,))
        match how:
            case "discarded":
                assert await end_next(conn, worker_id, DISCARDED) == [parent]
            case "cancelled":
                assert await end_next(conn, worker_id, CANCELLED) == [parent]
            case "rescued":
                await claim(conn, worker_id)
                await statements.remove_workers(conn, [worker_id])
                await statements.rescue(conn, reason="gone", error_cap=CAP)
            case _:
                await conn.execute("SELECT roost.cancel(%s)", (parent,))
        state = "discarded" if how in ("discarded", "rescued") else "cancelled"
        assert await follow(conn, None) == (3 + 3 + 4 + 1, 0)
        for job_id in (*children, *down, mixed):
            assert await public_state(conn, job_id) is CANCELLED
        (error,) = (await job_row(conn, children[1]))["errors"]
        assert error["error"] == f"DependencyFailed: job {parent}, on which this one depends, was {state}"
        assert await value(conn, "SELECT count(*) FROM roost.unique_keys") == 0
        assert await value(conn, "SELECT count(*) FROM roost.ended_parents") == 0
        await conn.execute(
            "INSERT INTO roost.ready SELECT queue, priority, scheduled_at, id FROM roost.job_rows WHERE id = %s",
            (other,),
        )
        await complete_next(conn, worker_id)
        await follow(conn)
        assert await public_state(conn, mixed) is CANCELLED

    run(clean_dsn, test)


def test_a_cascade_that_is_followed_parent_by_parent_names_the_next(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        await one(conn, depends_on=[child])
        followed = await end_next(conn, worker_id, DISCARDED)
        assert await statements.follow_parents(conn, followed) == (1, [], [child])
        assert await statements.follow_parents(conn, [child]) == (1, [], [])

    run(clean_dsn, test)


def test_a_wide_fan_out_is_told_in_batches(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        await enqueue(conn, 2500, depends_on=[parent])
        _, followed = await complete_next(conn, worker_id)
        assert [(await statements.follow_parents(conn, followed))[0] for _ in range(4)] == [1000, 1000, 500, 0]
        assert await value(conn, "SELECT count(*) FROM roost.ready") == 2500

    run(clean_dsn, test)


def test_a_job_that_was_retried_before_its_dependents_were_told_is_still_waited_for(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        await end_next(conn, worker_id, DISCARDED)
        await conn.execute("SELECT roost.retry(%s)", (parent,))
        assert await follow(conn) == (0, 0)
        assert list(await places(conn, child)) == ["blocked"]
        await complete_next(conn, worker_id)
        assert await follow(conn) == (1, 0)
        assert list(await places(conn, child)) == ["ready"]

    run(clean_dsn, test)


def test_a_parent_that_ends_while_a_revived_child_waits_again_counts_once(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        dead, slow = await one(conn, queue="other"), await one(conn)
        child = await one(conn, depends_on=[dead, slow])
        await conn.execute("SELECT roost.cancel(%s)", (dead,))
        await follow(conn)
        await complete_next(conn, worker_id)  # of `slow` the child, cancelled by now, has not been told
        await conn.execute("SELECT roost.retry(%s, true)", (dead,))
        assert (await places(conn, child))["blocked"]["parents_left"] == 1
        await follow(conn)
        assert list(await places(conn, child)) == ["blocked"]

    run(clean_dsn, test)


# -- beside open transactions


def test_a_parent_whose_end_is_being_depended_on_is_written_after_that(clean_dsn: str) -> None:
    """The enqueue saw it run, so its end must see the enqueue."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        await enqueue(conn, 2)
        jobs = await claim(conn, worker_id)
        ids, leases = [job.id for job in jobs], [job.lease for job in jobs]
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                child = await one(application, depends_on=ids[:1])
                await conn.execute("SET lock_timeout = '50ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    await statements.complete(conn, ids, leases, [])
                async with conn.transaction():
                    assert await statements.lock_claims(conn, ids, leases) == {leases[0]}
                    assert await statements.complete(conn, ids[1:], leases[1:], []) == ({leases[1]}, [])
        assert await statements.complete(conn, ids, leases, []) == ({leases[0]}, ids[:1])
        assert await follow(conn) == (1, 0)
        assert list(await places(conn, child)) == ["ready"]

    run(clean_dsn, test)


def test_a_rescue_passes_over_a_job_that_is_being_depended_on(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        (parent, other) = await enqueue(conn, 2)
        await claim(conn, worker_id)
        await statements.remove_workers(conn, [worker_id])
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                await one(application, depends_on=[parent])
                assert await statements.rescue(conn, reason="gone", error_cap=CAP) == {other: RETRYABLE}
        assert await statements.rescue(conn, reason="gone", error_cap=CAP) == {parent: RETRYABLE}

    run(clean_dsn, test)


def test_a_child_that_another_transaction_cancels_is_passed_over_and_told_later(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        held, free = await enqueue(conn, 2, depends_on=[parent])
        await complete_next(conn, worker_id)
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                await application.execute("SELECT roost.cancel(%s)", (held,))
                assert await follow(conn, [parent]) == (1, 1)
                assert list(await places(conn, free)) == ["ready"]
                await application.execute("SELECT 1")
                raise psycopg.Rollback
        assert await follow(conn, [parent]) == (1, 0)
        assert list(await places(conn, held)) == ["ready"]

    run(clean_dsn, test)


def test_a_child_that_is_to_be_cancelled_and_is_being_depended_on_is_told_later(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                grandchild = await one(application, depends_on=[child])
                await end_next(conn, worker_id, DISCARDED)
                assert await follow(conn, [parent]) == (0, 1)
        assert await follow(conn) == (2, 0)
        assert await public_state(conn, grandchild) is CANCELLED

    run(clean_dsn, test)


def test_a_child_that_is_being_retried_holds_up_nobody(clean_dsn: str) -> None:
    """Its retry takes away what is left of edges, and the transaction stays open."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        dead, parent = await one(conn, queue="other"), await one(conn)
        child, other = await one(conn, depends_on=[dead, parent]), await one(conn, depends_on=[parent])
        await conn.execute("SELECT roost.cancel(%s)", (dead,))
        await follow(conn)
        await complete_next(conn, worker_id)
        async with await connect(clean_dsn) as operator:
            async with operator.transaction():
                await operator.execute("SELECT roost.retry(%s, true)", (dead,))
                await conn.execute("SET lock_timeout = '1s'")
                assert (await follow(conn, [parent]))[0] == 1
                assert list(await places(conn, other)) == ["ready"]
        await follow(conn)
        assert list(await places(conn, child)) == ["blocked"]

    run(clean_dsn, test)


def test_a_child_that_is_to_run_and_is_being_depended_on_does_not_wait_for_that(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                await one(application, depends_on=[child])
                await complete_next(conn, worker_id)
                assert await follow(conn, [parent]) == (1, 0)
                assert list(await places(conn, child)) == ["ready"]

    run(clean_dsn, test)


def test_workers_that_end_parents_of_one_job_at_once_release_it_once(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parents = await enqueue(conn, 400)
        children = [await one(conn, depends_on=parents[n::4]) for n in range(4)] + [await one(conn, depends_on=parents)]
        jobs = await claim(conn, worker_id, 400)

        async def work(mine: list[Any]) -> None:
            async with await connect(clean_dsn) as own:
                for at in range(0, len(mine), 10):
                    batch = mine[at : at + 10]
                    _, followed = await statements.complete(own, [j.id for j in batch], [j.lease for j in batch], [])
                    await follow(own, followed)
                    await assert_no_child_is_early(own)

        async def assert_no_child_is_early(own: Conn) -> None:
            early = """
            SELECT r.job_id FROM roost.ready r JOIN roost.job_rows c ON c.id = r.job_id
             WHERE EXISTS (SELECT 1 FROM roost.job_rows p WHERE p.id = ANY (c.depends_on) AND p.state <> 'completed')
            """
            assert await rows(own, early) == []

        await asyncio.gather(*(work(jobs[n::4]) for n in range(4)))
        await follow(conn)
        for child in children:
            assert list(await places(conn, child)) == ["ready"]

    run(clean_dsn, test)


def test_following_needs_no_more_than_indexes(clean_dsn: str) -> None:
    """A claim and an empty look at ended parents cost the same beside 20,000 blocked jobs as beside none."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        async def blocks(query: str) -> int:
            plan = await value(conn, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}".encode())
            return int(plan[0]["Plan"]["Shared Hit Blocks"] + plan[0]["Plan"]["Shared Read Blocks"])

        look = "SELECT * FROM roost.follow_parents()"
        await conn.execute("SELECT nextval('roost.dependents_seq')")
        empty = [await blocks(look) for _ in range(3)][-1]
        parent = await one(conn, queue="other")
        await enqueue(conn, 20_000, depends_on=[parent])
        assert [await blocks(look) for _ in range(3)][-1] <= empty + 5
        await conn.execute("TRUNCATE roost.job_rows, roost.ready, roost.blocked, roost.dependencies")

    run(clean_dsn, test)


# -- beside other changes of the same jobs


async def until_waiting(conn: Conn, waiters: int, *tasks: asyncio.Task[Any]) -> None:
    """Until so many other sessions wait for a lock, or one of the tasks is done."""
    query = "SELECT count(DISTINCT l.pid) FROM pg_locks l WHERE NOT l.granted"
    async with asyncio.timeout(30):
        while await value(conn, query) < waiters and not any(task.done() for task in tasks):
            await asyncio.sleep(0.01)


def test_a_parent_is_not_retried_while_its_dependents_are_told_of_its_end(clean_dsn: str) -> None:
    """Or what has been decided by its end would meet a parent that lives."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        await end_next(conn, worker_id, DISCARDED)
        async with (
            await connect(clean_dsn) as blocker,
            await connect(clean_dsn) as worker,
            await connect(clean_dsn) as operator,
        ):
            async with blocker.transaction():  # in the middle of the telling
                await blocker.execute("INSERT INTO roost.cancelled_dependents VALUES (%s, %s)", (parent, child))
                telling = asyncio.create_task(statements.follow_parents(worker))
                await until_waiting(conn, 1)
                retrying = asyncio.create_task(operator.execute("SELECT roost.retry(%s)", (parent,)))
                await until_waiting(conn, 2, retrying)
                raise psycopg.Rollback
            assert await telling == (1, [], [])
            await retrying
        assert await public_state(conn, parent) is JobState.AVAILABLE
        assert await public_state(conn, child) is CANCELLED

    run(clean_dsn, test)


def test_the_end_of_a_parent_that_was_retried_is_told_whoever_looks_meanwhile(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        await end_next(conn, worker_id, DISCARDED)
        await conn.execute("SELECT roost.retry(%s)", (parent,))
        async with await connect(clean_dsn) as other:
            async with conn.transaction():
                await complete_next(conn, worker_id)
                assert await follow(other) == (0, 0)
        assert await follow(conn) == (1, 0)
        assert list(await places(conn, child)) == ["ready"]

    run(clean_dsn, test)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("end", ["SELECT roost.cancel(%s)", "SELECT roost.complete(%s, lease) FROM roost.claims"])
def test_an_end_by_an_old_snapshot_is_told_to_dependents_that_it_does_not_show(
    clean_dsn: str, isolation: str, end: str
) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        await conn.execute("SELECT nextval('roost.dependents_seq')")
        parent = await one(conn)
        if "complete" in end:
            await claim(conn, worker_id)
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                await application.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
                await application.execute("SELECT 1 FROM roost.job_rows")  # has the snapshot taken
                child = await one(conn, depends_on=[parent])
                await application.execute(end.encode(), (parent,))
        assert await follow(conn) == (1, 0)
        assert await public_state(conn, child) is (JobState.AVAILABLE if "complete" in end else CANCELLED)
        assert await value(conn, "SELECT count(*) FROM roost.ended_parents") == 0

    run(clean_dsn, test)


def test_two_dead_parents_of_one_job_are_retried_at_once(clean_dsn: str) -> None:
    """Each with its dependents: neither may wait for what the other has locked while that waits for it."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        parents = await enqueue(conn, 2)
        child = await one(conn, depends_on=parents)
        await end_next(conn, worker_id, DISCARDED)
        await follow(conn)
        async with await connect(clean_dsn) as blocker, await connect(clean_dsn) as a, await connect(clean_dsn) as b:
            async with blocker.transaction():
                await blocker.execute("SELECT 1 FROM roost.job_rows WHERE id = %s FOR UPDATE", (child,))
                retries = []
                for number, (operator, parent) in enumerate(zip((a, b), parents, strict=True), 1):
                    retries.append(asyncio.create_task(operator.execute("SELECT roost.retry(%s, true)", (parent,))))
                    await until_waiting(conn, number)
            await asyncio.gather(*retries)
        assert list(await places(conn, child)) == ["blocked"]

    run(clean_dsn, test)


def test_a_job_is_retried_while_its_dead_parent_is_retried_with_it(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parent = await one(conn)
        child = await one(conn, depends_on=[parent])
        await end_next(conn, worker_id, DISCARDED)
        await follow(conn)
        async with await connect(clean_dsn) as blocker, await connect(clean_dsn) as a, await connect(clean_dsn) as b:
            async with blocker.transaction():
                await blocker.execute("SELECT 1 FROM roost.job_rows WHERE id = %s FOR UPDATE", (child,))
                alone = asyncio.create_task(a.execute("SELECT roost.retry(%s)", (child,)))
                await until_waiting(conn, 1)
                with_child = asyncio.create_task(b.execute("SELECT roost.retry(%s, true)", (parent,)))
                await until_waiting(conn, 2)
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
                await alone
            await with_child
        assert list(await places(conn, child)) == ["blocked"]

    run(clean_dsn, test)


# -- plans


async def fetched(conn: Conn, call: Awaitable[Any], *tables: str) -> int:
    """How many rows of these tables a call fetches by indexes, or reads in full."""
    query = """
    SELECT coalesce(sum(idx_tup_fetch + seq_tup_read), 0) FROM pg_stat_xact_user_tables
     WHERE schemaname = 'roost' AND relname = ANY (%s)
    """
    async with conn.transaction():
        before = await value(conn, query, list(tables))  # of transactions that have not been reported yet
        await call
        return int(await value(conn, query, list(tables)) - before)


@pytest.mark.parametrize("end", [COMPLETED, DISCARDED])
def test_a_batch_is_told_by_key_where_an_analyze_found_the_tables_emptied(clean_dsn: str, end: JobState) -> None:
    """It takes them for tables without rows then, whose every row is as soon read as one."""

    async def test(conn: Conn, worker_id: UUID) -> None:
        async def fan_out() -> list[int]:
            parent = await one(conn)
            await enqueue(conn, 3000, depends_on=[parent], queue="other")
            return (
                (await complete_next(conn, worker_id))[1] if end is COMPLETED else await end_next(conn, worker_id, end)
            )

        await fan_out()
        await follow(conn)
        await conn.execute("ANALYZE roost.dependencies, roost.blocked, roost.ended_parents")
        parents = await fan_out()
        tell = conn.execute("SELECT roost.follow_parents(%s, 50)", (parents,))
        assert await fetched(conn, tell, "dependencies", "blocked", "ended_parents") < 1000
        await follow(conn)

    run(clean_dsn, test)


def test_keys_are_freed_by_key_where_an_analyze_found_the_table_emptied(clean_dsn: str) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        for _ in range(2):
            jobs = [JobInsert("a", unique_key=str(number)) for number in range(3000)]
            statement = client_statements.enqueue_many(HandlerRegistry(), jobs)
            await conn.execute(statement.sql, statement.parameters)
            claimed = await claim(conn, worker_id, 3000)
            complete = statements.complete(conn, [j.id for j in claimed[:20]], [j.lease for j in claimed[:20]], [])
            read = await fetched(conn, complete, "unique_keys")
            await statements.complete(conn, [j.id for j in claimed[20:]], [j.lease for j in claimed[20:]], [])
            await conn.execute("ANALYZE roost.unique_keys")
        assert read < 200

    run(clean_dsn, test)


@pytest.mark.parametrize("end", [COMPLETED, DISCARDED])
def test_more_children_than_a_batch_that_are_held_keep_no_others_from_being_told(clean_dsn: str, end: JobState) -> None:
    async def test(conn: Conn, worker_id: UUID) -> None:
        parents = await enqueue(conn, 2)
        held = await enqueue(conn, 15, depends_on=parents[:1])
        other = await one(conn, depends_on=parents[1:])
        async with await connect(clean_dsn) as application:
            async with application.transaction():
                if end is COMPLETED:
                    await application.execute("SELECT roost.cancel(id) FROM unnest(%s) AS h(id)", (held,))
                    await complete_next(conn, worker_id)
                else:  # what is to be cancelled is held by who depends on it, too
                    await one(application, depends_on=held, queue="elsewhere")
                    await end_next(conn, worker_id, end)
                assert await value(conn, "SELECT told FROM roost.follow_parents(%s, 10)", parents) == 1
                assert await public_state(conn, other) is (JobState.AVAILABLE if end is COMPLETED else CANCELLED)
        await follow(conn)

    run(clean_dsn, test)
