"""How many transactions a second does a daemon cost that has nothing to do?"""

from __future__ import annotations

import time

from bench.figures import Aim, Figure
from bench.rig import Rig, connect, value, wait_until
from bench.scale import Scale

# Asked from another database: there the question itself doesn't count.
_TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"
HAND_IN_SECONDS = 11.0  # a session that falls silent hands in its counts within ten seconds: those of the start, here


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    with rig.database() as dsn, rig.daemon(dsn), connect(rig.dsn) as other:
        with connect(dsn) as conn:
            wait_until(conn, "SELECT EXISTS (SELECT FROM roost.idle_workers WHERE idle)", seconds=10)
            name = conn.info.dbname
        time.sleep(HAND_IN_SECONDS)
        before, started_at = value(other, _TRANSACTIONS, name), time.monotonic()
        time.sleep(scale.idle_seconds)
        after, seconds = value(other, _TRANSACTIONS, name), time.monotonic() - started_at
    return [Figure("transactions of an idle daemon", (after - before) / seconds, "/s", Aim("≤", 2))]
