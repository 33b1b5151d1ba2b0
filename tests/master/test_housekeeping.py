"""A round of housekeeping does all there is to do, beside others, and reads nothing when there is nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from psycopg import AsyncConnection

from roostd.config import WorkerConfig
from roostd.master import housekeeping
from roostd.master.database import Link
from roostd.store import statements

JOBS = 25_000  # in three spans


class CountingLink(Link):
    """Counts the statements."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn, "test", session=statements.SESSION)
        self.statements = 0

    async def run(self, operation: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        self.statements += 1
        return await super().run(operation)


def fill(dsn: str, hours_ago: float) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "INSERT INTO roost.job_rows (task, state, completed_at, result)"
            " SELECT 'a', 'completed', now() - make_interval(secs => 3600 * %s), to_jsonb(n)"
            "   FROM generate_series(1, %s) AS n",
            (hours_ago, JOBS),
        )


def counts(dsn: str) -> tuple[int, int, int, int]:
    """Jobs, archived jobs, those in either, results."""
    with psycopg.connect(dsn) as conn:
        row = conn.execute(
            "SELECT (SELECT count(*) FROM roost.job_rows), (SELECT count(*) FROM roost.jobs_archive),"
            " (SELECT count(*) FROM (SELECT id FROM roost.job_rows UNION SELECT id FROM roost.jobs_archive) AS ids),"
            " (SELECT count(result) FROM roost.job_rows) + (SELECT count(result) FROM roost.jobs_archive)"
        ).fetchone()
        assert row is not None
        return row


def tidy(dsn: str, at_a_time: int = 1, **settings: float) -> int:
    """Runs a round; how many statements it took."""

    async def main() -> int:
        links = [CountingLink(dsn) for _ in range(at_a_time)]
        await asyncio.gather(*[housekeeping.tidy(link, WorkerConfig(**settings)) for link in links])  # type: ignore[arg-type]
        for link in links:
            await link.close()
        return sum(link.statements for link in links)

    return asyncio.run(main())


def test_a_round_archives_all_that_is_old_and_the_next_reads_one_statement(dsn: str) -> None:
    fill(dsn, hours_ago=2)
    tidy(dsn, archive_after_seconds=3600)
    assert counts(dsn) == (0, JOBS, JOBS, JOBS)
    assert tidy(dsn, archive_after_seconds=3600) == 1


def test_several_masters_at_a_time_lose_and_double_nothing(dsn: str) -> None:
    fill(dsn, hours_ago=2)
    tidy(dsn, at_a_time=3, archive_after_seconds=3600, result_ttl_seconds=7200)
    assert counts(dsn) == (0, JOBS, JOBS, 0)


def test_jobs_that_are_too_young_are_not_read_again(dsn: str) -> None:
    fill(dsn, hours_ago=0.5)
    assert tidy(dsn, archive_after_seconds=3600) > 3
    assert tidy(dsn, archive_after_seconds=3600) == 1
    assert counts(dsn) == (JOBS, 0, JOBS, JOBS)


def test_results_are_cleared_in_both_places(dsn: str) -> None:
    fill(dsn, hours_ago=2)
    tidy(dsn, archive_after_seconds=3600)
    fill(dsn, hours_ago=2)
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "UPDATE roost.spans SET looked_at = looked_at - interval '2 hours'"
        )  # when those had not ended yet
    tidy(dsn, result_ttl_seconds=3600)
    assert counts(dsn) == (JOBS, JOBS, 2 * JOBS, 0)


def test_the_archive_is_emptied(dsn: str) -> None:
    fill(dsn, hours_ago=2)
    tidy(dsn, archive_after_seconds=3600)
    with psycopg.connect(dsn) as conn:
        conn.execute("UPDATE roost.jobs_archive SET archived_at = now() - interval '2 hours' WHERE id > 500")
    tidy(dsn, archive_delete_after_seconds=3600)
    assert counts(dsn) == (0, 500, 500, 500)


def test_without_ages_nothing_is_asked(dsn: str) -> None:
    fill(dsn, hours_ago=2)
    assert tidy(dsn) == 0
    assert counts(dsn)[0] == JOBS
