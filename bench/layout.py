"""Which layout of the tables lets a job be claimed and completed at the least cost? Run `python -m bench.layout`.

The measurement behind the narrow tables `ready` and `claims`, on tables of its own: one bare loop, batches of 500, the
layouts taking turns. `one table` holds all in one wide row, updated twice; `with executing` adds what an operator would
want there, an index of the rows that run; `ready and claims` updates the wide row once, and no index covers the update.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg

from bench.figures import Figure, median, median_ratio, table
from bench.rig import Rig, connect
from roostd.embedded import EmbeddedPostgres
from roostd.store.statements import SESSION

JOBS = 20_000
ROUNDS = 7
BATCH = 500
ARGUMENT_BYTES = (10, 1_000)

_JOBS: LiteralString = """
CREATE TABLE jobs (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    scheduled_at timestamptz NOT NULL DEFAULT now(), inserted_at timestamptz NOT NULL DEFAULT now(),
    attempted_at timestamptz, completed_at timestamptz, cancelled_at timestamptz, discarded_at timestamptz,
    priority integer NOT NULL DEFAULT 0, attempt integer NOT NULL DEFAULT 0, max_attempts integer NOT NULL DEFAULT 20,
    crashes integer NOT NULL DEFAULT 0, timeout_seconds integer, lease bigint, worker_id uuid,
    state text NOT NULL DEFAULT 'available', queue text NOT NULL DEFAULT 'default', task text NOT NULL DEFAULT 'noop',
    args jsonb NOT NULL, tags text[], metadata jsonb, errors jsonb, result jsonb
) WITH (fillfactor = 60);
CREATE SEQUENCE leases;
"""
_AVAILABLE: LiteralString = (
    "CREATE INDEX ON jobs (queue, priority, scheduled_at, id) WHERE state IN ('available', 'retryable');"
)
_EXECUTING: LiteralString = "CREATE INDEX ON jobs (worker_id) WHERE state = 'executing';"
_NARROW: LiteralString = """
CREATE TABLE ready (queue text, priority integer, scheduled_at timestamptz, job_id bigint,
                    PRIMARY KEY (queue, priority, scheduled_at, job_id));
CREATE TABLE claims (job_id bigint PRIMARY KEY, lease bigint NOT NULL, worker_id uuid NOT NULL,
                     claimed_at timestamptz NOT NULL DEFAULT now());
"""

_INSERT: LiteralString = """
INSERT INTO jobs (args) SELECT jsonb_build_object('text', repeat('x', %s)) FROM generate_series(1, %s)
RETURNING queue, priority, scheduled_at, id
"""

_CLAIM_IN_ONE: LiteralString = """
WITH candidate AS MATERIALIZED (
    SELECT id FROM jobs
     WHERE queue = 'default' AND state IN ('available', 'retryable')
     ORDER BY priority, scheduled_at, id LIMIT %s
       FOR UPDATE SKIP LOCKED
)
UPDATE jobs
   SET state = 'executing', attempt = attempt + 1, attempted_at = now(), lease = nextval('leases'),
       worker_id = '00000000-0000-0000-0000-000000000001'
  FROM candidate
 WHERE jobs.id = candidate.id
RETURNING jobs.id, jobs.lease, jobs.task, jobs.args::text
"""
_COMPLETE_IN_ONE: LiteralString = """
UPDATE jobs SET state = 'completed', completed_at = now(), worker_id = NULL
  FROM unnest(%s::bigint[], %s::bigint[]) AS o(id, lease)
 WHERE jobs.id = o.id AND jobs.lease = o.lease AND jobs.state = 'executing'
"""
_CLAIM_IN_THREE: LiteralString = """
WITH candidate AS MATERIALIZED (
    SELECT ctid AS row_id FROM ready WHERE queue = 'default'
     ORDER BY priority, scheduled_at, job_id LIMIT %s
       FOR UPDATE SKIP LOCKED
), taken AS MATERIALIZED (
    DELETE FROM ready USING candidate WHERE ready.ctid = candidate.row_id RETURNING ready.job_id
), job AS MATERIALIZED (
    SELECT jobs.id, nextval('leases') AS lease, jobs.task, jobs.args
      FROM taken JOIN jobs ON jobs.id = taken.job_id AND jobs.state IN ('available', 'retryable')
), claim AS (
    INSERT INTO claims (job_id, lease, worker_id) SELECT id, lease, '00000000-0000-0000-0000-000000000001' FROM job
)
SELECT id, lease, task, args::text FROM job
"""
_COMPLETE_IN_THREE: LiteralString = """
WITH ended AS MATERIALIZED (
    DELETE FROM claims USING unnest(%s::bigint[], %s::bigint[]) AS o(id, lease)
     WHERE claims.job_id = o.id AND claims.lease = o.lease
    RETURNING claims.job_id, claims.claimed_at
)
UPDATE jobs SET state = 'completed', attempt = attempt + 1, attempted_at = ended.claimed_at, completed_at = now()
  FROM ended
 WHERE jobs.id = ended.job_id AND jobs.state IN ('available', 'retryable')
"""


@dataclass(frozen=True, slots=True)
class Layout:
    name: str
    tables: LiteralString
    insert: LiteralString
    claim: LiteralString
    complete: LiteralString


LAYOUTS = (
    Layout("one table", _JOBS + _AVAILABLE, _INSERT, _CLAIM_IN_ONE, _COMPLETE_IN_ONE),
    Layout("with executing", _JOBS + _AVAILABLE + _EXECUTING, _INSERT, _CLAIM_IN_ONE, _COMPLETE_IN_ONE),
    Layout(
        "ready and claims",
        _JOBS + _NARROW,
        f"WITH job AS ({_INSERT}) INSERT INTO ready SELECT * FROM job",
        _CLAIM_IN_THREE,
        _COMPLETE_IN_THREE,
    ),
)


def measure(dsn: str, jobs: int = JOBS, rounds: int = ROUNDS) -> list[Figure]:
    """Jobs a second of each layout and size of the arguments. The database must be empty; its schema is replaced."""
    figures = []
    for argument_bytes in ARGUMENT_BYTES:
        rates: dict[str, list[float]] = {layout.name: [] for layout in LAYOUTS}
        for _ in range(rounds):
            for layout in LAYOUTS:
                with connect(dsn) as conn:
                    rates[layout.name].append(_rate(conn, layout, jobs, argument_bytes))
        figures += [median(f"{name}, {argument_bytes:,} bytes", each, "jobs/s") for name, each in rates.items()]
        narrow = rates["ready and claims"]
        for name in ("one table", "with executing"):
            figures.append(median_ratio(f"… ready and claims to {name}", narrow, rates[name]))
    return figures


def create(conn: psycopg.Connection[Any], layout: Layout) -> None:
    """Replaces what is in the schema `public`."""
    conn.execute("DROP SCHEMA public CASCADE")
    conn.execute("CREATE SCHEMA public")
    conn.execute("SET search_path = public")
    conn.execute(layout.tables)


def _rate(conn: psycopg.Connection[Any], layout: Layout, jobs: int, argument_bytes: int) -> float:
    create(conn, layout)
    conn.execute(layout.insert, (argument_bytes, jobs))
    # As autovacuum leaves a table in use. Without statistics the planner would not know that nothing is executing, and
    # would not take the index for it, in which every job leaves a dead entry.
    conn.execute("ANALYZE")
    conn.execute("CHECKPOINT")
    conn.execute(SESSION)
    started_at = time.perf_counter()
    while claimed := conn.execute(layout.claim, (BATCH,), prepare=True).fetchall():
        conn.execute(layout.complete, (column(claimed, 0), column(claimed, 1)), prepare=True)
    return jobs / (time.perf_counter() - started_at)


def column(rows: Sequence[tuple[Any, ...]], number: int) -> str:
    return "{" + ",".join(str(row[number]) for row in rows) + "}"


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="roost-bench-") as directory,
        EmbeddedPostgres(Path(directory) / "postgres") as server,
    ):
        rig = Rig(Path(directory), server)
        machine, figures = rig.describe(), measure(rig.dsn)
    print(table(machine, figures))


if __name__ == "__main__":
    main()
