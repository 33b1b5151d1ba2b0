"""Claiming: which jobs, in which order, each once; and the plan that keeps its cost independent of the backlog."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest

from roostd.core.frontier import HIGHEST, LOWEST, Range, everywhere
from roostd.core.job import ClaimedJob
from roostd.store import statements
from tests.store.rows import (
    Conn,
    add_worker,
    assert_each_job_is_in_its_place,
    connect,
    enqueue,
    numbered,
    rows,
    value,
)


async def _claim_all(conn: Conn, worker_id: UUID, queues: Sequence[str], limit: int) -> list[list[ClaimedJob]]:
    """Claims until nothing is left; a list a claim."""
    batches = []
    while batch := await statements.claim(conn, worker_id, everywhere(queues), limit):
        batches.append(batch)
    return batches


def test_a_claim_takes_what_lies_in_its_ranges_and_nothing_else(clean_dsn: str) -> None:
    priorities = [LOWEST, -1, 0, HIGHEST]
    times = [f"2020-01-0{day}Z" for day in (1, 2, 3)]

    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            there = []
            for queue, priority, time in itertools.product(["a", "b"], priorities, times):
                ids = await enqueue(conn, 2, queue=queue, priority=priority, scheduled_at=time)
                there += [(queue, priority, time, job_id) for job_id in ids]
            everything = await _claimed_and_put_back(conn, worker_id, everywhere(["a", "b"]))
            assert sorted(everything) == sorted(job_id for *_, job_id in there)
            for start, last in itertools.product(there[::3], priorities):
                ranges = [Range(*start, last), *everywhere(["b"])[: last == 0]]
                expected = {
                    row[3]
                    for row in there
                    if (row[0] == start[0] and row[1] <= last and row[1:] > start[1:]) or (row[0] == "b" and last == 0)
                }
                assert set(await _claimed_and_put_back(conn, worker_id, ranges)) == expected

    asyncio.run(main())


async def _claimed_and_put_back(conn: Conn, worker_id: UUID, ranges: Sequence[Range]) -> list[int]:
    async with conn.transaction(force_rollback=True):
        return [job.id for job in await statements.claim(conn, worker_id, ranges, 1000)]


def test_jobs_come_by_priority_then_time_then_id_across_all_queues(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            expected = []
            times = ["2020-01-01Z", "2020-01-02Z"]
            for priority, time, queue in itertools.product([5, -1, 0], times[::-1], ["b", "a", "c"]):
                ids = await enqueue(conn, 2, queue=queue, priority=priority, scheduled_at=time)
                expected += [(priority, time, job_id) for job_id in ids]
            # enqueue_many or a sequence used by two sessions may give a later row the smaller id
            expected.sort()
            batches = await _claim_all(conn, worker_id, ["a", "b", "c"], 5)
            assert [len(batch) for batch in batches] == [5] * 7 + [1]
            assert [job.id for batch in batches for job in batch] == [job_id for *_, job_id in expected]
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


def test_a_claimed_job_has_the_values_of_its_row_and_of_the_claim(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            args = {"x": [1, None, "\u00e9\U0001f41d"], "y": {"z": 1.5}}
            columns: dict[str, Any] = {
                "queue": "q",
                "task": "t",
                "args": json.dumps(args),
                "timeout_seconds": 7,
                "max_attempts": 3,
            }
            (job_id,) = await enqueue(conn, **columns)
            await conn.execute("UPDATE roost.job_rows SET attempt = 1, crashes = 2, state = 'retryable'")
            (job,) = await statements.claim(conn, worker_id, everywhere(["q"]), 10)
            assert json.loads(job.args) == args
            (row,) = await rows(conn, "SELECT scheduled_at::text FROM roost.job_rows")
            assert job._replace(args="", lease=0) == ClaimedJob(
                job_id, 0, 2, 3, 2, 7, "q", "t", "", 0, row["scheduled_at"]
            )
            (claimed,) = await rows(conn, "SELECT * FROM roost.claims")
            del claimed["claimed_at"]
            assert claimed == {
                "job_id": job_id,
                "lease": job.lease,
                "worker_id": worker_id,
                "attempt": 2,
                "cancel_requested": False,
                "task": None,
            }

    asyncio.run(main())


def test_a_claimed_job_has_its_tags_and_metadata_and_one_without_either_nothing(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            tags = ["a", 'b"\\,', "\u00e9"]
            metadata = {"n": 1.50, "deep": [None, {"x": "\u00e9"}]}
            await enqueue(conn)
            await enqueue(conn, tags=tags)
            await enqueue(conn, metadata=json.dumps(metadata))
            await enqueue(conn, tags=tags, metadata=json.dumps(metadata))
            await enqueue(conn, tags=[], metadata="{}")
            labels = [job.labels for job in await statements.claim(conn, worker_id, everywhere(["default"]), 10)]
            assert [None if text is None else json.loads(text) for text in labels] == [
                None,
                {"tags": tags, "metadata": None},
                {"tags": None, "metadata": metadata},
                {"tags": tags, "metadata": metadata},
                None,
            ]

    asyncio.run(main())


def test_no_more_than_the_limit_is_claimed(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            for queue in ("a", "b"):
                await enqueue(conn, 20, queue=queue)
            for limit in (0, 1, 7, 25, 1000):
                left = await value(conn, "SELECT count(*) FROM roost.ready")
                claimed = await statements.claim(conn, worker_id, everywhere(["a", "b"]), limit)
                assert len(claimed) == min(limit, left)
                assert await value(conn, "SELECT count(*) FROM roost.ready") == left - len(claimed)
            assert await statements.claim(conn, worker_id, everywhere(["a", "b"]), 10) == []
            assert await statements.claim(conn, worker_id, everywhere([]), 10) == []

    asyncio.run(main())


def test_a_claim_over_many_ranges_of_a_queue_holds_no_more_than_the_limit(clean_dsn: str) -> None:
    ranges = [Range("default", priority, "-infinity", 0, priority) for priority in range(10)]

    async def main() -> None:
        async with await connect(clean_dsn) as conn, await connect(clean_dsn) as other:
            worker_id = await add_worker(conn)
            ids = [job_id for priority in range(10) for job_id in await enqueue(conn, 2, priority=priority)]
            async with conn.transaction():
                claimed = await statements.claim(conn, worker_id, ranges, 5)
                assert [job.id for job in claimed] == ids[:5]
                rest = await statements.claim(other, worker_id, everywhere(["default"]), 100)
                assert [job.id for job in rest] == ids[5:]

    asyncio.run(main())


def test_a_queue_named_twice_gives_each_job_once(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            ids = await enqueue(conn, 5)
            claimed = await statements.claim(conn, worker_id, everywhere(["default", "default"]), 100)
            assert sorted(job.id for job in claimed) == ids
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


def test_claimers_at_once_claim_each_job_once_under_rising_leases(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            ids = [await enqueue(conn, 2000, queue=queue) for queue in ("a", "b")]
            conns = [await connect(clean_dsn) for _ in range(4)]
            orders = (["a", "b"], ["b", "a"], ["a", "b"], ["b"])
            work = [_claim_all(c, worker_id, order, 17) for c, order in zip(conns, orders, strict=True)]
            claims = await asyncio.gather(*work)
            for c in conns:
                await c.close()

            # Nobody waits for a lock, so a claimer that met others' locks may have gone home early; not all of them.
            assert sum(bool(batches) for batches in claims) >= 2
            claimed = [job for batches in claims for batch in batches for job in batch]
            assert sorted(job.id for job in claimed) == sorted(ids[0] + ids[1])
            assert len({job.lease for job in claimed}) == len(claimed)
            for batches in claims:
                leases = [job.lease for batch in batches for job in batch]
                assert leases == sorted(leases)
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


def test_a_claim_does_not_wait_for_rows_that_another_holds(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn, await connect(clean_dsn) as other:
            worker_id = await add_worker(conn)
            ids = await enqueue(conn, 10)
            async with other.transaction():
                taken = await statements.claim(other, worker_id, everywhere(["default"]), 4)
                assert [job.id for job in taken] == ids[:4]
                claimed = await statements.claim(conn, worker_id, everywhere(["default"]), 4)
                assert [job.id for job in claimed] == ids[4:8]
                raise psycopg.Rollback
            again = await statements.claim(conn, worker_id, everywhere(["default"]), 10)
            assert [job.id for job in again] == ids[:4] + ids[8:]

    asyncio.run(main())


def test_a_later_claim_of_a_job_has_a_larger_lease(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            await enqueue(conn)
            leases = []
            for _ in range(5):
                (job,) = await statements.claim(conn, worker_id, everywhere(["default"]), 1)
                leases.append(job.lease)
                await statements.remove_workers(conn, [worker_id])
                await statements.rescue(conn, reason="gone", error_cap=10)
                worker_id = await add_worker(conn)
            assert leases == sorted(set(leases))

    asyncio.run(main())


def test_a_paused_queue_gives_nothing_until_it_is_resumed(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            (paused,) = await enqueue(conn, queue="paused", priority=-100)
            (resumed,) = await enqueue(conn, queue="resumed")
            await conn.execute("INSERT INTO roost.queues (name, paused) VALUES ('paused', true), ('resumed', false)")
            both = ["paused", "resumed"]
            assert [job.id for job in await statements.claim(conn, worker_id, everywhere(both), 10)] == [resumed]
            await conn.execute("UPDATE roost.queues SET paused = false")
            assert [job.id for job in await statements.claim(conn, worker_id, everywhere(both), 10)] == [paused]

    asyncio.run(main())


def test_a_worker_without_a_row_claims_nothing(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            await enqueue(conn, 3)
            await add_worker(conn)
            assert await statements.claim(conn, uuid4(), everywhere(["default"]), 10) == []
            assert await value(conn, "SELECT count(*) FROM roost.ready") == 3

    asyncio.run(main())


@pytest.mark.parametrize(
    "queue",
    [
        "it's",
        'say "hi"',
        "a.b.c",
        "{a,b}",
        "a,b",
        "NULL",
        " ",
        "back\\slash",
        "$1 %s %(queues)s",
        "'; DELETE FROM roost.ready; --",
        "\u00e9",
        "e\u0301",
        "\U0001f41d" * 128,
        "A",
    ],
)
def test_any_name_of_a_queue_is_just_characters(clean_dsn: str, queue: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            near = [queue.upper(), queue.lower(), queue + " ", queue.strip(), "\u00e9", "e\u0301", "a"]
            for other in set(near) - {queue, "", *(n for n in near if len(n) > 128)}:
                await enqueue(conn, queue=other)
            (job_id,) = await enqueue(conn, queue=queue)
            await conn.execute("INSERT INTO roost.queues (name, paused) VALUES (%s, true)", (queue,))
            assert await statements.claim(conn, worker_id, everywhere([queue]), 10) == []
            await conn.execute("UPDATE roost.queues SET paused = false")
            assert [
                (job.id, job.queue) for job in await statements.claim(conn, worker_id, everywhere([queue]), 10)
            ] == [(job_id, queue)]

    asyncio.run(main())


# -- the plan


LIMIT = 100
QUEUES = ["q1", "q2", "q3"]


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection under the daemon's settings whose parameters are written into the text, as EXECUTE needs."""
    with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        for table in ("ready", "job_rows", "claims", "scheduled"):
            connection.execute(f"ALTER TABLE roost.{table} SET (autovacuum_enabled = false)")
        connection.execute(statements.SESSION)
        yield connection


def _explain(conn: psycopg.Connection[Any], name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The plan of a statement as it ran, prepared as the daemon's connections prepare it."""
    text, names = numbered(name)
    conn.execute(b"PREPARE statement AS " + text.encode())
    marks = ", ".join(["%s"] * len(names))
    arguments = f"({marks})" if names else ""
    query: Any = f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) EXECUTE statement {arguments}"
    row = conn.execute(query, [parameters[n] for n in names]).fetchone()
    conn.execute("DEALLOCATE statement")
    assert row is not None
    plan: dict[str, Any] = row[0][0]["Plan"]
    return plan


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


def _assert_bounded(plan: dict[str, Any], most: int) -> None:
    """No table that grows is read but by an index, and no step handles more rows than `most`."""
    for node in _nodes(plan):
        relation = node.get("Relation Name")
        if relation in ("ready", "job_rows", "claims", "scheduled"):
            assert node["Node Type"] in ("Index Scan", "Index Only Scan", "Tid Scan", "ModifyTable"), node
        removed = sum(node.get(key, 0) for key in node if key.startswith("Rows Removed by"))
        assert (node["Actual Rows"] + removed) * node["Actual Loops"] <= most, node


def _fill(conn: psycopg.Connection[Any], count: int) -> None:
    """`count` ready jobs over the queues, and as many finished ones, as the statements leave them."""
    conn.execute(
        "WITH job AS (INSERT INTO roost.job_rows (queue, task, priority) SELECT 'q' || n %% 3 + 1, 'a', n %% 2"
        " FROM generate_series(1, %s) AS n RETURNING *)"
        " INSERT INTO roost.ready SELECT queue, priority, scheduled_at, id FROM job",
        (count,),
    )
    conn.execute(
        "INSERT INTO roost.job_rows (queue, task, state, completed_at)"
        " SELECT 'q1', 'a', 'completed', now() FROM generate_series(1, %s)",
        (count,),
    )


# What an ANALYZE writes down that finds a table's rows deleted and its pages not yet given back.
EMPTIED = (
    "UPDATE pg_class SET reltuples = 0, relpages = 100 WHERE relkind = 'r' AND relnamespace = 'roost'::regnamespace"
)


@pytest.mark.parametrize("analyse", ["", "ANALYZE", EMPTIED], ids=["never analysed", "analysed", "analysed when empty"])
@pytest.mark.parametrize("count", [0, 30, 50_000])
def test_the_cost_of_the_statements_does_not_depend_on_the_backlog(
    conn: psycopg.Connection[Any], count: int, analyse: LiteralString
) -> None:
    worker_id = uuid4()
    conn.execute("INSERT INTO roost.workers VALUES (%s, 'main', 'web1', 1, '{}', 1)", (worker_id,))
    _fill(conn, count)
    if analyse:
        conn.execute(analyse)
    claim = statements.claim_parameters(worker_id, everywhere(QUEUES), LIMIT)
    for _ in range(2):
        _assert_bounded(_explain(conn, "claim", claim), most=LIMIT * len(QUEUES))
    claims = conn.execute("SELECT job_id, lease FROM roost.claims ORDER BY lease").fetchall()
    assert len(claims) == min(count, 2 * LIMIT)

    half = len(claims) // 2
    ids, leases = [c[0] for c in claims], [c[1] for c in claims]
    _assert_bounded(_explain(conn, "lock_claims", {"job_ids": ids, "leases": leases}), most=max(len(claims), 1))
    complete = {"job_ids": ids[:half], "leases": leases[:half], "results": ["1"] * half}
    _assert_bounded(_explain(conn, "complete", complete), most=max(half, 1))
    rest = len(claims) - half
    settle = {
        "job_ids": ids[half:],
        "leases": leases[half:],
        "states": ["retryable"] * rest,
        "delays": [float(n % 2 * 3600) for n in range(rest)],
        "errors": ["{}"] * rest,
        "counts_attempt": [True] * rest,
        "counts_crash": [False] * rest,
        "error_cap": 10,
    }
    _assert_bounded(_explain(conn, "settle", settle), most=max(rest, 1))
    conn.execute("UPDATE roost.scheduled SET scheduled_at = '2020-01-01Z'")
    conn.execute(
        "UPDATE roost.job_rows j SET scheduled_at = s.scheduled_at FROM roost.scheduled s WHERE s.job_id = j.id"
    )
    _assert_bounded(_explain(conn, "promote", {"past_seconds": None}), most=max(rest, 1))
    assert conn.execute("SELECT count(*) FROM roost.scheduled").fetchone() == (0,)
