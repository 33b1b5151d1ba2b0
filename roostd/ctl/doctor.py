"""doctor: looks at everything that the queue depends on, and says what to do.

The checks stand in the order in which they are made, listed in CHECKS. Each reads only, and no statement may take long:
what it counts is bounded, and what it may not see it says. Below them is how they are run and shown.
"""

from __future__ import annotations

import difflib
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, LiteralString, NamedTuple, TypeVar

import click
import psycopg
from psycopg import sql
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo

from roost_client import schema
from roost_client.connections import is_direct
from roost_client.explain import resume_command
from roostd.config import Config
from roostd.ctl.command import EXIT_NOTHING, EXIT_UNAVAILABLE, Failure, Invocation, command
from roostd.ctl.output import one_line, print_json, printable

OLDEST_SERVER, NEWEST_SERVER = 14, 18  # that Roost is tested on
OLD_SECONDS = 300.0  # a transaction that has been open for so long is worth a warning
VERY_OLD_SECONDS = 3600.0  # and for so long is a failure
IDLE_SECONDS = 60.0  # in a transaction
OLD_XIDS = 100_000  # as many transactions ago as no slot should hold back
SKEW_SECONDS = 5.0  # between clocks; what is measured of a worker's includes the way of its heartbeat
DEAD_ROWS, DEAD_SHARE = 100_000, 0.5  # more than that, and than that share of the living, are too many
WORKER_CONNECTIONS = 5  # one more than a worker has most of the time
MOST_ROWS = 10_000  # counted of a queue
SAMPLE = 1000  # jobs of a queue whose task is looked at
MOST_QUEUES = 1000
SHOWN = 10  # findings of one check

_STATEMENT_SECONDS = 5.0
_ANSWER_SECONDS = 10.0  # without one, the connection is taken for dead
_PROBE_SECONDS = 3.0  # for a pooler to find a server connection

Verdict = Literal["ok", "warning", "failure"]
T = TypeVar("T")


class Found(NamedTuple):
    """`fix` is a command, a statement, or what to do in words."""

    verdict: Verdict
    found: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    found: str
    fix: str | None


class Patient:
    """The database, as the checks ask it."""

    def __init__(self, conninfo: str, settings: Config) -> None:
        self.settings = settings
        self.conninfo = conninfo
        self.conn = _connect(conninfo)

    def rows(self, statement: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        with self.bounded() as conn:
            return conn.execute(statement, parameters or None).fetchall()

    @contextmanager
    def bounded(self) -> Iterator[psycopg.Connection[Any]]:
        """A transaction of its own, because a pooler in transaction mode keeps no setting beyond one."""
        with self.conn.transaction():
            self.conn.execute("SET TRANSACTION READ ONLY")
            self.conn.execute(f"SET LOCAL statement_timeout = '{_STATEMENT_SECONDS:g}s'")
            self.conn.execute("SET LOCAL lock_timeout = '1s'")
            # What is counted is counted in the order of an index, as far as a LIMIT says: no other plan ends early.
            self.conn.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
            self.conn.execute("SET LOCAL enable_sort = off; SET LOCAL enable_hashjoin = off")
            yield self.conn


# -- the checks


def database(patient: Patient) -> Iterator[Found]:
    """Which it is, and how far away."""
    trips = []
    for _ in range(3):
        began = time.perf_counter()
        row = patient.conn.execute("SELECT current_database(), current_user").fetchone()
        trips.append(time.perf_counter() - began)
    assert row is not None
    yield Found("ok", f"{row[0]} answers role {row[1]} within {min(trips) * 1000:.1f} ms")


def server(patient: Patient) -> Iterator[Found]:
    """Its version, and whether it can be written to."""
    ((number, version, is_standby, read_only),) = patient.rows(
        "SELECT current_setting('server_version_num')::integer, current_setting('server_version'),"
        " pg_is_in_recovery(), current_setting('default_transaction_read_only')"
    )
    major = number // 10000
    if major < OLDEST_SERVER:
        yield Found("failure", f"PostgreSQL {version} is too old", f"use PostgreSQL {OLDEST_SERVER} or newer")
    elif major > NEWEST_SERVER:
        yield Found("warning", f"PostgreSQL {version} is newer than the newest that Roost is tested on")
    else:
        yield Found("ok", f"PostgreSQL {version}")
    if is_standby:
        yield Found("failure", "it is a standby, which can only be read", "connect to the primary")
    elif read_only == "on":
        yield Found("failure", "transactions are read-only by default", "set default_transaction_read_only to off")


def schema_version(patient: Patient) -> Iterator[Found]:
    """Whether the migrations are those of this version."""
    with patient.bounded() as conn:
        states = schema.status(conn)
    by_state = {state: [f"{s.version:04}" for s in states if s.state == state] for state in {s.state for s in states}}
    if unknown := by_state.get("unknown"):
        yield Found(
            "failure",
            f"{_migrations(unknown)} applied by a newer version of Roost",
            "install the version that the others on this database run",
        )
    if altered := by_state.get("altered"):
        yield Found(
            "failure",
            f"{_migrations(altered)} applied with another text than this version has",
            "install the version that applied it, or compare with roostctl migrate sql",
        )
    if pending := by_state.get("pending"):
        what = "the schema is not there" if len(pending) == len(states) else f"{_migrations(pending)} not applied"
        yield Found("failure", what, "roostctl migrate up")
    if len(by_state) == 1 and "applied" in by_state:
        yield Found("ok", f"up to date, at migration {states[-1].version:04}")


def _migrations(numbers: list[str]) -> str:
    return f"migration {numbers[0]} is" if len(numbers) == 1 else f"migrations {', '.join(numbers)} are"


# What docs/privileges.md grants an application that enqueues.
_ENQUEUES = (
    ("job_rows", None, "INSERT"),
    *(("job_rows", column, "SELECT") for column in ("id", "queue", "priority", "scheduled_at", "task")),
    *((table, None, "INSERT") for table in ("ready", "scheduled", "throttled")),
    *((table, None, "SELECT") for table in ("idle_workers", "throttles")),
)


def rights(patient: Patient) -> Iterator[Found]:
    """What the connected role may do."""
    role, may_use = patient.rows(
        "SELECT current_user,"
        "       (SELECT has_schema_privilege(n.oid, 'USAGE') FROM pg_namespace n WHERE n.nspname = 'roost')"
    )[0]
    if may_use is None:
        return  # there is no schema, as is said above
    fix = f"grant it to role {role}, see docs/privileges.md"
    if not may_use:
        yield Found("failure", f"role {role} may not use the schema roost", fix)
        return
    lacking = patient.rows(
        "SELECT n.\"right\" || ' on roost.' || n.\"table\" || coalesce(' (' || n.\"column\" || ')', '')"
        '  FROM unnest(%s::text[], %s::text[], %s::text[]) AS n("table", "column", "right")'
        "  JOIN pg_class c ON c.oid = to_regclass('roost.' || n.\"table\")"
        ' WHERE NOT CASE WHEN n."column" IS NULL THEN has_table_privilege(c.oid, n."right")'
        '                ELSE has_column_privilege(c.oid, n."column", n."right") END',
        *(list(each) for each in zip(*_ENQUEUES, strict=True)),
    )
    if lacking:
        yield Found("failure", f"role {role} may not enqueue: it lacks {_names(row[0] for row in lacking)}", fix)
        return
    lacking = patient.rows(
        "SELECT p.\"right\" || ' on roost.' || c.relname"
        "  FROM pg_class c"
        "  JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'roost'"
        " CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p(\"right\")"
        " WHERE c.relkind = 'r' AND c.relname <> 'migrations' AND NOT has_table_privilege(c.oid, p.\"right\")"
        " ORDER BY c.relname, 1"
    )
    if lacking:
        yield Found(
            "warning",
            f"role {role} may enqueue, but not look after jobs, nor run them:"
            f" it lacks {_names(row[0] for row in lacking)}",
            f"for that, make role {role} a member of the role that owns the schema",
        )
    else:
        yield Found("ok", f"role {role} may enqueue, look after jobs, and run them")


def pooler(patient: Patient) -> Iterator[Found]:
    """Whether a LISTEN reaches who asks for it."""
    if _is_direct(patient.conn):
        yield Found("ok", "no pooler stands before the server")
        return
    try:
        shares = _shares_servers(patient.conninfo)
    except psycopg.OperationalError as error:
        yield Found(
            "warning", f"a pooler stands before the server, in a mode that could not be told: {one_line(error)}"
        )
        return
    if not shares:
        yield Found("ok", "a pooler stands before the server, in session mode")
        return
    told = "a pooler gives each transaction another server connection, as PgBouncer does in transaction mode"
    # Where there is that key, and it is set.
    listen_dsn = getattr(patient.settings.database, "listen_dsn", None)
    if listen_dsn is None:
        lost = "no notification gets through, so roostd and wait_for only poll"
        yield Found("warning", f"{told}: {lost}", "name a direct connection in database.listen_dsn")
        return
    try:
        with _connect(make_conninfo(listen_dsn, connect_timeout="5")) as conn:
            direct = _is_direct(conn)
    except psycopg.Error as error:
        yield Found("failure", f"{told}, and database.listen_dsn can't be used: {one_line(error)}", "correct it")
        return
    if direct:
        yield Found("ok", f"{told}; database.listen_dsn leads to the server itself")
    else:
        yield Found("failure", f"{told}, and database.listen_dsn leads to one, too", "name a direct connection there")


def _is_direct(conn: psycopg.Connection[Any]) -> bool:
    return is_direct(conn, conn.execute("SELECT pg_backend_pid()").fetchone())


def _shares_servers(conninfo: str) -> bool:
    """Whether two sessions, both open, are seen on one server connection, or one session on two."""
    with _connect(conninfo, _PROBE_SECONDS) as one, _connect(conninfo, _PROBE_SECONDS) as two:
        seen: tuple[set[int], set[int]] = (set(), set())
        for _ in range(10):
            for conn, pids in zip((one, two), seen, strict=True):
                row = conn.execute("SELECT pg_backend_pid()").fetchone()
                assert row is not None
                pids.add(row[0])
            if seen[0] & seen[1] or len(seen[0]) > 1 or len(seen[1]) > 1:
                return True
    return False


def clocks(patient: Patient) -> Iterator[Found]:
    """How far this host's clock, and those of the workers' hosts, are from the database's."""
    measured = []
    for _ in range(3):
        sent_at = time.time()
        row = patient.conn.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
        received_at = time.time()
        assert row is not None
        measured.append((received_at - sent_at, (sent_at + received_at) / 2 - row[0]))
    hosts = [("this host's clock", min(measured)[1])]
    hosts += [
        (f"the clock of worker {name} on {hostname}", skew)
        for name, hostname, skew in patient.rows(
            "SELECT name, hostname, (metadata ->> 'clock')::float8 - extract(epoch FROM last_seen_at)::float8"
            "  FROM roost.workers WHERE metadata ? 'clock' ORDER BY name, id"
        )
    ]
    wrong = [(host, skew) for host, skew in hosts if abs(skew) > SKEW_SECONDS]
    for host, skew in wrong:
        where = "ahead of" if skew > 0 else "behind"
        harm = "jobs that it schedules are due at another time than it means"
        yield Found("warning", f"{host} is {abs(skew):.0f} s {where} the database's: {harm}", "synchronise it by NTP")
    if not wrong:
        worst = max(abs(skew) for _, skew in hosts)
        yield Found("ok", f"{_count(len(hosts), 'clock')} at most {worst:.1f} s from the database's")


def transactions(patient: Patient) -> Iterator[Found]:
    """What keeps dead rows from being removed."""
    is_fine = True
    for pid, application, role, kind, seconds, xids in patient.rows(
        "SELECT pid, application_name, usename, backend_type,"
        "       extract(epoch FROM clock_timestamp() - xact_start)::float8, age(coalesce(backend_xmin, backend_xid))"
        "  FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND coalesce(backend_xmin, backend_xid) IS NOT NULL"
        "   AND (datname = current_database() OR backend_type = 'walsender')"
        "   AND backend_type <> 'autovacuum worker' AND query NOT ILIKE 'vacuum%%'"
        "   AND (clock_timestamp() - xact_start > make_interval(secs => %s)"
        "        OR xact_start IS NULL AND age(backend_xmin) > %s)"
        " ORDER BY xact_start NULLS FIRST",
        OLD_SECONDS,
        OLD_XIDS,
    ):
        is_fine = False
        who = f"pid {pid} ({application or kind}, role {role})"
        if seconds is None:
            yield Found(
                "warning",
                f"the standby at {who} holds back the removal of rows that died {xids:,} transactions ago",
                "end its long queries, or set hot_standby_feedback to off there",
            )
            continue
        yield Found(
            "failure" if seconds > VERY_OLD_SECONDS else "warning",
            f"{who} has had a transaction open for {_duration(seconds)}: no row that died since can be removed",
            f"SELECT pg_terminate_backend({pid})",
        )
    for gid, owner, seconds in patient.rows(
        "SELECT gid, owner, extract(epoch FROM clock_timestamp() - prepared)::float8 FROM pg_prepared_xacts"
        " WHERE database = current_database() AND clock_timestamp() - prepared > make_interval(secs => %s)"
        " ORDER BY prepared",
        OLD_SECONDS,
    ):
        is_fine = False
        yield Found(
            "failure" if seconds > VERY_OLD_SECONDS else "warning",
            f"prepared transaction {gid!r} of role {owner} has been left for {_duration(seconds)}:"
            " no row that died since can be removed",
            f"ROLLBACK PREPARED {sql.quote(gid)}, or COMMIT PREPARED",
        )
    for name, active, xids in patient.rows(
        "SELECT slot_name, active, age(xmin) FROM pg_replication_slots WHERE age(xmin) > %s ORDER BY 3 DESC", OLD_XIDS
    ):
        is_fine = False
        yield Found(
            "warning",
            f"replication slot {name!r} holds back the removal of rows that died {xids:,} transactions ago",
            "end the long queries of its standby" if active else f"SELECT pg_drop_replication_slot('{name}')",
        )
    ((hidden, role),) = patient.rows(
        "SELECT count(*), current_user FROM pg_stat_activity"
        " WHERE datname = current_database() AND backend_type IS NULL"
    )
    if hidden:
        yield Found(
            "warning",
            f"{_count(hidden, 'session')} of other roles can't be looked into by role {role}",
            f"GRANT pg_read_all_stats TO {role}",
        )
    if is_fine and not hidden:
        yield Found("ok", f"none has been open for more than {_duration(OLD_SECONDS)}")


def idle_in_transaction(patient: Patient) -> Iterator[Found]:
    """Sessions that keep their locks for nothing: the end of a job that one has locked can't be written."""
    found = patient.rows(
        "SELECT pid, application_name, usename, extract(epoch FROM clock_timestamp() - state_change)::float8"
        "  FROM pg_stat_activity"
        " WHERE datname = current_database() AND state LIKE 'idle in transaction%%'"
        "   AND clock_timestamp() - state_change > make_interval(secs => %s)"
        " ORDER BY state_change",
        IDLE_SECONDS,
    )
    for pid, application, role, seconds in found:
        yield Found(
            "warning",
            f"pid {pid} ({application or 'unnamed'}, role {role}) has been idle in a transaction for"
            f" {_duration(seconds)}, and keeps its locks",
            f"have it commit; or SELECT pg_terminate_backend({pid})",
        )
    if not found:
        yield Found("ok", f"no session has been so for more than {_duration(IDLE_SECONDS)}")


def vacuum(patient: Patient) -> Iterator[Found]:
    """Whether dead rows are removed from the tables that change most."""
    is_fine = True
    for name, setting in patient.rows(
        "SELECT name, setting FROM pg_settings WHERE name IN ('autovacuum', 'track_counts') AND setting = 'off'"
    ):
        is_fine = False
        yield Found("failure", f"{name} is {setting}: dead rows are never removed", f"ALTER SYSTEM SET {name} = on")
    for table, dead, live, at, disabled in patient.rows(
        "SELECT s.relname, s.n_dead_tup, s.n_live_tup, to_char(s.last_autovacuum AT TIME ZONE 'UTC',"
        '       \'YYYY-MM-DD"T"HH24:MI:SS"Z"\'),'
        "       EXISTS (SELECT 1 FROM pg_options_to_table(c.reloptions) AS o"
        "                WHERE o.option_name = 'autovacuum_enabled' AND o.option_value IN ('false', 'off', 'no', '0'))"
        "  FROM pg_stat_user_tables s"
        "  JOIN pg_class c ON c.oid = s.relid"
        " WHERE s.schemaname = 'roost' ORDER BY s.relname"
    ):
        if disabled:
            is_fine = False
            yield Found(
                "failure",
                f"autovacuum is off for roost.{table}: its dead rows are never removed",
                f"ALTER TABLE roost.{table} RESET (autovacuum_enabled)",
            )
        if dead > DEAD_ROWS and dead > DEAD_SHARE * live:
            is_fine = False
            yield Found(
                "warning",
                f"roost.{table} has {dead:,} dead rows beside {live:,}; autovacuum was there"
                f" {f'at {at}' if at else 'never'}",
                f"VACUUM roost.{table}; if they stay, see the check of transactions",
            )
    if is_fine:
        yield Found("ok", "autovacuum is on, and keeps up with roost's tables")


def connections(patient: Patient) -> Iterator[Found]:
    """Whether there are enough for the workers."""
    ((most, reserved, used, workers, of_role, of_database),) = patient.rows(
        "SELECT current_setting('max_connections')::integer,"
        "       current_setting('superuser_reserved_connections')::integer"
        "       + coalesce(current_setting('reserved_connections', true)::integer, 0),"
        "       (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL),"
        "       (SELECT count(*) FROM roost.workers"
        "         WHERE last_seen_at > now() - make_interval(secs => %s)),"
        "       (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user AND NOT rolsuper),"
        "       (SELECT datconnlimit FROM pg_database WHERE datname = current_database())",
        patient.settings.worker.orphan_stale_after,
    )
    budget, needed = most - reserved, workers * WORKER_CONNECTIONS
    for limit, whose in ((of_role, "its role"), (of_database, "this database")):
        if limit is not None and 0 <= limit < budget:
            budget = limit
            yield Found("ok", f"{whose} may have {limit} connections at once")
    told = f"{used} of {budget} are in use; {_count(workers, 'worker')} may need {needed}"
    if needed > budget:
        yield Found("failure", f"{told}: too many", "raise max_connections, or have fewer workers")
    elif used > 0.9 * budget or budget - used < WORKER_CONNECTIONS:
        yield Found("warning", f"{told}: one more worker may find none", "raise max_connections, or pool applications'")
    else:
        yield Found("ok", told)


@dataclass(frozen=True, slots=True)
class _Worker:
    name: str
    hostname: str
    queues: list[str]
    silent_seconds: float
    state: str | None
    tasks: list[str] | None


def _workers(patient: Patient) -> tuple[list[_Worker], list[_Worker]]:
    """Those that live, and those that don't."""
    found = [
        _Worker(*row)
        for row in patient.rows(
            "SELECT name, hostname, queues, extract(epoch FROM now() - last_seen_at)::float8, metadata ->> 'state',"
            "       CASE jsonb_typeof(metadata -> 'tasks')"
            "            WHEN 'array' THEN ARRAY(SELECT jsonb_array_elements_text(metadata -> 'tasks')) END"
            "  FROM roost.workers ORDER BY started_at, id"
        )
    ]
    stale_after = patient.settings.worker.orphan_stale_after
    live = [worker for worker in found if worker.silent_seconds <= stale_after]
    return live, [worker for worker in found if worker not in live]


def workers(patient: Patient) -> Iterator[Found]:
    """Who runs jobs, and who should have."""
    live, stale = _workers(patient)
    for worker in stale:
        yield Found(
            "warning",
            f"worker {worker.name} on {worker.hostname} was last heard of {_duration(worker.silent_seconds)} ago;"
            f" {'the others free its jobs' if live else 'nobody is there to free its jobs'}",
            "start roostd there again",
        )
    if live:
        hosts = len({worker.hostname for worker in live})
        draining = sum(1 for worker in live if worker.state == "draining")
        told = f"{_count(len(live), 'worker')} on {_count(hosts, 'host')}"
        yield Found("ok", told + (f", {draining} of them about to end" if draining else ""))
    else:
        yield Found("warning", "no live worker: nothing runs", "roostd -c /etc/roost.toml")


def queues(patient: Patient) -> Iterator[Found]:
    """Queues that have due jobs which nobody may start."""
    able = [worker for worker in _workers(patient)[0] if worker.state != "draining"]
    served = {queue for worker in able for queue in worker.queues}
    paused = {name for (name,) in patient.rows("SELECT name FROM roost.queues WHERE paused")}
    due = _due(patient)
    is_fine = True
    for queue, (count, seconds) in due.items():
        has = f"queue {queue!r} has {_bounded_count(count)}, the oldest for {_duration(seconds)},"
        if queue not in served:
            is_fine = False
            nearest = _nearest(queue, served)
            yield Found(
                "failure",
                f"{has} and no live worker serves it" + (f"; did you mean {nearest!r}?" if nearest else ""),
                f"add it to the queues of a pool, then {_reload(able)}" if able else "roostd -c /etc/roost.toml",
            )
        elif queue in paused:
            is_fine = False
            yield Found("warning", f"{has} and is paused", resume_command(queue))
    if is_fine:
        yield Found("ok", f"{_count(len(due), 'queue')} with due jobs" + (", all served" if due else ""))


def _due(patient: Patient) -> dict[str, tuple[int, float]]:
    """Of each queue that has due jobs, how many (more than MOST_ROWS: many), and for how long the oldest of these."""
    found: dict[str, tuple[int, float]] = {}
    for statement in (_READY, _THROTTLED, _LATE):
        for queue, count, seconds, *_ in patient.rows(statement):
            before, longest = found.get(queue, (0, 0.0))
            found[queue] = (before + count, max(longest, seconds))
    return dict(sorted(found.items()))


# From one queue to the next by the index, so that it doesn't matter how many jobs each has.
_READY: LiteralString = f"""\
WITH RECURSIVE q AS (
    (SELECT r.queue, 1 AS number FROM roost.ready r ORDER BY r.queue LIMIT 1)
    UNION ALL
    SELECT n.queue, q.number + 1
      FROM q
     CROSS JOIN LATERAL (SELECT r.queue FROM roost.ready r WHERE r.queue > q.queue ORDER BY r.queue LIMIT 1) AS n
     WHERE q.number < {MOST_QUEUES}
)
SELECT q.queue, c.jobs, extract(epoch FROM now() - c.first_at)::float8
  FROM q
 CROSS JOIN LATERAL (
       SELECT count(*) AS jobs, min(r.scheduled_at) AS first_at
         FROM (SELECT r.scheduled_at FROM roost.ready r WHERE r.queue = q.queue
                ORDER BY r.priority, r.scheduled_at, r.job_id LIMIT {MOST_ROWS} + 1) AS r) AS c"""
_THROTTLED: LiteralString = f"""\
WITH RECURSIVE q AS (
    (SELECT r.task, r.queue, 1 AS number FROM roost.throttled r ORDER BY r.task, r.queue LIMIT 1)
    UNION ALL
    SELECT n.task, n.queue, q.number + 1
      FROM q
     CROSS JOIN LATERAL (SELECT r.task, r.queue FROM roost.throttled r
                          WHERE (r.task, r.queue) > (q.task, q.queue) ORDER BY r.task, r.queue LIMIT 1) AS n
     WHERE q.number < {MOST_QUEUES}
)
SELECT q.queue, c.jobs, extract(epoch FROM now() - c.first_at)::float8, q.task
  FROM q
 CROSS JOIN LATERAL (
       SELECT count(*) AS jobs, min(r.scheduled_at) AS first_at
         FROM (SELECT r.scheduled_at FROM roost.throttled r WHERE r.task = q.task AND r.queue = q.queue
                ORDER BY r.priority, r.scheduled_at, r.job_id LIMIT {MOST_ROWS} + 1) AS r) AS c"""
_LATE: LiteralString = f"""\
SELECT late.queue, count(*), extract(epoch FROM now() - min(late.scheduled_at))::float8
  FROM (SELECT s.queue, s.scheduled_at FROM roost.scheduled s
         WHERE s.scheduled_at <= now() ORDER BY s.scheduled_at LIMIT {MOST_ROWS} + 1) AS late
 GROUP BY late.queue"""


def tasks(patient: Patient) -> Iterator[Found]:
    """Tasks that have jobs and that no worker has a handler for, as far as a look at some jobs of each queue shows."""
    live, _ = _workers(patient)
    known: dict[str, set[str]] = {}
    silent: set[str] = set()  # queues of which a worker doesn't say what it knows
    for worker in live:
        for queue in worker.queues:
            if worker.tasks is None:
                silent.add(queue)
            known.setdefault(queue, set()).update(worker.tasks or ())
    waiting = patient.rows(_TASKS, sorted(known)[:MOST_QUEUES])
    waiting += [(queue, task, count) for queue, count, _, task in patient.rows(_THROTTLED)]
    unknown: dict[tuple[str, str], int] = {}
    for queue, task, count in waiting:
        if queue in known and queue not in silent and task not in known[queue]:
            unknown[queue, task] = unknown.get((queue, task), 0) + count
    for (queue, task), count in sorted(unknown.items()):
        nearest = _nearest(task, known[queue])
        yield Found(
            "failure",
            f"no worker of queue {queue!r} has a handler for task {task!r}, of which at least"
            f" {_count(count, 'job')} {'waits' if count == 1 else 'wait'}"
            + (f"; did you mean {nearest!r}?" if nearest else ""),
            f"add its module to handlers.modules, then {_reload([w for w in live if queue in w.queues])}",
        )
    if not unknown:
        yield Found("ok", f"of the first {SAMPLE:,} jobs of each queue all have a handler")


# What may run now, and what runs next: what no worker knows has mostly failed, and waits for its next attempt.
_TASKS: LiteralString = f"""\
SELECT first.queue, j.task, count(*)
  FROM ((SELECT q.name AS queue, r.job_id
           FROM unnest(%s::text[]) AS q(name)
          CROSS JOIN LATERAL (SELECT r.job_id FROM roost.ready r WHERE r.queue = q.name COLLATE "C"
                               ORDER BY r.priority, r.scheduled_at, r.job_id LIMIT {SAMPLE}) AS r
          LIMIT {MOST_ROWS})
        UNION ALL
        (SELECT s.queue, s.job_id FROM roost.scheduled s ORDER BY s.scheduled_at, s.job_id LIMIT {SAMPLE})) AS first
 CROSS JOIN LATERAL (SELECT j.task FROM roost.job_rows j WHERE j.id = first.job_id LIMIT 1) AS j
 GROUP BY first.queue, j.task"""

CHECKS: tuple[tuple[str, Callable[[Patient], Iterator[Found]]], ...] = (
    ("database", database),
    ("server", server),
    ("schema", schema_version),
    ("rights", rights),
    ("pooler", pooler),
    ("clocks", clocks),
    ("transactions", transactions),
    ("idle", idle_in_transaction),
    ("vacuum", vacuum),
    ("connections", connections),
    ("workers", workers),
    ("queues", queues),
    ("tasks", tasks),
)


# -- the command


@command("doctor")
def doctor(invocation: Invocation) -> int:
    """Check all that the queue depends on, and say what to do.

    Exit status: 0 where nothing fails (there may be warnings), 1 where anything does, 69 without a database.
    """
    settings = invocation.settings()
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not invocation.json:
            _show(finding)

    code = 0
    try:
        patient = Patient(invocation.conninfo(), settings)
        try:
            for name, check in CHECKS:
                for finding in _examine(name, check, patient):
                    tell(finding)
        finally:
            patient.conn.close()
    except (psycopg.OperationalError, Failure) as error:
        tell(Finding("database", "failure", one_line(error), "start it, or correct the DSN"))
        code = EXIT_UNAVAILABLE
    if invocation.json:
        print_json(findings)
    return code or (EXIT_NOTHING if any(finding.verdict == "failure" for finding in findings) else 0)


COMMANDS = (doctor,)


def _examine(name: str, check: Callable[[Patient], Iterator[Found]], patient: Patient) -> list[Finding]:
    """What a check finds; that it could not be made is a finding, too. Raises OperationalError without a database."""
    try:
        found = list(check(patient))
    except psycopg.errors.InsufficientPrivilege as error:
        found = [Found("warning", f"this role may not look: {_first_line(error)}", "see docs/privileges.md")]
    except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
        found = [Found("warning", f"it could not be told within {_STATEMENT_SECONDS:g} s")]
    except psycopg.Error as error:
        if error.sqlstate is None or patient.conn.closed:
            raise
        found = [Found("warning", f"it could not be told: {_first_line(error)}")]
    more = len(found) - SHOWN
    if more > 1:
        worst: Verdict = "failure" if any(each.verdict == "failure" for each in found[SHOWN:]) else "warning"
        found[SHOWN:] = [Found(worst, f"and {more} more of the kind")]
    return [Finding(name, *each) for each in found]


def _show(finding: Finding) -> None:
    verdict = finding.verdict.ljust(8)
    if sys.stdout.isatty():
        verdict = click.style(verdict, {"ok": "green", "warning": "yellow", "failure": "red"}[finding.verdict])
    click.echo(f"{verdict} {finding.check.ljust(12)}  {printable(finding.found)}")
    if finding.fix:
        click.echo(f"{'':21}  → {printable(finding.fix)}")


class _Connection(psycopg.Connection[Any]):
    """One that gives up where no answer comes: a pooler may have no server connection, or a network may be gone."""

    answer_seconds = _ANSWER_SECONDS

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        return super().wait(self._bounded(gen), 0.1)

    def _bounded(self, gen: PQGen[T]) -> PQGen[T]:
        ends_at = time.monotonic() + self.answer_seconds
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > ends_at:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"no answer within {self.answer_seconds:g} s")
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def _connect(conninfo: str, answer_seconds: float = _ANSWER_SECONDS) -> _Connection:
    conn = _Connection.connect(conninfo, autocommit=True, prepare_threshold=None)
    conn.answer_seconds = answer_seconds
    return conn


def _reload(meant: list[_Worker]) -> str:
    names = dict.fromkeys(worker.name for worker in meant)
    return " ".join(["roostctl reload", *(f"--worker {shlex.quote(name)}" for name in names)])


def _nearest(name: str, names: set[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(names), 1, 0.6)), None)


def _names(texts: Iterable[str]) -> str:
    named = list(texts)
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")


def _bounded_count(count: int) -> str:
    return f"more than {MOST_ROWS:,} due jobs" if count > MOST_ROWS else _count(count, "due job")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _first_line(error: psycopg.Error) -> str:
    return str(error).partition("\n")[0]
