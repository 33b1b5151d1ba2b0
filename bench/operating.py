"""How long does an operator wait for an answer, with millions of jobs in the table?

One database of 30 days, in which nearly all jobs have been completed; what is asked is what `roostctl` asks, through
the client, the connection open already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psycopg

from bench import explaining, rows
from bench.figures import Aim, Figure, median
from bench.rig import Rig, connect
from bench.scale import Scale
from roost_client import Roost

DAYS = 30
ANSWER = Aim("≤", 50)
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "completed": {"state": "completed"},
    "discarded": {"state": "discarded"},
    "cancelled": {"state": "cancelled"},
    "executing": {"state": "executing"},
    "available": {"state": "available"},
    "retryable": {"state": "retryable"},
    "discarded or retryable": {"state": ["discarded", "retryable"]},
    "a queue of 1 in 10": {"queue": "emails"},
    "a queue of 1 in 1,000": {"queue": "reports"},
    "a queue of 50 jobs, weeks ago": {"queue": "rare"},
    "a task of 1 in 20": {"task": "send_receipt"},
    "a task of 50 jobs, weeks ago": {"task": "rare"},
    "a queue and a task that nobody has": {"queue": "nobody", "task": "nobody"},
    "a tag of 1 in 100": {"tag": "customer 7"},
    "older than 20 days": {"older_than": timedelta(days=20)},
    "the last hour": {"newer_than": timedelta(hours=1)},
    "the last hour, a tag that nobody has": {"newer_than": timedelta(hours=1), "tag": "nobody"},
    "the text of an error": {"error": "connection refused"},
    "discarded, of a queue of 1 in 1,000, by the text": {"state": "discarded", "queue": "reports", "error": "refused"},
}


def measure(rig: Rig, scale: Scale) -> Iterator[Figure]:
    with many_jobs(rig, scale.operating_rows) as dsn, Roost(dsn) as roost:

        def timed(name: str, ask: Callable[[], object], aim: Aim | None = ANSWER) -> Figure:
            ask()
            return median(name, [_milliseconds(ask) for _ in range(scale.operating_rounds)], "ms", aim)

        for name, filters in FILTERS.items():
            yield timed(f"jobs of {scale.operating_rows:,}: {name}", lambda f=filters: roost.list_jobs(**f))  # type: ignore[misc]
        yield timed("… a tag that nobody has: all are read", lambda: roost.list_jobs(tag="nobody"), aim=None)
        yield timed("… a text that no error has: all errors are read", lambda: roost.list_jobs(error="none"), aim=None)
        yield timed("… count of the discarded", roost.count_discarded, aim=None)
        yield from explaining.figures(dsn, scale.operating_rounds)  # adds jobs and workers


@contextmanager
def many_jobs(rig: Rig, jobs: int) -> Iterator[str]:
    """The DSN of a database with that many jobs of 30 days, in all states. Five million take about a minute."""
    with rig.database() as dsn:
        with connect(dsn) as conn:
            _fill(conn, jobs)
        yield dsn


def _fill(conn: psycopg.Connection[Any], jobs: int) -> None:
    """By the last two digits of their ids, of 100 jobs each: 1 discarded, 1 cancelled, 1 that failed once, 97 others.

    Most of the newest 20,000 wait, and 200 run; 2,000 old ones wait for next year.
    """
    waiting, running, later = jobs // 250, min(200, jobs // 1000), jobs // 2500
    conn.execute(
        """
WITH job AS (
    SELECT n, now() - make_interval(days => %(days)s) * ((%(jobs)s - n)::float8 / %(jobs)s) AS at,
           n > %(jobs)s - %(waiting)s OR n <= %(later)s AS waits, n %% 100 AS kind
      FROM generate_series(1, %(jobs)s) AS n
)
INSERT INTO roost.job_rows (inserted_at, scheduled_at, attempted_at, completed_at, cancelled_at, discarded_at,
                            attempt, state, queue, task, args, tags, errors)
SELECT at, CASE WHEN n <= %(later)s THEN now() + interval '1 year' ELSE at END, CASE WHEN NOT waits THEN at END,
       CASE WHEN NOT waits AND kind NOT IN (1, 2) THEN at END,
       CASE WHEN NOT waits AND kind = 2 THEN at END,
       CASE WHEN NOT waits AND kind = 1 THEN at END,
       CASE WHEN waits THEN 0 ELSE 1 END,
       CASE WHEN waits AND kind IN (1, 3) THEN 'retryable' WHEN waits THEN 'available'
            WHEN kind = 1 THEN 'discarded' WHEN kind = 2 THEN 'cancelled' ELSE 'completed' END,
       CASE WHEN n BETWEEN %(jobs)s / 4 AND %(jobs)s / 4 + 49 THEN 'rare' WHEN n %% 1009 = 0 THEN 'reports'
            WHEN n %% 11 = 0 THEN 'emails' ELSE 'default' END,
       CASE WHEN n BETWEEN %(jobs)s / 5 AND %(jobs)s / 5 + 49 THEN 'rare' WHEN n %% 21 = 0 THEN 'send_receipt'
            ELSE 'noop' END,
       jsonb_build_object('order', n), CASE WHEN kind = 7 THEN ARRAY['customer 7'] END,
       CASE WHEN kind IN (1, 3) THEN jsonb_build_array(jsonb_build_object(
                'attempt', 1, 'at', at, 'trace', repeat(E'  File "shop/jobs.py", line 1, in send_receipt\\n', 10),
                'error', CASE WHEN n %% 17 < 8 THEN 'ConnectionError: Connection refused' ELSE 'KeyError: 7' END))
       END
  FROM job
        """,
        {"days": DAYS, "jobs": jobs, "waiting": waiting, "later": later},
    )
    last = jobs - waiting
    conn.execute(
        "INSERT INTO roost.claims (job_id, lease, worker_id, attempt)"
        " SELECT id, id, gen_random_uuid(), 1 FROM roost.job_rows WHERE id > %s AND id <= %s",
        (jobs - running, jobs),
    )
    conn.execute(
        "INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)"
        " SELECT queue, priority, scheduled_at, id FROM roost.job_rows WHERE id > %s AND id <= %s",
        (last, jobs - running),
    )
    conn.execute(
        "INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)"
        " SELECT scheduled_at, id, priority, queue FROM roost.job_rows WHERE id <= %s",
        (later,),
    )
    rows.settle_down(conn)


def _milliseconds(ask: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    ask()
    return (time.perf_counter() - started_at) * 1000
