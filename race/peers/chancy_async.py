"""Chancy with its asyncio executor: jobs in the event loop of each worker.

Tuned, by the documentation of 0.26 (chancy.queue.Queue, chancy.executors.asyncex): `eager_polling`, so that a worker
looks for more as soon as a job is done, which "can reduce latency between jobs"; `concurrency` at the executor's
default of 100; jobs are pushed one by one by the synchronous call, which is faster here. Ends of jobs are written in
batches once a second, as by default. The timeout is a limit of the job; the event loop enforces it where code awaits.

Its claim sorts all jobs that wait: no index has the order in which it takes them. That is what a backlog costs it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from chancy import Chancy, Queue, Worker
from chancy.job import Job, Limit

from race import jobs, work
from race.peer import Client, Peer, dsn

CONCURRENCY = 100

PEER = Peer(
    label="Chancy, async",
    distributions=("chancy", "psycopg"),
    store="PostgreSQL",
    isolation="none: a task in the worker's event loop",
    settings=f"one worker process a child, asyncio executor, concurrency {CONCURRENCY} each, eager_polling, "
    "synchronous client",
    timeout="a TIME limit of the job: cooperative",
    rescue="after 90 to 150 s (heartbeat_timeout, Recovery)",
    table="chancy_jobs",
    unfinished="SELECT count(*) FROM chancy_jobs WHERE state IN ('pending', 'running')",
)


async def noop(*, number: int) -> None:
    jobs.noop(number)


async def burn(*, number: int) -> None:
    jobs.burn(number)


async def hang(*, number: int) -> None:
    jobs.hang(number)


async def crash(*, number: int) -> None:
    jobs.crash(number)


QUEUE = Queue("default", concurrency=CONCURRENCY, executor=Chancy.Executor.Async, eager_polling=True)


def new_job(module: str, task: str, number: int) -> Job:
    limits = [Limit(Limit.Type.TIME, jobs.HANG_TIMEOUT_SECONDS)] if task == "hang" else []
    return Job(func=f"{module}.{task}", kwargs={"number": number}, limits=limits)


def own_log() -> logging.Logger:
    """Its own logger tells of every job."""
    log = logging.getLogger("chancy")
    log.setLevel(logging.WARNING)
    return log


async def set_up_with(queue: Queue) -> None:
    async with Chancy(dsn(), log=own_log()) as chancy:
        await chancy.migrate()
        await chancy.declare(queue, upsert=True)


async def work_on() -> None:
    async with Chancy(dsn(), log=own_log()) as chancy, Worker(chancy) as worker:
        await worker.wait_for_shutdown()


@asynccontextmanager
async def client_for(module: str) -> AsyncIterator[Client]:
    async with Chancy(dsn(), log=own_log()) as chancy:

        async def enqueue(task: str, number: int) -> Any:
            return chancy.sync_push(new_job(module, task, number))

        async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
            async for _ in chancy.push_many([new_job(module, task, number) for number in numbers]):
                pass

        try:
            yield Client(enqueue, enqueue_many)
        finally:
            chancy.sync_pool.close()


async def set_up() -> None:
    await set_up_with(QUEUE)


def client() -> Any:
    return client_for(__name__)


def commands(children: int) -> list[list[str]]:
    return [work.command("chancy_async", 1)] * children


def run(_children: int) -> None:
    asyncio.run(work_on())
