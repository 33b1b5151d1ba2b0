"""A transaction that has asked for the cancel of a running job and stays open holds up that job alone."""

from __future__ import annotations

import time

import psycopg
import pytest

from tests.system.conftest import StartDaemon
from tests.system.jobs import Jobs

SETTINGS = {
    "pools": {"default": {"queues": ["default"], "concurrency": 3}},
    "worker": {"shutdown_timeout": 0.1, "orphan_reaper_interval": 0.2, "retry_strategy": {"delay": 3600}},
}


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_other_jobs_complete_while_a_cancel_is_open_and_what_was_asked_for_holds_after_it(
    start_daemon: StartDaemon, jobs: Jobs, commits: bool
) -> None:
    daemon = start_daemon(SETTINGS)
    completes = jobs.add("hold", {"key": "completes"})
    fails = jobs.add("hold_and_fail", {"key": "fails"})
    daemon.wait_started("completes", "fails")
    with psycopg.connect(jobs.dsn) as app:
        for job_id in (completes, fails):
            assert app.execute("SELECT roost.cancel(%s)", (job_id,)).fetchone() == ("executing",)
        daemon.let_go("completes", "fails")
        for job_id in (completes, fails):
            daemon.wait_for("outcomes.locked", jobs=lambda ids, job_id=job_id: job_id in ids)
        jobs.wait_all(jobs.add_many(200, "noop"))
        assert [jobs.get(job_id).state for job_id in (completes, fails)] == ["executing"] * 2
        app.commit() if commits else app.rollback()
    completed, failed = jobs.wait(completes), jobs.wait(fails, "cancelled" if commits else "retryable")
    assert (completed.state, completed.attempt, completed.cancel_requested) == ("completed", 1, commits)
    assert (len(failed.errors), failed.attempt, failed.cancel_requested) == (1, 1, commits)
    assert not daemon.entries("outcomes.kept")
    assert jobs.query("SELECT true FROM roost.claims") == []


def test_a_worker_stops_in_time_while_a_cancel_is_open_and_the_job_is_cancelled_after_it(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon(SETTINGS)
    job_id = jobs.add("hold", {"key": "held"})
    daemon.wait_started("held")
    with psycopg.connect(jobs.dsn) as app:
        app.execute("SELECT roost.cancel(%s)", (job_id,))
        started_at = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started_at < 20
        daemon.wait_for("outcomes.unwritten", pending=1, locked_jobs=[job_id])
        assert jobs.query("SELECT true FROM roost.workers") == []
        daemon.start().wait_ready()  # which does not wait for the lock either
        jobs.wait_all(jobs.add_many(20, "noop"))
        app.commit()
    assert jobs.wait(job_id).state == "cancelled"
