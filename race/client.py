"""One process of an application that enqueues with a competitor's own library: `python -m race.client NAME ACTION …`.

Prints one JSON object. It is a process of its own so that competitors never share an interpreter, and so that one
that isn't installed is told by its own ImportError.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from race import ledger
from race.ledger import Event
from race.peer import Client

LOAD_TICK_SECONDS = 0.05
START_TOGETHER_SECONDS = 60.0


async def _each(client: Client, task: str, first: str, count: str) -> float:
    """Seconds for that many jobs, each safe before the next."""
    await client.enqueue(task, int(first))  # opens what is opened only once
    began_at = time.perf_counter()
    for number in range(int(first) + 1, int(first) + 1 + int(count)):
        await client.enqueue(task, number)
    return time.perf_counter() - began_at


async def _many(client: Client, task: str, first: str, count: str) -> float:
    """Seconds for that many jobs by the fastest way."""
    numbers = range(int(first), int(first) + int(count))
    began_at = time.perf_counter()
    await client.enqueue_many(task, numbers)
    return time.perf_counter() - began_at


async def _drip(client: Client, task: str, first: str, count: str, interval_seconds: str) -> float:
    """One job each interval, each call noted in the ledger."""
    began_at = at = time.monotonic()
    for number in range(int(first), int(first) + int(count)):
        ledger.write(Event.CALLED, number)
        await client.enqueue(task, number)
        at += float(interval_seconds)
        await asyncio.sleep(max(0.0, at - time.monotonic()))
    return time.monotonic() - began_at


async def _load(client: Client, task: str, first: str, per_second: str, seconds: str) -> float:
    """A steady stream; returns how long it took, which is more than asked for where the client can't keep up."""
    began_at = at = time.monotonic()
    number, size = int(first), round(int(per_second) * LOAD_TICK_SECONDS)
    for _ in range(round(float(seconds) / LOAD_TICK_SECONDS)):
        await client.enqueue_many(task, range(number, number + size))
        number += size
        at += LOAD_TICK_SECONDS
        await asyncio.sleep(max(0.0, at - time.monotonic()))
    return time.monotonic() - began_at


async def _crowd(client: Client, task: str, first: str, clients: str, index: str, seconds: str) -> float:
    """When all clients are there the one of index 0 enqueues for that long, then all do. Notes each that is safe."""
    number = int(first)
    await client.enqueue(task, number)
    ledger.write(Event.CALLED, number)
    deadline = time.monotonic() + START_TOGETHER_SECONDS
    book = ledger.Ledger(Path(os.environ[ledger.PATH_VARIABLE]))
    while len(book) < int(clients):
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(book)} of {clients} clients are there")
        await asyncio.sleep(0.002)
    began_at = time.monotonic()
    for event, ends_at in ((Event.BEGAN, began_at + float(seconds)), (Event.DONE, began_at + 2 * float(seconds))):
        if event is Event.BEGAN and int(index) > 0:
            await asyncio.sleep(float(seconds))
        while time.monotonic() < ends_at:
            number += 1
            await client.enqueue(task, number)
            ledger.write(event, number)
    return time.monotonic() - began_at


_ACTIONS: dict[str, Callable[..., Awaitable[float]]] = {
    "each": _each,
    "many": _many,
    "drip": _drip,
    "load": _load,
    "crowd": _crowd,
}


def main() -> None:
    name, action, *arguments = sys.argv[1:]
    module = importlib.import_module(f"race.peers.{name}")
    match action:
        case "describe":
            answer = asdict(module.PEER) | {
                "versions": {one: importlib.metadata.version(one) for one in module.PEER.distributions}
            }
        case "commands":
            answer = {"commands": module.commands(int(arguments[0]))}
        case "set_up":
            asyncio.run(module.set_up())
            answer = {}
        case _:
            answer = {"seconds": asyncio.run(_act(module, action, arguments))}
    print(json.dumps(answer))


async def _act(module: Any, action: str, arguments: list[str]) -> float:
    async with module.client() as client:
        return await _ACTIONS[action](client, *arguments)


if __name__ == "__main__":
    main()
