"""How many transactions a second does a daemon cost that has nothing to do?

A session hands in its counts when it likes, but at its end for certain. So two daemons are run from start to end, one
for longer than the other, and what the longer one took more is what standing idle took.
"""

from __future__ import annotations

import time
from typing import Any, LiteralString

import psycopg

from bench.figures import Aim, Figure
from bench.rig import Rig, connect, value, wait_until
from bench.scale import Scale

# Asked from another database: there the question itself doesn't count.
_TRANSACTIONS = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s"


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    with rig.database() as dsn, connect(rig.dsn) as other:
        _set_autovacuum(other, "off")
        try:
            short = _transactions(rig, dsn, other, 0)
            long = _transactions(rig, dsn, other, scale.idle_seconds)
        finally:
            _set_autovacuum(other, "on")
    return [Figure("transactions of an idle daemon", (long - short) / scale.idle_seconds, "/s", Aim("≤", 2))]


def _transactions(rig: Rig, dsn: str, other: psycopg.Connection[Any], seconds: float) -> int:
    """The transactions of a daemon that stands idle for that long, and of the question whether it does."""
    with connect(dsn) as conn:
        name = conn.info.dbname
    wait_until(other, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = %s)", name, seconds=10)
    before = int(value(other, _TRANSACTIONS, name))
    with rig.daemon(dsn), connect(dsn) as conn:
        with conn.transaction():
            wait_until(conn, "SELECT EXISTS (SELECT FROM roost.idle_workers WHERE idle)", seconds=10)
        time.sleep(seconds)
    wait_until(other, "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = %s)", name, seconds=10)
    return int(value(other, _TRANSACTIONS, name)) - before


def _set_autovacuum(conn: psycopg.Connection[Any], to: LiteralString) -> None:
    """Its workers' transactions would count as the daemon's."""
    conn.execute(f"ALTER SYSTEM SET autovacuum = {to}")
    conn.execute("SELECT pg_reload_conf()")
