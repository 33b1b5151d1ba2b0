"""Asks the database for jobs when a pool has room, makes due jobs ready, tells jobs that wait for others of their end,
and lets go of claims that nobody knows of. Declares the limits of tasks before it claims any.

When to ask is decided in core/demand.py, for throttled tasks in core/throttle.py, for how many in core/pool.py.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar
from uuid import UUID

import structlog
from psycopg import AsyncConnection

from roostd.config import PoolConfig
from roostd.core.demand import PROMOTE_BATCH, Demand, promote_in
from roostd.core.frontier import PAST_SECONDS, Frontier, Looks, Range, everywhere
from roostd.core.job import ClaimedJob
from roostd.core.pool import MAX_CLAIM, Pool
from roostd.core.throttle import START_WITHIN_SECONDS, WINDOW_SECONDS
from roostd.core.throttle import Looks as ThrottledLooks
from roostd.master.database import DatabaseGone, Link
from roostd.store import statements

WARN_SECONDS = 0.25  # of a claim that looked everywhere and got little for it
WARN_INTERVAL_SECONDS = 60.0
_HELD_SECONDS = 0.02  # before dependents that another transaction held are looked at again, doubled up to a poll

Limits = tuple[str, int | None, int | None]  # a task's name, rate_per_minute, max_concurrency

_T = TypeVar("_T")
_Timed = tuple[_T, float]  # an answer, and the seconds it took

_log = structlog.get_logger()


@dataclass(slots=True)
class PoolRun:
    """A pool with its settings and its view of what the database holds for it."""

    config: PoolConfig
    pool: Pool
    demand: Demand
    frontier: Frontier = field(default_factory=Frontier)
    throttled: ThrottledLooks = field(default_factory=ThrottledLooks)

    def hinted(self, now: float) -> None:
        """Takes in a notification, or any other reason to think that there are new jobs."""
        self.demand.hinted(now)
        self.throttled.hinted(now)


class Claimer:
    def __init__(
        self,
        link: Link,
        *,
        pools: dict[str, PoolRun],
        worker_id: Callable[[], UUID],
        poll_interval: Callable[[], float],
        retry_seconds: float,
        on_claimed: Callable[[PoolRun, list[ClaimedJob]], None],
        on_unknown_claims: Callable[[list[tuple[int, int]]], None],
        known_leases: Callable[[], set[int]],
        may_claim: Callable[[], bool],
        is_deaf: Callable[[], bool],
    ) -> None:
        self.database_up = False
        self.stopped = False
        self._link = link
        self._pools = pools
        self._worker_id = worker_id
        self._poll_interval = poll_interval
        self._retry_seconds = retry_seconds
        self._on_claimed = on_claimed
        self._on_unknown_claims = on_unknown_claims
        self._known_leases = known_leases
        self._may_claim = may_claim
        self._is_deaf = is_deaf
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._promote_at = 0.0
        self._promote_looks = Looks()
        self._parents: set[int] = set()  # that have ended, with dependents yet to be told
        self._held: set[int] = set()  # likewise, but another transaction had these dependents when they were looked at
        self._held_at = 0.0
        self._held_pause = _HELD_SECONDS
        self._follow_all_at = 0.0
        self._warn_at = 0.0
        self._idle_said: tuple[UUID, int, frozenset[str]] | None = None
        self._check_claims = False
        self._undeclared: list[Limits] | None = None
        self._declared = asyncio.Event()
        self._declared.set()
        self._throttled: set[int] = set()  # the leases of throttled jobs that have not been heard to have ended

    def wake(self) -> None:
        """Room was made, or a hint came."""
        self._wake.set()

    def poll_now(self) -> None:
        """Looks for due jobs at once, and after an interval again."""
        self._promote_at = 0.0
        self._wake.set()

    def stop(self) -> None:
        """No claim is made after this, and one that is under way is let go of again."""
        self.stopped = True
        self._wake.set()

    def follow(self, parents: Iterable[int]) -> None:
        """Has the dependents told of jobs that have ended."""
        self._parents.update(parents)
        self._wake.set()

    def declare(self, limits: Iterable[Limits]) -> None:
        """Has these limits written before anything else is claimed."""
        self._undeclared = list(limits)
        self._declared.clear()
        self._wake.set()

    async def wait_declared(self) -> None:
        """Returns when the limits hold that were declared."""
        await self._declared.wait()

    def ended(self, leases: Iterable[int]) -> None:
        """Takes in that these claims have ended: where a task was at its limit there is room now."""
        if self._throttled and not self._throttled.isdisjoint(leases):
            self._throttled.difference_update(leases)
            for run in self._pools.values():
                run.throttled.hinted(self._loop.time())
            self._wake.set()

    def check_claims(self) -> None:
        """Has the claims that the database holds for this worker compared with what is known here."""
        self._check_claims = True
        self._wake.set()

    async def run(self) -> None:
        while await self._wait():
            try:
                await self._step()
                if not self.database_up:
                    self.database_up = True
                    _log.info("db.connected", purpose=self._link.purpose)
            except DatabaseGone as error:
                self.database_up = False
                self._check_claims = True  # an answer may have been lost, and with it jobs that are ours
                _log.warning("db.gone", purpose=self._link.purpose, error=str(error))
                await self._pause(self._retry_seconds)

    async def drain(self) -> int:
        """Claims until nothing is left that may run now; waits for what was claimed. Raises DatabaseGone."""
        claimed = 0
        while not self.stopped:
            await self._declare()
            promotion = await self._link.run(statements.promote)
            promoted = promotion.jobs
            told = await self._follow(None) if promotion.ended_parents else 0
            got = 0
            for run in list(self._pools.values()):
                if promotion.limits:
                    got += await self._look(run)
                if limit := self._demand(run):
                    got += await self._claim(run, limit, everywhere(run.config.queues))
            claimed += got
            busy = any(
                run.pool.is_busy or run.pool.starting or run.pool.missing_children() for run in self._pools.values()
            )
            if not (promoted or told or got or busy):
                return claimed
            if not (promoted or told or got):
                await self._sleep(self._poll_interval())
        return claimed

    def _demand(self, run: PoolRun) -> int:
        return run.pool.demand() if self._may_claim() else 0

    async def _pause(self, seconds: float) -> None:
        """As _sleep, but only a stop ends it early."""
        until = self._loop.time() + seconds
        while not self.stopped and (left := until - self._loop.time()) > 0:
            await self._sleep(left)

    async def _sleep(self, seconds: float) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _wait(self) -> bool:
        """Waits until there is something to ask the database; False when no more is to be asked."""
        while not self.stopped and not self._check_claims and self._undeclared is None:
            self._wake.clear()
            now = self._loop.time()
            if self._parents:
                break
            at = min(self._promote_at, self._held_at) if self._held else self._promote_at
            for run in self._pools.values():
                if self._demand(run):
                    at = min(at, run.demand.claim_at())
                    if run.throttled.look_at < at and run.pool.prompt_room(now):
                        at = run.throttled.look_at
            if at <= now:
                break
            await self._sleep(at - now)
        return not self.stopped

    async def _step(self) -> None:
        """One round trip of claims; with the promotion of due jobs, when that is due, in one transaction."""
        if self._check_claims:
            self._check_claims = False
            worker_id = self._worker_id()
            known = self._known_leases()  # before asking: what is written meanwhile is not known of any more
            self._throttled &= known  # an end may have been lost
            claims = await self._link.run(lambda conn: statements.list_claims(conn, worker_id))
            self._on_unknown_claims([claim for claim in claims if claim[1] not in known])
        await self._declare()
        await self._say_idle()
        now = self._loop.time()
        for run in list(self._pools.values()):
            if run.throttled.look_at <= now:
                await self._look(run)
        if self._held and now >= self._held_at:
            await self._follow(list(self._held)[:PROMOTE_BATCH])
        if self._parents:
            await self._follow(list(self._parents)[:PROMOTE_BATCH])
        if now < self._promote_at:
            for run in list(self._pools.values()):
                limit = self._demand(run)
                if limit and run.demand.claim_at() <= now:
                    await self._claim(run, limit, run.frontier.ranges(run.config.queues, now, polling=False))
            return
        asked: list[tuple[PoolRun, int, list[Range]]] = []
        for run in list(self._pools.values()):
            if limit := self._demand(run):
                asked.append((run, limit, run.frontier.ranges(run.config.queues, now, polling=True)))
            else:
                run.frontier.miss_poll()
        past_seconds = None if self._promote_looks.due(now) else PAST_SECONDS
        worker_id = self._worker_id()

        async def poll(
            conn: AsyncConnection,
        ) -> tuple[_Timed[statements.Promotion], list[_Timed[list[ClaimedJob]]]]:
            async with conn.transaction():
                return (
                    await self._timed(statements.promote(conn, past_seconds)),
                    [await self._timed(statements.claim(conn, worker_id, ranges, limit)) for _, limit, ranges in asked],
                )

        (promotion, seconds), answers = await self._link.run(poll)
        promoted = promotion.jobs
        self._promote_at = now + promote_in(promoted, promotion.next_in_seconds, self._poll_interval())
        if past_seconds is not None:
            self._promote_looks.took_elsewhere(seconds, promoted)
        elif promoted < PROMOTE_BATCH:
            self._promote_looks.took(seconds, promoted, self._loop.time())
        for run in self._pools.values():
            run.throttled.limits = promotion.limits
        for (run, limit, ranges), answer in zip(asked, answers, strict=True):
            if self._took(run, limit, ranges, answer, now):
                await self._set_aside(run, ranges)
        if promotion.ended_parents and now >= self._follow_all_at:
            if await self._follow(None):
                self._promote_at = now  # there may be more: a batch a poll would be few
            else:
                self._follow_all_at = now + self._poll_interval()

    async def _follow(self, parents: list[int] | None) -> int:
        """Tells dependents of `parents`, or of any that have ended: those of a lost worker or a cancel, too."""
        told, held, more = await self._link.run(lambda conn: statements.follow_parents(conn, parents))
        if parents and told < PROMOTE_BATCH:  # else there may be more of the same
            again = not self._held.isdisjoint(parents)
            self._parents.difference_update(parents)
            self._held.difference_update(parents)
            if held:
                self._held.update(held)
                self._held_pause = min(2 * self._held_pause, self._poll_interval()) if again else _HELD_SECONDS
                self._held_at = self._loop.time() + self._held_pause
        self.follow(more)
        if told:
            for run in self._pools.values():
                run.demand.made_ready()
        return told

    async def _claim(self, run: PoolRun, limit: int, ranges: list[Range]) -> int:
        worker_id = self._worker_id()
        asked_at = self._loop.time()
        answer = await self._link.run(lambda conn: self._timed(statements.claim(conn, worker_id, ranges, limit)))
        if self._took(run, limit, ranges, answer, asked_at):
            await self._set_aside(run, ranges)
        return len(answer[0])

    async def _look(self, run: PoolRun) -> int:
        """Claims jobs of throttled tasks, if the pool has room for any; returns how many."""
        asked_at = self._loop.time()
        start_by = time.clock_gettime(time.CLOCK_BOOTTIME) + START_WITHIN_SECONDS  # before the database counts them
        limit, room = self._demand(run), run.pool.prompt_room(asked_at)
        if not (limit and room):
            return 0
        worker_id = self._worker_id()
        ranges = run.frontier.cheap_ranges(run.config.queues)
        answer = await self._link.run(
            lambda conn: statements.claim_throttled(
                conn, worker_id, ranges, limit, most_throttled=room, window_seconds=WINDOW_SECONDS
            )
        )
        run.throttled.looked(
            len(answer.jobs),
            more=answer.more,
            next_in_seconds=answer.next_in_seconds,
            asked_at=asked_at,
            now=self._loop.time(),
            poll_interval=self._poll_interval(),
            gets_hints=run.demand.wants_hints and not self._is_deaf(),
        )
        if answer.jobs:
            self._throttled.update(job.lease for job in answer.jobs)
            self._on_claimed(
                run,
                [
                    job._replace(start_by=start_by if has_rate else math.inf)
                    for job, has_rate in zip(answer.jobs, answer.has_rate, strict=True)
                ],
            )
        return len(answer.jobs)

    async def _set_aside(self, run: PoolRun, ranges: list[Range]) -> None:
        """Moves what a claim met of throttled tasks, and more of the same, out of the way of the next."""
        await self._link.run(lambda conn: statements.set_aside(conn, ranges, MAX_CLAIM))
        run.throttled.met(self._loop.time())

    async def _declare(self) -> None:
        if (limits := self._undeclared) is None:
            return
        await self._link.run(lambda conn: statements.declare_limits(conn, limits))
        if self._undeclared is limits:
            self._undeclared = None
            self._declared.set()
            for run in self._pools.values():
                run.throttled.hinted(self._loop.time())

    async def _timed(self, statement: Awaitable[_T]) -> _Timed[_T]:
        started_at = self._loop.time()
        return await statement, self._loop.time() - started_at

    def _took(
        self, run: PoolRun, limit: int, ranges: list[Range], answer: _Timed[list[ClaimedJob]], asked_at: float
    ) -> bool:
        """Takes in the answer to a claim; returns whether it met jobs of throttled tasks."""
        jobs, seconds = answer
        now = self._loop.time()
        run.demand.claimed(limit, len(jobs), asked_at, now)
        run.frontier.claimed(ranges, jobs, seconds, now)
        if run.frontier.looks.dear_seconds > WARN_SECONDS and now >= self._warn_at:
            self._warn_at = now + WARN_INTERVAL_SECONDS
            _log.warning(
                "claim.slow",
                pool=run.config.name,
                seconds=round(seconds, 3),
                hint="rows of jobs claimed long ago can't be removed while an older transaction is open; the oldest:"
                " SELECT pid, xact_start, query FROM pg_stat_activity ORDER BY xact_start LIMIT 1",
            )
        claimed = [job for job in jobs if job.lease]
        if claimed:
            self._on_claimed(run, claimed)
        return len(claimed) < len(jobs)

    async def _say_idle(self) -> None:
        """Tells enqueuers which queues want hints, when that has changed or may have been lost."""
        worker_id = self._worker_id()
        hinted = () if self._is_deaf() else self._pools.values()
        queues = frozenset(
            queue for run in hinted if run.demand.wants_hints and not run.pool.draining for queue in run.config.queues
        )
        said = (worker_id, self._link.connects, queues)
        if said != self._idle_said:
            await self._link.run(lambda conn: statements.set_idle(conn, worker_id, sorted(queues)))
            self._idle_said = (worker_id, self._link.connects, queues)
