"""What does an old open transaction cost, by the layout of what is ready? Run `python -m bench.horizon`.

While such a transaction is open PostgreSQL removes no deleted or replaced row. One bare loop enqueues, claims and
completes 500 jobs at a time, so there is never a backlog; each layout does so without and with such a transaction.
`one table` updates the row of a job; `ready` deletes from a narrow table and looks for jobs from its beginning each
time; `past the last` is the same as the daemon does it, by core/frontier.py; `partitions` inserts into one of several
tables by turns and truncates the one that it has emptied.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import psycopg

from bench import layout, rows
from bench.figures import Figure, median, table
from bench.rig import Rig, connect
from roostd.core.frontier import Frontier, Range, everywhere
from roostd.core.job import ClaimedJob
from roostd.embedded import EmbeddedPostgres
from roostd.store.statements import SESSION, SQL, claim_parameters

JOBS = 200_000
MEASURED = 20_000  # the last of them
BATCH = 500
PARTITION = 20_000  # rows until the next is taken

Conn = psycopg.Connection[Any]


class OneTable:
    layout = layout.LAYOUTS[0]

    def __init__(self, conn: Conn) -> None:
        layout.create(conn, self.layout)

    def enqueue(self, conn: Conn) -> None:
        conn.execute(self.layout.insert, (10, BATCH), prepare=True)

    def claim(self, conn: Conn) -> list[tuple[Any, ...]]:
        return conn.execute(self.layout.claim, (BATCH,), prepare=True).fetchall()

    def complete(self, conn: Conn, claimed: Sequence[tuple[Any, ...]]) -> None:
        conn.execute(self.layout.complete, (layout.column(claimed, 0), layout.column(claimed, 1)), prepare=True)


class Partitions(OneTable):
    layout = layout.LAYOUTS[2]

    def __init__(self, conn: Conn) -> None:
        super().__init__(conn)
        self._free = deque(["ready_1", "ready_2"])
        for name in self._free:
            conn.execute(f"CREATE TABLE {name} (LIKE ready INCLUDING ALL)".encode())
        self._used = deque(["ready"])  # the last is the one that takes new rows
        self._rows = 0

    def enqueue(self, conn: Conn) -> None:
        conn.execute(self._on(self.layout.insert, self._used[-1]), (10, BATCH), prepare=True)
        self._rows += BATCH
        if self._rows >= PARTITION and self._free:
            self._used.append(self._free.popleft())
            self._rows = 0

    def claim(self, conn: Conn) -> list[tuple[Any, ...]]:
        claimed: list[tuple[Any, ...]] = []
        for name in list(self._used):
            claimed += conn.execute(self._on(self.layout.claim, name), (BATCH - len(claimed),), prepare=True).fetchall()
            if len(claimed) == BATCH:
                return claimed
            if name != self._used[-1]:
                conn.execute(f"TRUNCATE {name}".encode())
                self._used.popleft()
                self._free.append(name)
        return claimed

    @staticmethod
    def _on(statement: str, name: str) -> bytes:
        return statement.replace(" ready ", f" {name} ").replace(" ready.", f" {name}.").encode()


class Ready:
    """The daemon's own tables and statements."""

    def __init__(self, conn: Conn) -> None:
        rows.clear(conn)
        self._worker_id = rows.add_worker(conn)

    def enqueue(self, conn: Conn) -> None:
        rows.add_ready(conn, BATCH)

    def claim(self, conn: Conn) -> list[tuple[Any, ...]]:
        return self._claim(conn, everywhere(["default"]))

    def _claim(self, conn: Conn, ranges: list[Range]) -> list[tuple[Any, ...]]:
        return conn.execute(SQL["claim"], claim_parameters(self._worker_id, ranges, BATCH), prepare=True).fetchall()

    def complete(self, conn: Conn, claimed: Sequence[tuple[Any, ...]]) -> None:
        parameters = {"job_ids": layout.column(claimed, 0), "leases": layout.column(claimed, 1), "results": []}
        conn.execute(SQL["complete"], parameters, prepare=True)


class PastTheLast(Ready):
    def __init__(self, conn: Conn) -> None:
        super().__init__(conn)
        self._frontier = Frontier()

    def claim(self, conn: Conn) -> list[tuple[Any, ...]]:
        began_at = time.monotonic()
        ranges = self._frontier.ranges(["default"], began_at, polling=True)
        claimed = self._claim(conn, ranges)
        now = time.monotonic()
        self._frontier.claimed(ranges, [ClaimedJob(*row) for row in claimed], now - began_at, now)
        return claimed


LAYOUTS: dict[str, Callable[[Conn], OneTable | Ready]] = {
    "one table": OneTable,
    "ready, from its beginning": Ready,
    "ready, past the last": PastTheLast,
    "partitions": Partitions,
}


def measure(rig: Rig, jobs: int = JOBS) -> list[Figure]:
    figures = []
    for name, layout_of in LAYOUTS.items():
        free = _run(rig, layout_of, jobs, pinned=False)
        pinned = _run(rig, layout_of, jobs, pinned=True)
        for words, (rate, claims) in (("", free), (", pinned", pinned)):
            figures.append(Figure(f"{name}{words}", rate, "jobs/s"))
            figures.append(median(f"… a claim of {BATCH}", claims, "ms"))
            figures.append(Figure("… the same, mean", mean(claims), "ms"))
        figures.append(Figure(f"{name}: rate pinned to not", 100 * pinned[0] / free[0], "%"))
    return figures


def _run(
    rig: Rig, layout_of: Callable[[Conn], OneTable | Ready], jobs: int, *, pinned: bool
) -> tuple[float, list[float]]:
    """Jobs a second of the last tenth, and the claims' times in ms."""
    with rig.database() as dsn, connect(dsn) as conn, psycopg.connect(dsn) as pin:
        one = layout_of(conn)
        conn.execute(SESSION)
        if pinned:
            pin.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            pin.execute("SELECT count(*) FROM pg_class")
        claims = []
        began_at = 0.0
        measured = min(MEASURED, jobs)
        for number in range(0, jobs, BATCH):
            if number == jobs - measured:
                began_at = time.perf_counter()
            one.enqueue(conn)
            claim_at = time.perf_counter()
            claimed = one.claim(conn)
            if began_at:
                claims.append(1000 * (time.perf_counter() - claim_at))
            one.complete(conn, claimed)
        rate = measured / (time.perf_counter() - began_at)
        pin.rollback()
    return rate, claims


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="roost-bench-") as directory,
        EmbeddedPostgres(Path(directory) / "postgres") as server,
    ):
        rig = Rig(Path(directory), server)
        machine, figures = rig.describe(), measure(rig)
    print(table(machine, figures))


if __name__ == "__main__":
    main()
