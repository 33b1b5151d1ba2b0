"""How much is measured: in full, or just enough to see that everything runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    rounds: int = 7
    drain_jobs: int = 20_000
    latency_jobs: int = 200
    enqueue_single: int = 2_000
    enqueue_in_transaction: int = 5_000
    enqueue_many: int = 100_000
    enqueue_rounds: int = 3
    crowd_seconds: float = 2.0
    crowd_rounds: int = 5
    chain_jobs: int = 500
    following_rounds: int = 5
    backlog_rows: int = 1_000_000
    backlog_jobs: int = 10_000
    backlog_rounds: int = 15
    cron_entries: int = 1_000
    operating_rows: int = 5_000_000
    operating_rounds: int = 11
    idle_seconds: float = 20.0
    many_children: int = 16


FULL = Scale()
QUICK = Scale(
    rounds=1,
    drain_jobs=2_000,
    latency_jobs=10,
    enqueue_single=20,
    enqueue_in_transaction=20,
    enqueue_many=1_000,
    enqueue_rounds=1,
    crowd_seconds=0.2,
    crowd_rounds=1,
    chain_jobs=20,
    following_rounds=1,
    backlog_rows=5_000,
    backlog_jobs=1_000,
    backlog_rounds=1,
    cron_entries=50,
    operating_rows=5_000,
    operating_rounds=1,
    idle_seconds=2.0,
    many_children=4,
)
