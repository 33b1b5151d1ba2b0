"""awa: a runtime in Rust inside each Python worker, which claims in batches and calls asynchronous handlers.

Tuned, by the documentation of 0.6: its queue storage; more jobs at once (docs/configuration: `max_workers`, 50 by
default, to be changed "Always — this is your concurrency cap"); two `claimers` and larger claims, which
AsyncClient.start offers "for hot queue-storage queues"; bulk by `enqueue_many_copy`, its way for "high-volume Python
producers" (README). With the defaults two workers drained an eighth of what they drain so. `deadline_duration_ms` is
what a running attempt may take before it is rescued; it doesn't stop the handler.

Its clock stops when the last job has run, not when that is recorded: awa.jobs doesn't show what runs, and shows what is
completed up to seconds later.

It starts what it claimed together in no fixed order, and a process that dies takes all of that with it, what has run
and isn't recorded yet included; so only few jobs finish beside crashes, or none where the first to start is a bad one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import awa
from psycopg.conninfo import conninfo_to_dict

from race import jobs, work
from race.peer import Client, Peer, beside_harm, dsn

MAX_WORKERS = 500
SERVER_CONNECTIONS = 80  # that all workers may take: a worker takes 10 by default, and PostgreSQL has 100

PEER = Peer(
    label="awa",
    distributions=("awa-pg",),
    store="PostgreSQL",
    isolation="none: a task in the worker's event loop",
    settings=f"one worker process a child, max_workers {MAX_WORKERS} each, 2 claimers, claim_batch_size 512 "
    "(beside hangs and crashes its defaults), asynchronous tasks, COPY for bulk",
    timeout="deadline_duration_ms: the attempt is given up, the handler goes on",
    rescue="after 90 to 120 s (heartbeat)",
)


@dataclass
class Noop:
    number: int


@dataclass
class Burn:
    number: int


@dataclass
class Hang:
    number: int


@dataclass
class Crash:
    number: int


_LARGE_CLAIMS = {"claimers": 2, "claim_batch_size": 512}
_ARGS: dict[str, Any] = {"noop": Noop, "burn": Burn, "hang": Hang, "crash": Crash}


def _queue(task: str) -> str:
    return "hang" if task == "hang" else "default"


def _client(connections: int = 10) -> awa.AsyncClient:
    options = conninfo_to_dict(dsn())
    host = quote(str(options["host"]), safe="")
    return awa.AsyncClient(
        f"postgres://{options['user']}@localhost:{options['port']}/{options['dbname']}?host={host}", connections
    )


async def set_up() -> None:
    async with _client() as own:
        await own.migrate()
        await own.install_queue_storage()


@asynccontextmanager
async def client() -> AsyncIterator[Client]:
    async with _client() as own:

        async def enqueue(task: str, number: int) -> None:
            await own.insert(_ARGS[task](number), queue=_queue(task), max_attempts=1)

        async def enqueue_many(task: str, numbers: Sequence[int]) -> None:
            await own.enqueue_many_copy([_ARGS[task](number) for number in numbers], queue=_queue(task), max_attempts=1)

        yield Client(enqueue, enqueue_many)


def commands(children: int) -> list[list[str]]:
    return [work.command("awa", children)] * children


def run(children: int) -> None:
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(_work(min(10, SERVER_CONNECTIONS // children)))


async def _work(connections: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with _client(connections) as own:
        for name, args in _ARGS.items():
            own.task(args, queue=_queue(name))(_handler(name))
        default = {"max_workers": 50} if beside_harm() else {"max_workers": MAX_WORKERS, **_LARGE_CLAIMS}
        await own.start(
            [
                {"name": "default", **default},
                {"name": "hang", "max_workers": 50, "deadline_duration_ms": 1000 * jobs.HANG_TIMEOUT_SECONDS},
            ],
            deadline_rescue_interval_ms=1000,
        )
        await stop.wait()
        await own.shutdown()


def _handler(name: str) -> Any:
    func = jobs.TASKS[name]

    async def handle(job: Any) -> None:
        func(job.args.number)

    return handle
