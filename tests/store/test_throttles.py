"""Throttles: the limits hold whoever claims, in whatever order; nothing of them leaks; a backlog costs nobody."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from roost_client import JobState, Roost
from roostd.core.frontier import everywhere
from roostd.core.job import ClaimedJob
from roostd.store import statements
from roostd.store.statements import Throttled
from tests.store.rows import (
    Conn,
    add_worker,
    assert_each_job_is_in_its_place,
    claim,
    connect,
    enqueue,
    places,
    rows,
    settlement,
    value,
)

DEFAULT = ["default"]


async def limit(conn: Conn, task: str = "a", *, rate: int | None = None, concurrency: int | None = None) -> None:
    """Declares the limits, and makes as if that was long ago."""
    await statements.declare_limits(conn, [(task, rate, concurrency)])
    await conn.execute("UPDATE roost.throttles SET limited_since = limited_since - interval '1 hour'")


async def look(
    conn: Conn,
    worker_id: UUID,
    most_throttled: int = 100,
    *,
    most: int = 100,
    queues: Sequence[str] = DEFAULT,
    window: float = 61.0,
) -> Throttled:
    return await statements.claim_throttled(
        conn, worker_id, everywhere(queues), most, most_throttled=most_throttled, window_seconds=window
    )


def ids_of(jobs: Sequence[ClaimedJob]) -> list[int]:
    return [job.id for job in jobs]


# -- where a throttled job waits


@pytest.mark.parametrize("way", ["enqueue", "enqueue_many", "unique", "dependent", "retry"])
def test_a_job_of_a_throttled_task_waits_in_throttled(clean_dsn: str, way: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            (parent,) = await enqueue(conn, task="free")
            await limit(conn, concurrency=1)
            match way:
                case "enqueue":
                    (job_id,) = await enqueue(conn)
                case "unique":
                    (job_id,) = await enqueue(conn, unique_key="k")
                case "enqueue_many":
                    kinds = '[{"queue":"default","task":"a","priority":0,"max_attempts":20},'
                    kinds += '{"queue":"default","task":"free","priority":0,"max_attempts":20}]'
                    await conn.execute("SELECT roost.enqueue_many(%s, '{1,2}', '{\"{}\",\"{}\"}')", (kinds,))
                    job_id = await value(conn, "SELECT id FROM roost.job_rows WHERE task = 'a'")
                    free = await value(conn, "SELECT max(id) FROM roost.job_rows WHERE task = 'free'")
                    assert set(await places(conn, free)) == {"ready"}
                case "dependent":
                    (job_id,) = await enqueue(conn, depends_on=[parent])
                    assert set(await places(conn, job_id)) == {"blocked"}
                    (job,) = await claim(conn, worker_id)
                    await statements.complete(conn, [parent], [job.lease], [None])
                    await statements.follow_parents(conn)
                case "retry":
                    (job_id,) = await enqueue(conn)
                    await conn.execute("SELECT roost.cancel(%s)", (job_id,))
                    await conn.execute("SELECT roost.retry(%s)", (job_id,))
            assert set(await places(conn, job_id)) == {"throttled"}
            assert await value(conn, "SELECT state FROM roost.jobs WHERE id = %s", job_id) == "available"
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


@pytest.mark.parametrize("way", ["enqueued before", "scheduled", "failed", "released", "rescued"])
def test_a_claim_sets_aside_what_it_meets_of_a_throttled_task(clean_dsn: str, way: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id, other = await add_worker(conn), await add_worker(conn)
            if way == "enqueued before":
                await enqueue(conn)
            await limit(conn, concurrency=1)
            if way == "scheduled":
                await enqueue(conn, scheduled_at="2200-01-01Z")
                await conn.execute("UPDATE roost.job_rows SET scheduled_at = '2020-01-01Z'")
                await conn.execute("UPDATE roost.scheduled SET scheduled_at = '2020-01-01Z'")
                assert await statements.promote(conn) == (1, None, True, False)
            elif way != "enqueued before":
                (job_id,) = await enqueue(conn, max_attempts=3)
                (job,) = (await look(conn, worker_id)).jobs
                match way:
                    case "failed":
                        await statements.settle(conn, [settlement(job_id, job.lease, JobState.RETRYABLE)], 5)
                    case "released":
                        await statements.settle(conn, [settlement(job_id, job.lease, None)], 5)
                    case "rescued":
                        await statements.remove_workers(conn, [worker_id])
                        await statements.rescue(conn, reason="gone", error_cap=5)
            (free,) = await enqueue(conn, task="free")
            met, claimed = await claim(conn, other)
            assert (met.lease, met.task, claimed.id) == (0, "a", free)
            assert set(await places(conn, met.id)) == {"throttled"}
            await assert_each_job_is_in_its_place(conn)
            assert ids_of((await look(conn, other)).jobs) == [met.id]

    asyncio.run(main())


def test_many_that_waited_before_the_limit_are_set_aside_at_once_and_others_left(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn, await connect(clean_dsn) as other:
            await add_worker(conn)
            held = await enqueue(conn, 300)
            free = await enqueue(conn, 5, task="free")
            await enqueue(conn, 300)
            await limit(conn, rate=1)
            async with other.transaction():
                await other.execute("SELECT FROM roost.ready WHERE job_id = %s FOR UPDATE", (held[0],))
                assert await statements.set_aside(conn, everywhere(DEFAULT), 400) == 299 + 95
            assert await statements.set_aside(conn, everywhere(DEFAULT), 400) == 1 + 205
            assert await statements.set_aside(conn, everywhere(DEFAULT), 400) == 0
            assert [r["job_id"] for r in await rows(conn, "SELECT job_id FROM roost.ready ORDER BY 1")] == free
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


@pytest.mark.parametrize("action", ["cancel", "retry", "replace"])
def test_a_waiting_throttled_job_can_be_changed_as_any_other(clean_dsn: str, action: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            await limit(conn, rate=1)
            (job_id,) = await enqueue(conn, unique_key="k")
            match action:
                case "cancel":
                    assert await value(conn, "SELECT roost.cancel(%s)", job_id) == "cancelled"
                    assert await places(conn, job_id) == {}
                case "retry":
                    assert await value(conn, "SELECT roost.retry(%s)", job_id) == "available"
                    assert set(await places(conn, job_id)) == {"throttled"}
                case "replace":
                    assert await enqueue(conn, unique_key="k", on_duplicate="replace", scheduled_at="2200-01-01Z") == [
                        job_id
                    ]
                    assert set(await places(conn, job_id)) == {"scheduled"}
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


def test_a_queue_counts_its_throttled_jobs_as_available(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            await limit(conn, rate=1)
            await enqueue(conn, 3)
            await enqueue(conn, 2, task="free")

    asyncio.run(main())
    with Roost(clean_dsn) as roost:
        assert [(queue.name, queue.available) for queue in roost.list_queues()] == [("default", 5)]
        assert roost.status()["default"][JobState.AVAILABLE] == 5


# -- max_concurrency


def test_no_more_run_at_once_than_the_limit(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            one, two = await add_worker(conn), await add_worker(conn)
            await limit(conn, concurrency=3)
            ids = await enqueue(conn, 6)
            first = await look(conn, one, 2)
            assert (ids_of(first.jobs), first.more) == (ids[:2], True)
            second = await look(conn, two, 2)
            assert (ids_of(second.jobs), second.more, second.next_in_seconds) == (ids[2:3], False, None)
            assert (await look(conn, one)).jobs == []
            await statements.complete(conn, [ids[0]], [first.jobs[0].lease], [None])
            assert ids_of((await look(conn, two)).jobs) == [ids[3]]
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


def test_a_dead_worker_holds_its_places_until_its_jobs_are_freed_and_no_longer(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            one, two = await add_worker(conn), await add_worker(conn)
            await limit(conn, concurrency=1)
            await enqueue(conn, 2)
            assert len((await look(conn, one)).jobs) == 1
            await statements.remove_workers(conn, [one])
            assert (await look(conn, two)).jobs == []
            await statements.rescue(conn, reason="gone", error_cap=5)
            assert len((await look(conn, two)).jobs) == 1

    asyncio.run(main())


@pytest.mark.parametrize("was_limited_once", [False, True])
def test_runs_from_before_the_task_was_limited_count(clean_dsn: str, was_limited_once: bool) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            ids = await enqueue(conn, 2)
            before = await claim(conn, worker_id)
            await enqueue(conn, 4)
            if was_limited_once:
                await limit(conn, "a", concurrency=3)
                await conn.execute("UPDATE roost.throttles SET counted = true")
                await statements.declare_limits(conn, [("a", None, None)])
            await limit(conn, concurrency=3)
            await claim(conn, worker_id)  # sets them aside
            assert len((await look(conn, worker_id)).jobs) == 1
            assert not await value(conn, "SELECT counted FROM roost.throttles")
            await statements.complete(conn, ids, [job.lease for job in before], [])
            assert len((await look(conn, worker_id)).jobs) == 2
            assert await value(conn, "SELECT counted FROM roost.throttles")
            assert (await look(conn, worker_id)).jobs == []

    asyncio.run(main())


def test_a_task_that_was_not_limited_starts_nothing_until_no_claim_can_miss_its_limit(clean_dsn: str) -> None:
    """The claim of another, begun before the limit was there, does not know of it."""

    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            for _ in range(2):
                await statements.declare_limits(conn, [("a", None, 5)])
                await enqueue(conn)
                answer = await look(conn, worker_id)
                assert (answer.jobs, answer.more) == ([], False)
                assert answer.next_in_seconds is not None
                assert 0 < answer.next_in_seconds <= 1
                await conn.execute("UPDATE roost.throttles SET limited_since = limited_since - interval '1 second'")
                await statements.declare_limits(conn, [("a", 7, 5)])  # it has been limited all along
                assert len((await look(conn, worker_id)).jobs) == 1
                await statements.declare_limits(conn, [("a", None, None)])

    asyncio.run(main())


# -- rate_per_minute


async def _pass(conn: Conn, seconds: float) -> None:
    """As if that much time had passed."""
    await conn.execute("UPDATE roost.throttle_starts SET at = at - make_interval(secs => %s)", (seconds,))


def test_no_more_start_in_a_window_than_the_rate(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            await limit(conn, rate=3)
            ids = await enqueue(conn, 8)
            first = await look(conn, worker_id, 2)
            assert (ids_of(first.jobs), first.more) == (ids[:2], True)
            await statements.complete(conn, ids[:2], [job.lease for job in first.jobs], [])
            await _pass(conn, 40)
            second = await look(conn, worker_id)
            assert (ids_of(second.jobs), second.has_rate, second.more) == (ids[2:3], [True], False)
            assert second.next_in_seconds == pytest.approx(21, abs=1)
            await _pass(conn, 20)
            assert (await look(conn, worker_id)).jobs == []
            await _pass(conn, 1.5)
            third = await look(conn, worker_id)
            assert ids_of(third.jobs) == ids[3:5]
            assert third.next_in_seconds == pytest.approx(39.5, abs=1)
            assert await value(conn, "SELECT count(*) FROM roost.throttle_starts") == 2  # what is too old is gone

    asyncio.run(main())


def test_a_start_is_noted_no_earlier_than_it_may_happen_and_few_rows_say_all(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            await limit(conn, rate=100)
            await enqueue(conn, 40)
            before = await value(conn, "SELECT clock_timestamp()")
            for _ in range(40):
                assert len((await look(conn, worker_id, 1)).jobs) == 1
            seconds = (await value(conn, "SELECT clock_timestamp()") - before).total_seconds()
            noted = await rows(conn, "SELECT at, starts FROM roost.throttle_starts")
            assert sum(row["starts"] for row in noted) == 40
            assert len(noted) <= seconds * 10 + 2
            assert min(row["at"] for row in noted) >= before

    asyncio.run(main())


def test_a_rate_is_live(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            await limit(conn, rate=2)
            await enqueue(conn, 9)
            assert len((await look(conn, worker_id)).jobs) == 2
            await limit(conn, rate=5)
            assert len((await look(conn, worker_id)).jobs) == 3
            await limit(conn, rate=1)
            assert (await look(conn, worker_id)).jobs == []
            await limit(conn, rate=6, concurrency=5)
            assert (await look(conn, worker_id)).jobs == []
            await limit(conn, rate=6, concurrency=7)
            assert len((await look(conn, worker_id)).jobs) == 1

    asyncio.run(main())


# -- a limit that is taken away


def test_what_waits_for_a_limit_that_is_gone_becomes_ready(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn, await connect(clean_dsn) as late:
            worker_id = await add_worker(conn)
            await limit(conn, rate=1)
            await enqueue(conn, 1500)
            async with late.transaction():  # which sees the limit, and commits when it is gone
                await enqueue(late)
                await statements.declare_limits(conn, [("a", None, None)])
                answer = await look(conn, worker_id)
                assert (answer.jobs, answer.more) == ([], True)
                assert await value(conn, "SELECT count(*) FROM roost.ready") == 1000
                assert (await look(conn, worker_id)).more
                answer = await look(conn, worker_id)
                assert (answer.jobs, answer.more) == ([], False)
            assert (await look(conn, worker_id)).more
            assert await value(conn, "SELECT count(*) FROM roost.ready") == 1501
            assert {job.lease > 0 for job in await claim(conn, worker_id, 2000)} == {True}
            await assert_each_job_is_in_its_place(conn)

    asyncio.run(main())


def test_a_worker_says_nothing_of_tasks_that_it_does_not_have(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            await statements.declare_limits(conn, [("a", 1, None), ("b", None, 2), ("c", None, None)])
            await statements.declare_limits(conn, [("b", None, None), ("d", 4, 4)])
            found = await rows(conn, "SELECT task, rate_per_minute AS r, max_concurrency AS c FROM roost.throttles")
            assert sorted((row["task"], row["r"], row["c"]) for row in found) == [
                ("a", 1, None),
                ("b", None, None),
                ("d", 4, 4),
            ]

    asyncio.run(main())


# -- order, queues


def test_throttled_jobs_take_their_turn_among_the_others(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            await limit(conn, concurrency=50)
            await enqueue(conn, 2, task="free", priority=1)
            last = await enqueue(conn, 2, priority=2)
            middle = await enqueue(conn, 2, priority=1, queue="other")
            first = await enqueue(conn, 2)
            both = ["default", "other"]
            assert ids_of((await look(conn, worker_id, most=1, queues=both)).jobs) == first[:1]
            answer = await look(conn, worker_id, most=3, queues=both)
            assert (ids_of(answer.jobs), answer.more) == (first[1:], True)
            assert (await look(conn, worker_id, most=2, queues=both)).jobs == []
            assert ids_of((await look(conn, worker_id, most=4, queues=both)).jobs) == middle
            await claim(conn, worker_id)
            assert ids_of((await look(conn, worker_id, most=4, queues=both)).jobs) == last

    asyncio.run(main())


def test_only_the_queues_asked_for_that_are_not_paused_are_looked_in(clean_dsn: str) -> None:
    async def main() -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            await limit(conn, concurrency=50)
            for queue in ("a", "b", "c"):
                await enqueue(conn, queue=queue)
            await conn.execute("INSERT INTO roost.queues (name, paused) VALUES ('a', true)")
            answer = await look(conn, worker_id, queues=["a", "b", "b"])
            assert [job.queue for job in answer.jobs] == ["b"]
            assert not answer.more
            assert (await look(conn, worker_id, queues=[])).jobs == []
            assert await look(conn, uuid4(), queues=["a", "b", "c"]) == ([], [], False, None)

    asyncio.run(main())


# -- all at once


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_limits_hold_whatever_many_workers_do_at_once(clean_dsn: str, seed: int) -> None:
    """Two throttled tasks and a free one; workers that die, jobs that end in all ways, limits that change."""
    chance = random.Random(seed)
    window = 1.5  # the minute and the time to start, for this test
    concurrency, rate = 3, 4

    async def work(number: int) -> None:
        async with await connect(clean_dsn) as conn:
            worker_id = await add_worker(conn)
            end = asyncio.get_running_loop().time() + 6
            held: list[ClaimedJob] = []
            while asyncio.get_running_loop().time() < end:
                match chance.choice(["look", "look", "claim", "end", "end", "die", "enqueue"]):
                    case "look":
                        held += (await look(conn, worker_id, chance.randint(1, 3), window=window)).jobs
                    case "claim":
                        held += [job for job in await claim(conn, worker_id, 5) if job.lease]
                    case "end" if held:
                        job = held.pop(chance.randrange(len(held)))
                        state = chance.choice([JobState.RETRYABLE, None, JobState.DISCARDED])
                        await statements.settle(conn, [settlement(job.id, job.lease, state)], 3)
                    case "die" if chance.random() < 0.2:
                        await statements.remove_workers(conn, [worker_id])
                        await statements.rescue(conn, reason="gone", error_cap=3)
                        worker_id, held = await add_worker(conn), []
                    case "enqueue":
                        await enqueue(conn, 2, task=chance.choice(["slow", "rated", "free"]))

    async def watch(stop: asyncio.Event, most: list[int]) -> None:
        async with await connect(clean_dsn) as conn:
            while not stop.is_set():
                running = await value(
                    conn,
                    "SELECT count(*) FROM roost.claims JOIN roost.job_rows j ON j.id = job_id WHERE j.task = 'slow'",
                )
                most.append(running)

    async def main() -> list[int]:
        async with await connect(clean_dsn) as conn:
            # The log that the statement keeps is pruned; this one is not.
            await conn.execute(
                "CREATE TABLE IF NOT EXISTS public.seen (task text, at timestamptz);"
                "CREATE OR REPLACE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN INSERT INTO public.seen VALUES (NEW.task, NEW.claimed_at); RETURN NEW; END $$;"
                "CREATE TRIGGER see AFTER INSERT ON roost.claims FOR EACH ROW EXECUTE FUNCTION public.see()"
            )
            try:
                await limit(conn, "slow", concurrency=concurrency)
                await limit(conn, "rated", rate=rate)
                stop, most = asyncio.Event(), [0]
                watching = asyncio.create_task(watch(stop, most))
                await asyncio.gather(*(work(number) for number in range(6)))
                stop.set()
                await watching
                starts = [
                    r["at"] for r in await rows(conn, "SELECT at FROM public.seen WHERE task = 'rated' ORDER BY at")
                ]
            finally:
                await conn.execute("DROP TABLE public.seen; DROP FUNCTION public.see() CASCADE")
            assert max(most) == concurrency, f"seed {seed}"
            _assert_rate(starts, rate, window)
            assert len(starts) >= 2 * rate
            await assert_each_job_is_in_its_place(conn)
            await conn.execute("DELETE FROM roost.workers")
            await statements.rescue(conn, reason="gone", error_cap=3)
            assert await value(conn, "SELECT count(*) FROM roost.claims") == 0
        return most

    asyncio.run(main())


def _assert_rate(starts: Sequence[datetime], rate: int, seconds: float) -> None:
    for first, last in zip(starts, itertools.islice(starts, rate, None), strict=False):
        assert last - first >= timedelta(seconds=seconds)


# -- the cost


@pytest.fixture
def plain(dsn: str) -> Any:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(statements.SESSION)
        yield conn


@pytest.mark.timeout(120)
def test_the_cost_of_a_look_does_not_depend_on_the_backlog(plain: psycopg.Connection[Any]) -> None:
    """By the buffers that it touches, which do not depend on how busy the machine is."""
    worker_id = uuid4()
    plain.execute("INSERT INTO roost.workers VALUES (%s, 'main', 'web1', 1, '{}', 1)", (worker_id,))
    plain.execute("INSERT INTO roost.throttles VALUES ('a', 3, 2, DEFAULT, '2020-01-01', true)")
    plain.execute("INSERT INTO roost.throttles VALUES ('b', NULL, 2, DEFAULT, '2020-01-01', true)")
    touched = []
    for count in (10, 100_000):
        plain.execute(
            "WITH job AS (INSERT INTO roost.job_rows (queue, task) SELECT 'q' || n %% 2,"
            " CASE WHEN n %% 3 > 0 THEN 'a' ELSE 'free' END FROM generate_series(1, %s::integer) AS n RETURNING *),"
            " free AS (INSERT INTO roost.ready SELECT queue, priority, scheduled_at, id FROM job WHERE task = 'free')"
            " INSERT INTO roost.throttled SELECT task, queue, priority, scheduled_at, id FROM job WHERE task = 'a'",
            (count,),
        )
        parameters = statements.claim_parameters(worker_id, everywhere(["q0", "q1"]), 10)
        for _ in range(3):
            buffers = _buffers(plain, "claim_throttled", parameters | {"most_throttled": 4, "window_seconds": 61.0})
        touched.append(buffers)
        assert plain.execute("SELECT count(*) FROM roost.claims").fetchone() == (2,)
        touched.append(_buffers(plain, "claim", parameters))
        plain.execute("DELETE FROM roost.claims WHERE task IS NULL")
    assert touched[2] < touched[0] + 60
    assert touched[3] < touched[1] + 250  # ten jobs in place of three


def _buffers(conn: psycopg.Connection[Any], name: str, parameters: dict[str, Any]) -> int:
    with psycopg.ClientCursor(conn) as cursor:
        query: Any = "EXPLAIN (ANALYZE, BUFFERS, FORMAT json) " + statements.SQL[name]
        ((plan,),) = cursor.execute(query, parameters).fetchall()
    top = plan[0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])
