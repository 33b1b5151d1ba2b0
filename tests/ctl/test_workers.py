"""workers, reload and status with real daemons."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from roost_client import Roost
from tests.ctl.conftest import COMMAND, Ctl
from tests.system.daemon import Daemon, eventually

pytestmark = pytest.mark.daemon

HANDLERS = """
import os, time
from roost_client import job

@job("which_code")
def which_code(): return "first"

@job("sleep")
def sleep(): time.sleep(3600)
"""


@pytest.fixture
def handlers() -> Iterator[Path]:
    """A module of handlers that the test may change, in a folder with a short name."""
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        module = Path(directory).resolve() / "changing.py"
        module.write_text(HANDLERS)
        yield module


@pytest.fixture
def daemon(dsn: str, handlers: Path) -> Iterator[Daemon]:
    settings = {
        "worker": {"name": "alpha"},
        "handlers": {"modules": ["changing"], "pythonpath": [str(handlers.parent)]},
    }
    with closing(Daemon(handlers.parent / "daemon", dsn, settings)) as daemon:
        yield daemon.start().wait_ready()


def result_of(roost: Roost, job_id: int) -> object:
    job = eventually(lambda: job if (job := roost.get_job(job_id)).state == "completed" else None, "completed job")
    return job.result


def test_workers_and_status_show_a_daemon_and_its_heartbeat(ctl: Ctl, daemon: Daemon) -> None:
    eventually(lambda: ctl("workers", "--json").json[0]["metadata"].get("state") == "running", "heartbeat")
    for command in ("workers", "status"):
        heading, row = ctl(command).lines[-2:]
        shown = dict(zip(heading.split(), row.split(), strict=True))
        assert shown["WORKER"] == "alpha"
        assert shown["HOST"] == os.uname().nodename
        assert shown["PID"] == str(daemon.pid)
        assert (shown["STATE"], shown["QUEUES"], shown["CHILDREN"]) == ("running", "default", "2")
        assert int(shown["HEARTBEAT"].removesuffix("s")) < 60
    [worker] = ctl("workers", "--json").json
    assert (worker["name"], worker["pid"]) == ("alpha", daemon.pid)
    assert 0 <= worker["silent_seconds"] < 60


def test_a_running_job_is_asked_to_stop_and_cannot_be_retried(ctl: Ctl, daemon: Daemon, roost: Roost) -> None:
    job_id = roost.enqueue("sleep")
    eventually(lambda: roost.get_job(job_id).state == "executing", "running job")
    refused = ctl("retry", job_id)
    assert refused.code == 1
    assert f"cannot retry job {job_id}: it is executing" in refused.err
    assert ctl("cancel", job_id).lines[1:] == [f" {job_id}  cancel requested"]
    eventually(lambda: roost.get_job(job_id).state == "cancelled", "cancelled job")
    assert "cancel requested  yes" in ctl("show", job_id).lines


def test_the_age_of_a_heartbeat_is_by_the_databases_clock(ctl: Ctl, dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, last_seen_at)"
            " VALUES (gen_random_uuid(), 'old', 'elsewhere', 1, '{}', 1, now() - interval '3 hours')"
        )
    assert "  3h  " in ctl("workers").lines[1]
    [worker] = ctl("workers", "--json").json
    assert worker["silent_seconds"] == pytest.approx(3 * 3600, abs=60)


def test_reload_brings_new_code_and_says_so(ctl: Ctl, daemon: Daemon, roost: Roost, handlers: Path) -> None:
    assert result_of(roost, roost.enqueue("which_code")) == "first"
    handlers.write_text(HANDLERS.replace("first", "second"))
    result = ctl("reload")
    assert result.code == 0, daemon.told()
    assert result.lines[1].split() == ["alpha", os.uname().nodename, str(daemon.pid), "ok", "2", "-"]
    assert result_of(roost, roost.enqueue("which_code")) == "second"
    [verdict] = ctl("reload", "--worker", "alpha", "--json").json
    assert (verdict["ok"], verdict["generation"], verdict["error"]) == (True, 3, None)


def test_a_reload_of_broken_code_or_settings_ends_with_1_and_the_reason(
    ctl: Ctl, daemon: Daemon, roost: Roost, handlers: Path
) -> None:
    handlers.write_text("def broken(:\n")
    result = ctl("reload")
    assert result.code == 1
    assert "failed" in result.lines[1]
    assert "SyntaxError" in result.lines[1]
    handlers.write_text(HANDLERS)
    daemon.write_config({"worker": {"nonsense": 1}})
    assert "worker.nonsense" in ctl("reload", "--json").json[0]["error"]
    assert result_of(roost, roost.enqueue("which_code")) == "first"


def test_a_request_during_a_reload_is_answered_with_the_reload_after_it(
    ctl: Ctl, daemon: Daemon, dsn: str, handlers: Path
) -> None:
    """What the reload under way has read may be older than what the operator means."""
    go = handlers.parent / "go"
    handlers.write_text(f"{HANDLERS}\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\n")
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("generation.starting", generation=2)
    asked = subprocess.Popen(
        [COMMAND, "--dsn", dsn, "reload"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    daemon.wait_for("reload.queued")
    handlers.write_text("def broken(:\n")
    go.touch()
    out, _ = asked.communicate(timeout=60)
    assert asked.returncode == 1, daemon.told()
    assert "SyntaxError" in out


def test_requests_at_the_same_time_are_all_answered(ctl: Ctl, daemon: Daemon, dsn: str) -> None:
    for _ in range(3):
        asked = [
            subprocess.Popen(
                [COMMAND, "--dsn", dsn, "reload", "--timeout", "30"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for _ in range(3)
        ]
        assert [each.communicate(timeout=60)[1] or each.returncode for each in asked] == [0, 0, 0], daemon.told()


def test_a_reload_asks_only_the_workers_that_are_meant(ctl: Ctl, daemon: Daemon, dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency)"
            " VALUES (gen_random_uuid(), 'beta', 'elsewhere', 1, '{}', 1)"
        )
    [verdict] = ctl("reload", "--json").json
    assert verdict["worker"] == "alpha"
    result = ctl("reload", "--host", "elsewhere", "--timeout", "0.2", "--json")
    assert result.code == 1
    assert [(each["worker"], each["error"]) for each in result.json] == [("beta", "did not answer within 0.2 s")]
    both = ctl("reload", "--worker", "beta", "--worker", "alpha", "--timeout", "5", "--json")
    assert both.code == 1
    assert {each["worker"]: each["ok"] for each in both.json} == {"alpha": True, "beta": False}


def test_a_reload_skips_workers_that_are_dead_and_says_which(
    ctl: Ctl, daemon: Daemon, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOST_WORKER__ORPHAN_STALE_AFTER", "60")  # its peer has 300, and leaves the row
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, last_seen_at)"
            " VALUES (gen_random_uuid(), 'beta', %s, 1, '{}', 1, now() - interval '100 s')",
            (os.uname().nodename,),
        )
    began = time.monotonic()
    result = ctl("reload", "--timeout", "60")
    assert time.monotonic() - began < 30, "it waits for nobody who can't answer"
    assert result.code == 0
    assert [line.split()[:4:3] for line in result.lines[1:]] == [["alpha", "ok"], ["beta", "skipped"]]
    assert "orphan_stale_after is 60 s" in result.out
    alone = ctl("reload", "--worker", "beta", "--timeout", "60", "--json")
    assert alone.code == 1, "nobody was reloaded"
    assert [(each["worker"], each["ok"], each["skipped"]) for each in alone.json] == [("beta", False, True)]


def test_a_reload_of_nobody_ends_with_1(ctl: Ctl) -> None:
    for options, whom in (([], "on host "), (["--worker", "x"], "named x"), (["--host", "h"], "on host h")):
        result = ctl("reload", *options)
        assert result.code == 1
        assert f"cannot reload: there is no worker {whom}" in result.err


def test_a_worker_that_ends_instead_of_answering_is_told(
    ctl: Ctl, daemon: Daemon, dsn: str, handlers: Path, ctl_process: Callable[..., object]
) -> None:
    handlers.write_text("import time\ntime.sleep(3600)\n")
    asked = subprocess.Popen([COMMAND, "--dsn", dsn, "reload"], stdout=subprocess.PIPE, text=True)
    daemon.wait_for("reload.requested")
    assert daemon.stop() == 0
    out, _ = asked.communicate(timeout=60)
    assert asked.returncode == 1
    assert "ended before it answered" in out
