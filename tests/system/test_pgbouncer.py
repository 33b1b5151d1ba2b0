"""A daemon behind a real PgBouncer in transaction mode, where each transaction may run on another server connection.

Its heartbeats and, where it may listen, its polls are far apart: what doesn't come by the way that is meant doesn't
come at all.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from roost_client import DuplicateUniqueJobError, JobInsert, Roost
from roostd.ctl import main as roostctl
from tests.bouncer import Bouncer, needs_pgbouncer
from tests.system.clock import DatabaseClock
from tests.system.conftest import StartDaemon
from tests.system.daemon import HANDLERS, Daemon, Settings, eventually
from tests.system.jobs import Jobs

pytestmark = needs_pgbouncer

NEVER = 1_000_000.0
RARE_BEATS = {"heartbeat_interval": 1000.0, "orphan_stale_after": NEVER}
# What runs at once would find the file of the other.
SHOP = """
import os, time
from pathlib import Path
from roost_client import job

HERE = Path(__file__).parent

@job("alone", max_concurrency=1)
def alone():
    os.close(os.open(HERE / "alone", os.O_CREAT | os.O_EXCL))
    time.sleep(0.01)
    os.unlink(HERE / "alone")

@job("rated", rate_per_minute=2)
def rated():
    pass
"""


def test_everything_but_listen_works_and_what_would_be_heard_is_polled(
    start_daemon: StartDaemon, jobs: Jobs, bouncer: Bouncer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = DatabaseClock(jobs.dsn)
    (folder / "shop").mkdir()
    (folder / "shop" / "shop.py").write_text(SHOP)
    settings: Settings = {
        "database": {"dsn": bouncer.dsn},
        "worker": {**RARE_BEATS, "poll_interval": 0.2, "archive_interval": 0.2},
        "handlers": {"modules": ["tasks", "shop"], "pythonpath": [str(folder / "shop"), str(HANDLERS)]},
        "cron": {"every": {"expression": "* * * * *", "task": "noop"}},
    }
    daemon = start_daemon(settings)
    warning = daemon.wait_for("listener.unavailable")
    assert warning["level"] == "warning"
    assert "set database.listen_dsn" in warning["error"]
    with Roost(bouncer.dsn) as roost:
        assert_jobs_run(daemon, jobs, roost, bouncer.dsn)
        assert_operators_are_heeded(daemon, jobs, roost)
        assert_commands_work(daemon, jobs, bouncer.dsn, capsys)
    minute = clock.approach_minute()
    eventually(
        lambda: jobs.query("SELECT 1 FROM roost.cron_runs WHERE slot = %s AND job_id IS NOT NULL", minute),
        lambda: f"firing at {minute}. {daemon.told()}",
    )
    # With the pooler killed under load nothing is lost, and nothing restarted.
    processes = set(daemon.processes())
    load = jobs.roost.enqueue_many([JobInsert("note", {"line": f"load {n}", "seconds": 0.003}) for n in range(600)])
    eventually(lambda: len(daemon.notes()) > 100, "load")
    bouncer.kill()
    daemon.wait_for("db.gone")
    bouncer.start()
    eventually(lambda: not active(jobs), lambda: f"end of all jobs: {active(jobs)[:3]}. {daemon.told()}")
    ran = Counter(line for line in daemon.notes() if line.startswith("load "))
    assert set(ran.values()) == {1}
    assert len(ran) == load
    assert set(daemon.processes()) == processes
    # A reload, too: for what follows, jobs that have ended are archived.
    daemon.write_config({"worker": {"archive_after_seconds": 0}})
    assert roostctl(["--dsn", bouncer.dsn, "reload"]) == 0, daemon.told()
    eventually(lambda: jobs.query("SELECT 1 FROM roost.jobs_archive LIMIT 1"), lambda: f"archive. {daemon.told()}")
    assert not daemon.entries("listener.connected")
    assert daemon.stop() == 0
    assert jobs.query("SELECT 1 FROM roost.workers") == []


def assert_jobs_run(daemon: Daemon, jobs: Jobs, roost: Roost, pooled: str) -> None:
    """All kinds of ends, and all that decides when a job runs."""
    jobs.query("CREATE TABLE counter AS SELECT 0 AS n")
    alone = jobs.add_many(30, "alone")
    many = jobs.add_many(200, "echo", {"value": "ö\\'\"%s\n"})
    fails_first = roost.enqueue("fail_first", args={"key": "first", "times": 2})
    fails = roost.enqueue("fail", max_attempts=1)
    effects = [roost.enqueue("add_one", args={"dsn": pooled}, max_attempts=1) for _ in range(4)]
    crashes = roost.enqueue("abort", max_attempts=1)
    snoozes = roost.enqueue("snooze", args={"key": "snoozed", "times": 1, "seconds": 0.2})
    unique = roost.enqueue("hold", args={"key": "unique"}, unique_key="one")
    with pytest.raises(DuplicateUniqueJobError):
        roost.enqueue("hold", args={"key": "unique"}, unique_key="one")
    child = roost.enqueue("noop", depends_on=[unique])
    doomed = roost.enqueue("noop", depends_on=[fails])
    daemon.let_go("unique")
    jobs.wait_all([*alone, *many, *effects, fails_first, snoozes, unique, child])
    assert {jobs.get(job_id).result for job_id in many} == {"ö\\'\"%s\n"}
    assert [jobs.get(job_id).attempt for job_id in (fails_first, snoozes)] == [3, 1]
    assert jobs.query("SELECT n FROM counter") == [{"n": 4}]
    assert [jobs.wait(job_id).state for job_id in (fails, crashes, doomed)] == ["discarded", "discarded", "cancelled"]
    rated = jobs.add_many(5, "rated")
    eventually(lambda: sum(jobs.get(job_id).state == "completed" for job_id in rated) == 2, "start of two")
    assert roost.wait_for(many[0], poll_interval=0.1).state == "completed"
    for job_id in rated:
        roost.cancel(job_id)
    # No enqueue sends a notification that nobody would hear.
    eventually(lambda: not jobs.query("SELECT 1 FROM roost.idle_workers WHERE idle AND queues <> '{}'"), "word of it")


def assert_operators_are_heeded(daemon: Daemon, jobs: Jobs, roost: Roost) -> None:
    held = roost.enqueue("hold", args={"key": "cancelled"})
    daemon.wait_started("cancelled")
    roost.cancel(held)
    assert jobs.wait(held).state == "cancelled"
    assert "JobCancelled" in jobs.get(held).errors[-1]["error"]
    roost.pause_queue("default")
    paused = roost.enqueue("noop")
    roost.resume_queue("default")
    assert jobs.wait(paused).state == "completed"
    # A transaction that keeps a claim locked keeps no other outcome waiting.
    locked, free = (roost.enqueue("hold", args={"key": key}) for key in ("locked", "free"))
    daemon.wait_started("locked", "free")
    with psycopg.connect(jobs.dsn) as conn:
        conn.execute("SELECT 1 FROM roost.claims WHERE job_id = %s FOR UPDATE", [locked])
        daemon.let_go("locked", "free")
        assert jobs.wait(free).state == "completed"
        daemon.wait_for("outcomes.locked", jobs=[locked])
    assert jobs.wait(locked).state == "completed"


def assert_commands_work(daemon: Daemon, jobs: Jobs, pooled: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> Any:
        capsys.readouterr()
        code = roostctl(["--dsn", pooled, "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 0, (arguments, err, daemon.told())
        return json.loads(out)

    (job_id,) = jobs.query("SELECT id FROM roost.jobs WHERE state = 'discarded' ORDER BY id LIMIT 1")[0].values()
    (cancelled,) = jobs.query("SELECT id FROM roost.jobs WHERE state = 'cancelled' AND task = 'hold'")[0].values()
    assert run("status")["workers"][0]["pid"] == daemon.pid
    assert [queue["name"] for queue in run("queues")] == ["default"]
    run("pause", "default")
    run("resume", "default")
    assert run("show", job_id)["state"] == "discarded"
    assert len(run("jobs")) > 0
    assert [job["id"] for job in run("jobs", "--state", "discarded", "--newer-than", "1h", "--limit", 1)]
    assert run("explain", job_id)["code"] == "discarded"
    daemon.let_go("cancelled")
    run("retry", cancelled)
    assert run("requeue", "--discarded", "--yes")["jobs"] >= 1
    run("cancel", run("enqueue", "noop", "--queue", "nobodys")["id"])
    assert len(run("workers")) == 1
    assert [entry["name"] for entry in run("cron", "list")] == ["every"]
    assert run("cron", "list")[0]["seen_at"].endswith("+00:00")
    run("cron", "pause", "every")
    run("cron", "resume", "every")
    run("cron", "next", "every")
    jobs.wait(run("cron", "run", "every")["id"], "completed")
    assert run("migrate", "up") == {"applied": []}
    assert {each["state"] for each in run("migrate", "status")} == {"applied"}


def active(jobs: Jobs) -> list[dict[str, Any]]:
    return jobs.query("SELECT id, task, state FROM roost.jobs WHERE state IN ('available', 'executing', 'retryable')")


def test_with_a_listen_dsn_nothing_waits_for_a_poll(start_daemon: StartDaemon, jobs: Jobs, bouncer: Bouncer) -> None:
    daemon = start_daemon(
        {
            "database": {"dsn": bouncer.dsn, "listen_dsn": jobs.dsn},
            "worker": {**RARE_BEATS, "poll_interval": 1000.0},
        }
    )
    daemon.wait_for("listener.connected")
    eventually(
        lambda: jobs.query("SELECT 1 FROM roost.idle_workers WHERE idle AND 'default' = ANY (queues)"), "idleness"
    )
    with Roost(bouncer.dsn) as roost:
        for _ in range(3):
            assert jobs.wait(roost.enqueue("noop")).state == "completed"
        held = roost.enqueue("hold", args={"key": "held"})
        daemon.wait_started("held")
        roost.cancel(held)
        assert jobs.wait(held).state == "cancelled"
    assert roostctl(["--dsn", bouncer.dsn, "reload"]) == 0, daemon.told()
    assert not daemon.entries("listener.unavailable")


def test_a_listen_dsn_that_leads_elsewhere_or_to_a_pooler_is_refused(
    folder: Path, dsn: str, empty_dsn: str, bouncer: Bouncer
) -> None:
    for number, (wrong, reason) in enumerate(
        ((empty_dsn, "leads to another database than database.dsn"), (bouncer.dsn, "leads to a pooler"))
    ):
        settings = {"database": {"dsn": bouncer.dsn, "listen_dsn": wrong}}
        with closing(Daemon(folder / str(number), None, settings).start()) as daemon:
            assert daemon.wait_exit() == 78, daemon.told()
            assert f"roostd: cannot listen: database.listen_dsn {reason}" in daemon.told()
    with psycopg.connect(dsn, autocommit=True) as conn:
        listening = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
        assert conn.execute(listening).fetchall() == []


def test_a_listen_dsn_that_cannot_be_reached_is_no_reason_not_to_start(
    start_daemon: StartDaemon, jobs: Jobs, folder: Path
) -> None:
    daemon = start_daemon({"database": {"listen_dsn": f"host={folder}"}})
    daemon.wait_for("listener.lost")
    assert jobs.wait(jobs.add("noop")).state == "completed"
