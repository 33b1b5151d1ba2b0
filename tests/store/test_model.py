"""Random histories of two workers, an application and an operator on real PostgreSQL, told beside it by a model.

The model is what the design says in plain Python: after every step all that the database holds is compared with it, and
every unfinished job must have a way on. MODEL_EXAMPLES=n runs n histories, MODEL_STEPS=n makes them that long,
MODEL_SEED=n begins with that seed; a failure prints the shortest history that Hypothesis finds for it (which takes
minutes; MODEL_SHORTEN=0 prints the first).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.rows import dict_row

from roost_client import DuplicateUniqueJobError, JobInsert, JobState, JobStateError, Roost, enqueue_many
from roostd.core.frontier import everywhere
from roostd.core.job import ClaimedJob
from roostd.core.lifecycle import AVAILABLE, CANCELLED, COMPLETED, DISCARDED, EXECUTING, RETRYABLE, TERMINAL
from roostd.core.outcome import Ending, Report, Settlement, settle
from roostd.store import statements
from tests.store.rows import Conn, add_worker, connect

T = TypeVar("T")
Limits = tuple[int | None, int | None]  # rate_per_minute, max_concurrency

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "60"))
STEPS = int(os.environ.get("MODEL_STEPS", "50"))
FIRST_SEED = int(os.environ.get("MODEL_SEED", "0"))
PHASES = [*Phase] if os.environ.get("MODEL_SHORTEN", "1") == "1" else [Phase.generate]
BLOCKS = 4

# The statements ask PostgreSQL for the time, and are tested as they are: so it is not the clock that is moved but all
# that was ever written, back by as much as is to pass. Time passes in steps so long that what a history takes itself
# is nothing against them: whether a job is due, or a worker stale, does not depend on the machine's speed.
TICK_SECONDS = 100
STALE_AFTER = 1.5 * TICK_SECONDS
MAX_CRASHES = 2
ERROR_CAP = 3
QUEUES = ("a", "b")
KEYS = ("k", "l")
DEAD = (DISCARDED, CANCELLED)
FOREVER_TICKS = 1000
# Of two tasks; the third has none. A rate's minute, with what a start may take, is shorter than a tick.
LIMITS: dict[str, Limits] = {"fast": (None, None), "narrow": (None, 2), "rated": (2, None)}
WINDOW_SECONDS = 61.0

LOOK = """
WITH place AS (
    SELECT job_id, 'ready' AS name, queue, priority, scheduled_at FROM roost.ready
    UNION ALL SELECT job_id, 'scheduled', queue, priority, scheduled_at FROM roost.scheduled
    UNION ALL SELECT b.job_id, 'blocked', b.queue, j.priority, j.scheduled_at
                FROM roost.blocked b LEFT JOIN roost.job_rows j ON j.id = b.job_id
    UNION ALL SELECT t.job_id, 'throttled', t.queue, t.priority, t.scheduled_at
                FROM roost.throttled t JOIN roost.job_rows j ON j.id = t.job_id AND j.task = t.task
    UNION ALL SELECT c.job_id, 'claims', j.queue, j.priority, j.scheduled_at
                FROM roost.claims c LEFT JOIN roost.job_rows j ON j.id = c.job_id
)
SELECT coalesce(j.id, p.job_id) AS id, p.name AS place, v.queue, v.task, v.state, v.priority, v.attempt, v.max_attempts,
       v.crashes, v.cancel_requested, v.lease, v.worker_id, v.args, v.result,
       j.state AS state_of_row, j.attempt AS attempt_of_row, j.cancel_requested AS cancel_requested_of_row,
       coalesce((p.queue, p.priority, p.scheduled_at) = (j.queue, j.priority, j.scheduled_at), true) AS place_agrees,
       ARRAY(SELECT (e.entry ->> 'attempt')::integer
               FROM jsonb_array_elements(v.errors) WITH ORDINALITY AS e(entry, position) ORDER BY e.position) AS errors,
       {ages}
  FROM roost.job_rows j
  FULL JOIN place p ON p.job_id = j.id
  LEFT JOIN roost.jobs v ON v.id = j.id
 ORDER BY 1
""".format(
    ages=", ".join(
        f"round(extract(epoch FROM now() - v.{column}) / {TICK_SECONDS})::integer AS {column}"
        for column in ("inserted_at", "scheduled_at", "attempted_at", "completed_at", "cancelled_at", "discarded_at")
    )
)

# What a report under an old lease must leave alone, to the version of each row.
EVERYTHING = " UNION ALL ".join(
    f"SELECT '{table}', t.ctid::text, t.xmin::text, t.xmax::text, t::text FROM roost.{table} t"
    for table in (
        "job_rows",
        "ready",
        "scheduled",
        "claims",
        "unique_keys",
        "blocked",
        "dependencies",
        "cancelled_dependents",
        "ended_parents",
        "throttles",
        "throttled",
        "throttle_starts",
        "queues",
        "workers",
    )
)


class Moment(NamedTuple):
    """When something happened: of two steps in one tick, the later one's time is the later."""

    tick: int
    step: int


class Outcome(NamedTuple):
    """What a worker reports: `ending` None is a completion; `ticks` the snooze, or the delay of a retry."""

    ending: Ending | None
    ticks: int


@dataclass(slots=True)
class Claim:
    lease: int
    worker_id: UUID
    attempt: int
    tick: int
    cancel_requested: bool = False


@dataclass(slots=True)
class Job:
    """A job of the model. `state` is what it has while no claim stands; times are in ticks."""

    id: int
    number: int
    queue: str
    task: str
    priority: int
    max_attempts: int
    inserted: int
    due: Moment
    place: str | None
    state: JobState = AVAILABLE
    attempt: int = 0
    crashes: int = 0
    cancel_requested: bool = False
    attempted: int | None = None
    ended: int | None = None
    errors: list[int] = field(default_factory=list)
    result: Any = None
    claim: Claim | None = None
    key: str | None = None
    parents: frozenset[int] = frozenset()
    parents_left: int = 0

    @property
    def public_state(self) -> JobState:
        return EXECUTING if self.claim else self.state


class World:
    """The connections that all histories share, and the loop that the stores' ones live in."""

    def __init__(self, dsn: str, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.conn = psycopg.connect(dsn, autocommit=True)
        self.stores = [self.run(connect(dsn)), self.run(connect(dsn))]
        self.client = Roost(dsn)
        self.tables: dict[str, list[str]] = {}
        for table, column in self.conn.execute(
            "SELECT c.relname, a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
            " WHERE c.relnamespace = 'roost'::regnamespace AND c.relkind = 'r' AND a.attnum > 0"
            " AND a.atttypid = 'timestamptz'::regtype ORDER BY 1, 2"
        ):
            self.tables.setdefault(table, []).append(column)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(coroutine)

    def close(self) -> None:
        self.client.close()
        self.conn.close()
        for store in self.stores:
            self.run(store.close())

    def time_passes(self, ticks: int) -> str:
        """The SQL that sets back every time that the database holds."""
        interval = f"interval '{ticks * TICK_SECONDS} seconds'"
        # Set back, a start that counts no more could have the time of one that does.
        forget = f"DELETE FROM roost.throttle_starts WHERE at < now() - interval '{WINDOW_SECONDS} seconds';"
        return forget + ";".join(
            f"UPDATE roost.{table} SET " + ", ".join(f"{column} = {column} - {interval}" for column in columns)
            for table, columns in self.tables.items()
        )

    def everything(self) -> list[tuple[Any, ...]]:
        return sorted(self.conn.execute(EVERYTHING))


@contextmanager
def transaction(world: World, store: Conn, *, commit: bool) -> Iterator[None]:
    world.run(_execute(store, "BEGIN"))
    try:
        yield
    finally:
        world.run(_execute(store, "COMMIT" if commit else "ROLLBACK"))


async def _execute(conn: Conn, query: Any) -> None:
    await conn.execute(query)


def decided(claimed: ClaimedJob, outcome: Outcome) -> Settlement:
    """The settlement that a worker makes of a run's end."""
    assert outcome.ending
    seconds = float(outcome.ticks * TICK_SECONDS)
    report = Report(outcome.ending, "boom", "trace", seconds)
    return settle(claimed, report, retry_delay=lambda attempt: seconds, max_crashes=MAX_CRASHES)


ticks = st.sampled_from([0, 0, 1, 3])
slots = st.integers(0, 1)
outcomes = st.builds(Outcome, st.sampled_from([None, None, Ending.FAILED, *Ending]), ticks)
new_jobs = st.fixed_dictionaries(
    {
        "queue": st.sampled_from(QUEUES),
        "task": st.sampled_from(["fast", "fast", "narrow", "rated"]),
        "priority": st.integers(-1, 1),
        "max_attempts": st.integers(1, 3),
        "ticks": st.sampled_from([None, None, None, -1, 1, 3]),
    }
)
keys = st.sampled_from([None, None, *KEYS])


class Histories(RuleBasedStateMachine):
    """Steps that can follow each other in any order. Two workers, the slots, each with a connection of its own."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.tick = 0
        self.step = 0
        self.jobs: dict[int, Job] = {}
        self.numbers = 0  # of jobs, and of arguments that replaced others
        self.edges: set[tuple[int, int]] = set()  # parent, child
        self.cut: set[tuple[int, int]] = set()  # those by which a dead parent cancelled
        self.noted: set[int] = set()  # parents that have ended, as their dependents have yet to be told
        self.granted: list[ClaimedJob] = []  # every claim there ever was
        self.highest_lease = 0
        self.paused: set[str] = set()
        self.limits = dict(LIMITS)
        self.starts: list[tuple[str, int]] = []  # task and tick of each claim of a task that had a rate
        self.last_seen: dict[UUID, int] = {}  # tick of the last heartbeat by worker row
        self.workers: list[UUID] = []  # which worker each slot is; without a row it was declared dead
        self.checks = 0
        self.revived: set[int] = set()
        self.terminal: set[int] = set()

    # -- what the model makes of it

    def moment(self) -> Moment:
        self.step += 1
        return Moment(self.tick, self.step)

    def place(self, job: Job, due: Moment) -> None:
        """Where a job goes that may run from then on; of one that a worker puts back the limits are looked at later."""
        able = "throttled" if self.is_limited(job.task) else "ready"
        job.due, job.place = due, able if due.tick <= self.tick else "scheduled"

    def is_limited(self, task: str) -> bool:
        return self.limits[task] != (None, None)

    def room(self, task: str) -> int:
        """How many more runs of a limited task may start now."""
        rate, concurrency = self.limits[task]
        rooms = []
        if rate is not None:
            rooms.append(rate - self.starts.count((task, self.tick)))
        if concurrency is not None:
            rooms.append(concurrency - sum(job.task == task for job in self.claimed()))
        return max(0, min(rooms))

    def finish(self, job: Job, state: JobState) -> None:
        job.state, job.place, job.ended = state, None, self.tick
        if any(parent == job.id for parent, _ in self.edges):
            self.noted.add(job.id)

    def restart(self, job: Job, moment: Moment) -> None:
        job.state, job.attempt, job.crashes, job.cancel_requested, job.ended = AVAILABLE, 0, 0, False, None
        job.due = moment
        self.block_or_place(job)
        self.revived.add(job.id)

    def block_or_place(self, job: Job) -> None:
        """Where a job goes none of whose parents is dead."""
        told = {(parent, job.id) for parent in job.parents}
        waits_for = {edge for edge in told if self.jobs[edge[0]].state is not COMPLETED}
        self.edges = self.edges - told | waits_for
        self.cut -= told
        job.parents_left = len(waits_for)
        if waits_for:
            job.place = "blocked"
        else:
            self.place(job, job.due)

    def holder(self, key: str | None) -> Job | None:
        """The active job that has the key."""
        held = [job for job in self.jobs.values() if key and job.key == key and job.state not in TERMINAL]
        assert len(held) <= 1
        return held[0] if held else None

    def dead_parents(self, job: Job) -> list[int]:
        return sorted(parent for parent in job.parents if self.jobs[parent].state in DEAD)

    def new_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def standing(self, claimed: ClaimedJob) -> Job | None:
        """The job whose claim is this very one."""
        job = self.jobs[claimed.id]
        return job if job.claim and job.claim.lease == claimed.lease else None

    def movable(self) -> list[int]:
        return [job.id for job in self.jobs.values() if job.place in ("ready", "throttled", "claims")]

    def claimed(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.claim]

    def next_ready(self, worker_id: UUID, queues: Sequence[str], limit: int) -> list[Job]:
        if worker_id not in self.last_seen:
            return []
        return self.best("ready", queues)[:limit]

    def next_throttled(self, worker_id: UUID, queues: Sequence[str], limit: int, most_throttled: int) -> list[Job]:
        if worker_id not in self.last_seen:
            return []
        among = self.best("ready", queues)
        for task in filter(self.is_limited, self.limits):
            waiting = [job for job in self.best("throttled", queues) if job.task == task]
            among += waiting[: min(self.room(task), most_throttled + 1)]
        best = sorted(among, key=lambda job: (job.priority, job.due, job.id))[:limit]
        return [job for job in best if job.place == "throttled"][:most_throttled]

    def best(self, place: str, queues: Sequence[str]) -> list[Job]:
        """What waits there and may be claimed, in the order of claims."""
        able = [j for j in self.jobs.values() if j.place == place and j.queue in queues and j.queue not in self.paused]
        return sorted(able, key=lambda job: (job.priority, job.due, job.id))

    def end_run(self, job: Job, outcome: Outcome, moment: Moment, *, rescued: bool = False) -> JobState:
        """What the design says of the end of a run, in the words of the lifecycle."""
        claim, ending = job.claim, outcome.ending
        assert claim
        due = job.due
        match ending:
            case None:
                state = COMPLETED
            case Ending.RELEASED:
                state = job.state
            case Ending.SNOOZED:
                state, due = AVAILABLE, moment._replace(tick=self.tick + outcome.ticks)
            case Ending.CANCELLED:
                state = CANCELLED
            case Ending.CRASHED if job.crashes + 1 >= MAX_CRASHES:
                state = DISCARDED
            case _ if claim.attempt >= job.max_attempts:
                state = DISCARDED
            case Ending.LOST:
                state, due = RETRYABLE, moment
            case _:
                state, due = RETRYABLE, moment._replace(tick=self.tick + outcome.ticks)
        # A worker that reports the end of a last attempt knows why it failed; a rescue knows only of the cancel.
        if claim.cancel_requested and (rescued or state not in (COMPLETED, DISCARDED)):
            state = CANCELLED
        job.claim, job.cancel_requested = None, claim.cancel_requested
        job.crashes += ending is Ending.CRASHED
        if ending not in (Ending.RELEASED, Ending.SNOOZED):
            job.attempt, job.attempted = claim.attempt, claim.tick
            if ending is not None:
                job.errors = [*job.errors, claim.attempt][-ERROR_CAP:]
        if state in TERMINAL:
            self.finish(job, state)
        else:
            job.state = state
            job.due, job.place = due, "ready" if due.tick <= self.tick else "scheduled"
        return state

    # -- the application

    def add(
        self,
        job_id: int,
        number: int,
        fields: dict[str, Any],
        moment: Moment,
        key: str | None = None,
        parents: frozenset[int] = frozenset(),
        of_the_call: frozenset[int] = frozenset(),
    ) -> None:
        """A new job. What is enqueued by the same call counts as living, whatever has become of it at once."""
        job = self.jobs[job_id] = Job(
            id=job_id,
            number=number,
            queue=fields["queue"],
            task=fields["task"],
            priority=fields["priority"],
            max_attempts=fields["max_attempts"],
            inserted=self.tick,
            due=moment._replace(tick=self.tick + (fields["ticks"] or 0)),
            place=None,
            key=key,
            parents=parents,
        )
        if dead := set(self.dead_parents(job)) - of_the_call:
            job.errors = [0]
            self.cut |= {(parent, job_id) for parent in dead}
            self.finish(job, CANCELLED)
        else:
            self.block_or_place(job)

    def insertion(self, number: int, fields: dict[str, Any], now: datetime) -> dict[str, Any]:
        later = None if fields["ticks"] is None else now + timedelta(seconds=fields["ticks"] * TICK_SECONDS)
        rest = {name: value for name, value in fields.items() if name != "ticks"}
        return {"args": {"number": number}, "scheduled_at": later, **rest}

    @rule(fields=new_jobs)
    def enqueue(self, fields: dict[str, Any]) -> None:
        number = self.new_number()
        job_id = self.world.client.enqueue(**self.insertion(number, fields, datetime.now(UTC)), conn=self.world.conn)
        self.add(job_id, number, fields, self.moment())

    @rule(data=st.data(), fields=new_jobs, key=keys, on_duplicate=st.sampled_from(["raise", "return", "replace"]))
    def enqueue_unique_or_dependent(
        self, data: st.DataObject, fields: dict[str, Any], key: str | None, on_duplicate: Any
    ) -> None:
        parents = self.draw_parents(data)
        number, holder = self.new_number(), self.holder(key)
        options = {**self.insertion(number, fields, datetime.now(UTC)), "unique_key": key, "depends_on": [*parents]}
        options |= {"on_duplicate": on_duplicate} if key else {}
        if holder and (on_duplicate == "raise" or (on_duplicate == "replace" and holder.claim)):
            with pytest.raises(DuplicateUniqueJobError) as error:
                self.world.client.enqueue(**options, conn=self.world.conn)
            assert error.value.job_id == holder.id
            return
        job_id = self.world.client.enqueue(**options, conn=self.world.conn)
        moment = self.moment()
        if not holder:
            self.add(job_id, number, fields, moment, key, parents)
            return
        assert job_id == holder.id
        if on_duplicate == "replace":
            holder.number, holder.due = number, moment._replace(tick=self.tick + (fields["ticks"] or 0))
            if holder.place != "blocked":
                self.place(holder, holder.due)

    def draw_parents(self, data: st.DataObject) -> frozenset[int]:
        if not self.jobs:
            return frozenset()
        # The newest first: what Hypothesis draws is mostly from the beginning, and the oldest have ended.
        some = st.lists(st.sampled_from(sorted(self.jobs, reverse=True)), max_size=3)
        return frozenset(data.draw(some))

    @rule(data=st.data(), new=st.lists(st.tuples(new_jobs, keys), min_size=1, max_size=5))
    def enqueue_several(self, data: st.DataObject, new: list[tuple[dict[str, Any], str | None]]) -> None:
        outside = [self.draw_parents(data) for _ in new]
        inside = [data.draw(st.sets(st.integers(0, n - 1), max_size=2)) if n else set[int]() for n in range(len(new))]
        self.enqueue_many(new, outside, inside)

    def enqueue_many(
        self,
        new: Sequence[tuple[dict[str, Any], str | None]],
        outside: Sequence[frozenset[int]],
        inside: Sequence[set[int]],
    ) -> None:
        """Enqueues jobs that depend on others, and on others of the call by their places in it."""
        numbers, now = [self.new_number() for _ in new], datetime.now(UTC)
        inserts: list[JobInsert] = []
        for number, (fields, key), ids, places in zip(numbers, new, outside, inside, strict=True):
            parents: list[int | JobInsert] = [*ids, *(inserts[place] for place in places)]
            inserts.append(JobInsert(**self.insertion(number, fields, now), unique_key=key, depends_on=parents))
        added = enqueue_many(inserts, conn=self.world.conn)
        query = (
            "SELECT (args ->> 'number')::integer, id FROM roost.job_rows WHERE (args ->> 'number')::integer = ANY (%s)"
        )
        ids_by_number: dict[int, int] = dict(self.world.conn.execute(query, (numbers,)).fetchall())
        moment, actual = self.moment(), []
        taken = {job.key: job.id for job in self.jobs.values() if job.key and job.state not in TERMINAL}
        for number, (fields, key), ids, places in zip(numbers, new, outside, inside, strict=True):
            if key in taken:
                actual.append(taken[key])
                assert number not in ids_by_number
                continue
            job_id = ids_by_number[number]
            actual.append(job_id)
            if key:
                taken[key] = job_id
            of_the_call = frozenset(actual[place] for place in places)
            self.add(job_id, number, fields, moment, key, ids | of_the_call, of_the_call)
        self.noted |= {job_id for job_id in actual if self.jobs[job_id].state in TERMINAL} & {p for p, _ in self.edges}
        assert (added, added.duplicates) == (len(ids_by_number), len(new) - len(ids_by_number))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        self.take_cancel(job)
        assert self.world.client.cancel(job.id, conn=self.world.conn) == job.public_state

    @precondition(lambda self: self.claimed())
    @rule(data=st.data())
    def cancel_what_runs(self, data: st.DataObject) -> None:
        job = self.jobs[data.draw(st.sampled_from([job.id for job in self.claimed()]))]
        self.take_cancel(job)
        assert self.world.client.cancel(job.id, conn=self.world.conn) == EXECUTING

    def take_cancel(self, job: Job) -> None:
        if job.claim:
            job.claim.cancel_requested = True
        elif job.state not in TERMINAL:
            job.cancel_requested = True
            self.finish(job, CANCELLED)

    @precondition(lambda self: self.movable())
    @rule(data=st.data(), slot=slots, crash=st.booleans(), commit=st.booleans())
    def work_while_a_cancel_is_open(self, data: st.DataObject, slot: int, crash: bool, commit: bool) -> None:
        """The application cancels and keeps its transaction open: the workers leave that job alone, and only that."""
        job = self.jobs[data.draw(st.sampled_from(self.movable()))]
        store, place = self.world.stores[slot], job.place
        with self.world.conn.transaction(force_rollback=not commit):
            self.world.client.cancel(job.id, conn=self.world.conn)
            if job.place in ("ready", "throttled"):
                job.place = "held"
            self.claim_best(slot, QUEUES, 1)
            if self.granted:
                batch = self.draw_batch(data, self.granted)
                with transaction(self.world, store, commit=True):
                    ids, leases = [claimed.id for claimed, _ in batch], [claimed.lease for claimed, _ in batch]
                    locked = self.world.run(statements.lock_claims(store, ids, leases))
                    assert locked == {c.lease for c, _ in batch if c.id == job.id and self.standing(c)}
                    self.report(slot, [(claimed, outcome) for claimed, outcome in batch if claimed.lease not in locked])
            if crash:
                self.start_anew(slot, known_dead=True)
            self.rescue_lost(slot, but=job)
        job.place = place
        if commit:
            self.take_cancel(job)

    # -- the operator

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), with_dependents=st.booleans())
    def retry(self, data: st.DataObject, with_dependents: bool) -> None:
        job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        before = job.public_state
        if before in (COMPLETED, EXECUTING) or (before in DEAD and self.dead_parents(job)):
            with pytest.raises(JobStateError):
                self.world.client.retry(job.id, with_dependents=with_dependents, conn=self.world.conn)
            return
        if before in DEAD and (holder := self.holder(job.key)):
            with pytest.raises(DuplicateUniqueJobError) as error:
                self.world.client.retry(job.id, with_dependents=with_dependents, conn=self.world.conn)
            assert error.value.job_id == holder.id
            return
        assert self.world.client.retry(job.id, with_dependents=with_dependents, conn=self.world.conn) == before
        moment = self.moment()
        if before in DEAD:
            self.restart(job, moment)
        elif job.place == "scheduled":
            self.place(job, moment)
        elif job.place == "blocked" and job.due.tick > self.tick:
            job.due = moment
        pending = [job.id] if with_dependents else []
        for parent in pending:
            for child in [self.jobs[c] for p, c in sorted(self.cut) if p == parent]:
                for_its_sake = child.state is CANCELLED and not child.cancel_requested
                if for_its_sake and not self.dead_parents(child) and not self.holder(child.key):
                    self.restart(child, moment)
                    pending.append(child.id)

    @precondition(lambda self: any(job.state is DISCARDED for job in self.jobs.values()))
    @rule(queue=st.sampled_from([None, *QUEUES]), limit=st.sampled_from([None, 1, 2]))
    def requeue_discarded(self, queue: str | None, limit: int | None) -> None:
        found: list[Job] = []
        for _, job in sorted(self.jobs.items()):
            taken = self.holder(job.key) or any(job.key and job.key == other.key for other in found)
            if job.state is DISCARDED and queue in (None, job.queue) and not taken:
                found.append(job)
        found = found[:limit]
        assert self.world.client.requeue_discarded(queue, limit=limit, conn=self.world.conn) == len(found)
        moment = self.moment()
        for job in found:
            self.restart(job, moment)

    @rule(queue=st.sampled_from(QUEUES), paused=st.sampled_from([True, False, False]))
    def pause_or_resume(self, queue: str, paused: bool) -> None:
        if paused:
            self.world.client.pause_queue(queue, conn=self.world.conn)
            self.paused.add(queue)
        else:
            self.world.client.resume_queue(queue, conn=self.world.conn)
            self.paused.discard(queue)

    @rule(
        task=st.sampled_from(["narrow", "rated"]),
        limits=st.sampled_from([(None, None), (None, 1), (None, 3), (1, None), (3, None), (2, 2)]),
        claims=st.sampled_from([0, 0, 3]),
    )
    def reload_with_other_limits(self, task: str, limits: Limits, claims: int) -> None:
        """And let pass the second for which a task starts nothing that was not limited before.

        With `claims` the task has no limits for a while, in which so many jobs are claimed.
        """
        if claims:
            self.declare({task: (None, None)})
            self.claim_throttled(0, QUEUES, 1, 1)  # sets free what waits for its limits
            self.claim_best(0, QUEUES, claims)
        self.declare({task: limits})
        self.time_passes(1)

    # -- the workers

    def declare(self, limits: dict[str, Limits]) -> None:
        rows = [(task, rate, concurrency) for task, (rate, concurrency) in limits.items()]
        self.world.run(statements.declare_limits(self.world.stores[0], rows))
        self.limits |= limits

    @initialize(new=st.lists(new_jobs, min_size=2, max_size=6))
    def start(self, new: list[dict[str, Any]]) -> None:
        self.world.conn.execute(
            "TRUNCATE roost.job_rows, roost.ready, roost.scheduled, roost.claims, roost.unique_keys, roost.blocked,"
            " roost.dependencies, roost.cancelled_dependents, roost.ended_parents, roost.queues, roost.workers,"
            " roost.idle_workers, roost.throttles, roost.throttled, roost.throttle_starts"
        )
        self.declare(LIMITS)
        self.world.conn.execute(self.world.time_passes(1).encode())
        self.workers = [self.register(0), self.register(1)]
        self.enqueue_many([(fields, None) for fields in new], [frozenset()] * len(new), [set()] * len(new))

    def register(self, slot: int) -> UUID:
        worker_id = self.world.run(add_worker(self.world.stores[slot], queues=list(QUEUES)))
        self.last_seen[worker_id] = self.tick
        return worker_id

    def ask(self, slot: int, queues: Sequence[str], limit: int) -> tuple[list[ClaimedJob], list[Job]]:
        """Has a worker claim, and compares what it gets; in the model nothing is claimed yet."""
        expected = self.next_ready(self.workers[slot], queues, limit)
        got = self.world.run(statements.claim(self.world.stores[slot], self.workers[slot], everywhere(queues), limit))
        assert [
            (j.id, j.attempt, j.max_attempts, j.crashes, j.timeout_seconds, j.queue, j.task, json.loads(j.args))
            for j in got
        ] == [
            (j.id, j.attempt + 1, j.max_attempts, j.crashes, None, j.queue, j.task, {"number": j.number})
            for j in expected
        ]
        assert [job.lease == 0 for job in got] == [self.is_limited(job.task) for job in expected]
        self.note_leases(got)
        return got, expected

    def note_leases(self, got: Sequence[ClaimedJob]) -> None:
        leases = [job.lease for job in got if job.lease]
        assert sorted(set(leases)) == leases
        assert not leases or leases[0] > self.highest_lease
        self.highest_lease = max(leases, default=self.highest_lease)

    def grant(self, slot: int, got: Sequence[ClaimedJob], jobs: Sequence[Job]) -> None:
        """Takes in what a claim got; one with the lease 0 it has put among those that wait for their limits."""
        for claimed, job in zip(got, jobs, strict=True):
            if claimed.lease:
                job.claim, job.place = Claim(claimed.lease, self.workers[slot], job.attempt + 1, self.tick), "claims"
                self.granted.append(claimed)
            else:
                job.place = "throttled"

    @rule(
        slot=slots,
        queues=st.sampled_from([QUEUES, QUEUES, ("a",)]),
        limit=st.integers(1, 5),
        most_throttled=st.integers(1, 4),
    )
    def claim_throttled(self, slot: int, queues: Sequence[str], limit: int, most_throttled: int) -> None:
        worker_id = self.workers[slot]
        if worker_id in self.last_seen:
            for job in self.jobs.values():
                if job.place == "throttled" and not self.is_limited(job.task):
                    job.place = "ready"
        jobs = self.next_throttled(worker_id, queues, limit, most_throttled)
        answer = self.world.run(
            statements.claim_throttled(
                self.world.stores[slot],
                worker_id,
                everywhere(queues),
                limit,
                most_throttled=most_throttled,
                window_seconds=WINDOW_SECONDS,
            )
        )
        assert [job.id for job in answer.jobs] == [job.id for job in jobs]
        assert answer.has_rate == [self.limits[job.task][0] is not None for job in jobs]
        self.note_leases(answer.jobs)
        self.grant(slot, answer.jobs, jobs)
        self.starts += [(job.task, self.tick) for job, has_rate in zip(jobs, answer.has_rate, strict=True) if has_rate]

    @rule(slot=slots, limit=st.integers(1, 3))
    def set_aside(self, slot: int, limit: int) -> None:
        moved = [
            job
            for queue in QUEUES
            for job in sorted(
                (job for job in self.jobs.values() if job.place == "ready" and job.queue == queue),
                key=lambda job: (job.priority, job.due, job.id),
            )[:limit]
            if self.is_limited(job.task)
        ]
        for job in moved:
            job.place = "throttled"
        assert self.world.run(statements.set_aside(self.world.stores[slot], everywhere(QUEUES), limit)) == len(moved)

    @rule(slot=slots, queues=st.sampled_from([QUEUES, QUEUES, ("a",), ("b", "c")]), limit=st.integers(1, 5))
    def claim(self, slot: int, queues: Sequence[str], limit: int) -> None:
        self.claim_best(slot, queues, limit)

    def claim_best(self, slot: int, queues: Sequence[str], limit: int) -> None:
        self.grant(slot, *self.ask(slot, queues, limit))

    @rule(slot=slots)
    def poll(self, slot: int) -> None:
        """Makes due jobs ready and claims, in one transaction."""
        with transaction(self.world, self.world.stores[slot], commit=True):
            self.promote_due(slot)
            self.claim_best(slot, QUEUES, 10)

    @precondition(lambda self: any(job.place == "ready" for job in self.jobs.values()))
    @rule(slot=slots, limits=st.tuples(st.integers(1, 3), st.integers(1, 3)), commit=st.booleans())
    def claim_while_another_claim_is_under_way(self, slot: int, limits: tuple[int, int], commit: bool) -> None:
        with transaction(self.world, self.world.stores[slot], commit=commit):
            got, jobs = self.ask(slot, QUEUES, limits[0])
            # Until its end a claim holds the first of each queue, even those that it leaves to the others in the end.
            held = [job for queue in QUEUES for job in self.next_ready(self.workers[slot], [queue], limits[0])]
            for job in held:
                job.place = "held"
            self.grant(1 - slot, *self.ask(1 - slot, QUEUES, limits[1]))
        for job in held:
            job.place = "ready"
        if commit:
            self.grant(slot, got, jobs)

    @rule(slot=slots)
    def heartbeat(self, slot: int) -> None:
        worker_id = self.workers[slot]
        beat = self.world.run(
            statements.heartbeat(
                self.world.stores[slot], worker_id, inflight=0, queues=list(QUEUES), concurrency=4, metadata={}
            )
        )
        own = [(job.id, job.claim) for job in self.jobs.values() if job.claim and job.claim.worker_id == worker_id]
        listed = self.world.run(statements.list_claims(self.world.stores[slot], worker_id))
        assert sorted(listed) == [(job_id, claim.lease) for job_id, claim in own]
        if worker_id in self.last_seen:
            self.last_seen[worker_id] = self.tick
            assert beat is not None
            cancelled = tuple(job_id for job_id, claim in own if claim.cancel_requested)
            assert beat.paused == self.paused
            assert sorted(beat.cancelled_jobs) == list(cancelled)
        else:
            assert beat is None
            self.workers[slot] = self.register(slot)

    @rule(slot=slots, known_dead=st.booleans())
    def crash(self, slot: int, known_dead: bool) -> None:
        """A worker dies and starts anew; where its predecessor's death can be told, it frees that one's jobs."""
        self.start_anew(slot, known_dead)
        if known_dead:
            self.rescue_lost(slot)

    def start_anew(self, slot: int, known_dead: bool) -> None:
        gone = self.workers[slot]
        self.workers[slot] = self.register(slot)
        if known_dead:
            self.world.run(statements.remove_workers(self.world.stores[slot], [gone]))
            self.last_seen.pop(gone, None)

    def report(self, slot: int, batch: Sequence[tuple[ClaimedJob, Outcome]]) -> None:
        """Writes what became of claims, as master/writer.py does: completions and settlements, a statement each."""
        store = self.world.stores[slot]
        completions = [claimed for claimed, outcome in batch if outcome.ending is None]
        if completions:
            moment, expected = self.moment(), set()
            for claimed in completions:
                if job := self.standing(claimed):
                    self.end_run(job, Outcome(None, 0), moment)
                    job.result = {"of": claimed.lease}
                    expected.add(claimed.lease)
            results = [json.dumps({"of": claimed.lease}) for claimed in completions]
            ids, leases = [claimed.id for claimed in completions], [claimed.lease for claimed in completions]
            assert self.world.run(statements.complete(store, ids, leases, results))[0] == expected
        endings = [(claimed, outcome) for claimed, outcome in batch if outcome.ending is not None]
        if endings:
            rows = [decided(claimed, outcome) for claimed, outcome in endings]
            moment = self.moment()
            states = {
                claimed.lease: self.end_run(job, outcome, moment)
                for claimed, outcome in endings
                if (job := self.standing(claimed))
            }
            assert self.world.run(statements.settle(store, rows, ERROR_CAP))[0] == states

    def draw_batch(self, data: st.DataObject, claims: Sequence[ClaimedJob]) -> list[tuple[ClaimedJob, Outcome]]:
        some = st.lists(st.sampled_from(claims), min_size=1, max_size=4, unique_by=lambda claimed: claimed.lease)
        return [(claimed, data.draw(outcomes)) for claimed in data.draw(some)]

    def live(self) -> list[ClaimedJob]:
        return [claimed for claimed in self.granted if self.standing(claimed)]

    def over(self) -> list[ClaimedJob]:
        return [claimed for claimed in self.granted if not self.standing(claimed)]

    def fenced(self) -> list[ClaimedJob]:
        """The claims that are over and whose job runs under another one."""
        return [claimed for claimed in self.over() if self.jobs[claimed.id].claim]

    @precondition(lambda self: self.live())
    @rule(data=st.data(), slot=slots)
    def report_what_runs(self, data: st.DataObject, slot: int) -> None:
        self.report(slot, self.draw_batch(data, self.live()))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), slot=slots)
    def report_for_another_run(self, data: st.DataObject, slot: int) -> None:
        """Ends runs so that their jobs can be claimed again at once."""
        again = st.sampled_from([Ending.FAILED, Ending.CRASHED, Ending.LOST, Ending.SNOOZED, Ending.RELEASED])
        claims = data.draw(st.lists(st.sampled_from(self.live()), min_size=1, max_size=4, unique_by=lambda c: c.lease))
        self.report(slot, [(claimed, Outcome(data.draw(again), 0)) for claimed in claims])

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), slot=slots)
    def report_early_and_late(self, data: st.DataObject, slot: int) -> None:
        self.report(slot, self.draw_batch(data, self.granted))

    @precondition(lambda self: self.over())
    @rule(data=st.data(), slot=slots)
    def replay(self, data: st.DataObject, slot: int) -> None:
        self.report_in_vain(slot, self.draw_batch(data, self.over()))

    @precondition(lambda self: self.fenced())
    @rule(data=st.data(), slot=slots)
    def replay_while_the_job_runs_again(self, data: st.DataObject, slot: int) -> None:
        self.report_in_vain(slot, self.draw_batch(data, self.fenced()))

    def report_in_vain(self, slot: int, batch: Sequence[tuple[ClaimedJob, Outcome]]) -> None:
        before = self.world.everything()
        self.report(slot, batch)
        assert self.world.everything() == before

    # -- time, and what is done about it

    @rule(ticks=st.sampled_from([1, 1, 1, 2, 3]))
    def time_passes(self, ticks: int) -> None:
        self.world.conn.execute(self.world.time_passes(ticks).encode())
        self.tick += ticks

    @rule(slot=slots)
    def promote(self, slot: int) -> None:
        self.promote_due(slot)

    def promote_due(self, slot: int) -> None:
        jobs, next_in_seconds, *_ = self.world.run(statements.promote(self.world.stores[slot]))
        due = [job for job in self.jobs.values() if job.place == "scheduled" and job.due.tick <= self.tick]
        assert jobs == len(due)
        for job in due:
            job.place = "ready"
        left = [job.due.tick - self.tick for job in self.jobs.values() if job.place == "scheduled"]
        assert (next_in_seconds is None) == (not left)
        if left:
            assert next_in_seconds is not None
            assert round(next_in_seconds / TICK_SECONDS) == min(left)

    @rule(slot=slots)
    def remove_stale_workers(self, slot: int) -> None:
        removed = self.world.run(statements.remove_stale_workers(self.world.stores[slot], STALE_AFTER))
        stale = {id for id, tick in self.last_seen.items() if (self.tick - tick) * TICK_SECONDS > STALE_AFTER}
        assert {worker.id for worker in removed} == stale
        for worker_id in stale:
            del self.last_seen[worker_id]

    @rule(slot=slots)
    def rescue(self, slot: int) -> None:
        self.rescue_lost(slot)

    def rescue_lost(self, slot: int, but: Job | None = None) -> None:
        lost = [j for j in self.jobs.values() if j.claim and j.claim.worker_id not in self.last_seen and j is not but]
        moment = self.moment()
        states = {job.id: self.end_run(job, Outcome(Ending.LOST, 0), moment, rescued=True) for job in lost}
        for job in lost:
            job.due = moment  # of ended jobs too
        freed = self.world.run(statements.rescue(self.world.stores[slot], reason="gone", error_cap=ERROR_CAP))
        assert freed == states

    @precondition(lambda self: self.noted)
    @rule(data=st.data(), slot=slots, all_of_them=st.booleans())
    def follow(self, data: st.DataObject, slot: int, all_of_them: bool) -> None:
        """Tells dependents of parents that have ended, of all or of some."""
        some = None if all_of_them else [data.draw(st.sampled_from(sorted(self.noted)))]
        self.tell_dependents(slot, some)

    def tell_dependents(self, slot: int, only: Sequence[int] | None) -> None:
        followed = sorted(self.noted if only is None else set(only) & self.noted)
        self.noted.difference_update(followed)
        ended = [parent for parent in followed if self.jobs[parent].state in TERMINAL]
        told = {(parent, child) for parent, child in self.edges if parent in ended}
        dead = {(parent, child) for parent, child in told if self.jobs[parent].state in DEAD}
        self.edges -= told
        self.cut |= dead
        before = set(self.noted)
        for child_id in sorted({child for _, child in told}):
            child = self.jobs[child_id]
            if child.place != "blocked":
                continue
            if any(c == child_id for _, c in dead):
                child.errors = [*child.errors, child.attempt]
                self.finish(child, CANCELLED)
                continue
            child.parents_left -= sum(c == child_id for _, c in told)
            if not child.parents_left:
                self.place(child, child.due)
        count, held, more = self.world.run(statements.follow_parents(self.world.stores[slot], only))
        assert (count, held, set(more)) == (len(told), [], self.noted - before)

    # -- what must hold after each step

    @invariant()
    def keys_and_edges_are_as_in_the_model(self) -> None:
        def rows(query: str) -> set[tuple[Any, ...]]:
            return set(self.world.conn.execute(query.encode()).fetchall())

        jobs = self.jobs.values()
        assert rows("SELECT unique_key, job_id FROM roost.unique_keys") == {
            (job.key, job.id) for job in jobs if job.key and job.state not in TERMINAL
        }
        assert rows("SELECT job_id, parents_left, queue FROM roost.blocked") == {
            (job.id, job.parents_left, job.queue) for job in jobs if job.place == "blocked"
        }
        assert rows("SELECT parent_id, child_id FROM roost.dependencies") == self.edges
        assert rows("SELECT parent_id, child_id FROM roost.cancelled_dependents") == self.cut
        assert rows("SELECT job_id FROM roost.ended_parents") == {(job_id,) for job_id in self.noted}

    @invariant()
    def a_job_waits_for_its_parents_and_for_nothing_else(self) -> None:
        for job in self.jobs.values():
            waits_for = [parent for parent, child in self.edges if child == job.id]
            if job.place == "blocked":
                assert len(waits_for) == job.parents_left > 0
                for parent in waits_for:
                    assert self.jobs[parent].state not in TERMINAL or parent in self.noted
            elif job.place is not None:
                assert all(self.jobs[parent].state is COMPLETED for parent in job.parents)

    @invariant()
    def the_database_holds_what_the_model_does(self) -> None:
        with self.world.conn.cursor(row_factory=dict_row) as cursor:
            found = cursor.execute(LOOK).fetchall()
        assert found == [self.shown(job) for _, job in sorted(self.jobs.items())]
        terminal = {row["id"] for row in found if row["state"] in TERMINAL}
        assert self.terminal - terminal <= self.revived, "a finished job was moved by other than an operator"
        self.terminal = terminal
        self.revived.clear()

    @invariant()
    def no_job_is_lost_or_counted_twice(self) -> None:
        counts = Counter((job.queue, job.public_state) for job in self.jobs.values())
        status = self.world.client.status(conn=self.world.conn)
        assert {(q, state): n for q, states in status.items() for state, n in states.items() if n} == counts
        assert sum(n for states in status.values() for n in states.values()) == len(self.jobs)

    @invariant()
    def every_unfinished_job_has_a_way_on(self) -> None:
        """Once long enough has passed, the queues are resumed and a worker is there, every one of them is claimed.

        Looked for at each fourth step only: it takes as long as all the rest.
        """
        self.checks += 1
        if self.checks % 4 == 0:
            with transaction(self.world, self.world.stores[0], commit=False):
                self.world.run(self.move_on())

    async def move_on(self) -> None:
        store = self.world.stores[0]
        unfinished = {job.id: job for job in self.jobs.values() if job.state not in TERMINAL}
        await store.execute(self.world.time_passes(FOREVER_TICKS).encode())
        assert (await statements.promote(store))[0] == sum(job.place == "scheduled" for job in unfinished.values())
        assert {w.id for w in await statements.remove_stale_workers(store, STALE_AFTER)} == self.last_seen.keys()
        freed = await statements.rescue(store, reason="gone", error_cap=ERROR_CAP)
        assert freed.keys() == {job.id for job in self.claimed()}
        left = unfinished.keys() - {job_id for job_id, state in freed.items() if state in TERMINAL}
        left -= {job.id for job in unfinished.values() if job.place == "blocked"}  # by their parents' way
        able = {job_id for job_id in left if unfinished[job_id].queue not in self.paused}
        worker_id = await add_worker(store)
        # That a task's limits let its jobs run in time is the rules' to show; here nothing else may keep one.
        await store.execute("UPDATE roost.throttles SET rate_per_minute = NULL, max_concurrency = NULL")
        await statements.claim_throttled(
            store, worker_id, everywhere(QUEUES), 1, most_throttled=1, window_seconds=WINDOW_SECONDS
        )
        assert {job.id for job in await statements.claim(store, worker_id, everywhere(QUEUES), len(left) + 1)} == able
        await store.execute("UPDATE roost.queues SET paused = false")
        assert {
            job.id for job in await statements.claim(store, worker_id, everywhere(QUEUES), len(left) + 1)
        } == left - able

    def shown(self, job: Job) -> dict[str, Any]:
        """The row of LOOK that stands for the job."""
        claim = job.claim

        def age(tick: int | None) -> int | None:
            return None if tick is None else self.tick - tick

        return {
            "id": job.id,
            "place": job.place,
            "queue": job.queue,
            "task": job.task,
            "state": job.public_state,
            "priority": job.priority,
            "attempt": claim.attempt if claim else job.attempt,
            "max_attempts": job.max_attempts,
            "crashes": job.crashes,
            "cancel_requested": claim.cancel_requested if claim else job.cancel_requested,
            "lease": claim.lease if claim else None,
            "worker_id": claim.worker_id if claim else None,
            "args": {"number": job.number},
            "result": job.result,
            "state_of_row": job.state,
            "attempt_of_row": job.attempt,
            "cancel_requested_of_row": job.cancel_requested,
            "place_agrees": True,
            "errors": job.errors,
            "inserted_at": age(job.inserted),
            "scheduled_at": age(job.due.tick),
            "attempted_at": age(claim.tick if claim else job.attempted),
            "completed_at": age(job.ended) if job.state is COMPLETED else None,
            "cancelled_at": age(job.ended) if job.state is CANCELLED else None,
            "discarded_at": age(job.ended) if job.state is DISCARDED else None,
        }


@pytest.fixture(scope="module")
def world(shared_dsn: str) -> Iterator[World]:
    with asyncio.Runner() as runner:
        world = World(shared_dsn, runner)
        yield world
        world.close()


@pytest.mark.timeout(600 + 10 * EXAMPLES)  # what Hypothesis takes to shorten a history that fails
@pytest.mark.parametrize("block_seed", range(FIRST_SEED, FIRST_SEED + BLOCKS))
def test_the_database_and_the_model_agree_in_random_histories(world: World, block_seed: int) -> None:
    def histories() -> Histories:
        return Histories(world)

    run_state_machine_as_test(
        seed(block_seed)(histories),  # type: ignore[arg-type]  # it only calls what it is given
        settings=settings(
            max_examples=-(-EXAMPLES // BLOCKS),
            stateful_step_count=STEPS,
            phases=PHASES,
            deadline=None,
            database=None,  # the seed finds it again
            suppress_health_check=list(HealthCheck),
        ),
    )
