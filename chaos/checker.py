"""Judges a campaign by its evidence: what was promised and not kept. Pure.

Each check is a generator of violations over the whole evidence, listed in CHECKS. What docs/guarantees.md allows is
counted by cause in `Findings`, and anything without one of those causes is a violation.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from chaos import fleet
from chaos.evidence import Evidence, Injected, Sample
from chaos.jobs import KINDS, MAX_CONCURRENCY, PAUSED_QUEUE, RATE_PER_MINUTE, Story
from chaos.ledger import Change, Effect, Run

TERMINAL = frozenset({"completed", "discarded", "cancelled"})

# The bounds of recoveries, by the documented formulas. The median is held to them as they are, the longest to the
# allowance more (for a loaded machine), and to as much as other faults were in force meanwhile. Of one or two there is
# no median: the shorter is held to the bound and a moment.
FORMULAS: Mapping[str, tuple[str, float]] = {
    "child death": ("1 s", 1.0),
    "master death": (
        "orphan_stale_after + orphan_reaper_interval + poll_interval",
        fleet.STALE_AFTER + fleet.REAPER_INTERVAL + fleet.POLL_INTERVAL,
    ),
    "PostgreSQL back": ("5 s", 5.0),
    "lost NOTIFY": ("poll_interval", fleet.POLL_INTERVAL),
}
ALLOWANCE_SECONDS = 2.0
MOMENT_SECONDS = 0.1  # what a claim takes after the poll that is at the bound

_SAMPLES = 5  # of the start and of the end of a process
# What a process at rest may have more than at its start, however many faults there were; and what its memory may grow.
MORE_FILES = 1
MORE_FILES_OF_CHILD = 3  # the ledger's two
CONNECTIONS = 4  # to the database, of a master that all faults leave alone: fewer are no room for other files
MORE_BYTES = 2 << 20
MORE_BYTES_A_FAULT = 4 << 10
# The same for the mean of all processes of a role: lives are short, and a small leak shows in none of them alone.
MORE_BYTES_IN_THE_MEAN = 256 << 10
MORE_BYTES_A_FAULT_IN_THE_MEAN = 8 << 10

# Faults that end a worker, or have it declared dead: only they may free its claims by the hands of others.
DEADLY = frozenset(
    {
        "kill_master",
        "replace_killed_master",
        "kill_master_and_template",
        "stop_master_until_stale",
        "swallow_until_stale",
        "jump_database_clock",
    }
)
OF_ALL_MASTERS = frozenset({"jump_database_clock"})
TERMINATING = frozenset({"replace_master", "skew_clock"})
# Those by which two runs of a job may overlap, and what docs/guarantees.md says of them.
OVERLAPPING = {
    "stop_master_until_stale": "its master was stopped past orphan_stale_after",
    "jump_database_clock": "the database's clock jumped forward by more than orphan_stale_after",
}
# Those that keep a master from hearing of a jump for longer than the jump is in force.
DEAFENING = frozenset({"stop_master_until_stale", "swallow_until_stale"})
TEMPLATE_LOSS = frozenset({"kill_template"}) | DEADLY
# In which what a fault brought about may come to light after it; what takes longer a fault awaits itself.
_SETTLING_SECONDS = fleet.REAPER_INTERVAL + ALLOWANCE_SECONDS
_WRITING_SECONDS = 2.0  # in which an outcome is written, on a loaded machine
# Attempts of jobs that dead children had read and not started: of 250 such faults, one hit that moment.
LOST_ATTEMPTS = fleet.ALL_CHILDREN
LOST_ATTEMPTS_A_FAULT = 0.02


@dataclass(frozen=True, slots=True)
class Violation:
    check: str
    what: str
    job_id: int | None = None


@dataclass(slots=True)
class Findings:
    """What was counted, beside what was found wrong."""

    violations: list[Violation] = field(default_factory=list)
    overlaps: Counter[str] = field(default_factory=Counter)
    longest_overlap_seconds: float = 0.0
    not_started: Counter[str] = field(default_factory=Counter)  # attempts counted that no handler started, by cause
    not_counted: Counter[str] = field(default_factory=Counter)  # runs that counted no attempt, by cause
    lost_results: Counter[str] = field(default_factory=Counter)  # of handlers that returned under their lease, by cause
    cron_slots: int = 0  # that fired
    crashed_out: int = 0  # jobs that faults crashed so often that they were discarded
    left_by_guarantee: int = 0  # processes that outlived a master and its template
    more_files: Counter[str] = field(default_factory=Counter)  # the most above the start of any process, by its role
    more_bytes: Counter[str] = field(default_factory=Counter)
    lives: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # faults that each of a role saw
    short_lives: Counter[str] = field(default_factory=Counter)  # of a role, with too few samples to be judged


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim from its making to its end, and the job's row as that end left it."""

    made: Change
    ended: Change | None
    row: Change | None

    @property
    def counted(self) -> bool:
        return self.row is not None and self.row.attempt == self.made.attempt


class Case:
    """Evidence put in the order that checks need."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.kind_of = {
            evidence.told.ids[job.key]: job.kind for job in evidence.plan.jobs if job.key in evidence.told.ids
        }
        self.runs: dict[int, list[Run]] = defaultdict(list)
        self.changes: dict[int, list[Change]] = defaultdict(list)
        for run in evidence.runs:
            self.runs[run.job_id].append(run)
        for change in evidence.changes:
            self.changes[change.job_id].append(change)
        self.runs_of_lease = {(run.job_id, run.lease): run for run in evidence.runs}

    def story(self, job_id: int) -> Story:
        return Story(self.runs.get(job_id, []), self.changes.get(job_id, []))

    def claims(self, job_id: int) -> Iterator[Claim]:
        changes = self.changes[job_id]
        rows = {change.txid: change for change in changes if change.table == "job_rows"}
        ends = {change.lease: change for change in changes if change.table == "claims" and change.op == "DELETE"}
        for change in changes:
            if change.table == "claims" and change.op == "INSERT":
                end = ends.get(change.lease)
                yield Claim(change, end, rows.get(end.txid) if end else None)

    def monotonic(self, at: float) -> float:
        return at - self.evidence.clock_offset

    def faults(self, names: Iterable[str], target: str | None) -> Iterator[Injected]:
        for injected in self.evidence.injected:
            if injected.fault in names and (target in (None, injected.target) or injected.fault in OF_ALL_MASTERS):
                yield injected

    def was_hit(self, names: Iterable[str], claim: Claim, by: float = math.inf) -> bool:
        """Whether such a fault, begun `by` then, hit the worker of a claim, in force or just over at its end."""
        assert claim.ended is not None
        made_at, ended_at = self.monotonic(claim.made.at), self.monotonic(claim.ended.at)
        return any(
            claim.made.worker in each.workers
            and each.began_at <= by
            and each.began_at - 1 <= ended_at  # clocks drift apart
            and made_at <= each.ended_at
            and ended_at <= each.ended_at + _SETTLING_SECONDS
            for each in self.faults(names, self.master_of(claim))
        )

    def master_of(self, claim: Claim) -> str | None:
        return self.evidence.masters_of_workers.get(claim.made.worker or "")


def check(evidence: Evidence) -> Findings:
    case, findings = Case(evidence), Findings()
    for each in CHECKS:
        findings.violations.extend(each(case, findings))
    return findings


# -- jobs


def no_job_is_lost(case: Case, findings: Findings) -> Iterator[Violation]:
    evidence = case.evidence
    for job in evidence.plan.jobs:
        job_id = evidence.told.ids.get(job.key)
        if job_id is None:
            yield Violation("lost", f"job {job.key} of the plan was never enqueued")
            continue
        state = evidence.rows.get(job_id)
        if state is None:
            yield Violation("lost", "its enqueue was acknowledged, and it has no row", job_id)
        elif state not in TERMINAL:
            where = evidence.waiting.get(job_id, "no table of what waits")
            yield Violation("lost", f"a {job.kind} job is {state} at the end, in {where}", job_id)
        elif job_id in evidence.waiting:
            yield Violation("lost", f"it is {state}, and stands in {evidence.waiting[job_id]} still", job_id)


def every_job_ends_as_its_kind_may(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id, name in case.kind_of.items():
        kind, state = KINDS[name], case.evidence.rows.get(job_id)
        if state in TERMINAL and state not in kind.ends:
            crashes = max((change.crashes or 0 for change in case.changes[job_id]), default=0)
            if state == "discarded" and crashes == fleet.MAX_CRASHES:  # that each has a cause is another check
                findings.crashed_out += 1
            else:
                yield Violation("wrong end", f"a {name} job ended {state}", job_id)
        elif complaint := kind.holds(case.story(job_id)):
            yield Violation("wrong story", f"a {name} job: {complaint}", job_id)


def no_key_is_twice_active(case: Case, findings: Findings) -> Iterator[Violation]:
    """From the job's row to its end, in the order of changes: who has a key next was told so by that end."""
    jobs: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    for job in case.evidence.plan.jobs:
        job_id = case.evidence.told.ids.get(job.key)
        rows = [change for change in case.changes.get(job_id or 0, ()) if change.table == "job_rows"]
        if job.draft.unique_key is not None and job_id is not None and rows:
            ended = next((change.seq for change in rows if change.state in TERMINAL), math.inf)
            jobs[job.draft.unique_key].append((rows[0].seq, ended, job_id))
    for key, lives in jobs.items():
        for (_, ended, earlier), (began, _, later) in pairwise(sorted(lives)):
            if began < ended:
                yield Violation("key", f"{key} was given to it while job {earlier} had it", later)


def dependents_wait_for_their_parents(case: Case, findings: Findings) -> Iterator[Violation]:
    ids = case.evidence.told.ids
    for job in case.evidence.plan.jobs:
        if not job.parents or job.key not in ids:
            continue
        job_id = ids[job.key]
        completed_at = [
            next((c.seq for c in case.changes.get(ids.get(key, 0), ()) if c.state == "completed"), math.inf)
            for key in job.parents
        ]
        claimed_at = next((c.seq for c in case.changes[job_id] if c.table == "claims"), math.inf)
        if claimed_at < math.inf and claimed_at < max(completed_at):
            yield Violation("early", "it was claimed before all that it depends on had completed", job_id)
        dead = [ids.get(key) for key in job.parents if case.evidence.rows.get(ids.get(key, 0)) != "completed"]
        state = case.evidence.rows.get(job_id)
        if state == "cancelled" and not dead:
            yield Violation("dependent", "it was cancelled, and all that it depends on has completed", job_id)
        if state == "completed" and dead:
            yield Violation("dependent", f"it completed, and job {dead[0]}, which it depends on, did not", job_id)


def each_cron_slot_fires_once(case: Case, findings: Findings) -> Iterator[Violation]:
    """Every minute from the first that an entry knows to the last that any has fired; no fault is an excuse."""
    evidence = case.evidence
    jobs: dict[tuple[str, float], list[int]] = defaultdict(list)
    for name, slot, job_id in evidence.cron_jobs:
        jobs[name, slot].append(job_id)
    findings.cron_slots = len(jobs)
    for (name, slot), ids in jobs.items():
        if len(ids) > 1:
            yield Violation("cron", f"{name} fired for it at {slot:.0f}, and so it did for job {ids[0]}", ids[1])
        elif (noted := evidence.cron_rows.get((name, slot))) != ids[0]:
            yield Violation("cron", f"{name} fired for it at {slot:.0f}, and the slot's row names {noted}", ids[0])
    for name, slot in evidence.cron_rows.keys() - jobs.keys():
        yield Violation("cron", f"the slot {slot:.0f} of {name} has a row and no job")
    last = max((slot for _, slot in jobs), default=0.0)
    for name, since in evidence.cron_since.items():
        minute = (since // 60 + 1) * 60
        while minute <= last:
            if (name, minute) not in jobs:
                yield Violation("cron", f"{name} never fired for its slot {minute:.0f}")
            minute += 60


def limits_hold(case: Case, findings: Findings) -> Iterator[Violation]:
    """At once by claims, in the order of their changes: a claim that stands may be running. In a minute by starts."""
    claimed: set[int] = set()
    claims = (change for change in case.evidence.changes if change.table == "claims" and change.op != "UPDATE")
    for change in sorted(claims, key=lambda change: change.seq):
        if case.kind_of.get(change.job_id) != "throttled":
            continue
        if change.op == "DELETE":
            claimed.discard(change.job_id)
            continue
        claimed.add(change.job_id)
        if len(claimed) > MAX_CONCURRENCY:
            what = f"it was claimed as {len(claimed)} at once of a task that may run {MAX_CONCURRENCY}"
            yield Violation("limit", what, change.job_id)
    starts = sorted(
        (run.started_at, job_id)
        for job_id, name in case.kind_of.items()
        if name == "rated"
        for run in case.runs.get(job_id, ())
    )
    for (first_at, _), (last_at, job_id) in zip(starts, starts[RATE_PER_MINUTE:], strict=False):
        if last_at - first_at < 60:
            what = f"it started as number {RATE_PER_MINUTE + 1} of its task within {last_at - first_at:.3f} s"
            yield Violation("limit", what, job_id)


def nothing_ends_twice(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id, changes in case.changes.items():
        states = [change.state for change in changes if change.table == "job_rows"]
        for before, after in pairwise(states):
            if before in TERMINAL:
                yield Violation("ended twice", f"its row went from {before} to {after}", job_id)


def results_are_of_the_lease_that_stands(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id, changes in case.changes.items():
        ended = {change.txid: change for change in changes if change.table == "claims" and change.op == "DELETE"}
        for row in changes:
            if row.table != "job_rows" or row.op != "UPDATE":
                continue
            claim = ended.get(row.txid)
            if row.state == "completed" and claim is None:
                yield Violation("old lease", "it was completed while no claim of it stood", job_id)
            elif claim is not None and row.told_lease is not None and row.told_lease != claim.lease:
                what = f"what it reported under lease {row.told_lease} was accepted under lease {claim.lease}"
                yield Violation("old lease", what, job_id)
            if row.state == "completed" and claim is not None and case.kind_of.get(job_id) != "transactional":
                run = case.runs_of_lease.get((job_id, claim.lease or 0))
                if run is None or run.how != "returned":
                    yield Violation("false completion", f"no handler returned under lease {claim.lease}", job_id)


def an_effect_is_had_once_and_with_the_completion(case: Case, findings: Findings) -> Iterator[Violation]:
    """Of a job that completes in its handler's transaction, which may be killed before it has returned."""
    effects: dict[int, list[Effect]] = defaultdict(list)
    for effect in case.evidence.effects:
        effects[effect.job_id].append(effect)
    for job_id, kind in case.kind_of.items():
        if kind != "transactional":
            continue
        completed = [change.txid for change in case.changes[job_id] if change.state == "completed"]
        leases = [effect.lease for effect in effects[job_id]]
        if [effect.txid for effect in effects[job_id]] != completed:
            what = f"its effect was committed under the leases {leases}" if leases else "it has had no effect"
            yield Violation("effect", f"{what}, and its completion in {len(completed)} transactions", job_id)


def leases_rise(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id, changes in case.changes.items():
        open_lease, last = None, 0
        for change in changes:
            if change.table != "claims" or change.op == "UPDATE":
                continue
            lease = change.lease or 0
            if change.op == "DELETE":
                open_lease = None
            elif open_lease is not None:
                yield Violation("leases", f"it was claimed under lease {lease} while {open_lease} stood", job_id)
            elif lease <= last:
                yield Violation("leases", f"lease {lease} came after {last}", job_id)
            if change.op == "INSERT":
                open_lease, last = lease, max(last, lease)


def a_lease_starts_once(case: Case, findings: Findings) -> Iterator[Violation]:
    for (job_id, lease), times in Counter((run.job_id, run.lease) for run in case.evidence.runs).items():
        if times > 1:
            yield Violation("started twice", f"its handler was started {times} times under lease {lease}", job_id)


def what_runs_was_claimed(case: Case, findings: Findings) -> Iterator[Violation]:
    claimed = {
        (change.job_id, change.lease)
        for change in case.evidence.changes
        if change.table == "claims" and change.op == "INSERT"
    }
    for run in case.evidence.runs:
        if (run.job_id, run.lease) not in claimed:
            yield Violation("not claimed", f"it ran in {run.pid} of {run.master} under lease {run.lease}", run.job_id)


def what_returned_is_completed(case: Case, findings: Findings) -> Iterator[Violation]:
    """Where the lease stood still; and a run that counts as no attempt is another check's."""
    for job_id in list(case.changes):
        for claim in case.claims(job_id):
            run = case.runs_of_lease.get((job_id, claim.made.lease or 0))
            if run is None or run.how != "returned" or claim.ended is None or claim.row is None or not claim.counted:
                continue
            assert run.ended_at is not None
            if claim.row.state in ("completed", "cancelled") or run.ended_at > case.monotonic(claim.ended.at):
                continue
            cause = _cause_of_lost_result(case, claim, run.pid, run.ended_at + _WRITING_SECONDS)
            if cause is None:
                error = claim.row.error or claim.row.state
                yield Violation(
                    "result lost", f"it returned under lease {run.lease}, which ended with: {error}", job_id
                )
            else:
                findings.lost_results[cause] += 1


def _cause_of_lost_result(case: Case, claim: Claim, pid: int, by: float) -> str | None:
    """Why a completion was never written that should have been `by` then."""
    assert claim.row is not None
    error = claim.row.error or ""
    if _is_rescue(error) and case.was_hit(DEADLY, claim, by):
        return "its worker was lost before it was written"
    if _pid_in(error) == str(pid) and pid in case.evidence.killed_pids:
        return "its child was killed before it was reported"
    if error.startswith("WorkerCrash: ") and case.was_hit(TEMPLATE_LOSS, claim, by):
        return "its child was lost with its template or its worker before it was reported"
    if error.startswith("TimeoutError") and case.was_hit({"stop_child"}, claim, by):
        return "its child was stopped before it was reported"
    return None


def attempts_are_what_started(case: Case, findings: Findings) -> Iterator[Violation]:
    killed: Counter[str] = Counter()
    lost = 0
    for job_id in list(case.changes):
        for claim in case.claims(job_id):
            if claim.ended is None:
                continue
            if claim.row is None:
                yield Violation("attempts", f"the claim under lease {claim.made.lease} ended and left no trace", job_id)
                continue
            run = case.runs_of_lease.get((job_id, claim.made.lease or 0))
            if run is None and claim.counted:
                cause = _cause_of_count(case, claim)
                if cause is None:
                    error = claim.row.error or claim.row.state
                    what = f"lease {claim.made.lease} never started and counts as an attempt ({error})"
                    yield Violation("attempts", what, job_id)
                    continue
                findings.not_started[cause] += 1
                if pid := _pid_in(claim.row.error):
                    killed[pid] += 1
                    if killed[pid] > 1:
                        what = f"lease {claim.made.lease} is the second that child {pid} never started and that counts"
                        yield Violation("attempts", what, job_id)
                lost += cause == _LOSS
            elif run is not None and not claim.counted:
                cause = _cause_of_no_count(case, claim, run)
                if cause is None:
                    what = f"lease {run.lease} started ({run.how or 'cut short'}) and counts as no attempt"
                    yield Violation("attempts", what, job_id)
                else:
                    findings.not_counted[cause] += 1
    bound = int(LOST_ATTEMPTS + LOST_ATTEMPTS_A_FAULT * sum(1 for _ in case.faults(TEMPLATE_LOSS, None)))
    if lost > bound:
        what = f"{lost} attempts were counted of jobs that dead children had not started, of {bound}"
        yield Violation("attempts", what)


_LOSS = "its child was lost with its template or its worker before the handler began"


def _cause_of_count(case: Case, claim: Claim) -> str | None:
    """Why an attempt may count that no handler noted."""
    assert claim.row is not None
    error = claim.row.error or ""
    if _is_rescue(error):
        return "its worker was lost: the database cannot tell whether it had started"
    if (pid := _pid_in(error)) and int(pid) in case.evidence.killed_pids:
        return "its child was killed before the handler began"
    if error.startswith("WorkerCrash: ") and case.was_hit(TEMPLATE_LOSS, claim):
        return _LOSS
    if error.startswith("TimeoutError") and case.was_hit({"stop_child"}, claim):
        return "its child was stopped before the handler began"
    return None


def _cause_of_no_count(case: Case, claim: Claim, run: Run) -> str | None:
    if run.how == "SnoozeJob":
        return "it asked to run later"
    if run.how in ("JobInterrupted", None) and case.was_hit(TERMINATING, claim):
        return "its worker was shut down"
    return None


def crashes_have_a_cause(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id in list(case.changes):
        crashes = 0
        for claim in case.claims(job_id):
            if claim.row is None or (claim.row.crashes or 0) <= crashes:
                continue
            crashes = claim.row.crashes or 0
            pid = _pid_in(claim.row.error)
            by_itself = case.kind_of.get(job_id, "").startswith("crashing")
            if not by_itself and (pid is None or int(pid) not in case.evidence.killed_pids):
                what = f"lease {claim.made.lease} counts as a crash, though nobody killed its child: {claim.row.error}"
                yield Violation("crashes", what, job_id)


def only_the_dead_are_rescued(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id in list(case.changes):
        for claim in case.claims(job_id):
            if claim.row is None or not _is_rescue(claim.row.error or ""):
                continue
            started = (job_id, claim.made.lease or 0) in case.runs_of_lease
            # A worker that is stopped settles what it had started; what it did not know that it had claimed is freed.
            if not case.was_hit(DEADLY if started else DEADLY | TERMINATING, claim):
                master = case.master_of(claim)
                what = f"lease {claim.made.lease} was taken from {master}, which was well: {claim.row.error}"
                yield Violation("rescue", what, job_id)


def nothing_of_a_paused_queue_is_claimed(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id, changes in case.changes.items():
        if not any(change.queue == PAUSED_QUEUE for change in changes[:1]):
            continue
        for change in changes:
            if change.table != "claims" or change.op != "INSERT":
                continue
            for pause in case.evidence.told.pauses:
                if (
                    pause.began_at + 1 < change.at < pause.ended_at
                ):  # a claim takes a moment, and so does the clock's answer
                    late = change.at - pause.began_at
                    yield Violation("paused", f"it was claimed {late:.1f} s after its queue was paused", job_id)


def runs_overlap_only_as_guaranteed(case: Case, findings: Findings) -> Iterator[Violation]:
    for job_id, runs in case.runs.items():
        for number, run in enumerate(runs):
            if not run.beside:
                continue
            earlier = next((each for each in reversed(runs[:number]) if each.pid == run.beside), None)
            # The one whose lease was lost: mostly the earlier, but what a child had been given it may begin later.
            lost = min(earlier, run, key=lambda each: each.lease) if earlier else run
            cause = _cause_of_overlap(case, earlier, run, lost.master) if earlier else None
            if earlier is None or cause is None:
                what = f"lease {run.lease} ran in {run.pid} of {run.master} beside process {run.beside}"
                what += f" of {earlier.master} under lease {earlier.lease}" if earlier else ""
                findings.overlaps["none that is named"] += 1
                yield Violation("overlap", what, job_id)
                continue
            findings.overlaps[OVERLAPPING[cause.fault]] += 1
            until = _heard_at(case, cause, lost.master)
            end = min(earlier.ended_at or until, run.ended_at or until)
            findings.longest_overlap_seconds = max(findings.longest_overlap_seconds, end - run.started_at)


def _cause_of_overlap(case: Case, earlier: Run, run: Run, master: str) -> Injected | None:
    """What kept `master` from knowing that others may have taken its jobs."""
    return next(
        (
            each
            for each in case.faults(OVERLAPPING, master)
            if earlier.started_at <= each.ended_at and each.began_at <= run.started_at <= _heard_at(case, each, master)
        ),
        None,
    )


def _heard_at(case: Case, cause: Injected, master: str) -> float:
    """When a master knew at the latest that others may have taken its jobs."""
    deaf = [each for each in case.faults(DEAFENING, master) if overlap_seconds(cause, each) > 0]
    return max(each.ended_at for each in [cause, *deaf])


# -- processes


def nobody_is_left_behind(case: Case, findings: Findings) -> Iterator[Violation]:
    for stray in case.evidence.strays:
        # Where no cgroup contains them; see docs/guarantees.md.
        allowed = stray.how == "orphan" and "sleep 600" in stray.title
        if allowed and any(
            each.began_at <= stray.at <= each.ended_at + 1 for each in case.faults({"kill_master_and_template"}, None)
        ):
            findings.left_by_guarantee += 1
            continue
        yield Violation("left behind", f"{stray.how} {stray.pid} {stray.title}")
    for process in case.evidence.left_processes:
        yield Violation("left behind", f"at the end: {process}")
    for name, status in case.evidence.exit_statuses.items():
        if status != 0:
            yield Violation(
                "exit", f"{name} ended with {'a kill, being stuck' if status is None else status} at SIGTERM"
            )


def a_stop_leaves_nothing(case: Case, findings: Findings) -> Iterator[Violation]:
    """No fault excuses what it leaves: none takes the database away from a master that is being stopped."""
    for alarm in case.evidence.alarms:
        yield Violation("stop", f"{alarm.master} logged {alarm.event}: {alarm.what}")
    for worker, name in case.evidence.left_workers.items():
        if case.evidence.exit_statuses.get(name) == 0:
            yield Violation("stop", f"{name} has ended, and its worker {worker} is registered still")


def nobody_grows(case: Case, findings: Findings) -> Iterator[Violation]:
    by_process = defaultdict(list)
    for sample in case.evidence.samples:
        by_process[sample.master, sample.role, sample.pid].append(sample)
    unexpected = defaultdict(list)
    for (master, role, pid), samples in by_process.items():
        if len(samples) < 2 * _SAMPLES:
            findings.short_lives[role] += 1
            continue
        first, last = sorted(samples[:_SAMPLES], key=_open_files)[2], min(samples[-_SAMPLES:], key=_open_files)
        files = _open_files(last) - _open_files(first)
        if files > (MORE_FILES_OF_CHILD if role == "child" else MORE_FILES):
            which = Counter(last.files) - Counter(first.files)
            what = f"{role} {pid} of {master} has {files} open files more than at its start"
            yield Violation("growth", f"{what}: {', '.join(f'{n} {name}' for name, n in which.items())}")
        start, end = samples[_SAMPLES - 1].at, samples[-_SAMPLES].at
        faults = sum(start <= each.began_at <= end for each in case.evidence.injected)
        grown = min(s.rss_bytes for s in samples[-_SAMPLES:]) - max(s.rss_bytes for s in samples[:_SAMPLES])
        findings.lives[role].append(faults)
        unexpected[role].append(grown - faults * MORE_BYTES_A_FAULT_IN_THE_MEAN)
        findings.more_files[role] = max(findings.more_files[role], files)
        findings.more_bytes[role] = max(findings.more_bytes[role], grown)
        if grown > MORE_BYTES + faults * MORE_BYTES_A_FAULT:
            yield Violation("growth", f"{role} {pid} of {master} grew by {grown >> 10} KiB through {faults} faults")
    for role, grown_by in unexpected.items():
        if (mean := statistics.mean(grown_by)) > MORE_BYTES_IN_THE_MEAN:
            what = f"a {role} grew by {mean / 1024:.0f} KiB in the mean of {len(grown_by)} lives"
            yield Violation("growth", f"{what}, beside {MORE_BYTES_A_FAULT_IN_THE_MEAN >> 10} KiB a fault")


def _open_files(sample: Sample) -> int:
    connections = sum(file.startswith("TCP") for file in sample.files)
    return len(sample.files) - connections + max(connections, CONNECTIONS)


# -- recoveries


def faults_are_recovered_from(case: Case, findings: Findings) -> Iterator[Violation]:
    for injected in case.evidence.injected:
        if injected.failure:
            yield Violation("not recovered", f"{injected.fault} {injected.target}: {injected.failure}")
        elif injected.formula is not None and injected.recovery_seconds is not None:
            text, bound = FORMULAS[injected.formula]
            beside = sum(overlap_seconds(injected, each) for each in case.evidence.injected if each is not injected)
            if injected.recovery_seconds > bound + ALLOWANCE_SECONDS + beside:
                took = f"{injected.fault} {injected.target} took {injected.recovery_seconds:.2f} s"
                what = f"{injected.formula}: {took}, of {text}"
                yield Violation("slow recovery", what)
    for formula, times in recoveries(case.evidence).items():
        text, bound = FORMULAS[formula]
        which, allowed = ("median", bound) if len(times) > 2 else ("shortest", bound + MOMENT_SECONDS)
        typical = statistics.median_low(times)
        if typical > allowed:
            yield Violation("slow recovery", f"{formula}: the {which} is {typical:.2f} s, of {text}")


def recoveries(evidence: Evidence) -> dict[str, list[float]]:
    """The recovery times by formula, sorted."""
    times = defaultdict(list)
    for injected in evidence.injected:
        if injected.formula is not None and injected.recovery_seconds is not None:
            times[injected.formula].append(injected.recovery_seconds)
    return {formula: sorted(times[formula]) for formula in FORMULAS if formula in times}


def overlap_seconds(one: Injected, other: Injected) -> float:
    return max(0.0, min(one.ended_at, other.ended_at) - max(one.began_at, other.began_at))


def _is_rescue(error: str) -> bool:
    return re.match("WorkerCrash: the worker (that ran it|was stopped)", error) is not None


def _pid_in(error: str | None) -> str | None:
    found = re.search(r"its process \(pid (\d+)\)", error or "")
    return found[1] if found else None


CHECKS: tuple[Callable[[Case, Findings], Iterator[Violation]], ...] = (
    no_job_is_lost,
    every_job_ends_as_its_kind_may,
    no_key_is_twice_active,
    dependents_wait_for_their_parents,
    each_cron_slot_fires_once,
    limits_hold,
    nothing_ends_twice,
    results_are_of_the_lease_that_stands,
    an_effect_is_had_once_and_with_the_completion,
    leases_rise,
    a_lease_starts_once,
    what_runs_was_claimed,
    what_returned_is_completed,
    attempts_are_what_started,
    crashes_have_a_cause,
    only_the_dead_are_rescued,
    nothing_of_a_paused_queue_is_claimed,
    runs_overlap_only_as_guaranteed,
    nobody_is_left_behind,
    a_stop_leaves_nothing,
    nobody_grows,
    faults_are_recovered_from,
)
