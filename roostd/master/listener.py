"""Hears of new jobs, cancels, paused queues, reload and drain requests. All of it hints: see core/demand.py.

A connection that is dead but open is found out by asking it something now and then; what was missed meanwhile the
polls and the heartbeat bring in. They carry all of it where nothing can be heard: behind a pooler a LISTEN would be
left on a server connection that is somebody else's by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

import psycopg
import structlog
from psycopg import AsyncConnection, Notify

from roostd.master.database import DatabaseGone, Link

CHANNELS = ("roost_inserted", "roost_cancel_requested", "roost_queue_changed", "roost_reload", "roost_drain")
PROOF_CHANNEL = "roost_heard"
CHECK_SECONDS = 15.0
DEAF_SECONDS = 60.0  # until it is tried again where nothing could be heard
_log = structlog.get_logger()


class Deaf(Exception):
    """What others notify can't be heard over this connection; the message says why, and what helps."""


class Listener:
    """`notify` sends a notification by the connections that claim, where the one that listens has a DSN of its own.

    `deaf` says that nothing can be heard, and `on_deaf` is called when that becomes so.
    """

    def __init__(
        self,
        link: Link,
        *,
        reconnect_seconds: float,
        on_notice: Callable[[str, str], None],
        on_connect: Callable[[], None],
        on_deaf: Callable[[], None],
        notify: Callable[[str, str], Awaitable[None]] | None = None,
    ) -> None:
        self.deaf = False
        self._link = link
        self._reconnect_seconds = reconnect_seconds
        self._on_notice = on_notice
        self._on_connect = on_connect
        self._on_deaf = on_deaf
        self._notify = notify
        self._proof: str | None = None

    async def check(self) -> None:
        """Connects once, and ends the connection. Raises Deaf, and DatabaseGone."""
        try:
            await self._link.run(self._subscribe)
        finally:
            await self._link.close()

    async def run(self) -> None:
        while True:
            try:
                await self._link.run(self._subscribe)
                self.deaf = False
                _log.info("listener.connected")
                self._on_connect()
                while True:
                    await self._link.run(self._hear)
                    await self._link.run(self._check)
            except DatabaseGone as error:
                _log.warning("listener.lost", error=str(error))
                await asyncio.sleep(self._reconnect_seconds)
            except Deaf as error:
                await self._link.close()
                if not self.deaf:
                    _log.warning("listener.unavailable", error=str(error), instead="polls every poll_interval")
                    self.deaf = True
                    self._on_deaf()
                await asyncio.sleep(DEAF_SECONDS)

    async def _subscribe(self, conn: AsyncConnection) -> None:
        if self._link.is_pooled and self._notify is None:
            raise Deaf("database.dsn leads to a pooler; set database.listen_dsn to the address of PostgreSQL itself")
        if self._link.is_pooled:
            raise Deaf("database.listen_dsn leads to a pooler; make it the address of PostgreSQL itself")
        conn.add_notify_handler(self._on_notify)  # those that come while something else is asked
        for channel in CHANNELS:
            await conn.execute(f"LISTEN {channel}")
        if self._notify is not None:
            await self._prove(conn, self._notify)

    async def _prove(self, conn: AsyncConnection, notify: Callable[[str, str], Awaitable[None]]) -> None:
        """Sends a notification where jobs are claimed, and raises Deaf where it isn't heard."""
        self._proof = proof = str(uuid4())
        await conn.execute(f"LISTEN {PROOF_CHANNEL}")
        await notify(PROOF_CHANNEL, proof)
        await self._check(conn)  # before the answer to this the server has passed on what was notified before
        self._read(conn)
        await conn.execute(f"UNLISTEN {PROOF_CHANNEL}")
        if self._proof is not None:
            raise Deaf(
                "database.listen_dsn leads to another database than database.dsn: what is notified there is not heard"
                " here; correct either"
            )

    async def _hear(self, conn: AsyncConnection) -> None:
        """Takes notifications as they come. Not by conn.notifies(), in which each waits for a task to be resumed."""
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()

        def read() -> None:
            try:
                conn.pgconn.consume_input()
                self._read(conn)
            except psycopg.Error as error:
                loop.remove_reader(descriptor)
                lost.set_exception(error)

        descriptor = conn.fileno()
        loop.add_reader(descriptor, read)
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await lost
        except TimeoutError:
            return
        finally:
            loop.remove_reader(descriptor)

    def _read(self, conn: AsyncConnection) -> None:
        while (notify := conn.pgconn.notifies()) is not None:
            self._take(notify.relname.decode(), notify.extra.decode())

    def _on_notify(self, notify: Notify) -> None:
        self._take(notify.channel, notify.payload)

    def _take(self, channel: str, payload: str) -> None:
        if channel == PROOF_CHANNEL:
            if payload == self._proof:
                self._proof = None
            return
        self._on_notice(channel, payload)

    async def _check(self, conn: AsyncConnection) -> None:
        await conn.execute("SELECT 1")
