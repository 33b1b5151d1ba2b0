"""Thousands of random schedules over the pool, its demand and its frontier: whatever happens, the rules hold.

The pool, the demand, the frontier, the settlement of failures are the real ones. The database, the children and the
clock are toys here, driven by one generator of random numbers; the master is the few lines that carry actions out in
its order.
A failure prints the seed of its schedule and the end of its story. SIMULATION_SEED=n runs that one alone,
SIMULATIONS=n more of them.
"""

from __future__ import annotations

import heapq
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from roost_client import JobState
from roostd.core.demand import Demand
from roostd.core.frontier import CHEAP_SECONDS, KEPT_SECONDS, PAUSE, Frontier, Range, everywhere
from roostd.core.generations import Generations
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Ending, Report, Settlement, SoftReason, settle
from roostd.core.pace import MAX_WINDOW
from roostd.core.pool import (
    STALL_SECONDS,
    STEAL_SECONDS,
    UNREAD_SECONDS,
    Assign,
    CallOff,
    Kill,
    Pool,
    Remind,
    Retire,
    Settle,
    TakeBack,
)

SCHEDULES = int(os.environ.get("SIMULATIONS", "10000"))
BLOCK = 500  # schedules of one test: two seconds, so that they can be shared out
ONE_SEED = os.environ.get("SIMULATION_SEED")

QUEUES = ("a", "b")
POLL_INTERVAL = 1.0
MAX_CRASHES = 3
SHUTDOWN_TIMEOUT = 1.0
EPSILON = 1e-6

# The longest that the toys let things take, which the rules' own times are to be read with.
NOTICE_LATENCY = 0.010
CLAIM_LATENCY = 0.015
MOST_WADING = 0.050
STATUS_LATENCY = 0.5

ENDING_OF = {
    SoftReason.TIMEOUT: Ending.TIMED_OUT,
    SoftReason.CANCEL: Ending.CANCELLED,
    SoftReason.SHUTDOWN: Ending.RELEASED,
}
TERMINAL = ("completed", "discarded", "cancelled")


class Broken(AssertionError):
    """A rule was broken."""


@dataclass(slots=True)
class Row:
    """A job in the toy database; `place` is ready, scheduled, claimed or a terminal state."""

    id: int
    queue: str
    timeout_seconds: int | None
    max_attempts: int
    priority: int
    scheduled_at: float = 0.0
    ready_at: float = 0.0  # when claims could first see it there
    passed_by: bool = False
    place: str = "ready"
    lease: int = 0
    attempt: int = 0
    crashes: int = 0
    cancel_requested: bool = False

    def rank(self) -> tuple[int, float, int]:
        return self.priority, self.scheduled_at, self.id

    def is_in(self, each: Range) -> bool:
        """As claim.sql reads it."""
        start = (each.priority, float(each.scheduled_at) - each.early_seconds, each.job_id)
        return self.queue == each.queue and self.priority <= each.last_priority and self.rank() > start


@dataclass(slots=True)
class Plan:
    """What a run will do, if it is left alone: how long it takes, how it ends, what it does when called off."""

    seconds: float | None  # None: for ever
    ending: str
    heeds_after: float | None  # None: never


@dataclass(slots=True)
class ToyChild:
    key: int
    generation: int
    room: int
    max_jobs: int | None
    intake: deque[ClaimedJob] = field(default_factory=deque)
    running: ClaimedJob | None = None
    running_since: float = 0.0
    plan: Plan | None = None
    outbox: list[tuple[int, str]] = field(default_factory=list)  # (lease, how it ended), not yet read by the master
    jobs_run: int = 0
    alive: bool = True
    intake_closed: bool = False
    intake_broken: bool = False
    reading: bool = False
    readable_told: bool = False
    lost_at: float | None = None


class World:
    """One schedule, from one seed."""

    def __init__(self, seed: int, *, tell: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        self.now = 1000.0
        self.story: list[str] | None = [] if tell else None
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.event_number = 0
        self.kill_grace = rng.choice([0.05, 0.3, 1.0])
        self.pool = Pool(
            size=rng.randint(1, 4), kill_grace=self.kill_grace, prefetch=rng.choice([None, None, None, 1, 3, 20])
        )
        self.demand = Demand(POLL_INTERVAL)
        self.frontier = Frontier()
        self.generations = Generations()
        self.generation = 1
        # database
        self.rows: dict[int, Row] = {}
        self.next_lease = 1
        self.paused: frozenset[str] = frozenset()
        self.paused_at = 0.0
        self.idle_announced = False
        self.accepted: dict[int, str] = {}  # lease -> how it ended
        self.claim_latency = rng.choice([CLAIM_LATENCY, CHEAP_SECONDS])
        self.wading = rng.choice([0.0, rng.uniform(0.01, MOST_WADING)])  # what a look everywhere takes more
        self.wading_from = self.now + rng.choice([0.0, rng.uniform(0, 3)])
        self.wading_until = self.now + rng.choice([rng.uniform(0, 5), 1e9])
        self.late = rng.choice([0.0, 0.1, 0.5])  # of the rows, those that lie before what may have been claimed
        # master
        self.children: dict[int, ToyChild] = {}
        self.next_key = 1
        self.answers_under_way: dict[int, list[ClaimedJob]] = {}
        self.claiming = False
        self.claim_timer = 0.0
        self.poll_at = 0.0
        self.early_cancels: set[int] = set()
        self.unwritten: list[tuple[ClaimedJob, Settlement | None]] = []
        self.flushing = False
        self.stopping = False
        self.calm = False
        # what the rules are checked against
        self.called_off: dict[int, tuple[float, int]] = {}  # lease -> when, which child
        self.handed_at: dict[int, float] = {}  # lease -> when it last went to a child
        self.cancels_due: list[tuple[float, int]] = []  # when it must have led to something, lease
        self.starving_since: float | None = None
        self.been: list[tuple[float, Row]] = []  # what was claimed, as it was, and when that was known
        self.full_look_at = 0.0  # of a look everywhere that found as much as it wanted, and may have left as much
        over = max(0.0, self.claim_latency + self.wading - CHEAP_SECONDS)
        self.most_passed = PAUSE * over + POLL_INTERVAL + self.wading + 5 * self.claim_latency
        self.stuck_since: dict[int, float] = {}  # child -> since when another one idles while jobs stand behind it
        self.read_latency = rng.choice([0.0001, 0.003])
        self.exponents = rng.choice([(-5, -4), (-5, -3), (-5, 0.5)])
        self.steady, self.surprising = rng.choice([(0.0, 0.05), (0.0, 0.05), (0.1, 0.0)])
        self.wild = rng.random() < 0.5  # children die, sockets break
        self.cancel_at_next_start = False
        self.last_cancel_at = 0.0
        self.room = rng.choice([278, 278, 4, 9])
        self.max_jobs = rng.choice([None, None, 1, 5, 17])

    # -- the clock ----------------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[[], None]) -> None:
        self.event_number += 1
        heapq.heappush(self.events, (time, self.event_number, action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def tell(self, text: str) -> None:
        if self.story is not None:
            self.story.append(f"{self.now - 1000:.6f} {text}")

    def run(self) -> None:
        self.spawn_missing()
        self.plan_stimuli()
        self.settle_step()
        while not self.is_over() and self.step():
            pass
        self.check_end()

    def is_over(self) -> bool:
        """Whether nothing is left but to ask the database for ever."""
        return self.calm and all(row.place in TERMINAL for row in self.rows.values())

    def step(self) -> bool:
        """Lets time go on to what is next: an event of the toys, or the pool's own tick."""
        tick_at = self.pool.next_tick()
        event_at = self.events[0][0] if self.events else None
        if tick_at is None and event_at is None:
            return False
        if event_at is None or (tick_at is not None and tick_at <= event_at):
            assert tick_at is not None
            if tick_at > 5000:
                raise Broken(f"the schedule does not end: the next tick is at {tick_at}")
            self.now = max(self.now, tick_at) + EPSILON
            self.tick()
        else:
            if event_at > 5000:
                raise Broken(f"the schedule does not end: {len(self.events)} events are left")
            self.now = max(self.now, event_at)
            self.check_tick_has_nothing_to_do(tick_at)
            heapq.heappop(self.events)[2]()
        self.settle_step()
        return True

    def settle_step(self) -> None:
        self.perform()
        self.claim_if_wanted()
        self.check()

    # -- what happens from outside ------------------------------------------------------------------------------

    def plan_stimuli(self) -> None:
        rng = self.rng
        span = rng.choice([0.05, 0.5, 3.0])
        jobs = rng.choice([3, 3, 3, 3, 12, 12, 12, 12, 40, 100])  # few go through as much as many, in less time
        together = rng.random() < 0.3
        for number in range(1, jobs + 1):
            when = 0.0 if together else rng.uniform(0, span)
            self.after(when, lambda number=number: self.enqueue(number))  # type: ignore[misc]
        stimuli: list[Callable[[], None]] = [self.cancel_some, self.cancel_some, self.retry_some, self.retry_some]
        stimuli += [self.pause_or_resume, self.resize, self.reload, self.spurious_hint, self.watch_for_a_start]
        if self.wild:
            stimuli += [self.kill_some, self.kill_some, self.break_some]
        for _ in range(rng.choice([0, 2, 8])):
            self.after(rng.uniform(0, span * 1.3), rng.choice(stimuli))
        # In the end either everything ends by itself (what hangs is cancelled), or the daemon stops in the middle.
        if rng.random() < 0.5:
            self.after(rng.uniform(0, span * 1.5), self.stop)
        else:
            self.after(span * 1.3 + 5, self.calm_down)

    def enqueue(self, number: int) -> None:
        rng = self.rng
        row = Row(
            number,
            rng.choice(["a", "a", "b"]),
            rng.choice([None, 1, 2]),
            rng.choice([1, 2, 5]),
            rng.choice([0, 0, 0, -1, 3]),
        )
        self.tell(f"job {number} is enqueued")
        self.rows[number] = row
        self.make_ready(row)

    def make_ready(self, row: Row) -> None:
        row.place, row.ready_at, row.passed_by = "ready", self.now, False
        row.scheduled_at = self.now - (self.rng.uniform(0, 5) if self.rng.random() < self.late else 0.0)
        if self.idle_announced:
            self.after(self.rng.uniform(0, NOTICE_LATENCY), self.hint)

    def hint(self) -> None:
        self.demand.hinted(self.now)

    def spurious_hint(self) -> None:
        for _ in range(self.rng.choice([1, 50])):
            self.hint()

    def cancel_some(self) -> None:
        """Any job, or one that has just started, whatever the master knows of that."""
        running = [self.rows[child.running.id] for child in self.children.values() if child.running and child.outbox]
        rows = running or list(self.rows.values())
        if rows:
            self.cancel(self.rng.choice(rows))

    def watch_for_a_start(self) -> None:
        self.cancel_at_next_start = True

    def cancel(self, row: Row) -> None:
        if row.place in ("ready", "scheduled"):
            row.place = "cancelled"
        elif row.place == "claimed":
            row.cancel_requested = True
            self.after(self.rng.uniform(0, NOTICE_LATENCY), lambda: self.on_cancel(row))
        self.last_cancel_at = self.now
        self.tell(f"job {row.id} is to be cancelled: {row.place}")

    def retry_some(self) -> None:
        ended = [row for row in self.rows.values() if row.place in ("cancelled", "discarded")]
        row = self.rng.choice(ended) if ended else None
        # A notice that is under way names the job, not the lease: the next run could be hit by it.
        if row is not None and self.now - self.last_cancel_at > NOTICE_LATENCY:
            self.tell(f"job {row.id} is to be retried")
            row.attempt = row.crashes = 0
            row.cancel_requested = False
            self.make_ready(row)

    def on_cancel(self, row: Row) -> None:
        if self.pool.cancel(row.id, self.now):
            self.tell(f"the pool cancels job {row.id}")
            self.cancels_due.append((self.now + 2 * self.read_latency + EPSILON, row.lease))
        else:
            self.early_cancels.add(row.id)

    def pause_or_resume(self) -> None:
        if self.now - self.paused_at < 2 * NOTICE_LATENCY:
            return  # a pause that nobody notices leads to no hint when it ends: those jobs are found by polling
        self.paused = frozenset() if self.paused else frozenset(self.rng.choice([["a"], ["b"], ["a", "b"]]))
        self.paused_at = self.now
        self.tell(f"paused: {sorted(self.paused)}")
        self.after(self.rng.uniform(0, NOTICE_LATENCY), lambda: self.on_paused(self.paused))

    def on_paused(self, paused: frozenset[str]) -> None:
        resumed = self.pool.paused - paused
        self.pool.pause(paused)
        if resumed:
            self.hint()

    def resize(self) -> None:
        size = self.rng.randint(1, 4)
        self.tell(f"resized to {size}")
        self.pool.resize(size)
        self.perform()
        self.spawn_missing()

    def reload(self) -> None:
        candidate = self.generations.request()
        if candidate is not None:
            self.after(self.rng.uniform(0, 0.1), lambda: self.on_imported(candidate))

    def on_imported(self, candidate: int) -> None:
        if self.rng.random() < 0.3:
            assert self.generations.failed(candidate)
        else:
            assert self.generations.ready(candidate)
            self.generation += 1
            self.tell(f"generation {self.generation} takes over")
            self.pool.retire_older_than(self.generation)
            self.perform()
            self.spawn_missing()
        if self.generations.wants_another():
            self.reload()

    def kill_some(self) -> None:
        alive = [child for child in self.children.values() if child.alive]
        if alive:
            self.die(self.rng.choice(alive), "is killed from outside")

    def break_some(self) -> None:
        if self.children:
            child = self.rng.choice(list(self.children.values()))
            self.tell(f"the intake of child {child.key} is broken by its handler")
            child.intake_broken = True

    def calm_down(self) -> None:
        """No more surprises: everything must come to its end now."""
        self.tell("no more surprises")
        self.paused, self.paused_at = frozenset(), self.now
        self.on_paused(self.paused)
        for row in self.rows.values():
            if row.place not in TERMINAL:
                row.max_attempts = 1
        self.wild, self.calm = False, True
        self.cancel_what_hangs()

    def cancel_what_hangs(self) -> None:
        for child in self.children.values():
            if child.running is not None and child.plan is not None and child.plan.seconds is None:
                self.cancel(self.rows[child.running.id])
        if any(row.place not in TERMINAL for row in self.rows.values()):
            self.after(1.0, self.cancel_what_hangs)

    def stop(self) -> None:
        """As Master._shut_down."""
        self.tell("the daemon stops")
        self.stopping = True
        self.pool.drain()
        self.perform()
        self.after(self.rng.choice([0.0, SHUTDOWN_TIMEOUT]), self.interrupt)

    def interrupt(self) -> None:
        if not self.children:
            return
        self.tell("its running jobs are interrupted")
        if self.rng.random() < 0.2:
            self.pool.kill_all()
        else:
            self.pool.interrupt(self.now)
            self.after(self.kill_grace + 0.5, self.kill_all)

    def kill_all(self) -> None:
        if self.children:
            self.pool.kill_all()

    # -- the database -------------------------------------------------------------------------------------------

    def claim_if_wanted(self) -> None:
        """As Claimer: one statement at a time, when the pool has room and the demand says so, or a poll is due."""
        if self.claiming or self.stopping:
            return
        has_room = self.pool.demand() > 0
        if not has_room and self.now >= self.poll_at:
            self.frontier.miss_poll()
            self.poll_at = self.now + POLL_INTERVAL
        at = min(self.poll_at, self.demand.claim_at()) if has_room else self.poll_at
        if at > self.now:
            if self.claim_timer <= self.now or self.claim_timer > at:
                self.claim_timer = at
                self.at(at, lambda: None)
            return
        self.claiming = True
        wants_hints = self.demand.wants_hints
        if wants_hints != self.idle_announced:
            self.after(self.rng.uniform(0, self.claim_latency / 3), lambda: self.announce(wants_hints))
        else:
            self.send_claim()

    def announce(self, idle: bool) -> None:
        self.idle_announced = idle
        self.after(self.rng.uniform(0, self.claim_latency / 3), self.send_claim)

    def send_claim(self) -> None:
        limit = self.pool.demand()
        if not limit or self.stopping:
            self.claiming = False
            return
        asked_at = self.now
        polling = asked_at >= self.poll_at
        if polling:
            self.poll_at = asked_at + POLL_INTERVAL
        ranges = self.frontier.ranges(QUEUES, asked_at, polling=polling)
        self.after(self.rng.uniform(0, self.claim_latency / 2), lambda: self.take_jobs(limit, ranges, asked_at))

    def take_jobs(self, limit: int, ranges: list[Range], asked_at: float) -> None:
        """The moment at which the statement looks."""
        jobs: list[ClaimedJob] = []
        is_everywhere = ranges == everywhere(QUEUES)
        ready = [row for row in self.rows.values() if row.place == "ready" and row.queue not in self.paused]
        ready.sort(key=Row.rank)
        for number, row in enumerate(ready):
            if len(jobs) == limit:
                break
            if is_everywhere or any(row.is_in(each) for each in ranges):
                row.place, row.lease = "claimed", self.next_lease
                self.next_lease += 1
                jobs.append(
                    ClaimedJob(
                        row.id,
                        row.lease,
                        row.attempt + 1,
                        row.max_attempts,
                        row.crashes,
                        row.timeout_seconds,
                        row.queue,
                        "task",
                        "{}",
                        row.priority,
                        str(row.scheduled_at),
                    )
                )
            else:
                row.passed_by = True
                if number < limit:
                    self.check_passed_by(row)
        if is_everywhere and len(jobs) == limit:
            self.full_look_at = self.now
        self.event_number += 1
        number = self.event_number
        self.answers_under_way[number] = jobs
        wading = self.wading if is_everywhere and self.wading_from <= self.now < self.wading_until else 0.0
        self.after(
            wading + self.rng.uniform(0, self.claim_latency / 2),
            lambda: self.on_claimed(number, limit, ranges, asked_at),
        )

    def on_claimed(self, number: int, limit: int, ranges: list[Range], asked_at: float) -> None:
        jobs = self.answers_under_way.pop(number)
        self.claiming = False
        self.demand.claimed(limit, len(jobs), asked_at, self.now)
        self.frontier.claimed(ranges, jobs, self.now - asked_at, self.now)
        if not jobs:
            return
        self.starving_since = None
        self.been += [(self.now, replace(self.rows[job.id])) for job in jobs]
        self.tell(f"claimed {[(job.id, job.lease) for job in jobs]}")
        self.pool.claimed(jobs, self.now)
        self.perform()
        if any(job.id in self.early_cancels for job in jobs):
            self.after(self.rng.uniform(0, NOTICE_LATENCY), self.on_beat)

    def on_beat(self) -> None:
        """The heartbeat tells which of the claims are to be cancelled."""
        for row in self.rows.values():
            if row.place == "claimed" and row.cancel_requested:
                self.on_cancel(row)

    def end(self, job: ClaimedJob, ending: str) -> None:
        """As Master._end and _settle: a completion, or what core/outcome.py makes of anything else."""
        if ending == "completed":
            self.unwritten.append((job, None))
        else:
            report = Report(Ending[ending.upper()], "an error", seconds=0.01)
            settlement = settle(job, report, retry_delay=lambda attempt: 0.02 * attempt, max_crashes=MAX_CRASHES)
            self.unwritten.append((job, settlement))
        if not self.flushing:
            self.flushing = True
            self.after(self.pool.flush_delay() + self.rng.uniform(0, CLAIM_LATENCY), self.flush)

    def flush(self) -> None:
        self.flushing = False
        batch, self.unwritten = self.unwritten, []
        for job, settlement in batch:
            row = self.rows[job.id]
            if row.place != "claimed" or row.lease != job.lease:
                raise Broken(f"an outcome of lease {job.lease} is written, but job {job.id} is {row}")
            self.accepted[job.lease] = "completed" if settlement is None else str(settlement.state)
            self.write(row, settlement)

    def write(self, row: Row, settlement: Settlement | None) -> None:
        """As complete.sql and settle.sql."""
        if settlement is None:
            row.attempt += 1
            row.place = "completed"
            return
        if settlement.state is JobState.CANCELLED and not row.cancel_requested:
            raise Broken(f"lease {settlement.lease} ends as cancelled, but nobody asked for that")
        row.attempt += settlement.counts_attempt
        row.crashes += settlement.counts_crash
        if row.cancel_requested and settlement.state is not JobState.DISCARDED:
            row.place = "cancelled"
        elif settlement.state in (JobState.DISCARDED, JobState.CANCELLED):
            row.place = settlement.state.value
        elif settlement.delay_seconds:
            row.place = "scheduled"
            self.after(settlement.delay_seconds, lambda: self.promote(row))
        else:
            self.make_ready(row)
        self.tell(f"lease {settlement.lease} is written: job {row.id} is {row.place}")

    def promote(self, row: Row) -> None:
        if row.place == "scheduled":
            self.make_ready(row)

    # -- the master ---------------------------------------------------------------------------------------------

    def perform(self) -> None:
        """As Master._perform."""
        rounds = 0
        while self.pool.actions:
            rounds += 1
            if rounds > 1000:
                raise Broken("carrying out the pool's actions does not end")
            actions, self.pool.actions = self.pool.actions, []
            for action in actions:
                if isinstance(action, Settle):
                    self.tell(f"lease {action.job.lease} has not started and ends: {action.report.ending.value}")
                    self.end(action.job, action.report.ending.name)
                    continue
                child = self.children[action.child]
                match action:
                    case Assign(key, jobs):
                        self.check_assignment(child, list(jobs))
                        unsent = self.send(child, list(jobs))
                        if unsent:
                            self.pool.unsent(key, unsent, self.now)
                    case TakeBack(key):
                        self.pool.took_back(key, self.take_back(child), self.now)
                    case CallOff(_, lease, reason):
                        self.call_off(child, lease, reason)
                    case Remind(key):
                        if child.running is None or child.running.lease not in self.called_off:
                            self.tell(f"child {key} is reminded of what it has ended")
                    case Kill(key):
                        self.tell(f"child {key} is killed")
                        self.after(0.0001, lambda child=child: self.die(child, "was killed"))  # type: ignore[misc]
                    case Retire(key):
                        self.tell(f"child {key} is retired")
                        child.intake_closed = True
                        self.wake(child)

    def tick(self) -> None:
        """As Master._tick: what has been reported already is not late."""
        for child in list(self.children.values()):
            if self.pool.children[child.key].assigned:
                self.read_outcomes(child)
        before = self.pool.next_tick()
        self.pool.tick(self.now)
        if before is not None and before <= self.now - EPSILON / 2 and not self.pool.actions:
            raise Broken("tick() found nothing to do at the time that next_tick() gave")
        self.perform()
        after = self.pool.next_tick()
        if after is not None and after <= self.now:
            raise Broken("next_tick() asks for a tick at once, again: the master would spin")

    def spawn_missing(self) -> None:
        for _ in range(self.pool.missing_children()):
            self.pool.starting += 1
            if len(self.pool.children) + self.pool.starting > self.pool.size:
                raise Broken(f"a child more than {self.pool.size} is started")
            key, self.next_key = self.next_key, self.next_key + 1
            self.after(
                self.rng.uniform(0, 0.02),
                lambda key=key, generation=self.generation: self.on_forked(key, generation),  # type: ignore[misc]
            )

    def on_forked(self, key: int, generation: int) -> None:
        self.tell(f"child {key} is there")
        self.children[key] = ToyChild(key, generation, self.room, self.max_jobs)
        self.pool.child_started(key, generation, self.now)

    def read_outcomes(self, child: ToyChild) -> None:
        child.readable_told = False
        outbox, child.outbox = child.outbox, []
        jobs = self.pool.ended(child.key, [lease for lease, _ in outbox], self.now)
        for job, (lease, ending) in zip(jobs, outbox, strict=True):
            if job.lease != lease:
                raise Broken(f"the outcome of lease {lease} was taken for that of lease {job.lease}")
            self.tell(f"child {child.key} reported lease {lease}: {ending}")
            self.called_off.pop(lease, None)
            self.end(job, ending)
        self.perform()

    def on_readable(self, child: ToyChild) -> None:
        if child.key in self.children and child.readable_told:
            self.read_outcomes(child)

    def on_lost(self, child: ToyChild) -> None:
        """The pidfd tells; how it ended is told a little later."""
        if child.key in self.children:
            self.tell(f"child {child.key} is known to be dead")
            self.lose(child)
            self.after(self.rng.choice([0.001, 0.02, STATUS_LATENCY]), lambda: self.bury(child))

    def lose(self, child: ToyChild) -> None:
        child.lost_at = self.now
        self.pool.child_lost(child.key)
        self.perform()

    def bury(self, child: ToyChild) -> None:
        """As Master._bury."""
        self.lose(child)
        self.read_outcomes(child)
        died_under = self.pool.child_died(child.key, self.now)
        if [job for job, _ in died_under] != ([child.running] if child.running else []):
            raise Broken(f"child {child.key} died running {child.running}, not {died_under}")
        for job, reason in died_under:
            self.tell(f"child {child.key} died under lease {job.lease}, called off for {reason}")
            called_off = job.lease in self.called_off or (reason is SoftReason.SHUTDOWN and self.stopping)
            if called_off != (reason is not None):
                raise Broken(f"lease {job.lease} is said to be called off for {reason}")
            self.called_off.pop(job.lease, None)
            self.end(job, (ENDING_OF[reason] if reason else Ending.CRASHED).name)
        del self.children[child.key]
        self.perform()
        self.spawn_missing()

    # -- the children -------------------------------------------------------------------------------------------

    def plan_of(self, job: ClaimedJob) -> Plan:
        rng = self.rng
        seconds: float | None = 10 ** rng.uniform(*self.exponents)
        if rng.random() < self.steady:
            seconds = 0.9 * STEAL_SECONDS
        elif rng.random() < self.surprising:
            seconds = rng.choice([None, 1.5, 0.1])
        endings = ["completed"] * 12 + ["failed", "snoozed"]
        if self.wild:
            endings += ["crash", "break"]
        heeds_after = rng.choice([0.0001, 0.01, self.kill_grace * 0.9, self.kill_grace * 1.1, None])
        return Plan(seconds, rng.choice(endings), heeds_after)

    def send(self, child: ToyChild, jobs: list[ClaimedJob]) -> list[int]:
        self.tell(f"child {child.key} is handed {[job.lease for job in jobs]}")
        for number, job in enumerate(jobs):
            if child.intake_broken or len(child.intake) >= child.room:
                return [left.lease for left in jobs[number:]]
            child.intake.append(job)
            self.handed_at[job.lease] = self.now
        self.wake(child)
        return []

    def take_back(self, child: ToyChild) -> list[int]:
        leases = [job.lease for job in child.intake]
        if leases:
            self.tell(f"taken back from child {child.key}: {leases}")
        child.intake.clear()
        return leases

    def wake(self, child: ToyChild) -> None:
        if child.alive and child.running is None and not child.reading:
            child.reading = True
            slow = self.rng.random()
            most = 1.5 * UNREAD_SECONDS if slow < 0.003 else 0.05 if slow < 0.02 else 0.0002
            self.after(self.rng.uniform(0, most), lambda: self.read_packet(child))

    def read_packet(self, child: ToyChild) -> None:
        child.reading = False
        if not child.alive or child.running is not None:
            return
        if not child.intake:
            if child.intake_closed or child.intake_broken:
                self.die(child, "has no more to do")
            return
        child.running = child.intake.popleft()
        child.running_since = self.now
        child.plan = self.plan_of(child.running)
        self.tell(f"child {child.key} runs lease {child.running.lease}: {child.plan}")
        if child.outbox and self.cancel_at_next_start:
            self.cancel_at_next_start = False
            self.after(self.rng.uniform(0, self.read_latency), self.cancel_some)
        if child.plan.seconds is not None:
            lease, ending = child.running.lease, child.plan.ending
            self.after(child.plan.seconds, lambda: self.finish(child, lease, ending))

    def finish(self, child: ToyChild, lease: int, ending: str) -> None:
        if not child.alive or child.running is None or child.running.lease != lease:
            return
        if ending == "crash":
            self.die(child, "crashes")
            return
        if ending == "break":
            child.intake_broken = True
            ending = "completed"
        child.outbox.append((lease, ending))
        child.running = child.plan = None
        child.jobs_run += 1
        if not child.readable_told:
            child.readable_told = True
            self.after(self.rng.uniform(0, self.read_latency), lambda: self.on_readable(child))
        if child.jobs_run == child.max_jobs:
            self.die(child, "has run its number of jobs")
        else:
            self.wake(child)

    def call_off(self, child: ToyChild, lease: int, reason: SoftReason) -> None:
        self.tell(f"child {child.key} is told to stop lease {lease}: {reason.name}")
        state = self.pool.children[child.key]
        if state.called_off is not reason or state.assigned[0].lease != lease:
            raise Broken(f"lease {lease} is called off for {reason.name}, but the pool has it otherwise: {state}")
        if lease in self.called_off:
            raise Broken(f"lease {lease} is called off twice")
        timeout = state.assigned[0].timeout_seconds
        if reason is SoftReason.TIMEOUT and (timeout is None or self.now - self.handed_at[lease] < timeout):
            raise Broken(f"lease {lease} is called off before its time")
        self.called_off[lease] = (self.now, child.key)
        running, plan = child.running, child.plan
        if child.alive and running is not None and running.lease == lease and plan and plan.heeds_after is not None:
            self.after(plan.heeds_after, lambda: self.finish(child, lease, ENDING_OF[reason].name.lower()))

    def die(self, child: ToyChild, how: str) -> None:
        if child.alive:
            self.tell(f"child {child.key} {how}")
            child.alive = False
            self.after(self.rng.uniform(0, 0.002), lambda: self.on_lost(child))

    # -- the rules ----------------------------------------------------------------------------------------------

    def check_tick_has_nothing_to_do(self, tick_at: float | None) -> None:
        if tick_at is None or self.now < tick_at - EPSILON:
            pace = self.pool.pace.mean_seconds
            self.pool.tick(self.now)
            if self.pool.actions or self.pool.pace.mean_seconds != pace:
                raise Broken(f"next_tick() said {tick_at}, but tick() found before that: {self.pool.actions}")

    def check_assignment(self, child: ToyChild, jobs: list[ClaimedJob]) -> None:
        state = self.pool.children[child.key]
        if not jobs:
            raise Broken(f"nothing is handed to child {child.key}")
        if child.lost_at is not None:
            raise Broken(f"lease {jobs[0].lease} is handed to child {child.key}, which is known to be dead")
        if len(state.assigned) > self.pool.pace.window():
            raise Broken(f"child {child.key} holds {len(state.assigned)} jobs, more than {self.pool.pace.window()}")
        if any(job.queue in self.pool.paused for job in jobs) or self.pool.draining:
            raise Broken(f"{jobs} may not start")

    def check(self) -> None:
        self.check_nothing_is_lost()
        self.check_children()
        self.check_waiting()
        self.check_call_offs()

    def check_nothing_is_lost(self) -> None:
        claimed = {row.lease for row in self.rows.values() if row.place == "claimed"}
        held = [job.lease for job in self.pool.waiting]
        for state in self.pool.children.values():
            held += [job.lease for job in state.assigned]
        held += [job.lease for job, _ in self.unwritten]
        for jobs in self.answers_under_way.values():
            held += [job.lease for job in jobs]
        if len(held) != len(claimed) or claimed.difference(held):
            raise Broken(f"claimed are {sorted(claimed)}, accounted for are {sorted(held)}")

    def check_children(self) -> None:
        if self.pool.children.keys() != self.children.keys():
            raise Broken(f"the pool's children are {list(self.pool.children)}, there are {list(self.children)}")
        idle = any(
            state.takes_work and not state.assigned and self.children[state.key].alive
            for state in self.pool.children.values()
        )
        for key, state in self.pool.children.items():
            child = self.children[key]
            expected = [lease for lease, _ in child.outbox]
            if child.running is not None:
                expected.append(child.running.lease)
            expected += [job.lease for job in child.intake]
            if [job.lease for job in state.assigned] != expected:
                raise Broken(f"the pool has child {key} hold {state.assigned}, it holds {expected}")
            if len(state.assigned) > MAX_WINDOW:
                raise Broken(f"child {key} holds {len(state.assigned)} jobs")
            if self.pool.paused and any(job.queue in self.pool.paused for job in child.intake):
                raise Broken(f"child {key} could start a job of a paused queue")
            if child.intake and (state.retiring or state.called_off or self.pool.draining) and not state.killed:
                raise Broken(f"child {key} could start a job though it is to end one, or to end itself")
            if not (child.intake and child.running and child.alive):
                self.stuck_since.pop(key, None)
                continue
            if self.now - child.running_since > STALL_SECONDS + self.read_latency + 2 * EPSILON:
                raise Broken(f"jobs stand behind one that runs for {self.now - child.running_since} s in child {key}")
            if not idle:
                self.stuck_since.pop(key, None)
            elif (
                self.now - self.stuck_since.setdefault(key, self.now) > STEAL_SECONDS + self.read_latency + 2 * EPSILON
            ):
                raise Broken(f"jobs stand behind busy child {key} while another child is idle")

    def check_waiting(self) -> None:
        able = [
            state
            for state in self.pool.children.values()
            if state.takes_work and not state.assigned and self.children[state.key].alive
        ]
        if able and self.pool.waiting:
            raise Broken(f"jobs wait though child {able[0].key} is idle")
        if self.pool.paused and any(job.queue in self.pool.paused for job in self.pool.waiting):
            raise Broken("a job of a paused queue waits in the pool")
        paused = self.paused | self.pool.paused
        starving = able and any(
            row.place == "ready" and not row.passed_by and row.queue not in paused for row in self.rows.values()
        )
        if not starving or self.stopping:
            self.starving_since = None
        elif self.starving_since is None:
            self.starving_since = self.now
        elif self.now - self.starving_since > 0.2:
            raise Broken(f"a job waits in the database for 0.2 s though child {able[0].key} is idle")

    def check_passed_by(self, row: Row) -> None:
        """A claim did not look where this row is, though it had room for it."""
        waited = self.now - max(row.ready_at, self.paused_at, self.full_look_at)
        if waited > self.most_passed:
            raise Broken(f"{row} is passed by after {waited} s, more than {self.most_passed}")
        for claimed_at, other in self.been:
            if (row.queue, row.priority) == (other.queue, other.priority):
                early = 0.0 if claimed_at < self.now - KEPT_SECONDS else KEPT_SECONDS
                if row.rank() <= (other.priority, other.scheduled_at - early, other.id):
                    return
        raise Broken(f"{row} is passed by, and nothing behind it was claimed before")

    def check_call_offs(self) -> None:
        for lease, (when, key) in self.called_off.items():
            child = self.children.get(key)
            if child is None:
                raise Broken(f"lease {lease} was called off, and its child {key} is gone without a word")
            if self.now - when > self.kill_grace + 0.001 and child.alive and child.running:
                raise Broken(f"lease {lease} was called off {self.now - when} s ago, and child {key} lives")
        for child in self.children.values():
            if child.alive and child.intake and not (child.running or child.outbox):
                unread_since = self.handed_at[child.intake[0].lease]
                if self.now - unread_since > UNREAD_SECONDS + self.read_latency + 0.001:
                    raise Broken(f"child {child.key} is stuck, and keeps lease {child.intake[0].lease}")
            job = child.running
            if not child.alive or job is None or job.timeout_seconds is None or job.lease in self.called_off:
                continue
            if self.now - child.running_since > job.timeout_seconds + self.read_latency + 0.001:
                raise Broken(f"lease {job.lease} has overrun its timeout in child {child.key}, and is not called off")
        due = [lease for at, lease in self.cancels_due if at <= self.now]
        if due:
            self.cancels_due = [(at, lease) for at, lease in self.cancels_due if at > self.now]
            for child in self.children.values():
                if child.running and child.running.lease in due and child.alive:
                    state = self.pool.children[child.key]
                    if not (state.called_off or state.killed):
                        raise Broken(f"lease {child.running.lease} is cancelled, and child {child.key} runs on")

    def check_end(self) -> None:
        unfinished = [row for row in self.rows.values() if row.place not in TERMINAL]
        if self.stopping:
            if self.pool.children or self.pool.held_jobs() or self.unwritten:
                raise Broken("the daemon has stopped and still holds children or jobs")
            if any(row.place == "claimed" for row in unfinished):
                raise Broken(f"the daemon has stopped, and these are still claimed: {unfinished}")
        elif unfinished:
            raise Broken(f"everything has come to rest, but not {unfinished}")


def simulate(seed: int) -> None:
    try:
        World(seed).run()
    except Exception:
        world = World(seed, tell=True)
        try:
            world.run()
        except Exception as error:
            story = "\n".join((world.story or [])[-40:])
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}\n{story}", pytrace=not isinstance(error, Broken))
        raise


@pytest.mark.skipif(ONE_SEED is not None, reason="one seed is asked for")
@pytest.mark.parametrize("first_seed", range(0, SCHEDULES, BLOCK))
def test_the_rules_hold_in_random_schedules(first_seed: int) -> None:
    for seed in range(first_seed, min(first_seed + BLOCK, SCHEDULES)):
        simulate(seed)


@pytest.mark.skipif(ONE_SEED is None, reason="no seed is asked for")
def test_the_rules_hold_in_the_schedule_of_one_seed() -> None:
    simulate(int(ONE_SEED or 0))
