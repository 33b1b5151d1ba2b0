"""unique_key: one active job a key, also where fifty connections enqueue it at once and where transactions are open."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from roost_client import DuplicateUniqueJobError, InvalidJobError, JobInsert, JobState, Roost
from tests.client.rows import put

Conn = psycopg.Connection[Any]
Jobs = Callable[[], list[dict[str, Any]]]
LATER = datetime(2050, 1, 1, tzinfo=UTC)


@contextmanager
def while_waiting(observer: Conn, work: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Runs `work` in a thread until it waits for another transaction's lock; ends with it."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        deadline = time.monotonic() + 30
        query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        while not observer.execute(query).fetchall():
            assert not future.done(), future.result()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield future
        future.result(30)


def test_a_second_active_job_of_a_key_is_refused_with_the_id_of_the_first(client: Roost, jobs: Jobs) -> None:
    first = client.enqueue("a", unique_key="k")
    with pytest.raises(
        DuplicateUniqueJobError, match=f"cannot enqueue 'b': unique_key 'k' is that of job {first}"
    ) as error:
        client.enqueue("b", unique_key="k")
    assert error.value.job_id == first
    assert error.value.code == "roost.duplicate-unique-job"
    client.enqueue("b", unique_key="other")
    assert [(job["task"], job["unique_key"]) for job in jobs()] == [("a", "k"), ("b", "other")]


def test_a_duplicate_leaves_the_callers_transaction_as_it_was(conn: Conn, roost: Roost, jobs: Jobs) -> None:
    first = roost.enqueue("a", unique_key="k")
    roost.enqueue("before", conn=conn)
    with pytest.raises(DuplicateUniqueJobError):
        roost.enqueue("b", unique_key="k", conn=conn)
    with pytest.raises(InvalidJobError):
        roost.enqueue("b", depends_on=[first, 10**12], unique_key="free", conn=conn)
    roost.enqueue("after", unique_key="free", conn=conn)
    conn.commit()
    assert [job["task"] for job in jobs()] == ["a", "before", "after"]


def test_the_id_of_the_job_in_the_way_is_returned_where_asked_for(client: Roost, jobs: Jobs) -> None:
    first = client.enqueue("a", args={"n": 1}, unique_key="k")
    assert client.enqueue("b", args={"n": 2}, unique_key="k", on_duplicate="return") == first
    assert client.enqueue("b", unique_key="free", on_duplicate="return") != first
    assert [(job["task"], job["args"]) for job in jobs()] == [("a", {"n": 1}), ("b", {})]


@pytest.mark.parametrize("before", [None, LATER])
@pytest.mark.parametrize("after", [None, LATER])
def test_a_waiting_job_is_replaced_where_it_waits(
    client: Roost, observer: Conn, before: datetime | None, after: datetime | None
) -> None:
    first = client.enqueue("a", args={"n": 1}, unique_key="k", scheduled_at=before, queue="q", priority=3)
    assert client.enqueue("b", args={"n": 2}, unique_key="k", scheduled_at=after, on_duplicate="replace") == first
    job = client.get_job(first)
    assert (job.task, job.args, job.queue, job.priority) == ("a", {"n": 2}, "q", 3)
    assert (job.scheduled_at == LATER) == (after == LATER)
    table: Any = "scheduled" if after else "ready"
    other: Any = "ready" if after else "scheduled"
    (row,) = observer.execute(f"SELECT * FROM roost.{table}").fetchall()
    assert (row["job_id"], row["queue"], row["priority"], row["scheduled_at"]) == (first, "q", 3, job.scheduled_at)
    assert observer.execute(f"SELECT * FROM roost.{other}").fetchall() == []


def test_a_job_that_runs_is_not_replaced(client: Roost, observer: Conn) -> None:
    first = client.enqueue("a", args={"n": 1}, unique_key="k")
    put(observer, first, "executing")
    with pytest.raises(DuplicateUniqueJobError):
        client.enqueue("a", args={"n": 2}, unique_key="k", on_duplicate="replace")
    assert client.get_job(first).args == {"n": 1}


def test_a_key_is_free_again_once_its_job_is_cancelled(client: Roost) -> None:
    first = client.enqueue("a", unique_key="k")
    assert client.cancel(first) is JobState.CANCELLED
    assert client.enqueue("a", unique_key="k") != first


def test_a_job_whose_key_is_taken_is_not_retried(client: Roost, observer: Conn) -> None:
    first = client.enqueue("a", unique_key="k")
    client.cancel(first)
    second = client.enqueue("a", unique_key="k")
    with pytest.raises(DuplicateUniqueJobError, match=f"cannot retry job {first}: .* of job {second}") as error:
        client.retry(first)
    assert error.value.job_id == second
    assert client.get_job(first).state == "cancelled"
    client.cancel(second)
    client.retry(first)
    with pytest.raises(DuplicateUniqueJobError):
        client.enqueue("a", unique_key="k")


def test_requeue_takes_one_job_a_key_and_passes_over_those_whose_key_is_taken(client: Roost, observer: Conn) -> None:
    def discarded(key: str | None) -> int:
        job_id = client.enqueue("a", unique_key=key)
        client.cancel(job_id)
        observer.execute(
            "UPDATE roost.job_rows SET state = 'discarded', discarded_at = now(), cancelled_at = NULL WHERE id = %s",
            (job_id,),
        )
        return job_id

    taken, first, second, free = discarded("taken"), discarded("k"), discarded("k"), discarded(None)
    client.enqueue("a", unique_key="taken")
    assert client.requeue_discarded() == 2
    states = {job_id: client.get_job(job_id).state for job_id in (taken, first, second, free)}
    assert states == {taken: "discarded", first: "available", second: "discarded", free: "available"}
    with pytest.raises(DuplicateUniqueJobError):
        client.enqueue("a", unique_key="k")


def test_requeue_goes_on_where_a_whole_batch_is_taken(
    roost: Roost, observer: Conn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roost_client.statements.BATCH_SIZE", 2)
    for key in ("a", "b", None):
        client_id = roost.enqueue("a", unique_key=key)
        roost.cancel(client_id)
    observer.execute("UPDATE roost.job_rows SET state = 'discarded', discarded_at = now(), cancelled_at = NULL")
    for key in ("a", "b"):
        roost.enqueue("a", unique_key=key)
    assert roost.requeue_discarded() == 1


def test_a_bulk_leaves_out_duplicates_and_counts_them(client: Roost, jobs: Jobs) -> None:
    client.enqueue("first", unique_key="k")
    added = client.enqueue_many(
        [
            JobInsert("a", unique_key="k"),
            JobInsert("b", unique_key='x"\\,{}'),
            JobInsert("c"),
            JobInsert("d", unique_key='x"\\,{}'),
        ]
    )
    assert (added, added.duplicates) == (2, 2)
    assert [(job["task"], job["unique_key"]) for job in jobs()] == [("first", "k"), ("b", 'x"\\,{}'), ("c", None)]
    plain = client.enqueue_many([JobInsert("e")])
    assert (plain, plain.duplicates) == (1, 0)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"unique_key": ""}, "unique_key must have 1 to 512 characters, not 0"),
        ({"unique_key": "x" * 513}, "unique_key must have 1 to 512 characters, not 513"),
        ({"unique_key": 7}, "unique_key must be a string, not 7"),
        ({"unique_key": "a\0b"}, "unique_key holds a NUL character"),
        ({"unique_key": "\ud800"}, "unique_key holds the lone surrogate"),
        (
            {"unique_key": "k", "on_duplicate": "ignore"},
            "on_duplicate must be 'raise', 'return' or 'replace', not 'ignore'",
        ),
        ({"unique_key": "k", "on_duplicate": None}, "on_duplicate must be 'raise', 'return' or 'replace', not None"),
        ({"on_duplicate": "return"}, "on_duplicate is of no use without a unique_key"),
    ],
)
def test_bad_keys_are_refused_before_anything_is_sent(keywords: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidJobError, match=reason):
        Roost("host=/nonexistent").enqueue("a", **keywords)


def test_the_longest_key_of_the_widest_characters_fits(client: Roost) -> None:
    key = "\U0001f600" * 512
    client.enqueue("a", unique_key=key)
    with pytest.raises(DuplicateUniqueJobError):
        client.enqueue("a", unique_key=key)


def test_of_fifty_connections_that_enqueue_a_key_at_once_one_gets_it(dsn: str, roost: Roost, jobs: Jobs) -> None:
    start = threading.Barrier(50)

    def enqueue(worker: int) -> list[tuple[str, int]]:
        results = []
        with psycopg.connect(dsn) as conn:
            start.wait()
            for round_ in range(5):
                with conn.transaction():
                    try:
                        results.append(("added", roost.enqueue("a", unique_key=f"k{round_}", conn=conn)))
                    except DuplicateUniqueJobError as error:
                        results.append(("refused", error.job_id))
                    assert conn.execute("SELECT 1").fetchone()  # the transaction lives
        return results

    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(enqueue, range(50)))
    added = {job["unique_key"]: job["id"] for job in jobs()}
    assert len(added) == len(jobs()) == 5
    for round_ in range(5):
        assert Counter(result[round_] for result in results) == {
            ("added", added[f"k{round_}"]): 1,
            ("refused", added[f"k{round_}"]): 49,
        }


@pytest.mark.parametrize("on_duplicate", ["raise", "return", "replace"])
def test_an_enqueue_that_waits_for_an_uncommitted_twin_is_right_on_its_commit(
    conn: Conn, roost: Roost, observer: Conn, on_duplicate: Any
) -> None:
    first = roost.enqueue("a", args={"n": 1}, unique_key="k", conn=conn)

    def second() -> int:
        return roost.enqueue("a", args={"n": 2}, unique_key="k", on_duplicate=on_duplicate)

    if on_duplicate == "raise":
        with pytest.raises(DuplicateUniqueJobError) as error, while_waiting(observer, second):
            conn.commit()
        assert error.value.job_id == first
    else:
        with while_waiting(observer, second) as found:
            conn.commit()
            assert found.result(30) == first
    assert roost.get_job(first).args == {"n": 2 if on_duplicate == "replace" else 1}


def test_an_enqueue_that_waits_for_an_uncommitted_twin_is_right_on_its_rollback(
    conn: Conn, roost: Roost, observer: Conn, jobs: Jobs
) -> None:
    first = roost.enqueue("a", unique_key="k", conn=conn)
    with while_waiting(observer, lambda: roost.enqueue("b", unique_key="k")) as second:
        conn.rollback()
        assert second.result(30) > first
    assert [job["task"] for job in jobs()] == ["b"]


def test_an_enqueue_that_waits_for_an_uncommitted_cancel_is_right_on_either_end(
    conn: Conn, roost: Roost, observer: Conn
) -> None:
    first = roost.enqueue("a", unique_key="k")
    roost.cancel(first, conn=conn)
    with while_waiting(observer, lambda: roost.enqueue("b", unique_key="k", on_duplicate="return")) as second:
        conn.rollback()
        assert second.result(30) == first
    roost.cancel(first, conn=conn)
    with while_waiting(observer, lambda: roost.enqueue("b", unique_key="k", on_duplicate="return")) as second:
        conn.commit()
        assert second.result(30) > first


def test_bulks_with_the_same_keys_in_any_order_do_not_deadlock(dsn: str, roost: Roost, jobs: Jobs) -> None:
    start = threading.Barrier(8)

    def enqueue(worker: int) -> int:
        keys = [f"k{n}" for n in range(200)]
        start.wait()
        added = roost.enqueue_many([JobInsert("a", unique_key=key) for key in (keys if worker % 2 else reversed(keys))])
        assert added + added.duplicates == 200
        return added

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(enqueue, range(8))) == 200
    assert len({job["unique_key"] for job in jobs()}) == len(jobs()) == 200


def test_a_key_that_a_worker_from_before_left_behind_is_taken_over(roost: Roost, observer: Conn) -> None:
    first = roost.enqueue("a", unique_key="k")
    put(observer, first, "completed")
    observer.execute("INSERT INTO roost.unique_keys VALUES ('k', %s) ON CONFLICT DO NOTHING", (first,))
    second = roost.enqueue("a", unique_key="k")
    assert observer.execute("SELECT job_id FROM roost.unique_keys").fetchall() == [{"job_id": second}]


# -- from SQL


def test_sql_raises_what_the_client_raises(observer: Conn) -> None:
    (row,) = observer.execute("SELECT roost.enqueue('a', unique_key => 'k') AS id").fetchall()
    with pytest.raises(psycopg.errors.UniqueViolation, match=f"unique_key 'k' is that of job {row['id']}") as error:
        observer.execute("SELECT roost.enqueue('a', unique_key => 'k')")
    assert error.value.diag.message_detail == str(row["id"])
    (same,) = observer.execute(
        "SELECT roost.enqueue('a', unique_key => 'k', on_duplicate => 'return') AS id"
    ).fetchall()
    assert same == row
