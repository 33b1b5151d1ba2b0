"""Each check on evidence made by hand: silent on what is promised, red on each way to break it."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from chaos import checker
from chaos.checker import (
    ALLOWANCE_SECONDS,
    FORMULAS,
    LOST_ATTEMPTS,
    MOMENT_SECONDS,
    OVERLAPPING,
    Findings,
    Violation,
    check,
    recoveries,
)
from chaos.evidence import Alarm, Enqueued, Evidence, Injected, Pause, Sample, Stray
from chaos.jobs import KINDS, MAX_CONCURRENCY, RATE_PER_MINUTE, Draft
from chaos.ledger import Change, Effect, Run
from chaos.plan import Plan, PlannedJob

OFFSET = 1_000.0  # of the database's clock
WORKERS = {"w1": "m1", "w2": "m2"}


class Tale:
    """Evidence of one job with key 0 and id 1, told event by event; each event comes a second after the one before."""

    def __init__(self, kind: str = "short", **draft: Any) -> None:
        self.at = 0.0
        self.runs: list[Run] = []
        self.changes: list[Change] = []
        self.lease = 0
        self.txid = 0
        job = PlannedJob(0, kind, 0, replace(Draft("chaos_sleep"), **draft))
        self.evidence = Evidence(
            plan=Plan(1, (job,), (), {}), told=Enqueued({0: 1}), clock_offset=OFFSET, masters_of_workers=WORKERS
        )
        self.attempt = self.crashes = 0
        self.row("available", op="INSERT")

    def tick(self) -> float:
        self.at += 1
        return self.at

    def note(self, table: str, op: str, **values: Any) -> None:
        at = self.tick() + OFFSET
        self.changes.append(Change(len(self.changes), at, self.txid, table, op, 1, **values))

    def row(self, state: str, *, op: str = "UPDATE", **values: Any) -> Tale:
        known = {"queue": "work", "scheduled_at": self.at + OFFSET, "attempt": self.attempt, "crashes": self.crashes}
        self.note("job_rows", op, state=state, **(known | values))
        self.evidence.rows = {1: state}
        return self

    def claim(self, worker: str = "w1", lease: int | None = None) -> Tale:
        self.txid += 1
        self.lease = lease or self.lease + 1
        self.note("claims", "INSERT", lease=self.lease, worker=worker, attempt=self.attempt + 1)
        return self

    def start(self, pid: int = 10, master: str = "m1", beside: int = 0) -> Tale:
        self.runs.append(Run(1, self.lease, self.attempt + 1, pid, master, self.tick(), beside=beside))
        return self

    def stop(self, how: str | None = "returned", run: int = -1) -> Tale:
        self.runs[run] = replace(self.runs[run], ended_at=self.tick(), how=how)
        return self

    def settle(
        self, state: str, *, counts: bool = True, lease: int | None = None, crash: bool = False, **told: Any
    ) -> Tale:
        """The claim ends in a transaction that leaves the row in `state`."""
        self.txid += 1
        self.note("claims", "DELETE", lease=lease or self.lease)
        self.attempt += counts
        self.crashes += crash
        return self.row(state, **told)

    def hit(self, fault: str, target: str = "m1", seconds: float = 1.0, **values: Any) -> Tale:
        """A fault among the workers of WORKERS, where `values` name no others."""
        at = self.tick()
        injected = Injected(fault, target, at, at + seconds, **{"workers": frozenset(WORKERS)} | values)
        self.evidence.injected = [*self.evidence.injected, injected]
        return self

    def findings(self) -> Findings:
        self.evidence.runs, self.evidence.changes = self.runs, self.changes
        return check(self.evidence)

    def complaints(self) -> list[str]:
        return [violation.check for violation in self.findings().violations]


def good() -> Tale:
    return Tale().claim().start().stop().settle("completed", told_lease=1)


def test_a_job_that_ran_and_completed_is_as_it_should_be() -> None:
    assert good().complaints() == []


# -- jobs


def test_a_job_that_was_not_enqueued_or_has_no_row_is_lost() -> None:
    tale = good()
    tale.evidence.told = Enqueued()
    assert tale.complaints() == ["lost"]
    tale = good()
    tale.evidence.rows = {}
    assert tale.complaints() == ["lost"]


def test_a_job_that_still_waits_at_the_end_is_lost() -> None:
    assert Tale().complaints() == ["lost"]
    assert Tale().claim().complaints() == ["lost"]


def test_a_finished_job_that_stands_among_those_that_wait_is_lost() -> None:
    tale = good()
    tale.evidence.waiting = {1: "ready"}
    assert tale.complaints() == ["lost"]


def test_a_job_ends_only_as_its_kind_may() -> None:
    assert "wrong end" in Tale().claim().start().stop("Planned").settle("discarded").complaints()
    assert (
        Tale("failing")
        .claim()
        .start()
        .stop("Planned")
        .settle("retryable")
        .claim()
        .start()
        .stop("Planned")
        .settle("discarded")
        .complaints()
        == []
    )


def test_a_job_that_faults_crashed_three_times_may_be_discarded() -> None:
    tale = Tale()
    tale.evidence.killed_pids = frozenset({10})
    for state in ("retryable", "retryable", "discarded"):
        tale.claim().start().stop(None).settle(state, crash=True, error="WorkerCrash: its process (pid 10) was killed")
    assert tale.complaints() == []


def test_a_story_must_be_that_of_its_kind() -> None:
    assert Tale("retried").claim().start().stop().settle("completed", told_lease=1).complaints() == ["wrong story"]
    early = Tale("scheduled")
    early.changes[0] = replace(early.changes[0], scheduled_at=early.at + OFFSET + 60)
    assert early.claim().start().stop().settle("completed").complaints() == ["wrong story"]
    assert "wrong story" in Tale("cancelled waiting").claim().start().stop().settle("cancelled").complaints()
    restless = Tale("snoozed")
    for _ in range(2):
        restless.claim().start().stop("SnoozeJob").settle("available", counts=False)
    assert restless.claim().start().stop().settle("completed").complaints() == ["wrong story"]
    sturdy = Tale("crashing always").claim().start().stop(None)
    assert sturdy.settle("discarded", crash=True, error="WorkerCrash: x").complaints() == ["wrong story"]


def beside(first: Tale, second: Tale, *, after: float, **draft: Any) -> list[str]:
    """The complaints about two jobs, with keys 0 and 1 and ids 1 and 2; the second's time is so much later."""
    plan = first.evidence.plan
    other = replace(second.evidence.plan.jobs[0], key=1, **draft)
    evidence = replace(first.evidence, plan=replace(plan, jobs=(*plan.jobs, other)), told=Enqueued({0: 1, 1: 2}))
    evidence.rows = {1: first.evidence.rows[1], 2: second.evidence.rows[1]}
    moved = [replace(c, job_id=2, at=c.at + after, txid=c.txid + 1000) for c in second.changes]
    changes = sorted([*first.changes, *moved], key=lambda change: change.at)
    evidence.changes = [replace(change, seq=seq) for seq, change in enumerate(changes)]
    runs = [replace(r, job_id=2, pid=99, started_at=r.started_at + after) for r in second.runs]
    evidence.runs = [*first.runs, *(replace(r, ended_at=r.ended_at and r.ended_at + after) for r in runs)]
    return [violation.check for violation in check(evidence).violations]


def test_a_key_that_two_active_jobs_have_is_found() -> None:
    def unique() -> Tale:
        return Tale("unique", unique_key="k").claim().start().stop().settle("completed", told_lease=1)

    assert beside(unique(), unique(), after=10) == []
    assert beside(unique(), unique(), after=3.5) == ["key"]
    assert beside(unique(), good(), after=3.5) == []


def test_a_job_that_runs_before_what_it_depends_on_has_completed_is_found() -> None:
    def dependent(state: str = "completed") -> Tale:
        tale = Tale("dependent")
        return tale.claim().start().stop().settle(state, told_lease=1) if state == "completed" else tale.row(state)

    assert beside(good(), dependent(), after=10, parents=(0,)) == []
    assert beside(good(), dependent(), after=2.5, parents=(0,)) == ["early"]
    assert beside(good(), dependent("cancelled"), after=2.5, parents=(0,)) == ["dependent"]
    dead = Tale("cancelled waiting").row("cancelled")
    assert beside(dead, dependent("cancelled"), after=2.5, parents=(0,)) == []
    assert beside(dead, dependent(), after=2.5, parents=(0,)) == ["early", "dependent"]


def several(kind: str, number: int, *, apart: float) -> list[str]:
    """The complaints about so many jobs of a kind, all good, each so much later than the one before."""
    tale = Tale(kind).claim().start().stop().settle("completed", told_lease=1)
    (job,) = tale.evidence.plan.jobs
    evidence = tale.evidence
    evidence.plan = replace(evidence.plan, jobs=tuple(replace(job, key=n) for n in range(number)))
    evidence.told = Enqueued({n: n + 1 for n in range(number)})
    evidence.rows = {n + 1: "completed" for n in range(number)}
    changes = [
        replace(c, job_id=n + 1, at=c.at + n * apart, txid=c.txid + n * 1000)
        for n in range(number)
        for c in tale.changes
    ]
    changes.sort(key=lambda change: change.at)
    evidence.changes = [replace(change, seq=seq) for seq, change in enumerate(changes)]
    evidence.runs = [
        replace(r, job_id=n + 1, pid=10 + n, started_at=r.started_at + n * apart, ended_at=r.ended_at + n * apart)
        for n in range(number)
        for r in tale.runs
        if r.ended_at is not None
    ]
    return [violation.check for violation in check(evidence).violations]


def test_more_runs_of_a_task_at_once_than_its_limit_are_found() -> None:
    assert several("throttled", MAX_CONCURRENCY, apart=0) == []
    assert several("throttled", MAX_CONCURRENCY + 2, apart=0) == ["limit", "limit"]
    assert several("throttled", MAX_CONCURRENCY + 2, apart=10) == []
    assert several("short", MAX_CONCURRENCY + 2, apart=0) == []


def test_more_starts_of_a_task_in_a_minute_than_its_rate_are_found() -> None:
    assert several("rated", RATE_PER_MINUTE, apart=0.1) == []
    assert several("rated", RATE_PER_MINUTE + 2, apart=0.1) == ["limit", "limit"]
    assert several("rated", RATE_PER_MINUTE + 2, apart=60 / RATE_PER_MINUTE) == []


def test_a_finished_job_that_ends_again_ended_twice() -> None:
    assert "ended twice" in good().claim().start().stop().settle("completed", told_lease=2).complaints()
    assert "ended twice" in good().row("retryable").complaints()


def test_a_result_of_an_old_lease_is_found_by_the_lease_in_it() -> None:
    tale = Tale().claim().start().stop(None).settle("retryable").claim().start().stop()
    assert tale.settle("completed", told_lease=1).complaints() == ["old lease"]


def test_a_failure_of_an_old_lease_is_found_by_the_lease_in_its_error() -> None:
    tale = Tale().claim().start().stop("Planned").settle("retryable", told_lease=7, error="Planned: under lease 7")
    assert tale.claim().start().stop().settle("completed", told_lease=2).complaints() == ["old lease"]


def test_a_completion_without_a_claim_is_one_of_an_old_lease() -> None:
    tale = Tale().claim().start().stop().settle("retryable")
    tale.txid += 1
    assert "old lease" in tale.row("completed").complaints()


def test_a_completion_that_no_handler_returned_is_false() -> None:
    assert Tale().claim().start().stop("ValueError").settle("completed").complaints() == ["false completion"]


def transactional(*effects: tuple[int, int], how: str | None = "returned", state: str = "completed") -> list[str]:
    """What is said of a job that ended so under lease 1, in transaction 2, and had effects: leases and transactions."""
    tale = Tale("transactional").claim().start().settle(state, told_lease=1)
    tale.stop(how)
    tale.evidence.effects = [Effect(1, lease, txid) for lease, txid in effects]
    return tale.complaints()


def test_an_effect_is_had_once_with_the_completion_whatever_becomes_of_the_handler() -> None:
    assert transactional((1, 2)) == []
    assert transactional((1, 2), how=None) == []
    assert transactional() == ["effect"]
    assert transactional((1, 2), (1, 2)) == ["effect"]
    assert transactional((1, 1)) == ["effect"]
    assert transactional((1, 2), how="LeaseLostError", state="cancelled") == ["wrong end", "effect"]


def test_leases_of_a_job_rise_and_no_two_stand_at_once() -> None:
    assert "leases" in Tale().claim(lease=5).start().stop(None).settle("retryable").claim(lease=4).complaints()
    assert "leases" in Tale().claim().claim().complaints()


def test_a_lease_under_which_a_handler_started_twice_is_found() -> None:
    tale = Tale().claim().start(pid=10).stop().start(pid=11).stop().settle("completed", told_lease=1)
    assert tale.complaints() == ["started twice"]


def test_a_run_that_no_claim_is_known_of_is_found() -> None:
    tale = good()
    tale.lease = 9
    assert tale.start().stop().complaints() == ["not claimed"]


def after_a_return(fault: str | None, error: str, state: str = "retryable", **values: Any) -> Tale:
    """A job whose handler returned under its first lease, which ended with an error; the next one completed it."""
    tale = Tale().claim().start().stop()
    if fault:
        tale.hit(fault, **values)
    tale.settle(state, error=error)
    return tale.claim(worker="w2").start(master="m2").stop().settle("completed", told_lease=2)


@pytest.mark.parametrize("words", ["it ran was lost", "that ran it died; its successor freed the job", "was stopped"])
def test_a_result_may_be_lost_with_its_worker_and_not_with_one_that_was_told_to_stop(words: str) -> None:
    error = f"WorkerCrash: the worker {words.replace('it ran', 'that ran it')}"
    assert after_a_return("kill_master", error).complaints() == []
    assert after_a_return("kill_master", error).findings().lost_results.total() == 1
    assert after_a_return("replace_master", error).complaints() == ["result lost", "rescue"]
    assert after_a_return("kill_master", error, target="m2").complaints() == ["result lost", "rescue"]
    assert after_a_return("kill_master", error, workers=frozenset({"w0"})).complaints() == ["result lost", "rescue"]


def test_a_result_that_was_not_written_long_before_its_worker_was_lost_is_found() -> None:
    tale = Tale().claim().start().stop()
    tale.at += 5
    tale.hit("kill_master").settle("retryable", error="WorkerCrash: the worker that ran it was lost")
    tale.claim(worker="w2").start(master="m2").stop().settle("completed", told_lease=2)
    assert tale.complaints() == ["result lost"]


def test_a_result_may_be_lost_with_its_child_before_it_is_reported() -> None:
    killed = after_a_return(None, "WorkerCrash: its process (pid 10) was killed by signal 9 (SIGKILL)")
    assert killed.complaints() == ["result lost"]
    killed.evidence.killed_pids = frozenset({10})
    assert killed.complaints() == []
    with_template = "WorkerCrash: the process that its child was forked from was killed"
    assert after_a_return("kill_template", with_template).complaints() == []
    assert after_a_return("jump_database_clock", with_template).complaints() == []
    assert after_a_return("reload", with_template).complaints() == ["result lost"]
    too_late = "TimeoutError: overran timeout_seconds (1), did not stop, and was killed"
    assert after_a_return("stop_child", too_late).complaints() == []
    assert after_a_return("stop_master", too_late).complaints() == ["result lost"]


def test_a_handler_that_returned_under_a_lease_that_had_ended_is_no_concern_of_its_job() -> None:
    tale = Tale().claim().start().hit("kill_master")
    tale.settle("retryable", error="WorkerCrash: the worker that ran it was lost").stop()
    assert tale.claim(worker="w2").start().stop().settle("completed", told_lease=2).complaints() == []


# -- attempts


def test_an_attempt_that_counts_and_never_started_needs_a_cause() -> None:
    unexplained = Tale().claim().settle("retryable").claim().start().stop().settle("completed", told_lease=2)
    assert unexplained.complaints() == ["attempts"]


def test_the_database_cannot_tell_whether_the_jobs_of_a_lost_worker_had_started() -> None:
    tale = Tale().claim().hit("kill_master").settle("retryable", error="WorkerCrash: the worker that ran it was lost")
    tale.claim(worker="w2").start().stop().settle("completed", told_lease=2)
    assert tale.complaints() == []
    assert sum(tale.findings().not_started.values()) == 1


def test_a_killed_child_may_take_one_job_with_it_that_it_had_not_started_and_no_more() -> None:
    tale = Tale()
    tale.evidence.killed_pids = frozenset({10})
    error = "WorkerCrash: its process (pid 10) was killed by signal 9 (SIGKILL)"
    tale.claim().settle("retryable", crash=True, error=error)
    assert tale.complaints() == ["lost"]
    tale.claim().settle("retryable", crash=True, error=error)
    assert "attempts" in tale.complaints()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("kill_template", "WorkerCrash: the process that its child was forked from was killed"),
        ("stop_child", "TimeoutError: overran timeout_seconds (1), did not stop, and was killed"),
    ],
)
def test_a_job_may_be_lost_on_its_way_into_the_handler_by_these_faults(fault: str, error: str) -> None:
    def lost(fault: str) -> list[str]:
        tale = Tale().claim().hit(fault).settle("retryable", error=error)
        return tale.claim().start().stop().settle("completed", told_lease=2).complaints()

    assert lost(fault) == []
    assert lost("reload") == ["attempts"]


def test_few_jobs_are_lost_on_their_way_into_the_handler_with_their_template() -> None:
    def lost(times: int) -> list[str]:
        tale = Tale()
        for _ in range(times):
            tale.claim().hit("kill_template").settle("retryable", error="WorkerCrash: the process was killed")
        return tale.claim().start().stop().settle("completed", told_lease=tale.lease).complaints()

    assert lost(LOST_ATTEMPTS) == []
    assert lost(LOST_ATTEMPTS + 1) == ["attempts"]


def test_a_run_that_counts_as_no_attempt_needs_a_cause() -> None:
    def released(how: str | None, fault: str | None = None) -> Tale:
        tale = Tale().claim().start()
        if fault:
            tale.hit(fault)
        tale.stop(how).settle("available", counts=False)
        return tale.claim().start().stop().settle("completed", told_lease=2)

    assert released("returned").complaints() == ["attempts"]
    assert released("JobInterrupted").complaints() == ["attempts"]
    assert released("JobInterrupted", "replace_master").complaints() == []
    assert released("SnoozeJob").complaints() == []


def test_a_claim_that_ends_and_leaves_no_trace_is_found() -> None:
    tale = Tale().claim().start().stop()
    tale.txid += 1
    tale.note("claims", "DELETE", lease=1)
    tale.txid += 1
    tale.row("completed")
    assert "attempts" in tale.complaints()


def test_a_crash_that_nobody_caused_is_found() -> None:
    tale = (
        Tale().claim().start().stop(None).settle("retryable", crash=True, error="WorkerCrash: its process (pid 10) x")
    )
    tale.claim().start().stop().settle("completed", told_lease=2)
    assert tale.complaints() == ["crashes"]


def test_a_rescue_from_a_worker_that_was_well_is_found() -> None:
    def rescued(fault: str, target: str) -> list[str]:
        tale = Tale().claim().start().hit(fault, target).stop(None)
        tale.settle("retryable", error="WorkerCrash: the worker that ran it was lost")
        return tale.claim().start().stop().settle("completed", told_lease=2).complaints()

    assert rescued("kill_master", "m1") == []
    assert rescued("kill_master", "m2") == ["rescue"]
    assert rescued("kill_child", "m1") == ["rescue"]
    assert rescued("replace_master", "m1") == ["rescue"]


def test_a_rescue_long_after_the_fault_or_from_a_worker_that_came_after_it_is_found() -> None:
    def rescued(after: float, **values: Any) -> list[str]:
        tale = Tale().claim().start().hit("jump_database_clock", **values).stop(None)
        tale.at += after
        tale.settle("retryable", error="WorkerCrash: the worker that ran it was lost")
        return tale.claim().start().stop().settle("completed", told_lease=2).complaints()

    assert rescued(0) == []
    assert rescued(6) == ["rescue"]
    assert rescued(0, workers=frozenset({"w0"})) == ["rescue"]


def test_what_a_stopped_worker_did_not_know_that_it_had_claimed_is_freed() -> None:
    tale = Tale().claim().hit("replace_master").settle("retryable", error="WorkerCrash: the worker was stopped")
    assert tale.claim().start().stop().settle("completed", told_lease=2).complaints() == []


def test_a_claim_out_of_a_paused_queue_is_found() -> None:
    tale = Tale("paused", queue="held")
    tale.changes[0] = replace(tale.changes[0], queue="held")
    tale.claim().start().stop().settle("completed", told_lease=1)
    claimed_at = tale.changes[1].at
    tale.evidence.told.pauses = [Pause(claimed_at + 0.1, claimed_at + 9), Pause(claimed_at - 9, claimed_at - 0.1)]
    assert tale.complaints() == []
    tale.evidence.told.pauses = [Pause(claimed_at - 9, claimed_at + 9)]
    assert tale.complaints() == ["paused"]


# -- overlaps


def overlapping(fault: str, target: str) -> Tale:
    tale = Tale().claim().start(pid=10, master="m1").hit(fault, target, seconds=5)
    tale.settle("retryable", error="WorkerCrash: the worker that ran it was lost")
    tale.claim(worker="w2").start(pid=20, master="m2", beside=10)
    return tale.stop(run=0).stop(run=1).settle("completed", told_lease=2)


@pytest.mark.parametrize(("fault", "target"), [("stop_master_until_stale", "m1"), ("jump_database_clock", "m3")])
def test_runs_may_overlap_for_the_causes_that_are_named(fault: str, target: str) -> None:
    findings = overlapping(fault, target).findings()
    assert [violation.check for violation in findings.violations] == []
    assert findings.overlaps == {OVERLAPPING[fault]: 1}
    assert findings.longest_overlap_seconds == 1.0


def test_runs_may_overlap_until_a_master_that_was_cut_off_hears_of_a_jump() -> None:
    def overlaps(target: str) -> list[str]:
        tale = Tale().claim().start(pid=10, master="m1").hit("swallow_until_stale", target, seconds=10)
        tale.hit("jump_database_clock", "m3")
        tale.settle("retryable", error="WorkerCrash: the worker that ran it was lost")
        tale.claim(worker="w2").start(pid=20, master="m2", beside=10)
        return tale.stop(None, run=0).stop(run=1).settle("completed", told_lease=2).complaints()

    assert overlaps("m1") == []
    assert overlaps("m2") == ["overlap"]


def test_a_run_under_the_lease_that_was_lost_may_begin_the_later() -> None:
    def complaints(target: str) -> list[str]:
        tale = Tale().claim().hit("stop_master_until_stale", target, seconds=10)
        tale.settle("retryable", error="WorkerCrash: the worker that ran it was lost")
        tale.claim(worker="w2").start(pid=20, master="m2").start(pid=10, master="m1", beside=20)
        tale.runs[-1] = replace(tale.runs[-1], lease=1, attempt=1)
        return tale.stop(None).stop(run=0).settle("completed", told_lease=2).complaints()

    assert complaints("m1") == []
    assert "overlap" in complaints("m2")


def test_runs_that_overlap_for_any_other_cause_are_found() -> None:
    assert overlapping("kill_master", "m1").complaints() == ["overlap"]
    assert "overlap" in overlapping("stop_master_until_stale", "m2").complaints()


# -- processes


def test_an_orphan_and_a_zombie_are_found_but_for_what_may_outlive_a_master_and_its_template() -> None:
    def left(fault: str, title: str, how: str) -> list[str]:
        tale = good().hit(fault)
        tale.evidence.strays = [Stray(tale.at + 0.5, 9, title, how)]
        return tale.complaints()

    assert left("kill_master", "sleep 600", "orphan") == ["left behind"]
    assert left("kill_master_and_template", "sleep 600", "orphan") == []
    assert left("kill_master_and_template", "sleep 600", "zombie") == ["left behind"]
    assert left("kill_master_and_template", "roostd: child work", "orphan") == ["left behind"]


def test_what_lives_on_at_the_end_and_who_does_not_end_well_are_found() -> None:
    tale = good()
    tale.evidence.left_processes = ["9 roostd: child"]
    tale.evidence.exit_statuses = {"m1": 0, "m2": 1, "m3": None}
    assert tale.complaints() == ["left behind", "exit", "exit"]


def test_a_stop_that_left_outcomes_unwritten_or_its_worker_registered_is_found() -> None:
    tale = good()
    tale.evidence.alarms = [Alarm("m1", "outcomes.unwritten", "not written within 10 s")]
    assert tale.complaints() == ["stop"]
    tale = good()
    tale.evidence.left_workers = {"w1": "m1"}
    assert tale.complaints() == []  # it was not stopped, but killed
    tale.evidence.exit_statuses = {"m1": 0}
    assert tale.complaints() == ["stop"]


@pytest.mark.parametrize("role", ["master", "template", "child"])
def test_a_process_whose_files_or_memory_grow_is_found(role: str) -> None:
    def grown(files: int, kibibytes: int, connections: tuple[int, ...] = (4,) * 21) -> list[str]:
        tale = good()
        tale.evidence.samples = [
            Sample(
                at=float(n),
                role=role,
                master="m1",
                pid=9,
                files=("pipe",) * (20 + files * n // 20) + ("TCP to 5432",) * connections[n],
                rss_bytes=(50 << 20) + (kibibytes * n // 20 << 10),
            )
            for n in range(21)
        ]
        return tale.complaints()

    assert grown(1, 250) == []
    assert grown(6, 0) == ["growth"]  # what is open of one child
    assert grown(0, 0, connections=(0,) * 10 + (4,) * 11) == []
    assert grown(0, 0, connections=(4,) * 10 + (9,) * 11) == ["growth"]
    assert grown(0, 1_500) == ["growth"]  # the mean
    assert grown(0, 5_000) == ["growth", "growth"]


def test_a_leak_is_found_in_a_life_as_short_as_that_of_most_masters() -> None:
    def leaked(kibibytes_a_fault: int) -> list[str]:
        tale = good()
        for _ in range(11):
            tale.hit("reload")
        tale.evidence.samples = [
            Sample(tale.at - 11 + n / 2, "master", "m1", 9, (), (50 << 20) + (kibibytes_a_fault * n << 9))
            for n in range(24)
        ]
        return tale.complaints()

    assert leaked(4) == []
    assert leaked(80) == ["growth"]
    assert leaked(500) == ["growth", "growth"]


def test_the_lives_over_which_growth_was_judged_are_counted() -> None:
    tale = good().hit("reload").hit("reload")
    tale.evidence.samples = [
        Sample(float(n), "master", "m1", pid, (), 1) for pid, number in ((7, 9), (8, 30)) for n in range(number)
    ]
    findings = tale.findings()
    assert findings.lives == {"master": [2]}
    assert findings.short_lives == {"master": 1}


# -- recoveries


def test_a_fault_that_was_not_recovered_from_is_found() -> None:
    assert good().hit("kill_child", failure="ChaosError: no successor").complaints() == ["not recovered"]


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_recovery_is_held_to_its_formula(formula: str) -> None:
    bound = FORMULAS[formula][1]

    def recovered(*seconds: float, beside: float = 0.0) -> list[str]:
        tale = good()
        for each in seconds:
            tale.at += 100
            tale.hit("some_fault", formula=formula, recovery_seconds=each, seconds=30)
        if beside:
            tale.hit("another_fault", seconds=beside)
        return tale.complaints()

    assert recovered(bound, bound + ALLOWANCE_SECONDS) == []
    assert recovered(bound, bound + ALLOWANCE_SECONDS + 1) == ["slow recovery"]
    assert recovered(bound, bound + ALLOWANCE_SECONDS + 1, beside=5) == []
    assert recovered(bound + 1, bound + 1, bound) == ["slow recovery"]  # the median
    assert recovered(bound + MOMENT_SECONDS, bound + 1) == []  # the shorter of two
    assert recovered(bound + 1, bound + 1) == ["slow recovery"]
    assert recovered(bound + 1) == ["slow recovery"]


def test_recovery_times_are_sorted() -> None:
    tale = good()
    for seconds in (0.3, 0.1, 0.2):
        tale.hit("kill_child", formula="child death", recovery_seconds=seconds)
    assert recoveries(tale.evidence) == {"child death": [0.1, 0.2, 0.3]}


# -- cron


def cron_tale(*slots: tuple[str, float, int]) -> Tale:
    """Two entries that are known since second 30, with these jobs, and a row for each."""
    tale = good()
    tale.evidence.cron_since = {"a": 30.0, "b": 30.0}
    tale.evidence.cron_jobs = slots
    tale.evidence.cron_rows = {(name, slot): job_id for name, slot, job_id in slots}
    return tale


ALL_SLOTS = (("a", 60.0, 2), ("b", 60.0, 3), ("a", 120.0, 4), ("b", 120.0, 5))


def test_a_slot_with_its_row_and_its_job_is_as_it_should_be() -> None:
    tale = cron_tale(*ALL_SLOTS)
    assert tale.complaints() == []
    assert tale.findings().cron_slots == 4


def test_a_slot_that_fired_twice_or_never_is_a_violation() -> None:
    assert cron_tale(*ALL_SLOTS, ("a", 60.0, 6)).complaints() == ["cron"]
    for left_out in range(3):
        assert cron_tale(*(slot for n, slot in enumerate(ALL_SLOTS) if n != left_out)).complaints() == ["cron"]


def test_a_row_without_its_job_and_a_job_without_its_row_are_violations() -> None:
    tale = cron_tale(*ALL_SLOTS)
    tale.evidence.cron_rows = {**tale.evidence.cron_rows, ("a", 0.0): 9}
    assert tale.complaints() == ["cron"]
    tale.evidence.cron_rows = {("a", 60.0): 2, ("b", 60.0): 3, ("a", 120.0): 5, ("b", 120.0): 5}
    assert tale.complaints() == ["cron"]


# -- the whole


def test_every_check_is_shown_red_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of the checker at which no test of this file has it complain would be trusted for nothing."""
    reached: set[int] = set()

    def note(*particulars: Any) -> Violation:
        reached.add(sys._getframe(1).f_lineno)
        return Violation(*particulars)

    monkeypatch.setattr(checker, "Violation", note)
    for test, arguments in _tests_of_this_file():
        test(**arguments)
    calls = [each for each in ast.walk(ast.parse(inspect.getsource(checker))) if isinstance(each, ast.Call)]
    places = {call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Violation"}
    assert reached == places


def _tests_of_this_file() -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """All but the one above, with the arguments of each of its cases."""
    for name, test in list(globals().items()):
        if not name.startswith("test_") or test is test_every_check_is_shown_red_here:
            continue
        marks = getattr(test, "pytestmark", [])
        if not marks:
            yield test, {}
        for mark in marks:
            names, cases = mark.args
            for case in cases:
                yield test, dict(zip(names, case, strict=True)) if isinstance(names, tuple) else {names: case}


def test_every_kind_of_job_may_end() -> None:
    for name, kind in KINDS.items():
        assert kind.ends, name
