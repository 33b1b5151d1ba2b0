"""Does a large table slow the drain down: jobs that wait, for later, paused, behind a limit; or finished ones?

Each kind has a database of its own with that many rows in it, and its rounds alternate with those of a database that
holds nothing but the jobs that are drained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg

from bench import rows
from bench.figures import Aim, Figure, median, median_ratio
from bench.rig import Rig, connect
from bench.scale import Scale
from roost_client import Roost

QUEUES = ("default", "paused")
DEADLINE_SECONDS = 60.0


def measure(rig: Rig, scale: Scale) -> Iterator[Figure]:
    alone: list[float] = []
    with rig.database() as empty:
        for kind in ("waiting", "completed", "scheduled", "paused", "throttled"):
            baseline, beside = [], []
            with rig.database() as full:
                with connect(full) as conn:
                    _fill(conn, kind, scale.backlog_rows)
                for _ in range(scale.backlog_rounds):
                    with connect(empty) as conn:
                        rows.clear(conn)
                    baseline.append(_drain_first(rig, empty, scale.backlog_jobs))
                    beside.append(_drain_first(rig, full, scale.backlog_jobs, add=kind != "waiting"))
            alone += baseline
            yield median(f"first {scale.backlog_jobs:,} beside {scale.backlog_rows:,} {kind}", beside, "jobs/s")
            yield median_ratio(f"… relative to none {kind}", beside, baseline, aim=Aim("≥", 0.9))
    yield median(f"first {scale.backlog_jobs:,} with nothing beside", alone, "jobs/s")


def _fill(conn: psycopg.Connection[Any], kind: str, count: int) -> None:
    match kind:
        case "waiting":
            rows.add_ready(conn, count)
        case "completed":
            rows.add_completed(conn, count)
        case "scheduled":
            rows.add_scheduled(conn, count)
        case "paused":
            rows.add_ready(conn, count, queue="paused")
            with Roost(conn.info.dsn) as roost:
                roost.pause_queue("paused", conn=conn)
        case "throttled":
            rows.add_throttled(conn, count)
    rows.settle_down(conn)


def _drain_first(rig: Rig, dsn: str, jobs: int, *, add: bool = True) -> float:
    """Jobs a second of the first `jobs` that a fresh daemon drains. Twice as many are there: it never runs dry."""
    with connect(dsn) as conn:
        if add:
            rows.add_ready(conn, 2 * jobs)
        conn.execute("CHECKPOINT")
        since, lease = rows.database_time(conn), rows.last_lease(conn)
        with rig.daemon(dsn, queues=QUEUES):
            rows.wait_claimed(conn, lease, 2 * jobs, DEADLINE_SECONDS)
            rows.wait_completed(conn, since, jobs, DEADLINE_SECONDS)
        return rows.completion_rate(conn, since, jobs)
