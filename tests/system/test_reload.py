"""A reload takes over only when it is whole; until then, and if it is no good, nothing changes for any job."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from roost_client import JobInsert
from tests.system.conftest import StartDaemon
from tests.system.daemon import HANDLERS, Daemon, Settings, eventually, is_alive
from tests.system.jobs import Jobs

SHOP = """
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from roost_client import job

VERSION = {version}


@job("version")
def version() -> int:
    return VERSION


@job("long")
def long(key: str) -> int:
    Path(key + ".started").touch()
    while not Path(key + ".go").exists():
        time.sleep(0.01)
    return VERSION
"""
HANGS = "import time\ntime.sleep(3600)\n"

BROKEN_MODULES = {
    "a syntax error": ("def broken(:\n", "SyntaxError: "),
    "an import that hangs": (HANGS, "took more than import_timeout (1 s)"),
    "an import that segfaults": ("import ctypes\nctypes.string_at(0)\n", "was killed by signal 11 (SIGSEGV)"),
    "an import that exits": ("import os\nos._exit(0)\n", "exited with status 0"),
    "an import that calls sys.exit": ("import sys\nsys.exit('enough')\n", "SystemExit: enough"),
    "a missing module": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "a task registered twice": (
        "from roost_client import job\njob('one')(lambda: 1)\njob('one')(lambda: 2)\n",
        "has that name already",
    ),
}
BROKEN_SETTINGS = {
    "no TOML": ("[worker\n", "roost.toml"),
    "an unknown key": ("[worker]\npoll_intervall = 1\n", "worker.poll_intervall"),
}


@pytest.fixture
def app(folder: Path) -> Path:
    (folder / "app").mkdir()
    return folder / "app"


def settings_for(app: Path, **settings: Any) -> Settings:
    return {
        "handlers": {"modules": ["tasks", "shop"], "pythonpath": [str(app), str(HANDLERS)], "import_timeout": 30.0},
        **settings,
    }


def reload(daemon: Daemon) -> dict[str, Any]:
    """The verdict."""
    since = daemon.mark()
    daemon.signal(signal.SIGHUP)
    return eventually(
        lambda: (daemon.entries("reload.done", since=since) + daemon.entries("reload.failed", since=since))[0:1],
        lambda: f"verdict on a reload. {daemon.told()}",
    )[0]


def test_a_reload_that_is_no_good_changes_nothing(start_daemon: StartDaemon, jobs: Jobs, app: Path) -> None:
    good = SHOP.format(version=1)
    (app / "shop.py").write_text(good)
    daemon = start_daemon(settings_for(app))
    processes = set(daemon.processes())
    held = jobs.add("long", {"key": "held"})
    daemon.wait_started("held")
    daemon.write_config({"handlers": {"import_timeout": 1.0}})
    for what, (text, error) in BROKEN_MODULES.items():
        (app / "shop.py").write_text(text)
        if what != "an import that hangs":
            daemon.write_config({"handlers": {"import_timeout": 30.0}})
        assert_refused(daemon, what, error)
        assert jobs.wait(jobs.add("version")).result == 1
        daemon.write_config({"handlers": {"import_timeout": 1.0}})
    (app / "shop.py").write_text(good)
    for what, (text, error) in BROKEN_SETTINGS.items():
        daemon.config_file.write_text(text)
        assert_refused(daemon, what, error)
        assert jobs.wait(jobs.add("version")).result == 1
    assert set(daemon.processes()) == processes
    daemon.let_go("held")
    assert jobs.wait(held).attempt == 1
    assert jobs.query("SELECT id FROM roost.jobs WHERE attempt <> 1") == []


def assert_refused(daemon: Daemon, what: str, error: str) -> None:
    verdict = reload(daemon)
    assert verdict["event"] == "reload.failed", what
    assert error in verdict["error"], what
    assert verdict["still"] == 1, what


def test_new_jobs_run_new_code_and_running_ones_end_on_the_old(
    start_daemon: StartDaemon, jobs: Jobs, app: Path
) -> None:
    (app / "shop.py").write_text(SHOP.format(version=1))
    daemon = start_daemon(settings_for(app))
    held = jobs.add("long", {"key": "held"})
    daemon.wait_started("held")
    old_template = daemon.wait_template()
    old_children = daemon.wait_children(2)
    (app / "shop.py").write_text(SHOP.format(version=2))
    assert reload(daemon)["event"] == "reload.done"
    assert jobs.wait(jobs.add("version")).result == 2
    assert is_alive(old_template)
    daemon.let_go("held")
    assert jobs.wait(held).result == 1
    eventually(lambda: not is_alive(old_template), "end of the old template")
    assert not set(daemon.wait_children(2)) & set(old_children)
    assert {jobs.wait(jobs.add("version")).result for _ in range(4)} == {2}
    assert jobs.query("SELECT id FROM roost.jobs WHERE attempt <> 1") == []


def test_twenty_reloads_in_a_row_under_load_cost_no_job_anything(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    number = 3000
    jobs.roost.enqueue_many([JobInsert("note", {"line": str(n), "seconds": 0.002}) for n in range(number)])
    eventually(lambda: len(daemon.notes()) > 100, "load")
    for sent in range(1, 21):
        daemon.signal(signal.SIGHUP)
        eventually(lambda sent=sent: len(daemon.entries("signal.received")) == sent, f"signal {sent}")  # type: ignore[misc]
    generations = len(daemon.entries("generation.starting"))
    eventually(lambda: jobs.count("completed") == number, lambda: f"end of all jobs. {daemon.told()}")
    assert jobs.query("SELECT id FROM roost.jobs WHERE attempt <> 1 OR errors <> '[]'") == []
    assert Counter(daemon.notes()) == Counter(map(str, range(number)))
    daemon.wait_for("generation.ready", generation=generations)
    assert reload(daemon)["event"] == "reload.done"
    daemon.wait_template()
    daemon.wait_children(2)


def test_a_reload_that_is_asked_for_in_the_database_is_answered_there(
    start_daemon: StartDaemon, jobs: Jobs, app: Path
) -> None:
    (app / "shop.py").write_text(SHOP.format(version=1))
    daemon = start_daemon(settings_for(app, worker={"heartbeat_interval": 30.0}))  # the notification brings it
    answer = ask_for_reload(jobs)
    assert (answer["ok"], answer["error"], answer["generation"]) == (True, "", 2)
    (app / "shop.py").write_text("raise RuntimeError('not today')\n")
    answer = ask_for_reload(jobs)
    assert (answer["ok"], answer["generation"]) == (False, 2)
    assert "RuntimeError: not today" in answer["error"]
    assert len(daemon.entries("reload.requested")) == 2


def ask_for_reload(jobs: Jobs) -> dict[str, Any]:
    request = str(jobs.roost.request_reload())

    def answer() -> dict[str, Any] | None:
        (worker,) = jobs.roost.list_workers()
        found = worker.metadata.get("reload")
        return found if found and found["request"] == request else None

    return eventually(answer, lambda: f"answer to a reload request. {jobs.told()}")


def test_pools_are_added_resized_moved_and_removed_by_a_reload(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    held = jobs.add("hold", {"key": "held"})
    daemon.wait_started("held")
    daemon.write_config({"pools": {"default": {"concurrency": 1}, "mail": {"queues": ["mail"], "concurrency": 3}}})
    assert reload(daemon)["event"] == "reload.done"
    assert jobs.wait(jobs.add("noop", queue="mail")).state == "completed"
    mail = jobs.add("hold", {"key": "mail"}, queue="mail")
    daemon.wait_started("mail")
    daemon.let_go("held")
    assert jobs.wait(held).attempt == 1
    daemon.wait_children(4)

    daemon.write_config({"pools": {"mail": None, "default": None, "all": {"queues": ["default"], "concurrency": 2}}})
    assert reload(daemon)["event"] == "reload.done"
    assert jobs.wait(jobs.add("noop")).state == "completed"
    left = jobs.add("noop", queue="mail")
    eventually(lambda: jobs.roost.list_workers()[0].queues == ("default",), "worker of one queue")
    assert jobs.get(mail).state == "executing"
    daemon.let_go("mail")
    assert jobs.wait(mail).attempt == 1
    daemon.wait_children(2)
    assert jobs.get(left).state == "available"


def test_a_stop_while_the_handlers_are_imported_is_prompt(start_daemon: StartDaemon, app: Path) -> None:
    (app / "shop.py").write_text(HANGS)
    daemon = start_daemon(settings_for(app), ready=False)
    daemon.wait_for("generation.starting")
    asked_at = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - asked_at < 10


def test_a_stop_during_a_reload_lets_the_running_job_end(start_daemon: StartDaemon, jobs: Jobs, app: Path) -> None:
    (app / "shop.py").write_text(SHOP.format(version=1))
    daemon = start_daemon(settings_for(app))
    held = jobs.add("long", {"key": "held"})
    daemon.wait_started("held")
    (app / "shop.py").write_text(HANGS)
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("generation.starting", generation=2)
    daemon.signal(signal.SIGTERM)
    daemon.wait_for("worker.draining")
    daemon.let_go("held")
    assert daemon.wait_exit() == 0
    job = jobs.get(held)
    assert (job.state, job.attempt, job.result) == ("completed", 1, 1)


def test_a_reload_that_is_asked_for_during_the_start_follows_it(
    start_daemon: StartDaemon, jobs: Jobs, app: Path
) -> None:
    slow = "import time\nfrom pathlib import Path\nwhile not Path('import.go').exists():\n    time.sleep(0.01)\n"
    (app / "shop.py").write_text(slow)
    daemon = start_daemon(settings_for(app), ready=False)
    daemon.wait_for("generation.starting")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("signal.received", signal="SIGHUP")
    (app / "shop.py").write_text(SHOP.format(version=2))
    (daemon.folder / "import.go").touch()
    daemon.wait_ready()
    daemon.wait_for("reload.done")
    assert jobs.wait(jobs.add("version")).result == 2


def test_a_new_generation_is_tried_again_when_the_template_died_and_the_code_is_broken(
    start_daemon: StartDaemon, jobs: Jobs, app: Path
) -> None:
    (app / "shop.py").write_text(SHOP.format(version=1))
    daemon = start_daemon(settings_for(app))
    template = daemon.wait_template()
    (app / "shop.py").write_text("raise RuntimeError('half edited')\n")
    since = daemon.mark()
    os.kill(template, signal.SIGKILL)
    daemon.wait_for("reload.failed", since=since)
    job = jobs.add("version")
    (app / "shop.py").write_text(SHOP.format(version=2))
    assert jobs.wait(job).result == 2
    daemon.wait_children(2)


def test_a_reload_puts_the_settings_of_the_worker_into_force(start_daemon: StartDaemon, jobs: Jobs) -> None:
    slow = {"heartbeat_interval": 1000.0, "orphan_stale_after": 3000.0, "poll_interval": 1000.0}
    daemon = start_daemon({"worker": {**slow, "error_cap": 3}})
    assert len(jobs.wait(jobs.add("fail", max_attempts=4)).errors) == 3
    daemon.write_config(
        {
            "worker": {"heartbeat_interval": 0.1, "poll_interval": 0.1, "error_cap": 2, "name": "other"},
            "log": {"level": "info"},
        }
    )
    assert reload(daemon)["event"] == "reload.done"
    assert daemon.entries("reload.needs_restart", key="worker.name")
    assert len(jobs.wait(jobs.add("fail", max_attempts=4)).errors) == 2
    beats: set[object] = set()
    eventually(
        lambda: beats.add(jobs.roost.list_workers()[0].last_seen_at) or len(beats) > 3,  # type: ignore[func-returns-value]
        "heartbeats",
        seconds=30,
    )
    scheduled = jobs.add("noop", scheduled_at=datetime.now(UTC) + timedelta(seconds=0.5))
    assert jobs.wait(scheduled, seconds=30).state == "completed"
    since = daemon.mark()
    jobs.wait(jobs.add("os_exit", {"status": 0}, max_attempts=1))
    daemon.wait_for("child.exited", since=since)
    daemon.wait_children(2)
    assert not daemon.entries("child.started", since=since)  # of level debug
