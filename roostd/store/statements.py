"""One function for each file of sql/, which says what it locks and which index it uses: rows in, rows out.

No function here decides anything or keeps anything. Each is one round trip and, on a connection in autocommit, one
transaction. Errors are psycopg's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any, LiteralString, NamedTuple
from uuid import UUID

from psycopg import AsyncConnection

from roost_client import JobState
from roostd.core.frontier import Range
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Settlement, error_entry
from roostd.core.timetable import LATE_SECONDS, Due, Entry

SQL: dict[str, LiteralString] = {
    entry.name.removesuffix(".sql"): entry.read_text(encoding="utf-8")
    for entry in files("roostd.store").joinpath("sql").iterdir()
    if entry.name.endswith(".sql")
}

# For the connections that claim, complete and settle. The tables change from empty to a million rows and back faster
# than statistics follow, and every statement reads by key: so no plan but nested loops over indexes is ever right,
# and planning each time is a tenth of the claim's cost.
# Where these statements look rows up by id they say `BETWEEN x AND x`. For `= x` the planner also considers the join
# the other way round, every row of the table by its index and the batch for each: its choice whenever an ANALYZE found
# the table emptied and not yet truncated, however much is in it by now.
SESSION = (
    "SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; "
    "SET enable_material = off; SET jit = off; SET plan_cache_mode = force_generic_plan; "
    "SET max_parallel_workers_per_gather = 0"
)
# Of the connection that writes outcomes: as long as a batch may wait for a cancel that commits at once. Shorter than
# deadlock_timeout: where two wait for each other it is the worker that gives way, never the application.
WRITE_SESSION = SESSION + "; SET lock_timeout = '50ms'"


async def claim(conn: AsyncConnection, worker_id: UUID, ranges: Sequence[Range], limit: int) -> list[ClaimedJob]:
    """Claims up to `limit` jobs of `ranges`, best first.

    One with the lease 0 was not claimed: its task is throttled.
    """
    return [ClaimedJob(*row) for row in await _run(conn, "claim", claim_parameters(worker_id, ranges, limit))]


def claim_parameters(worker_id: UUID, ranges: Sequence[Range], limit: int) -> dict[str, Any]:
    return {
        "worker_id": worker_id,
        "queues": _texts(list(dict.fromkeys(each.queue for each in ranges))),
        "range_queues": _texts([each.queue for each in ranges]),
        "priorities": _numbers([each.priority for each in ranges]),
        "scheduled_ats": _texts([each.scheduled_at for each in ranges]),
        "job_ids": _numbers([each.job_id for each in ranges]),
        "last_priorities": _numbers([each.last_priority for each in ranges]),
        "early_seconds": _numbers([each.early_seconds for each in ranges]),
        "limit": limit,
    }


class Throttled(NamedTuple):
    """The answer to a claim_throttled. `has_rate`: of each job, whether its task has a rate."""

    jobs: list[ClaimedJob]
    has_rate: list[bool]
    more: bool  # could be claimed now
    next_in_seconds: float | None  # time makes room for more; None: it takes a job's end, or there is none


async def claim_throttled(
    conn: AsyncConnection,
    worker_id: UUID,
    ranges: Sequence[Range],
    limit: int,
    *,
    most_throttled: int,
    window_seconds: float,
) -> Throttled:
    """Claims up to `most_throttled` jobs of throttled tasks that are among the best `limit`, in autocommit.

    What has a rate must start within as many seconds as `window_seconds` is longer than 60, counted from before this.
    """
    parameters = claim_parameters(worker_id, ranges, limit) | {
        "most_throttled": most_throttled,
        "window_seconds": window_seconds,
    }
    rows = await _run(conn, "claim_throttled", parameters)
    if not rows:  # declared dead
        return Throttled([], [], False, None)
    *jobs, (*_, more, next_in_seconds) = rows
    return Throttled([ClaimedJob(*row[:-3]) for row in jobs], [row[-3] for row in jobs], more, next_in_seconds)


async def claim_one(
    conn: AsyncConnection, worker_id: UUID, *, job_id: int | None, queues: Sequence[str] | None, early: bool
) -> ClaimedJob | None:
    """Claims the job named, or else the first that is due in these queues (None: all), or with `early` scheduled."""
    names = None if queues is None else list(queues)
    parameters = {"worker_id": worker_id, "job_id": job_id, "queues": names, "early": early}
    rows = await _run(conn, "claim_one", parameters)
    return ClaimedJob(*rows[0]) if rows else None


async def set_aside(conn: AsyncConnection, ranges: Sequence[Range], limit: int) -> int:
    """Moves jobs of throttled tasks to where they are in nobody's way; returns how many."""
    parameters = claim_parameters(UUID(int=0), ranges, limit)
    ((moved,),) = await _run(conn, "set_aside", parameters)
    return int(moved)


async def declare_limits(conn: AsyncConnection, limits: Sequence[tuple[str, int | None, int | None]]) -> None:
    """Makes (rate_per_minute, max_concurrency) those of each task named; None: not limited in this way."""
    parameters = {
        "tasks": [task for task, _, _ in limits],
        "rates": [rate for _, rate, _ in limits],
        "concurrencies": [concurrency for _, _, concurrency in limits],
    }
    await _run(conn, "declare_limits", parameters)


async def complete(
    conn: AsyncConnection, job_ids: Sequence[int], leases: Sequence[int], results: Sequence[str | None]
) -> tuple[set[int], list[int]]:
    """Completes claims; returns the leases that were still ours, and the jobs to follow_parents of.

    `results` are JSON texts.

    Raises LockNotAvailable, here and in settle, when another transaction keeps a claim locked past lock_timeout.
    """
    parameters = {
        "job_ids": _numbers(job_ids),
        "leases": _numbers(leases),
        "results": list(results) if any(results) else [],
    }
    rows = await _run(conn, "complete", parameters)
    return {row[0] for row in rows}, _parents(rows)


async def settle(
    conn: AsyncConnection, settlements: Sequence[Settlement], error_cap: int
) -> tuple[dict[int, JobState], list[int]]:
    """Ends claims as decided.

    Returns the leases that were still ours, with the state the job is in now, and the jobs to follow_parents of.
    """
    parameters = {
        "job_ids": _numbers([s.job_id for s in settlements]),
        "leases": _numbers([s.lease for s in settlements]),
        "states": [None if s.state is None else s.state.value for s in settlements],
        "delays": [s.delay_seconds for s in settlements],
        "errors": [s.error for s in settlements],
        "counts_attempt": [s.counts_attempt for s in settlements],
        "counts_crash": [s.counts_crash for s in settlements],
        "error_cap": error_cap,
    }
    rows = await _run(conn, "settle", parameters)
    return {row[0]: JobState(row[1]) for row in rows}, _parents(rows)


async def follow_parents(conn: AsyncConnection, only: Sequence[int] | None = None) -> tuple[int, list[int], list[int]]:
    """Tells dependents of ended parents, of `only` these if given.

    Returns how many, the parents of those that another transaction holds, and the jobs to follow next: cancelled, with
    dependents of their own.
    """
    ((told, held, more),) = await _run(conn, "follow_parents", {"only": None if only is None else _numbers(only)})
    return told, held or [], more or []


async def note_ended(conn: AsyncConnection, after: int) -> int | None:
    """Notes parents after that id whose end nobody would tell; returns the last looked at, None for none."""
    ((last,),) = await _run(conn, "note_ended", {"after": after})
    return None if last is None else int(last)


async def lock_claims(conn: AsyncConnection, job_ids: Sequence[int], leases: Sequence[int]) -> set[int]:
    """Locks those of the claims that nobody else has locked; returns the leases of the others."""
    rows = await _run(conn, "lock_claims", {"job_ids": _numbers(job_ids), "leases": _numbers(leases)})
    return {row[0] for row in rows}


class Promotion(NamedTuple):
    jobs: int
    next_in_seconds: float | None  # until the next one is due
    limits: bool  # there are tasks with limits, or were
    ended_parents: bool  # there is something for follow_parents to tell


async def promote(conn: AsyncConnection, past_seconds: float | None = None) -> Promotion:
    """Makes due jobs ready, only those of the last `past_seconds` if given."""
    (row,) = await _run(conn, "promote", {"past_seconds": past_seconds})
    return Promotion(*row)


async def rescue(conn: AsyncConnection, *, reason: str, error_cap: int) -> dict[int, JobState]:
    """Frees up to 1,000 claims whose worker has no row; returns the jobs' new states by id.

    Their dependents are told at the next poll.
    """
    parameters = {"error": error_entry(f"WorkerCrash: {reason}", ""), "error_cap": error_cap}
    return {job_id: JobState(state) for job_id, state in await _run(conn, "rescue", parameters)}


async def list_claims(conn: AsyncConnection, worker_id: UUID) -> list[tuple[int, int]]:
    """(job id, lease) of every claim that stands for this worker."""
    return await _run(conn, "list_claims", {"worker_id": worker_id})


class WorkerRow(NamedTuple):
    id: UUID
    name: str
    hostname: str
    pid: int


async def remove_stale_workers(conn: AsyncConnection, stale_after: float) -> list[WorkerRow]:
    """Declares dead the workers not heard of for `stale_after` seconds."""
    rows = await _run(conn, "remove_stale_workers", {"stale_after": stale_after})
    return [WorkerRow._make(row) for row in rows]


async def register_worker(
    conn: AsyncConnection,
    worker_id: UUID,
    *,
    name: str,
    hostname: str,
    pid: int,
    queues: Sequence[str],
    concurrency: int,
    metadata: dict[str, Any],
) -> None:
    parameters = {
        "id": worker_id,
        "name": name,
        "hostname": hostname,
        "pid": pid,
        "queues": list(queues),
        "concurrency": concurrency,
        "metadata": json.dumps(metadata),
    }
    await _run(conn, "register_worker", parameters)


async def list_workers_of_host(conn: AsyncConnection, hostname: str) -> list[tuple[UUID, float, dict[str, Any]]]:
    """(id, seconds since its last heartbeat, metadata) of every row this host's masters left or hold."""
    return await _run(conn, "list_workers_of_host", {"hostname": hostname})


async def remove_workers(conn: AsyncConnection, ids: Sequence[UUID]) -> None:
    await _run(conn, "remove_workers", {"ids": list(ids)})


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a heartbeat."""

    reload_request: UUID | None
    drain_requested: bool
    paused: frozenset[str]
    cancelled_jobs: tuple[int, ...]
    now: datetime  # the database's


async def heartbeat(
    conn: AsyncConnection,
    worker_id: UUID,
    *,
    inflight: int,
    queues: Sequence[str],
    concurrency: int,
    metadata: dict[str, Any],
) -> Beat | None:
    """Keeps the worker alive to its peers; None when it was declared dead."""
    parameters = {
        "id": worker_id,
        "inflight": inflight,
        "queues": list(queues),
        "concurrency": concurrency,
        "metadata": json.dumps(metadata),
    }
    rows = await _run(conn, "heartbeat", parameters)
    if not rows:
        return None
    request, drain_requested, paused, cancelled, now = rows[0]
    return Beat(request, drain_requested, frozenset(paused), tuple(cancelled), now)


async def list_spans(
    conn: AsyncConnection, *, archive_after: float | None, result_ttl: float | None, since: datetime | None = None
) -> tuple[list[int], datetime | None]:
    """Up to 100 spans of ids where there may be jobs to archive, or results to clear; and when this was.

    `since`: only those last looked at before.
    """
    parameters = {"archive_after": archive_after, "result_ttl": result_ttl, "since": since}
    rows = await _run(conn, "list_spans", parameters)
    return [row[0] for row in rows], rows[0][1] if rows else None


async def archive(conn: AsyncConnection, span: int, age: float) -> int:
    """Archives up to 1,000 jobs of a span that ended longer than `age` seconds ago; returns how many."""
    ((jobs,),) = await _run(conn, "archive", {"span": span, "age": age})
    return int(jobs)


async def clear_results(conn: AsyncConnection, span: int, age: float) -> int:
    """Takes their results from up to 1,000 jobs of a span; returns how many."""
    ((jobs,),) = await _run(conn, "clear_results", {"span": span, "age": age})
    return int(jobs)


async def look_at_span(conn: AsyncConnection, span: int) -> None:
    """Writes down what is left in a span."""
    await _run(conn, "look_at_span", {"span": span})


async def clear_archived_results(conn: AsyncConnection, age: float) -> int:
    """Takes their results from up to 1,000 archived jobs; returns how many."""
    ((jobs,),) = await _run(conn, "clear_archived_results", {"age": age})
    return int(jobs)


async def delete_archived(
    conn: AsyncConnection, age: float, since: datetime | None = None
) -> tuple[int, datetime | None]:
    """Deletes up to 1,000 jobs archived longer than `age` seconds ago, from `since` on.

    Returns how many, and when the last of them was archived.
    """
    ((jobs, last_at),) = await _run(conn, "delete_archived", {"age": age, "since": since})
    return int(jobs), last_at


async def set_idle(conn: AsyncConnection, worker_id: UUID, queues: Sequence[str]) -> None:
    """Asks for notifications of new jobs in `queues`, and no others."""
    await _run(conn, "set_idle", {"worker_id": worker_id, "queues": list(queues)})


async def remove_idle(conn: AsyncConnection) -> None:
    await _run(conn, "remove_idle", {})


async def answer_reload(conn: AsyncConnection, worker_id: UUID, verdict: dict[str, Any]) -> None:
    await _run(conn, "answer_reload", {"id": worker_id, "verdict": json.dumps(verdict)})


async def register_cron(conn: AsyncConnection, entries: Sequence[Entry]) -> tuple[datetime, dict[str, datetime]]:
    """Puts these cron entries, at least one, into force; returns the time, and after when the slots of each fire."""
    rows = await _run(conn, "register_cron", {"entries": json.dumps([entry.as_json() for entry in entries])})
    return rows[0][0], {name: after for _, name, after in rows}


class Fired(NamedTuple):
    name: str
    slot: datetime
    job_id: int


async def fire_cron(conn: AsyncConnection, due: Sequence[Due]) -> tuple[datetime, list[Fired]]:
    """Fires these slots; returns the time, and those that became jobs: others have fired already, or may not."""
    rows = [{**each.entry.as_json(), "slot": each.slot.isoformat()} for each in due]
    found = await _run(conn, "fire_cron", {"due": json.dumps(rows), "late_seconds": LATE_SECONDS})
    return found[0][0], [Fired(*row[1:]) for row in found if row[3] is not None]


async def touch_cron(conn: AsyncConnection, names: Sequence[str]) -> list[str]:
    """Says that these entries are still known; returns those that are not in the database."""
    return [row[0] for row in await _run(conn, "touch_cron", {"names": list(names)})]


async def prune_cron(conn: AsyncConnection) -> int:
    """Forgets up to 1,000 old slots; returns how many, 1,000 when there are likely more."""
    ((slots,),) = await _run(conn, "prune_cron", {})
    return int(slots)


async def _run(conn: AsyncConnection, name: str, parameters: dict[str, Any]) -> list[Any]:
    cursor = await conn.execute(SQL[name], parameters, prepare=True)
    return await cursor.fetchall() if cursor.description is not None else []


def _parents(rows: list[Any]) -> list[int]:
    return (rows[0][-1] or []) if rows else []


def _numbers(values: Sequence[float]) -> str:
    """An array's literal: a tenth of the time that a list takes through psycopg's dumpers (500 values: 30 µs)."""
    return "{" + ",".join(map(str, values)) + "}"


def _texts(values: Sequence[str]) -> str:
    quoted = [value.replace("\\", "\\\\").replace('"', '\\"') for value in values]
    return '{"' + '","'.join(quoted) + '"}' if values else "{}"
