"""Every client operation as a value: the SQL, its parameters, and how to read the rows it returns.

Arguments are checked here, before anything is sent, so that no failure of ours leaves the caller's
transaction aborted. Roost and AsyncRoost differ only in how they wait for a Statement's rows. All parameters
are text with a cast in the SQL: that reads the same under every cursor class and whatever adapters the
connection has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, LiteralString, NamedTuple, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg.pq import TransactionStatus
from pydantic import BaseModel

from . import fields
from .arguments import object_text
from .errors import DuplicateUniqueJobError, InvalidJobError, JobNotFoundError, JobStateError, RoostError, SchemaError
from .explain import FACTS, Explanation, explanation_of, facts_of
from .fields import DOCUMENTED_DEFAULTS, Refused
from .registry import HandlerRegistry, HandlerSpec
from .types import AddedCount, Job, JobInsert, JobState, QueueInfo, RequeuedCount, TaskDefaults, WorkerInfo

T = TypeVar("T")
Rows = list[tuple[Any, ...]]

MAX_MESSAGE_BYTES = 900_000_000  # PostgreSQL takes values of up to 1 GB
SEPARATOR = "\x01"  # between the JSON texts of a bulk: JSON never holds it unescaped
MIN_POLL_SECONDS = 0.01  # a waiter that looks more often than that does nobody any good
BATCH_SIZE = 1000  # jobs that one requeue statement looks at: some tens of milliseconds

_NO_DEFAULTS = TaskDefaults()


@dataclass(frozen=True, slots=True)
class Statement(Generic[T]):
    """`what` is what it does, for errors: "enqueue 'send_receipt'".

    `prepare` False: planned anew each time, because the best plan depends on the parameters; None: as psycopg decides.
    """

    what: str
    sql: LiteralString
    parameters: Sequence[str] | Mapping[str, str]  # in their order, or by the names that the SQL has for them
    read: Callable[[Rows], T]
    prepare: bool | None = None


class Kind(NamedTuple):  # made and hashed a hundred thousand times in a bulk of which each job has its own time
    """The checked fields of a job but its args and metadata; many jobs of a bulk share one."""

    task: str
    queue: str
    priority: int
    max_attempts: int
    scheduled_at: str | None
    tags: tuple[str, ...]
    timeout_seconds: int | None
    args_model: type[BaseModel] | None


def enqueue(registry: HandlerRegistry, job: JobInsert, on_duplicate: str = "raise") -> Statement[int]:
    """Add one job; read its id."""
    try:
        kind = _kind(registry, job)
        args_text = _args_text(job.args, kind)
        metadata_text = _metadata_text(job.metadata)
        unique_key = fields.unique_key("unique_key", job.unique_key)
        on_duplicate = fields.on_duplicate("on_duplicate", on_duplicate, unique_key)
        parents = fields.parents("depends_on", job.depends_on)
    except Refused as refused:
        raise refused.as_invalid_job(f"enqueue {_task_shown(job.task)}") from None

    # Only what differs from roost.enqueue's own defaults is sent.
    sql: LiteralString = "task => %s::text, args => %s::jsonb"
    parameters = [kind.task, args_text]
    if kind.queue != "default":
        sql += ", queue => %s::text"
        parameters.append(kind.queue)
    if kind.priority != 0:
        sql += ", priority => %s::integer"
        parameters.append(str(kind.priority))
    if kind.max_attempts != 20:
        sql += ", max_attempts => %s::integer"
        parameters.append(str(kind.max_attempts))
    if kind.scheduled_at is not None:
        sql += ", scheduled_at => %s::timestamptz"
        parameters.append(kind.scheduled_at)
    if kind.tags:
        sql += ", tags => %s::text[]"
        parameters.append(_array_text(kind.tags))
    if kind.timeout_seconds is not None:
        sql += ", timeout_seconds => %s::integer"
        parameters.append(str(kind.timeout_seconds))
    if metadata_text:
        sql += ", metadata => %s::jsonb"
        parameters.append(metadata_text)
    what = f"enqueue {kind.task!r}"
    if unique_key is None and not parents:
        return Statement(what, f"SELECT roost.enqueue({sql})", parameters, _integer)

    if unique_key is not None:
        sql += ", unique_key => %s::text, on_duplicate => %s::text"
        parameters += [unique_key, on_duplicate]
    if parents:
        sql += ", depends_on => %s::bigint[]"
        parameters.append(_array_text([str(parent) for parent in parents]))

    def read(rows: Rows) -> int:
        ((job_id, duplicate_of, unknown_parents),) = rows
        if unknown_parents is not None:
            unknown = int(unknown_parents.split(",")[0])
            raise _unknown_parent(what, f"depends_on[{parents.index(unknown)}]", unknown)
        if duplicate_of is not None:
            raise DuplicateUniqueJobError(
                f"cannot {what}: unique_key {fields.shown(unique_key)} is that of job {duplicate_of}, which is active",
                int(duplicate_of),
            )
        return int(job_id)

    return Statement(
        what,
        f"SELECT e.job_id, e.duplicate_of, array_to_string(e.unknown_parents, ',') FROM roost.try_enqueue({sql}) AS e",
        parameters,
        read,
    )


def enqueue_many(registry: HandlerRegistry, jobs: Sequence[JobInsert]) -> Statement[AddedCount]:
    """Add many jobs, at least one, in one round trip; each distinct combination of fields is sent once."""
    what = f"enqueue {len(jobs)} jobs"
    numbers: dict[Kind, int] = {}
    known: dict[tuple[object, ...] | None, tuple[int, Kind]] = {}
    kind_of: list[str] = []
    args_texts: list[str] = []
    metadata_texts: list[str] = []
    keys: dict[int, str] = {}  # by the place of the job in the call
    parents: dict[int, list[int | JobInsert]] = {}
    try:
        for place, job in enumerate(jobs):
            if not isinstance(job, JobInsert):
                raise Refused("", f"must be a JobInsert, not {fields.shown(job)}")
            key = _key(job)
            try:
                found = known.get(key)
            except TypeError:  # a field holds what no job can have, such as a list as queue
                key, found = None, None
            if found is None:
                kind = _kind(registry, job)
                found = numbers.setdefault(kind, len(numbers) + 1), kind
                if key is not None:
                    known[key] = found
            number, kind = found
            if (unique_key := fields.unique_key("unique_key", job.unique_key)) is not None:
                keys[place] = unique_key
            if job.depends_on is not None and (named := fields.parents("depends_on", job.depends_on, JobInsert)):
                parents[place] = named
            kind_of.append(str(number))
            metadata_texts.append("" if job.metadata is None else _metadata_text(job.metadata))
            args_texts.append(_args_text(job.args, kind))
    except Refused as refused:
        raise refused.as_invalid_job(what, f"jobs[{len(args_texts)}]" + ("." if refused.path else "")) from None

    kinds_text = json.dumps([_kind_fields(kind) for kind in numbers], ensure_ascii=False)
    args_text = SEPARATOR.join(args_texts)
    metadata_text = SEPARATOR.join(metadata_texts) if any(metadata_texts) else ""
    each_key = (_quoted(keys[place]) if place in keys else "NULL" for place in range(len(jobs)))
    keys_text = "{" + ",".join(each_key) + "}" if keys else ""
    size_bytes = sum(map(_size_bytes, (kinds_text, args_text, metadata_text, keys_text)))
    if size_bytes > MAX_MESSAGE_BYTES:
        raise InvalidJobError(
            f"cannot {what}: they take {size_bytes} bytes, more than {MAX_MESSAGE_BYTES}; enqueue them in parts",
            "jobs",
        )
    sql: LiteralString = (
        "%s::json, %s::integer[], string_to_array(%s::text, E'\\x01'),"
        " string_to_array(nullif(%s::text, ''), E'\\x01', '')"
    )
    parameters = [kinds_text, "{" + ",".join(kind_of) + "}", args_text, metadata_text]
    if not keys and not parents:
        return Statement(what, f"SELECT roost.enqueue_many({sql})", parameters, lambda rows: AddedCount(_integer(rows)))

    in_call, outside = _edges(what, jobs, parents)

    def read(rows: Rows) -> AddedCount:
        ((added, duplicates, unknown_parents),) = rows
        if unknown_parents is not None:
            unknown = int(unknown_parents.split(",")[0])
            place = next(place for place, parent in outside if parent == unknown)
            raise _unknown_parent(what, f"jobs[{place}].depends_on[{parents[place].index(unknown)}]", unknown)
        return AddedCount(int(added), int(duplicates))

    return Statement(
        what,
        "SELECT e.added, e.duplicates, array_to_string(e.unknown_parents, ',')"
        f" FROM roost.try_enqueue_many({sql}, nullif(%s::text, '')::text[],"
        " %s::integer[], %s::integer[], %s::integer[], %s::bigint[]) AS e",
        [
            *parameters,
            keys_text,
            _array_text([str(child + 1) for child, _ in in_call]),
            _array_text([str(parent + 1) for _, parent in in_call]),
            _array_text([str(child + 1) for child, _ in outside]),
            _array_text([str(parent) for _, parent in outside]),
        ],
        read,
    )


def _edges(
    what: str, jobs: Sequence[JobInsert], parents: dict[int, list[int | JobInsert]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Who depends on whom: (place, place) within the call, (place, job id) outside it."""
    places: dict[int, int] = {}  # by identity: two jobs of the same fields are two jobs
    in_call, outside = [], []
    for child, named in parents.items():
        for k, parent in enumerate(named):
            if not isinstance(parent, JobInsert):
                outside.append((child, parent))
                continue
            places = places or {id(job): place for place, job in reversed(list(enumerate(jobs)))}
            place = places.get(id(parent))
            if place is None or place >= child:
                reason = "is not among these jobs" if place is None else f"must come before it, unlike jobs[{place}]"
                raise Refused(f"jobs[{child}].depends_on[{k}]", reason).as_invalid_job(what)
            in_call.append((child, place))
    return in_call, outside


def cancel(job_id: int) -> Statement[JobState]:
    """Cancel a waiting job, ask for the cancel of a running one; read the state it is in then."""
    checked = _job_id("cancel", job_id)

    def read(rows: Rows) -> JobState:
        if rows[0][0] is None:
            raise _no_job("cancel", checked)
        return JobState(rows[0][0])

    return Statement(
        f"cancel job {checked}",
        "SELECT coalesce(roost.cancel(%s::bigint), roost.archived_state(%s::bigint))",
        (str(checked), str(checked)),
        read,
    )


def retry(job_id: int, with_dependents: bool = False) -> Statement[JobState]:
    """Make a job due now; read the state it had."""
    checked = _job_id("retry", job_id)

    def read(rows: Rows) -> JobState:
        ((state, duplicate_of, dead_parent, parent_can_be, archived_state),) = rows
        if archived_state is not None:
            raise JobStateError(
                f"cannot retry job {checked}: it was {archived_state} and is in the archive; enqueue it anew",
                archived_state,
            )
        if state is None:
            raise _no_job("retry", checked)
        if duplicate_of is not None:
            raise DuplicateUniqueJobError(
                f"cannot retry job {checked}: its unique_key is that of job {duplicate_of}, which is active",
                int(duplicate_of),
            )
        if dead_parent is not None:
            fix = "retry that one, with its dependents"
            if not parent_can_be:
                fix = "that one is archived, or deleted: enqueue both anew"
            raise JobStateError(
                f"cannot retry job {checked}: job {dead_parent}, on which it depends, was discarded or cancelled;"
                f" {fix}",
                state,
            )
        if state in (JobState.COMPLETED, JobState.EXECUTING):
            raise JobStateError(
                f"cannot retry job {checked}: it is {state}; only a waiting, discarded or cancelled job can be", state
            )
        return JobState(state)

    return Statement(
        f"retry job {checked}",
        "SELECT r.state, r.duplicate_of, r.dead_parent,"
        " EXISTS (SELECT 1 FROM roost.job_rows j WHERE j.id = r.dead_parent),"
        " CASE WHEN r.state IS NULL THEN roost.archived_state(%s::bigint) END"
        " FROM roost.try_retry(%s::bigint, %s::boolean) AS r",
        (str(checked), str(checked), str(bool(with_dependents))),
        read,
    )


# One column of all that is not JSON, in UTC, and one for each that is, since a row written by other than this
# client may hold JSON that Python cannot read.
_JOB_COLUMNS: LiteralString = """\
json_build_object(
    'id', id, 'queue', queue, 'task', task, 'state', state, 'priority', priority, 'attempt', attempt,
    'max_attempts', max_attempts, 'scheduled_at', scheduled_at, 'attempted_at', attempted_at,
    'completed_at', completed_at, 'cancelled_at', cancelled_at, 'discarded_at', discarded_at,
    'unique_key', unique_key, 'inserted_at', inserted_at, 'tags', tags, 'timeout_seconds', timeout_seconds,
    'cancel_requested', cancel_requested, 'depends_on', depends_on)::text,
args::text, errors::text, result::text, metadata::text"""


def get_job(job_id: int) -> Statement[Job]:
    """Read one job, also of the archive."""
    checked = _job_id("get", job_id)

    def read(rows: Rows) -> Job:
        if not rows:
            raise _no_job("get", checked)
        return _job(rows[0])

    sql: LiteralString = (
        f"SELECT {_JOB_COLUMNS} FROM roost.jobs WHERE id = %s::bigint"
        f" UNION ALL SELECT {_JOB_COLUMNS} FROM roost.jobs_archive WHERE id = %s::bigint"
    )
    return Statement(f"get job {checked}", sql, (str(checked), str(checked)), read)


def explain(job_id: int, stale_after: float) -> Statement[Explanation]:
    """Read why a job isn't running, whether or not there is one."""
    checked = _job_id("explain", job_id)
    with _refusing(f"explain job {checked}"):
        seconds = fields.seconds("stale_after", stale_after)
    return Statement(
        f"explain job {checked}",
        FACTS,
        (str(checked), str(checked), str(seconds)),
        lambda rows: explanation_of(facts_of(rows[0][0], checked, seconds)),
    )


@dataclass(frozen=True, slots=True)
class Look:
    """What a waiter sees of its job: whether it has ended, and whether its end will be told. JSON is still text."""

    state: JobState
    awaited: bool
    result: str | None
    errors: str | None


def await_jobs(job_ids: Iterable[int]) -> Statement[None]:
    """Mark jobs as awaited, so that whoever ends one says so; those that another transaction holds are passed over.

    Nobody may be kept waiting by a row that an open transaction has locked.
    """
    return Statement(
        "wait for jobs",
        """\
WITH waiting AS MATERIALIZED (
    SELECT id FROM roost.job_rows
     WHERE id = ANY (%s::bigint[]) AND NOT awaited AND state IN ('available', 'retryable')
     ORDER BY id
       FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE roost.job_rows j SET awaited = true
  FROM waiting
 WHERE j.id = waiting.id AND j.state IN ('available', 'retryable')
RETURNING j.id""",
        (_numbers_text(job_ids),),
        _nothing,
    )


def look_at_jobs(job_ids: Iterable[int]) -> Statement[dict[int, Look]]:
    """Read how jobs stand, those in the archive included; an id without a job is left out."""
    ids = _numbers_text(job_ids)
    return Statement(
        "wait for jobs",
        """\
SELECT id, state, awaited,
       CASE WHEN state IN ('completed', 'discarded', 'cancelled') THEN result::text END,
       CASE WHEN state IN ('completed', 'discarded', 'cancelled') THEN errors::text END
  FROM roost.job_rows WHERE id = ANY (%s::bigint[])
UNION ALL
SELECT id, state, true, result::text, errors::text FROM roost.jobs_archive WHERE id = ANY (%s::bigint[])""",
        (ids, ids),
        lambda rows: {row[0]: Look(JobState(row[1]), *row[2:]) for row in rows},
    )


def checked_wait(job_id: int, timeout: float | None, poll_interval: float) -> tuple[int, float | None, float]:
    """Return the arguments of wait_for. Raises InvalidJobError."""
    checked_id = _job_id("wait for", job_id)
    with _refusing(f"wait for job {checked_id}"):
        checked_timeout = None if timeout is None else fields.seconds("timeout", timeout)
        checked_interval = fields.seconds("poll_interval", poll_interval)
        if checked_interval < MIN_POLL_SECONDS:
            raise Refused("poll_interval", f"must be at least {MIN_POLL_SECONDS} seconds, not {checked_interval}")
    return checked_id, checked_timeout, checked_interval


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are meant, as the caller says it; what is None means any. Ages are of the enqueue (`inserted_at`)."""

    queue: str | None = None
    task: str | None = None
    tag: str | None = None
    older_than: timedelta | None = None
    newer_than: timedelta | None = None
    error: str | None = None


# What each state is in job_rows, alias j.
_IS_STATE: dict[JobState, LiteralString] = {
    JobState.AVAILABLE: "j.state = 'available' AND NOT EXISTS (SELECT FROM roost.claims c WHERE c.job_id = j.id)",
    JobState.EXECUTING: "j.id = ANY (ARRAY(SELECT c.job_id FROM roost.claims c))",
    JobState.RETRYABLE: "j.state = 'retryable' AND NOT EXISTS (SELECT FROM roost.claims c WHERE c.job_id = j.id)",
    JobState.COMPLETED: "j.state = 'completed'",
    JobState.DISCARDED: "j.state = 'discarded' AND j.discarded_at IS NOT NULL",
    JobState.CANCELLED: "j.state = 'cancelled' AND j.cancelled_at IS NOT NULL",
}
_WAITING = (JobState.AVAILABLE, JobState.RETRYABLE)
_MANY: LiteralString = "5001"  # jobs that wait: reading fewer of them, each by its id, takes up to some 10 ms
_OLDER: LiteralString = "now() - make_interval(secs => %(older_than)s::float8)"
_NEWER: LiteralString = "now() - make_interval(secs => %(newer_than)s::float8)"


@dataclass(frozen=True, slots=True)
class _Checked:
    """A JobFilter as conditions on a row with the alias j, but for the times, and the parameters that they name."""

    conditions: list[LiteralString]
    ages: list[LiteralString]
    parameters: dict[str, str]

    def where(self, *more: LiteralString) -> LiteralString:
        return " AND ".join([*more, *self.conditions]) or "true"


def _check_filter(which: JobFilter) -> _Checked:
    """Raises Refused."""
    conditions: list[LiteralString] = []
    ages: list[LiteralString] = []
    parameters: dict[str, str] = {}
    if which.queue is not None:
        conditions.append("j.queue = %(queue)s::text")
        parameters["queue"] = fields.name("queue", which.queue)
    if which.task is not None:
        conditions.append("j.task = %(task)s::text")
        parameters["task"] = fields.name("task", which.task)
    if which.tag is not None:
        conditions.append("j.tags @> ARRAY[%(tag)s::text]")
        parameters["tag"] = fields.text("tag", which.tag)
    if which.error is not None:
        # Of the newest error, which is the one that lists show. Not LIKE: whatever is asked for means itself.
        conditions.append("j.errors IS NOT NULL")
        conditions.append("strpos(lower(j.errors -> -1 ->> 'error'), lower(%(error)s::text)) > 0")
        parameters["error"] = fields.text("error", which.error)
        if not parameters["error"]:
            raise Refused("error", "must have at least 1 character")
    if which.older_than is not None:
        ages.append(f"j.inserted_at < {_OLDER}")
        parameters["older_than"] = fields.age("older_than", which.older_than)
    if which.newer_than is not None:
        ages.append(f"j.inserted_at >= {_NEWER}")
        parameters["newer_than"] = fields.age("newer_than", which.newer_than)
    if which.older_than is not None and which.newer_than is not None and which.older_than >= which.newer_than:
        raise Refused(
            "newer_than", "must be more than older_than: no job is older than the one and newer than the other"
        )
    return _Checked(conditions, ages, parameters)


def list_jobs(
    which: JobFilter,
    state: str | Iterable[str] | None,
    archived: bool,
    before_id: int | None,
    limit: int,
) -> Statement[list[Job]]:
    """Read the newest jobs that match, newest first, below `before_id`."""
    with _refusing("list jobs"):
        states = _states(state)
        if archived and any(not each.is_terminal for each in states):
            raise Refused("state", "must be completed, discarded or cancelled with archived: no other job is there")
        checked = _check_filter(which)
        if before_id is not None:
            checked.conditions.append("j.id < %(before_id)s::bigint")
            checked.parameters["before_id"] = str(fields.integer("before_id", before_id, 0, fields.INT8_MAX))
        checked.parameters["limit"] = str(fields.integer("limit", limit, least=1))
    if archived:
        checked.parameters["states"] = _array_text([each.value for each in states])
        matching = checked.where(*(["j.state = ANY (%(states)s::text[])"] if states else []), *checked.ages)
        sql: LiteralString = (
            f"SELECT {_JOB_COLUMNS} FROM roost.jobs_archive j WHERE {matching} ORDER BY id DESC LIMIT %(limit)s::bigint"
        )
    else:
        sql = f"""\
WITH {_page(states, checked, which)}
SELECT {_JOB_COLUMNS}
  FROM roost.jobs WHERE id = ANY (ARRAY(SELECT id FROM page)) ORDER BY id DESC"""
    return Statement("list jobs", sql, checked.parameters, lambda rows: [_job(row) for row in rows], prepare=False)


def _page(states: list[JobState], checked: _Checked, which: JobFilter) -> LiteralString:
    """The CTE `page`, of the ids that match, and what it needs.

    No index names the state of a job, because its end must not change any; so each state has a way of its own to
    where its jobs are, walks it from the newest job on, and the newest of all ways are the page. A way without an index
    is the primary key.
    """
    before: list[LiteralString] = []
    window: list[LiteralString] = []  # of ids, to which the times lead
    ways: list[LiteralString] = []
    if checked.ages:
        before.append(_age_cte(which))
    if which.older_than is not None:
        window.append("j.id < (SELECT older FROM age)")
    if which.newer_than is not None:
        window.append("j.id >= (SELECT newer FROM age)")

    def way(*conditions: LiteralString) -> None:
        ways.append(
            f"(SELECT j.id FROM roost.job_rows j WHERE {checked.where(*conditions, *window, *checked.ages)}"
            " ORDER BY j.id DESC LIMIT %(limit)s::bigint)"
        )

    waiting = [_IS_STATE[each] for each in states if each in _WAITING]
    if waiting:
        # Where few wait, these are read, and not the millions that have finished since; where many wait, some are new.
        before.append(_waiting_cte(checked, window))
        way("(SELECT few FROM waits)", "j.id = ANY (ARRAY(SELECT job_id FROM waiting))", _any_of(waiting))
    for each in states:
        many: list[LiteralString] = ["NOT (SELECT few FROM waits)"] if each in _WAITING else []
        if each is JobState.RETRYABLE:
            many.append("j.errors IS NOT NULL")  # as it is of every job that a worker lets run again
        way(*many, _IS_STATE[each])
    if not states:
        way()

    # What was enqueued by a transaction that was open at the time asked for may have an id on the other side of it.
    stated = [_any_of([_IS_STATE[each] for each in states])] if states else []

    def strays(called: LiteralString) -> None:
        ways.append(
            f"(SELECT j.id FROM roost.strays({called}) AS s JOIN roost.job_rows j ON j.id = s.id"
            f" WHERE {checked.where(*stated, *checked.ages)} ORDER BY j.id DESC LIMIT %(limit)s::bigint)"
        )

    if which.older_than is not None:
        strays(f"{_OLDER}, (SELECT older FROM age), true")
    if which.newer_than is not None:
        strays(f"{_NEWER}, (SELECT newer FROM age), false")
    found: LiteralString = "\n    UNION ALL\n    ".join(ways)
    page: LiteralString = (
        f"page AS MATERIALIZED (\n    SELECT id FROM (\n    {found}\n    ) AS found"
        "\n     ORDER BY id DESC LIMIT %(limit)s::bigint\n)"
    )
    return ", ".join([*before, page])


def _age_cte(which: JobFilter) -> LiteralString:
    older = f"roost.id_of_time({_OLDER})" if which.older_than is not None else "NULL::bigint"
    newer = f"roost.id_of_time({_NEWER})" if which.newer_than is not None else "NULL::bigint"
    return f"age AS MATERIALIZED (\n    SELECT {older} AS older, {newer} AS newer\n)"


def _waiting_cte(checked: _Checked, window: list[LiteralString]) -> LiteralString:
    """`waiting`, the jobs in the window that wait (of many at least `_MANY`), and `waits`, whether they are few."""
    ids = [condition.replace("j.id", "job_id") for condition in window]
    if "before_id" in checked.parameters:
        ids.append("job_id < %(before_id)s::bigint")
    of_queue: list[LiteralString] = ["queue = %(queue)s::text"] if "queue" in checked.parameters else []
    of_task: list[LiteralString] = ["task = %(task)s::text"] if "task" in checked.parameters else []

    def some(table: LiteralString, *conditions: LiteralString) -> LiteralString:
        where = " AND ".join([*conditions, *ids]) or "true"
        return f"(SELECT job_id FROM roost.{table} WHERE {where} LIMIT {_MANY})"

    return f"""\
waiting AS MATERIALIZED (
    {some("ready", *of_queue)}
    UNION ALL {some("throttled", *of_queue, *of_task)}
    UNION ALL {some("scheduled", *of_queue)}
    UNION ALL {some("blocked", *of_queue)}
), waits AS MATERIALIZED (
    SELECT count(*) < {_MANY} AS few FROM waiting
)"""


def _any_of(conditions: Sequence[LiteralString]) -> LiteralString:
    return "(" + " OR ".join(f"({each})" for each in conditions) + ")"


def waiting_jobs(task: str | None, limit: int) -> Statement[list[Job]]:
    """Read the newest jobs of a task (None: any) that have yet to run, newest first."""
    of_task: LiteralString = "" if task is None else "AND task = %s::text "
    sql: LiteralString = (
        f"SELECT {_JOB_COLUMNS} FROM roost.jobs WHERE state IN ('available', 'retryable') {of_task}"
        "ORDER BY id DESC LIMIT %s::bigint"
    )
    parameters = [str(limit)] if task is None else [task, str(limit)]
    return Statement("look for jobs", sql, parameters, lambda rows: [_job(row) for row in rows])


def task_name(registry: HandlerRegistry, task: str | Callable[..., Any]) -> str:
    """The name of a task, given that or its function. Raises Refused."""
    return _task(registry, task)[0]


def status() -> Statement[dict[str, dict[str, int]]]:
    """Count all jobs by queue and state: one pass over job_rows, corrected by what is claimed."""

    def read(rows: Rows) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for queue, state, count in rows:
            counts.setdefault(queue, dict.fromkeys(JobState, 0))[JobState(state)] = int(count)
        return counts

    return Statement(
        "count jobs",
        """\
WITH claimed AS (
    SELECT j.queue, j.state, count(*) AS jobs
      FROM roost.claims c JOIN roost.job_rows j ON j.id = c.job_id
     GROUP BY j.queue, j.state
), counted AS (
    SELECT queue, state, count(*) AS jobs FROM roost.job_rows GROUP BY queue, state
    UNION ALL
    SELECT queue, state, -jobs FROM claimed
    UNION ALL
    SELECT queue, 'executing', jobs FROM claimed
)
SELECT queue, state, sum(jobs) FROM counted GROUP BY queue, state HAVING sum(jobs) > 0 ORDER BY queue, state""",
        (),
        read,
    )


def set_paused(queue: str, paused: bool) -> Statement[None]:
    """Pause or resume a queue, and tell the workers."""
    what = f"{'pause' if paused else 'resume'} queue {fields.shown(queue)}"
    with _refusing(what):
        name = fields.name("name", queue)
    return Statement(
        what,
        """\
WITH changed AS (
    INSERT INTO roost.queues AS q (name, paused, paused_at)
    VALUES (%s::text, %s::boolean, CASE WHEN %s::boolean THEN now() END)
    ON CONFLICT (name) DO UPDATE
       SET paused = excluded.paused, updated_at = now(),
           paused_at = CASE WHEN excluded.paused THEN coalesce(q.paused_at, now()) END
    RETURNING name, paused
)
SELECT pg_notify('roost_queue_changed', name), CASE WHEN NOT paused THEN roost.notify_idle(name) END FROM changed""",
        (name, str(paused), str(paused)),
        _nothing,
    )


def list_queues() -> Statement[list[QueueInfo]]:
    """Read every queue that has an unfinished job, a worker, or ever was paused."""
    return Statement(
        "list queues",
        """\
WITH ready AS (
    SELECT queue, count(*) AS jobs
      FROM (SELECT queue FROM roost.ready UNION ALL SELECT queue FROM roost.throttled) AS due
     GROUP BY queue
), scheduled AS (
    SELECT queue, count(*) AS jobs FROM roost.scheduled GROUP BY queue
), executing AS (
    SELECT j.queue, count(*) AS jobs
      FROM roost.claims c JOIN roost.job_rows j ON j.id = c.job_id
     GROUP BY j.queue
), blocked AS (
    SELECT queue, count(*) AS jobs FROM roost.blocked GROUP BY queue
), named AS (
    SELECT name FROM roost.queues
    UNION SELECT unnest(queues) FROM roost.workers
    UNION SELECT queue FROM ready
    UNION SELECT queue FROM scheduled
    UNION SELECT queue FROM executing
    UNION SELECT queue FROM blocked
)
SELECT n.name, coalesce(q.paused, false), coalesce(r.jobs, 0), coalesce(s.jobs, 0), coalesce(e.jobs, 0),
       coalesce(b.jobs, 0)
  FROM named n
  LEFT JOIN roost.queues q ON q.name = n.name
  LEFT JOIN ready r ON r.queue = n.name
  LEFT JOIN scheduled s ON s.queue = n.name
  LEFT JOIN executing e ON e.queue = n.name
  LEFT JOIN blocked b ON b.queue = n.name
 ORDER BY n.name""",
        (),
        lambda rows: [QueueInfo(*row) for row in rows],
    )


def list_workers() -> Statement[list[WorkerInfo]]:
    """Read every worker that has a row, the oldest first."""

    def read(rows: Rows) -> list[WorkerInfo]:
        workers = []
        for (row,) in rows:
            worker = json.loads(row)
            for key in ("started_at", "last_seen_at"):
                worker[key] = datetime.fromisoformat(worker[key])
            for key in ("id", "reload_request"):
                worker[key] = worker[key] and UUID(worker[key])
            workers.append(WorkerInfo(**{**worker, "queues": tuple(worker["queues"])}))
        return workers

    return Statement(
        "list workers",
        """\
SELECT json_build_object(
           'id', id, 'name', name, 'hostname', hostname, 'pid', pid, 'queues', queues, 'concurrency',
           concurrency, 'inflight', inflight, 'started_at', started_at, 'last_seen_at', last_seen_at,
           'reload_request', reload_request, 'metadata', metadata)::text
  FROM roost.workers
 ORDER BY started_at, id""",
        (),
        read,
    )


def request_reload(worker_ids: Sequence[UUID | str] | None, hostname: str | None) -> Statement[UUID]:
    """Ask workers to reload; read the id of the request, which each answers in its metadata."""
    request = uuid4()
    where, parameters = _workers("request a reload", worker_ids, hostname)

    def read(rows: Rows) -> UUID:
        if not rows:
            raise RoostError("cannot request a reload: no such worker is running; see `roostctl workers`")
        return request

    return Statement(
        "request a reload",
        f"""\
WITH asked AS (
    UPDATE roost.workers SET reload_request = %s::uuid {where}RETURNING id
)
SELECT pg_notify('roost_reload', id::text) FROM asked""",
        [str(request), *parameters],
        read,
    )


def request_drain(worker_ids: Sequence[UUID | str] | None, hostname: str | None) -> Statement[list[UUID]]:
    """Ask workers to end when what they run has ended; read their ids."""
    where, parameters = _workers("request a drain", worker_ids, hostname)

    def read(rows: Rows) -> list[UUID]:
        if not rows:
            raise RoostError("cannot request a drain: no such worker is running; see `roostctl workers`")
        return [UUID(row[0]) for row in rows]

    return Statement(
        "request a drain",
        f"""\
WITH asked AS (
    UPDATE roost.workers SET drain_requested = true {where}RETURNING id
)
SELECT id::text, pg_notify('roost_drain', id::text)::text FROM asked""",
        parameters,
        read,
    )


def _workers(
    what: str, worker_ids: Sequence[UUID | str] | None, hostname: str | None
) -> tuple[LiteralString, list[str]]:
    """The WHERE clause for workers, all or those named, and its parameters."""
    conditions: list[LiteralString] = []
    parameters: list[str] = []
    with _refusing(what):
        if worker_ids is not None:
            conditions.append("id = ANY (%s::uuid[])")
            parameters.append(_array_text([_uuid(f"worker_ids[{i}]", id) for i, id in enumerate(worker_ids)]))
        if hostname is not None:
            conditions.append("hostname = %s::text")
            parameters.append(fields.text("hostname", hostname))
    where: LiteralString = "WHERE " + " AND ".join(conditions) + " " if conditions else ""
    return where, parameters


def count_discarded(which: JobFilter) -> Statement[int]:
    """Count the discarded jobs that match."""
    where, parameters = _discarded("count discarded jobs", which)
    sql: LiteralString = f"SELECT count(*) FROM roost.job_rows j WHERE {where}"
    return Statement("count discarded jobs", sql, parameters, _integer, prepare=False)


def first_discarded(which: JobFilter, limit: int) -> Statement[list[int]]:
    """Read the ids of the discarded jobs that a requeue of so many takes first."""
    where, parameters = _discarded("look for discarded jobs", which)
    return Statement(
        "look for discarded jobs",
        f"SELECT j.id FROM roost.job_rows j WHERE {where} ORDER BY j.id LIMIT %(limit)s::integer",
        {**parameters, "limit": str(limit)},
        lambda rows: [int(row[0]) for row in rows],
        prepare=False,
    )


class Requeue:
    """The statements of a requeue of discarded jobs, a batch each, and what they have done so far.

    Each goes through the ids from where the one before it ended: whatever is discarded anew meanwhile is not met again.
    """

    def __init__(self, which: JobFilter, limit: int | None) -> None:
        with _refusing("requeue discarded jobs"):
            most = fields.INT8_MAX if limit is None else fields.integer("limit", limit, 1, fields.INT8_MAX)
        self.done = RequeuedCount(0)
        self._which = which
        self._most = most
        self._after_id: int | None = -fields.INT8_MAX - 1

    def next(self) -> Statement[tuple[RequeuedCount, int | None]] | None:
        """Return the next batch, None when there is none; what it returns is for `took`."""
        left = self._most - self.done
        if self._after_id is None or left <= 0:
            return None
        return requeue_batch(self._which, self._after_id, min(left, BATCH_SIZE))

    def took(self, answer: tuple[RequeuedCount, int | None]) -> bool:
        """Take in the answer to a batch; return whether it met any job."""
        batch, self._after_id = answer
        self.done = self.done.plus(batch)
        return self._after_id is not None


def requeue_batch(which: JobFilter, after_id: int, limit: int) -> Statement[tuple[RequeuedCount, int | None]]:
    """Requeue those of the first discarded jobs after `after_id` that can be; read the counts, and the last one's id.

    They are found before any is locked: however long that takes, no lock is held meanwhile.
    """
    where, parameters = _discarded("requeue discarded jobs", which)

    def read(rows: Rows) -> tuple[RequeuedCount, int | None]:
        ((requeued, duplicates, dead_parents, held, last_id),) = rows
        counts = RequeuedCount(int(requeued or 0), int(duplicates or 0), int(dead_parents or 0), int(held or 0))
        return counts, None if last_id is None else int(last_id)

    return Statement(
        "requeue discarded jobs",
        f"""\
WITH batch AS MATERIALIZED (
    SELECT array_agg(found.id) AS ids, max(found.id) AS last_id
      FROM (SELECT j.id FROM roost.job_rows j
             WHERE {where} AND j.id > %(after_id)s::bigint ORDER BY j.id LIMIT %(limit)s::integer) AS found
)
SELECT r.requeued, r.duplicates, r.dead_parents, r.held, batch.last_id
  FROM batch
  LEFT JOIN LATERAL roost.requeue(batch.ids) AS r ON batch.ids IS NOT NULL""",
        {**parameters, "after_id": str(after_id), "limit": str(limit)},
        read,
        prepare=False,
    )


C = TypeVar("C", psycopg.Connection[Any], psycopg.AsyncConnection[Any])


def usable(conn: C, kind: type[C], what: str) -> C:
    """Return the caller's connection. Raises InvalidJobError for one that a statement could only fail on."""
    if not isinstance(conn, kind):
        other = {psycopg.Connection: psycopg.AsyncConnection, psycopg.AsyncConnection: psycopg.Connection}[kind]
        client = "AsyncRoost" if kind is psycopg.Connection else "Roost"
        hint = f": that goes with {client}" if isinstance(conn, other) else ""
        raise InvalidJobError(
            f"cannot {what}: conn must be a psycopg.{kind.__name__}, not a {type(conn).__qualname__}{hint}", "conn"
        )
    if conn.closed:
        raise InvalidJobError(f"cannot {what}: conn is closed", "conn")
    if conn.pgconn.transaction_status == TransactionStatus.INERROR:
        raise InvalidJobError(f"cannot {what}: the transaction of conn has failed already; roll it back first", "conn")
    return conn


def explained(
    error: Exception, what: str, conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]
) -> RoostError | None:
    """Return a clearer error for one of a missing schema or an encoding, None for any other."""
    if isinstance(error, UnicodeEncodeError):
        return InvalidJobError(f"cannot {what}: client_encoding of conn cannot hold it: {error}", "conn")
    is_outdated = isinstance(error, psycopg.errors.UndefinedColumn) and (
        "awaited" in str(error) or "drain_requested" in str(error)
    )
    missing = (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction)
    if is_outdated or (isinstance(error, missing) and "roost" in str(error)):
        return SchemaError(
            f"cannot {what}: the schema roost of database {conn.info.dbname!r} is missing or out of date;"
            " run `roostctl migrate up`, or call setup_schema()",
            "outdated" if is_outdated or isinstance(error, psycopg.errors.UndefinedFunction) else "missing",
        )
    return None


# Below: how the operations above check and write what they are given.


def _kind(registry: HandlerRegistry, job: JobInsert) -> Kind:
    task, spec = _task(registry, job.task)
    passed = job.passed
    defaults = _NO_DEFAULTS if spec is None else spec.defaults

    def field(name: str, check: Callable[[str, Any], Any]) -> Any:
        if name not in passed:
            default = getattr(defaults, name)  # checked when the task was registered
            return DOCUMENTED_DEFAULTS[name] if default is None else default
        return check(name, getattr(job, name))

    return Kind(
        task,
        field("queue", fields.name),
        field("priority", fields.integer),
        field("max_attempts", fields.count),
        None if job.scheduled_at is None else fields.time("scheduled_at", job.scheduled_at),
        field("tags", fields.tags) or (),
        field("timeout_seconds", fields.optional_count),
        None if spec is None else spec.args_model,
    )


def _key(job: JobInsert) -> tuple[object, ...] | None:
    """What tells whether another job of a bulk has the same Kind; None when that takes a closer look."""
    if (
        # What compares equal and yet may be refused: True and 1.0 are no integers.
        type(job.priority) is not int
        or type(job.max_attempts) is not int
        or type(job.timeout_seconds) not in (int, type(None))
        or (job.tags is not None and type(job.tags) not in (list, tuple))
    ):
        return None
    tags = job.tags if job.tags is None else tuple(job.tags)
    return (
        job.task,
        job.queue,
        job.priority,
        job.max_attempts,
        job.scheduled_at,
        tags,
        job.timeout_seconds,
        job.passed,
    )


def _task(registry: HandlerRegistry, task: str | Callable[..., Any]) -> tuple[str, HandlerSpec | None]:
    if isinstance(task, str) or not callable(task):
        name = fields.name("task", task)
        return name, registry.get(name)
    names = registry.names_of(task)
    if len(names) == 1:
        return names[0], registry.get(names[0])
    if not names:
        raise Refused("task", "is not registered: decorate it with @job, or pass the task's name")
    raise Refused("task", f"is registered as {' and '.join(map(repr, names))}: pass one of these names")


def _task_shown(task: object) -> str:
    return fields.shown(task) if isinstance(task, str) else getattr(task, "__qualname__", fields.shown(task))


def _args_text(args: object, kind: Kind) -> str:
    if args is None:
        if kind.args_model is None:
            return "{}"
        args = {}
    return object_text("args", args, kind.args_model)


def _metadata_text(metadata: object) -> str:
    """The JSON text; '' for none, which is how {} is stored too."""
    text = "" if metadata is None else object_text("metadata", metadata)
    return "" if text == "{}" else text


def _kind_fields(kind: Kind) -> dict[str, Any]:
    return {
        "task": kind.task,
        "queue": kind.queue,
        "priority": kind.priority,
        "max_attempts": kind.max_attempts,
        "scheduled_at": kind.scheduled_at,
        "tags": kind.tags or None,
        "timeout_seconds": kind.timeout_seconds,
    }


def _size_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _array_text(values: Sequence[str]) -> str:
    return "{" + ",".join(map(_quoted, values)) + "}"


def _quoted(value: str) -> str:
    """An element of an array's literal."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _numbers_text(values: Iterable[int]) -> str:
    return "{" + ",".join(map(str, values)) + "}"


def _integer(rows: Rows) -> int:
    return int(rows[0][0])


def _nothing(rows: Rows) -> None:
    return None


def _job(row: tuple[Any, ...]) -> Job:
    columns, args, errors, result, metadata = row
    return Job.from_row({**json.loads(columns), "args": args, "errors": errors, "result": result, "metadata": metadata})


def _job_id(verb: str, job_id: int) -> int:
    with _refusing(f"{verb} job {fields.shown(job_id)}"):
        return fields.integer("job_id", job_id, -fields.INT8_MAX - 1, fields.INT8_MAX)


def _unknown_parent(what: str, path: str, job_id: int) -> InvalidJobError:
    return InvalidJobError(f"cannot {what}: {path} is job {job_id}, which does not exist", path)


def _no_job(verb: str, job_id: int) -> JobNotFoundError:
    return JobNotFoundError(f"cannot {verb} job {job_id}: there is no such job")


def _states(value: str | Iterable[str] | None) -> list[JobState]:
    """Each state that is named, once; none for None."""
    if value is None:
        return []
    states = [
        _state(each) for each in ([value] if isinstance(value, str) or not isinstance(value, Iterable) else value)
    ]
    if not states:
        raise Refused("state", "must name at least one state, or be None for any")
    return list(dict.fromkeys(states))


def _state(value: object) -> JobState:
    try:
        return JobState(value)  # type: ignore[arg-type]
    except ValueError:
        raise Refused("state", f"must be one of {', '.join(JobState)}, not {fields.shown(value)}") from None


def _uuid(path: str, value: UUID | str) -> str:
    try:
        return str(value if isinstance(value, UUID) else UUID(value))
    except (ValueError, AttributeError, TypeError):
        raise Refused(path, f"must be a UUID, not {fields.shown(value)}") from None


def _discarded(what: str, which: JobFilter) -> tuple[LiteralString, dict[str, str]]:
    """The condition on a row with the alias j, and its parameters.

    It does not name the state, which says the same: so what an index has is enough to count them.
    """
    with _refusing(what):
        checked = _check_filter(which)
    return checked.where("j.discarded_at IS NOT NULL", *checked.ages), checked.parameters


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    try:
        yield
    except Refused as refused:
        raise refused.as_invalid_job(what) from None
