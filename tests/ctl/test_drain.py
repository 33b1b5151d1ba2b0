"""drain with real daemons: what runs ends, nothing else starts, and the worker is gone."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from roost_client import Roost
from tests.ctl.conftest import COMMAND, Ctl
from tests.system.daemon import Daemon, eventually

pytestmark = pytest.mark.daemon


@pytest.fixture
def daemon(dsn: str, tmp_path: Path) -> Iterator[Daemon]:
    settings = {"worker": {"name": "alpha", "shutdown_timeout": 0.1}}
    with closing(Daemon(tmp_path / "daemon", dsn, settings)) as daemon:
        yield daemon.start().wait_ready()


def add_worker(dsn: str, name: str, silent_seconds: float = 0) -> None:
    """One that answers nothing."""
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, last_seen_at)"
            " VALUES (gen_random_uuid(), %s, %s, 1, '{}', 1, now() - make_interval(secs => %s))",
            (name, os.uname().nodename, silent_seconds),
        )


def drain_and_wait(dsn: str, *options: str) -> subprocess.Popen[str]:
    line = [COMMAND, "--dsn", dsn, "drain", "--wait", *options]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_drained_worker_ends_when_its_jobs_have_however_long_they_take(
    ctl: Ctl, daemon: Daemon, roost: Roost, dsn: str
) -> None:
    held = [roost.enqueue("hold", args={"key": key}) for key in ("a", "b")]
    daemon.wait_started("a", "b")
    waiting = [roost.enqueue("noop") for _ in range(5)]
    with drain_and_wait(dsn) as waiter:
        daemon.wait_for("drain.requested")
        later = roost.enqueue("noop")
        eventually(lambda: ctl("workers", "--json").json[0]["metadata"]["state"] == "draining", "state that says so")
        daemon.let_go("a")
        eventually(lambda: roost.get_job(held[0]).state == "completed", "job that ended")
        eventually(lambda: len(daemon.children()) == 1, "child that ended")
        assert waiter.poll() is None
        assert daemon.runs
        assert not daemon.entries("worker.draining"), "the patience of a stop has not begun"
        daemon.let_go("b")
        out, err = waiter.communicate(timeout=60)
    assert (waiter.returncode, daemon.wait_exit()) == (0, 0), daemon.told()
    assert out.splitlines()[1].split() == ["alpha", os.uname().nodename, str(daemon.pid), "drained", "0", "-"]
    assert "still run" in err
    assert {roost.get_job(job_id).state for job_id in held} == {"completed"}
    assert {(job.state, job.attempt) for job in map(roost.get_job, [*waiting, later])} == {("available", 0)}
    assert roost.list_workers() == []


def test_a_stop_of_a_draining_worker_is_that_of_any(ctl: Ctl, daemon: Daemon, roost: Roost) -> None:
    job_id = roost.enqueue("hold", args={"key": "a"})
    daemon.wait_started("a")
    assert ctl("drain").lines[1].split()[3] == "requested"
    daemon.wait_for("drain.requested")
    assert daemon.stop() == 0
    assert (roost.get_job(job_id).state, roost.get_job(job_id).attempt) == ("available", 0)


def test_an_idle_worker_is_drained_at_once(ctl: Ctl, daemon: Daemon) -> None:
    [drained] = ctl("drain", "--worker", "alpha", "--host", os.uname().nodename, "--wait", "--json").json
    assert (drained["worker"], drained["outcome"], drained["running"], drained["error"]) == (
        "alpha",
        "drained",
        0,
        None,
    )
    assert daemon.wait_exit() == 0
    daemon.wait_for("worker.stopped")


def test_a_draining_worker_is_not_brought_back_by_a_reload_or_the_death_of_its_template(
    ctl: Ctl, daemon: Daemon, roost: Roost
) -> None:
    held = roost.enqueue("hold", args={"key": "a"})
    daemon.wait_started("a")
    template = daemon.wait_template()
    ctl("drain")
    daemon.wait_for("drain.requested")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("reload.refused")
    [verdict] = ctl("reload", "--json").json
    assert (verdict["ok"], verdict["error"]) == (False, "the worker is draining: it ends when its jobs have")
    roost.enqueue("noop")
    os.kill(template, signal.SIGKILL)  # and with it the job's child
    assert daemon.wait_exit() == 0
    assert roost.get_job(held).state == "retryable"
    assert not daemon.entries("generation.starting", generation=2)


def test_a_drain_during_a_reload_ends_that(ctl: Ctl, daemon: Daemon, roost: Roost) -> None:
    slow = daemon.folder / "slow.py"
    slow.write_text("import time\ntime.sleep(3600)\n")
    daemon.write_config({"handlers": {"modules": ["tasks", "slow"], "pythonpath": [
        *daemon.settings["handlers"]["pythonpath"], str(daemon.folder)]}})  # fmt: skip
    roost.enqueue("hold", args={"key": "a"})
    daemon.wait_started("a")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("generation.starting", generation=2)
    ctl("drain")
    daemon.wait_for("reload.failed", error="the worker is draining: it ends when its jobs have")
    daemon.let_go("a")
    assert daemon.wait_exit() == 0


def test_who_waits_in_vain_is_told_and_who_is_dead_is_skipped(ctl: Ctl, dsn: str) -> None:
    add_worker(dsn, "beta")
    add_worker(dsn, "gamma", silent_seconds=1000)
    requested = ctl("drain")
    assert requested.code == 0
    assert [line.split()[:4:3] for line in requested.lines[1:]] == [["beta", "requested"], ["gamma", "skipped"]]
    late = ctl("drain", "--wait", "--timeout", "0.2", "--json")
    assert late.code == 1
    assert [(each["worker"], each["outcome"]) for each in late.json] == [("beta", "running"), ("gamma", "skipped")]
    assert late.json[0]["error"] == "has not ended within 0.2 s; it goes on draining"
    assert "dead: not heard of for" in late.json[1]["error"]
    assert ctl("drain", "--worker", "gamma", "--wait").code == 1, "nobody was drained"


def test_a_worker_that_dies_while_it_is_waited_for_is_told(ctl: Ctl, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOST_WORKER__ORPHAN_STALE_AFTER", "60")
    add_worker(dsn, "beta")
    with drain_and_wait(dsn) as waiter, psycopg.connect(dsn, autocommit=True) as conn:
        eventually(lambda: conn.execute("SELECT 1 FROM roost.workers WHERE drain_requested").fetchone(), "request")
        conn.execute("UPDATE roost.workers SET last_seen_at = now() - interval '100 s'")
        out, _ = waiter.communicate(timeout=60)
    assert waiter.returncode == 1
    assert out.splitlines()[1].split()[:4:3] == ["beta", "failed"]
    assert "dead: not heard of" in out


def test_a_drain_of_nobody_ends_with_1(ctl: Ctl) -> None:
    for options, whom in (([], "on host "), (["--worker", "x"], "named x"), (["--host", "h"], "on host h")):
        result = ctl("drain", *options)
        assert result.code == 1
        assert f"cannot drain: there is no worker {whom}" in result.err
