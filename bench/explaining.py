"""How long does `explain` take, for each reason there may be, with millions of jobs in the table?

Asked through the client, as `roostctl explain` does, the connection open already.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg

from bench import rows
from bench.figures import Aim, Figure, median
from bench.rig import BenchError, Rig, connect, value
from roost_client import Roost

ANSWER = Aim("≤", 50)
PART = 500_000  # jobs that are added at a time: no statement may take longer than the rig allows
PARENTS = 10_000
TASKS = 200  # that each of the workers knows
WORKERS = 20


def measure(rig: Rig, jobs: int, rounds: int) -> Iterator[Figure]:
    """In a database of jobs of which all wait in one queue, which is the worst case for those that come before one."""
    with rig.database() as dsn:
        with connect(dsn) as conn:
            for first in range(0, jobs, PART):
                rows.add_ready(conn, min(PART, jobs - first))
            rows.settle_down(conn)
        yield from figures(dsn, rounds)


def figures(dsn: str, rounds: int) -> Iterator[Figure]:
    """In any database: adds a few jobs of each kind, and a paused queue, limits, and workers that stay alive for it."""
    with connect(dsn) as conn, Roost(dsn) as roost:
        jobs = int(value(conn, "SELECT reltuples::bigint FROM pg_class WHERE oid = 'roost.job_rows'::regclass"))
        for code, job_id in _one_of_each(conn, roost).items():
            # A day of patience: what the table holds may have been measured for long.
            if (said := roost.explain(job_id, stale_after=86_400).code) != code:
                raise BenchError(f"job {job_id} was to be {code}, and is {said}")
            samples = [_milliseconds(roost, job_id) for _ in range(rounds)]
            yield median(f"explain beside {jobs:,}: {code}", samples, "ms", ANSWER)


def _one_of_each(conn: psycopg.Connection[Any], roost: Roost) -> dict[str, int]:
    """A job of each code but `draining`, which is `no-worker` by another name."""
    _add_workers(conn)
    later = datetime.now(UTC) + timedelta(days=1)
    found = {"unknown": 10**15, "behind": roost.enqueue("noop", priority=10)}
    for state in ("completed", "discarded", "cancelled"):
        found[state] = roost.enqueue("noop", queue="idle")
        _finish(conn, found[state], state)
    found["executing"] = roost.enqueue("noop", queue="idle")
    conn.execute("DELETE FROM roost.ready WHERE queue = 'idle' AND job_id = %s", (found["executing"],))
    conn.execute(
        "INSERT INTO roost.claims (job_id, lease, worker_id, attempt)"
        " SELECT %s, nextval('roost.lease_seq'), id, 1 FROM roost.workers LIMIT 1",
        (found["executing"],),
    )
    found["paused"] = roost.enqueue("noop", queue="paused")
    roost.pause_queue("paused")
    found["no-worker"] = roost.enqueue("noop", queue="idel")
    found["unknown-task"] = roost.enqueue("nooop", queue="idle")
    parents = [roost.enqueue("noop", queue="parents", scheduled_at=later)]
    parents += [row[0] for row in conn.execute(_WAITING, (PARENTS - 1,))]
    found["blocked"] = roost.enqueue("noop", queue="idle", depends_on=parents)
    found["scheduled"] = roost.enqueue("noop", queue="idle", scheduled_at=later)
    found["retry-backoff"] = roost.enqueue("noop", queue="idle", scheduled_at=later)
    conn.execute("UPDATE roost.job_rows SET state = 'retryable', attempt = 1 WHERE id = %s", (found["retry-backoff"],))
    conn.execute(
        "INSERT INTO roost.throttles (task, rate_per_minute, limited_since) VALUES ('noop 7', 6000, '-infinity')"
    )
    conn.execute(
        "INSERT INTO roost.throttle_starts (task, at, starts)"
        " SELECT 'noop 7', now() + n * interval '0.1 s', 100 FROM generate_series(1, 600) AS n"
    )
    found["throttled"] = roost.enqueue("noop 7", queue="idle")
    found["busy"] = roost.enqueue("noop", queue="busy")
    found["due"] = roost.enqueue("noop", queue="free")
    return found


_WAITING = """
SELECT id FROM roost.job_rows WHERE state IN ('available', 'retryable') ORDER BY id DESC LIMIT %s
"""


def _add_workers(conn: psycopg.Connection[Any]) -> None:
    tasks = ["noop", "noop 7", *(uuid4().hex[:12] for _ in range(TASKS - 2))]
    free = {"queues": ["default", "emails", "reports", "idle", "parents", "paused", "free"], "children": 4, "busy": 0}
    busy = {"queues": ["busy"], "children": 4, "busy": 4}
    for n in range(WORKERS):
        conn.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, metadata)"
            " VALUES (%s, %s, 'bench', 1, %s, 8, %s)",
            (
                uuid4(),
                f"worker {n}",
                [*free["queues"], *busy["queues"]],  # type: ignore[misc]
                json.dumps({"tasks": tasks, "pools": [free, busy]}),
            ),
        )


def _finish(conn: psycopg.Connection[Any], job_id: int, state: str) -> None:
    conn.execute("DELETE FROM roost.ready WHERE queue = 'idle' AND job_id = %s", (job_id,))
    conn.execute(
        f"UPDATE roost.job_rows SET state = %s, {state}_at = now() WHERE id = %s".encode(),
        (state, job_id),
    )


def _milliseconds(roost: Roost, job_id: int) -> float:
    started_at = time.perf_counter()
    roost.explain(job_id, stale_after=86_400)
    return (time.perf_counter() - started_at) * 1000
