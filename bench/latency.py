"""How long from the enqueue call to the handler's first line, on a daemon that has nothing else to do?

On the way lie two commits that are written to disk, the enqueue's and the claim's. What one such commit takes by
itself is measured between the jobs: it says how much of the figure is the disk's.
"""

from __future__ import annotations

import time

from bench.figures import Aim, Figure, percentile
from bench.rig import Rig, connect, wait_until
from bench.scale import Scale
from roost_client import Roost

INTERVAL_SECONDS = 0.05


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    calls: dict[int, int] = {}  # job id -> when enqueue was called, ns
    commits: list[float] = []
    with rig.database() as dsn, connect(dsn) as conn, Roost(dsn) as roost, rig.daemon(dsn):
        conn.execute("CREATE TABLE bare (number integer)")
        wait_until(conn, "SELECT EXISTS (SELECT FROM roost.idle_workers WHERE idle)", seconds=10)
        at = time.monotonic()
        for number in range(scale.latency_jobs):
            called_at = time.monotonic_ns()
            calls[roost.enqueue("note_start")] = called_at
            _sleep_until(at + INTERVAL_SECONDS / 2)
            began_at = time.monotonic_ns()
            conn.execute("INSERT INTO bare VALUES (%s)", (number,))
            commits.append((time.monotonic_ns() - began_at) / 1e6)
            at += INTERVAL_SECONDS
            _sleep_until(at)
        wait_until(conn, "SELECT count(*) >= %s FROM roost.jobs WHERE state = 'completed'", len(calls), seconds=30)
        starts = conn.execute("SELECT id, result::text::bigint FROM roost.jobs").fetchall()
    waits = sorted((started_at - calls[job_id]) / 1e6 for job_id, started_at in starts)
    commits.sort()
    return [
        Figure("pickup latency, median", percentile(waits, 50), "ms", Aim("≤", 3), waits),
        Figure("pickup latency, 95th percentile", percentile(waits, 95), "ms"),
        Figure("pickup latency, 99th percentile", percentile(waits, 99), "ms", Aim("≤", 5)),
        Figure("one bare commit in between, median", percentile(commits, 50), "ms", samples=commits),
        Figure("one bare commit in between, 99th percentile", percentile(commits, 99), "ms"),
    ]


def _sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
