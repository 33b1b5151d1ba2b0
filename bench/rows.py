"""Puts jobs into the tables for a measurement, straight, and reads how fast they were completed.

The only place in the benchmark, besides the floor, that knows the tables behind roost.jobs.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg

from bench.rig import value, wait_until

_INSERT = """
INSERT INTO roost.job_rows (queue, task, state, scheduled_at, completed_at)
SELECT %s, 'noop', %s, %s, %s FROM generate_series(1, %s)
"""
_LAST_LEASE = "SELECT coalesce(pg_sequence_last_value('roost.lease_seq'), 0)"


def clear(conn: psycopg.Connection[Any]) -> None:
    """Empties the tables and has all else written out, so that no checkpoint falls into the measurement."""
    conn.execute(
        "TRUNCATE roost.job_rows, roost.ready, roost.scheduled, roost.throttled, roost.claims, roost.unique_keys,"
        " roost.blocked, roost.dependencies, roost.cancelled_dependents, roost.ended_parents"
    )
    conn.execute("CHECKPOINT")


def add_worker(conn: psycopg.Connection[Any]) -> UUID:
    """Adds a worker under which a bare loop claims."""
    worker_id = uuid4()
    conn.execute(
        "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency) VALUES (%s, '', '', 0, '{}', 0)",
        (worker_id,),
    )
    return worker_id


def add_ready(conn: psycopg.Connection[Any], jobs: int, queue: str = "default") -> None:
    """Adds jobs that may run now."""
    conn.execute(
        f"WITH job AS ({_INSERT} RETURNING queue, priority, scheduled_at, id)"
        " INSERT INTO roost.ready (queue, priority, scheduled_at, job_id) SELECT * FROM job",
        (queue, "available", "now", None, jobs),
    )


def add_scheduled(conn: psycopg.Connection[Any], jobs: int, queue: str = "default") -> None:
    """Adds jobs that may run in a day."""
    conn.execute(
        f"WITH job AS ({_INSERT} RETURNING scheduled_at, id, priority, queue)"
        " INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue) SELECT * FROM job",
        (queue, "available", "tomorrow", None, jobs),
    )


def add_throttled(conn: psycopg.Connection[Any], jobs: int, queue: str = "default") -> None:
    """Adds jobs of a task that starts one a minute."""
    conn.execute(
        "INSERT INTO roost.throttles (task, rate_per_minute, limited_since) VALUES ('noop again', 1, '-infinity')"
    )
    conn.execute(
        f"WITH job AS ({_INSERT.replace('noop', 'noop again')} RETURNING task, queue, priority, scheduled_at, id)"
        " INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id) SELECT * FROM job",
        (queue, "available", "now", None, jobs),
    )


def add_completed(conn: psycopg.Connection[Any], jobs: int, queue: str = "default") -> None:
    """Adds jobs that were completed yesterday."""
    conn.execute(_INSERT, (queue, "completed", "yesterday", "yesterday", jobs))


def settle_down(conn: psycopg.Connection[Any]) -> None:
    """Does now what autovacuum and the checkpointer would do in the middle of a measurement."""
    conn.execute("VACUUM (ANALYZE) roost.job_rows, roost.ready, roost.scheduled, roost.throttled, roost.claims")
    conn.execute("CHECKPOINT")


def database_time(conn: psycopg.Connection[Any]) -> datetime:
    now = value(conn, "SELECT clock_timestamp()")
    assert isinstance(now, datetime)
    return now


def wait_claimed(conn: psycopg.Connection[Any], lease_before: int, jobs: int, seconds: float) -> None:
    """Waits until that many jobs have been claimed after `lease_before`: a question that costs the database nothing."""
    wait_until(conn, f"{_LAST_LEASE} >= %s", lease_before + jobs, seconds=seconds)


def last_lease(conn: psycopg.Connection[Any]) -> int:
    return int(value(conn, _LAST_LEASE))


def wait_completed(conn: psycopg.Connection[Any], since: datetime, jobs: int, seconds: float) -> None:
    wait_until(conn, "SELECT count(*) >= %s FROM roost.job_rows WHERE completed_at >= %s", jobs, since, seconds=seconds)


def completion_rate(conn: psycopg.Connection[Any], since: datetime, first: int) -> float:
    """Jobs a second from the first completion after `since` to that of the job that makes `first`.

    All jobs of a batch bear the time its statement began: those of the first batch were done before the clock started.
    """
    batches = conn.execute(
        "SELECT completed_at, count(*) FROM roost.job_rows WHERE completed_at >= %s GROUP BY 1 ORDER BY 1", (since,)
    ).fetchall()
    (started_at, already), *rest = batches
    done = already
    for completed_at, jobs in rest:
        done += jobs
        if done >= first:
            return float((done - already) / (completed_at - started_at).total_seconds())
    raise AssertionError(f"only {done} of {first} jobs were completed")
