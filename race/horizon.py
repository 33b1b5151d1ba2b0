"""What does it cost when another session holds a transaction open for minutes, so that no dead row can be removed?

Every competitor is under steady load for five minutes while such a session is there. Then come the pickup latency, in
which the claim is what changes, and drains. Then that session ends, what is dead is vacuumed away, and the same is
measured again on the same tables: nothing but the dead rows tells the two apart. A run without the session would take
the five minutes once more, and differ in its history too.
"""

from __future__ import annotations

import statistics

from bench.figures import percentile
from race.drain import drain, fitting
from race.latency import pickup, warm_up
from race.rig import Place, RaceError, connect, value
from race.scale import Scale

CATCH_UP_SECONDS = 60.0


def measure(place: Place, scale: Scale, pace: float) -> dict[str, float]:
    with connect(place.dsn) as conn:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT count(*) FROM pg_class")  # the snapshot is taken now
        _load(place, scale, pace)
        pinned_wait = _wait(place, scale)
        pinned_rate = _rate(place, scale, pace)
        dead = _dead_rows(place)
        conn.execute("ROLLBACK")
    place.settle_down()
    wait = _wait(place, scale)
    rate = _rate(place, scale, pace)
    return {
        "horizon_dead": dead,
        "horizon_rate": pinned_rate,
        "horizon_rate_ratio": 100 * pinned_rate / rate,
        "horizon_pickup": pinned_wait,
        "horizon_pickup_ratio": 100 * pinned_wait / wait,
    }


def _load(place: Place, scale: Scale, pace: float) -> None:
    per_second = min(scale.horizon_per_second, int(pace / 2))
    with place.workers(scale.children) as workers:
        warm_up(place, workers, scale)
        limit = scale.horizon_seconds * 3 + CATCH_UP_SECONDS
        place.ask("load", "noop", 1, per_second, scale.horizon_seconds, seconds=limit)
        asked = round(per_second * 0.05) * round(scale.horizon_seconds / 0.05)
        if not place.ledger.wait(asked, CATCH_UP_SECONDS, workers.look_after):
            raise RaceError(f"only {len(place.ledger)} of {asked} jobs ran: it doesn't keep up with the load")


def _wait(place: Place, scale: Scale) -> float:
    """The median pickup latency in ms."""
    place.ledger.clear()  # what ran before must not pass for the warm-up
    with place.workers(scale.children) as workers:
        warm_up(place, workers, scale)
        return percentile(pickup(place, scale), 50)


def _rate(place: Place, scale: Scale, pace: float) -> float:
    """Jobs a second, the median of some drains."""
    jobs = fitting(scale.backlog_jobs, scale, pace)
    rates = []
    for _ in range(scale.horizon_rounds):
        place.ledger.clear()
        place.enqueue("noop", jobs)
        rates.append(drain(place, scale, jobs, scale.drain_seconds))
    return statistics.median(rates)


def _dead_rows(place: Place) -> float:
    """As the last vacuum, the one before the last drain, and what came since count them."""
    with connect(place.dsn) as conn:
        return float(value(conn, "SELECT sum(n_dead_tup)::float8 FROM pg_stat_all_tables"))
