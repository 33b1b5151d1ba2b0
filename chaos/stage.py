"""Where a campaign takes place: PostgreSQL, the proxy and the masters, and what faults need to know of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, LiteralString, Self, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict

from chaos import ledger
from chaos.fleet import Master, now
from chaos.plan import MASTERS
from chaos.proxy import Proxy
from roost_client import Roost
from roostd.embedded import EmbeddedPostgres

T = TypeVar("T")

PATIENCE_SECONDS = 60.0  # far above what anything here takes, also on a busy machine
DISK_BYTES = 768 << 20
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 1 << 18, 2  # sched.h, sys/mount.h
_SETTINGS = {
    # What is killed is PostgreSQL, not the machine, so nothing that it has written can be lost.
    "fsync": "off",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "max_wal_size": "128MB",
    "min_wal_size": "32MB",
}


class ChaosError(Exception):
    """The campaign can't go on, or what it waited for did not come; the message says what."""


class Stage:
    """Use it on the main thread: PostgreSQL's life hangs on the thread that starts it."""

    def __init__(self) -> None:
        self._exits = ExitStack()
        self.folder = Path(self._exits.enter_context(tempfile.TemporaryDirectory(prefix="roost-chaos-")))
        self.folder.chmod(0o711)
        self.ledger = self.folder / "ledger"
        self.ledger.mkdir()
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        self.disk_refusal = _mount(self.disk)
        if self.disk_refusal is None:
            self._exits.callback(ctypes.CDLL(None).umount2, os.fsencode(self.disk), _MNT_DETACH)
        self.postgres = EmbeddedPostgres(self.disk / "postgres", settings=_SETTINGS)
        self.masters: dict[str, Master] = {}
        self._asked: psycopg.Connection[Any] | None = None
        self._asking = threading.Lock()
        self.away: set[str] = set()  # masters under a slow fault: the others are not to wait for them
        self.stopping = threading.Event()
        self.killed_pids: set[int] = set()  # children that faults killed

    def __enter__(self) -> Self:
        try:
            self._exits.callback(self.postgres.stop, "immediate")
            self.postgres.start()
            self.dsn = self.postgres.dsn  # stays through restarts
            with Roost(self.dsn) as roost:
                roost.setup_schema()
            with self.connect() as conn:
                conn.execute(ledger.TRIGGERS)
            socket = Path(str(conninfo_to_dict(self.dsn)["host"])) / ".s.PGSQL.5432"
            self.proxy = self._exits.enter_context(Proxy(MASTERS, lambda: socket))
            for name in MASTERS:
                self.masters[name] = Master(name, self.folder, self.proxy.ports[name], self.ledger, self.dsn)
            return self
        except BaseException:
            self._exits.close()
            raise

    def __exit__(self, *_: object) -> None:
        for master in self.masters.values():
            if master.runs:
                master.process.kill()
                master.process.wait()
        if self._asked is not None:
            self._asked.close()
        self._exits.close()

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection in autocommit, past the proxy."""
        with self._connect() as conn:
            yield conn

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(
            self.dsn,
            autocommit=True,
            application_name="chaos",
            options="-c statement_timeout=20s",
            connect_timeout=10,
        )

    def ask(self, statement: LiteralString, *parameters: Any) -> Any:
        """The first value of the answer, None where PostgreSQL does not answer now."""
        with self._asking:
            try:
                if self._asked is None:
                    self._asked = self._connect()
                row = self._asked.execute(statement, parameters or None).fetchone()
            except psycopg.Error:
                if self._asked is not None:
                    self._asked.close()
                self._asked = None
                return None
        return None if row is None else row[0]

    def await_that(self, look: Callable[[], T | None], what: str, seconds: float = PATIENCE_SECONDS) -> T:
        """What `look` returns as soon as it is true. Raises ChaosError."""
        deadline = now() + seconds
        while not (found := look()):
            if now() > deadline:
                raise ChaosError(f"after {seconds:g} s there was no {what}")
            if self.stopping.is_set():
                raise ChaosError(f"was ended while it waited for {what}")
            time.sleep(0.01)
        return found

    def await_whole(self, master: Master) -> None:
        self.await_that(master.is_whole, f"full number of children of {master.name}")

    def await_ready(self, master: Master, since: int) -> None:
        def look() -> bool:
            if not master.runs:
                raise ChaosError(f"{master.name} ended at its start: {master.tail()}")
            return master.said("worker.ready", since=since)

        self.await_that(look, f"start of {master.name}")

    def present(self) -> list[Master]:
        """The masters that are under no slow fault."""
        return [master for master in self.masters.values() if master.name not in self.away]

    def workers_of(self, master: Master) -> list[str]:
        """The ids under which a master stands in the database."""
        found = self.ask("SELECT array_agg(id::text) FROM roost.workers WHERE name = %s", master.name)
        return found or []


def _mount(folder: Path) -> str | None:
    """Mounts a small file system that only this process and its children see; returns why not, if it can't be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _check(libc.unshare(_CLONE_NEWNS))
        _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
        _check(libc.mount(b"chaos", os.fsencode(folder), b"tmpfs", 0, f"size={DISK_BYTES},mode=711".encode()))
    except OSError as error:
        return f"a tmpfs can't be mounted here: {error.strerror}"
    return None


def _check(result: int) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


@contextmanager
def ballast(folder: Path) -> Iterator[None]:
    """Leaves no room on the file system of `folder`."""
    file = folder / "ballast"
    chunk = bytes(1 << 20)
    try:
        with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
            while True:
                stream.write(chunk)
        yield
    finally:
        file.unlink(missing_ok=True)
