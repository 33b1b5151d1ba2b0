"""How fast can an application enqueue, one by one and in bulk, while nobody runs the jobs?"""

from __future__ import annotations

import time

from bench import rows
from bench.figures import Aim, Figure, median
from bench.rig import Rig, connect
from bench.scale import Scale
from roost_client import JobInsert, Roost


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    committed, together, bulk = [], [], []
    with rig.database() as dsn, connect(dsn) as conn, Roost(dsn) as roost:
        for _ in range(scale.enqueue_rounds):
            rows.clear(conn)
            started_at = time.perf_counter()
            for number in range(scale.enqueue_single):
                roost.enqueue("noop", args={"number": number})
            committed.append(scale.enqueue_single / (time.perf_counter() - started_at))

            rows.clear(conn)
            started_at = time.perf_counter()
            with conn.transaction():
                for number in range(scale.enqueue_in_transaction):
                    roost.enqueue("noop", args={"number": number}, conn=conn)
            together.append(scale.enqueue_in_transaction / (time.perf_counter() - started_at))

            rows.clear(conn)
            jobs = [JobInsert("noop", {"number": number}) for number in range(scale.enqueue_many)]
            started_at = time.perf_counter()
            roost.enqueue_many(jobs)
            bulk.append(scale.enqueue_many / (time.perf_counter() - started_at))
    return [
        median("enqueue, each committed by itself", committed, "jobs/s"),
        median("enqueue, in one transaction", together, "jobs/s"),
        median(f"enqueue_many of {scale.enqueue_many:,}", bulk, "jobs/s", Aim("≥", 40_000)),
    ]
