"""How jobs end other than by success: retries, crashes, timeouts, cancels, snoozes, and the limits of a child."""

from __future__ import annotations

import signal
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from roost_client import Job
from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon, eventually, is_alive
from tests.system.jobs import Jobs

SETTINGS = {
    "worker": {"error_cap": 3},
    "pools": {
        "default": {"queues": ["default"], "concurrency": 2},
        "recycled": {"queues": ["recycled"], "concurrency": 2, "max_jobs_per_child": 5},
        "lean": {"queues": ["lean"], "concurrency": 1, "max_rss_bytes": "128M"},
        "limited": {"queues": ["limited"], "concurrency": 1, "memory_limit_bytes": "512M"},
    },
}


# -- retries


def test_a_failed_job_runs_again_after_the_delay_of_the_strategy_in_force(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon()
    for strategy, delays in [
        ({"strategy": "exponential", "base": 3, "jitter": False, "cap": 20, "delay": None}, [3, 9, 20]),
        ({"strategy": "linear", "step": 7, "cap": 20, "base": None, "jitter": None}, [7, 14, 20]),
        ({"strategy": "fixed", "delay": 42, "step": None, "cap": None}, [42, 42, 42]),
    ]:
        reload_with(daemon, {"worker": {"retry_strategy": strategy}})
        job_id = jobs.add("fail", max_attempts=4)
        for attempt, delay in enumerate(delays, 1):
            job = jobs.wait(job_id, "retryable")
            assert (job.attempt, delay_of(job)) == (attempt, delay)
            jobs.roost.retry(job_id)  # not to wait for it
            eventually(lambda seen=attempt, id=job_id: jobs.get(id).attempt > seen, f"attempt after {attempt}")  # type: ignore[misc]
        job = jobs.wait(job_id)
        assert (job.state, job.attempt) == ("discarded", 4)

    reload_with(daemon, {"worker": {"retry_strategy": {"strategy": "exponential", "base": 3, "delay": None}}})
    jittered = [jobs.add("fail") for _ in range(20)]
    found = {delay_of(jobs.wait(job, "retryable")) for job in jittered}
    assert all(2.7 <= delay <= 3 for delay in found)
    assert len(found) > 1


def test_errors_are_kept_up_to_the_cap_the_newest_ones(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job = shared_jobs.wait(shared_jobs.add("fail", {"text": "no luck"}, max_attempts=5))
    assert (job.state, job.attempt) == ("discarded", 5)
    assert [entry["attempt"] for entry in job.errors] == [3, 4, 5]
    assert {entry["error"] for entry in job.errors} == {"ValueError: no luck"}
    assert job.discarded_at is not None
    assert job.completed_at is None


def test_a_job_that_fails_first_completes_in_the_end(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job = shared_jobs.wait(shared_jobs.add("fail_first", {"key": "fails first", "times": 2}))
    assert (job.state, job.attempt, job.result, len(job.errors)) == ("completed", 3, 3, 2)


def test_a_job_whose_process_crashes_three_times_is_discarded_with_attempts_left(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    crashing = shared_jobs.add("signal_to_self", {"number": signal.SIGKILL}, max_attempts=20)
    recovering = shared_jobs.add("crash_first", {"key": "crashes first", "times": 2})
    mixed = shared_jobs.add("fail", max_attempts=6)  # errors are no crashes
    job = shared_jobs.wait(crashing)
    assert (job.state, job.attempt, shared_jobs.crashes(crashing)) == ("discarded", 3, 3)
    job = shared_jobs.wait(recovering)
    assert (job.state, job.attempt, job.result, shared_jobs.crashes(recovering)) == ("completed", 3, 3, 2)
    assert shared_jobs.wait(mixed).attempt == 6


def test_crashing_jobs_cost_the_jobs_behind_them_nothing(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    shared_jobs.wait_all(shared_jobs.add_many(500, "noop"))  # now short jobs are handed over many at a time
    good, bad = [], []
    for _ in range(5):
        good += shared_jobs.add_many(40, "noop")
        bad += shared_jobs.add_many(1, "os_exit", {"status": 3}, max_attempts=1)
    shared_jobs.wait_all(good)
    shared_jobs.wait_all(bad, "discarded")
    assert shared_jobs.query("SELECT id, errors::text FROM roost.jobs WHERE id = ANY (%s) AND attempt <> 1", good) == []


# -- timeouts


def test_a_timeout_that_the_handler_swallows_is_still_a_timeout(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job = shared_jobs.wait(shared_jobs.add("swallow_once", {"key": "late"}, timeout_seconds=1, max_attempts=1))
    assert job.state == "discarded"
    assert job.errors[0]["error"].startswith("TimeoutError: ")
    assert "caught the exception and returned" in job.errors[0]["error"]
    assert "late swallowed TimeoutError" in shared_daemon.notes()


def test_a_job_within_its_timeout_is_left_alone(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job = shared_jobs.wait(shared_jobs.add("sleep", {"seconds": 0.5}, timeout_seconds=60))
    assert (job.state, job.attempt) == ("completed", 1)


def test_a_timed_out_job_is_killed_no_sooner_than_its_grace(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job = shared_jobs.wait(shared_jobs.add("deaf", timeout_seconds=1, max_attempts=1))
    assert job.attempted_at is not None
    assert job.discarded_at is not None
    assert job.discarded_at - job.attempted_at >= timedelta(seconds=1.5)


# -- cancels


def test_a_waiting_job_is_cancelled_at_once(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    later = shared_jobs.add("noop", scheduled_at=datetime.now(UTC) + timedelta(hours=1))
    assert shared_jobs.roost.cancel(later) == "cancelled"
    job = shared_jobs.get(later)
    assert job.state == "cancelled"
    assert job.cancelled_at is not None


def test_a_running_job_may_clean_up_when_it_is_cancelled(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job_id = shared_jobs.add("hold_cleanly", {"key": "tidy"})
    shared_daemon.wait_started("tidy")
    assert shared_jobs.roost.cancel(job_id) == "executing"
    job = shared_jobs.wait(job_id)
    assert (job.state, job.attempt, job.cancel_requested) == ("cancelled", 1, True)
    assert job.errors[0]["error"].startswith("JobCancelled")
    assert "in hold" in job.errors[0]["trace"]
    assert shared_daemon.notes().count("tidy cleaned up") == 1


def test_a_cancelled_coroutine_sees_cancelled_error(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job_id = shared_jobs.add("coroutine", {"seconds": 3600, "key": "coroutine"})
    shared_daemon.wait_started("coroutine")
    shared_jobs.roost.cancel(job_id)
    assert shared_jobs.wait(job_id).state == "cancelled"
    assert "coroutine saw CancelledError" in shared_daemon.notes()


def test_a_job_that_swallows_its_cancel_ends_cancelled(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job_id = shared_jobs.add("swallow_once", {"key": "stubborn"})
    shared_daemon.wait_started("stubborn")
    shared_jobs.roost.cancel(job_id)
    job = shared_jobs.wait(job_id)
    assert (job.state, job.result) == ("cancelled", None)
    assert "stubborn swallowed JobCancelled" in shared_daemon.notes()


@pytest.mark.parametrize("task", ["deaf", "stuck_in_c"])
def test_a_job_that_cannot_hear_its_cancel_is_killed_and_ends_cancelled(
    shared_daemon: Daemon, shared_jobs: Jobs, task: str
) -> None:
    job_id = shared_jobs.add(task, {"key": task})
    shared_daemon.wait_started(task)
    shared_jobs.roost.cancel(job_id)
    job = shared_jobs.wait(job_id)
    assert (job.state, job.attempt) == ("cancelled", 1)
    assert job.errors[0]["error"] == "JobCancelled: did not stop when cancelled, and was killed"
    assert shared_jobs.crashes(job_id) == 0


def test_a_cancel_hits_the_job_that_is_meant_and_no_other(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    number = 300
    ids = [shared_jobs.add("note", {"line": f"quick {i}", "seconds": 0.003}) for i in range(number)]
    for job_id in ids[::2]:
        shared_jobs.roost.cancel(job_id)
    shared_jobs.wait_all(ids, "completed", "cancelled")
    ran = Counter(shared_daemon.notes())
    for i, job_id in enumerate(ids):
        job = shared_jobs.get(job_id)
        if i % 2:
            assert (job.state, job.attempt, job.errors) == ("completed", 1, [])
        assert ran[f"quick {i}"] <= 1


# -- snoozes


def test_a_snoozed_job_runs_later_and_the_attempt_does_not_count(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    job = shared_jobs.wait(shared_jobs.add("snooze", {"key": "tired", "times": 3, "seconds": 0}, max_attempts=1))
    assert (job.state, job.attempt, job.result, job.errors) == ("completed", 1, 4, [])
    later = shared_jobs.add("snooze", {"key": "asleep", "times": 1, "seconds": 3600})
    eventually(lambda: "asleep" in shared_daemon.notes(), "first run")
    job = shared_jobs.wait(later, "available")
    assert job.attempt == 0
    assert job.scheduled_at > datetime.now(UTC) + timedelta(minutes=50)


# -- what else handlers may do


def test_handlers_may_be_coroutines_use_models_and_enqueue(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    coroutine = shared_jobs.add("coroutine", {"seconds": 0.01})
    typed = shared_jobs.add("typed", {"number": 7, "note": "thanks"})
    value: dict[str, Any] = {"deep": [1, 2.5, None, True, "ünï ☃ 𝕏"], "": {}}
    echo = shared_jobs.add("echo", {"value": value})
    parent = shared_jobs.add("enqueue_more", {"dsn": shared_jobs.dsn, "task": "whoami"})
    assert shared_jobs.wait(coroutine).result == "awaited"
    assert shared_jobs.wait(typed).result == "7 thanks"
    assert shared_jobs.wait(echo).result == value
    child = int(shared_jobs.wait(parent).result or 0)
    assert shared_jobs.wait(child).state == "completed"


def test_names_are_just_characters(start_daemon: StartDaemon, jobs: Jobs) -> None:
    queue = 'a\'; DROP TABLE roost.jobs; -- "q".☃\n' + "x" * 80
    start_daemon({"pools": {"odd": {"queues": [queue, "."], "concurrency": 1}, "default": None}})
    ids = [jobs.add("noop", queue=queue), jobs.add("noop", queue=".")]
    jobs.wait_all(ids)
    odd_task = jobs.add("'☃\"; -- \n" + "t" * 100, queue=queue, max_attempts=1)
    assert "UnknownTaskError" in jobs.wait(odd_task).errors[0]["error"]


# -- limits of a child


def test_a_child_is_replaced_after_max_jobs_per_child(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    since = shared_daemon.mark()
    ids = shared_jobs.add_many(200, "whoami", queue="recycled")
    shared_jobs.wait_all(ids)
    ran = Counter(shared_jobs.get(job_id).result for job_id in ids)
    assert max(ran.values()) <= 5
    assert shared_jobs.query("SELECT id FROM roost.jobs WHERE id = ANY (%s) AND attempt <> 1", ids) == []
    assert shared_daemon.entries("job.ended", since=since) == []


def test_a_child_above_max_rss_is_replaced_after_its_job(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    small = [shared_jobs.wait(shared_jobs.add("fill_memory", {"size": 1}, queue="lean")).result for _ in range(3)]
    assert len(set(small)) == 1
    large = shared_jobs.wait(shared_jobs.add("fill_memory", {"size": 200_000_000}, queue="lean"))
    assert (large.state, large.attempt, large.result) == ("completed", 1, small[0])
    assert shared_jobs.wait(shared_jobs.add("whoami", queue="lean")).result != small[0]
    eventually(lambda: not is_alive(int(small[0] or 0)), "end of the large child")


def test_a_job_beyond_the_memory_limit_sees_memory_error(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    before = shared_jobs.wait(shared_jobs.add("whoami", queue="limited")).result
    large = shared_jobs.add("fill_memory", {"size": 1 << 30}, queue="limited", max_attempts=1)
    job = shared_jobs.wait(large)
    assert job.state == "discarded"
    assert job.errors[0]["error"].startswith("MemoryError")
    assert shared_jobs.wait(shared_jobs.add("whoami", queue="limited")).result == before


def delay_of(job: Job) -> float:
    """Seconds from the job's last error to its next run: both are the database's time of the same statement."""
    return (job.scheduled_at - datetime.fromisoformat(job.errors[-1]["at"])).total_seconds()


def reload_with(daemon: Daemon, settings: dict[str, Any]) -> None:
    daemon.write_config(settings)
    since = daemon.mark()
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reload.done", since=since)
