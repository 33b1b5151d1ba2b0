"""Slots fire once, in the transaction of their job, and only when they may."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from roostd.core.timetable import LATE_SECONDS, Due, Entry
from roostd.store import statements
from tests.store.rows import Conn, assert_each_job_is_in_its_place, connect, rows, value


@pytest.fixture
def dsn(clean_dsn: str) -> str:
    with psycopg.connect(clean_dsn, autocommit=True) as conn:
        conn.execute("TRUNCATE roost.cron_entries, roost.cron_runs")
    return clean_dsn


def entry(name: str = "a", expression: str = "@hourly", **fields: Any) -> Entry:
    return Entry(**{"name": name, "expression": expression, "task": "t", "source": "config", **fields})


async def known(conn: Conn, *entries: Entry, hours: float = 100) -> datetime:
    """Registers the entries as if that was some hours ago; returns the time."""
    await statements.register_cron(conn, entries)
    await conn.execute("UPDATE roost.cron_entries SET since = now() - make_interval(secs => %s)", (hours * 3600,))
    return (await statements.register_cron(conn, entries))[0]


async def fire(conn: Conn, *due: Due) -> list[tuple[str, datetime]]:
    return [(fired.name, fired.slot) for fired in (await statements.fire_cron(conn, due))[1]]


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_a_slot_becomes_a_job_with_all_that_the_entry_says(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            one = entry(
                "nightly", args='{"a": "\u00e9"}', queue="emails", priority=-3, max_attempts=2, tags=("x", 'y"'),
                timeout_seconds=9,
            )  # fmt: skip
            now = await known(conn, one)
            slot = now - timedelta(seconds=1)
            told, fired = await statements.fire_cron(conn, [Due(one, slot)])
            assert told >= now
            ((name, fired_slot, job_id),) = fired
            assert (name, fired_slot) == ("nightly", slot)
            (job,) = await rows(conn, "SELECT * FROM roost.jobs")
            assert job["id"] == job_id
            assert job["metadata"]["cron"].keys() == {"name", "slot"}
            assert job["metadata"]["cron"]["name"] == "nightly"
            assert datetime.fromisoformat(job["metadata"]["cron"]["slot"]) == slot
            wanted = {
                "task": "t", "args": {"a": "\u00e9"}, "queue": "emails", "priority": -3, "max_attempts": 2,
                "tags": ["x", 'y"'], "timeout_seconds": 9, "state": "available",
            }  # fmt: skip
            assert {key: job[key] for key in wanted} == wanted
            (row,) = await rows(conn, "SELECT * FROM roost.cron_runs")
            assert (row["name"], row["slot"], row["job_id"]) == ("nightly", slot, job_id)
            await assert_each_job_is_in_its_place(conn)

    run(scenario())


def test_a_slot_fires_once_however_often_it_is_tried(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            one = entry()
            now = await known(conn, one)
            slot = now - timedelta(seconds=1)
            assert await fire(conn, Due(one, slot)) == [("a", slot)]
            assert await fire(conn, Due(one, slot)) == []
            assert await value(conn, "SELECT count(*) FROM roost.jobs") == 1

    run(scenario())


def test_eight_masters_that_try_the_same_thousand_slots_fire_each_once(dsn: str) -> None:
    async def scenario() -> None:
        masters = [await connect(dsn) for _ in range(8)]
        entries = [entry(f"{number:04}") for number in range(1000)]
        now = await known(masters[0], *entries)
        due = [Due(each, now - timedelta(seconds=1)) for each in entries]
        parts: Sequence[Sequence[Due]] = [due[start : start + 300] for start in range(0, 1000, 300)]
        fired = await asyncio.gather(*(_all_of(conn, parts) for conn in masters))
        assert sum(fired) == 1000
        assert await value(masters[0], "SELECT count(*) FROM roost.jobs") == 1000
        query = "SELECT count(DISTINCT metadata -> 'cron') FROM roost.jobs"
        assert await value(masters[0], query) == 1000
        for conn in masters:
            await conn.close()

    run(scenario())


async def _all_of(conn: Conn, parts: Sequence[Sequence[Due]]) -> int:
    return sum([len(await fire(conn, *part)) for part in parts])


def test_a_slot_whose_transaction_is_undone_is_free_for_another_master(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as first, await connect(dsn) as second:
            one = entry()
            slot = await known(first, one) - timedelta(seconds=1)
            await first.execute("BEGIN")
            assert await fire(first, Due(one, slot)) == [("a", slot)]
            waiting = asyncio.create_task(fire(second, Due(one, slot)))
            await _until_it_waits(dsn, second)
            await first.execute("ROLLBACK")
            assert await waiting == [("a", slot)]
            assert await value(first, "SELECT count(*) FROM roost.jobs") == 1
            await first.execute("BEGIN")
            later = slot + timedelta(milliseconds=500)
            assert await fire(first, Due(one, later)) == [("a", later)]
            waiting = asyncio.create_task(fire(second, Due(one, later)))
            await _until_it_waits(dsn, second)
            await first.execute("COMMIT")
            assert await waiting == []

    run(scenario())


async def _until_it_waits(dsn: str, conn: Conn) -> None:
    async with await connect(dsn) as observer:
        async with asyncio.timeout(20):
            query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
            while not await value(observer, query, conn.info.backend_pid):
                await asyncio.sleep(0.01)


def test_by_the_databases_clock_a_slot_is_neither_early_nor_too_late(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            plain, caught_up = entry("plain"), entry("caught up", catch_up="latest")
            now = await known(conn, plain, caught_up)
            late = timedelta(seconds=LATE_SECONDS)
            for slot, fires in (
                (now + timedelta(seconds=20), []),
                (now - late - timedelta(seconds=1), ["caught up"]),
                (now - late + timedelta(seconds=20), ["caught up", "plain"]),
            ):
                assert [name for name, _ in await fire(conn, Due(caught_up, slot), Due(plain, slot))] == fires

    run(scenario())


def test_a_slot_of_before_one_that_fired_is_not_made_up_for(dsn: str) -> None:
    """As a master would try that was stopped for a while, or whose clock is behind."""

    async def scenario() -> None:
        async with await connect(dsn) as conn:
            one = entry(catch_up="latest")
            now = await known(conn, one)
            slot = now - timedelta(hours=2)
            assert await fire(conn, Due(one, slot)) == [("a", slot)]
            assert await fire(conn, Due(one, slot - timedelta(hours=1))) == []
            await conn.execute("DELETE FROM roost.cron_runs")
            # A clock that was ahead has left a slot of next year: that is no reason to wait until then.
            await conn.execute("INSERT INTO roost.cron_runs VALUES ('a', now() + interval '1 year', now(), 1)")
            assert await fire(conn, Due(one, slot)) == [("a", slot)]
            _, after = await statements.register_cron(conn, [one])
            assert after == {"a": slot}

    run(scenario())


def test_what_passed_before_an_entry_was_known_enabled_or_resumed_does_not_fire(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            one = entry(catch_up="latest")
            now, after = await statements.register_cron(conn, [one])
            assert after == {"a": now}
            slot = now - timedelta(seconds=1)
            assert await fire(conn, Due(one, slot)) == []
            now = await known(conn, one)
            await conn.execute("SELECT roost.pause_cron('a', true)")
            assert await fire(conn, Due(one, slot)) == []
            await conn.execute("SELECT roost.pause_cron('a', false)")
            assert await fire(conn, Due(one, slot)) == []
            await known(conn, one)
            await statements.register_cron(conn, [entry(catch_up="latest", enabled=False)])
            now, after = await statements.register_cron(conn, [one])
            assert after == {"a": now}
            assert await fire(conn, Due(one, slot)) == []
            await known(conn, one)
            assert await fire(conn, Due(one, slot)) == [("a", slot)]

    run(scenario())


@pytest.mark.parametrize(
    ("change", "is_new"),
    [
        ({"expression": "@daily"}, True),
        ({"timezone": "Europe/Berlin"}, True),
        ({"catch_up": "latest"}, True),
        ({"args": '{"a": 1}', "queue": "q", "priority": 2, "max_attempts": 4, "task": "u", "tags": ("x",)}, False),
    ],
)
def test_an_entry_that_changes_is_known_anew_only_where_its_slots_change(
    dsn: str, change: dict[str, Any], is_new: bool
) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            before = await known(conn, entry())
            await conn.execute("SELECT roost.pause_cron('a', true)")
            now, after = await statements.register_cron(conn, [entry(**change)])
            assert (after["a"] == now) is is_new
            assert is_new or after["a"] < before - timedelta(hours=99)
            (row,) = await rows(conn, "SELECT * FROM roost.cron_entries")
            assert row["paused_at"] is not None
            assert {key: row[key] for key in change if key not in ("args", "tags")} == {
                key: value for key, value in change.items() if key not in ("args", "tags")
            }

    run(scenario())


def test_a_pause_that_is_repeated_keeps_its_time_and_an_entry_that_is_none_is_told(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            await known(conn, entry())
            pause: Any = "SELECT roost.pause_cron(%s, %s)"
            query = "SELECT paused_at FROM roost.cron_entries"
            assert await value(conn, pause, "a", True)
            paused_at = await value(conn, query)
            assert await value(conn, pause, "a", True)
            assert await value(conn, query) == paused_at
            since = await value(conn, "SELECT since FROM roost.cron_entries")
            assert await value(conn, pause, "a", False)
            assert await value(conn, query) is None
            resumed_since = await value(conn, "SELECT since FROM roost.cron_entries")
            assert resumed_since > since
            assert await value(conn, pause, "a", False)  # it was not paused: nothing is forgotten
            assert await value(conn, "SELECT since FROM roost.cron_entries") == resumed_since
            assert not await value(conn, pause, "b", True)
            assert await value(conn, "SELECT roost.run_cron('b')") is None

    run(scenario())


def test_an_entry_is_run_outside_its_slots(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            await known(conn, entry(queue="q", args='{"x": 1}', tags=("y",)))
            await conn.execute("SELECT roost.pause_cron('a', true)")
            job_id = await value(conn, "SELECT roost.run_cron('a')")
            (job,) = await rows(conn, "SELECT * FROM roost.jobs")
            assert (job["id"], job["task"], job["queue"], job["args"], job["tags"]) == (
                job_id,
                "t",
                "q",
                {"x": 1},
                ["y"],
            )
            assert job["metadata"] == {"cron": {"name": "a", "slot": None}}
            assert await rows(conn, "SELECT * FROM roost.cron_runs") == []

    run(scenario())


def test_a_slot_that_the_database_refuses_leaves_nothing_behind(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            good, bad = entry("a"), entry("b", args="[1]")
            await known(conn, good)
            await known(conn, good, entry("b"))
            slot = await value(conn, "SELECT now()") - timedelta(seconds=1)
            with pytest.raises(psycopg.errors.InvalidParameterValue):
                await fire(conn, Due(good, slot), Due(bad, slot))
            assert await rows(conn, "SELECT * FROM roost.cron_runs") == []
            assert await value(conn, "SELECT count(*) FROM roost.jobs") == 0
            assert await fire(conn, Due(good, slot)) == [("a", slot)]

    run(scenario())


def test_entries_are_touched_once_a_minute_and_those_without_a_row_are_told(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            await known(conn, entry("a"), entry("b"))
            await conn.execute("UPDATE roost.cron_entries SET seen_at = now() - interval '2 minutes' WHERE name = 'a'")
            query = "SELECT name, seen_at FROM roost.cron_entries ORDER BY name"
            before = await rows(conn, query)
            assert await statements.touch_cron(conn, ["a", "b", "c"]) == ["c"]
            after = await rows(conn, query)
            assert [old["seen_at"] < new["seen_at"] for old, new in zip(before, after, strict=True)] == [True, False]

    run(scenario())


def test_old_slots_are_forgotten_but_for_the_latest_of_each_entry(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            await known(conn, entry("a"), entry("b"), entry("old"))
            await conn.execute("UPDATE roost.cron_entries SET seen_at = now() - interval '31 days' WHERE name = 'old'")
            await conn.execute(
                "INSERT INTO roost.cron_runs SELECT name, now() - make_interval(hours => n), now(), 1"
                "  FROM unnest('{a,b,gone,old}'::text[]) AS name, generate_series(1, 800) AS n"
                " WHERE name <> 'b' OR n > 100"
            )
            await conn.execute("INSERT INTO roost.cron_runs VALUES ('b', now() + interval '1 year', now(), 1)")
            removed: list[int] = []
            while not removed or removed[-1]:
                removed.append(await statements.prune_cron(conn))
            # Of a the last day; of b the latest, and that of a clock that was ahead; of the rest what is not yet old.
            left = {
                row["name"]: row["n"]
                for row in await rows(conn, "SELECT name, count(*) AS n FROM roost.cron_runs GROUP BY name")
            }
            assert left == {"a": 23, "b": 2, "gone": 23, "old": 23}
            assert max(removed) == 1000
            names = [row["name"] for row in await rows(conn, "SELECT name FROM roost.cron_entries ORDER BY name")]
            assert names == ["a", "b"]
            _, after = await statements.register_cron(conn, [entry("b")])
            assert after["b"] < await value(conn, "SELECT now() - interval '99 hours'")

    run(scenario())


def test_the_prune_reads_no_more_than_it_removes(dsn: str) -> None:
    async def scenario() -> None:
        async with await connect(dsn) as conn:
            await conn.execute(
                "INSERT INTO roost.cron_runs SELECT n::text, now() - interval '1 hour', now(), 1"
                "  FROM generate_series(1, 20000) AS n"
            )
            await conn.execute("ANALYZE roost.cron_runs")
            plan = await rows(conn, "EXPLAIN (COSTS off) " + statements.SQL["prune_cron"])
            text = "\n".join(row["QUERY PLAN"] for row in plan)
            assert "Index Scan using cron_runs_by_slot" in text
            assert "Seq Scan on cron_runs" not in text

    run(scenario())
