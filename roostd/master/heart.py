"""Keeps this worker alive to its peers, notices when it is dead to them, and frees the jobs of those that are dead.

The rule that keeps a job from running twice: a worker that has not got through to the database for four fifths of
`orphan_stale_after` kills its own children, before the others may take its jobs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import structlog

from roostd.config import WorkerConfig
from roostd.master.database import DatabaseGone, Link
from roostd.store import statements

FENCE_FRACTION = 0.8
_log = structlog.get_logger()


class Heart:
    """`on_beat` takes in each answer, `on_fence` kills the children, `on_dead` starts afresh under a new id.

    `interval` is the seconds from one beat to the next.

    `settings` are asked for anew each time: a reload may have changed them.
    """

    def __init__(
        self,
        link: Link,
        settings: Callable[[], WorkerConfig],
        *,
        interval: Callable[[], float],
        worker_id: Callable[[], UUID],
        figures: Callable[[], dict[str, Any]],
        on_beat: Callable[[statements.Beat], None],
        on_fence: Callable[[], None],
        on_dead: Callable[[], Any],
    ) -> None:
        self._link = link
        self._settings = settings
        self._interval = interval
        self._worker_id = worker_id
        self._figures = figures
        self._on_beat = on_beat
        self._on_fence = on_fence
        self._on_dead = on_dead
        self._loop = asyncio.get_running_loop()
        self._alive_at = self._loop.time()  # when the last beat that got through was sent
        self._fenced = False
        self._now = asyncio.Event()
        self._stopped = False

    def check(self) -> bool:
        """Fences this worker if its beats have not got through for long, whatever the beat itself is waiting for.

        Returns whether it is fenced: the others may soon take its jobs, or have, so none may be begun.
        """
        silent_seconds = self._loop.time() - self._alive_at
        if not self._fenced and silent_seconds > self._settings().orphan_stale_after * FENCE_FRACTION:
            self._fenced = True
            _log.error("worker.fenced", silent_seconds=round(silent_seconds, 1))
            self._on_fence()
        return self._fenced

    def beat_now(self) -> None:
        self._now.set()

    def stop(self) -> None:
        """The worker takes its row away: that there is none from now on means nothing."""
        self._stopped = True
        self._now.set()

    async def run(self) -> None:
        self._alive_at = self._loop.time()  # nothing was claimed before
        while True:
            self._now.clear()  # before asking: the answer may not hold what is hinted at from now on
            sent_at = self._loop.time()
            worker_id = self._worker_id()
            figures = self._figures()
            try:
                beat = await self._link.run(lambda conn, w=worker_id, f=figures: statements.heartbeat(conn, w, **f))  # type: ignore[misc]
                if self._stopped:
                    return
                if beat is None:
                    await self._on_dead()
                    self._alive_at, self._fenced = self._loop.time(), False
                    continue
                self._alive_at, self._fenced = sent_at, False
                self._on_beat(beat)
                pause = self._interval()
            except DatabaseGone as error:
                _log.warning("worker.heartbeat_failed", error=str(error))
                pause = min(1.0, self._settings().heartbeat_interval)
            try:
                async with asyncio.timeout(pause):
                    await self._now.wait()
            except TimeoutError:
                continue

    async def watch(self) -> None:
        """Checks often enough."""
        while True:
            await asyncio.sleep(min(1.0, self._settings().orphan_stale_after * FENCE_FRACTION / 20))
            self.check()


async def reap(link: Link, settings: WorkerConfig) -> int:
    """Frees the jobs of workers that are dead to their peers; returns how many."""
    stale = await link.run(lambda conn: statements.remove_stale_workers(conn, settings.orphan_stale_after))
    for worker in stale:
        _log.warning(
            "worker.declared_dead", worker=str(worker.id), name=worker.name, host=worker.hostname, pid=worker.pid
        )
    rescued = await rescue(link, settings.error_cap, "the worker that ran it was lost")
    await link.run(statements.remove_idle)
    return rescued


async def note_ended(link: Link) -> None:
    """Has dependents told of what was ended by workers of a version from before there were any."""
    last: int | None = 1 - 2**63  # as a literal, the least of all is out of range
    while last is not None:
        last = await link.run(lambda conn, after=last: statements.note_ended(conn, after))  # type: ignore[misc]


async def rescue(link: Link, error_cap: int, reason: str) -> int:
    """Frees all claims whose worker has no row; returns how many."""
    total = 0
    while True:
        freed = await link.run(lambda conn: statements.rescue(conn, reason=reason, error_cap=error_cap))
        for job_id, state in freed.items():
            _log.warning("job.rescued", job_id=job_id, state=state.value)
        total += len(freed)
        if len(freed) < 1000:
            return total
