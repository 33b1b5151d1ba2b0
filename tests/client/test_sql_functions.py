"""The functions that any language may call: the same checks as the client's, and the races of cancel and retry."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roost_client import JobState, Roost
from roostd.embedded import EmbeddedPostgres

Jobs = Callable[[], list[dict[str, Any]]]
Conn = psycopg.Connection[Any]
Notified = Callable[[Conn], list[tuple[str, str]]]


def test_plain_sql_enqueues_with_the_same_defaults_as_the_client(roost: Roost, observer: Conn, jobs: Jobs) -> None:
    observer.execute("SELECT roost.enqueue('a')")
    observer.execute("SELECT roost.enqueue(task => 'a')")
    roost.enqueue("a")
    varying = ("id", "inserted_at", "scheduled_at")
    one, two, three = [{k: v for k, v in row.items() if k not in varying} for row in jobs()]
    assert one == two == three


def test_plain_sql_stores_every_field(observer: Conn, jobs: Jobs) -> None:
    observer.execute(
        """SELECT roost.enqueue(task => 'send_receipt', args => '{"order": 1}', queue => 'emails', priority => 3,
        max_attempts => 5, scheduled_at => '2040-01-01 00:00:00+02', tags => '{a,b}', timeout_seconds => 30,
        metadata => '{"trace": "x"}', depends_on => '{}')"""
    )
    (row,) = jobs()
    assert (row["task"], row["args"], row["queue"], row["priority"]) == ("send_receipt", {"order": 1}, "emails", 3)
    assert (row["max_attempts"], row["tags"], row["timeout_seconds"]) == (5, ["a", "b"], 30)
    assert row["metadata"] == {"trace": "x"}
    assert row["scheduled_at"] == datetime(2039, 12, 31, 22, tzinfo=UTC)


@pytest.mark.parametrize(
    "arguments",
    [
        "''",
        "NULL",
        "repeat('x', 129)",
        "'a', queue => ''",
        "'a', queue => repeat('é', 129)",
        "'a', queue => NULL",
        "'a', args => '[1]'",
        "'a', args => 'null'",
        "'a', args => NULL",
        "'a', args => jsonb_build_object('s', repeat('x', 1048568))",
        "'a', args => ('{\"n\": [' || repeat('1e5000,', 300) || '1]}')::jsonb",
        "'a', priority => NULL",
        "'a', max_attempts => 0",
        "'a', max_attempts => NULL",
        "'a', timeout_seconds => 0",
        "'a', scheduled_at => 'infinity'",
        "'a', scheduled_at => '-infinity'",
        "'a', scheduled_at => '10000-01-01'",
        "'a', scheduled_at => '0001-01-01 BC'",
        "'a', tags => '{a,NULL}'",
        "'a', metadata => '3'",
        "'a', metadata => jsonb_build_object('s', repeat('x', 1048568))",
        "'a', unique_key => ''",
        "'a', unique_key => repeat('x', 513)",
        "'a', unique_key => 'k', on_duplicate => 'no'",
        "'a', unique_key => 'k', on_duplicate => NULL",
        "'a', on_duplicate => 'return'",
        "'a', depends_on => '{NULL}'",
        "'a', depends_on => '{1}'",
    ],
)
def test_plain_sql_is_held_to_the_same_checks(shared: Conn, arguments: str) -> None:
    with pytest.raises(
        (psycopg.errors.InvalidParameterValue, psycopg.errors.ForeignKeyViolation), match="cannot enqueue"
    ):
        shared.execute(sql.SQL("SELECT roost.enqueue({})").format(sql.SQL(arguments)))
    count = shared.execute("SELECT count(*) FROM roost.job_rows").fetchone()
    assert count == (0,)


@pytest.fixture(scope="module")
def shared(postgres: EmbeddedPostgres, template: str) -> Iterator[Conn]:
    """One for all refusals: nothing is ever stored."""
    with psycopg.connect(postgres.dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE refusals TEMPLATE {}").format(sql.Identifier(template)))
        with psycopg.connect(make_conninfo(postgres.dsn, dbname="refusals"), autocommit=True) as connection:
            yield connection
        admin.execute("DROP DATABASE refusals WITH (FORCE)")


def test_arguments_at_the_limit_are_taken_from_plain_sql(observer: Conn, jobs: Jobs) -> None:
    observer.execute("SELECT roost.enqueue('a', jsonb_build_object('s', repeat('x', 1048567)))")
    assert len(jobs()[0]["args"]["s"]) == 1048567


def test_a_trigger_may_enqueue(observer: Conn, jobs: Jobs) -> None:
    observer.execute("CREATE TABLE orders (id integer)")
    observer.execute(
        """CREATE FUNCTION enqueue_receipt() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM roost.enqueue('send_receipt', args => jsonb_build_object('order', NEW.id));
            RETURN NEW;
        END $$"""
    )
    observer.execute("CREATE TRIGGER t AFTER INSERT ON orders FOR EACH ROW EXECUTE FUNCTION enqueue_receipt()")
    observer.execute("INSERT INTO orders VALUES (1), (2)")
    assert [row["args"] for row in jobs()] == [{"order": 1}, {"order": 2}]


def test_names_of_columns_and_parameters_do_not_meet(observer: Conn, jobs: Jobs) -> None:
    observer.execute("SELECT roost.enqueue('task', queue => 'queue', tags => '{tags}')")
    assert (jobs()[0]["task"], jobs()[0]["queue"]) == ("task", "queue")


# Only who waits is told


def test_a_notification_is_sent_only_for_a_queue_that_somebody_waits_on(
    roost: Roost, observer: Conn, dsn: str, notified: Notified
) -> None:
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN roost_inserted")
        roost.enqueue("a")
        assert notified(listener) == []
        observer.execute(
            "INSERT INTO roost.idle_workers VALUES (gen_random_uuid(), true, '{default,emails}'),"
            " (gen_random_uuid(), false, '{busy}')"
        )
        roost.enqueue("a")
        roost.enqueue("a", queue="busy")
        roost.enqueue("a", queue="other")
        assert notified(listener) == [("roost_inserted", "default")]
        with psycopg.connect(dsn) as conn:
            for _ in range(3):
                roost.enqueue("a", queue="emails", conn=conn)
            assert notified(listener) == []
        assert notified(listener) == [("roost_inserted", "emails")]


# Cancel and retry while a worker moves the job


def claim(conn: Conn, job_id: int) -> None:
    conn.execute(
        """WITH taken AS (DELETE FROM roost.ready WHERE job_id = %s RETURNING job_id)
        INSERT INTO roost.claims (job_id, lease, worker_id, attempt)
        SELECT job_id, nextval('roost.lease_seq'), gen_random_uuid(), 1 FROM taken""",
        (job_id,),
    )


def waits_for_a_lock(observer: Conn, pid: int) -> bool:
    row = observer.execute("SELECT wait_event_type FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone()
    return row is not None and row["wait_event_type"] == "Lock"


def in_background(dsn: str, observer: Conn, operation: Callable[[Conn], JobState]) -> Callable[[], JobState]:
    """Start an operation that will meet a lock; return when it waits. The result waits for its end."""
    conn = psycopg.connect(dsn, autocommit=True)
    found: list[JobState] = []
    thread = threading.Thread(target=lambda: found.append(operation(conn)))
    thread.start()
    while not waits_for_a_lock(observer, conn.info.backend_pid):
        assert thread.is_alive()

    def result() -> JobState:
        thread.join(30)
        conn.close()
        return found[0]

    return result


def test_a_cancel_that_meets_a_claim_asks_the_worker(roost: Roost, conn: Conn, observer: Conn, dsn: str) -> None:
    job_id = roost.enqueue("a")
    claim(conn, job_id)
    result = in_background(dsn, observer, lambda c: roost.cancel(job_id, conn=c))
    conn.commit()
    assert result() == JobState.EXECUTING
    assert roost.get_job(job_id).cancel_requested


def test_a_cancel_that_meets_a_completion_finds_the_job_completed(
    roost: Roost, conn: Conn, observer: Conn, dsn: str
) -> None:
    job_id = roost.enqueue("a")
    claim(conn, job_id)
    conn.commit()
    conn.execute("DELETE FROM roost.claims")
    conn.execute("UPDATE roost.job_rows SET state = 'completed', completed_at = now()")
    result = in_background(dsn, observer, lambda c: roost.cancel(job_id, conn=c))
    conn.commit()
    assert result() == JobState.COMPLETED


def test_a_retry_and_a_cancel_of_one_job_do_not_deadlock(roost: Roost, conn: Conn, observer: Conn, dsn: str) -> None:
    job_id = roost.enqueue("a", scheduled_at=datetime(2050, 1, 1, tzinfo=UTC))
    conn.execute("SELECT FROM roost.job_rows FOR UPDATE")
    retried = in_background(dsn, observer, lambda c: roost.retry(job_id, conn=c))
    cancelled = in_background(dsn, observer, lambda c: roost.cancel(job_id, conn=c))
    conn.rollback()
    assert retried() == JobState.AVAILABLE
    assert cancelled() == JobState.CANCELLED
    assert roost.get_job(job_id).state == JobState.CANCELLED
    assert observer.execute("SELECT FROM roost.ready UNION ALL SELECT FROM roost.scheduled").fetchall() == []


def test_two_retries_of_one_job_make_it_ready_once(roost: Roost, conn: Conn, observer: Conn, dsn: str) -> None:
    job_id = roost.enqueue("a")
    roost.cancel(job_id)
    roost.retry(job_id, conn=conn)
    result = in_background(dsn, observer, lambda c: roost.retry(job_id, conn=c))
    conn.commit()
    assert result() == JobState.AVAILABLE
    assert observer.execute("SELECT count(*) FROM roost.ready").fetchone() == {"count": 1}
