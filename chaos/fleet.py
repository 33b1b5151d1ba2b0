"""The masters of a campaign: real daemons, started, watched through /proc and their logs, ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import CHECKOUT
from chaos import handlers
from roostd import linux

COMMAND = Path(sys.executable).with_name("roostd")
Entry = dict[str, Any]

# Short, so that many faults fit into minutes; what is checked follows from them by the documented formulas.
HEARTBEAT_INTERVAL = 0.5
STALE_AFTER = 5.0
REAPER_INTERVAL = 1.0
POLL_INTERVAL = 0.5
RECONNECT_DELAY = 0.5
KILL_GRACE = 0.5
SHUTDOWN_TIMEOUT = 1.0
MAX_CRASHES = 3
CHILDREN = 2  # of the pool that does the work
ALL_CHILDREN = CHILDREN + 1  # with the one that waits for probes
CRON_ENTRIES = 20
CRON = "".join(
    f'[cron.every_{n:02}]\nexpression = "* * * * *"\ntask = "chaos_tick"\nqueue = "work"\ncatch_up = "latest"\n'
    for n in range(CRON_ENTRIES)
)

_CONFIG = """\
[database]
dsn = "host=127.0.0.1 port={port} user=roost dbname=roost sslmode=disable gssencmode=disable"
listen_reconnect_delay = {RECONNECT_DELAY}
startup_max_retries = 60
startup_retry_delay = 0.3
[worker]
name = "{name}"
poll_interval = {POLL_INTERVAL}
heartbeat_interval = {HEARTBEAT_INTERVAL}
orphan_reaper_interval = {REAPER_INTERVAL}
orphan_stale_after = {STALE_AFTER}
shutdown_timeout = {SHUTDOWN_TIMEOUT}
kill_grace = {KILL_GRACE}
max_crashes = {MAX_CRASHES}
retry_strategy = {{ strategy = "fixed", delay = 0.2 }}
[handlers]
modules = ["chaos.handlers", "generation"]
pythonpath = ["{code}", "{CHECKOUT}"]
[pools.work]
queues = ["work", "held"]
concurrency = {CHILDREN}
max_jobs_per_child = 400
[pools.probe]
queues = ["probe"]
concurrency = 1
{CRON}
[log]
level = "debug"
format = "json"
"""


class Master:
    """One `roostd` under a name that stays, with a process that comes and goes; one log for all of them."""

    def __init__(self, name: str, folder: Path, port: int, ledger: Path, dsn: str) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        self.generation = 0
        self._code = folder / f"{name}-code"
        self._code.mkdir()
        self._config_file = folder / f"{name}.toml"
        self._port = port
        self._environ = {handlers.FOLDER: str(ledger), handlers.MASTER: name, handlers.DSN: dsn}
        self._environ |= {"PYTHONDONTWRITEBYTECODE": "1"}
        self._process: subprocess.Popen[bytes] | None = None
        self.write_code("ITS = 0\n")
        self.write_config()

    # -- its files

    def write_code(self, text: str) -> None:
        """Of the module `generation`, which it imports along with the handlers."""
        (self._code / "generation.py").write_text(text)

    def write_config(self, more: str = "") -> None:
        values = {key: value for key, value in globals().items() if key.isupper()}
        text = _CONFIG.format(name=self.name, port=self._port, code=self._code, **values)
        self._config_file.write_text(text + more)

    # -- its process

    def start(self, skew_seconds: float = 0.0) -> None:
        """Starts the daemon; its clock, and that of all it starts, is off by `skew_seconds`."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "ROOST_"))}
        environ |= self._environ
        if skew_seconds:
            environ |= {"CHAOS_SKEW": str(skew_seconds)}
            environ["PYTHONPATH"] = os.pathsep.join(
                [str(CHECKOUT / "chaos" / "skew"), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [str(COMMAND), "-c", str(self._config_file)],
                cwd=self.log_file.parent,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def templates(self) -> list[int]:
        return [pid for pid in linux.children_of(self.pid) if title_of(pid).startswith("roostd: template")]

    def children(self) -> list[int]:
        """The living children of all its templates."""
        return [
            pid
            for template in self.templates()
            for pid in linux.children_of(template)
            if state_of(pid) not in ("", "Z", "X")
        ]

    def is_whole(self) -> bool:
        """Whether it has one template, and every child that it is to have."""
        return self.runs and len(self.templates()) == 1 and len(self.children()) == ALL_CHILDREN

    def signal(self, number: int) -> None:
        if self.runs:
            os.kill(self.pid, number)

    # -- its log

    def mark(self) -> int:
        """A place in the log, for `since`."""
        return self.log_file.stat().st_size if self.log_file.exists() else 0

    def entries(self, *events: str, since: int = 0) -> Iterator[Entry]:
        """What it logged under any of these events (none: under all)."""
        if not self.log_file.exists():
            return
        with self.log_file.open("rb") as file:
            file.seek(since)
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:  # the line that is being written, or what a dying process printed
                    continue
                if isinstance(entry, dict) and (not events or entry.get("event") in events):
                    yield entry

    def said(self, *events: str, since: int) -> bool:
        return any(True for _ in self.entries(*events, since=since))

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, seconds: float = 20.0) -> int | None:
        """Ends it by SIGTERM; its exit status, None when it had to be killed."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def state_of(pid: int) -> str:
    """R, S, D, T, Z as in proc(5); empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def open_files_of(pid: int) -> dict[int, str]:
    """What each descriptor is, as proc(5) has it; empty when it is gone."""
    files = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                files[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return files


def sockets() -> dict[str, str]:
    """What each socket is, by the name that `open_files_of` has for it."""
    found = {}
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        port = int(words[2].rpartition(":")[2], 16)
        found[f"socket:[{words[9]}]"] = f"TCP to {port}, state {words[3]}"
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        found[f"socket:[{line.split()[6]}]"] = "unix socket"
    return found


def rss_bytes_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None


def now() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)
