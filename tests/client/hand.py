"""A worker without a daemon: ends jobs by the statements that the daemon uses, one at a time as a test wants it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from roost_client import JobState
from roostd.store import statements
from tests.store import rows


class Hand:
    def __init__(self, dsn: str) -> None:
        self._runner = asyncio.Runner()
        self._conn = self._runner.run(rows.connect(dsn))
        self._worker_id = self._runner.run(rows.add_worker(self._conn))
        self._leases: dict[int, int] = {}

    def close(self) -> None:
        self._runner.run(self._conn.close())
        self._runner.close()

    def complete(self, *job_ids: int, result: Any = None) -> None:
        """In one batch."""
        leases = [self._lease(job_id) for job_id in job_ids]
        results = [json.dumps(result)] * len(job_ids)
        ours, _ = self._runner.run(statements.complete(self._conn, job_ids, leases, results))
        assert ours == set(leases)

    def discard(self, job_id: int, error: str) -> None:
        settlement = rows.settlement(job_id, self._lease(job_id), JobState.DISCARDED, error=error)
        ours, _ = self._runner.run(statements.settle(self._conn, [settlement], 20))
        assert ours

    def _lease(self, job_id: int) -> int:
        if job_id not in self._leases:
            for job in self._runner.run(rows.claim(self._conn, self._worker_id, limit=10_000)):
                self._leases[job.id] = job.lease
        return self._leases.pop(job_id)
