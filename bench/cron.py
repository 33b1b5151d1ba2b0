"""What do 1,000 cron entries cost that all fire in the same minute?

The full minute is not waited for: the masters' own statement is told to fire 1,000 slots, and then to fire them again,
as a second master would that finds them fired. What a master computes for them is measured as well.
"""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta

from psycopg import AsyncConnection

from bench.figures import Aim, Figure, median
from bench.rig import Rig
from bench.scale import Scale
from roostd.core.timetable import Due, Entry, Timetable
from roostd.store import statements

STATEMENT_ENTRIES = 250  # as many as a master fires at once


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    entries = [_entry(number) for number in range(scale.cron_entries)]
    with rig.database() as dsn:
        firing, fired = asyncio.run(_fire(dsn, entries, scale.rounds))
    name = f"{len(entries):,} cron entries"
    return [
        median(f"{name} fired", firing, "ms", Aim("≤", 500)),
        median(f"{name} tried that have fired", fired, "ms"),
        median(f"{name} planned", [_plan(entries) for _ in range(scale.rounds)], "ms"),
    ]


def _entry(number: int) -> Entry:
    expression = f"*/{number % 5 + 1} {number % 24} * * *" if number % 2 else "* * * * *"
    return Entry(
        name=f"entry {number}", expression=expression, task="noop", source="config", timezone="Europe/Berlin",
        catch_up="latest",
    )  # fmt: skip


async def _fire(dsn: str, entries: list[Entry], rounds: int) -> tuple[list[float], list[float]]:
    firing: list[float] = []
    fired: list[float] = []
    async with await AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute("SET timezone = 'UTC'")
        await conn.execute(statements.SESSION)
        now, _ = await statements.register_cron(conn, entries)
        await conn.execute("UPDATE roost.cron_entries SET since = now() - interval '1 day'")
        for number in range(rounds):
            slot = now - timedelta(minutes=rounds - number)
            for samples in (firing, fired):
                samples.append(await _try(conn, entries, slot))
    return firing, fired


async def _try(conn: AsyncConnection, entries: list[Entry], slot: datetime) -> float:
    due = [Due(entry, slot) for entry in sorted(entries, key=lambda entry: entry.name)]
    started_at = time.perf_counter()
    for start in range(0, len(due), STATEMENT_ENTRIES):
        await statements.fire_cron(conn, due[start : start + STATEMENT_ENTRIES])
    return (time.perf_counter() - started_at) * 1000


def _plan(entries: list[Entry]) -> float:
    """A start, and the minute after it."""
    now = datetime.fromisoformat("2026-05-05T12:00:30+00:00")
    started_at = time.perf_counter()
    timetable = Timetable()
    timetable.set(entries, {entry.name: now for entry in entries})
    now += timedelta(minutes=1)
    timetable.tried(timetable.due(now), now)
    timetable.next_slot()
    return (time.perf_counter() - started_at) * 1000
