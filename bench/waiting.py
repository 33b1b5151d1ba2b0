"""How long from an enqueue call to the job's outcome in the hands of the caller, one after the other?

On the way lie three commits that are written to disk: the enqueue's, the claim's and the completion's.
"""

from __future__ import annotations

import time

from bench.figures import Figure, percentile
from bench.rig import Rig, connect, wait_until
from bench.scale import Scale
from roost_client import Roost

INTERVAL_SECONDS = 0.02


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    trips: list[float] = []
    with rig.database() as dsn, connect(dsn) as conn, Roost(dsn) as roost, rig.daemon(dsn):
        wait_until(conn, "SELECT EXISTS (SELECT FROM roost.idle_workers WHERE idle)", seconds=10)
        roost.wait_for(roost.enqueue("note_start"), poll_interval=60)
        for _ in range(scale.latency_jobs):
            called_at = time.monotonic_ns()
            roost.wait_for(roost.enqueue("note_start"), poll_interval=60)
            trips.append((time.monotonic_ns() - called_at) / 1e6)
            time.sleep(INTERVAL_SECONDS)
    trips.sort()
    return [
        Figure("enqueue and wait_for, median", percentile(trips, 50), "ms", samples=trips),
        Figure("enqueue and wait_for, 99th percentile", percentile(trips, 99), "ms"),
    ]
