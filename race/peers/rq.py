"""RQ: workers that fork a process for every job.

Tuned as its documentation says (docs/workers, Performance Notes, of 3.0): the modules of the jobs are imported before
the fork. Results are kept for no time; hiredis. The timeout (`job_timeout`) is a SIGALRM in the job's process, whose
handler in Python has to wait for C; the parent kills the process a minute later (rq.worker.Worker.monitor_work_horse).
`SimpleWorker`, which doesn't fork, is about six times as fast and not what its documentation has people run in
production (docs/benchmark: "run Worker or SpawnWorker"), so it isn't raced.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from redis import Redis
from rq import Queue, Worker

from race import jobs, work
from race.peer import Client, Peer, redis_socket

BULK = 1_000  # jobs a pipeline

PEER = Peer(
    label="RQ",
    distributions=("rq", "redis"),
    store="Redis",
    isolation="a process forked for each job",
    settings="one worker a child, modules imported before the fork, result_ttl 0, hiredis",
    timeout="job_timeout: SIGALRM to a handler in Python; killed a minute later",
    rescue="at once, but for its own",
)


def _timeout(task: str) -> int | None:
    return jobs.HANG_TIMEOUT_SECONDS if task == "hang" else None


async def set_up() -> None:
    pass


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    queue = Queue("default", connection=Redis(unix_socket_path=redis_socket()))

    async def enqueue(task: str, number: int) -> None:
        queue.enqueue(jobs.TASKS[task], number, job_timeout=_timeout(task), result_ttl=0)

    async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
        for first in range(0, len(numbers), BULK):
            queue.enqueue_many(
                [
                    Queue.prepare_data(jobs.TASKS[task], (number,), timeout=_timeout(task), result_ttl=0)
                    for number in numbers[first : first + BULK]
                ]
            )

    yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    return [work.command("rq", 1)] * children


def run(_children: int) -> None:
    # As `rq worker` does, but with race.jobs imported by now.
    logging.basicConfig(level=logging.WARNING)
    Worker(["default"], connection=Redis(unix_socket_path=redis_socket())).work(logging_level="WARNING")
