"""Huey: forked worker processes that take one job at a time.

Tuned, by the documentation of 3.5 (consumer, Options for the consumer): `-k process -w children`, "for CPU-intensive
workloads"; a blocking read of Redis; no results kept; no scheduler of periodic tasks; the health check, which replaces
a worker that died, each second instead of each 10; hiredis. The timeout is a task's `timeout`: SIGALRM to a handler in
Python, which has to wait for C.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from huey import RedisHuey

from race import jobs
from race.peer import Client, Peer, redis_socket

PEER = Peer(
    label="Huey",
    distributions=("huey", "redis"),
    store="Redis",
    isolation="a child process, for its job alone",
    settings="-k process -w children, no results, no periodic tasks, health check each second, hiredis",
    timeout="timeout: SIGALRM to a handler in Python",
    rescue="never, but it holds one job only",
)

huey = RedisHuey("race", url=f"unix://{redis_socket()}", results=False, blocking=True)
_TASKS = {
    name: huey.task(name=name, timeout=jobs.HANG_TIMEOUT_SECONDS if name == "hang" else None)(func)
    for name, func in jobs.TASKS.items()
}


async def set_up() -> None:
    pass


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async def enqueue(task: str, number: int) -> None:
        _TASKS[task](number)

    async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
        for number in numbers:  # there is no call for many
            _TASKS[task](number)

    yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    options = ["-k", "process", "-w", str(children), "--no-periodic", "-c", "1", "-q"]
    return [[sys.executable, str(Path(sys.executable).with_name("huey_consumer")), "race.peers.huey.huey", *options]]
