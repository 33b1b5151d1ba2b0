"""Oban for Python: asyncio workers that claim up to the free part of their limit and acknowledge in batches.

Tuned, by the documentation of 0.7: the `limit` of jobs that a queue runs at once, and with it the size of its batches
(defining_queues; production says that a limit of 100 doesn't take 100 connections). uvloop, where it is installed, is
its command line's own choice. The timeout is the worker's `timeout()`; it is cooperative ("Blocking code that never
awaits can't be interrupted", oban.worker.Worker.timeout). Its runner in many processes is part of the licensed Oban
Pro, and isn't raced.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from oban import Oban, worker
from oban.schema import install

from race import jobs
from race.peer import Client, Peer, beside_harm, dsn

LIMIT = 100
BULK = 5_000  # jobs a statement

PEER = Peer(
    label="Oban",
    distributions=("oban", "psycopg"),
    store="PostgreSQL",
    isolation="none: a task in the worker's event loop",
    settings=f"one worker process a child, limit {LIMIT} each (10 beside hangs and crashes), asynchronous tasks",
    timeout="the worker's timeout(): cooperative",
    rescue="after 5 to 6 min (lifeline)",
    table="oban_jobs",
    unfinished="SELECT count(*) FROM oban_jobs WHERE state IN ('available', 'executing')",
)


@worker(queue="default", max_attempts=1)
class Noop:
    async def process(self, job: Any) -> None:
        jobs.noop(job.args["number"])


@worker(queue="default", max_attempts=1)
class Burn:
    async def process(self, job: Any) -> None:
        jobs.burn(job.args["number"])


@worker(queue="default", max_attempts=1)
class Hang:
    async def process(self, job: Any) -> None:
        jobs.hang(job.args["number"])

    def timeout(self, _job: Any) -> float:
        return jobs.HANG_TIMEOUT_SECONDS


@worker(queue="default", max_attempts=1)
class Crash:
    async def process(self, job: Any) -> None:
        jobs.crash(job.args["number"])


_WORKERS: dict[str, Any] = {"noop": Noop, "burn": Burn, "hang": Hang, "crash": Crash}


async def set_up() -> None:
    pool = await Oban.create_pool(dsn(), max_size=1)
    await install(pool)
    await pool.close()


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    pool = await Oban.create_pool(dsn())
    oban = Oban(pool=pool)

    async def enqueue(task: str, number: int) -> None:
        await oban.enqueue(_WORKERS[task].new({"number": number}))

    async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), BULK):
            await oban.enqueue_many([_WORKERS[task].new({"number": one}) for one in numbers[first : first + BULK]])

    try:
        async with oban:
            yield Client(enqueue, enqueue_many)
    finally:
        await pool.close()


def commands(children: int) -> list[list[str]]:
    options = ["--dsn", dsn(), "--queues", f"default:{10 if beside_harm() else LIMIT}", "--log-level", "WARNING"]
    return [[sys.executable, "-m", "oban", "start", *options, "--cron-modules", "race.peers.oban"]] * children
