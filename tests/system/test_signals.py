"""What each signal does, and that the log says so."""

from __future__ import annotations

import signal
import time

import pytest

from tests.system.conftest import StartDaemon
from tests.system.daemon import eventually
from tests.system.jobs import Jobs

ONE_CHILD = {"pools": {"default": {"queues": ["default"], "concurrency": 1}}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_jobs_end_and_starts_no_others(
    start_daemon: StartDaemon, jobs: Jobs, number: signal.Signals
) -> None:
    daemon = start_daemon(ONE_CHILD)
    jobs.wait_all(jobs.add_many(500, "noop"))
    held = jobs.add("hold", {"key": "held"})
    daemon.wait_started("held")
    waiting = jobs.add_many(20, "noop")
    daemon.signal(number)
    entry = daemon.wait_for("signal.received", signal=number.name)
    assert entry["meaning"].startswith("stop when the running jobs are done")
    daemon.wait_for("worker.draining")
    later = jobs.add("noop")
    assert jobs.get(held).state == "executing"
    daemon.let_go("held")
    assert daemon.wait_exit() == 0
    daemon.wait_for("worker.stopped")
    assert (jobs.get(held).state, jobs.get(held).attempt) == ("completed", 1)
    rest = [jobs.get(job_id) for job_id in (*waiting, later)]
    assert {(job.state, job.attempt) for job in rest} == {("available", 0)}
    assert jobs.query("SELECT id FROM roost.workers") == []
    assert jobs.query("SELECT worker_id FROM roost.idle_workers") == []


@pytest.mark.parametrize("task", ["hold_cleanly", "deaf"])
def test_jobs_that_outlast_shutdown_timeout_are_interrupted_and_released_uncounted(
    start_daemon: StartDaemon, jobs: Jobs, task: str
) -> None:
    daemon = start_daemon({"worker": {"shutdown_timeout": 0.5}})
    job_id = jobs.add(task, {"key": "held"}, max_attempts=1)
    daemon.wait_started("held")
    assert daemon.stop() == 0
    job = jobs.get(job_id)
    assert (job.state, job.attempt, job.errors, jobs.crashes(job_id)) == ("available", 0, [], 0)
    assert daemon.notes() == (["held cleaned up"] if task == "hold_cleanly" else [])


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGINT, signal.SIGINT), (signal.SIGQUIT,), (signal.SIGTERM, signal.SIGQUIT)],
    ids=["INT, INT", "QUIT", "TERM, QUIT"],
)
def test_a_stop_at_once_waits_for_no_job(
    start_daemon: StartDaemon, jobs: Jobs, numbers: tuple[signal.Signals, ...]
) -> None:
    daemon = start_daemon({"worker": {"shutdown_timeout": 300.0, "kill_grace": 300.0}})
    ids = [jobs.add("hold", {"key": "held"}), jobs.add("swallow_everything")]
    daemon.wait_started("held")
    jobs.wait(ids[1], "executing")
    asked_at = time.monotonic()
    for number in numbers:
        daemon.signal(number)
        daemon.wait_for("signal.received", signal=number.name)
    assert daemon.wait_exit() == 0
    assert time.monotonic() - asked_at < 15
    assert {(jobs.get(job_id).state, jobs.get(job_id).attempt) for job_id in ids} == {("available", 0)}


def test_a_heartbeat_meanwhile_does_not_undo_the_end_of_a_worker(start_daemon: StartDaemon, jobs: Jobs) -> None:
    for _ in range(8):
        daemon = start_daemon({"worker": {"heartbeat_interval": 0.01}})
        daemon.stop()
        assert jobs.query("SELECT id FROM roost.workers") == []
        assert daemon.entries("worker.was_declared_dead") == []


def test_usr1_logs_the_stack_of_every_child(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"pools": {"default": {"concurrency": 3}}})
    ids = [jobs.add("stuck_in_c", {"key": "stuck"}), jobs.add("hold", {"key": "held"})]
    daemon.wait_started("stuck", "held")
    children = daemon.wait_children(3)
    for _ in range(2):
        since = daemon.mark()
        daemon.signal(signal.SIGUSR1)
        daemon.wait_for("signal.received", since=since, signal="SIGUSR1", meaning="dump the stacks of all children")
        daemon.wait_for("child.stack", since=since, stack=lambda stack: "in stuck_in_c" in stack)
        daemon.wait_for("child.stack", since=since, stack=lambda stack: "in hold" in stack)
        eventually(
            lambda since=since: {e["pid"] for e in daemon.entries("child.stack", since=since)} == set(children),  # type: ignore[misc]
            "stack of each child",
        )
    daemon.let_go("held")
    assert jobs.wait(ids[1]).attempt == 1
    jobs.roost.cancel(ids[0])
    jobs.wait(ids[0], "cancelled")


def test_ttin_and_ttou_change_the_number_of_children(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    held = [jobs.add("hold", {"key": key}) for key in ("one", "two")]
    daemon.wait_started("one", "two")
    daemon.signal(signal.SIGTTIN)
    daemon.wait_for("signal.received", signal="SIGTTIN", meaning="one child more")
    daemon.wait_for("pool.resized", children=3)
    daemon.wait_children(3)
    assert jobs.wait(jobs.add("noop")).state == "completed"  # by the third
    for children in (2, 1, 1):
        since = daemon.mark()
        daemon.signal(signal.SIGTTOU)
        daemon.wait_for("signal.received", since=since, signal="SIGTTOU", meaning="one child fewer")
        daemon.wait_for("pool.resized", since=since, children=children)
    daemon.let_go("one", "two")
    jobs.wait_all(held)
    assert [jobs.get(job_id).attempt for job_id in held] == [1, 1]
    daemon.wait_children(1)
    assert jobs.wait(jobs.add("noop")).state == "completed"
