"""The connections a client opens for itself: in autocommit, kept open for the next call, never shared with a fork.

Not a pool with threads: a client must be able to live in a process that forks. Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Generic, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from .errors import RoostError

PREPARE_AFTER = 2  # times that a statement was sent; planning an enqueue costs the server as much as carrying it out
MAX_CONNECTIONS = 10  # open at once, of one client in one process (and event loop); more callers wait for one

# No prepared statements, unless the other end turns out to be PostgreSQL itself: behind PgBouncer in transaction mode
# the next statement may run on another server connection.
# UTF-8 whatever the environment, the DSN, the role or the database say: nothing narrower holds every name and argument.
OPTIONS: dict[str, Any] = {
    "autocommit": True,
    "prepare_threshold": None,
    "client_encoding": "UTF8",
    "fallback_application_name": "roost_client",
}

SERVER_PID = "SELECT pg_backend_pid()"


class OwnConnection(psycopg.Connection[Any]):
    """One that may be left open."""

    # psycopg warns of a connection that was not closed. These are meant to stay open until the process ends; libpq
    # closes them then, and psycopg sees to it that a forked child does not.
    def __del__(self, *_: object) -> None:
        pass


class OwnAsyncConnection(psycopg.AsyncConnection[Any]):
    """As OwnConnection."""

    def __del__(self, *_: object) -> None:
        pass


C = TypeVar("C", OwnConnection, OwnAsyncConnection)


class _Idle(Generic[C]):
    """The open connections nobody uses. Appending and popping are atomic, so that threads need no lock."""

    def __init__(self) -> None:
        self._connections: list[C] = []

    def take(self) -> C | None:
        while self._connections:
            try:
                connection = self._connections.pop()
            except IndexError:  # another thread was faster
                break
            if is_usable(connection):
                return connection
            connection.pgconn.finish()
        return None

    def give(self, connection: C) -> None:
        # A statement that was interrupted may leave results to be read, or a transaction open.
        if connection.pgconn.transaction_status == TransactionStatus.IDLE:
            self._connections.append(connection)
        else:
            connection.pgconn.finish()

    def close(self) -> None:
        while self._connections:
            self._connections.pop().pgconn.finish()


# A fork waits for whoever holds it, so that no child finds it held by a thread that it does not have.
_starting_afresh = threading.RLock()
os.register_at_fork(
    before=_starting_afresh.acquire,
    after_in_parent=_starting_afresh.release,
    after_in_child=_starting_afresh.release,
)


class OfOneProcess:
    """What is open in one process. A forked child begins with nothing, whichever of its threads comes first."""

    _pid = 0

    def _start_afresh(self) -> None:
        raise NotImplementedError

    def _is_of_this_process(self) -> bool:
        return self._pid == os.getpid()

    def _become_of_this_process(self) -> None:
        if not self._is_of_this_process():
            with _starting_afresh:
                if not self._is_of_this_process():
                    self._start_afresh()
                    self._pid = os.getpid()  # last: until then the other threads wait for it


class Connections(OfOneProcess):
    """Connections for threads."""

    def __init__(self, dsn: str) -> None:
        self._dsn = check_dsn(dsn)
        self._become_of_this_process()

    def _start_afresh(self) -> None:
        self._idle: _Idle[OwnConnection] = _Idle()
        self._free = threading.Semaphore(MAX_CONNECTIONS)

    @contextmanager
    def borrow(self) -> Iterator[psycopg.Connection[Any]]:
        """Lend a connection. One that broke while nobody used it is replaced; one that breaks in use is not."""
        self._become_of_this_process()  # what was open is the parent's, and its semaphore may be held for ever
        with self._free:
            connection = self._idle.take() or self._connect()
            try:
                yield connection
            finally:
                self._idle.give(connection)

    def _connect(self) -> OwnConnection:
        connection = OwnConnection.connect(self._dsn, **OPTIONS)
        if is_direct(connection, connection.execute(SERVER_PID).fetchone()):
            connection.prepare_threshold = PREPARE_AFTER
        return connection

    def close(self) -> None:
        """Close the connections that nobody uses. A later borrow opens new ones."""
        if self._is_of_this_process():
            self._idle.close()


class AsyncConnections(OfOneProcess):
    """Connections for the tasks of event loops, each loop with its own."""

    def __init__(self, dsn: str) -> None:
        self._dsn = check_dsn(dsn)
        self._become_of_this_process()

    def _start_afresh(self) -> None:
        self._of_loop: dict[asyncio.AbstractEventLoop, tuple[_Idle[OwnAsyncConnection], asyncio.Semaphore]] = {}

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """As Connections.borrow."""
        self._become_of_this_process()
        loop = asyncio.get_running_loop()
        if loop not in self._of_loop:
            for other in list(self._of_loop):
                # None: another thread, with a new loop of its own, was faster.
                if other.is_closed() and (closed := self._of_loop.pop(other, None)) is not None:
                    closed[0].close()
            self._of_loop[loop] = (_Idle(), asyncio.Semaphore(MAX_CONNECTIONS))
        idle, free = self._of_loop[loop]
        async with free:
            connection = idle.take() or await self._connect()
            try:
                yield connection
            finally:
                idle.give(connection)

    async def _connect(self) -> OwnAsyncConnection:
        connection = await OwnAsyncConnection.connect(self._dsn, **OPTIONS)
        cursor = await connection.execute(SERVER_PID)
        if is_direct(connection, await cursor.fetchone()):
            connection.prepare_threshold = PREPARE_AFTER
        return connection

    def close(self) -> None:
        """As Connections.close, for all loops."""
        if self._is_of_this_process():
            for idle, _ in list(self._of_loop.values()):
                idle.close()


def check_dsn(dsn: str) -> str:
    """Return the DSN. Raises RoostError, which doesn't show it (it may hold a password), when libpq can't read it."""
    if not isinstance(dsn, str):
        raise RoostError(f"cannot use a {type(dsn).__name__} as DSN: pass a postgresql:// URL, or key=value pairs")
    try:
        conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise RoostError(
            "cannot use the DSN: it must be a postgresql:// URL, or key=value pairs such as 'host=db dbname=app'"
        ) from None
    return dsn


def is_direct(
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], answer: tuple[Any, ...] | None
) -> bool:
    """Whether the server that answers is the one that was greeted: a pooler gives out process ids of its own."""
    return answer == (connection.info.backend_pid,)


def is_usable(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether the connection is open and quiet. A server that went away, or has something to say, is readable."""
    if connection.closed:
        return False
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)
