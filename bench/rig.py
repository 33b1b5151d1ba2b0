"""What a measurement runs on: a private PostgreSQL, databases in it, and the real daemon.

Everything lives in one temporary directory and ends with the process that made it, also on Ctrl-C.
"""

from __future__ import annotations

import itertools
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from bench.machine import CHECKOUT, commit_of_checkout, processor
from roost_client import Roost
from roostd import linux
from roostd.embedded import EmbeddedPostgres

CHILDREN = 2
START_SECONDS = 30.0
STOP_SECONDS = 20.0
_SETTINGS = ("fsync", "synchronous_commit", "full_page_writes", "wal_level", "shared_buffers", "max_wal_size")
_numbers = itertools.count(1)


class BenchError(Exception):
    """A measurement could not be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running roostd: its pid is the master's."""

    pid: int

    @property
    def template(self) -> int:
        (pid,) = linux.children_of(self.pid)
        return pid

    @property
    def children(self) -> list[int]:
        return list(linux.children_of(self.template))


class Rig:
    def __init__(self, directory: Path, server: EmbeddedPostgres) -> None:
        self._directory = directory
        self._server = server

    @property
    def dsn(self) -> str:
        """Of a database of the server's that no measurement uses."""
        return self._server.dsn

    @contextmanager
    def database(self) -> Iterator[str]:
        """The DSN of a fresh database with the schema in it, dropped at the end."""
        name = f"bench_{next(_numbers)}"
        self._administer("CREATE DATABASE {}", name)
        dsn = make_conninfo(self.dsn, dbname=name)
        try:
            with Roost(dsn) as roost:
                roost.setup_schema()
            yield dsn
        finally:
            self._administer("DROP DATABASE {} WITH (FORCE)", name)

    @contextmanager
    def daemon(self, dsn: str, *, children: int = CHILDREN, queues: tuple[str, ...] = ("default",)) -> Iterator[Daemon]:
        """A roostd that is ready, stopped at the end."""
        number = next(_numbers)
        config = self._directory / f"{number}.toml"
        log = self._directory / f"{number}.log"
        config.write_text(_config(dsn, children, queues))
        address = f"\0roost-bench-{os.getpid()}-{number}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices, log.open("wb") as output:
            notices.bind(address)
            bench_pid = os.getpid()
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("roostd")), "-c", str(config)],
                cwd=self._directory,
                env=os.environ | {"NOTIFY_SOCKET": address.replace("\0", "@")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is ours: the daemon is stopped when its measurement is
                preexec_fn=lambda: linux.die_with_parent(signal.SIGTERM, bench_pid),
            )
            try:
                _wait_ready(notices, process)
                yield Daemon(process.pid)
                if process.poll() is not None:
                    raise BenchError(f"roostd ended by itself with status {process.returncode}")
            except BenchError as error:
                raise BenchError(f"{error}\nThe daemon's log ends with:\n{_end_of(log)}") from error
            finally:
                _stop(process)

    def describe(self) -> dict[str, Any]:
        """The machine, the versions, and the settings that matter."""
        with connect(self.dsn) as conn:
            version = value(conn, "SHOW server_version")
            settings = {name: value(conn, "SELECT current_setting(%s)", name) for name in _SETTINGS}
        return {
            "commit": commit_of_checkout(),
            "cores": len(os.sched_getaffinity(0)),
            "processor": processor(),
            "kernel": platform.release(),
            "Python": platform.python_version(),
            "psycopg": psycopg.__version__,
            "PostgreSQL": version,
            "settings": ", ".join(f"{name} {setting}" for name, setting in settings.items()),
            "load at start": f"{os.getloadavg()[0]:.1f}",
        }

    def _administer(self, statement: LiteralString, name: str) -> None:
        with connect(self.dsn) as conn:
            conn.execute(sql.SQL(statement).format(sql.Identifier(name)))


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A connection in autocommit whose statements end, come what may."""
    return psycopg.connect(dsn, autocommit=True, options="-c statement_timeout=180s", application_name="bench")


def value(conn: psycopg.Connection[Any], statement: LiteralString, *parameters: Any) -> Any:
    row = conn.execute(statement, parameters).fetchone()
    return None if row is None else row[0]


def wait_until(conn: psycopg.Connection[Any], statement: LiteralString, *parameters: Any, seconds: float) -> None:
    """Asks until the answer is true. Raises BenchError."""
    deadline = time.monotonic() + seconds
    while not value(conn, statement, *parameters):
        if time.monotonic() > deadline:
            raise BenchError(f"waited {seconds:g} s in vain for: {statement} {parameters}")
        time.sleep(0.05)


def _config(dsn: str, children: int, queues: tuple[str, ...]) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return (
        f"[database]\ndsn = {quoted(dsn)}\n"
        f'[handlers]\nmodules = ["bench.handlers"]\npythonpath = [{quoted(str(CHECKOUT))}]\n'
        f"[pools.default]\nqueues = [{', '.join(map(quoted, queues))}]\nconcurrency = {children}\n"
    )


def _wait_ready(notices: socket.socket, process: subprocess.Popen[bytes]) -> None:
    notices.settimeout(0.1)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise BenchError(f"roostd ended at its start with status {process.returncode}")
        try:
            if b"READY=1" in notices.recv(4096):
                return
        except TimeoutError:
            continue
    raise BenchError(f"roostd was not ready within {START_SECONDS:g} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGQUIT)  # at once: what is left in the queue is of no interest
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
