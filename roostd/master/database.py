"""A connection that is made again when it is lost, and that never keeps its caller waiting for ever.

The daemon has four: to claim, to write outcomes, for the heartbeat, to listen. Each does one thing at a time, so a
slow one holds up nothing but itself.

Behind a pooler, which may give each transaction another server connection, nothing is kept in the session: no prepared
statements, and what is set for the session of a direct connection each transaction sets for itself.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, LiteralString, Self, TypeVar

import psycopg
from psycopg import AsyncClientCursor, AsyncConnection, AsyncTransaction, waiting
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from roost_client.connections import SERVER_PID, is_direct

T = TypeVar("T")

# Noticed within about half a minute by the kernel itself, where the other end can't even say that it is gone.
_KEEPALIVE = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
# Whatever the role or the database has set: each of these would break or stall what the daemon does.
_SESSION = (
    "SET timezone = 'UTC'; SET default_transaction_isolation = 'read committed'; SET statement_timeout = 0; "
    "SET lock_timeout = 0; SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; "
    # A function that others have put there, and whose parameters fit better, would run in place of PostgreSQL's.
    "SET search_path = pg_catalog, pg_temp"
)
# The SQLSTATE classes of a statement that its own values broke: data, constraint, syntax or type, program limit.
_STATEMENT_CLASSES = frozenset({"22", "23", "42", "54"})


_NEVER_SECONDS = 3600.0


class DatabaseGone(Exception):
    """The database can't be used right now; what was asked may or may not have happened."""


class _Connection(AsyncConnection):
    transaction_settings: LiteralString = ""  # what each transaction begins with, behind a pooler

    def begin_transactions_with(self, settings: LiteralString) -> None:
        """Has each transaction set this, and nothing kept on the server from one to the next."""
        self.transaction_settings = settings
        self.prepare_threshold = None
        self.cursor_factory = _PooledCursor

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[AsyncTransaction]:
        async with super().transaction(savepoint_name, force_rollback) as block:
            if self.transaction_settings:
                await self.execute(self.transaction_settings)
            yield block

    async def wait(self, gen: PQGen[T], interval: float = 0.0, timeout: float | None = None) -> T:
        """As psycopg's, but it doesn't wake up ten times a second, nor ask the server to agree when it is cancelled."""
        options = {} if timeout is None else {"timeout": timeout}
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval=_NEVER_SECONDS, **options)
        except asyncio.CancelledError:
            self.pgconn.finish()
            raise


class _PooledCursor(AsyncClientCursor):
    """Sends a statement together with its transaction's settings, in one message: so they are one transaction.

    One that several messages make up would be left open, its locks with it, by a master that is stopped in between.
    """

    async def execute(self, query: Any, params: Any = None, **_: Any) -> Self:
        conn = self.connection
        assert isinstance(conn, _Connection)
        if conn.info.transaction_status == TransactionStatus.IDLE:
            query = f"{conn.transaction_settings}; {query}"
        await super().execute(query, params)
        while self.nextset():  # the statement's own answer is the last
            pass
        return self


class Link:
    """One connection in autocommit, by what it is for."""

    def __init__(
        self, dsn: str, purpose: str, *, session: LiteralString | None = None, timeout_seconds: float = 30.0
    ) -> None:
        self.purpose = purpose
        self.connects = 0  # how often it was made: a change means that everything bound to the session is gone
        self.is_pooled = False  # the last one was
        self._dsn = dsn
        self._session = session
        self._timeout_seconds = timeout_seconds
        self._conn: AsyncConnection | None = None
        self._lock = asyncio.Lock()

    async def run(self, operation: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """The answer of `operation`, on a connection that is made if need be.

        Raises DatabaseGone when the connection fails or no answer comes within the timeout, and psycopg's error where
        the statement itself is at fault.
        """
        async with self._lock:
            if self._conn is None or self._conn.closed:
                self._conn = await self._connect()
            conn = self._conn
            try:
                return await self._bounded(conn, operation)
            except psycopg.Error as error:
                if not conn.broken and not conn.closed and _is_of_statement(error):
                    raise
                await self._drop()
                raise DatabaseGone(_one_line(error)) from error
            except (DatabaseGone, OSError) as error:
                await self._drop()
                raise DatabaseGone(_one_line(error)) from error

    async def close(self) -> None:
        async with self._lock:
            await self._drop()

    async def _connect(self) -> AsyncConnection:
        try:
            conn = await _Connection.connect(make_conninfo(self._dsn, **self._defaults()), autocommit=True)
            try:
                await self._bounded(conn, lambda _: self._set_up(conn))
            except BaseException:
                self._hang_up(conn)
                await conn.close()
                raise
        except (psycopg.Error, OSError) as error:
            raise DatabaseGone(_one_line(error)) from error
        self.connects += 1
        return conn

    async def _set_up(self, conn: _Connection) -> None:
        session = _SESSION if self._session is None else f"{_SESSION}; {self._session}"
        cursor = await conn.execute(SERVER_PID)
        self.is_pooled = not is_direct(conn, await cursor.fetchone())
        if self.is_pooled:
            conn.begin_transactions_with(_of_transaction(session))
        else:
            await conn.execute(session)

    def _defaults(self) -> dict[str, str]:
        given = conninfo_to_dict(self._dsn)
        # With several hosts in the DSN the one that takes writes is the primary, before a failover and after it.
        defaults = _KEEPALIVE | {"application_name": f"roostd {self.purpose}", "target_session_attrs": "read-write"}
        return {key: value for key, value in defaults.items() if key not in given} | {"client_encoding": "UTF8"}

    async def _bounded(self, conn: AsyncConnection, operation: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        # By a timer that ends the connection: a timeout that cancels would leave it to psycopg, and a task of its own
        # would cost each claim and each outcome several turns of the loop.
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self._timeout_seconds
        timer = loop.call_at(ends_at, self._hang_up, conn)
        try:
            return await operation(conn)
        except psycopg.OperationalError as error:
            if loop.time() >= ends_at:
                raise DatabaseGone(f"no answer within {self._timeout_seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    def _hang_up(self, conn: AsyncConnection) -> None:
        """Ends the connection from this side; a wait for the server's answer ends with an error at once."""
        try:
            with socket.socket(fileno=socket.dup(conn.fileno())) as sock:
                sock.shutdown(socket.SHUT_RDWR)
        except (OSError, psycopg.Error):
            return  # it is closed already

    async def _drop(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            self._hang_up(conn)
            await conn.close()


def _of_transaction(session: LiteralString) -> LiteralString:
    # A transaction has its isolation from when it begins; the default that comes first in it would be that of the next.
    return f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED; {session.replace('SET ', 'SET LOCAL ')}"


def _is_of_statement(error: psycopg.Error) -> bool:
    if error.sqlstate is None:
        return isinstance(error, psycopg.DataError)  # psycopg itself refused a value: a NUL in text
    return error.sqlstate[:2] in _STATEMENT_CLASSES


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
