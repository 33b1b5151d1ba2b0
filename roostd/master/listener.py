"""Hears of new jobs, cancels, paused queues and reload requests. All of it hints: see core/demand.py.

A connection that is dead but open is found out by asking it something now and then; what was missed meanwhile the
polls and the heartbeat bring in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg
import structlog
from psycopg import AsyncConnection, Notify

from roostd.master.database import DatabaseGone, Link

CHANNELS = ("roost_inserted", "roost_cancel_requested", "roost_queue_changed", "roost_reload")
CHECK_SECONDS = 15.0
_log = structlog.get_logger()


class Listener:
    def __init__(
        self,
        link: Link,
        *,
        reconnect_seconds: float,
        on_notice: Callable[[str, str], None],
        on_connect: Callable[[], None],
    ) -> None:
        self._link = link
        self._reconnect_seconds = reconnect_seconds
        self._on_notice = on_notice
        self._on_connect = on_connect

    async def run(self) -> None:
        while True:
            try:
                await self._link.run(self._subscribe)
                _log.info("listener.connected")
                self._on_connect()
                while True:
                    await self._link.run(self._hear)
                    await self._link.run(self._check)
            except DatabaseGone as error:
                _log.warning("listener.lost", error=str(error))
                await asyncio.sleep(self._reconnect_seconds)

    async def _subscribe(self, conn: AsyncConnection) -> None:
        conn.add_notify_handler(self._on_notify)  # those that come while something else is asked
        for channel in CHANNELS:
            await conn.execute(f"LISTEN {channel}")

    async def _hear(self, conn: AsyncConnection) -> None:
        """Takes notifications as they come. Not by conn.notifies(), in which each waits for a task to be resumed."""
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()

        def read() -> None:
            try:
                conn.pgconn.consume_input()
                while (notify := conn.pgconn.notifies()) is not None:
                    self._on_notice(notify.relname.decode(), notify.extra.decode())
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

    def _on_notify(self, notify: Notify) -> None:
        self._on_notice(notify.channel, notify.payload)

    async def _check(self, conn: AsyncConnection) -> None:
        await conn.execute("SELECT 1")
