"""The real daemon as a test drives it: started with a configuration of its own, read through its log, always ended.

Every process that the daemon starts keeps its working directory, the test's folder. So what is left behind can be found
whatever became of its parents, and `close` fails for it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import pytest

from chaos.fleet import state_of, title_of
from roostd import linux

T = TypeVar("T")
Entry = dict[str, Any]
Settings = dict[str, Any]

PATIENCE_SECONDS = 60.0  # far above what anything here takes, also on a busy machine
COMMAND = Path(sys.executable).with_name("roostd")
HANDLERS = Path(__file__).parent / "handlers"
_SHOWN_LINES = 400


def eventually(look: Callable[[], T | None], what: str | Callable[[], str], seconds: float = PATIENCE_SECONDS) -> T:
    """What `look` returns as soon as it is true; fails when it never is."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds:g} s there was no {what if isinstance(what, str) else what()}")
        time.sleep(0.01)
    return found


class Daemon:
    """One `roostd`. `settings` are laid over `defaults`; a section's key that is None is left out."""

    def __init__(self, folder: Path, dsn: str | None, settings: Settings | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config_file = folder / "roost.toml"
        self.settings = _merged(_defaults(dsn), settings or {})
        self.write_config()
        self.stdout_bytes = 0
        self._stdout: deque[bytes] = deque(maxlen=100)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: list[Entry] = []
        self._began = 0  # the place in it of the last start
        self._news = threading.Condition()
        self._readers: list[threading.Thread] = []

    # -- start and end

    def write_config(self, settings: Settings | None = None) -> None:
        """Writes the configuration file, with `settings` laid over what it held."""
        self.settings = _merged(self.settings, settings or {})
        self.config_file.write_text(_as_toml(self.settings))

    def start(self, *options: str, environ: Mapping[str, str] | None = None) -> Self:
        """Starts the daemon, again if it ran before; its log goes on."""
        assert self._process is None or self._process.poll() is not None, "it still runs"
        self._join()
        self._began = len(self._log)
        # Without bytecode, because its age is told in seconds, and a test changes a module twice in one.
        variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})}
        self._process = subprocess.Popen(
            [str(COMMAND), "-c", str(self.config_file), *options],
            cwd=self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read_stdout, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_log, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        return self

    def wait_ready(self) -> Self:
        self.wait_for("worker.ready", since=self._began)
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_exit(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit status, once it has ended and all it wrote has been read."""
        assert self._process is not None
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"roostd did not end within {seconds:g} s. {self.told()}")
        self._join()
        return status

    def stop(self) -> int:
        """Ends it by SIGTERM; its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait_exit()

    def close(self) -> None:
        """Ends it if it still runs, and fails when anything goes wrong with that or anything is left behind."""
        try:
            if self._process is not None and self._process.poll() is None:
                self.signal(signal.SIGCONT)
                assert self.stop() == 0, self.told()
            eventually(lambda: not self.processes(), lambda: f"end of what is left behind: {self._titles()}", 10)
        finally:
            for pid in self.processes():
                _kill(pid)
            if self._process is not None:
                self._process.wait()
                self._join()

    # -- its processes

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def processes(self) -> list[int]:
        """The pids of the daemon and of all it started, zombies aside."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _directory_of(pid) == self.folder]

    def children(self) -> list[int]:
        return [pid for pid in self.processes() if title_of(pid).startswith("roostd: child")]

    def templates(self) -> list[int]:
        return [pid for pid in self.processes() if title_of(pid).startswith("roostd: template")]

    def wait_template(self) -> int:
        """The pid of the template, once there is one; a child bears its name until it has its own."""
        return eventually(
            lambda: templates[0] if len(templates := self.templates()) == 1 else None,
            lambda: f"only template, but {self._titles()}. {self.told()}",
        )

    def wait_children(self, number: int) -> list[int]:
        """The pids of its children, once there are `number` and each is on its own."""
        return eventually(
            lambda: children if len(children := self.children()) == number else None,
            lambda: f"pool of {number} children, but {self._titles()}. {self.told()}",
        )

    def zombies(self) -> list[int]:
        """The dead among the processes below the daemon that nobody has asked for their status."""
        pending, found = [self.pid], []
        while pending:
            for child in linux.children_of(pending.pop()):
                pending.append(child)
                if state_of(child) == "Z":
                    found.append(child)
        return found

    # -- what its jobs leave in the folder: see handlers/tasks.py

    def wait_started(self, *keys: str) -> None:
        """Returns when each of the jobs `hold` and its like has started."""
        for key in keys:
            eventually((self.folder / f"{key}.started").exists, lambda: f"start of job {key}. {self.told()}")  # noqa: B023

    def let_go(self, *keys: str) -> None:
        """Lets these jobs end."""
        for key in keys:
            (self.folder / f"{key}.go").touch()

    def wait_text(self, name: str) -> str:
        file = self.folder / name
        eventually(file.exists, lambda: f"file {name}. {self.told()}")
        return file.read_text()

    def notes(self) -> list[str]:
        """The lines that the jobs `note` and its like have written, in order."""
        file = self.folder / "notes.txt"
        return file.read_text().splitlines() if file.exists() else []

    # -- its log

    def mark(self) -> int:
        """A place in the log, for `since`."""
        return len(self._log)

    def entries(self, event: str | None = None, *, since: int = 0, **values: Any) -> list[Entry]:
        """The entries with this event and these values, a value being what it must equal or a test of it."""
        return [entry for entry in self._log[since:] if _fits(entry, event, values)]

    def wait_for(self, event: str, *, since: int = 0, seconds: float = PATIENCE_SECONDS, **values: Any) -> Entry:
        """The first entry of this kind, once it is there; fails with the whole log when it doesn't come."""
        deadline = time.monotonic() + seconds
        seen = since
        with self._news:
            while True:
                for entry in self._log[seen:]:
                    if _fits(entry, event, values):
                        return entry
                seen = len(self._log)
                left = deadline - time.monotonic()
                if left <= 0 or (self._ended and not self._news.wait(0.2)):
                    break
                self._news.wait(left)
        what = " ".join([event, *(f"{key}={value}" for key, value in values.items())])
        pytest.fail(f"roostd {'ended' if self._ended else f'ran {seconds:g} s'} without logging {what}. {self.told()}")

    @property
    def stdout(self) -> str:
        """The end of what it and its handlers printed."""
        return b"".join(self._stdout).decode(errors="replace")

    def told(self) -> str:
        """The log, for the message of a failure."""
        lines = [entry.get("text") or json.dumps(entry) for entry in self._log]
        left_out = [f"… {len(lines) - _SHOWN_LINES} lines …"] if len(lines) > _SHOWN_LINES else []
        return "\n".join(["Its log:", *left_out, *lines[-_SHOWN_LINES:]])

    @property
    def _ended(self) -> bool:
        return bool(self._readers) and not self._readers[1].is_alive()

    def _titles(self) -> list[str]:
        return [f"{pid} {title_of(pid)}" for pid in self.processes()]

    def _read_log(self, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                try:
                    entry = json.loads(line)
                    assert entry["event"]
                except (ValueError, KeyError, TypeError, AssertionError):
                    entry = {"event": "", "text": line.decode(errors="replace").rstrip("\n")}
                with self._news:
                    self._log.append(entry)
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _read_stdout(self, stream: IO[bytes]) -> None:
        with stream:
            while chunk := stream.read1(1 << 20):  # type: ignore[attr-defined]
                self.stdout_bytes += len(chunk)
                self._stdout.append(chunk[-10_000:])

    def _join(self) -> None:
        for reader in self._readers:
            reader.join(10)  # a process that was left behind may hold the pipe


# -- processes


def is_alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z")


def cpu_seconds(pid: int) -> float:
    """What a process has used so far, with the children that it has reaped."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _directory_of(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


# -- configuration


def _defaults(dsn: str | None) -> Settings:
    return {
        "database": {"dsn": dsn, "listen_reconnect_delay": 0.2, "startup_max_retries": 5, "startup_retry_delay": 0.2},
        "worker": {
            "heartbeat_interval": 0.3,
            "orphan_reaper_interval": 0.5,
            "kill_grace": 0.5,
            "retry_strategy": {"strategy": "fixed", "delay": 0},
        },
        "handlers": {"modules": ["tasks"], "pythonpath": [str(HANDLERS)]},
        "pools": {"default": {"queues": ["default"], "concurrency": 2}},
        "log": {"level": "debug", "format": "json"},
    }


def _merged(below: Settings, above: Settings) -> Settings:
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _as_toml(settings: Settings, path: tuple[str, ...] = ()) -> str:
    lines = [f"[{'.'.join(path)}]"] if path else []
    lines += [f"{k} = {json.dumps(v)}" for k, v in settings.items() if v is not None and not isinstance(v, dict)]
    tables = [_as_toml(v, (*path, k)) for k, v in settings.items() if isinstance(v, dict)]
    return "\n".join([*lines, "", *tables])


def _fits(entry: Entry, event: str | None, values: Mapping[str, Any]) -> bool:
    if event is not None and entry["event"] != event:
        return False
    return all(
        key in entry and (value(entry[key]) if callable(value) else entry[key] == value)
        for key, value in values.items()
    )
