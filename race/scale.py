"""How much is measured: in full, or just enough to see that everything runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    quick: bool = False
    rounds: int = 5
    children: int = 2
    drain_jobs: int = 20_000  # a slow competitor gets fewer, as many as fill drain_seconds
    drain_seconds: float = 4.0
    burn_jobs: int = 2_000
    least_jobs: int = 400
    latency_jobs: int = 100
    latency_interval_seconds: float = 0.05
    enqueue_single: int = 500
    enqueue_many: int = 5_000
    many_children: int = 16
    all_there_seconds: float = 5.0  # that every child has to run something, before a measurement without a queue
    harm_jobs: int = 200
    harm_seconds: float = 30.0
    backlog_rows: int = 1_000_000
    backlog_jobs: int = 10_000
    backlog_rounds: int = 3
    horizon_seconds: float = 300.0
    horizon_per_second: int = 500
    horizon_rounds: int = 3
    crowd_seconds: float = 3.0


FULL = Scale()
QUICK = Scale(
    quick=True,
    rounds=1,
    drain_jobs=1_000,
    drain_seconds=1.0,
    burn_jobs=200,
    least_jobs=100,
    latency_jobs=15,
    enqueue_single=20,
    enqueue_many=500,
    many_children=4,
    all_there_seconds=1.0,
    harm_jobs=40,
    harm_seconds=5.0,
    backlog_rows=5_000,
    backlog_jobs=500,
    backlog_rounds=1,
    horizon_seconds=2.0,
    horizon_per_second=100,
    horizon_rounds=1,
    crowd_seconds=0.5,
)
