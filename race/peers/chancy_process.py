"""Chancy with its process executor, the default: one worker with a pool of processes.

Tuned, by the documentation of 0.26 (chancy.queue.Queue, chancy.executors.process): `concurrency` = children,
`eager_polling` as in chancy_async, and no replacement of a process after 100 jobs (`maximum_jobs_per_worker`, meant for
"a library with memory leaks"). The timeout is a limit of the job, for which the worker sends SIGALRM: a Python signal
handler, which has to wait for C.
"""

from __future__ import annotations

import asyncio
from typing import Any

from chancy import Chancy, Queue

from race import jobs, work
from race.peer import Peer
from race.peers.chancy_async import client_for, set_up_with, work_on

PEER = Peer(
    label="Chancy, processes",
    distributions=("chancy", "psycopg"),
    store="PostgreSQL",
    isolation="a child process, for its job alone",
    settings="one worker, process executor, concurrency = children, eager_polling, no replacement of processes, "
    "synchronous client",
    timeout="a TIME limit of the job: SIGALRM to a handler in Python",
    rescue="at once where a child died; after 90 to 150 s (heartbeat_timeout, Recovery) where the worker did",
    table="chancy_jobs",
    unfinished="SELECT count(*) FROM chancy_jobs WHERE state IN ('pending', 'running')",
)


def noop(*, number: int) -> None:
    jobs.noop(number)


def burn(*, number: int) -> None:
    jobs.burn(number)


def hang(*, number: int) -> None:
    jobs.hang(number)


def crash(*, number: int) -> None:
    jobs.crash(number)


def queue(children: int) -> Queue:
    return Queue(
        "default",
        concurrency=children,
        executor=Chancy.Executor.Process,
        executor_options={"maximum_jobs_per_worker": 1_000_000},
        eager_polling=True,
    )


async def set_up() -> None:
    await set_up_with(queue(2))


def client() -> Any:
    return client_for(__name__)


def commands(children: int) -> list[list[str]]:
    return [work.command("chancy_process", children)]


def run(children: int) -> None:
    async def declare_and_work() -> None:
        await set_up_with(queue(children))
        await work_on()

    asyncio.run(declare_and_work())
