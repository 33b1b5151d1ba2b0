"""What the race runs on: one PostgreSQL and one Redis of its own, fresh stores, and the competitors' processes.

All of it lives in one temporary directory and ends with the process that made it, also on Ctrl-C. Each competitor is
reached through race/client.py in processes of its own; this module never imports what it needs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bench.machine import CHECKOUT, commit_of_checkout, processor
from race.ledger import PATH_VARIABLE, Ledger
from race.peer import DSN_VARIABLE, HARM_VARIABLE, REDIS_VARIABLE
from roostd import linux
from roostd.embedded import EmbeddedPostgres

FOLDER_VARIABLE = "RACE_FOLDER"
START_SECONDS = 30.0
STOP_SECONDS = 1.0  # nothing is measured any more
CLIENT_SECONDS = 600.0
_PEERS = Path(__file__).parent / "peers"
_SETTINGS = ("fsync", "synchronous_commit", "full_page_writes", "wal_level", "shared_buffers", "max_wal_size")
_REDIS_SETTINGS = {"appendonly": "yes", "appendfsync": "everysec", "save": ""}
_numbers = itertools.count(1)


class RaceError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A competitor that runs on this machine: what its file tells, with the versions found."""

    name: str
    label: str
    store: str
    isolation: str
    settings: str
    timeout: str
    rescue: str
    hang_setting: str
    table: str
    unfinished: str
    versions: Mapping[str, str]


@dataclass(slots=True)
class Workers:
    """The processes that run jobs. One that ends by itself is started again, as any service manager would do."""

    commands: list[list[str]]
    environment: Mapping[str, str]
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    restarts: int = 0

    def start(self) -> None:
        self.processes = [self._launch(command) for command in self.commands]

    def look_after(self) -> None:
        for index, process in enumerate(self.processes):
            if process.poll() is not None:
                linux.kill_tree(process.pid)
                self.restarts += 1
                self.processes[index] = self._launch(self.commands[index])

    def stop(self) -> None:
        """Asks them to end, and ends all that is left of them and of what they started."""
        family = [pid for process in self.processes for pid in (process.pid, *linux.descendants_of(process.pid))]
        births = {pid: _birth(pid) for pid in family}
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        for pid, birth in births.items():
            if birth is not None and _birth(pid) == birth:
                linux.kill_tree(pid)
        for process in self.processes:
            process.wait()

    def pids(self) -> list[int]:
        return [pid for process in self.processes for pid in (process.pid, *linux.descendants_of(process.pid))]

    def _launch(self, command: list[str]) -> subprocess.Popen[bytes]:
        race_pid = os.getpid()
        with self.log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=self.log.parent,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=lambda: linux.die_with_parent(signal.SIGTERM, race_pid),
            )


def _birth(pid: int) -> int | None:
    try:
        return linux.started_ticks_of(pid)
    except PermissionError:
        return None


@dataclass(frozen=True, slots=True)
class Place:
    """One competitor with an empty store of its own."""

    rig: Rig
    entrant: Entrant
    dsn: str
    ledger: Ledger

    def ask(self, action: str, *arguments: object, seconds: float = CLIENT_SECONDS) -> dict[str, Any]:
        """Has a client process do it, and returns its answer."""
        return self.rig.client(self.entrant.name, action, *arguments, dsn=self.dsn, seconds=seconds)

    def enqueue(self, task: str, count: int, *, first: int = 1) -> float:
        """Seconds that it took to enqueue jobs numbered from `first` in bulk."""
        return float(self.ask("many", task, first, count)["seconds"])

    def start_client(self, action: str, *arguments: object) -> subprocess.Popen[str]:
        return self.rig.start_client(self.entrant.name, action, *arguments, dsn=self.dsn)

    def settle_down(self) -> None:
        """Does now what autovacuum and the checkpointer would do in the middle of a measurement."""
        if self.entrant.store == "PostgreSQL":
            with connect(self.dsn) as conn:
                conn.execute("VACUUM (ANALYZE)")
                conn.execute("CHECKPOINT")

    @contextmanager
    def workers(self, children: int, *, beside_harm: bool = False) -> Iterator[Workers]:
        """The competitor's workers, just started; stopped at the end."""
        setting = {HARM_VARIABLE: "1"} if beside_harm else {}
        log = self.rig.folder / f"{self.entrant.name}-{next(_numbers)}.log"
        commands = self.rig.commands(self, children, setting)
        workers = Workers(commands, self.rig.environment(self.dsn) | setting, log)
        try:
            workers.start()
            yield workers
        except RaceError as error:
            raise RaceError(f"{error}\nThe log of its workers ends with:\n{end_of(log)}") from error
        finally:
            workers.stop()


class Rig:
    def __init__(self, folder: Path, server: EmbeddedPostgres, redis: Path | None) -> None:
        self.folder = folder
        self._server = server
        self._redis = redis
        self._templates: dict[str, str] = {}
        self._commands: dict[tuple[str, int, bool], tuple[str, list[list[str]]]] = {}
        memory = Path("/dev/shm")
        self._ledger = Ledger((memory if os.access(memory, os.W_OK) else folder) / f"roost-race-{os.getpid()}")

    def close(self) -> None:
        self._ledger.path.unlink(missing_ok=True)

    def environment(self, dsn: str) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(CHECKOUT),
            "ROOST_DSN": dsn,
            DSN_VARIABLE: dsn,
            REDIS_VARIABLE: str(self._redis),
            PATH_VARIABLE: str(self._ledger.path),
            FOLDER_VARIABLE: str(self.folder),
        }

    def enter(self, name: str) -> Entrant | str:
        """The competitor, or why it can't take part."""
        try:
            answer = self.client(name, "describe", dsn=self._server.dsn)
        except RaceError as error:
            return f"{str(error).strip().splitlines()[-1]} (Python {platform.python_version()})"
        answer.pop("distributions")
        entrant = Entrant(name, **answer)
        if entrant.store == "Redis" and self._redis is None:
            return "no redis-server on this machine (on Debian and Ubuntu: apt-get install redis-server)"
        return entrant

    @contextmanager
    def place(self, entrant: Entrant) -> Iterator[Place]:
        """An empty store for the competitor, dropped at the end, and an empty ledger."""
        self._ledger.clear()
        if entrant.store == "Redis":
            self._redis_command("FLUSHALL")
            yield Place(self, entrant, self._server.dsn, self._ledger)
            self._redis_command("FLUSHALL")
            return
        if entrant.name not in self._templates:
            name = f"template_{entrant.name}"
            self._administer("CREATE DATABASE {}", name)
            self.client(entrant.name, "set_up", dsn=make_conninfo(self._server.dsn, dbname=name))
            self._templates[entrant.name] = name
        name = f"race_{next(_numbers)}"
        self._administer("CREATE DATABASE {} TEMPLATE {}", name, self._templates[entrant.name])
        try:
            yield Place(self, entrant, make_conninfo(self._server.dsn, dbname=name), self._ledger)
        finally:
            self._administer("DROP DATABASE {} WITH (FORCE)", name)

    def commands(self, place: Place, children: int, setting: Mapping[str, str]) -> list[list[str]]:
        """Those that run that many children, asked for once: a process that imports the library takes long."""
        key = place.entrant.name, children, bool(setting)
        if key not in self._commands:
            answer = self.client(place.entrant.name, "commands", children, dsn=place.dsn, setting=setting)
            self._commands[key] = place.dsn, answer["commands"]
        dsn, commands = self._commands[key]
        return [[word if word != dsn else place.dsn for word in command] for command in commands]

    def client(
        self,
        name: str,
        action: str,
        *arguments: object,
        dsn: str,
        seconds: float = CLIENT_SECONDS,
        setting: Mapping[str, str] = MappingProxyType({}),
    ) -> dict[str, Any]:
        process = self.start_client(name, action, *arguments, dsn=dsn, setting=setting)
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RaceError(f"{name}: {action} took more than {seconds:g} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            raise RaceError(f"{name}: {action} failed: {errors[-2000:]}")
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        return answer

    def start_client(
        self, name: str, action: str, *arguments: object, dsn: str, setting: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[str]:
        race_pid = os.getpid()
        return subprocess.Popen(
            [sys.executable, "-m", "race.client", name, action, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(dsn) | dict(setting),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: linux.die_with_parent(signal.SIGKILL, race_pid),
        )

    def describe(self) -> dict[str, str]:
        """The machine, the versions, and the settings that matter."""
        with connect(self._server.dsn) as conn:
            version = value(conn, "SHOW server_version")
            settings = {name: value(conn, "SELECT current_setting(%s)", name) for name in _SETTINGS}
        return {
            "commit": commit_of_checkout(),
            "cores": str(len(os.sched_getaffinity(0))),
            "processor": processor(),
            "kernel": platform.release(),
            "Python": platform.python_version(),
            "PostgreSQL": f"{version}: " + ", ".join(f"{name} {setting}" for name, setting in settings.items()),
            "Redis": f"{_redis_version()}: " + ", ".join(f"{k} {v}" for k, v in _REDIS_SETTINGS.items() if v)
            if self._redis
            else "none",
            "load at start": f"{os.getloadavg()[0]:.1f}",
        }

    def _administer(self, statement: LiteralString, *names: str) -> None:
        with connect(self._server.dsn) as conn:
            conn.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def _redis_command(self, command: str) -> None:
        subprocess.run(
            ["redis-cli", "-s", str(self._redis), command], check=True, stdout=subprocess.DEVNULL, timeout=60
        )


@contextmanager
def redis_server(folder: Path) -> Iterator[Path | None]:
    """The socket of a Redis of ours, on nothing but that socket; None where there is no redis-server."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    data = folder / "redis"
    data.mkdir()
    path = data / "socket"
    settings = {"port": "0", "unixsocket": str(path), "dir": str(data), "daemonize": "no"} | _REDIS_SETTINGS
    race_pid = os.getpid()
    process = subprocess.Popen(
        [program, *(word for name, value in settings.items() for word in (f"--{name}", value))],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: linux.die_with_parent(signal.SIGTERM, race_pid),
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RaceError("redis-server did not start")
            time.sleep(0.02)
        yield path
    finally:
        process.terminate()
        process.wait()


def names() -> list[str]:
    """All competitors that have a file, Roost first."""
    found = sorted(path.stem for path in _PEERS.glob("*.py") if path.stem != "__init__")
    return ["roost", *(name for name in found if name != "roost")]


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A connection in autocommit whose statements end, come what may."""
    return psycopg.connect(dsn, autocommit=True, options="-c statement_timeout=600s", application_name="race")


def value(conn: psycopg.Connection[Any], statement: str, *parameters: Any) -> Any:
    row = conn.execute(statement.encode(), parameters).fetchone()
    return None if row is None else row[0]


def end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:] if log.exists() else ""


def _redis_version() -> str:
    answer = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=False).stdout
    return next((word[2:] for word in answer.split() if word.startswith("v=")), "unknown")
