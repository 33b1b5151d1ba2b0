"""Each section of the first operating guide, followed as it is written, with roostctl for its command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import psycopg
import pytest

from roost_client import Job
from roostd.config import Config
from tests.system.conftest import StartDaemon
from tests.system.daemon import COMMAND, Daemon, eventually
from tests.system.jobs import Jobs

# A job that has failed stays where it is, to be looked at.
SETTINGS = {
    "worker": {"retry_strategy": {"strategy": "fixed", "delay": 3600}},
    "pools": {
        "default": {"queues": ["default"], "concurrency": 1},
        "emails": {"queues": ["emails"], "concurrency": 1},
    },
}


def roostctl(jobs: Jobs, command: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [COMMAND.with_name("roostctl"), *command.split()],
        env={**os.environ, "ROOST_DSN": jobs.dsn},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"roostctl {command}: {done.stdout}{done.stderr}"
    return done.stdout


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def started(daemon: Daemon, key: str) -> Path:
    return eventually(lambda: file if (file := daemon.folder / f"{key}.started").exists() else None, f"start of {key}")


def test_queue_pause_halts_a_queue_without_its_workers_and_resume_lets_it_go_on(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    in_flight = shared_jobs.add("hold", {"key": "in-flight"}, queue="emails")
    started(shared_daemon, "in-flight")

    assert rows(roostctl(shared_jobs, "queue pause emails")) == [["QUEUE", "STATE"], ["emails", "paused"]]
    halted = shared_jobs.add("noop", queue="emails")
    assert ["emails", "paused", "1", "0", "1", "0"] in rows(roostctl(shared_jobs, "queue list"))

    (shared_daemon.folder / "in-flight.go").touch()
    assert shared_jobs.wait(in_flight).state == "completed"
    for _ in range(5):  # of another queue, which go on
        assert shared_jobs.wait(shared_jobs.add("noop")).state == "completed"
    assert (shared_jobs.get(halted).state, shared_jobs.get(halted).attempt) == ("available", 0)

    roostctl(shared_jobs, "queue resume emails")
    assert shared_jobs.wait(halted).state == "completed"
    assert [line[1] for line in rows(roostctl(shared_jobs, "queue list")) if line[0] == "emails"] == ["active"]


def test_cancel_moves_what_is_available_or_retryable_straight_to_cancelled(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    shared_jobs.query("SELECT setval(pg_get_serial_sequence('roost.job_rows', 'id'), 41)")
    available = shared_jobs.add("noop", queue="nobody serves this")
    assert available == 42
    retryable = shared_jobs.wait(shared_jobs.add("fail"), "retryable").id
    roostctl(shared_jobs, "cancel 42")
    roostctl(shared_jobs, f"cancel {retryable}")
    for job in map(shared_jobs.get, (available, retryable)):
        assert (job.state, job.cancelled_at is not None) == ("cancelled", True)


def test_cancel_of_an_executing_job_flips_its_flag_notifies_and_cancels_its_task(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    job_id = shared_jobs.add("coroutine", {"seconds": 3600, "key": "cancelled"})
    started(shared_daemon, "cancelled")
    with psycopg.connect(shared_jobs.dsn, autocommit=True) as listener:
        listener.execute("LISTEN roost_cancel_requested")
        roostctl(shared_jobs, f"cancel {job_id}")
        assert [notice.payload for notice in listener.notifies(timeout=30, stop_after=1)] == [str(job_id)]
    job = shared_jobs.wait(job_id)
    assert (job.state, job.cancel_requested) == ("cancelled", True)
    assert "cancelled saw CancelledError" in (shared_daemon.folder / "notes.txt").read_text().splitlines()


@pytest.mark.parametrize(("max_attempts", "state"), [(20, "retryable"), (1, "discarded")])
def test_a_job_that_times_out_is_retryable_or_discarded_with_the_error_recorded(
    shared_daemon: Daemon, shared_jobs: Jobs, max_attempts: int, state: str
) -> None:
    job_id = shared_jobs.add("coroutine", {"seconds": 3600}, timeout_seconds=1, max_attempts=max_attempts)
    job = shared_jobs.wait(job_id, state)
    assert [entry["error"].partition(":")[0] for entry in job.errors] == ["TimeoutError"]


def test_the_jobs_of_a_killed_worker_stay_executing_until_another_one_reaps_them(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    worker = Config().worker
    assert (worker.heartbeat_interval, worker.orphan_stale_after) == (15, 300)

    settings = {"worker": {"orphan_stale_after": 60}, "pools": {"default": {"queues": ["default"], "concurrency": 2}}}
    killed = start_daemon(settings)
    attempts_left = jobs.add("hold", {"key": "attempts-left"})
    last_attempt = jobs.add("hold", {"key": "last-attempt"}, max_attempts=1)
    for key in ("attempts-left", "last-attempt"):
        started(killed, key)
    # Its peer serves another queue, so that a job stays where the reaper puts it.
    peer = {"pools": {"default": {"queues": ["emails"], "concurrency": 1}}}
    # Long enough for a look at what has not happened yet, on a slow machine too.
    start_daemon(peer, "--orphan-stale-after", "5")
    before = {line[2] for line in rows(roostctl(jobs, "workers"))[1:]}
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait_exit()
    assert str(killed.pid) in before
    assert {jobs.get(job_id).state for job_id in (attempts_left, last_attempt)} == {"executing"}

    retryable = jobs.wait(attempts_left, "retryable")
    assert (retryable.attempt, due_at_once(jobs, retryable)) == (1, True)
    discarded = jobs.wait(last_attempt, "discarded")
    for job in (retryable, discarded):
        assert [entry["error"].partition(":")[0] for entry in job.errors] == ["WorkerCrash"]
    # The row of the dead is gone.
    assert {line[2] for line in rows(roostctl(jobs, "workers"))[1:]} == before - {str(killed.pid)}


def due_at_once(jobs: Jobs, job: Job) -> bool:
    (row,) = jobs.query("SELECT scheduled_at <= now() AS due FROM roost.jobs WHERE id = %s", job.id)
    return bool(row["due"])


def test_requeue_discarded_zeroes_the_attempts_and_clears_the_request_to_cancel(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    ids = [shared_jobs.add("fail", queue="emails", max_attempts=1) for _ in range(3)]
    for job_id in ids:
        assert shared_jobs.wait(job_id).state == "discarded"
    shared_jobs.query("UPDATE roost.job_rows SET cancel_requested = true WHERE id = %s", ids[0])
    roostctl(shared_jobs, "queue pause emails")  # to see them before they run
    roostctl(shared_jobs, "requeue --discarded --yes")
    for job in map(shared_jobs.get, ids):
        assert (job.state, job.attempt, job.cancel_requested) == ("available", 0, False)
        assert len(job.errors) == 1
        roostctl(shared_jobs, f"cancel {job.id}")
    roostctl(shared_jobs, "queue resume emails")


def test_workers_shows_host_pid_queues_and_when_each_was_last_seen(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    names, line = rows(roostctl(shared_jobs, "workers"))
    shown: dict[str, Any] = dict(zip(names, line, strict=True))
    assert (shown["HOST"], shown["PID"]) == (socket.gethostname(), str(shared_daemon.pid))
    assert set(shown["QUEUES"].split(",")) == {"default", "emails"}
    assert shown["HEARTBEAT"].endswith("s")
    (worker,) = json.loads(roostctl(shared_jobs, "workers --json"))
    assert {"hostname", "pid", "queues", "inflight", "last_seen_at"} <= worker.keys()
