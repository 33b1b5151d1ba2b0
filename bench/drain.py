"""How fast is a full queue drained, beside the least that the database itself takes for it?

The floor is one bare loop on one connection that claims and completes the same rows with the daemon's own statements,
in batches of 500, and runs no handler. Floor and drain alternate: on a shared machine only what was measured
side by side can be compared.
"""

from __future__ import annotations

from bench import rows
from bench.figures import Aim, Figure, median, median_ratio
from bench.rig import Rig, connect
from bench.scale import Scale
from roostd.core.frontier import everywhere
from roostd.store.statements import SESSION, SQL, claim_parameters

BATCH = 500
DEADLINE_SECONDS = 60.0


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    floors, drains = [], []
    with rig.database() as dsn:
        for _ in range(scale.rounds):
            floors.append(floor(dsn, scale.drain_jobs))
            drains.append(drain(rig, dsn, scale.drain_jobs))
    return [
        median("floor", floors, "jobs/s"),
        median("drain", drains, "jobs/s", Aim("≥", 30_000)),
        median_ratio("drain as part of the floor", drains, floors, "%", Aim("≥", 50)),
    ]


def drain(rig: Rig, dsn: str, jobs: int) -> float:
    """Jobs a second that a fresh daemon drains."""
    with connect(dsn) as conn:
        rows.clear(conn)
        rows.add_ready(conn, jobs)
        since, lease = rows.database_time(conn), rows.last_lease(conn)
        with rig.daemon(dsn):
            rows.wait_claimed(conn, lease, jobs, DEADLINE_SECONDS)
            rows.wait_completed(conn, since, jobs, DEADLINE_SECONDS)
        return rows.completion_rate(conn, since, jobs)


def floor(dsn: str, jobs: int) -> float:
    """Jobs a second of the bare loop, read from the database as for the daemon."""
    with connect(dsn) as conn:
        rows.clear(conn)
        rows.add_ready(conn, jobs)
        since = rows.database_time(conn)
        conn.execute(SESSION)
        worker_id = rows.add_worker(conn)
        claim = claim_parameters(worker_id, everywhere(["default"]), BATCH)
        while claimed := conn.execute(SQL["claim"], claim, prepare=True).fetchall():
            conn.execute(
                SQL["complete"],
                {"job_ids": _array(claimed, 0), "leases": _array(claimed, 1), "results": []},
                prepare=True,
            ).fetchall()
        conn.execute("DELETE FROM roost.workers WHERE id = %s", (worker_id,))
        return rows.completion_rate(conn, since, jobs)


def _array(claimed: list[tuple[int, ...]], column: int) -> str:
    return "{" + ",".join(str(row[column]) for row in claimed) + "}"
