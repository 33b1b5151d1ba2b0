"""Celery: parents that hand jobs to preforked children.

Tuned, by the documentation of 5.7:

- userguide/optimizing, Prefetch Limits: a large `worker_prefetch_multiplier` for many short tasks ("Say 64, or 128").
- userguide/workers, Concurrency: "multiple worker instances running, may perform better than having a single worker".
  The parent is what limits Celery on Redis: it takes one message at a time, and spends two more calls of Redis on each.
  So there are as many parents as the race has children at most times, two, and the children are shared out among them.
- userguide/tasks, `ignore_result`; the events that nobody listens to (gossip, mingle, heartbeats) are off. Task events
  are by default. Rate limits cost nothing where no task has one. `-O fair` is the default since 4.0.
- hiredis, as redis-py's README says "for faster performance".

userguide/workers, Time Limits: the way to end a task that cannot be interrupted is `time_limit`; the parent kills the
child.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from celery import Celery

from race import jobs
from race.peer import Client, Peer, redis_socket

PREFETCH = 64
PARENTS = 2

PEER = Peer(
    label="Celery prefork",
    distributions=("celery", "kombu", "redis"),
    store="Redis",
    isolation="a child process, for its job alone",
    settings=f"{PARENTS} workers that share the children, worker_prefetch_multiplier {PREFETCH}, "
    "early acknowledgement, results ignored, no gossip, mingle and heartbeat, hiredis",
    timeout="time_limit: the child is killed",
    rescue="at once where a child died, but for its own; after 1 h (visibility_timeout) where the parent did",
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
    parents = min(PARENTS, children)
    options = ["--pool", "prefork", "--concurrency", str(children // parents), "--loglevel", "WARNING"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    worker = [sys.executable, "-m", "celery", "-A", "race.peers.celery", "worker", *options, *quiet]
    return [[*worker, "--hostname", f"race{number}"] for number in range(parents)]
