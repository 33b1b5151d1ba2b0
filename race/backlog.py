"""Does a million waiting jobs slow the drain of the first ten thousand down?"""

from __future__ import annotations

import statistics

from psycopg import sql

from race.drain import drain, fitting
from race.rig import Place, connect
from race.scale import Scale

CHUNK = 50_000


def measure(place: Place, scale: Scale, pace: float) -> dict[str, float]:
    """The rate with the backlog, and relative to the rate without: medians of drains that take turns."""
    jobs = fitting(scale.backlog_jobs, scale, pace)
    alone: list[float] = []
    beside: list[float] = []
    with place.rig.place(place.entrant) as other:
        fill(place, scale.backlog_rows)
        for _ in range(scale.backlog_rounds):
            other.ledger.clear()
            other.enqueue("noop", 2 * jobs)
            alone.append(drain(other, scale, jobs, scale.drain_seconds, all_there_are=False))
            place.ledger.clear()
            beside.append(drain(place, scale, jobs, scale.drain_seconds, all_there_are=False))
    rate = statistics.median(beside)
    return {"backlog_rate": rate, "backlog_ratio": 100 * rate / statistics.median(alone)}


def fill(place: Place, rows: int) -> None:
    """Adds waiting no-ops: copies of one, where its own API would take minutes."""
    table = place.entrant.table
    if not table:
        for first in range(0, rows, CHUNK):
            place.enqueue("noop", min(CHUNK, rows - first))
        return
    place.enqueue("noop", 1)
    with connect(place.dsn) as conn:
        conn.execute("SET session_replication_role = replica")  # no triggers: nobody is there to be notified
        columns = conn.execute(_COLUMNS, (table,)).fetchall()
        keys = [name for name, kind, is_key in columns if is_key and kind == "uuid"]  # others have a default
        copied = [name for name, _, is_key in columns if not is_key]
        conn.execute(
            sql.SQL(
                "INSERT INTO {table} ({names}) SELECT {values} FROM (SELECT * FROM {table} LIMIT 1) AS one, {}"
            ).format(
                sql.SQL("generate_series(1, {})").format(rows),
                table=sql.Identifier(table),
                names=sql.SQL(", ").join(map(sql.Identifier, keys + copied)),
                values=sql.SQL(", ").join([*[sql.SQL("gen_random_uuid()")] * len(keys), *map(sql.Identifier, copied)]),
            )
        )


_COLUMNS = """
SELECT attribute.attname, attribute.atttypid::regtype::text, coalesce(attribute.attnum = ANY (key.conkey), false)
  FROM pg_attribute AS attribute
  LEFT JOIN pg_constraint AS key ON key.conrelid = attribute.attrelid AND key.contype = 'p'
 WHERE attribute.attrelid = %s::regclass AND attribute.attnum > 0 AND NOT attribute.attisdropped
"""
