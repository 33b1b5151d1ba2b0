"""What the daemon takes of its machine and database, and gives back: connections, transactions, CPU, descriptors."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from chaos.fleet import title_of
from tests.system.conftest import StartDaemon
from tests.system.daemon import HANDLERS, Daemon, cpu_seconds, eventually
from tests.system.jobs import Jobs

IDLE_SECONDS = 5.0


def test_an_idle_daemon_has_four_connections_and_makes_two_transactions_a_second_at_most(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    # The intervals as an installation has them.
    production = {"heartbeat_interval": 15.0, "orphan_reaper_interval": 30.0}
    daemon = start_daemon({"worker": production, "pools": {"default": {"concurrency": 12}}})
    jobs.wait(jobs.add("noop"))  # the connection to write is made at the first need
    eventually(lambda: jobs.query("SELECT 1 FROM roost.idle_workers WHERE idle"), "idle worker")
    jobs.close()
    four = ["roostd claim", "roostd heartbeat", "roostd listen", "roostd write"]
    eventually(lambda: connections(jobs) == four, lambda: f"four connections, but {connections(jobs)}")

    def steady() -> bool:
        """Sessions report their transactions late, so those of the start may show up first."""
        before, used = transactions(jobs.dsn), cpu_seconds(daemon.pid)
        time.sleep(IDLE_SECONDS)
        made, used = transactions(jobs.dsn) - before, cpu_seconds(daemon.pid) - used
        return 0 < made <= 2 * IDLE_SECONDS and used < IDLE_SECONDS * 0.1

    eventually(steady, "span of 5 s with 10 transactions at most")
    assert len(connections(jobs)) == 4


def transactions(dsn: str) -> int:
    """Of the test's database, seen from another one, so as not to count this."""
    with psycopg.connect(dsn) as conn:
        name = conn.info.dbname
    with psycopg.connect(make_conninfo(dsn, dbname="template1"), autocommit=True) as conn:
        row = conn.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s", (name,)
        ).fetchone()
    assert row is not None
    return int(row[0])


def connections(jobs: Jobs) -> list[str]:
    rows = jobs.query(
        "SELECT application_name FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        "   AND application_name <> ''"
        " ORDER BY application_name"
    )
    return [row["application_name"] for row in rows]


def test_processes_are_named_for_ps(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"worker": {"name": "shop-1"}, "pools": {"default": {"queues": ["default", "emails"]}}})
    (idle, _) = daemon.wait_children(2)
    assert title_of(idle) == "roostd: child idle"
    job = jobs.add("hold", {"key": "held"}, queue="emails")
    daemon.wait_started("held")
    daemon.let_go("held")
    child = jobs.wait(job).result
    assert child is not None
    assert title_of(int(child)) == "roostd: child emails hold"
    assert title_of(daemon.pid) == "roostd: master shop-1"
    assert title_of(daemon.wait_template()) == "roostd: template 1"


def test_a_hundred_deaths_of_children_leave_nothing_behind(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    jobs.wait_all(crash(jobs, 5), "discarded")
    before = descriptors_at_rest(daemon)
    jobs.wait_all(crash(jobs, 100), "discarded")
    daemon.wait_children(2)
    eventually(lambda: descriptors(daemon) == before, lambda: f"{before} descriptors, but {descriptors(daemon)}")
    eventually(lambda: not daemon.zombies(), "end of the zombies")
    assert len(daemon.processes()) == 4


def crash(jobs: Jobs, number: int) -> list[int]:
    return [
        *jobs.add_many(number - number // 2, "os_exit", {"status": 1}, max_attempts=1),
        *jobs.add_many(number // 2, "signal_to_self", {"number": signal.SIGKILL}, max_attempts=1),
    ]


def descriptors(daemon: Daemon) -> list[int]:
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (daemon.pid, daemon.wait_template())]


def descriptors_at_rest(daemon: Daemon) -> list[int]:
    """Those of master and template when both children are the master's: a fork under way has some with either."""
    eventually(
        lambda: len(daemon.entries("child.started")) - len(daemon.entries("child.exited")) == 2, "two children at rest"
    )
    seen: list[list[int]] = [descriptors(daemon)]

    def same() -> bool:
        time.sleep(0.2)
        seen.append(descriptors(daemon))
        return seen[-1] == seen[-2]

    eventually(same, lambda: f"descriptors that stay as they are: {seen}")
    return seen[-1]


def test_children_that_die_at_once_are_not_forked_in_a_frenzy(
    start_daemon: StartDaemon, jobs: Jobs, folder: Path
) -> None:
    (folder / "app").mkdir()
    (folder / "app" / "doomed.py").write_text(
        "import os\nos.register_at_fork(after_in_child=lambda: os.path.exists('doom') and os._exit(3))\n"
    )
    daemon = start_daemon(
        {"handlers": {"modules": ["tasks", "doomed"], "pythonpath": [str(folder / "app"), str(HANDLERS)]}}
    )
    template = daemon.wait_template()
    (daemon.folder / "doom").touch()
    jobs.wait_all(jobs.add_many(2, "os_exit", {"status": 0}, max_attempts=1), "discarded", "executing", "available")
    eventually(lambda: not daemon.children(), "end of the last children")
    since, used_before, began_at = daemon.mark(), cpu_seconds(daemon.pid) + cpu_seconds(template), time.monotonic()
    time.sleep(3)
    used = cpu_seconds(daemon.pid) + cpu_seconds(template) - used_before
    assert used < (time.monotonic() - began_at) / 4
    assert len(daemon.entries("child.started", since=since)) < 60
    (daemon.folder / "doom").unlink()
    daemon.wait_children(2)
    assert jobs.wait(jobs.add("noop")).state == "completed"


def test_jobs_that_all_crash_do_not_keep_the_others_from_running(start_daemon: StartDaemon, jobs: Jobs) -> None:
    start_daemon()
    crashing = jobs.add_many(100, "os_exit", {"status": 1})  # three times each
    good = jobs.add_many(200, "noop")
    jobs.wait_all(good)
    jobs.wait_all(crashing, "discarded")
    assert jobs.query("SELECT id FROM roost.jobs WHERE id = ANY (%s) AND crashes <> 3", crashing) == []
    assert jobs.query("SELECT id FROM roost.jobs WHERE id = ANY (%s) AND attempt <> 1", good) == []
