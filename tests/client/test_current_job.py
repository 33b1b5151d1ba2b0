"""The current job as its handler sees it, and the transaction that completes it: a real database, and no daemon."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from roost_client import CurrentJob, LeaseLostError, RoostError, SchemaError, current_job, enqueue
from roost_client.current import Completion, set_current
from roost_client.results import BadResult

Rows = list[dict[str, Any]]


class Here:
    """What runs the jobs of these tests: this process, which calls none off."""

    max_result_bytes = 1000

    def __init__(self) -> None:
        self.held = 0
        self.cancelled: set[int] = set()

    def cancel_requested(self, lease: int) -> bool:
        return lease in self.cancelled

    def hold(self, lease: int) -> None:
        self.held += 1

    def let_go(self, lease: int) -> None:
        self.held -= 1


@pytest.fixture
def here() -> Iterator[Here]:
    made = Here()
    yield made
    assert made.held == 0


@pytest.fixture
def claim(observer: psycopg.Connection[Any], here: Here) -> Callable[..., CurrentJob]:
    """A job that has been claimed, as this process would run it."""
    observer.execute("CREATE TABLE counter (n integer NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    observer.execute("INSERT INTO counter VALUES (0)")

    def claim(**options: Any) -> CurrentJob:
        names = "".join(f", {name} => %({name})s" for name in options)
        (row,) = observer.execute(f"SELECT roost.enqueue(task => 'add'{names}) AS id".encode(), options).fetchall()
        observer.execute("DELETE FROM roost.ready WHERE job_id = %s", [row["id"]])
        (claimed,) = observer.execute(
            "INSERT INTO roost.claims (job_id, lease, worker_id, attempt)"
            " VALUES (%s, nextval('roost.lease_seq'), gen_random_uuid(), 1) RETURNING lease",
            [row["id"]],
        ).fetchall()
        return CurrentJob(here, row["id"], 1, claimed["lease"], "default", "add")

    return claim


@pytest.fixture
def count(observer: psycopg.Connection[Any]) -> Callable[[], int]:
    """What is committed of the handlers' own writes."""
    return lambda: int(observer.execute("SELECT sum(n)::int AS n FROM counter").fetchall()[0]["n"])


ADD = "UPDATE counter SET n = n + 1"


def row(observer: psycopg.Connection[Any], job: CurrentJob) -> dict[str, Any]:
    (found,) = observer.execute("SELECT * FROM roost.jobs WHERE id = %s", [job.id]).fetchall()
    return dict(found)


# -- the job


def test_outside_a_job_there_is_none_and_the_error_says_so() -> None:
    with pytest.raises(RoostError, match="cannot return the current job: no job runs here"):
        current_job()


def test_the_current_job_is_that_of_the_context_and_no_other_threads(here: Here) -> None:
    seen: list[object] = []

    def look() -> None:
        try:
            seen.append(current_job())
        except RoostError as error:
            seen.append(type(error))

    def run() -> None:
        set_current(CurrentJob(here, 7, 2, 9, "emails", "send"))
        look()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        asyncio.run(asyncio.to_thread(look))

    contextvars.copy_context().run(run)
    look()
    first, of_thread, of_to_thread, outside = seen
    assert isinstance(first, CurrentJob)
    assert (first.id, first.attempt, first.lease, first.queue, first.task) == (7, 2, 9, "emails", "send")
    assert of_to_thread is first
    assert of_thread is outside is RoostError


def test_tags_and_metadata_are_empty_where_there_are_none(here: Here) -> None:
    job = CurrentJob(here, 7, 2, 9, "emails", "send")
    assert (job.tags, job.metadata, job.deadline) == ((), {}, None)
    only_tags = CurrentJob(here, 7, 2, 9, "emails", "send", b'{"tags": ["a", "b"], "metadata": null}')
    assert (only_tags.tags, only_tags.metadata) == (("a", "b"), {})
    only_metadata = CurrentJob(here, 7, 2, 9, "emails", "send", '{"tags": null, "metadata": {"trace": "ü"}}'.encode())
    assert (only_metadata.tags, only_metadata.metadata) == ((), {"trace": "ü"})


def test_its_log_names_the_job_in_every_record(here: Here, caplog: pytest.LogCaptureFixture) -> None:
    job = CurrentJob(here, 7, 2, 9, "emails", "send")
    with caplog.at_level(logging.INFO):
        job.log.info("sent %d", 3, extra={"order": 17, "lease": "of the caller's own"})
    (record,) = caplog.records
    values = vars(record)
    assert record.getMessage() == "sent 3"
    assert [values[name] for name in ("job_id", "attempt", "lease", "queue", "task", "order")] == [
        7, 2, 9, "emails", "send", 17,
    ]  # fmt: skip


def test_a_cancel_is_asked_of_whatever_runs_the_job(here: Here) -> None:
    job = CurrentJob(here, 7, 2, 9, "emails", "send")
    assert not job.cancel_requested
    here.cancelled.add(9)
    assert job.cancel_requested


# -- the transaction

MODES = ["autocommit", "plain", "pipeline"]
Claim = Callable[..., CurrentJob]
Observer = psycopg.Connection[Any]
Count = Callable[[], int]


def connect(dsn: str, mode: str) -> psycopg.Connection[Any]:
    # With what an application may have set: nothing here may depend on it.
    return psycopg.connect(
        dsn,
        autocommit=mode != "plain",
        row_factory=dict_row,
        cursor_factory=psycopg.ClientCursor,
    )


@pytest.mark.parametrize("mode", MODES)
def test_writes_and_completion_are_committed_together(
    dsn: str, claim: Claim, observer: Observer, count: Count, here: Here, mode: str
) -> None:
    job = claim()
    with connect(dsn, mode) as conn, ExitStack() as stack:
        if mode == "pipeline":
            stack.enter_context(conn.pipeline())
        with job.transaction(conn) as tx:
            conn.execute(ADD)
            tx.result = {"sent": [1, "ü"]}
            assert row(observer, job)["state"] == "executing"
        ended = row(observer, job)
        assert (ended["state"], ended["attempt"], ended["result"]) == ("completed", 1, {"sent": [1, "ü"]})
        assert ended["attempted_at"] is not None
        assert ended["completed_at"] is not None
        assert (count(), job.completion) == (1, Completion.COMMITTED)


def test_writes_and_completion_are_committed_together_by_await(
    dsn: str, claim: Claim, observer: Observer, count: Count
) -> None:
    job = claim()

    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn, job.transaction(conn) as tx:
            await conn.execute(ADD)
            tx.result = 5

    asyncio.run(run())
    ended = row(observer, job)
    assert (ended["state"], ended["result"], count(), job.completion) == ("completed", 5, 1, Completion.COMMITTED)


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_raises_leaves_nothing_and_may_be_tried_again(
    dsn: str, claim: Claim, observer: Observer, count: Count, mode: str
) -> None:
    job = claim()
    with connect(dsn, mode) as conn:
        with pytest.raises(KeyError), job.transaction(conn):
            conn.execute(ADD)
            raise KeyError("no")
        with job.transaction(conn):
            conn.execute(ADD)
            raise psycopg.Rollback
        assert (row(observer, job)["state"], count(), job.completion) == ("executing", 0, Completion.OPEN)
        with job.transaction(conn):
            conn.execute(ADD)
    assert (row(observer, job)["state"], count()) == ("completed", 1)


def test_an_awaited_block_that_raises_leaves_nothing(dsn: str, claim: Claim, observer: Observer, count: Count) -> None:
    job = claim()

    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            with pytest.raises(KeyError):
                async with job.transaction(conn):
                    await conn.execute(ADD)
                    raise KeyError("no")

    asyncio.run(run())
    assert (row(observer, job)["state"], count(), job.completion) == ("executing", 0, Completion.OPEN)


@pytest.mark.parametrize("awaits", [False, True])
def test_a_lease_that_was_lost_rolls_the_block_back(
    dsn: str, claim: Claim, observer: Observer, count: Count, awaits: bool
) -> None:
    job = claim()
    observer.execute("UPDATE roost.claims SET lease = lease + 1")

    async def awaited() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            async with job.transaction(conn):
                await conn.execute(ADD)

    with pytest.raises(LeaseLostError, match=f"its lease {job.lease} is no longer that of a claim"):
        if awaits:
            asyncio.run(awaited())
        with psycopg.connect(dsn) as conn, job.transaction(conn):
            conn.execute(ADD)
    assert (row(observer, job)["state"], count(), job.completion) == ("executing", 0, Completion.OPEN)


def test_of_two_runs_that_overlap_one_takes_effect(dsn: str, claim: Claim, observer: Observer, count: Count) -> None:
    """The later lease's run commits while the earlier one is in its block; and the other way round."""
    for first_to_leave in ("earlier", "later"):
        earlier = claim()
        with psycopg.connect(dsn) as one, psycopg.connect(dsn) as other:
            with pytest.raises(LeaseLostError):
                with earlier.transaction(one):
                    observer.execute("UPDATE roost.claims SET lease = lease + 1000 WHERE job_id = %s", [earlier.id])
                    later = CurrentJob(earlier._runner, earlier.id, 2, earlier.lease + 1000, "default", "add")
                    if first_to_leave == "later":
                        with later.transaction(other):
                            other.execute(ADD)
                    one.execute(ADD)
            if first_to_leave == "earlier":
                with later.transaction(other):
                    other.execute(ADD)
        assert row(observer, earlier)["state"] == "completed"
    assert count() == 2


def test_a_completion_waits_for_whoever_ends_the_claim_at_the_moment_and_then_gives_way(
    dsn: str, claim: Claim, observer: Observer, count: Count
) -> None:
    job = claim()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with psycopg.connect(dsn, application_name="handler") as conn, job.transaction(conn):
                conn.execute(ADD)
        except LeaseLostError as error:
            failed.append(error)

    with psycopg.connect(dsn) as worker:
        worker.execute("DELETE FROM roost.claims")
        handler = threading.Thread(target=run)
        handler.start()
        until_waiting(observer, "handler")
    handler.join(30)
    assert len(failed) == 1
    assert count() == 0


def test_a_cancel_that_was_asked_for_meanwhile_is_noted_and_the_job_completes(
    dsn: str, claim: Claim, observer: Observer
) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn, job.transaction(conn):
        observer.execute("SELECT roost.cancel(%s)", [job.id])
    ended = row(observer, job)
    assert (ended["state"], ended["cancel_requested"]) == ("completed", True)


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("by", ["a block", "a statement before"])
def test_in_an_open_transaction_the_job_completes_when_that_commits(
    dsn: str, claim: Claim, observer: Observer, count: Count, commits: bool, by: str
) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn, ExitStack() as stack:
        if by == "a block":
            stack.enter_context(conn.transaction(force_rollback=not commits))
        conn.execute("SELECT 1")
        with job.transaction(conn):
            conn.execute(ADD)
        assert (row(observer, job)["state"], count(), job.completion) == ("executing", 0, Completion.UNSURE)
        stack.close()
        if not commits:
            conn.rollback()
    assert (row(observer, job)["state"], count()) == (("completed", 1) if commits else ("executing", 0))


def test_a_savepoint_that_fails_leaves_the_outer_transaction_as_it_was(
    dsn: str, claim: Claim, observer: Observer, count: Count
) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn, conn.transaction():
        conn.execute(ADD)
        with pytest.raises(KeyError), job.transaction(conn):
            conn.execute(ADD)
            raise KeyError("no")
    assert (row(observer, job)["state"], count(), job.completion) == ("executing", 1, Completion.OPEN)


def test_what_is_enqueued_in_the_block_is_there_with_the_completion(dsn: str, claim: Claim, observer: Observer) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn:
        with pytest.raises(KeyError), job.transaction(conn):
            enqueue("next", conn=conn)
            raise KeyError("no")
        with job.transaction(conn):
            enqueue("next", conn=conn)
    assert [row["task"] for row in observer.execute("SELECT task FROM roost.ready JOIN roost.jobs ON id = job_id")] == [
        "next"
    ]


def test_a_unique_key_is_free_again_and_dependents_are_told(dsn: str, claim: Claim, observer: Observer) -> None:
    job = claim(unique_key="one")
    observer.execute("SELECT roost.enqueue(task => 'after', depends_on => ARRAY[%s]::bigint[])", [job.id])
    with psycopg.connect(dsn) as conn, job.transaction(conn):
        pass
    assert observer.execute("SELECT 1 FROM roost.unique_keys").fetchall() == []
    assert observer.execute("SELECT job_id FROM roost.ended_parents").fetchall() == [{"job_id": job.id}]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({1, 2}, "set is no JSON value"),
        (float("nan"), "JSON compliant"),
        ("x" * 999, "max_result_bytes"),
        ("\0", "NUL"),
    ],
)
def test_a_result_that_cannot_be_kept_rolls_the_block_back(
    dsn: str, claim: Claim, observer: Observer, count: Count, result: object, reason: str
) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn, pytest.raises(BadResult, match=reason):
        with job.transaction(conn) as tx:
            conn.execute(ADD)
            tx.result = result
    assert (row(observer, job)["state"], count(), job.completion) == ("executing", 0, Completion.OPEN)


def test_a_commit_that_the_database_refuses_leaves_the_job_as_it_was(
    dsn: str, claim: Claim, observer: Observer, count: Count
) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn:
        with pytest.raises(psycopg.errors.UniqueViolation), job.transaction(conn):
            conn.execute("INSERT INTO counter VALUES (0)")  # seen by the COMMIT alone
        assert (row(observer, job)["state"], job.completion) == ("executing", Completion.OPEN)


def test_a_connection_that_breaks_in_the_commit_leaves_it_to_the_database_to_say(
    dsn: str, claim: Claim, observer: Observer, count: Count
) -> None:
    job = claim()
    slow_commit(observer)
    observer.execute("SELECT pg_advisory_lock(1)")

    def cut() -> None:
        until_waiting(observer, "handler")
        observer.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'handler'"
        )

    cutter = threading.Thread(target=cut)
    cutter.start()
    with pytest.raises(psycopg.OperationalError):
        with psycopg.connect(dsn, application_name="handler") as conn, job.transaction(conn):
            conn.execute(ADD)
    cutter.join(30)
    assert (row(observer, job)["state"], count(), job.completion) == ("executing", 0, Completion.UNSURE)


def slow_commit(observer: Observer) -> None:
    """Has every COMMIT that has changed the counter wait for advisory lock 1."""
    observer.execute(
        "CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'"
    )
    observer.execute(
        "CREATE CONSTRAINT TRIGGER waits AFTER UPDATE ON counter DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait_at_commit()"
    )


def until_waiting(observer: Observer, application: str) -> None:
    deadline = time.monotonic() + 30
    while not observer.execute(
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
        " AND wait_event_type = 'Lock'",
        [application],
    ).fetchall():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_rights_that_the_page_on_privileges_names_suffice(
    dsn: str, claim: Claim, observer: Observer, count: Count
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "privileges.md").read_text()
    (grants,) = [sql for sql in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) if "roost.claims" in sql]
    job = claim(unique_key="one")
    observer.execute("SELECT roost.enqueue(task => 'after', depends_on => ARRAY[%s]::bigint[])", [job.id])
    observer.execute("CREATE ROLE handler_of_test")
    try:
        observer.execute("GRANT USAGE ON SCHEMA roost TO handler_of_test")
        observer.execute("GRANT SELECT, UPDATE ON counter TO handler_of_test")
        observer.execute(grants.replace(" TO app", " TO handler_of_test").encode())
        with psycopg.connect(dsn) as conn:
            conn.execute("SET search_path = roost")  # where the counter is: the tests' own user has that schema's name
            conn.execute("SET ROLE handler_of_test")
            conn.commit()
            with job.transaction(conn):
                conn.execute(ADD)
        assert (row(observer, job)["state"], count()) == ("completed", 1)
    finally:
        observer.execute("DROP OWNED BY handler_of_test")
        observer.execute("DROP ROLE handler_of_test")


# -- what is refused


def test_a_job_is_completed_once(dsn: str, claim: Claim, count: Count) -> None:
    job = claim()
    with psycopg.connect(dsn) as conn:
        with job.transaction(conn):
            conn.execute(ADD)
        with pytest.raises(RoostError, match=f"cannot complete job {job.id} in a transaction: it has been completed"):
            with job.transaction(conn):
                conn.execute(ADD)
    assert count() == 1


def test_a_connection_that_is_none_is_refused(dsn: str, claim: Claim) -> None:
    job = claim()
    with pytest.raises(RoostError, match=r"conn must be a psycopg.Connection, not a int"):
        with job.transaction(5):  # type: ignore[call-overload]
            pass
    with psycopg.connect(dsn) as conn:
        with pytest.raises(psycopg.errors.SyntaxError):
            conn.execute("nonsense")
        with pytest.raises(RoostError, match="has failed already"), job.transaction(conn):
            pass
    with pytest.raises(RoostError, match="conn is closed"), job.transaction(conn):
        pass


def test_a_database_without_the_schema_is_told_as_such(empty_dsn: str, claim: Claim) -> None:
    job = claim()
    with psycopg.connect(empty_dsn) as conn, pytest.raises(SchemaError, match="roostctl migrate up"):
        with job.transaction(conn):
            pass
