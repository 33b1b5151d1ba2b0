"""Why a job isn't running: one reason, a sentence, and the command that helps.

`FACTS` asks the database for everything in one statement, so in one snapshot. `explanation_of` decides by the order in
`_REASONS`: what waiting does not mend comes first. It does no I/O. Imports nothing of Roost.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

MAX_AHEAD = 10_000  # jobs counted before this one: a few milliseconds
SHOWN_PARENTS = 10
WINDOW_SECONDS = 61  # for how long a start counts towards rate_per_minute, see docs/design/016-throttles.md
MAX_ANCESTORS = 100  # that were cancelled for each other's sake are followed up to the one that is to blame
SILENT_SECONDS = 60.0  # without a heartbeat, which comes every 15 s: worth a word

# Every job that this reads beside the one in question is found by an index, and what is counted is bounded. Where rows
# are looked up for many ids, or counted, LIMIT and ORDER BY are there for the planner: without them it may read a whole
# table where its statistics are old. `LIMIT (SELECT …)` is one that it does not know: then it plans for the first rows.
# With one that it knows it may hold that a queue, any queue, has fewer than that, and read all of it to sort it.
FACTS: LiteralString = f"""\
WITH RECURSIVE job AS MATERIALIZED (
    SELECT j.id, j.queue, j.task, j.state, j.priority, j.attempt, j.max_attempts, j.scheduled_at, j.cancel_requested,
           j.unique_key, j.depends_on, left(j.errors -> -1 ->> 'error', 500) AS error,
           coalesce(j.completed_at, j.discarded_at, j.cancelled_at) AS ended_at, false AS is_archived
      FROM roost.job_rows j
     WHERE j.id = %s::bigint
    UNION ALL
    SELECT a.id, a.queue, a.task, a.state, a.priority, a.attempt, a.max_attempts, a.scheduled_at, a.cancel_requested,
           NULL, NULL, left(a.errors -> -1 ->> 'error', 500),
           coalesce(a.completed_at, a.discarded_at, a.cancelled_at), true
      FROM roost.jobs_archive a
     WHERE a.id = %s::bigint
), dead AS (  -- from a job that was cancelled for a parent's sake up to the one that is to blame
    SELECT job.id, job.state, job.cancel_requested, job.depends_on, job.is_archived, 0 AS depth FROM job
    UNION ALL
    SELECT p.id, p.state, p.cancel_requested, p.depends_on, p.is_archived, dead.depth + 1
      FROM dead
     CROSS JOIN LATERAL (
           SELECT x.*
             FROM (SELECT u.id FROM unnest(dead.depends_on) AS u(id) LIMIT {MAX_AHEAD}) AS u
            CROSS JOIN LATERAL (
                  (SELECT j.id, j.state, j.cancel_requested, j.depends_on, false AS is_archived FROM roost.job_rows j
                    WHERE j.id = u.id AND j.state IN ('discarded', 'cancelled') LIMIT 1)
                  UNION ALL
                  (SELECT a.id, a.state, a.cancel_requested, a.depends_on, true FROM roost.jobs_archive a
                    WHERE a.id = u.id AND a.state IN ('discarded', 'cancelled') LIMIT 1)) AS x
            LIMIT 1) AS p
     WHERE dead.state = 'cancelled' AND (dead.depth = 0 OR NOT dead.cancel_requested) AND dead.depth < {MAX_ANCESTORS}
), held AS (  -- jobs of its queue that each worker has now: its heartbeat tells of children that were busy then
    SELECT c.worker_id, count(*) AS jobs
      FROM (SELECT c.worker_id, c.job_id FROM roost.claims c LIMIT (SELECT {MAX_AHEAD})) AS c
     CROSS JOIN job
     CROSS JOIN LATERAL (SELECT 1 FROM roost.job_rows j WHERE j.id = c.job_id AND j.queue = job.queue LIMIT 1) AS its
     WHERE job.state IN ('available', 'retryable')
     GROUP BY c.worker_id
)
SELECT json_build_object(
    'now', statement_timestamp(),
    'last_id', CASE WHEN job.id IS NULL THEN pg_sequence_last_value('roost.job_rows_id_seq') END,
    'open_writers', CASE WHEN job.id IS NULL THEN (
        SELECT count(DISTINCT l.virtualtransaction)
          FROM pg_locks l
          LEFT JOIN pg_stat_activity a ON a.pid = l.pid
         WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
           AND (l.pid IS NULL OR (a.datname = current_database() AND l.pid <> pg_backend_pid()))) END,
    'job', CASE WHEN job.id IS NOT NULL THEN json_build_object(
        'queue', job.queue, 'task', job.task, 'state', job.state, 'is_archived', job.is_archived,
        'attempt', job.attempt, 'max_attempts', job.max_attempts, 'scheduled_at', job.scheduled_at,
        'ended_at', job.ended_at, 'cancel_requested', job.cancel_requested, 'error', job.error) END,
    'dead_parents', (SELECT json_agg(json_build_array(d.id, d.state, d.is_archived) ORDER BY d.depth)
                       FROM dead d WHERE d.depth > 0),
    'key_holder', CASE WHEN job.state IN ('discarded', 'cancelled') THEN (
        SELECT u.job_id FROM roost.unique_keys u WHERE u.unique_key = job.unique_key AND u.job_id <> job.id) END,
    'held_parent', (
        SELECT json_build_array(d.id, h.job_id)
          FROM dead d
         CROSS JOIN LATERAL (
               SELECT u.job_id FROM roost.job_rows j JOIN roost.unique_keys u ON u.unique_key = j.unique_key
                WHERE j.id = d.id AND u.job_id <> j.id LIMIT 1) AS h
         WHERE d.depth > 0
         ORDER BY d.depth DESC LIMIT 1),
    'claim', (SELECT json_build_object(
                  'worker_id', c.worker_id, 'since', c.claimed_at, 'attempt', c.attempt,
                  'cancel_requested', c.cancel_requested)
                FROM roost.claims c WHERE c.job_id = job.id),
    'paused', (SELECT json_build_object('since', q.paused_at)
                 FROM roost.queues q WHERE q.name = job.queue AND q.paused),
    'parents_left', (SELECT b.parents_left FROM roost.blocked b WHERE b.job_id = job.id),
    'parents', CASE WHEN EXISTS (SELECT 1 FROM roost.blocked b WHERE b.job_id = job.id) THEN (
        SELECT json_agg(json_build_array(p.id, coalesce(
                   (SELECT s.state FROM roost.jobs s WHERE s.id = p.id),
                   (SELECT a.state FROM roost.jobs_archive a WHERE a.id = p.id))) ORDER BY p.id)
          FROM (SELECT e.id
                  FROM (SELECT u.id FROM unnest(job.depends_on) WITH ORDINALITY AS u(id, place)
                         ORDER BY u.place DESC LIMIT {MAX_AHEAD}) AS e
                 CROSS JOIN LATERAL (SELECT 1 FROM roost.dependencies d
                                      WHERE d.parent_id = e.id AND d.child_id = job.id LIMIT 1) AS waited_for
                 LIMIT {SHOWN_PARENTS}) AS p) END,
    'limit', (
        SELECT json_build_object(
                   'rate_per_minute', t.rate_per_minute, 'max_concurrency', t.max_concurrency,
                   'is_new', t.limited_since > statement_timestamp() - interval '1 second',
                   'running', (SELECT count(*) FROM (SELECT 1 FROM roost.claims c WHERE c.task = t.task
                                                      LIMIT {MAX_AHEAD}) AS r)
                              + CASE WHEN t.counted OR t.max_concurrency IS NULL THEN 0 ELSE (
                                    SELECT count(*)
                                      FROM (SELECT c.job_id FROM roost.claims c WHERE c.task IS NULL
                                             LIMIT {MAX_AHEAD}) AS c
                                     CROSS JOIN LATERAL (SELECT 1 FROM roost.job_rows j
                                                          WHERE j.id = c.job_id AND j.task = t.task LIMIT 1) AS j) END,
                   'starts', coalesce(s.starts, 0), 'next_at', s.first_at + interval '{WINDOW_SECONDS} seconds')
          FROM roost.throttles t
         CROSS JOIN LATERAL (
               SELECT sum(s.starts) AS starts, min(s.at) AS first_at FROM roost.throttle_starts s
                WHERE s.task = t.task AND s.at > statement_timestamp() - interval '{WINDOW_SECONDS} seconds') AS s
         WHERE t.task = job.task AND t.limited AND job.state IN ('available', 'retryable')),
    'ahead', CASE WHEN job.state IN ('available', 'retryable') THEN (
        SELECT count(*) FROM (
            (SELECT 1 FROM roost.ready r
              WHERE r.queue = job.queue
                AND (r.priority, r.scheduled_at, r.job_id) < (job.priority, job.scheduled_at, job.id)
              ORDER BY r.priority DESC, r.scheduled_at DESC, r.job_id DESC LIMIT (SELECT {MAX_AHEAD} + 1))
            UNION ALL
            (SELECT 1 FROM roost.throttled r
              WHERE r.task = job.task AND r.queue = job.queue
                AND (r.priority, r.scheduled_at, r.job_id) < (job.priority, job.scheduled_at, job.id)
              ORDER BY r.priority DESC, r.scheduled_at DESC, r.job_id DESC LIMIT (SELECT {MAX_AHEAD} + 1))) AS a) END,
    'tasks', (  -- lists of those that live workers of the queue know which don't know this one: most have the same
        SELECT json_agg(t.tasks)
          FROM (SELECT DISTINCT w.metadata -> 'tasks' AS tasks FROM roost.workers w
                 WHERE job.queue = ANY (w.queues) AND NOT w.metadata -> 'tasks' ? job.task
                   AND w.last_seen_at >= statement_timestamp() - make_interval(secs => %s::float8)
                 LIMIT 100) AS t),
    'workers', CASE WHEN job.id IS NOT NULL THEN (
        SELECT json_agg(json_build_object(
                   'id', w.id, 'name', w.name, 'hostname', w.hostname, 'queues', w.queues,
                   'silent_seconds', extract(epoch FROM statement_timestamp() - w.last_seen_at)::float8,
                   'is_draining', w.metadata ->> 'state' = 'draining',
                   'knows', w.metadata -> 'tasks' ? job.task,
                   'children', coalesce((p.pool ->> 'children')::integer, w.concurrency),
                   'busy', CASE WHEN p.pool ->> 'busy' IS NOT NULL THEN greatest(
                               (p.pool ->> 'busy')::integer,
                               least((p.pool ->> 'children')::integer, coalesce(h.jobs, 0))) END)
                   ORDER BY w.started_at, w.id)
          FROM roost.workers w
          LEFT JOIN held h ON h.worker_id = w.id
          LEFT JOIN LATERAL (SELECT e.pool FROM jsonb_array_elements(coalesce(w.metadata -> 'pools', '[]')) AS e(pool)
                              WHERE e.pool -> 'queues' ? job.queue LIMIT 1) AS p ON true) END
    )::text
  FROM (VALUES (1)) AS always
  LEFT JOIN job ON true"""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a job isn't running, or that it is: what Roost.explain returns.

    `code` is one of CODES. `reason` is a sentence, `command` what helps (None: nothing but time does), `details` the
    figures in the sentence as JSON values. `details["also"]` are the codes of what would keep it from running next.
    """

    job_id: int
    code: str
    reason: str
    command: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


# Each code, and what it says of the job.
CODES = {
    "unknown": "there is no such job, or its enqueue is not committed",
    "completed": "it has ended",
    "discarded": "it has failed for good",
    "cancelled": "it was cancelled, by an operator or for a parent's sake",
    "executing": "a worker has it",
    "paused": "its queue is paused",
    "no-worker": "no live worker serves its queue",
    "draining": "those that do are about to end",
    "unknown-task": "no live worker of its queue has a handler for it",
    "blocked": "it waits for other jobs",
    "retry-backoff": "it failed, and waits before its next attempt",
    "scheduled": "it is not due yet",
    "throttled": "the limits of its task leave no room",
    "behind": "others come before it",
    "busy": "it is first in line, and all children are busy",
    "due": "nothing keeps it: it is about to be claimed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A row of roost.workers as it concerns one job. `knows`, `busy`: None where the worker doesn't tell."""

    id: str = ""
    name: str = ""
    hostname: str = ""
    queues: list[str] = field(default_factory=list)
    silent_seconds: float = 0.0
    is_draining: bool | None = False
    knows: bool | None = None
    children: int = 0
    busy: int | None = None

    def __str__(self) -> str:
        return f"{self.name} on {self.hostname}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is known of one job, times aware. `parents` are (id, state).

    `dead_parents`, (id, state, is_archived), lead from the parent for whose sake it was cancelled up to the one that is
    to blame; `held_parent` is the last of these whose unique_key an active job has, and that job.
    """

    job_id: int
    now: datetime
    stale_after: float = 300.0
    last_id: int | None = None
    open_writers: int = 0
    exists: bool = True
    queue: str = "default"
    task: str = ""
    state: str = "available"
    is_archived: bool = False
    attempt: int = 0
    max_attempts: int = 20
    scheduled_at: datetime
    ended_at: datetime | None = None
    cancel_requested: bool = False
    error: str | None = None
    dead_parents: list[tuple[int, str, bool]] = field(default_factory=list)
    held_parent: tuple[int, int] | None = None
    key_holder: int | None = None
    claim: dict[str, Any] | None = None
    paused: dict[str, Any] | None = None
    parents_left: int | None = None
    parents: list[tuple[int, str]] = field(default_factory=list)
    limit: dict[str, Any] | None = None
    ahead: int = 0
    tasks: set[str] = field(default_factory=set)  # known to workers of its queue that don't know its own
    workers: list[Worker] = field(default_factory=list)

    def live(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.silent_seconds <= self.stale_after]

    def serving(self) -> list[Worker]:
        """The live workers that take jobs of its queue."""
        return [worker for worker in self.live() if self.queue in worker.queues and not worker.is_draining]


def facts_of(text: str, job_id: int, stale_after: float) -> Facts:
    """What FACTS answered."""
    answer = json.loads(text)
    now = _time(answer["now"])
    job = answer["job"]
    if job is None:
        return Facts(
            job_id=job_id,
            now=now,
            exists=False,
            last_id=answer["last_id"],
            open_writers=answer["open_writers"],
            scheduled_at=now,
        )
    for key in ("scheduled_at", "ended_at"):
        job[key] = job[key] and _time(job[key])
    return Facts(
        job_id=job_id,
        now=now,
        stale_after=stale_after,
        **job,
        dead_parents=[(parent, state, archived) for parent, state, archived in answer["dead_parents"] or ()],
        held_parent=answer["held_parent"] and tuple(answer["held_parent"]),
        key_holder=answer["key_holder"],
        claim=_timed(answer["claim"], "since"),
        paused=_timed(answer["paused"], "since"),
        parents_left=answer["parents_left"],
        parents=[(parent, state) for parent, state in answer["parents"] or ()],
        limit=_timed(answer["limit"], "next_at"),
        ahead=answer["ahead"] or 0,
        tasks={task for tasks in answer["tasks"] or () for task in tasks},
        workers=[Worker(**worker) for worker in answer["workers"] or ()],
    )


def explanation_of(facts: Facts) -> Explanation:
    """The first of the reasons that hold; the rest of them in `also`."""
    for only in (_unknown, _ended, _executing):
        found = only(facts)
        if found is not None:
            return found
    held = [found for reason in _REASONS if (found := reason(facts)) is not None]
    if not held:
        return _turn(facts)
    held[0].details["also"] = [each.code for each in held[1:]]
    return held[0]


def _unknown(facts: Facts) -> Explanation | None:
    if facts.exists:
        return None
    last_id, writers = facts.last_id or 0, facts.open_writers
    if not 1 <= facts.job_id <= last_id:
        last = f"the last one given out is {last_id}" if last_id else "none has been given out yet"
        reason = f"no job has ever had this id: {last}"
    elif writers:
        reason = (
            "there is no such job: its enqueue is not committed yet"
            f" ({_count(writers, 'transaction')} that {'writes' if writers == 1 else 'write'}"
            f" {'is' if writers == 1 else 'are'} open), or was rolled back, or the job was deleted"
        )
    else:
        reason = "there is no such job: its enqueue was rolled back, or the job was deleted"
    return Explanation(facts.job_id, "unknown", reason, None, {"last_id": facts.last_id, "open_transactions": writers})


def _ended(facts: Facts) -> Explanation | None:
    if facts.state not in ("completed", "discarded", "cancelled"):
        return None
    at = f"at {_at(facts.ended_at)}" if facts.ended_at else "at an unknown time"
    attempt = f"attempt {facts.attempt} of {facts.max_attempts}"
    details: dict[str, Any] = {
        "ended_at": _iso(facts.ended_at),
        "attempt": facts.attempt,
        "max_attempts": facts.max_attempts,
        "archived": facts.is_archived,
        "error": facts.error,
    }
    command: str | None = f"roostctl retry {facts.job_id}"
    match facts.state:
        case "completed":
            reason, command = f"it completed {at}, in {attempt}", None
        case "discarded":
            reason = f"it failed for good {at}, in {attempt}: {_first_line(facts.error)}"
        case _:
            reason = f"it was cancelled {at}"
            if facts.dead_parents:
                (parent, state, _), (culprit, *_) = facts.dead_parents[0], facts.dead_parents[-1]
                gone = next((each for each, _, is_archived in reversed(facts.dead_parents) if is_archived), None)
                reason += ", and" if facts.cancel_requested else ", because"
                reason += f" job {parent}, on which it depends, was {state}"
                reason += f" for the sake of job {culprit}" if culprit != parent else ""
                command = f"roostctl retry {culprit} --with-dependents"
                if gone is not None:
                    reason += f"; job {gone} is in the archive, so they can only be enqueued anew"
                    command = None
                elif len(facts.dead_parents) >= MAX_ANCESTORS:
                    reason += ", which may have been for another's"
                    command = f"roostctl explain {culprit}"
                elif facts.held_parent is not None:
                    held, holder = facts.held_parent
                    reason += f"; the unique_key of job {held} is now that of job {holder}, which has to end before"
                    reason += " these can be retried"
                    command = f"roostctl explain {holder}"
                    details["key_holder"] = holder
                details["dead_parents"] = [parent for parent, *_ in facts.dead_parents]
            elif not facts.cancel_requested:
                reason += f": {_first_line(facts.error)}"
    if facts.key_holder is not None and command is not None:
        reason += f"; its unique_key is now that of job {facts.key_holder}, which has to end before it can be retried"
        command = f"roostctl explain {facts.key_holder}"
        details["key_holder"] = facts.key_holder
    if facts.is_archived:
        reason += "; it is in the archive" + (", so it can only be enqueued anew" if command else "")
        command = None
    return Explanation(facts.job_id, facts.state, reason, command, details)


def _executing(facts: Facts) -> Explanation | None:
    claim = facts.claim
    if claim is None:
        return None
    worker = next((worker for worker in facts.workers if worker.id == claim["worker_id"]), None)
    attempt = f"attempt {claim['attempt']} of {facts.max_attempts}"
    ago = _duration(facts.now - claim["since"])
    reason = f"worker {worker or 'unknown'} has had it for {ago}, {attempt}"
    if claim["cancel_requested"]:
        reason += "; it has been asked to cancel"
    details: dict[str, Any] = {
        "worker": None if worker is None else worker.name,
        "worker_id": claim["worker_id"],
        "since": claim["since"].isoformat(),
        "attempt": claim["attempt"],
        "cancel_requested": claim["cancel_requested"],
        "rescue_at": None,
    }
    command = None
    if worker is None:
        reason = f"a worker that is gone has had it for {ago}, {attempt}; it runs again as soon as a worker frees it"
        details["rescue_at"] = facts.now.isoformat()
    elif worker.silent_seconds > SILENT_SECONDS:
        rescue_at = facts.now + timedelta(seconds=facts.stale_after - worker.silent_seconds)
        details["rescue_at"] = rescue_at.isoformat()
        reason += f"; that worker was last heard of {_duration(worker.silent_seconds)} ago: "
        reason += f"others take the job {f'from {_at(rescue_at)} on' if rescue_at > facts.now else 'now'}"
    if details["rescue_at"] is not None and not any(each is not worker for each in facts.live()):
        reason += ", but there is no other worker"
        command = _START
    return Explanation(facts.job_id, "executing", reason, command, details)


def _paused(facts: Facts) -> Explanation | None:
    if facts.paused is None:
        return None
    since = facts.paused["since"]
    return Explanation(
        facts.job_id,
        "paused",
        f"queue {facts.queue!r} is paused" + (f", since {_at(since)}" if since else ""),
        resume_command(facts.queue),
        {"queue": facts.queue, "since": _iso(since)},
    )


def _no_worker(facts: Facts) -> Explanation | None:
    if facts.serving() or _is_draining(facts):
        return None
    live = facts.live()
    served = sorted({queue for worker in live for queue in worker.queues})
    nearest = _nearest(facts.queue, served)
    stale = [worker for worker in facts.workers if worker not in live and facts.queue in worker.queues]
    reason = f"no live worker serves queue {facts.queue!r}"
    if nearest:
        reason += f"; did you mean {nearest!r}? Otherwise add it to the queues of a pool"
    elif live:
        reason += ": add it to the queues of a pool"
    else:
        reason += ": none runs"
    if stale:
        reason += f"; worker {stale[0]} did, and was last heard of {_duration(stale[0].silent_seconds)} ago"
    return Explanation(
        facts.job_id,
        "no-worker",
        reason,
        _reload(live) if live else _START,
        {
            "queue": facts.queue,
            "nearest": nearest,
            "served": served,
            "stale_workers": [{"name": worker.name, "silent_seconds": worker.silent_seconds} for worker in stale],
        },
    )


def _draining(facts: Facts) -> Explanation | None:
    if facts.serving() or not _is_draining(facts):
        return None
    names = [str(worker) for worker in facts.live() if worker.is_draining]
    reason = f"no worker takes jobs of queue {facts.queue!r} any more: {_list(names)} {_be(names)} about to end"
    return Explanation(facts.job_id, "draining", reason, _START, {"queue": facts.queue, "workers": names})


def _is_draining(facts: Facts) -> bool:
    """Whether a worker is about to end that may have served the queue: it no longer says which it did."""
    return any(worker.is_draining and (not worker.queues or facts.queue in worker.queues) for worker in facts.live())


def _unknown_task(facts: Facts) -> Explanation | None:
    serving = facts.serving()
    if not serving or any(worker.knows is not False for worker in serving):
        return None
    nearest = _nearest(facts.task, sorted(facts.tasks))
    reason = f"no live worker of queue {facts.queue!r} has a handler for task {facts.task!r}"
    fix = "add its module to handlers.modules"
    reason += f"; did you mean {nearest!r}? Otherwise {fix}" if nearest else f": {fix}"
    if facts.error:
        reason += f"; the last attempt failed with {_first_line(facts.error)}"
    return Explanation(
        facts.job_id,
        "unknown-task",
        reason,
        _reload(serving),
        {"queue": facts.queue, "task": facts.task, "nearest": nearest, "workers": [each.name for each in serving]},
    )


def _blocked(facts: Facts) -> Explanation | None:
    if facts.parents_left is None:
        return None
    shown = [f"{parent} ({state})" for parent, state in facts.parents]
    if not shown:
        reason, command = "the jobs on which it depends have ended, and it is about to be told", None
    else:
        more = max(0, facts.parents_left - len(shown))
        reason = f"it waits for {_count(facts.parents_left, 'job')}: {_list(shown, more)}"
        waiting = [parent for parent, state in facts.parents if state != "executing"]
        command = f"roostctl explain {waiting[0] if waiting else facts.parents[0][0]}"
    details = {"parents": [{"id": parent, "state": state} for parent, state in facts.parents]}
    return Explanation(facts.job_id, "blocked", reason, command, {**details, "count": facts.parents_left})


def _later(facts: Facts) -> Explanation | None:
    """In its backoff, or scheduled."""
    if facts.scheduled_at <= facts.now:
        return None
    due = f"due at {_at(facts.scheduled_at)}, in {_duration(facts.scheduled_at - facts.now)}"
    details = {
        "due_at": facts.scheduled_at.isoformat(),
        "in_seconds": (facts.scheduled_at - facts.now).total_seconds(),
        "attempt": facts.attempt,
        "max_attempts": facts.max_attempts,
    }
    command = f"roostctl retry {facts.job_id}"
    if facts.state == "retryable":
        failed = f"attempt {facts.attempt} of {facts.max_attempts} failed with {_first_line(facts.error)}"
        details["error"] = facts.error
        return Explanation(facts.job_id, "retry-backoff", f"{failed}; the next is {due}", command, details)
    return Explanation(facts.job_id, "scheduled", f"it is {due}", command, details)


def _throttled(facts: Facts) -> Explanation | None:
    limit = facts.limit
    if limit is None or facts.parents_left is not None or facts.scheduled_at > facts.now:
        return None
    most, rate = limit["max_concurrency"], limit["rate_per_minute"]
    reached: dict[str, str] = {}
    if most is not None and limit["running"] >= most:
        reached["max_concurrency"] = f"{limit['running']} run at once, and max_concurrency is {most}"
    if rate is not None and limit["starts"] >= rate:
        seconds = (limit["next_at"] - facts.now).total_seconds()
        reached["rate_per_minute"] = (
            f"{limit['starts']} have started in the last minute, and rate_per_minute is {rate};"
            f" there is room for the next in {_duration(seconds)}"
        )
    if limit["is_new"] and not reached:
        reached["new"] = "its limits are new, and it starts nothing for a second"
    if not reached:
        return None
    shows = f"roostctl jobs --task {_word(facts.task)} --state executing"
    return Explanation(
        facts.job_id,
        "throttled",
        f"task {facts.task!r} is throttled: " + ", and ".join(reached.values()),
        shows if "max_concurrency" in reached else None,
        {
            "task": facts.task,
            "limits": list(reached),
            "max_concurrency": most,
            "running": limit["running"],
            "rate_per_minute": rate,
            "starts": limit["starts"],
            "next_at": _iso(limit["next_at"]) if "rate_per_minute" in reached else None,
            "ahead": facts.ahead,
        },
    )


# What keeps a waiting job from running, in the order in which it is told. First what stays so until somebody does
# something; of that, what an operator has done himself comes before what is missing. Then what ends by itself: the
# other jobs, which may take for ever; the clock, which does not; and the limits, which count only what is due.
_REASONS: tuple[Callable[[Facts], Explanation | None], ...] = (
    _paused,
    _no_worker,
    _draining,
    _unknown_task,
    _blocked,
    _later,
    _throttled,
)


def _turn(facts: Facts) -> Explanation:
    """Of a job that nothing keeps but the others."""
    serving = facts.serving()
    children = sum(worker.children for worker in serving)
    busy = sum(worker.busy or 0 for worker in serving) if any(w.busy is not None for w in serving) else None
    heard = min(worker.silent_seconds for worker in serving)
    details = {"queue": facts.queue, "ahead": facts.ahead, "children": children, "busy": busy, "silent_seconds": heard}
    names = _list([str(worker) for worker in serving[:3]], len(serving[3:]))
    told = f"; no worker of the queue was heard of for {_duration(heard)}" if heard > SILENT_SECONDS else ""
    if facts.ahead:
        number = f"more than {MAX_AHEAD:,}" if facts.ahead > MAX_AHEAD else f"{facts.ahead:,}"
        come = "job of its queue comes" if facts.ahead == 1 else "jobs of its queue come"
        at_work = "" if busy is None else f"; {busy} of {_count(children, 'child', 'children')} busy ({names})"
        return Explanation(facts.job_id, "behind", f"{number} {come} before it{at_work}{told}", None, details)
    if busy is not None and busy >= children:
        what = "the only child that serves" if children == 1 else f"all {children} children that serve"
        is_busy = "is" if children == 1 else "are"
        reason = f"it is first in line, but {what} queue {facts.queue!r} {is_busy} busy ({names}){told}"
        return Explanation(facts.job_id, "busy", reason, None, details)
    reason = f"it may run now and is first in line: {names} takes it at the next poll at the latest{told}"
    due_for = (facts.now - facts.scheduled_at).total_seconds()
    if due_for <= SILENT_SECONDS:
        return Explanation(facts.job_id, "due", reason, None, details)
    reason += f"; but it has been due for {_duration(due_for)}, so something may be wrong"
    return Explanation(facts.job_id, "due", reason, "roostctl doctor", details)


_START = "roostd -c /etc/roost.toml"


def _reload(workers: Iterable[Worker]) -> str:
    """Has these workers read what was changed, wherever they run."""
    names = dict.fromkeys(worker.name for worker in workers)
    return " ".join(["roostctl reload", *(f"--worker {_word(name)}" for name in names)])


def resume_command(queue: str) -> str:
    """The command that lets jobs of a queue start again; its name may look like an option."""
    return f"roostctl resume {'-- ' if queue.startswith('-') else ''}{_word(queue)}"


def _word(name: str) -> str:
    """A word of a command line; with an escape for each byte that a terminal would not show."""
    if name.isprintable():
        return shlex.quote(name)
    shown = (("\\" + c if c in "\\'" else c) if c.isprintable() else _escaped(c) for c in name)
    return f"$'{''.join(shown)}'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def _nearest(name: str, names: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, 1, 0.6)), None)


def _list(items: list[str], more: int = 0) -> str:
    return ", ".join(items) + (f" and {more:,} more" if more else "")


def _be(items: list[str]) -> str:
    return "is" if len(items) == 1 else "are"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _first_line(error: str | None) -> str:
    first = (error or "").partition("\n")[0]
    return (first if len(first) <= 200 else first[:199] + "…") or "an unknown error"


def _duration(span: timedelta | float) -> str:
    """In its largest unit."""
    seconds = max(0.0, span.total_seconds() if isinstance(span, timedelta) else span)
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}s"
    return f"{seconds:.0f} s"


def _at(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _timed(found: dict[str, Any] | None, key: str) -> dict[str, Any] | None:
    return found if found is None else {**found, key: found[key] and _time(found[key])}
