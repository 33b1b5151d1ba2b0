"""What both clients do besides enqueueing; each test runs on both."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from roost_client import (
    InvalidJobError,
    JobInsert,
    JobNotFoundError,
    JobState,
    JobStateError,
    Roost,
    RoostError,
    statements,
)
from tests.client.rows import put

Conn = psycopg.Connection[Any]
Notified = Callable[[Conn], list[tuple[str, str]]]
LATER = datetime(2050, 1, 1, tzinfo=UTC)


def one_in_each_state(client: Roost, observer: Conn) -> dict[str, int]:
    jobs = {}
    for state in ("available", "executing", "retryable", "completed", "discarded", "cancelled"):
        jobs[state] = client.enqueue("a")
        if state == "cancelled":
            client.cancel(jobs[state])
        elif state != "available":
            put(observer, jobs[state], state)
    jobs["scheduled"] = client.enqueue("a", scheduled_at=LATER)
    return jobs


def places(observer: Conn, job_id: int) -> list[str]:
    """The narrow tables that hold the job: one for a job that waits or runs, none for a finished one."""
    found = []
    for table in ("ready", "scheduled", "claims"):
        query: Any = f"SELECT count(*) FROM roost.{table} WHERE job_id = %s"
        row = observer.execute(query, (job_id,)).fetchone()
        found += [table] * (row["count"] if row else 0)
    return found


def test_cancel_by_state(client: Roost, observer: Conn) -> None:
    jobs = one_in_each_state(client, observer)
    after = {state: client.cancel(job_id) for state, job_id in jobs.items()}
    assert after == {
        "available": "cancelled",
        "scheduled": "cancelled",
        "retryable": "cancelled",
        "cancelled": "cancelled",
        "executing": "executing",
        "completed": "completed",
        "discarded": "discarded",
    }
    for state in ("available", "scheduled", "retryable"):
        job = client.get_job(jobs[state])
        assert (job.state, job.cancel_requested) == (JobState.CANCELLED, True)
        assert job.cancelled_at is not None
        assert places(observer, job.id) == []
    running = client.get_job(jobs["executing"])
    assert (running.state, running.cancel_requested, running.cancelled_at) == (JobState.EXECUTING, True, None)


def test_a_worker_is_told_of_a_cancel_only_of_a_running_job(
    client: Roost, observer: Conn, dsn: str, notified: Notified
) -> None:
    jobs = one_in_each_state(client, observer)
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN roost_cancel_requested")
        for job_id in jobs.values():
            client.cancel(job_id)
        assert notified(listener) == [("roost_cancel_requested", str(jobs["executing"]))]


def test_retry_by_state(client: Roost, observer: Conn) -> None:
    jobs = one_in_each_state(client, observer)
    for state in ("available", "retryable", "discarded", "cancelled", "scheduled"):
        before = client.get_job(jobs[state])
        assert client.retry(jobs[state]) == ("available" if state == "scheduled" else state)
        job = client.get_job(jobs[state])
        assert places(observer, job.id) == ["ready"]
        assert job.state == ("retryable" if state == "retryable" else "available")
        assert job.scheduled_at < datetime.now(UTC)
        assert (job.discarded_at, job.cancelled_at) == (None, None)
        assert job.errors == before.errors
        if state in ("discarded", "cancelled"):
            assert (job.attempt, job.cancel_requested) == (0, False)
        if state == "retryable":
            assert job.attempt == before.attempt
    for state in ("completed", "executing"):
        with pytest.raises(JobStateError, match=f"it is {state}") as refused:
            client.retry(jobs[state])
        assert refused.value.state == state
        assert client.get_job(jobs[state]).state == state


def test_a_job_that_does_not_exist(client: Roost) -> None:
    for operation in (client.cancel, client.retry, client.get_job):
        for job_id in (0, -1, 10**15):
            with pytest.raises(JobNotFoundError, match=str(job_id)):
                operation(job_id)
        bad: Any
        for bad in ("1", 1.0, True, None, 2**63):
            with pytest.raises(InvalidJobError) as refused:
                operation(bad)
            assert refused.value.path == "job_id"


def test_list_jobs_filters_and_pages(client: Roost, observer: Conn) -> None:
    jobs = one_in_each_state(client, observer)
    other = client.enqueue("b", queue="q")
    ids = [*jobs.values(), other]
    assert [job.id for job in client.list_jobs()] == ids[::-1]
    assert [job.id for job in client.list_jobs(queue="q")] == [other]
    assert [job.id for job in client.list_jobs(task="b")] == [other]
    assert client.list_jobs(task="b", queue="default") == []
    for state in JobState:
        found = [job.id for job in client.list_jobs(state=state, queue="default")]
        assert found == sorted((jobs[name] for name in jobs if client.get_job(jobs[name]).state == state), reverse=True)
    page = client.list_jobs(limit=3)
    rest = client.list_jobs(before_id=page[-1].id)
    assert [job.id for job in page + rest] == ids[::-1]
    assert [job.state for job in client.list_jobs(state="executing")] == [JobState.EXECUTING]


@pytest.mark.parametrize(
    ("path", "keywords"),
    [
        ("queue", {"queue": ""}),
        ("task", {"task": 3}),
        ("state", {"state": "running"}),
        ("state", {"state": 3}),
        ("limit", {"limit": 0}),
        ("limit", {"limit": "10"}),
        ("before_id", {"before_id": -1}),
        ("before_id", {"before_id": "x"}),
    ],
)
def test_list_jobs_refuses_a_bad_filter(path: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(InvalidJobError) as refused:
        Roost("host=/nonexistent").list_jobs(**keywords)
    assert refused.value.path == path


def test_arguments_that_python_cannot_read_do_not_hide_the_job(client: Roost, observer: Conn) -> None:
    observer.execute("SELECT roost.enqueue('a', '{\"x\": 1e5000}')")
    observer.execute("SELECT roost.enqueue('b', ('{\"x\": ' || repeat('[', 5000) || repeat(']', 5000) || '}')::jsonb)")
    deep, large = client.list_jobs()
    assert large.args == {"x": "1" + "0" * 5000}
    assert deep.args["unreadable"] == "nested too deeply"
    assert client.get_job(deep.id).task == "b"


def test_status_counts_each_queue_and_state(client: Roost, observer: Conn) -> None:
    assert client.status() == {}
    one_in_each_state(client, observer)
    client.enqueue_many([JobInsert("a", queue="q")] * 3)
    (running,) = client.list_jobs(limit=1)
    put(observer, running.id, "executing")
    zero = dict.fromkeys(JobState, 0)
    assert client.status() == {
        "default": {**dict.fromkeys(JobState, 1), JobState.AVAILABLE: 2},
        "q": {**zero, JobState.AVAILABLE: 2, JobState.EXECUTING: 1},
    }


def test_pause_and_resume_are_idempotent_and_told(client: Roost, observer: Conn, dsn: str, notified: Notified) -> None:
    observer.execute("INSERT INTO roost.idle_workers VALUES (gen_random_uuid(), true, '{emails}')")
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN roost_queue_changed")
        listener.execute("LISTEN roost_inserted")
        client.pause_queue("emails")
        first = observer.execute("SELECT * FROM roost.queues").fetchone()
        client.pause_queue("emails")
        second = observer.execute("SELECT * FROM roost.queues").fetchone()
        assert first is not None
        assert second is not None
        assert first["paused"]
        assert first["paused_at"] == second["paused_at"]
        assert set(notified(listener)) == {("roost_queue_changed", "emails")}
        for _ in range(2):
            client.resume_queue("emails")
            assert notified(listener) == [("roost_queue_changed", "emails"), ("roost_inserted", "emails")]
    third = observer.execute("SELECT * FROM roost.queues").fetchone()
    assert third is not None
    assert (third["paused"], third["paused_at"]) == (False, None)


def test_a_bad_queue_name_is_refused(client: Roost) -> None:
    for operation in (client.pause_queue, client.resume_queue):
        bad: Any
        for bad in ("", "q" * 129, "a\0", None):
            with pytest.raises(InvalidJobError):
                operation(bad)


def worker(observer: Conn, hostname: str = "web1", **columns: Any) -> UUID:
    worker_id = uuid4()
    observer.execute(
        "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, inflight, metadata)"
        " VALUES (%s, 'main', %s, 17, '{idle,emails}', 4, 2, '{\"reload\": {\"ok\": true}}')",
        (worker_id, hostname),
    )
    return worker_id


def test_list_queues_counts_what_waits_and_runs(client: Roost, observer: Conn) -> None:
    one_in_each_state(client, observer)
    client.pause_queue("paused")
    client.enqueue("a", queue="paused")
    worker(observer)
    assert [(q.name, q.paused, q.available, q.scheduled, q.executing) for q in client.list_queues()] == [
        ("default", False, 1, 2, 1),
        ("emails", False, 0, 0, 0),
        ("idle", False, 0, 0, 0),
        ("paused", True, 1, 0, 0),
    ]


def test_list_workers_reads_every_column(client: Roost, observer: Conn) -> None:
    assert client.list_workers() == []
    worker_id = worker(observer)
    (found,) = client.list_workers()
    assert (found.id, found.name, found.hostname, found.pid) == (worker_id, "main", "web1", 17)
    assert (found.queues, found.concurrency, found.inflight) == (("idle", "emails"), 4, 2)
    assert found.metadata == {"reload": {"ok": True}}
    assert found.reload_request is None
    assert found.started_at.utcoffset() is not None
    assert found.last_seen_at >= found.started_at


def test_request_reload_marks_and_tells_the_workers_asked(
    client: Roost, observer: Conn, dsn: str, notified: Notified
) -> None:
    one, two, other = worker(observer), worker(observer), worker(observer, "web2")
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN roost_reload")
        asked: tuple[tuple[dict[str, Any], set[UUID]], ...] = (
            ({}, {one, two, other}),
            ({"hostname": "web2"}, {other}),
            ({"worker_ids": [one, str(two)]}, {one, two}),
            ({"worker_ids": [one, other], "hostname": "web1"}, {one}),
        )
        for keywords, expected in asked:
            request = client.request_reload(**keywords)
            assert {w.id for w in client.list_workers() if w.reload_request == request} == expected
            assert {UUID(payload) for _, payload in notified(listener)} == expected
    nobodies: tuple[dict[str, Any], ...] = ({"hostname": "web3"}, {"worker_ids": [uuid4()]}, {"worker_ids": []})
    for nobody in nobodies:
        with pytest.raises(RoostError, match="no such worker"):
            client.request_reload(**nobody)
    with pytest.raises(InvalidJobError) as refused:
        client.request_reload(worker_ids=[one, "x"])
    assert refused.value.path == "worker_ids[1]"


def test_requeue_discarded_starts_jobs_again(client: Roost, observer: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "BATCH_SIZE", 4)
    for queue in ("default", "emails"):
        client.enqueue_many([JobInsert("ab"[n % 2], queue=queue) for n in range(10)])
    untouched = client.enqueue("a")
    for job in client.list_jobs():
        if job.id != untouched:
            put(observer, job.id, "discarded")
    assert client.count_discarded() == 20
    assert client.count_discarded("emails", "a") == 5

    assert client.requeue_discarded("emails", "a") == 5
    assert (client.count_discarded("emails"), client.count_discarded("default")) == (5, 10)
    assert client.requeue_discarded(limit=6) == 6
    seen: list[int] = []
    left = client.count_discarded()
    assert client.requeue_discarded(progress=seen.append) == left
    assert seen == [*range(4, left, 4), left]
    assert client.requeue_discarded() == client.count_discarded() == 0
    for job in client.list_jobs():
        assert (job.state, job.attempt, job.cancel_requested, job.discarded_at) == ("available", 0, False, None)
        assert places(observer, job.id) == ["ready"]
        assert job.errors == ([] if job.id == untouched else [{"error": "no"}])
    row = observer.execute("SELECT max(crashes) FROM roost.job_rows").fetchone()
    assert row == {"max": 0}
    assert client.status()["emails"][JobState.AVAILABLE] == 10


def test_requeue_passes_over_what_another_holds(client: Roost, observer: Conn, conn: Conn) -> None:
    held, free = client.enqueue("a"), client.enqueue("a")
    for job_id in (held, free):
        put(observer, job_id, "discarded")
    conn.execute("SELECT FROM roost.job_rows WHERE id = %s FOR UPDATE", (held,))
    assert client.requeue_discarded() == 1
    assert client.get_job(free).state == JobState.AVAILABLE
    conn.rollback()
    assert client.requeue_discarded() == 1


def test_two_requeues_at_once_requeue_each_job_once(dsn: str, observer: Conn) -> None:
    with Roost(dsn) as roost:
        roost.enqueue_many([JobInsert("a")] * 3000)
        observer.execute("DELETE FROM roost.ready")
        observer.execute("UPDATE roost.job_rows SET state = 'discarded', discarded_at = now()")
        counts: list[int] = []
        threads = [threading.Thread(target=lambda: counts.append(roost.requeue_discarded())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(counts) == 3000
        assert roost.list_queues()[0].available == 3000


def test_requeue_refuses_a_bad_filter() -> None:
    roost = Roost("host=/nonexistent")
    refused: tuple[dict[str, Any], ...] = ({"limit": 0}, {"limit": True}, {"queue": ""}, {"task": 5})
    for keywords in refused:
        with pytest.raises(InvalidJobError, match="cannot requeue discarded jobs"):
            roost.requeue_discarded(**keywords)


def test_the_progress_of_a_requeue_may_use_the_client(roost: Roost, observer: Conn) -> None:
    put(observer, roost.enqueue("a"), "discarded")
    seen: list[int] = []
    roost.requeue_discarded(progress=lambda count: seen.append(roost.status()["default"][JobState.AVAILABLE]))
    assert seen == [1]
