"""What happens to the jobs of a master that dies, stops or is cut off: no child lives on, nothing runs twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import psycopg
import pytest

from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon, eventually, is_alive
from tests.system.jobs import Jobs
from tests.system.proxy import Proxy

SHORT_LEASH = {"worker": {"orphan_stale_after": 2.0}}
MACHINE_ID = Path("/etc/machine-id").read_text().strip() if Path("/etc/machine-id").exists() else ""
ONE_CHILD = {"pools": {"default": {"queues": ["default"], "concurrency": 1}}}


def test_nothing_outlives_a_killed_master_and_its_successor_frees_the_jobs_at_once(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon({"pools": {"default": {"concurrency": 4}}})  # which believes in others for 300 s
    held = jobs.add("hold", {"key": "held"})
    deaf = jobs.add("deaf", {"key": "deaf"}, max_attempts=1)
    stuck = jobs.add("stuck_in_c", {"key": "stuck"}, timeout_seconds=1)
    cancelled = jobs.add("swallow_everything")
    daemon.wait_started("held", "deaf", "stuck")
    jobs.wait(cancelled, "executing")
    processes = daemon.processes()
    assert len(processes) == 6

    jobs.query("UPDATE roost.claims SET cancel_requested = true WHERE job_id = %s", cancelled)
    daemon.signal(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, processes)), "end of all processes", seconds=1)
    daemon.wait_exit()
    assert {jobs.get(job_id).state for job_id in (held, deaf, stuck, cancelled)} == {"executing"}

    daemon.let_go("held")
    since = daemon.mark()
    daemon.start()
    daemon.wait_for("worker.predecessor_freed", since=since, jobs=4)
    job = jobs.wait(held)
    assert (job.state, job.attempt) == ("completed", 2)
    assert "WorkerCrash" in job.errors[0]["error"]
    assert jobs.wait(deaf).state == "discarded"
    assert jobs.wait(stuck, "retryable", "executing").attempt >= 1
    assert jobs.get(cancelled).state == "cancelled"
    assert {jobs.crashes(job_id) for job_id in (held, deaf, stuck, cancelled)} == {0}
    assert len(jobs.roost.list_workers()) == 1
    jobs.roost.cancel(stuck)
    assert jobs.wait(stuck).state == "cancelled"


@pytest.mark.parametrize("stopped", [False, True], ids=["template runs", "template is stopped"])
def test_what_jobs_started_does_not_outlive_a_killed_master_either(
    start_daemon: StartDaemon, jobs: Jobs, stopped: bool
) -> None:
    daemon = start_daemon()
    keys = ["a", "b"]
    for key in keys:
        jobs.add("daemonise", {"key": key})
    daemons = [int(daemon.wait_text(f"{key}.pid")) for key in keys]
    assert all(map(is_alive, daemons))
    if stopped:
        os.kill(daemon.wait_template(), signal.SIGSTOP)
    daemon.signal(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, daemons)), "end of what the jobs started", seconds=1)
    daemon.wait_exit()


@pytest.mark.skipif(not MACHINE_ID, reason="without a machine id no row is taken for one of this machine")
def test_a_row_of_another_boot_is_a_predecessors_only_if_it_was_last_heard_of_before_this_boot(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    identity = {
        "hostname": socket.gethostname(),
        "machine_id": MACHINE_ID,
        "boot_id": "another",
        "pid_namespace": "pid:[1]",
        "pid": 1,
        "started_ticks": 1,
    }
    claimed = {}
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    for silent_seconds in (min(60.0, uptime / 2), uptime + 60.0):  # a clone's, and the predecessor's
        job_id = jobs.add("whoami")
        (worker,) = jobs.query(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, last_seen_at, metadata) VALUES"
            " (gen_random_uuid(), 'x', %s, 1, '{}', 1, now() - make_interval(secs => %s), %s) RETURNING id",
            identity["hostname"],
            silent_seconds,
            json.dumps({"identity": identity}),
        )
        jobs.query(
            "WITH taken AS (DELETE FROM roost.ready WHERE job_id = %s RETURNING job_id)"
            " INSERT INTO roost.claims (job_id, lease, worker_id, attempt)"
            " SELECT job_id, nextval('roost.lease_seq'), %s, 1 FROM taken RETURNING 1",
            job_id,
            worker["id"],
        )
        claimed[job_id] = worker["id"]
    clones, predecessors = claimed
    daemon = start_daemon()
    daemon.wait_for("worker.predecessor_freed", workers=[str(claimed[predecessors])], jobs=1)
    assert jobs.wait(predecessors, "completed").attempt == 2
    assert jobs.get(clones).state == "executing"
    assert claimed[clones] in {worker.id for worker in jobs.roost.list_workers()}


def test_a_peer_frees_the_jobs_of_a_killed_master_after_orphan_stale_after(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    dying = start_daemon({**SHORT_LEASH, "pools": {"default": {"queues": ["default"]}}})
    peer = start_daemon({**SHORT_LEASH, "pools": {"default": {"queues": ["other"]}}})
    held = jobs.add("hold", {"key": "held"})
    last = jobs.add("hold", {"key": "last"}, max_attempts=1)
    dying.wait_started("held", "last")
    dying.signal(signal.SIGKILL)
    killed_at = time.monotonic()
    dying.wait_exit()
    job = jobs.wait(held, "retryable")
    assert time.monotonic() - killed_at > 1.5  # its last heartbeat may be one interval older than its death
    peer.wait_for("worker.declared_dead", pid=dying.pid)
    assert (job.attempt, jobs.crashes(held)) == (1, 0)
    assert job.errors[0]["error"] == "WorkerCrash: the worker that ran it was lost"
    assert jobs.wait(last).state == "discarded"
    assert len(jobs.roost.list_workers()) == 1


def test_a_job_that_outlasts_orphan_stale_after_is_left_alone(start_daemon: StartDaemon, jobs: Jobs) -> None:
    first = start_daemon(SHORT_LEASH)
    held = jobs.add("hold", {"key": "held"})
    first.wait_started("held")
    peer = start_daemon(SHORT_LEASH)
    with pytest.raises(pytest.fail.Exception):
        peer.wait_for("job.rescued", seconds=4)
    first.let_go("held")
    assert jobs.wait(held).attempt == 1


def test_what_a_master_reports_after_it_was_declared_dead_changes_nothing(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    stopped = start_daemon({**SHORT_LEASH, **ONE_CHILD})
    job_id = jobs.add("hold_cleanly", {"key": "held"})
    stopped.wait_started("held")
    peer = start_daemon({**SHORT_LEASH, **ONE_CHILD})
    stopped.signal(signal.SIGSTOP)
    peer.wait_for("worker.declared_dead", pid=stopped.pid)
    peer.wait_started("held")  # the peer runs it now
    stopped.let_go("held")  # and so the first run ends, while its master can't say so
    eventually(lambda: stopped.notes() == ["held cleaned up"], "end of the first run")

    stopped.signal(signal.SIGCONT)
    since = stopped.mark()
    stopped.wait_for("worker.was_declared_dead")
    stopped.wait_for("worker.registered")
    stopped.wait_for("job.lease_lost", job_id=job_id)
    job = jobs.get(job_id)
    assert (job.state, job.attempt, job.result) == ("executing", 2, None)
    peer.let_go("held")
    job = jobs.wait(job_id)
    assert (job.state, job.attempt, len(job.errors)) == ("completed", 2, 1)
    assert job.result in peer.children()

    assert peer.stop() == 0
    stopped.wait_children(1)
    assert jobs.wait(jobs.add("whoami")).result in stopped.children()
    assert not stopped.entries("worker.ready", since=since)
    assert len(jobs.roost.list_workers()) == 1


def test_a_master_cut_off_from_its_database_ends_its_jobs_before_the_others_begin_them(
    start_daemon: StartDaemon, jobs: Jobs, folder: Path
) -> None:
    settings = {"worker": {"orphan_stale_after": 4.0}, **ONE_CHILD}
    with Proxy(jobs.dsn, folder) as proxy:
        cut_off = start_daemon({**settings, "database": {"dsn": proxy.dsn}})
        job_id = jobs.add("tick", {"key": "held"})
        cut_off.wait_started("held")
        (child,) = cut_off.wait_children(1)
        peer = start_daemon(settings)
        proxy.freeze()
        cut_off.wait_for("worker.fenced")
        eventually(lambda: not is_alive(child), f"end of the child {child}")
        peer.wait_started("held")
        assert ticks(cut_off, "held")[-1] < ticks(peer, "held")[0]

        since = cut_off.mark()
        proxy.thaw()
        cut_off.wait_for("worker.was_declared_dead", since=since)
        peer.let_go("held")
        job = jobs.wait(job_id)
        assert (job.state, job.attempt, jobs.crashes(job_id)) == ("completed", 2, 0)
        assert peer.stop() == 0
        cut_off.wait_children(1)
        assert jobs.wait(jobs.add("whoami")).result in cut_off.children()


def test_a_master_that_was_stopped_while_it_claimed_does_not_start_what_the_others_have_taken(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    settings = {**ONE_CHILD, "worker": {"orphan_stale_after": 2.0, "poll_interval": 60.0}}
    stopped = start_daemon(settings)
    eventually(lambda: jobs.query("SELECT 1 FROM roost.idle_workers"), "idle worker, which claims when it is told")
    time.sleep(1)  # and has asked once more: a claim that had begun before would not see the job
    with psycopg.connect(jobs.dsn) as conn:
        conn.execute("LOCK TABLE roost.claims IN SHARE MODE")  # so that the claim waits
        job_id = jobs.add("hold", {"key": "held"})
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'roostd claim' AND wait_event_type = 'Lock'"
            " AND datname = current_database()"
        )
        eventually(lambda: jobs.query(waiting), "claim that waits")
        stopped.signal(signal.SIGSTOP)
    eventually(lambda: jobs.query("SELECT 1 FROM roost.claims WHERE job_id = %s", job_id), "claim")
    peer = start_daemon({**SHORT_LEASH, **ONE_CHILD})
    peer.wait_started("held")
    stopped.signal(signal.SIGCONT)
    stopped.wait_for("worker.registered")
    peer.let_go("held")
    assert jobs.wait(job_id).result in peer.children()
    stopped.wait_for("claims.released", reason="the answer to their claim came too late")
    assert not (stopped.folder / "held.started").exists()


def test_a_master_that_is_cut_off_starts_none_of_the_jobs_that_it_had_claimed(
    start_daemon: StartDaemon, jobs: Jobs, folder: Path
) -> None:
    with Proxy(jobs.dsn, folder) as proxy:
        daemon = start_daemon({"worker": {"orphan_stale_after": 2.0}, **ONE_CHILD, "database": {"dsn": proxy.dsn}})
        jobs.wait_all(jobs.add_many(1000, "noop"))
        with psycopg.connect(jobs.dsn) as conn:
            ids = [jobs.add("note", {"line": str(n), "seconds": 0.1}, conn=conn) for n in range(60)]
        eventually(lambda: len(jobs.query("SELECT 1 FROM roost.claims")) > 40, "jobs that are claimed ahead")
        proxy.freeze()
        daemon.wait_for("worker.fenced")
        eventually(lambda: daemon.entries("child.exited", loss=lambda loss: "lost the database" in (loss or "")), "end")
        ran = daemon.notes()
        daemon.wait_for("child.started", since=daemon.mark() - 1)
        time.sleep(1)  # that nothing happens is what is waited for
        assert daemon.notes() == ran
        proxy.thaw()
        jobs.wait_all(ids)


def test_a_master_whose_heartbeat_alone_is_cut_off_takes_no_new_jobs_until_it_is_back(
    start_daemon: StartDaemon, jobs: Jobs, folder: Path
) -> None:
    with Proxy(jobs.dsn, folder) as proxy:
        daemon = start_daemon({"worker": {"orphan_stale_after": 10.0}, "database": {"dsn": proxy.dsn}})
        proxy.freeze("roostd heartbeat")
        since = daemon.mark()
        daemon.wait_for("worker.fenced")
        daemon.wait_for("child.started", since=since)
        late = jobs.add("note", {"line": "late"})
        time.sleep(1)  # that nothing happens is what is waited for
        assert daemon.notes() == []
        proxy.thaw()
        assert jobs.wait(late).state == "completed"


def test_after_a_jump_of_the_databases_clock_every_worker_starts_afresh_and_no_job_is_lost(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    settings = {"worker": {"heartbeat_interval": 2.0, "orphan_stale_after": 60.0}}
    daemons = [start_daemon(settings), start_daemon(settings)]
    ids = [jobs.add("hold", {"key": f"held-{number}"}) for number in range(4)]
    for daemon in daemons:
        eventually(lambda: list(daemon.folder.glob("*.started")), "jobs on both")  # noqa: B023
    jobs.wait_all(ids, "executing")
    before = {worker.id for worker in jobs.roost.list_workers()}

    def jump() -> bool:
        """Has it be an hour later than their last heartbeats, also where one came just before the reaper."""
        jobs.query(
            "UPDATE roost.workers SET last_seen_at = now() - interval '1 hour' WHERE id = ANY (%s)", list(before)
        )
        return not {worker.id for worker in jobs.roost.list_workers()} & before

    eventually(jump, "end of both workers' rows")
    for daemon in daemons:
        daemon.wait_for("worker.registered")
        daemon.let_go(*(f"held-{number}" for number in range(4)))
    for job_id in ids:
        assert (jobs.wait(job_id).state, jobs.get(job_id).attempt, jobs.crashes(job_id)) == ("completed", 2, 0)
    after = {worker.id for worker in jobs.roost.list_workers()}
    assert len(after) == 2
    assert not after & before


def ticks(daemon: Daemon, key: str) -> list[float]:
    eventually((daemon.folder / f"{key}.ticks").exists, f"ticks of {key}")
    eventually(lambda: (daemon.folder / f"{key}.ticks").read_text(), f"ticks of {key}")
    return [float(line) for line in (daemon.folder / f"{key}.ticks").read_text().splitlines()]


def test_a_template_that_is_killed_costs_its_jobs_an_attempt_and_no_crash(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon()
    ids = [jobs.add("hold", {"key": key}) for key in ("one", "two")]
    last = jobs.add("whoami")
    daemon.wait_started("one", "two")
    template = daemon.wait_template()
    children = daemon.wait_children(2)
    os.kill(template, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, children)), "end of its children", seconds=1)
    daemon.wait_for("template.died", how="was killed by signal 9 (SIGKILL)")
    for job_id in ids:
        daemon.wait_for("job.ended", job_id=job_id, ending="lost")
    daemon.let_go("one", "two")
    jobs.wait_all([*ids, last])
    assert [jobs.get(job_id).attempt for job_id in (*ids, last)] == [2, 2, 1]
    assert [jobs.crashes(job_id) for job_id in ids] == [0, 0]
    assert set(daemon.wait_children(2)) >= {jobs.get(job_id).result for job_id in ids}
    assert daemon.templates() != [template]


def test_children_go_on_while_their_template_is_stopped(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    template = daemon.wait_template()
    children = daemon.wait_children(2)
    os.kill(template, signal.SIGSTOP)
    try:
        ids = jobs.add_many(300, "whoami")
        jobs.wait_all(ids)
        crash = jobs.wait(jobs.add("os_exit", {"status": 0}, max_attempts=1))
        assert "WorkerCrash" in crash.errors[0]["error"]
        more = jobs.add_many(300, "whoami")  # by the child that is left
        jobs.wait_all(more)
        assert {jobs.get(job_id).result for job_id in (*ids, *more)} <= set(children)
    finally:
        os.kill(template, signal.SIGCONT)
    daemon.wait_children(2)
    assert daemon.templates() == [template]


def test_a_template_that_forks_no_more_is_replaced_after_half_a_minute(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    template = daemon.wait_template()
    daemon.wait_children(2)
    os.kill(template, signal.SIGSTOP)
    job_id = jobs.add("hold", {"key": "held"})
    daemon.wait_started("held")
    jobs.wait(jobs.add("os_exit", {"status": 0}, max_attempts=1))
    daemon.wait_for("template.stuck", seconds=60, pid=template)
    daemon.wait_for("job.ended", job_id=job_id, ending="lost")
    daemon.let_go("held")
    assert jobs.wait(job_id, "completed").attempt == 2  # children end with their template
    daemon.wait_children(2)
    assert template not in daemon.templates()
