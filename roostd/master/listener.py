"""Hears of new jobs, cancels, paused queues and reload requests. All of it hints: see core/demand.py.

A connection that is dead but open is found out by asking it something now and then; what was missed meanwhile the
polls and the heartbeat bring in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog
from psycopg import AsyncConnection

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
        for channel in CHANNELS:
            await conn.execute(f"LISTEN {channel}")

    async def _hear(self, conn: AsyncConnection) -> None:
        async with contextlib.aclosing(conn.notifies(timeout=CHECK_SECONDS)) as notices:
            async for notice in notices:
                self._on_notice(notice.channel, notice.payload)

    async def _check(self, conn: AsyncConnection) -> None:
        await conn.execute("SELECT 1")
