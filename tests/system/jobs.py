"""The jobs of a test's database: enqueued as an application does it, waited for, and looked at as they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from roost_client import Job, JobInsert, Roost
from tests.system.daemon import PATIENCE_SECONDS

TERMINAL = ("completed", "discarded", "cancelled")


class Jobs:
    """`told` adds to the message of a failure: the daemon's log."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.roost = Roost(dsn)
        self.told: Callable[[], str] = str

    def close(self) -> None:
        self.roost.close()

    def add(self, task: str, args: dict[str, Any] | None = None, **options: Any) -> int:
        return self.roost.enqueue(task, args=args, **options)

    def add_many(self, number: int, task: str, args: dict[str, Any] | None = None, **options: Any) -> list[int]:
        """Enqueues `number` equal jobs in one transaction; their ids."""
        with psycopg.connect(self.dsn) as conn:
            (last,) = conn.execute("SELECT coalesce(max(id), 0) FROM roost.job_rows").fetchone() or (0,)
            self.roost.enqueue_many([JobInsert(task, args, **options)] * number, conn=conn)
            rows = conn.execute(
                "SELECT id FROM roost.job_rows WHERE id > %s AND task = %s ORDER BY id", (last, task)
            ).fetchall()
        return [row[0] for row in rows]

    def get(self, job_id: int) -> Job:
        return self.roost.get_job(job_id)

    def crashes(self, job_id: int) -> int:
        (row,) = self.query("SELECT crashes FROM roost.jobs WHERE id = %s", job_id)
        return int(row["crashes"])

    def query(self, sql: str, *parameters: Any) -> list[dict[str, Any]]:
        with psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row) as conn:
            cursor = conn.execute(sql.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def wait(self, job_id: int, *states: str, seconds: float = PATIENCE_SECONDS) -> Job:
        """The job, once it is in one of the states (default: a terminal one)."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.get(job_id)
            if job.state in (states or TERMINAL):
                return job
            if time.monotonic() > deadline or job.state in TERMINAL:
                expected = " or ".join(states) or "terminal"
                pytest.fail(f"job {job_id} is not {expected}, but {job!r}. {self.told()}")
            time.sleep(0.01)

    def wait_all(self, job_ids: Sequence[int], *states: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Returns when each of the jobs is in one of the states (default: completed)."""
        states = states or ("completed",)
        deadline = time.monotonic() + seconds
        while left := self.query(
            "SELECT id, state, attempt, errors::text FROM roost.jobs WHERE id = ANY (%s) AND state <> ALL (%s)",
            list(job_ids),
            list(states),
        ):
            if time.monotonic() > deadline:
                pytest.fail(f"{len(left)} jobs are not {' or '.join(states)}: {left[:5]}. {self.told()}")
            time.sleep(0.02)

    def count(self, state: str) -> int:
        (row,) = self.query("SELECT count(*) AS number FROM roost.jobs WHERE state = %s", state)
        return int(row["number"])
