"""Fires cron entries: waits for their slots by the database's clock, and tries each in the database as all masters do.

Which slots are due core/timetable.py decides, and which of those fire one statement (store/sql/fire_cron.sql): so it
does not matter how many masters try, how late, or how often. This host's clock only measures how long to wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta

import psycopg
import structlog

from roostd.core.timetable import Due, Entry, Timetable
from roostd.master.database import DatabaseGone, Link
from roostd.store import statements

TOUCH_SECONDS = 300.0  # between two signs that an entry is still known: see touch_cron.sql
_MAX_FIRED = 250  # slots a statement: some tens of milliseconds, for which claims wait
_JUMP_SECONDS = 0.1  # by which the database's time must be off what was expected of it for the wait to be cut short
_EARLY_SECONDS = 0.005  # to wait when a slot is not due yet by the database's clock
_log = structlog.get_logger()


class Scheduler:
    """Does nothing until `load` has been called."""

    def __init__(self, link: Link, *, retry_seconds: float) -> None:
        self._link = link
        self._retry_seconds = retry_seconds
        self._loop = asyncio.get_running_loop()
        self._timetable = Timetable()
        self._entries: Sequence[Entry] = ()
        self._registered = True
        self._touched_at = self._loop.time()
        self._told: tuple[datetime, float] | None = None  # the database's time, and when it was told
        self._wake = asyncio.Event()

    def load(self, entries: Sequence[Entry]) -> None:
        """Puts these entries into force in place of those before."""
        self._entries = entries
        self._registered = False
        self._wake.set()

    def told_time(self, now: datetime) -> None:
        """Takes the database's time as it just was; a clock that was set is noticed by this."""
        jumped = self._told is None or abs(now - self._now()) > timedelta(seconds=_JUMP_SECONDS)
        self._told = now, self._loop.time()
        if jumped:
            self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            try:
                pause = await self._look()
            except DatabaseGone as error:
                _log.warning("cron.failed", error=str(error))
                pause = self._retry_seconds
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self) -> float | None:
        """Does what is to be done; returns the seconds until there is more, None where that is never."""
        if not self._registered:
            await self._register()
        if not self._entries:
            return None
        if self._loop.time() >= self._touched_at + TOUCH_SECONDS:
            await self._touch()
        due = self._timetable.due(self._now())
        for start in range(0, len(due), _MAX_FIRED):
            await self._fire(due[start : start + _MAX_FIRED])
        until_touch = self._touched_at + TOUCH_SECONDS - self._loop.time()
        next_slot = self._timetable.next_slot()
        if next_slot is None:
            return max(until_touch, 0.0)
        return min(max((next_slot - self._now()).total_seconds(), _EARLY_SECONDS), max(until_touch, 0.0))

    async def _register(self) -> None:
        entries = self._entries
        after: dict[str, datetime] = {}
        if entries:
            now, after = await self._link.run(lambda conn: statements.register_cron(conn, entries))
            self._told = now, self._loop.time()
        self._timetable.set(entries, after)
        self._touched_at = self._loop.time()
        self._registered = entries is self._entries  # else others were loaded meanwhile
        _log.info("cron.registered", entries=len(entries), enabled=sum(entry.enabled for entry in entries))

    async def _touch(self) -> None:
        names = [entry.name for entry in self._entries]
        if missing := await self._link.run(lambda conn: statements.touch_cron(conn, names)):
            _log.warning("cron.forgotten", entries=missing)  # somebody has removed their rows
            self._registered = False
            self._wake.set()
        while await self._link.run(statements.prune_cron) >= 1000:
            pass
        self._touched_at = self._loop.time()

    async def _fire(self, due: Sequence[Due]) -> None:
        """Tries these slots. One that the database refuses, its arguments for instance, must not keep others back."""
        try:
            now, fired = await self._link.run(lambda conn: statements.fire_cron(conn, due))
        except psycopg.Error as error:
            if len(due) > 1:
                await self._fire(due[: len(due) // 2])
                await self._fire(due[len(due) // 2 :])
                return
            _log.error("cron.refused", entry=due[0].entry.name, slot=due[0].slot.isoformat(), error=str(error))
            self._timetable.tried(due, due[0].slot)
            return
        self._told = now, self._loop.time()
        self._timetable.tried(due, now)
        for name, slot, job_id in fired:
            _log.info("cron.fired", entry=name, slot=slot.isoformat(), job_id=job_id)

    def _now(self) -> datetime:
        """The database's time, a little behind: told before it was heard."""
        assert self._told is not None, "an answer to `_register` tells it"
        now, told_at = self._told
        return now + timedelta(seconds=self._loop.time() - told_at)
