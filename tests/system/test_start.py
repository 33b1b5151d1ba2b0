"""The command's start and end: settings that are no good, a database that is not there, --check, --once, --embedded."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from roostd.embedded import installations
from tests.system.conftest import StartDaemon
from tests.system.daemon import COMMAND, Daemon, eventually
from tests.system.jobs import Jobs

DSN = 'database.dsn = "postgresql://u:hunter2@/app"\n'


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


# -- settings that are no good


def mistakes() -> Iterator[tuple[str, str, list[str]]]:
    """What is wrong, the configuration, and what the message must name: the key, and the fix."""
    yield "unknown key", DSN + "worker.poll_intervall = 1", ["worker.poll_intervall", "worker.poll_interval?"]
    yield "wrong type", DSN + "worker.poll_interval = 'fast'", ["worker.poll_interval", "expected a number"]
    yield "no TOML", DSN + "[worker", ["Expected ']'", "correct the TOML"]
    yield "missing DSN file", "database.dsn_file = 'no-such-file'", ["database.dsn_file", "create it"]
    yield "unreadable DSN file", "database.dsn_file = '/'", ["database.dsn_file", "let the user who runs this read it"]
    yield (
        "two pools with one queue",
        DSN + "pools.a.queues = ['x', 'y']\npools.b.queues = ['y']",
        ["pools.b.queues", "pools.a.queues", "'y'", "leave it in one of them"],
    )


@pytest.mark.parametrize(("text", "named"), [pytest.param(*rest, id=what) for what, *rest in mistakes()])
def test_settings_that_are_no_good_are_refused_in_one_message(tmp_path: Path, text: str, named: list[str]) -> None:
    file = tmp_path / "roost.toml"
    file.write_text(text)
    ran = run("-c", file, cwd=tmp_path)
    assert ran.returncode == 78
    assert ran.stdout == ""
    (message,) = ran.stderr.splitlines()
    assert message.startswith("roostd: ")
    for part in [str(file), *named]:
        assert part in message
    assert "hunter2" not in message


def test_a_configuration_file_that_is_missing_is_named(tmp_path: Path) -> None:
    ran = run("-c", "no-such.toml", "--check", cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (78, "")
    assert ran.stderr == "roostd: cannot read no-such.toml: no such file; create it, or name another one with -c\n"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "ModuleNotFoundError: No module named 'shop'"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def broken(:", "SyntaxError: "),
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
        ("import ctypes; ctypes.string_at(0)", "was killed by signal 11 (SIGSEGV)"),
        ("import os; os._exit(0)", "exited with status 0"),
        ("import time; time.sleep(60)", "took more than import_timeout (1 s)"),
    ],
)
def test_handlers_that_do_not_import_are_refused_by_start_and_check(
    folder: Path, dsn: str, text: str | None, error: str
) -> None:
    daemon = Daemon(
        folder,
        dsn,
        {
            "handlers": {
                "modules": ["shop"],
                "pythonpath": [str(folder)],
                "import_timeout": 1.0 if "sleep" in (text or "") else 30.0,
            }
        },
    )
    if text is not None:
        (folder / "shop.py").write_text(text)
    with closing(daemon):
        assert daemon.start().wait_exit() == 78
        last = daemon.entries()[-1]["text"]
        assert last.startswith("roostd: ")
        for part in (error, str(daemon.config_file), "handlers.modules", "correct the code"):
            assert part in last
    if text is None:
        check = run("-c", daemon.config_file, "--check", cwd=folder)
        assert check.returncode == 78
        assert check.stderr.splitlines()[-1] == last


# -- a database that is no good


@pytest.mark.parametrize("retries", [0, 2])
def test_a_database_that_is_not_there_is_tried_again_and_then_given_up(folder: Path, retries: int) -> None:
    database = {"startup_max_retries": retries, "startup_retry_delay": 0.05}
    with closing(Daemon(folder, f"host={folder} dbname=none", {"database": database})) as daemon:
        assert daemon.start().wait_exit() == 69
        assert len(daemon.entries("db.unreachable")) == retries + 1
        assert "cannot reach the database" in daemon.entries()[-1]["text"]


def test_a_database_that_does_not_exist_is_no_wrong_setting(folder: Path, dsn: str) -> None:
    missing = make_conninfo(dsn, dbname="no_such_database")
    with closing(Daemon(folder, missing, {"database": {"startup_max_retries": 1}})) as daemon:
        assert daemon.start().wait_exit() == 69
        assert "no_such_database" in daemon.entries()[-1]["text"]


def test_a_database_without_the_schema_is_refused_with_the_command_that_makes_it(folder: Path, empty_dsn: str) -> None:
    with closing(Daemon(folder, empty_dsn)) as daemon:
        assert daemon.start().wait_exit() == 78
        assert "roostctl migrate up" in daemon.entries()[-1]["text"]


# -- check and once


def test_check_prints_every_setting_with_its_origin_and_every_task(folder: Path, dsn: str) -> None:
    daemon = Daemon(folder, make_conninfo(dsn, password="hunter2"))
    ran = subprocess.run(
        [COMMAND, "-c", daemon.config_file, "--check", "--log-level", "error"],
        cwd=folder,
        env={**os.environ, "ROOST_WORKER__ERROR_CAP": "7"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert f"worker.heartbeat_interval = 0.3   # {daemon.config_file}" in lines
    assert "worker.error_cap = 7   # environment ROOST_WORKER__ERROR_CAP" in lines
    assert "worker.max_crashes = 3   # default" in lines
    assert 'log.level = "error"   # flag --log-level' in lines
    assert "noop" in lines[-1]
    assert "hunter2" not in ran.stdout + ran.stderr


def test_once_runs_what_may_run_now_and_prints_how_much(folder: Path, jobs: Jobs) -> None:
    completed = [*jobs.add_many(300, "noop"), jobs.add("fail_first", {"key": "first", "times": 2})]
    completed.append(jobs.add("enqueue_more", {"dsn": jobs.dsn, "task": "noop"}))
    discarded = jobs.add("fail", max_attempts=2)
    later = jobs.add("noop", scheduled_at=datetime.now(UTC) + timedelta(hours=1))
    paused = jobs.add("noop", queue="default2")
    with closing(Daemon(folder, jobs.dsn)) as daemon:
        assert daemon.start("--once").wait_exit() == 0
        assert {jobs.get(job_id).state for job_id in completed} == {"completed"}
        assert jobs.get(discarded).state == "discarded"
        assert {jobs.get(job_id).state for job_id in (later, paused)} == {"available"}
        assert int(daemon.stdout) >= 304
        assert jobs.query("SELECT id FROM roost.workers") == []
    with closing(Daemon(folder / "again", jobs.dsn)) as daemon:
        assert daemon.start("--once").wait_exit() == 0
        assert daemon.stdout == "0\n"


def test_once_tells_what_ended_after_it_was_stopped_too(start_daemon: StartDaemon, jobs: Jobs) -> None:
    for key in ("one", "two"):
        jobs.add("hold", {"key": key})
    jobs.add_many(5, "noop")
    daemon = start_daemon({"pools": {"default": {"concurrency": 2}}}, "--once", ready=False)
    for key in ("one", "two"):
        daemon.wait_started(key)
    daemon.signal(signal.SIGTERM)
    daemon.wait_for("worker.draining")
    for key in ("one", "two"):
        daemon.let_go(key)
    assert daemon.wait_exit() == 0
    assert (daemon.stdout, jobs.count("completed")) == ("2\n", 2)


# -- embedded


@pytest.mark.skipif(not installations(), reason="no PostgreSQL on this machine")
def test_an_embedded_database_lives_as_long_as_its_daemon_and_keeps_its_data(folder: Path) -> None:
    directory = folder / "postgres"
    dsn = f"postgresql://roost@/roost?host={directory}/data&port=5432"
    settings = {"database": {"dsn": None, "embedded": str(directory)}, "worker": {"heartbeat_interval": 1.0}}
    with closing(Daemon(folder / "daemon", None, settings)) as daemon, closing(Jobs(dsn)) as jobs:
        jobs.told = daemon.told
        daemon.start().wait_ready()
        first = jobs.wait(jobs.add("echo", {"value": "kept"}))
        assert first.result == "kept"
        assert daemon.stop() == 0
        assert servers(directory) == []

        daemon.start().wait_ready()
        assert jobs.get(first.id) == first
        held = jobs.add("hold", {"key": "held"})
        daemon.wait_started("held")
        daemon.signal(signal.SIGKILL)
        daemon.wait_exit()

        daemon.let_go("held")
        daemon.start().wait_for("worker.ready", since=daemon.mark())
        job = jobs.wait(held)
        assert (job.state, job.attempt) == ("completed", 2)
        assert jobs.get(first.id) == first
        assert daemon.stop() == 0
        assert servers(directory) == []


def servers(directory: Path) -> list[str]:
    """The processes of PostgreSQL that have the directory's data open."""
    inode = (directory / "data").stat().st_ino
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            title = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f":{inode:x}]" in title:
            found.append(title)
    return found


# -- systemd


class Systemd:
    """The socket that NOTIFY_SOCKET names, and what was said to it."""

    def __init__(self, path: Path) -> None:
        self.messages: list[dict[str, str]] = []
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := self._socket.recv(65536):
            self.messages.append(dict(line.split("=", 1) for line in data.decode().splitlines()))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()

    def told(self, fits: Callable[[dict[str, str]], bool], since: int = 0) -> int:
        """The place after the first message that fits, once there is one."""

        def look() -> int | None:
            places = [n for n, message in enumerate(self.messages[since:], since + 1) if fits(message)]
            return places[0] if places else None

        return eventually(look, lambda: f"such message among {self.messages[since:]}")


def test_systemd_is_told_of_each_phase(start_daemon: StartDaemon, jobs: Jobs, folder: Path) -> None:
    with closing(Systemd(folder / "notify")) as systemd:
        environ = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "400000"}
        daemon = start_daemon(environ=environ)
        ready = systemd.told(lambda message: message.get("READY") == "1")
        assert "children 2" in systemd.messages[ready - 1]["STATUS"]
        assert not [message for message in systemd.messages[: ready - 1] if "RELOADING" in message]
        for _ in range(5):
            ready = systemd.told(lambda message: message.get("WATCHDOG") == "1", ready)

        for text in (daemon.config_file.read_text(), "[worker\n"):  # a good reload, and one that fails
            daemon.config_file.write_text(text)
            daemon.signal(signal.SIGHUP)
            reloading = systemd.told(lambda message: message.get("RELOADING") == "1", ready)
            assert systemd.messages[reloading - 1]["MONOTONIC_USEC"].isdecimal()
            ready = systemd.told(lambda message: message.get("READY") == "1", reloading)

        held = jobs.add("hold", {"key": "held"})
        daemon.wait_started("held")
        systemd.told(lambda message: "running 1" in message.get("STATUS", ""))
        daemon.signal(signal.SIGTERM)
        stopping = systemd.told(lambda message: message.get("STOPPING") == "1", ready)
        systemd.told(lambda message: int(message.get("EXTEND_TIMEOUT_USEC", 0)) > 0, stopping)
        systemd.told(lambda message: message.get("WATCHDOG") == "1", stopping)  # or it would be killed while it drains
        daemon.let_go("held")
        assert daemon.wait_exit() == 0
        assert jobs.get(held).state == "completed"
        assert not [message for message in systemd.messages[stopping:] if "READY" in message]


def test_jobs_cannot_speak_to_systemd_for_the_daemon(start_daemon: StartDaemon, jobs: Jobs, folder: Path) -> None:
    with closing(Systemd(folder / "notify")) as systemd:
        start_daemon(environ={"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "60000000", "SEEN": "1"})
        names = jobs.wait(jobs.add("environment")).result
    assert names is not None
    assert "SEEN" in names
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(names)
