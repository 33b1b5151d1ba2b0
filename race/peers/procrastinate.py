"""Procrastinate: asyncio workers that claim one job at a time.

Tuned, by the documentation of 3.10: `concurrency`, the number of jobs a worker runs at once, 1 by default, to be raised
for asynchronous tasks (App.run_worker, howto: Execute multiple jobs at the same time). It has no batches: each job is a
claim and an end of its own. Completed jobs are kept, as by default. There is no timeout of a job: `abort` of a running
one has to be asked for from outside, and reaches code that awaits (howto/advanced/cancellation).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import procrastinate

from race import jobs, work
from race.peer import Client, Peer, dsn

CONCURRENCY = 30

PEER = Peer(
    label="Procrastinate",
    distributions=("procrastinate", "psycopg"),
    store="PostgreSQL",
    isolation="none: a task in the worker's event loop",
    settings=f"one worker process a child, concurrency {CONCURRENCY} each, asynchronous tasks",
    timeout="none to be had",
    rescue="never by itself (howto/production/retry_stalled_jobs)",
    table="procrastinate_jobs",
    unfinished="SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')",
)

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn()))


@app.task(name="noop")
async def noop(number: int) -> None:
    jobs.noop(number)


@app.task(name="burn")
async def burn(number: int) -> None:
    jobs.burn(number)


@app.task(name="hang")
async def hang(number: int) -> None:
    jobs.hang(number)


@app.task(name="crash")
async def crash(number: int) -> None:
    jobs.crash(number)


async def set_up() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
        await app.tasks[task].batch_defer_async(*({"number": number} for number in numbers))

    async with app.open_async():
        yield Client(lambda task, number: app.tasks[task].defer_async(number=number), enqueue_many)


def commands(children: int) -> list[list[str]]:
    return [work.command("procrastinate", 1)] * children


def run(_children: int) -> None:
    async def work_on() -> None:
        async with app.open_async():
            await app.run_worker_async(concurrency=CONCURRENCY)

    asyncio.run(work_on())
