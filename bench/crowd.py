"""Do applications that enqueue at the same time hold each other up?

Each client is a process with a connection of its own and commits each job by itself. Beside it the same with one bare
row an insert: what such commits reach on this machine, whatever is in them.
"""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from bench import rows
from bench.figures import Aim, Figure, median, median_ratio
from bench.rig import Rig, connect
from bench.scale import Scale
from roost_client import Roost

CLIENTS = 8
START_SECONDS = 30.0
WARM_UP = 10  # opens the connection and prepares the statement
_spawn = multiprocessing.get_context("spawn")


def measure(rig: Rig, scale: Scale) -> list[Figure]:
    rates: dict[tuple[str, int], list[float]] = {}
    with rig.database() as dsn, connect(dsn) as conn:
        conn.execute("CREATE TABLE bare (number integer)")
        for _ in range(scale.crowd_rounds):
            for what in ("enqueue", "insert"):
                for clients in (1, CLIENTS):
                    rows.clear(conn)
                    rates.setdefault((what, clients), []).append(_rate(dsn, what, clients, scale.crowd_seconds))
    one, many = rates["enqueue", 1], rates["enqueue", CLIENTS]
    return [
        median("enqueue, one client", one, "jobs/s"),
        median(f"enqueue, {CLIENTS} clients at once", many, "jobs/s"),
        median_ratio("… relative to one", many, one, aim=Aim("≥", 5)),
        median_ratio(f"a bare insert, {CLIENTS} clients relative to one", rates["insert", CLIENTS], rates["insert", 1]),
    ]


def _rate(dsn: str, what: str, clients: int, seconds: float) -> float:
    """Commits a second."""
    start = _spawn.Barrier(clients)
    counts: Queue[int] = _spawn.Queue()
    processes = [_spawn.Process(target=_client, args=(dsn, what, seconds, start, counts)) for _ in range(clients)]
    for process in processes:
        process.start()
    try:
        return sum(counts.get(timeout=START_SECONDS + 2 * seconds) for _ in processes) / seconds
    finally:
        for process in processes:
            process.kill()
            process.join()


def _client(dsn: str, what: str, seconds: float, start: Barrier, counts: Queue[int]) -> None:
    with Roost(dsn) as roost, connect(dsn) as conn:

        def commit(number: int) -> None:
            if what == "enqueue":
                roost.enqueue("noop", args={"number": number})
            else:
                conn.execute("INSERT INTO bare VALUES (%s)", (number,), prepare=True)

        for number in range(WARM_UP):
            commit(number)
        start.wait(START_SECONDS)
        ends_at, done = time.monotonic() + seconds, 0
        while time.monotonic() < ends_at:
            commit(done)
            done += 1
    counts.put(done)
