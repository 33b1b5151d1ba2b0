"""What does it cost when another session holds a transaction open for minutes, so that no dead row can be removed?

Every competitor is under the same steady load for five minutes, once with such a session and once without. Then, with
that session still there, comes the pickup latency, in which the claim is what changes, and a drain.
"""

from __future__ import annotations

from race.drain import drain, fitting
from race.latency import percentile, pickup, warm_up
from race.rig import Place, RaceError, connect
from race.scale import Scale

CATCH_UP_SECONDS = 60.0


def measure(place: Place, scale: Scale, pace: float) -> dict[str, float]:
    with place.rig.place(place.entrant) as free:
        rate, wait = _after_load(free, scale, pace)
    with connect(place.dsn) as conn:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT count(*) FROM pg_class")  # the snapshot is taken now
        pinned_rate, pinned_wait = _after_load(place, scale, pace)
        conn.execute("ROLLBACK")
    return {
        "horizon_rate": pinned_rate,
        "horizon_rate_ratio": 100 * pinned_rate / rate,
        "horizon_pickup": pinned_wait,
        "horizon_pickup_ratio": 100 * pinned_wait / wait,
    }


def _after_load(place: Place, scale: Scale, pace: float) -> tuple[float, float]:
    """Jobs a second of a drain, and the median pickup latency in ms, after a time of load."""
    per_second = min(scale.horizon_per_second, int(pace / 2))
    with place.workers(scale.children) as workers:
        warm_up(place, workers, scale.children)
        place.ask(
            "load", "noop", 1, per_second, scale.horizon_seconds, seconds=scale.horizon_seconds * 3 + CATCH_UP_SECONDS
        )
        asked = round(per_second * 0.05) * round(scale.horizon_seconds / 0.05)
        if not place.ledger.wait(asked, CATCH_UP_SECONDS, workers.look_after):
            raise RaceError(f"only {len(place.ledger)} of {asked} jobs ran: it doesn't keep up with the load")
        place.ledger.clear()
        wait = percentile(pickup(place, scale), 50)
    place.ledger.clear()
    jobs = fitting(scale.backlog_jobs, scale, pace)
    place.enqueue("noop", jobs)
    return drain(place, scale, jobs, scale.drain_seconds), wait
