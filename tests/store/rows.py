"""What the store's tests share: one job that lives through named steps, and what all rows must obey after each."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from psycopg import AsyncConnection
from psycopg.rows import dict_row

from roost_client import JobState
from roost_client import statements as client_statements
from roostd.core.frontier import everywhere
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Settlement, error_entry
from roostd.store import statements

Conn = AsyncConnection[Any]
Row = dict[str, Any]
CAP = 10

# Every job that breaks the rule of the first migration: while not finished in exactly one narrow table, under its own
# queue, priority and time; finished in none. And of the three times of an end, a job has its own state's and no other.
BROKEN = """
WITH place AS (
    SELECT job_id, queue, priority, scheduled_at FROM roost.ready
    UNION ALL SELECT t.job_id, t.queue, t.priority, t.scheduled_at
                FROM roost.throttled t JOIN roost.job_rows j ON j.id = t.job_id AND j.task = t.task
    UNION ALL SELECT job_id, queue, priority, scheduled_at FROM roost.scheduled
    UNION ALL SELECT b.job_id, b.queue, j.priority, j.scheduled_at
                FROM roost.blocked b LEFT JOIN roost.job_rows j ON j.id = b.job_id
    UNION ALL SELECT c.job_id, j.queue, j.priority, j.scheduled_at
                FROM roost.claims c LEFT JOIN roost.job_rows j ON j.id = c.job_id
)
SELECT coalesce(j.id, p.job_id) AS id, j.state, count(p.job_id) AS places
  FROM roost.job_rows j
  FULL JOIN place p ON p.job_id = j.id
 GROUP BY j.id, p.job_id
HAVING j.id IS NULL
    OR count(p.job_id) <> CASE WHEN j.state IN ('completed', 'discarded', 'cancelled') THEN 0 ELSE 1 END
    OR NOT coalesce(bool_and((p.queue, p.priority, p.scheduled_at) = (j.queue, j.priority, j.scheduled_at)), true)
    OR (j.completed_at IS NOT NULL) <> (j.state = 'completed')
    OR (j.discarded_at IS NOT NULL) <> (j.state = 'discarded')
    OR (j.cancelled_at IS NOT NULL) <> (j.state = 'cancelled')
"""


async def connect(dsn: str) -> Conn:
    """A connection as the daemon's own ones are, but one that does not wait for another's lock for ever."""
    conn = await AsyncConnection.connect(dsn, autocommit=True)
    await conn.execute("SET timezone = 'UTC'")
    await conn.execute(statements.SESSION)
    await conn.execute("SET lock_timeout = '10s'")
    return conn


async def rows(conn: Conn, query: Any, *parameters: Any) -> list[Row]:
    async with conn.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, parameters or None)
        return await cursor.fetchall()


async def value(conn: Conn, query: Any, *parameters: Any) -> Any:
    row = await (await conn.execute(query, parameters or None)).fetchone()
    assert row is not None
    return row[0]


# Every key that is not that of the active job which says so; and every active job that has not the key that it says.
BROKEN_KEYS = """
SELECT u.unique_key AS given, j.unique_key AS said, j.id, j.state
  FROM roost.unique_keys u
  FULL JOIN (SELECT * FROM roost.job_rows
              WHERE unique_key IS NOT NULL AND state IN ('available', 'retryable')) AS j
         ON j.id = u.job_id AND j.unique_key = u.unique_key
 WHERE u.job_id IS NULL OR j.id IS NULL
"""
# Every blocked job that has not as many parents yet to be heard of as it waits for.
BROKEN_EDGES = """
SELECT b.job_id, b.parents_left, count(d.parent_id) AS edges
  FROM roost.blocked b
  LEFT JOIN roost.dependencies d ON d.child_id = b.job_id
 GROUP BY b.job_id
HAVING b.parents_left <> count(d.parent_id) OR b.parents_left < 1
"""
# Every parent that has ended, of whose end nobody will tell its dependents.
FORGOTTEN = """
SELECT d.parent_id, j.state
  FROM roost.dependencies d
  JOIN roost.blocked b ON b.job_id = d.child_id
  JOIN roost.job_rows j ON j.id = d.parent_id
 WHERE j.state IN ('completed', 'discarded', 'cancelled')
   AND NOT EXISTS (SELECT 1 FROM roost.ended_parents e WHERE e.job_id = d.parent_id)
"""


async def assert_each_job_is_in_its_place(conn: Conn) -> None:
    for query in (BROKEN, BROKEN_KEYS, BROKEN_EDGES, FORGOTTEN):
        assert await rows(conn, query) == []


async def job_row(conn: Conn, job_id: int) -> Row:
    (row,) = await rows(conn, "SELECT * FROM roost.job_rows WHERE id = %s", job_id)
    return row


async def public_state(conn: Conn, job_id: int) -> JobState:
    return JobState(await value(conn, "SELECT state FROM roost.jobs WHERE id = %s", job_id))


async def places(conn: Conn, job_id: int) -> dict[str, Row]:
    """The rows that stand for the job in the narrow tables, by table."""
    found = {}
    for table in ("ready", "scheduled", "throttled", "blocked", "claims"):
        query: Any = f"SELECT * FROM roost.{table} WHERE job_id = %s"
        for row in await rows(conn, query, job_id):
            assert table not in found
            found[table] = row
    return found


async def add_worker(conn: Conn, **columns: Any) -> UUID:
    worker_id = uuid4()
    given: dict[str, Any] = {"name": "main", "hostname": "web1", "pid": 17, "queues": ["default"], "concurrency": 4}
    await statements.register_worker(conn, worker_id, **{**given, "metadata": {}, **columns})
    return worker_id


async def enqueue(conn: Conn, count: int = 1, **columns: Any) -> list[int]:
    """`count` equal jobs through roost.enqueue; `columns` are its parameters."""
    names = {"task": "a", **columns}
    call: Any = (
        "SELECT roost.enqueue(" + ", ".join(f"{n} => %({n})s" for n in names) + ") FROM generate_series(1, %(count)s)"
    )
    cursor = await conn.execute(call, {**names, "count": count})
    return [row[0] for row in await cursor.fetchall()]


async def claim(conn: Conn, worker_id: UUID, limit: int = 100, queue: str = "default") -> list[ClaimedJob]:
    return await statements.claim(conn, worker_id, everywhere([queue]), limit)


def settlement(
    job_id: int,
    lease: int,
    state: JobState | None,
    delay_seconds: float = 0.0,
    *,
    error: str | None = None,
    counts_attempt: bool | None = None,
    counts_crash: bool = False,
) -> Settlement:
    """A settlement; the attempt counts by default where core/outcome.py has it count for that state."""
    counts = state not in (None, JobState.AVAILABLE) if counts_attempt is None else counts_attempt
    return Settlement(
        job_id=job_id,
        lease=lease,
        state=state,
        delay_seconds=delay_seconds,
        error=None if error is None else error_entry(error, "trace"),
        counts_attempt=counts,
        counts_crash=counts_crash,
    )


def numbered(name: str) -> tuple[Any, list[str]]:
    """A statement with $1, $2… in place of its named parameters, and their names in that order."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statements.SQL[name])))
    text = re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", statements.SQL[name])
    return text, names


@dataclass(slots=True)
class Life:
    """One job in a queue of its own, and the latest lease that its worker knows of."""

    worker_id: UUID
    queue: str
    job_id: int = 0
    lease: int = 1

    async def step(self, conn: Conn, name: str) -> None:
        """Does to the job what STEPS says under `name`, through the statements that the daemon and the client use."""
        match name:
            case "enqueue":
                await self._enqueue(conn)
            case "enqueue for later":
                await self._enqueue(conn, scheduled_at="2200-01-01Z")
            case "enqueue with one attempt":
                await self._enqueue(conn, max_attempts=1)
            case "time passes":
                await conn.execute(
                    "UPDATE roost.job_rows SET scheduled_at = '2020-01-01Z' WHERE id = %s", (self.job_id,)
                )
                await conn.execute(
                    "UPDATE roost.scheduled SET scheduled_at = '2020-01-01Z' WHERE job_id = %s", (self.job_id,)
                )
            case "claim":
                for job in await claim(conn, self.worker_id, queue=self.queue):
                    self.lease = job.lease
            case "claim, and the answer is lost":
                await claim(conn, self.worker_id, queue=self.queue)
            case "complete":
                await statements.complete(conn, [self.job_id], [self.lease], [json.dumps({"n": 1})])
            case "fail, retry now":
                await self._settle(conn, JobState.RETRYABLE, error="boom")
            case "fail, retry later":
                await self._settle(conn, JobState.RETRYABLE, 3600.0, error="boom")
            case "crash for the last time":
                await self._settle(conn, JobState.DISCARDED, error="crash", counts_crash=True)
            case "snooze":
                await self._settle(conn, JobState.AVAILABLE, 3600.0)
            case "carry out the cancel":
                await self._settle(conn, JobState.CANCELLED, error="cancelled")
            case "release":
                await self._settle(conn, None)
            case "promote":
                await statements.promote(conn)
            case "rescue":
                await statements.rescue(conn, reason="gone", error_cap=CAP)
            case "lose the worker and rescue":
                await statements.remove_workers(conn, [self.worker_id])
                await statements.rescue(conn, reason="gone", error_cap=CAP)
            case "cancel":
                await conn.execute("SELECT roost.cancel(%s)", (self.job_id,))
            case "retry":
                await conn.execute("SELECT roost.retry(%s)", (self.job_id,))
            case "requeue":
                statement = client_statements.requeue_batch(client_statements.JobFilter(self.queue), 0, 100)
                await conn.execute(statement.sql, statement.parameters)
            case _:
                raise AssertionError(f"no such step: {name}")

    async def _enqueue(self, conn: Conn, **columns: Any) -> None:
        (self.job_id,) = await enqueue(conn, queue=self.queue, priority=3, **columns)

    async def _settle(self, conn: Conn, state: JobState | None, delay: float = 0.0, **keywords: Any) -> None:
        await statements.settle(conn, [settlement(self.job_id, self.lease, state, delay, **keywords)], CAP)
