"""Dramatiq: forked processes with threads.

Tuned, by the documentation of 2.2: `--processes` = children, `--threads` at the default of 8 (`dramatiq --help`; with
fewer it is slower); more messages fetched ahead than the 16 that those threads have by default, which doubles its rate
(`dramatiq_queue_prefetch`, dramatiq.worker), but not beside hangs and crashes; hiredis. The timeout (`time_limit`)
raises an exception in the job's thread, which only happens while Python code runs (advanced, Message Interrupts). When
one process dies, the parent ends the others too, and is started again by the race.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from race import jobs
from race.peer import Client, Peer, beside_harm, redis_socket

THREADS = 8
PREFETCH = 64

PEER = Peer(
    label="Dramatiq",
    distributions=("dramatiq", "redis"),
    store="Redis",
    isolation="a thread beside others in a child process",
    settings=f"processes = children, {THREADS} threads each, dramatiq_queue_prefetch {PREFETCH} "
    "(not beside hangs and crashes), hiredis",
    timeout="time_limit: an exception set in the thread, seen by Python code only",
    rescue="after 60 s (heartbeat_timeout), at the next maintenance",
)

broker = RedisBroker(url=f"unix://{redis_socket()}")
dramatiq.set_broker(broker)
_ACTORS = {
    name: dramatiq.actor(
        actor_name=name,
        max_retries=0,
        **({"time_limit": 1000 * jobs.HANG_TIMEOUT_SECONDS} if name == "hang" else {}),
    )(func)
    for name, func in jobs.TASKS.items()
}


async def set_up() -> None:
    pass


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async def enqueue(task: str, number: int) -> None:
        _ACTORS[task].send(number)

    async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
        for number in numbers:  # there is no call for many
            _ACTORS[task].send(number)

    yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    options = ["--processes", str(children), "--threads", str(THREADS)]
    prefetch = [] if beside_harm() else ["env", f"dramatiq_queue_prefetch={PREFETCH}"]
    return [[*prefetch, sys.executable, "-m", "dramatiq", *options, "race.peers.dramatiq"]]
