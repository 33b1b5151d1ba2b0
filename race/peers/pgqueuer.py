"""PgQueuer: asyncio workers that claim in batches and delete what is done.

Tuned as its documentation says (guides/performance-tuning, of 1.6): asyncpg; one direct connection for each worker, not
a pool; a larger `batch_size` (10 by default) for jobs that are short, though
not beside hangs and crashes; its autovacuum settings (`pgq autovac`); tables
durable, as by default. uvloop, as its command line has it (which fails with the typer of today). `heartbeat_timeout`,
after which the jobs of a dead worker are taken by another, stays at its default. There is no timeout of a job.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from psycopg.conninfo import conninfo_to_dict

from race import jobs, work
from race.peer import Client, Peer, beside_harm, dsn

BATCH_SIZE = 100
BULK = 5_000  # jobs a statement

PEER = Peer(
    label="PgQueuer",
    distributions=("pgqueuer", "asyncpg"),
    store="PostgreSQL",
    isolation="none: a task in the worker's event loop",
    settings=f"one worker process a child, asyncpg, batch_size {BATCH_SIZE} (10, as by default, "
    "beside hangs and crashes), `pgq autovac`, asynchronous tasks",
    timeout="none to be had",
    rescue="after 30 s (heartbeat_timeout)",
    table="pgqueuer",
    unfinished="SELECT count(*) FROM pgqueuer",
)


async def _connect() -> asyncpg.Connection[Any]:
    options = conninfo_to_dict(dsn())
    return await asyncpg.connect(
        host=options["host"], port=options["port"], user=options["user"], database=options["dbname"]
    )


@asynccontextmanager
async def _queries() -> AsyncIterator[Queries]:
    connection = await _connect()
    try:
        yield Queries(AsyncpgDriver(connection))
    finally:
        await connection.close()


async def set_up() -> None:
    async with _queries() as queries:
        await queries.install()
        await queries.optimize_autovacuum()


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async with _queries() as queries:

        async def enqueue(task: str, number: int) -> None:
            await queries.enqueue(task, b"%d" % number)

        async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
            for first in range(0, len(numbers), BULK):
                payloads = [b"%d" % number for number in numbers[first : first + BULK]]
                await queries.enqueue([task] * len(payloads), payloads, [0] * len(payloads))

        yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    return [work.command("pgqueuer", 1)] * children


def run(_children: int) -> None:
    uvloop.run(_work())


async def _work() -> None:
    queuer = PgQueuer(AsyncpgDriver(await _connect()))
    for name in jobs.TASKS:
        queuer.entrypoint(name)(_handler(name))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, queuer.shutdown.set)
    await queuer.run(batch_size=10 if beside_harm() else BATCH_SIZE)


def _handler(name: str) -> Any:
    func = jobs.TASKS[name]

    async def handle(job: Job) -> None:
        assert job.payload is not None
        func(int(job.payload))

    return handle
