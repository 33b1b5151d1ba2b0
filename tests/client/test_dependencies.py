"""depends_on: what an enqueue says of a job that waits for others, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from roost_client import InvalidJobError, JobInsert, JobState, JobStateError, Roost
from tests.client.rows import put

Conn = psycopg.Connection[Any]
Jobs = Callable[[], list[dict[str, Any]]]


def blocked(observer: Conn) -> dict[int, int]:
    """How many parents each blocked job waits for."""
    return {row["job_id"]: row["parents_left"] for row in observer.execute("SELECT * FROM roost.blocked").fetchall()}


def waiting(observer: Conn) -> list[int]:
    return [row["job_id"] for row in observer.execute("SELECT job_id FROM roost.ready ORDER BY job_id").fetchall()]


def test_a_job_waits_for_its_parents_and_not_where_a_worker_looks(client: Roost, observer: Conn) -> None:
    one, two = client.enqueue("a"), client.enqueue("a")
    child = client.enqueue("b", depends_on=[two, one, two])
    job = client.get_job(child)
    assert (job.state, job.depends_on) == ("available", [one, two])
    assert blocked(observer) == {child: 2}
    assert waiting(observer) == [one, two]
    (queue,) = client.list_queues()
    assert (queue.available, queue.blocked) == (2, 1)


def test_a_completed_parent_is_not_waited_for(client: Roost, observer: Conn) -> None:
    parent = client.enqueue("a")
    put(observer, parent, "completed")
    child = client.enqueue("b", depends_on=[parent])
    assert blocked(observer) == {}
    assert waiting(observer) == [child]


@pytest.mark.parametrize("state", ["discarded", "cancelled"])
def test_a_job_whose_parent_is_dead_already_is_cancelled_with_the_reason(
    client: Roost, observer: Conn, state: str
) -> None:
    parent, other = client.enqueue("a"), client.enqueue("a")
    put(observer, parent, state)
    child = client.enqueue("b", depends_on=[other, parent], unique_key="k")
    client.enqueue_many([JobInsert("c", depends_on=[parent])])
    job = client.get_job(child)
    assert job.state == "cancelled"
    assert job.errors[-1]["error"] == f"DependencyFailed: job {parent}, on which this one depends, was {state}"
    assert client.list_jobs(task="c")[0].state == "cancelled"
    assert blocked(observer) == {}
    assert waiting(observer) == [other]
    client.enqueue("d", unique_key="k")  # which is free


def test_an_unknown_parent_is_refused_and_nothing_is_changed(client: Roost, jobs: Jobs) -> None:
    parent = client.enqueue("a")
    with pytest.raises(
        InvalidJobError, match=r"cannot enqueue 'b': depends_on\[1\] is job 999, which does not exist"
    ) as one:
        client.enqueue("b", depends_on=[parent, 999])
    assert one.value.path == "depends_on[1]"
    with pytest.raises(InvalidJobError, match="which does not exist") as many:
        client.enqueue_many([JobInsert("b", unique_key="k"), JobInsert("c", depends_on=[parent, 999])])
    assert many.value.path == "jobs[1].depends_on[1]"
    assert [job["task"] for job in jobs()] == ["a"]
    client.enqueue("d", unique_key="k")


def test_a_job_that_is_not_committed_is_known_to_its_own_transaction_alone(conn: Conn, roost: Roost) -> None:
    parent = roost.enqueue("a", conn=conn)
    with pytest.raises(InvalidJobError, match="does not exist"):
        roost.enqueue("b", depends_on=[parent])
    child = roost.enqueue("b", depends_on=[parent], conn=conn)
    conn.commit()
    assert roost.get_job(child).depends_on == [parent]


def test_jobs_of_one_call_depend_on_each_other_and_on_others(client: Roost, observer: Conn) -> None:
    outside = client.enqueue("outside")
    first = JobInsert("first")
    middle = [JobInsert("middle", {"n": n}, depends_on=[first]) for n in range(3)]
    last = JobInsert("last", depends_on=[*middle, outside, first])
    assert client.enqueue_many([first, *middle, last]) == 5
    ids = [row["id"] for row in observer.execute("SELECT id FROM roost.jobs ORDER BY id").fetchall()]
    assert [client.get_job(id).depends_on for id in ids] == [[], [], *[[ids[1]]] * 3, [*ids[:5]]]
    assert blocked(observer) == {ids[2]: 1, ids[3]: 1, ids[4]: 1, ids[5]: 5}
    assert waiting(observer) == ids[:2]


def test_what_depends_on_a_duplicate_depends_on_the_job_that_has_its_key(client: Roost, observer: Conn) -> None:
    holder = client.enqueue("a", unique_key="k")
    parent = JobInsert("a", unique_key="k")
    added = client.enqueue_many([parent, JobInsert("b", depends_on=[parent])])
    assert (added, added.duplicates) == (1, 1)
    (child,) = blocked(observer)
    assert client.get_job(child).depends_on == [holder]


def test_a_parent_in_the_same_call_must_come_first(client: Roost, jobs: Jobs) -> None:
    parent = JobInsert("a")
    child = JobInsert("b", depends_on=[parent])
    with pytest.raises(InvalidJobError, match=r"jobs\[0\].depends_on\[0\] must come before it, unlike jobs\[1\]"):
        client.enqueue_many([child, parent])
    with pytest.raises(InvalidJobError, match=r"jobs\[0\].depends_on\[0\] is not among these jobs"):
        client.enqueue_many([child])
    assert jobs() == []


def test_a_fan_out_of_100_000_is_one_call(roost: Roost, observer: Conn) -> None:
    parent = JobInsert("a")
    children = [JobInsert("b", {"n": n}, depends_on=[parent]) for n in range(100_000)]
    assert roost.enqueue_many([parent, *children]) == 100_001
    query = "SELECT count(*) AS jobs, sum(parents_left) AS parents FROM roost.blocked"
    assert observer.execute(query).fetchall() == [{"jobs": 100_000, "parents": 100_000}]
    assert len(waiting(observer)) == 1


def test_a_join_on_10_000_parents_is_one_enqueue(roost: Roost, observer: Conn) -> None:
    roost.enqueue_many([JobInsert("a")] * 10_000)
    child = roost.enqueue("b", depends_on=waiting(observer))
    assert blocked(observer) == {child: 10_000}


def test_two_open_transactions_may_depend_on_the_same_job(dsn: str, conn: Conn, roost: Roost, observer: Conn) -> None:
    parent = roost.enqueue("a")
    one = roost.enqueue("b", depends_on=[parent], conn=conn)
    with psycopg.connect(dsn) as other:
        other.execute("SET lock_timeout = '5s'")
        two = roost.enqueue("b", depends_on=[parent], conn=other)
    conn.commit()
    assert blocked(observer) == {one: 1, two: 1}


def test_a_blocked_job_can_be_cancelled_and_retried(client: Roost, observer: Conn) -> None:
    parent = client.enqueue("a")
    child = client.enqueue("b", depends_on=[parent])
    assert client.retry(child) is JobState.AVAILABLE
    assert blocked(observer) == {child: 1}
    assert client.cancel(child) is JobState.CANCELLED
    assert blocked(observer) == {}
    client.retry(child)
    assert blocked(observer) == {child: 1}, "it still has to wait"
    assert waiting(observer) == [parent]


def test_a_blocked_job_is_replaced_where_it_is(client: Roost, observer: Conn) -> None:
    parent = client.enqueue("a")
    child = client.enqueue("b", args={"n": 1}, depends_on=[parent], unique_key="k")
    assert client.enqueue("b", args={"n": 2}, unique_key="k", on_duplicate="replace") == child
    assert client.get_job(child).args == {"n": 2}
    assert blocked(observer) == {child: 1}


def test_a_job_whose_parent_is_dead_is_retried_only_with_it(client: Roost, observer: Conn) -> None:
    parent = client.enqueue("a")
    child = client.enqueue("b", depends_on=[parent])
    grandchild = client.enqueue("c", depends_on=[child])
    cancelled = client.enqueue("d", depends_on=[parent])
    client.cancel(cancelled)
    client.cancel(parent)
    while observer.execute("SELECT told FROM roost.follow_parents()").fetchone() != {"told": 0}:
        pass
    assert [client.get_job(id).state for id in (child, grandchild)] == ["cancelled"] * 2
    with pytest.raises(JobStateError, match=f"cannot retry job {child}: job {parent}, on which it depends, was"):
        client.retry(child)
    client.retry(parent)
    assert [client.get_job(id).state for id in (child, grandchild)] == ["cancelled"] * 2, "nobody asked for them"
    client.cancel(parent)
    client.retry(parent, with_dependents=True)
    assert [client.get_job(id).state for id in (child, grandchild)] == ["available"] * 2
    assert blocked(observer) == {child: 1, grandchild: 1}
    assert client.get_job(cancelled).state == "cancelled", "it was cancelled for its own sake"


def test_a_dependent_of_two_dead_parents_is_revived_with_the_second(client: Roost, observer: Conn) -> None:
    one, two = client.enqueue("a"), client.enqueue("a")
    child = client.enqueue("b", depends_on=[one, two])
    client.cancel(one)
    client.cancel(two)
    while observer.execute("SELECT told FROM roost.follow_parents()").fetchone() != {"told": 0}:
        pass
    client.retry(one, with_dependents=True)
    assert client.get_job(child).state == "cancelled"
    client.retry(two, with_dependents=True)
    assert client.get_job(child).state == "available"
    assert blocked(observer) == {child: 2}


def test_sql_refuses_an_unknown_parent(observer: Conn) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation, match="depends_on names job 7, which does not exist"):
        observer.execute("SELECT roost.enqueue('a', depends_on => '{7}')")


def test_many_are_enqueued_as_fast_after_a_few_small_calls_as_before_them(dsn: str) -> None:
    """A session that has called a function some times keeps the plans in it, and those are for small arrays."""

    def seconds(roost: Roost, number: int) -> float:
        split = JobInsert("a")
        jobs = [split, *(JobInsert("a", depends_on=[split]) for _ in range(number))]
        began_at = time.monotonic()
        roost.enqueue_many(jobs)
        return time.monotonic() - began_at

    with Roost(dsn) as roost:
        first = seconds(roost, 5000)
        for _ in range(12):
            seconds(roost, 2)
        assert seconds(roost, 5000) < 5 * first


def test_a_parent_that_died_and_is_gone_is_not_taken_for_a_completed_one(client: Roost, observer: Conn) -> None:
    dead, done = client.enqueue("a"), client.enqueue("a")
    client.cancel(dead)
    put(observer, done, "completed")
    columns = (
        "id, scheduled_at, inserted_at, cancelled_at, priority, attempt, max_attempts, crashes, cancel_requested,"
        " state, queue, task, args"
    )
    observer.execute(
        f"WITH moved AS (DELETE FROM roost.job_rows RETURNING *)"
        f" INSERT INTO roost.jobs_archive ({columns}, tags, depends_on, metadata, errors)"
        f" SELECT {columns}, '{{}}', '{{}}', '{{}}', '[]' FROM moved"
    )
    child = client.enqueue("b", depends_on=[dead, done])
    fix = f"job {dead}, on which it depends, .*; that one is archived, or deleted: enqueue both anew"
    with pytest.raises(JobStateError, match=fix):
        client.retry(child)
    observer.execute("DELETE FROM roost.jobs_archive")
    with pytest.raises(JobStateError, match=fix):
        client.retry(child)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=fix):
        observer.execute("SELECT roost.retry(%s)", (child,))
    assert client.get_job(child).state == JobState.CANCELLED
