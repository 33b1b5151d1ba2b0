"""What unique keys and dependencies cost the jobs that have them, and those that have none beside them."""

from __future__ import annotations

from collections.abc import Sequence

from bench import rows
from bench.figures import Aim, Figure, median, median_ratio
from bench.rig import Rig, connect
from bench.scale import Scale
from roost_client import JobInsert, Roost

DEADLINE_SECONDS = 60.0


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    jobs, links = scale.drain_jobs, scale.chain_jobs
    chain: list[JobInsert] = []
    for _ in range(links):
        chain.append(JobInsert("noop", depends_on=chain[-1:]))
    first = JobInsert("noop")
    inserts = {
        "plain": [JobInsert("noop")] * jobs,
        "unique": [JobInsert("noop", unique_key=None if n % 10 else str(n)) for n in range(jobs)],
        "chain": chain,
        "fan-out": [first, *(JobInsert("noop", depends_on=[first]) for _ in range(jobs))],
    }
    rates: dict[str, list[float]] = {name: [] for name in inserts}
    with rig.database() as dsn:
        for _ in range(scale.following_rounds):
            for name, each in inserts.items():
                rates[name].append(_drain(rig, dsn, each))
    return [
        median("drain with 10 % unique keys", rates["unique"], "jobs/s"),
        median_ratio("… relative to none", rates["unique"], rates["plain"], aim=Aim("≥", 0.9)),
        median("from one job of a chain to the next", [1000 / rate for rate in rates["chain"]], "ms"),
        median(f"drain of {jobs:,} that depend on one", rates["fan-out"], "jobs/s"),
        median_ratio("… relative to as many that depend on none", rates["fan-out"], rates["plain"]),
    ]


def _drain(rig: Rig, dsn: str, inserts: Sequence[JobInsert]) -> float:
    """Jobs a second that a fresh daemon drains."""
    with connect(dsn) as conn, Roost(dsn) as roost:
        rows.clear(conn)
        roost.enqueue_many(inserts)
        rows.settle_down(conn)
        since = rows.database_time(conn)
        with rig.daemon(dsn):
            rows.wait_completed(conn, since, len(inserts), DEADLINE_SECONDS)
        return rows.completion_rate(conn, since, len(inserts))
