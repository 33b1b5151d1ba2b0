"""Which job runs when: order, nothing behind a long job, paused queues, due jobs, and pickup without notifications."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta

import psycopg

from roost_client import Job, JobInsert
from tests.system.conftest import StartDaemon
from tests.system.daemon import eventually, is_alive
from tests.system.jobs import Jobs

ONE_CHILD = {"pools": {"default": {"queues": ["default", "other"], "concurrency": 1}}}


def teach_that_jobs_are_short(jobs: Jobs) -> None:
    """After this, jobs are claimed and handed to children many at a time."""
    jobs.wait_all(jobs.add_many(1000, "noop"))


def test_jobs_run_in_order_of_priority_then_time_then_id(start_daemon: StartDaemon, jobs: Jobs) -> None:
    now = datetime.now(UTC)
    order = []
    with psycopg.connect(jobs.dsn) as conn:  # one transaction: all are there before the first is claimed
        for number in range(200):
            priority, seconds_ago = number * 7 % 5 - 2, number * 11 % 3
            due = now - timedelta(seconds=seconds_ago)
            options = {"priority": priority, "scheduled_at": due, "conn": conn}
            order.append((priority, due, jobs.add("note", {"line": str(number)}, **options), str(number)))
    daemon = start_daemon(ONE_CHILD)
    jobs.wait_all([job_id for _, _, job_id, _ in order])
    assert daemon.notes() == [line for *_, line in sorted(order)]


def test_short_jobs_do_not_wait_behind_long_ones(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    teach_that_jobs_are_short(jobs)
    for turn in range(5):
        with psycopg.connect(jobs.dsn) as conn:
            long = jobs.add("hold", {"key": f"long-{turn}"}, conn=conn)
            jobs.roost.enqueue_many([JobInsert("noop", metadata={"turn": turn})] * 300, conn=conn)
        short = [
            row["id"] for row in jobs.query("SELECT id FROM roost.jobs WHERE metadata @> %s", f'{{"turn": {turn}}}')
        ]
        jobs.wait_all(short)
        assert jobs.get(long).state == "executing"
        daemon.let_go(f"long-{turn}")
        assert jobs.wait(long).attempt == 1
        assert jobs.query("SELECT id FROM roost.jobs WHERE id = ANY (%s) AND attempt <> 1", short) == []


def test_a_worker_whose_children_are_busy_leaves_the_rest_to_others(start_daemon: StartDaemon, jobs: Jobs) -> None:
    busy = start_daemon(ONE_CHILD)
    teach_that_jobs_are_short(jobs)
    with psycopg.connect(jobs.dsn) as conn:
        long = jobs.add("hold", {"key": "long"}, conn=conn)
        short = [jobs.add("whoami", conn=conn) for _ in range(50)]
    busy.wait_started("long")
    other = start_daemon(ONE_CHILD)
    jobs.wait_all(short)
    (worker,) = other.wait_children(1)
    assert {jobs.get(job_id).result for job_id in short} == {worker}
    assert jobs.get(long).state == "executing"
    assert jobs.query("SELECT id FROM roost.jobs WHERE id = ANY (%s) AND attempt <> 1", short) == []
    busy.let_go("long")
    jobs.wait(long, "completed")


def test_claimed_jobs_of_a_paused_queue_go_back_and_the_running_one_ends(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon(ONE_CHILD)
    ids = claim_ahead(jobs, "other")
    jobs.roost.pause_queue("other")
    eventually(lambda: jobs.query("SELECT 1 FROM roost.claims") == [], "end of the claims")
    ran = daemon.notes()
    assert 0 < len(ran) < len(ids)
    assert [jobs.get(job_id).state for job_id in ids] == ["completed"] * len(ran) + ["available"] * (
        len(ids) - len(ran)
    )
    assert {jobs.get(job_id).attempt for job_id in ids[len(ran) :]} == {0}

    jobs.wait(jobs.add("noop"), "completed")  # the pool's other queue is not paused
    assert daemon.notes() == ran
    jobs.roost.resume_queue("other")
    jobs.wait(ids[len(ran)], "completed")
    for job_id in ids:
        jobs.roost.cancel(job_id)  # the rest, not to wait for it
    jobs.wait_all(ids, "completed", "cancelled")
    assert {jobs.get(job_id).attempt for job_id in ids[: len(ran) + 1]} == {1}


def test_a_claimed_job_that_has_not_started_is_cancelled_and_never_runs(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon(ONE_CHILD)
    ids = claim_ahead(jobs, "default")
    for job_id in ids[::-2]:
        jobs.roost.cancel(job_id)
    jobs.wait_all(ids, "completed", "cancelled")
    states = [jobs.get(job_id).state for job_id in ids]
    assert daemon.notes() == [str(number) for number, state in enumerate(states) if state == "completed"]
    assert states.count("cancelled") > 10
    assert set(states[0::2]) == {"completed"}


def test_a_child_that_is_stopped_while_idle_keeps_no_job(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon(ONE_CHILD)
    (stopped,) = daemon.wait_children(1)
    os.kill(stopped, signal.SIGSTOP)
    ran = jobs.wait(jobs.add("whoami"))
    assert ran.result != stopped
    assert (ran.attempt, jobs.crashes(ran.id)) == (1, 0)
    eventually(lambda: not is_alive(stopped), "end of the stopped child")
    assert len(daemon.wait_children(1)) == 1


def claim_ahead(jobs: Jobs, queue: str) -> list[int]:
    """Jobs of 50 ms each that were taken for short ones: the only child runs the first, the others are claimed."""
    teach_that_jobs_are_short(jobs)
    with psycopg.connect(jobs.dsn) as conn:
        ids = [jobs.add("note", {"line": str(number), "seconds": 0.05}, queue=queue, conn=conn) for number in range(40)]
    eventually(lambda: len(jobs.query("SELECT 1 FROM roost.claims")) > 20, "jobs that are claimed ahead")
    return ids


def test_a_notification_brings_a_job_in_long_before_the_next_poll(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"worker": {"poll_interval": 60.0}})
    wait_idle(jobs)
    assert waited(jobs.wait(jobs.add("noop"))) < 10

    # And after the listening connection was lost, with the notifications of that time.
    since = daemon.mark()
    (listener,) = jobs.query("SELECT pid FROM pg_stat_activity WHERE application_name = 'roostd listen'")
    with psycopg.connect(jobs.dsn, autocommit=True) as conn:
        conn.execute("SELECT pg_terminate_backend(%s)", (listener["pid"],))
        job_id = jobs.add("noop", conn=conn)
    assert waited(jobs.wait(job_id)) < 10
    daemon.wait_for("listener.connected", since=since)


def test_a_job_is_picked_up_within_the_poll_interval_without_notifications(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    start_daemon({"worker": {"poll_interval": 1.0}})
    for _ in range(3):
        wait_idle(jobs)
        jobs.query("UPDATE roost.idle_workers SET idle = false")
        assert waited(jobs.wait(jobs.add("noop"))) < 3  # 1 s, and what a busy machine adds
        jobs.query("UPDATE roost.idle_workers SET idle = true")


def test_scheduled_jobs_and_retries_run_when_they_are_due(start_daemon: StartDaemon, jobs: Jobs) -> None:
    start_daemon({"worker": {"retry_strategy": {"delay": 1.0}}})
    due_at = datetime.now(UTC) + timedelta(seconds=1.5)
    scheduled = [jobs.add("noop", scheduled_at=due_at, priority=number % 3) for number in range(20)]
    failing = jobs.add("fail_first", {"key": "fails", "times": 1})
    jobs.wait_all([*scheduled, failing])
    for job in map(jobs.get, scheduled):
        assert job.attempted_at is not None
        assert timedelta(0) <= job.attempted_at - due_at < timedelta(seconds=3)
    job = jobs.get(failing)
    assert job.attempted_at is not None
    after_error = job.attempted_at - datetime.fromisoformat(job.errors[0]["at"])
    assert timedelta(seconds=1) <= after_error < timedelta(seconds=4)


def wait_idle(jobs: Jobs) -> None:
    """Returns when the daemon has asked for notifications."""
    eventually(lambda: jobs.query("SELECT 1 FROM roost.idle_workers WHERE idle"), "idle worker")


def waited(job: Job) -> float:
    """Seconds from the enqueue to the claim, both in the database's time."""
    assert job.state == "completed"
    assert job.attempted_at is not None
    return (job.attempted_at - job.inserted_at).total_seconds()
