"""Which jobs a filter finds, whatever way it takes to them; and that the way does not lead past all the others."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roost_client import InvalidJobError, JobState, Roost, statements
from roost_client.statements import JobFilter
from roostd.embedded import EmbeddedPostgres

Conn = psycopg.Connection[Any]
HOUR = timedelta(hours=1)

# Each state in all the ways in which a job can be in it; claims and the narrow tables are filled from `place`.
_FILL = """
WITH job AS (
    INSERT INTO roost.job_rows (queue, task, state, inserted_at, scheduled_at, completed_at, cancelled_at, discarded_at,
                                tags, errors)
    SELECT k.queue, k.task, k.state, now() - k.hours * interval '1 hour', now() - k.hours * interval '1 hour',
           CASE k.state WHEN 'completed' THEN now() END, CASE k.state WHEN 'cancelled' THEN now() END,
           CASE k.state WHEN 'discarded' THEN now() END, k.tags, k.errors
      FROM jsonb_to_recordset(%s::jsonb)
           AS k(queue text, task text, state text, hours float8, tags text[], errors jsonb, place text)
    RETURNING *
), place AS (
    SELECT j.*, k.fields ->> 'place' AS place
      FROM (SELECT job.*, row_number() OVER (ORDER BY job.id) AS number FROM job) AS j
      JOIN jsonb_array_elements(%s::jsonb) WITH ORDINALITY AS k(fields, number) ON k.number = j.number
), claims AS (
    INSERT INTO roost.claims (job_id, lease, worker_id, attempt)
    SELECT id, id, gen_random_uuid(), 1 FROM place WHERE place = 'claims'
), ready AS (
    INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
    SELECT queue, priority, scheduled_at, id FROM place WHERE place = 'ready'
), scheduled AS (
    INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)
    SELECT scheduled_at, id, priority, queue FROM place WHERE place = 'scheduled'
), blocked AS (
    INSERT INTO roost.blocked (job_id, parents_left, queue)
    SELECT id, 1, queue FROM place WHERE place = 'blocked'
)
INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id)
SELECT task, queue, priority, scheduled_at, id FROM place WHERE place = 'throttled'
"""


def fill(conn: Conn, jobs: list[dict[str, Any]]) -> None:
    text = json.dumps(jobs)
    conn.execute(_FILL, (text, text))


def any_job(chance: random.Random) -> dict[str, Any]:
    state = chance.choice(["available", "retryable", "completed", "completed", "discarded", "cancelled"])
    waits = state in ("available", "retryable")
    error = chance.choice(["ConnectionError: refused", "KeyError: 'Straße'"])
    fails = state in ("retryable", "discarded") or chance.random() < 0.1
    return {
        "queue": chance.choice(["default", "default", "emails", "rare"]),
        "task": chance.choice(["send", "resize"]),
        "state": state,
        "hours": chance.choice([0.5, 5, 50, 500]),  # in no order: every transaction was open for as long as it liked
        "tags": chance.choice([None, None, ["a"], ["a", "b"], ["c"]]),
        "errors": [{"error": "first"}, {"error": error}] if fails else None,
        "place": chance.choice(["ready", "scheduled", "blocked", "throttled", "claims"]) if waits else None,
    }


FILTERS: list[dict[str, Any]] = [
    {},
    {"queue": "emails"},
    {"task": "resize", "queue": "rare"},
    {"tag": "a"},
    {"tag": "b", "task": "send"},
    {"older_than": HOUR},
    {"newer_than": HOUR},
    {"older_than": HOUR, "newer_than": 100 * HOUR},
    {"older_than": 1000 * HOUR},
    {"error": "REFUSED"},
    {"error": "straß", "queue": "default"},
    {"error": "first"},  # not of the newest error
    {"error": "%"},
    {"newer_than": 10 * HOUR, "error": "error", "tag": "a"},
]
STATES: list[str | list[str] | None] = [None, *(state.value for state in JobState)]
STATES += [["available", "retryable"], ["discarded", "cancelled", "executing"], [state.value for state in JobState]]


def matches(job: dict[str, Any], filters: dict[str, Any], states: Any) -> bool:
    state = "executing" if job["place"] == "claims" else job["state"]
    age = job["hours"] * HOUR
    error = job["errors"][-1]["error"].lower() if job["errors"] else ""
    return (
        (states is None or state in ([states] if isinstance(states, str) else states))
        and filters.get("queue") in (None, job["queue"])
        and filters.get("task") in (None, job["task"])
        and ("tag" not in filters or filters["tag"] in (job["tags"] or []))
        and ("older_than" not in filters or age > filters["older_than"])
        and ("newer_than" not in filters or age <= filters["newer_than"])
        and ("error" not in filters or filters["error"].lower() in error)
    )


@pytest.mark.parametrize("few", [True, False], ids=["few wait", "many wait"])
def test_every_filter_finds_what_it_says_and_nothing_else(
    roost: Roost, observer: Conn, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not few:
        monkeypatch.setattr(statements, "_MANY", "3")
    chance = random.Random(7)
    jobs = [any_job(chance) for _ in range(400)]
    fill(observer, jobs)
    everywhere = roost.list_jobs(limit=1000)
    assert [job.id for job in everywhere] == list(range(400, 0, -1))
    for filters, states in itertools.product(FILTERS, STATES):
        expected = [n for n in range(400, 0, -1) if matches(jobs[n - 1], filters, states)]
        found = roost.list_jobs(state=states, limit=1000, **filters)
        assert [job.id for job in found] == expected, (filters, states)
        assert states is None or {job.state for job in found} <= set([states] if isinstance(states, str) else states)
        if states == "discarded":
            assert roost.count_discarded(**filters) == len(expected), filters
        pages: list[int] = []
        before = None
        while page := roost.list_jobs(state=states, before_id=before, limit=150, **filters):
            pages += [job.id for job in page]
            before = pages[-1]
        assert pages == expected, (filters, states)


def test_both_clients_take_every_filter(client: Roost, observer: Conn) -> None:
    fill(observer, [any_job(random.Random(n)) for n in range(50)])
    filters: dict[str, Any] = {
        "queue": "default", "task": "send", "tag": "a", "older_than": HOUR, "newer_than": 100 * HOUR, "error": "error",
    }  # fmt: skip
    everything = client.list_jobs(state=("discarded", "completed"))
    assert everything
    assert len(client.list_jobs(state=("discarded", "completed"), **filters)) < len(everything)
    client.count_discarded(**filters)
    client.requeue_discarded(**filters)


def test_ages_are_by_the_database_and_hold_for_jobs_whose_transaction_was_open_long(
    client: Roost, observer: Conn
) -> None:
    """Their ids say later, or their times earlier, than those around them."""
    hours = [9, 8, 7, 3, 3, 0.1, 3, 0.1, 9, 0.1]
    job = {"queue": "default", "task": "a", "state": "completed", "tags": None, "errors": None, "place": None}
    fill(observer, [{**job, "hours": each} for each in hours])
    for limit in (HOUR, 4 * HOUR, 8.5 * HOUR, 10 * HOUR):
        older = [n + 1 for n, each in enumerate(hours) if each * HOUR > limit][::-1]
        newer = [n + 1 for n, each in enumerate(hours) if each * HOUR <= limit][::-1]
        assert [job.id for job in client.list_jobs(older_than=limit)] == older
        assert [job.id for job in client.list_jobs(newer_than=limit)] == newer
    assert [job.id for job in client.list_jobs(older_than=HOUR, newer_than=8 * HOUR, limit=2)] == [7, 5]


def test_ids_at_the_ends_of_a_bigint_are_found_by_age(client: Roost, observer: Conn) -> None:
    observer.execute(
        "INSERT INTO roost.job_rows (id, task, state, completed_at, inserted_at) VALUES"
        " (%s, 'a', 'completed', now(), now() - interval '2 h'), (0, 'a', 'completed', now(), now() - interval '1 h'),"
        " (%s, 'a', 'completed', now(), now())",
        (-(2**63), 2**63 - 1),
    )
    assert [job.id for job in client.list_jobs(older_than=timedelta(minutes=90))] == [-(2**63)]
    assert [job.id for job in client.list_jobs(newer_than=timedelta(minutes=90))] == [2**63 - 1, 0]
    assert [job.id for job in client.list_jobs(newer_than=timedelta(minutes=1))] == [2**63 - 1]
    assert client.list_jobs(newer_than=timedelta(0)) == []


def test_archived_jobs_are_listed_where_they_are_asked_for_and_only_there(client: Roost, observer: Conn) -> None:
    ids = [client.enqueue("a", queue=queue, tags=["t"]) for queue in ("default", "emails")]
    for job_id in ids:
        client.cancel(job_id)
    observer.execute(
        "WITH moved AS (DELETE FROM roost.job_rows RETURNING *) INSERT INTO roost.jobs_archive"
        " SELECT id, scheduled_at, inserted_at, attempted_at, completed_at, cancelled_at, discarded_at, now(),"
        " priority, attempt, max_attempts, crashes, timeout_seconds, cancel_requested, state, queue, task, args,"
        " unique_key, tags, '{}', '{}', '[{\"error\": \"E: one\"}]', result FROM moved"
    )
    living = client.enqueue("a")
    assert [job.id for job in client.list_jobs()] == [living]
    assert [job.id for job in client.list_jobs(archived=True)] == ids[::-1]
    one: list[dict[str, Any]] = [{"queue": "emails"}, {"before_id": ids[1]}, {"limit": 1}]
    for filters in one:
        assert len(client.list_jobs(archived=True, **filters)) == 1
    both: dict[str, Any] = {"tag": "t", "error": "ONE", "state": ["cancelled", "completed"], "newer_than": HOUR}
    assert len(client.list_jobs(archived=True, **both)) == 2
    assert client.list_jobs(archived=True, older_than=HOUR) == client.list_jobs(archived=True, state="discarded") == []
    with pytest.raises(InvalidJobError, match="no other job is there"):
        client.list_jobs(archived=True, state=["cancelled", "executing"])


@pytest.mark.parametrize(
    ("path", "keywords"),
    [
        ("state", {"state": []}),
        ("state", {"state": ["discarded", "done"]}),
        ("tag", {"tag": 3}),
        ("tag", {"tag": "\0"}),
        ("error", {"error": ""}),
        ("error", {"error": "\ud800"}),
        ("older_than", {"older_than": 60}),
        ("older_than", {"older_than": timedelta(seconds=-1)}),
        ("newer_than", {"newer_than": timedelta.max}),
        ("newer_than", {"newer_than": HOUR, "older_than": HOUR}),
    ],
)
def test_a_bad_filter_is_refused_by_name(path: str, keywords: dict[str, Any]) -> None:
    nowhere = Roost("host=/nonexistent")
    with pytest.raises(InvalidJobError, match="cannot list jobs: ") as refused:
        nowhere.list_jobs(**keywords)
    assert refused.value.path == path
    if "state" not in keywords:
        for operation in (nowhere.count_discarded, nowhere.requeue_discarded):
            with pytest.raises(InvalidJobError) as refused:
                operation(**keywords)
            assert refused.value.path == path


# -- the plans


JOBS = 60_000  # of 60 days, one and a half minutes apart
OLD = 500  # of the oldest jobs, one of each kind that is looked for
MOST = 8_000  # rows that any step of a plan may have in its hands: some parts of an index of ranges


@pytest.fixture(scope="module")
def finished(postgres: EmbeddedPostgres, template: str) -> Iterator[Conn]:
    """A database of jobs that have nearly all been completed, but for one of every other kind, long ago."""
    with psycopg.connect(postgres.dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE finished TEMPLATE {}").format(sql.Identifier(template)))
    with psycopg.connect(make_conninfo(postgres.dsn, dbname="finished"), autocommit=True) as conn:
        conn.execute(
            "INSERT INTO roost.job_rows (task, queue, state, completed_at, inserted_at, args)"
            " SELECT 'noop', 'default', 'completed', now(), now() - interval '60 days' * (1 - n::float8 / %(jobs)s),"
            " jsonb_build_object('filler', repeat('x', 100))"
            " FROM generate_series(1, %(jobs)s) AS n",
            {"jobs": JOBS},
        )
        for number, change in enumerate(
            (
                "state = 'discarded', completed_at = NULL, discarded_at = now(), errors = '[{\"error\": \"E: one\"}]'",
                "state = 'cancelled', completed_at = NULL, cancelled_at = now()",
                "state = 'available', completed_at = NULL",
                "state = 'available', completed_at = NULL, attempt = 1",
                "state = 'retryable', completed_at = NULL, errors = '[{\"error\": \"E: two\"}]'",
                "queue = 'rare'",
                "task = 'rare'",
            )
        ):
            conn.execute(f"UPDATE roost.job_rows SET {change} WHERE id = {OLD + number}")
        conn.execute(
            "INSERT INTO roost.ready SELECT queue, priority, scheduled_at, id FROM roost.job_rows WHERE id = %s",
            (OLD + 2,),
        )
        conn.execute("INSERT INTO roost.claims VALUES (%s, 1, gen_random_uuid(), now(), 1)", (OLD + 3,))
        conn.execute(
            "INSERT INTO roost.scheduled SELECT scheduled_at, id, priority, queue FROM roost.job_rows WHERE id = %s",
            (OLD + 4,),
        )
        conn.execute("VACUUM (ANALYZE) roost.job_rows, roost.ready, roost.scheduled, roost.claims")
        yield conn
    with psycopg.connect(postgres.dsn, autocommit=True) as admin:
        admin.execute("DROP DATABASE finished WITH (FORCE)")


@pytest.mark.parametrize(
    ("state", "filters", "number"),
    [
        ("discarded", {}, 0),
        (None, {"error": "e: ONE"}, 0),
        ("discarded", {"error": "nothing"}, None),
        ("cancelled", {}, 1),
        ("available", {}, 2),
        ("executing", {}, 3),
        ("retryable", {}, 4),
        (None, {"queue": "rare"}, 5),
        (None, {"task": "rare"}, 6),
        (None, {"task": "nobody", "queue": "nobody"}, None),
        (["discarded", "available", "executing"], {"queue": "nobody"}, None),
        (None, {"newer_than": timedelta(days=2), "tag": "nobody"}, None),
        ("completed", {"newer_than": timedelta(days=2), "task": "nobody"}, None),
        (None, {"older_than": timedelta(days=58), "newer_than": timedelta(days=59), "tag": "nobody"}, None),
    ],
)
def test_the_way_to_a_job_does_not_lead_past_all_that_have_finished(
    finished: Conn, state: Any, filters: dict[str, Any], number: int | None
) -> None:
    statement = statements.list_jobs(JobFilter(**filters), state, False, None, 50)
    found = [job.id for job in statement.read(finished.execute(statement.sql, statement.parameters).fetchall())]
    assert found == ([] if number is None else [OLD + number])
    assert_bounded(finished, statement)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"queue": "default"},
        {"task": "noop"},
        {"older_than": timedelta(days=50)},
        {"older_than": HOUR},
        {"newer_than": timedelta(days=50)},
        {"newer_than": timedelta(days=50), "older_than": timedelta(days=40), "queue": "default"},
    ],
)
def test_what_many_jobs_are_is_found_at_the_newest_of_them(finished: Conn, filters: dict[str, Any]) -> None:
    statement = statements.list_jobs(JobFilter(**filters), None, False, None, 50)
    assert len(finished.execute(statement.sql, statement.parameters).fetchall()) == 50
    assert_bounded(finished, statement)


@pytest.mark.parametrize("before", [True, False])
def test_jobs_on_the_other_side_of_a_time_are_found_where_they_are(finished: Conn, before: bool) -> None:
    time, border = "now() - interval '30 days'", f"{JOBS // 2}"
    condition = f"id + 0 {'>=' if before else '<'} {border} AND inserted_at {'<' if before else '>='} {time}"
    statement: Any = f"SELECT id FROM roost.job_rows WHERE {condition}"  # as roost.strays has it
    assert_bounded(finished, statements.Statement("", statement, (), list))


def test_a_requeue_finds_discarded_jobs_without_reading_the_others(finished: Conn) -> None:
    for which in (JobFilter(), JobFilter(error="two"), JobFilter(older_than=HOUR)):
        assert_bounded(finished, statements.count_discarded(which))
        with finished.transaction(force_rollback=True):
            assert_bounded(finished, statements.requeue_batch(which, 0, 1000))


def assert_bounded(conn: Conn, statement: statements.Statement[Any]) -> None:
    explain: Any = f"EXPLAIN (ANALYZE, TIMING off, FORMAT json) {statement.sql}"
    row = conn.execute(explain, statement.parameters).fetchone()
    assert row is not None
    pending = [row[0][0]["Plan"]]
    while pending:
        node = pending.pop()
        pending += node.get("Plans", [])
        removed = sum(value for key, value in node.items() if key.startswith("Rows Removed"))
        rows = (node["Actual Rows"] + removed) * node["Actual Loops"]
        assert rows <= MOST, f"{rows} rows: {json.dumps(row[0][0]['Plan'], indent=1)}"
