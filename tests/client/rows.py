"""Jobs in the states that only a worker brings about."""

from __future__ import annotations

from typing import Any

import psycopg


def put(observer: psycopg.Connection[Any], job_id: int, state: str, **columns: Any) -> None:
    """Leave a job as the worker's statements leave it."""
    observer.execute("DELETE FROM roost.ready WHERE job_id = %s", (job_id,))
    if state == "executing":
        observer.execute(
            "INSERT INTO roost.claims (job_id, lease, worker_id, attempt)"
            " VALUES (%s, nextval('roost.lease_seq'), gen_random_uuid(), 1)",
            (job_id,),
        )
    else:
        observer.execute("UPDATE roost.job_rows SET state = %s WHERE id = %s", (state, job_id))
    if state == "retryable":
        observer.execute("UPDATE roost.job_rows SET scheduled_at = '2050-01-01Z', attempt = 1 WHERE id = %s", (job_id,))
        observer.execute(
            "INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)"
            " SELECT scheduled_at, id, priority, queue FROM roost.job_rows WHERE id = %s",
            (job_id,),
        )
    if state == "discarded":
        observer.execute(
            "UPDATE roost.job_rows SET attempt = 20, crashes = 2, cancel_requested = true, discarded_at = now(),"
            ' errors = \'[{"error": "no"}]\' WHERE id = %s',
            (job_id,),
        )
