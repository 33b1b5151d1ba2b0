"""The daemon archives finished jobs, clears results and empties the archive, beside its work and through kills."""

from __future__ import annotations

import random
import signal

import pytest

from tests.system.conftest import StartDaemon
from tests.system.daemon import eventually
from tests.system.jobs import Jobs

QUICK = {"archive_interval": 0.2}


def test_finished_jobs_are_archived_and_still_found(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"worker": {**QUICK, "archive_after_seconds": 0.5}})
    done, failed = jobs.add("echo", {"value": [1]}), jobs.add("fail", max_attempts=1)
    waiting = jobs.add("noop", queue="nobody's")
    daemon.wait_for("housekeeping.done", archived=lambda number: number > 0)
    eventually(lambda: not jobs.query("SELECT 1 FROM roost.jobs WHERE id = ANY (%s)", [done, failed]), "archived jobs")
    assert (jobs.get(done).state, jobs.get(done).result) == ("completed", [1])
    assert jobs.roost.wait_for(failed, raise_on_failure=False).state == "discarded"
    assert jobs.get(waiting).state == "available"
    assert len(jobs.query("SELECT 1 FROM roost.jobs")) == 1


def test_results_are_cleared_and_the_archive_is_emptied(start_daemon: StartDaemon, jobs: Jobs) -> None:
    start_daemon({"worker": {**QUICK, "result_ttl_seconds": 0.3}})
    job_id = jobs.add("echo", {"value": [1]})
    jobs.wait(job_id)
    eventually(lambda: jobs.get(job_id).result is None, "cleared result")
    assert jobs.get(job_id).state == "completed"
    start_daemon({"worker": {**QUICK, "archive_after_seconds": 0, "archive_delete_after_seconds": 0.3}})
    eventually(
        lambda: not jobs.query("SELECT 1 FROM roost.jobs UNION ALL SELECT 1 FROM roost.jobs_archive"), "deletion"
    )


def test_without_the_settings_nothing_is_done_and_a_reload_turns_it_on(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"worker": QUICK})
    job_id = jobs.add("noop")
    jobs.wait(job_id)
    assert not daemon.entries("housekeeping.done")
    assert not jobs.query(
        "SELECT 1 FROM pg_stat_activity WHERE application_name = 'roostd housekeeping' AND datname = current_database()"
    )
    daemon.write_config({"worker": {"archive_after_seconds": 0}})
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("housekeeping.done", archived=1)


@pytest.mark.timeout(300)
def test_kills_in_the_middle_lose_and_double_nothing(start_daemon: StartDaemon, jobs: Jobs) -> None:
    total = 60_000
    jobs.query(
        "INSERT INTO roost.job_rows (task, state, completed_at)"
        " SELECT 'noop', 'completed', now() - interval '1 hour' FROM generate_series(1, %s)",
        total,
    )
    settings = {"worker": {"archive_interval": 0.05, "archive_after_seconds": 60, "result_ttl_seconds": 30}}
    daemons = [start_daemon(settings), start_daemon(settings)]
    dice = random.Random(5)

    def moved() -> int:
        (row,) = jobs.query("SELECT count(*) AS number FROM roost.jobs_archive")
        return int(row["number"])

    for kill in range(1, 7):
        threshold = kill * total // 8
        eventually(lambda least=threshold: moved() >= least, f"{threshold} archived jobs")  # type: ignore[misc]
        daemon = dice.choice(daemons)
        daemon.signal(signal.SIGKILL)
        daemon.wait_exit()
        daemon.start().wait_ready()
    eventually(lambda: moved() == total, "archive of all")
    assert jobs.query("SELECT count(*) AS left FROM roost.job_rows") == [{"left": 0}]
    assert jobs.query("SELECT count(DISTINCT id) AS ids FROM roost.jobs_archive") == [{"ids": total}]
