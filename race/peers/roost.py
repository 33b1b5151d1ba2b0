"""Roost: a daemon whose children run one job each."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from race import jobs
from race.peer import Client, Peer, beside_harm, dsn
from roost_client import AsyncRoost, JobInsert, Roost, job

PEER = Peer(
    label="Roost",
    distributions=("roostd", "psycopg"),
    store="PostgreSQL",
    isolation="a child process, for its job alone",
    settings="one daemon, concurrency = children, synchronous client",
    timeout="timeout_seconds: the child is killed, kill_grace after a signal",
    rescue="at once where a child died; after 5 min (orphan_stale_after) where the daemon did",
    # The default of 5 s leaves a handler time to clean up. What hangs here would not use it.
    hang_setting="kill_grace 0.1 s",
    unfinished="SELECT count(*) FROM roost.jobs WHERE state IN ('available', 'executing')",
)

for _name, _func in jobs.TASKS.items():
    job(
        _name,
        max_attempts=1,
        timeout_seconds=jobs.HANG_TIMEOUT_SECONDS if _name == "hang" else None,
    )(_func)


async def set_up() -> None:
    async with AsyncRoost(dsn()) as roost:
        await roost.setup_schema()


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async with AsyncRoost(dsn()) as roost:
        with Roost(dsn()) as one_by_one:  # half the CPU of a single enqueue, and nothing else waits here

            async def enqueue(task: str, number: int) -> None:
                one_by_one.enqueue(task, args={"number": number})

            async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
                await roost.enqueue_many([JobInsert(task, {"number": number}) for number in numbers])

            yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    more = "[worker]\nkill_grace = 0.1\n" if beside_harm() else ""
    folder = os.environ["RACE_FOLDER"]
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".toml", delete=False) as config:
        config.write(f'[handlers]\nmodules = ["race.peers.roost"]\n[pools.default]\nconcurrency = {children}\n{more}')
    return [[str(Path(sys.executable).with_name("roostd")), "-c", config.name]]
