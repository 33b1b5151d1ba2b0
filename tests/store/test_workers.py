"""Workers' rows: registered, kept alive, declared dead; and what becomes of the claims of those that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest

from roost_client import JobState
from roostd.core.lifecycle import CANCELLED, DISCARDED, RETRYABLE
from roostd.store import statements
from roostd.store.statements import Beat, WorkerRow
from tests.store.rows import (
    Conn,
    add_worker,
    assert_each_job_is_in_its_place,
    claim,
    connect,
    enqueue,
    job_row,
    places,
    rows,
    settlement,
    value,
)


def run(dsn: str, test: Callable[[Conn], Awaitable[None]]) -> None:
    """Runs `test` with a connection, then looks whether every job is in its place."""

    async def main() -> None:
        async with await connect(dsn) as conn:
            await test(conn)
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


async def beat(conn: Conn, worker_id: UUID, **columns: Any) -> Beat | None:
    given: dict[str, Any] = {"inflight": 0, "queues": ["default"], "concurrency": 4, "metadata": {}}
    return await statements.heartbeat(conn, worker_id, **{**given, **columns})


async def rescue(conn: Conn) -> dict[int, JobState]:
    return await statements.rescue(conn, reason="gone", error_cap=10)


async def heard(conn: Conn) -> list[tuple[str, str]]:
    return [(n.channel, n.payload) async for n in conn.notifies(timeout=0)]


# -- rows


def test_a_registered_worker_is_found_by_its_host_until_it_is_removed(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        name = "it's \u00e9 {1}"
        metadata = {"boot_id": "x", "nested": {"a": [1]}}
        queues = ["a,b", '"', "\u00e9"]
        one = await add_worker(conn, name=name, hostname="h1", pid=1, queues=queues, concurrency=9, metadata=metadata)
        two = await add_worker(conn, hostname="h1", pid=1)
        other = await add_worker(conn, hostname="h2")
        await conn.execute("UPDATE roost.workers SET last_seen_at = now() - interval '90 s' WHERE id = %s", (two,))
        found = {row_id: (silent, kept) for row_id, silent, kept in await statements.list_workers_of_host(conn, "h1")}
        assert {row_id: kept for row_id, (_, kept) in found.items()} == {one: metadata, two: {}}
        assert 0 <= found[one][0] < 60
        assert 90 <= found[two][0] < 150
        (row,) = await rows(conn, "SELECT * FROM roost.workers WHERE id = %s", one)
        assert (row["name"], row["queues"], row["concurrency"], row["inflight"]) == (name, queues, 9, 0)
        assert row["started_at"] == row["last_seen_at"]
        await statements.remove_workers(conn, [one, other, uuid4()])
        assert [w[0] for w in await statements.list_workers_of_host(conn, "h1")] == [two]
        assert await statements.list_workers_of_host(conn, "h2") == []
        await statements.remove_workers(conn, [])

    run(clean_dsn, test)


def test_a_beat_writes_what_it_is_given_and_keeps_the_metadata_of_others(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id, other = await add_worker(conn, metadata={"a": 1, "b": 1}), await add_worker(conn)
        await conn.execute("UPDATE roost.workers SET last_seen_at = '2020-01-01Z'")
        await statements.answer_reload(conn, worker_id, {"ok": False, "error": "no"})
        answer = await beat(conn, worker_id, inflight=3, queues=["x"], concurrency=7, metadata={"b": 2})
        assert answer is not None
        assert answer == Beat(None, False, frozenset(), (), answer.now)
        (row,) = await rows(conn, "SELECT *, now() - last_seen_at AS age FROM roost.workers WHERE id = %s", worker_id)
        assert (row["inflight"], row["queues"], row["concurrency"]) == (3, ["x"], 7)
        assert row["metadata"] == {"a": 1, "b": 2, "reload": {"ok": False, "error": "no"}}
        assert row["age"].total_seconds() < 60
        query = "SELECT last_seen_at < '2020-01-02Z' AND metadata = '{}' FROM roost.workers WHERE id = %s"
        assert await value(conn, query, other)

    run(clean_dsn, test)


def test_a_beat_answers_what_a_lost_notification_may_have_kept_from_the_worker(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id, other = await add_worker(conn), await add_worker(conn)
        ids = await enqueue(conn, 4)
        await claim(conn, worker_id, 3)
        await claim(conn, other, 1)
        for job_id in (ids[0], ids[2], ids[3]):
            await conn.execute("SELECT roost.cancel(%s)", (job_id,))
        await conn.execute("INSERT INTO roost.queues (name, paused) VALUES ('p''1', true), ('p2', true), ('r', false)")
        request = uuid4()
        await conn.execute("UPDATE roost.workers SET reload_request = %s WHERE id = %s", (request, worker_id))

        answer = await beat(conn, worker_id)
        assert answer is not None
        assert answer.reload_request == request
        assert answer.paused == {"p'1", "p2"}
        assert sorted(answer.cancelled_jobs) == [ids[0], ids[2]]
        answer = await beat(conn, other)
        assert answer is not None
        assert answer == Beat(None, False, frozenset({"p'1", "p2"}), (ids[3],), answer.now)

    run(clean_dsn, test)


def test_the_beat_of_a_removed_worker_has_no_answer(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id = await add_worker(conn)
        await statements.remove_workers(conn, [worker_id])
        assert await beat(conn, worker_id) is None
        await statements.answer_reload(conn, worker_id, {"ok": True})
        assert await value(conn, "SELECT count(*) FROM roost.workers") == 0

    run(clean_dsn, test)


def test_workers_are_stale_by_the_database_s_clock(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        fresh, stale = await add_worker(conn), await add_worker(conn, name="n", hostname="h", pid=3)
        query = "UPDATE roost.workers SET last_seen_at = now() - interval '1 second' * %s WHERE id = %s"
        await conn.execute(query, (20, fresh))
        await conn.execute(query, (31, stale))
        assert await statements.remove_stale_workers(conn, 40.0) == []
        assert await statements.remove_stale_workers(conn, 30.5) == [WorkerRow(stale, "n", "h", 3)]
        assert await statements.remove_stale_workers(conn, 30.5) == []
        assert await beat(conn, stale) is None
        assert await beat(conn, fresh) is not None

    run(clean_dsn, test)


def test_a_beat_under_way_keeps_a_worker_from_being_declared_dead(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id = await add_worker(conn)
        await conn.execute("UPDATE roost.workers SET last_seen_at = '2020-01-01Z'")
        async with await connect(clean_dsn) as other:
            async with other.transaction():
                await beat(other, worker_id)
                assert await statements.remove_stale_workers(conn, 30.0) == []
        assert await statements.remove_stale_workers(conn, 30.0) == []

    run(clean_dsn, test)


# -- rescue


def test_claims_of_a_worker_without_a_row_are_freed_and_no_others(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        dead, alive = await add_worker(conn), await add_worker(conn)
        ids = await enqueue(conn, 2)
        (last,) = await enqueue(conn, max_attempts=1)
        (cancelled,) = await enqueue(conn, max_attempts=1)
        await conn.execute("UPDATE roost.job_rows SET crashes = 2")
        jobs = {job.id: job for job in await claim(conn, dead)}
        (kept,) = await enqueue(conn)
        await claim(conn, alive)
        await conn.execute("SELECT roost.cancel(%s)", (cancelled,))
        claims = {row["job_id"]: row for row in await rows(conn, "SELECT * FROM roost.claims")}
        assert await rescue(conn) == {}

        await statements.remove_workers(conn, [dead])
        before = await value(conn, "SELECT now()")
        expected = {ids[0]: RETRYABLE, ids[1]: RETRYABLE, last: DISCARDED, cancelled: CANCELLED}
        assert await rescue(conn) == expected
        for job_id, state in expected.items():
            row = await job_row(conn, job_id)
            assert (row["state"], row["attempt"], row["crashes"]) == (state, 1, 2)
            assert row["attempted_at"] == claims[job_id]["claimed_at"]
            assert row["scheduled_at"] >= before
            (entry,) = row["errors"]
            assert (entry["error"], entry["attempt"]) == ("WorkerCrash: gone", 1)
            assert list(await places(conn, job_id)) == (["ready"] if state is RETRYABLE else [])
        assert await rescue(conn) == {}
        assert list(await places(conn, kept)) == ["claims"]
        late = [jobs[job_id] for job_id in expected]
        assert await statements.complete(conn, [j.id for j in late], [j.lease for j in late], []) == (set(), [])

    run(clean_dsn, test)


def test_a_rescue_tells_the_idle_workers_of_the_queues_that_got_jobs(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id, idle = await add_worker(conn), await add_worker(conn)
        for queue in ("a", "b", "unheard", "finished"):
            await enqueue(conn, 3, queue=queue, max_attempts=1 if queue == "finished" else 5)
            await claim(conn, worker_id, queue=queue)
        await statements.set_idle(conn, idle, ["a", "b", "finished", "none"])
        await statements.remove_workers(conn, [worker_id])
        await conn.execute("LISTEN roost_inserted")
        assert len(await rescue(conn)) == 12
        assert sorted(await heard(conn)) == [("roost_inserted", "a"), ("roost_inserted", "b")]

    run(clean_dsn, test)


def test_rescues_at_once_share_the_work_a_thousand_at_a_time(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id = await add_worker(conn)
        await enqueue(conn, 2500)
        await claim(conn, worker_id, 2500)
        await statements.remove_workers(conn, [worker_id])
        async with await connect(clean_dsn) as other:
            async with other.transaction():
                first = await rescue(other)
                second = await rescue(conn)
                third = await rescue(conn)
                assert [len(r) for r in (first, second, third)] == [1000, 1000, 500]
                assert len({*first, *second, *third}) == 2500
            assert await rescue(conn) == {}
        assert await value(conn, "SELECT count(*) FROM roost.ready") == 2500

    run(clean_dsn, test)


def test_a_settlement_that_comes_before_the_rescue_wins(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id = await add_worker(conn)
        await enqueue(conn, 2)
        one, two = await claim(conn, worker_id)
        await statements.remove_workers(conn, [worker_id])
        async with await connect(clean_dsn) as other, other.transaction():
            await statements.complete(other, [one.id], [one.lease], ["1"])
            await statements.settle(other, [settlement(two.id, two.lease, DISCARDED, error="e")], 10)
            assert await rescue(conn) == {}
        assert await rescue(conn) == {}
        assert [row["state"] for row in await rows(conn, "SELECT state FROM roost.jobs ORDER BY id")] == [
            "completed",
            "discarded",
        ]

    run(clean_dsn, test)


def test_list_claims_shows_job_and_lease_of_one_worker(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        worker_id, other = await add_worker(conn), await add_worker(conn)
        await enqueue(conn, 5)
        jobs = await claim(conn, worker_id, 3)
        await claim(conn, other, 2)
        assert sorted(await statements.list_claims(conn, worker_id)) == [(job.id, job.lease) for job in jobs]
        assert await statements.list_claims(conn, uuid4()) == []

    run(clean_dsn, test)


# -- who wants to be told


async def _told(conn: Conn, queues: Sequence[str]) -> list[str]:
    await conn.execute("LISTEN roost_inserted")
    for queue in queues:
        await enqueue(conn, queue=queue)
    return [payload for _, payload in await heard(conn)]


def test_only_the_queues_of_idle_workers_are_told(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        one, two = await add_worker(conn), await add_worker(conn)
        assert await _told(conn, ["a", "b", "c"]) == []
        await statements.set_idle(conn, one, ["a", "it's"])
        await statements.set_idle(conn, two, ["a", "b"])
        assert await _told(conn, ["a", "b", "c", "it's"]) == ["a", "b", "it's"]
        await statements.set_idle(conn, one, ["c"])
        assert await _told(conn, ["a", "b", "c", "it's"]) == ["a", "b", "c"]
        await statements.set_idle(conn, two, [])
        assert await _told(conn, ["a", "b", "c"]) == ["c"]

    run(clean_dsn, test)


def test_the_wishes_of_workers_that_are_gone_are_removed(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        one, two = await add_worker(conn), await add_worker(conn)
        await statements.set_idle(conn, one, ["a"])
        await statements.set_idle(conn, two, ["b"])
        await statements.remove_workers(conn, [one])
        await statements.remove_idle(conn)
        assert await rows(conn, "SELECT worker_id, queues FROM roost.idle_workers") == [
            {"worker_id": two, "queues": ["b"]}
        ]

    run(clean_dsn, test)


# -- promotion


def test_due_jobs_are_promoted_in_order_a_thousand_at_a_time(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        ids = await enqueue(conn, 1200, scheduled_at="2200-01-01Z")
        for table, key in (("job_rows", "id"), ("scheduled", "job_id")):
            await conn.execute(
                f"UPDATE roost.{table} SET scheduled_at = '2020-01-01Z'::timestamptz - make_interval(secs => {key})"
            )
        assert await statements.promote(conn) == (1000, None, False, False)
        left = await rows(conn, "SELECT job_id FROM roost.scheduled ORDER BY job_id")
        assert [row["job_id"] for row in left] == ids[:200]  # of which each is due later than those after it
        assert await statements.promote(conn) == (200, None, False, False)
        assert await statements.promote(conn) == (0, None, False, False)

    run(clean_dsn, test)


def test_a_promotion_says_when_the_next_job_is_due(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        assert await statements.promote(conn) == (0, None, False, False)
        await enqueue(conn, scheduled_at="2200-01-01Z")
        (soon,) = await enqueue(conn, queue="q", priority=7, scheduled_at="2100-01-01Z")
        jobs, next_in_seconds, *_ = await statements.promote(conn)
        assert jobs == 0
        assert next_in_seconds == pytest.approx(await _seconds_until(conn, "2100-01-01Z"), abs=60)
        for table, key in (("job_rows", "id"), ("scheduled", "job_id")):
            query: Any = f"UPDATE roost.{table} SET scheduled_at = '2020-01-01Z' WHERE {key} = %s"
            await conn.execute(query, (soon,))
        jobs, next_in_seconds, *_ = await statements.promote(conn)
        assert jobs == 1
        assert next_in_seconds == pytest.approx(await _seconds_until(conn, "2200-01-01Z"), abs=60)
        row = (await places(conn, soon))["ready"]
        assert (row["queue"], row["priority"], row["scheduled_at"].year) == ("q", 7, 2020)

    run(clean_dsn, test)


async def _seconds_until(conn: Conn, time: str) -> float:
    return float(await value(conn, "SELECT extract(epoch FROM %s::timestamptz - now())", time))


def test_a_promotion_tells_the_idle_workers_once_a_queue_and_passes_over_held_jobs(clean_dsn: str) -> None:
    async def test(conn: Conn) -> None:
        await statements.set_idle(conn, await add_worker(conn), ["a", "b"])
        for queue in ("a", "a", "b", "c"):
            await enqueue(conn, queue=queue, scheduled_at="2200-01-01Z")
        for table in ("job_rows", "scheduled"):
            await conn.execute(f"UPDATE roost.{table} SET scheduled_at = '2020-01-01Z'")
        await conn.execute("LISTEN roost_inserted")
        async with await connect(clean_dsn) as other:
            async with other.transaction(force_rollback=True):
                await other.execute("SELECT FROM roost.scheduled WHERE queue = 'b' FOR UPDATE")
                assert (await statements.promote(conn))[0] == 3
        assert await heard(conn) == [("roost_inserted", "a")]
        assert (await statements.promote(conn))[0] == 1
        assert await heard(conn) == [("roost_inserted", "b")]

    run(clean_dsn, test)
