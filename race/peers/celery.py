"""Celery: a parent that hands jobs to preforked children.

Tuned as userguide/optimizing says for many short tasks: a large `worker_prefetch_multiplier` ("64, or 128 for
example") and transient or early acknowledged messages. Results are ignored, the events that nobody listens to
(gossip, mingle, heartbeats) are off. `-O fair` is the default since 4.0. The documentation's way to end a task that
cannot be interrupted is `time_limit`: the parent kills the child.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from celery import Celery

from race import jobs
from race.peer import Client, Peer, redis_socket

PREFETCH = 64

PEER = Peer(
    label="Celery prefork",
    distributions=("celery", "kombu", "redis"),
    store="Redis",
    isolation="a child process, for its job alone",
    settings=f"concurrency = children, worker_prefetch_multiplier {PREFETCH}, early acknowledgement, results ignored, "
    "no gossip, mingle and heartbeat",
    timeout="time_limit: the child is killed",
)

app = Celery("race", broker=f"redis+socket://{redis_socket()}")
app.conf.update(
    worker_prefetch_multiplier=PREFETCH,
    task_ignore_result=True,
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
)
for _name, _func in jobs.TASKS.items():
    app.task(name=_name, max_retries=0, **({"time_limit": jobs.HANG_TIMEOUT_SECONDS} if _name == "hang" else {}))(_func)


async def set_up() -> None:
    pass


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async def enqueue(task: str, number: int) -> None:
        app.tasks[task].apply_async(kwargs={"number": number})

    async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
        # There is no call for many; one producer for all saves taking it from the pool each time.
        with app.producer_pool.acquire(block=True) as producer:
            for number in numbers:
                app.tasks[task].apply_async(kwargs={"number": number}, producer=producer)

    yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    options = ["--pool", "prefork", "--concurrency", str(children), "--loglevel", "WARNING"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    return [[sys.executable, "-m", "celery", "-A", "race.peers.celery", "worker", *options, *quiet]]
