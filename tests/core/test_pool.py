"""What a pool decides, event by event. How it all plays together is in test_simulation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from roostd.core.job import ClaimedJob
from roostd.core.outcome import Ending, SoftReason
from roostd.core.pace import MAX_WINDOW, REST_SECONDS, WINDOW_SECONDS
from roostd.core.pool import (
    MAX_CLAIM,
    RELEASE_SECONDS,
    STALL_SECONDS,
    UNREAD_SECONDS,
    Action,
    Assign,
    CallOff,
    Kill,
    Pool,
    ProtocolError,
    Remind,
    Retire,
    Settle,
    TakeBack,
)

GRACE = 5.0
_ids = itertools.count(1)


def job(*, timeout: int | None = None, queue: str = "default") -> ClaimedJob:
    number = next(_ids)
    return ClaimedJob(number, 1000 + number, 1, 20, 0, timeout, queue, "task", "{}")


def jobs(number: int, **fields: Any) -> list[ClaimedJob]:
    return [job(**fields) for _ in range(number)]


def pool(children: int = 1, *, mean_seconds: float | None = None, prefetch: int | None = None) -> Pool:
    made = Pool(size=children, kill_grace=GRACE, prefetch=prefetch)
    made.pace.mean_seconds = mean_seconds
    made.starting = children
    for key in range(1, children + 1):
        made.child_started(key, 1, 0.0)
    return made


def taken(pool: Pool) -> list[Action]:
    """The actions decided on so far, carried out."""
    actions, pool.actions = pool.actions, []
    return actions


def carry_out(pool: Pool, started: dict[int, int], now: float) -> list[Action]:
    """Carries out the actions where each child has started as many of its jobs as `started` says."""
    done: list[Action] = []
    while pool.actions:
        action = pool.actions.pop(0)
        done.append(action)
        if isinstance(action, TakeBack):
            held = list(pool.children[action.child].assigned)
            pool.took_back(action.child, [each.lease for each in held[started.get(action.child, 0) :]], now)
    return done


def leases(*given: ClaimedJob) -> list[int]:
    return [each.lease for each in given]


def released(actions: list[Action]) -> list[int]:
    return [a.job.lease for a in actions if isinstance(a, Settle) and a.report.ending is Ending.RELEASED]


# -- hand-over


def test_of_jobs_whose_length_is_unknown_each_child_gets_one() -> None:
    made = pool(2)
    first, second, third = jobs(3)
    made.claimed([first, second, third], 0.0)
    assert taken(made) == [Assign(1, [first]), Assign(2, [second])]
    assert list(made.waiting) == [third]


def test_short_jobs_are_spread_evenly_and_in_order() -> None:
    made = pool(2, mean_seconds=0.0005)  # a window of 10
    batch = jobs(6)
    made.claimed(batch, 0.0)
    assert taken(made) == [Assign(1, batch[:3]), Assign(2, batch[3:])]


def test_a_child_never_holds_more_than_the_window() -> None:
    made = pool(1, mean_seconds=1e-6)
    made.claimed(jobs(200), 0.0)
    (assign,) = taken(made)
    assert isinstance(assign, Assign)
    assert len(assign.jobs) == MAX_WINDOW


def test_the_next_job_follows_the_outcome() -> None:
    made = pool()
    first, second = jobs(2)
    made.claimed([first, second], 0.0)
    taken(made)
    assert made.ended(1, leases(first), 0.1) == [first]
    assert taken(made) == [Assign(1, [second])]


@pytest.mark.parametrize("reported", [[2], [1, 3], [1, 2, 3, 4], [9]])
def test_a_report_of_what_a_child_does_not_run_is_refused_whole(reported: list[int]) -> None:
    made = pool(1, mean_seconds=0.0005)
    batch = jobs(3)
    made.claimed(batch, 0.0)
    base = batch[0].lease - 1
    with pytest.raises(ProtocolError):
        made.ended(1, [base + number for number in reported], 0.1)
    assert made.held_jobs() == batch


def test_an_empty_report_says_nothing_of_the_pace() -> None:
    made = pool()
    made.claimed(jobs(1), 0.0)
    assert made.ended(1, [], 3.0) == []
    assert made.pace.mean_seconds is None


def test_what_a_socket_has_no_room_for_waits_until_the_child_has_reported_something() -> None:
    made = pool(1, mean_seconds=0.0005)
    first, second, third = jobs(3)
    made.claimed([first, second, third], 0.0)
    taken(made)
    made.unsent(1, leases(second, third), 0.0)
    assert taken(made) == []
    assert list(made.waiting) == [second, third]
    made.ended(1, leases(first), 0.001)
    assert taken(made) == [Assign(1, [second, third])]


def test_an_idle_child_that_takes_nothing_is_retired() -> None:
    made = pool(1)
    only = job()
    made.claimed([only], 0.0)
    taken(made)
    made.unsent(1, leases(only), 0.0)
    assert Retire(1) in carry_out(made, {}, 0.0)
    assert list(made.waiting) == [only]


# -- taking back


def test_what_stands_behind_a_long_job_goes_to_an_idle_child() -> None:
    made = pool(2, mean_seconds=0.0005)
    batch = jobs(4)
    made.claimed(batch, 0.0)
    taken(made)
    made.ended(2, leases(*batch[2:]), 0.001)
    made.tick(made.next_tick() or 0.0)
    assert taken(made) == [TakeBack(1)]
    made.took_back(1, leases(batch[1]), 0.002)
    assert taken(made) == [Assign(2, [batch[1]])]


def test_what_stands_behind_many_short_jobs_goes_to_an_idle_child_too() -> None:
    """Each of them ends before it proves long, and the last would wait for all: 64 of 1.9 ms are 120 ms."""
    made = pool(2, mean_seconds=0.00005)
    batch = jobs(2 * MAX_WINDOW)
    made.claimed(batch, 0.0)
    taken(made)
    made.ended(2, leases(*batch[MAX_WINDOW:]), 0.001)
    for number in range(3):
        now = 0.0015 * (number + 1)
        made.tick(now)
        if TakeBack(1) in taken(made):
            return
        made.ended(1, leases(batch[number]), now)
    pytest.fail("the other child goes on standing idle")


def test_nothing_is_taken_back_while_everybody_is_busy_with_short_jobs() -> None:
    made = pool(2, mean_seconds=0.0005)
    made.claimed(jobs(8), 0.0)
    taken(made)
    assert made.next_tick() == STALL_SECONDS
    made.tick(STALL_SECONDS * 0.9)
    assert taken(made) == []


def test_nothing_stands_behind_a_job_that_stalls_even_when_nobody_is_idle() -> None:
    made = pool(1, mean_seconds=0.0005)
    first, second = jobs(2)
    made.claimed([first, second], 0.0)
    taken(made)
    made.tick(STALL_SECONDS)
    assert taken(made) == [TakeBack(1)]
    made.took_back(1, leases(second), STALL_SECONDS)
    assert taken(made) == []
    assert list(made.waiting) == [second]


def test_what_no_child_gets_free_for_is_let_go_of() -> None:
    made = pool(1)
    running, waiting = jobs(2)
    made.claimed([running, waiting], 0.0)
    taken(made)
    assert made.next_tick() == RELEASE_SECONDS
    made.tick(RELEASE_SECONDS)
    assert released(taken(made)) == leases(waiting)
    assert made.held_jobs() == [running]


def test_jobs_taken_back_keep_their_place_in_front() -> None:
    made = pool(1, mean_seconds=WINDOW_SECONDS / 10)
    batch = jobs(20)
    made.claimed(batch, 0.0)
    taken(made)
    made.took_back(1, leases(*batch[1:10]), STALL_SECONDS)
    assert list(made.waiting) == batch[1:]


# -- timeouts


def test_at_the_deadline_the_job_is_called_off_and_after_the_grace_its_child_is_killed() -> None:
    made = pool()
    slow = job(timeout=2)
    made.claimed([slow], 1.0)
    taken(made)
    assert made.next_tick() == 3.0
    made.tick(3.0)
    assert carry_out(made, {1: 1}, 3.0) == [TakeBack(1), CallOff(1, slow.lease, SoftReason.TIMEOUT)]
    for seconds in (0.02, 0.04, 0.08):
        assert made.next_tick() == pytest.approx(3.0 + seconds)
        made.tick(3.0 + seconds)
        assert taken(made) == [Remind(1)], "the signal may have come just before it waited in C"
    made.tick(3.0 + GRACE)
    assert taken(made) == [Kill(1)]
    assert made.next_tick() is None
    assert made.child_died(1, 9.0) == [(slow, SoftReason.TIMEOUT)]


def test_the_clock_of_a_job_starts_when_the_one_before_it_has_ended() -> None:
    made = pool(1, mean_seconds=0.0005)
    first, second = jobs(2, timeout=2)
    made.claimed([first, second], 0.0)
    taken(made)
    made.ended(1, leases(first), 1.5)
    assert made.next_tick() == 3.5


def test_a_child_that_was_called_off_is_as_good_as_new_once_its_job_has_ended() -> None:
    made = pool()
    slow, after = job(timeout=2), job()
    made.claimed([slow], 0.0)
    made.tick(2.0)
    carry_out(made, {1: 1}, 2.0)
    made.claimed([after], 2.1)
    assert taken(made) == [], "it gets nothing while it has not ended the job"
    made.ended(1, leases(slow), 2.2)
    assert taken(made) == [Assign(1, [after])]
    made.tick(2.0 + GRACE)
    assert carry_out(made, {1: 1}, 2.0 + GRACE) == [TakeBack(1)], "nor is it killed for it later, or reminded"
    assert made.next_tick() is None


def test_a_child_that_has_not_read_its_job_by_the_deadline_is_killed_and_the_job_is_not_to_blame() -> None:
    made = pool()
    stuck = job(timeout=2)
    made.claimed([stuck], 0.0)
    taken(made)
    made.tick(2.0)
    assert carry_out(made, {}, 2.0) == [TakeBack(1), Kill(1)]
    assert list(made.waiting) == [stuck]
    assert made.child_died(1, 2.1) == []


def test_a_child_that_leaves_its_job_unread_is_killed_and_another_one_gets_the_job() -> None:
    made = pool(2)
    stuck, other = jobs(2)
    made.claimed([stuck, other], 0.0)
    taken(made)
    made.ended(2, leases(other), 0.1)
    assert made.next_tick() == UNREAD_SECONDS
    made.tick(UNREAD_SECONDS)
    assert carry_out(made, {}, UNREAD_SECONDS) == [TakeBack(1), Kill(1), Assign(2, [stuck])]
    assert made.child_died(1, 2.1) == []


def test_a_child_is_asked_only_once_whether_it_has_read_its_job() -> None:
    made = pool()
    made.claimed(jobs(1), 0.0)
    taken(made)
    made.tick(UNREAD_SECONDS)
    assert carry_out(made, {1: 1}, UNREAD_SECONDS) == [TakeBack(1)]
    assert made.next_tick() is None


def test_an_idle_child_from_which_something_is_to_be_taken_back_is_not_stuck() -> None:
    made = pool()
    made.took_back(1, [], 10 * UNREAD_SECONDS)
    assert taken(made) == []


# -- cancels


def test_a_waiting_job_is_cancelled_at_once() -> None:
    made = pool()
    running, waiting = jobs(2)
    made.claimed([running, waiting], 0.0)
    taken(made)
    assert made.cancel(waiting.id, 0.1)
    (settle,) = taken(made)
    assert isinstance(settle, Settle)
    assert (settle.job, settle.report.ending) == (waiting, Ending.CANCELLED)


def test_an_assigned_job_is_cancelled_at_once_if_it_has_not_started() -> None:
    made = pool(1, mean_seconds=0.0005)
    first, second = jobs(2)
    made.claimed([first, second], 0.0)
    taken(made)
    assert made.cancel(second.id, 0.001)
    actions = carry_out(made, {1: 1}, 0.001)
    assert [(a.job, a.report.ending) for a in actions if isinstance(a, Settle)] == [(second, Ending.CANCELLED)]
    assert not any(isinstance(a, CallOff) for a in actions)


def test_a_running_job_is_called_off() -> None:
    made = pool()
    only = job()
    made.claimed([only], 0.0)
    taken(made)
    assert made.cancel(only.id, 0.1)
    assert carry_out(made, {1: 1}, 0.1)[-1] == CallOff(1, only.lease, SoftReason.CANCEL)
    assert made.child_died(1, 0.2) == [(only, SoftReason.CANCEL)]


def test_a_job_that_had_started_unknown_to_us_is_called_off_when_the_one_before_it_is_reported() -> None:
    made = pool(1, mean_seconds=0.0005)
    first, second = jobs(2)
    made.claimed([first, second], 0.0)
    taken(made)
    made.cancel(second.id, 0.001)
    assert carry_out(made, {1: 2}, 0.001) == [TakeBack(1)]
    made.ended(1, leases(first), 0.002)
    assert carry_out(made, {1: 1}, 0.002)[-1] == CallOff(1, second.lease, SoftReason.CANCEL)


def test_a_cancel_of_a_job_that_is_not_here_is_not_ours() -> None:
    made = pool()
    made.claimed(jobs(1), 0.0)
    assert not made.cancel(0, 0.0)


def _ends(made: Pool, only: ClaimedJob) -> None:
    carry_out(made, {1: 1}, 0.0)
    made.ended(1, leases(only), 0.1)


def _dies(made: Pool, only: ClaimedJob) -> None:
    carry_out(made, {1: 1}, 0.0)
    made.child_died(1, 0.1)
    made.starting = 1
    made.child_started(1, 1, 0.1)


def _never_starts(made: Pool, only: ClaimedJob) -> None:
    carry_out(made, {}, 0.0)


@pytest.mark.parametrize("end", [_ends, _dies, _never_starts])
def test_a_cancel_is_forgotten_with_its_job_which_may_be_retried(end: Callable[[Pool, ClaimedJob], None]) -> None:
    made = pool()
    only = job()
    made.claimed([only], 0.0)
    made.cancel(only.id, 0.0)
    end(made, only)
    taken(made)
    again = only._replace(lease=only.lease + 1000)
    made.claimed([again], 0.2)
    assert taken(made) == [Assign(1, [again])]


# -- pause


def test_what_has_not_started_of_a_paused_queue_goes_back() -> None:
    made = pool(1, mean_seconds=0.0005)
    running, behind = jobs(2, queue="emails")
    other = job(queue="reports")
    made.claimed([running, behind, other], 0.0)
    taken(made)
    made.pause(frozenset({"emails"}))
    assert released(carry_out(made, {1: 1}, 0.001)) == leases(behind)
    assert made.held_jobs() == [running, other]


def test_a_claim_of_a_queue_that_was_paused_meanwhile_goes_back() -> None:
    made = pool()
    made.pause(frozenset({"emails"}))
    late = job(queue="emails")
    made.claimed([late], 0.0)
    assert released(taken(made)) == leases(late)
    made.pause(frozenset())
    made.claimed([late], 0.0)
    assert taken(made) == [Assign(1, [late])]


# -- children


def test_a_dead_child_gets_nothing_more_and_only_what_it_had_started_dies_with_it() -> None:
    made = pool(1, mean_seconds=0.0005)
    running, behind, later = jobs(3)
    made.claimed([running, behind], 0.0)
    taken(made)
    made.child_lost(1)
    assert carry_out(made, {1: 1}, 0.001) == [TakeBack(1)]
    made.claimed([later], 0.001)
    assert taken(made) == []
    assert made.demand() == 0
    assert made.child_died(1, 0.002) == [(running, None)]
    assert list(made.waiting) == [behind, later]
    assert made.missing_children() == 1


def test_a_child_that_ends_by_itself_takes_no_job_along() -> None:
    made = pool(1, mean_seconds=0.0005)
    done, behind = jobs(2)
    made.claimed([done, behind], 0.0)
    taken(made)
    made.ended(1, leases(done), 0.001)
    made.child_lost(1)
    carry_out(made, {}, 0.001)
    assert made.child_died(1, 0.002) == []
    assert list(made.waiting) == [behind]


def test_never_more_children_than_size() -> None:
    made = Pool(size=2, kill_grace=GRACE)
    assert made.missing_children() == 2
    made.starting += 2
    assert made.missing_children() == 0
    made.resize(1)
    made.child_started(1, 1, 0.0)
    made.child_started(2, 1, 0.0)
    assert taken(made) == [Retire(2)], "one too many is let go of as soon as it comes"
    made.resize(3)
    assert made.missing_children() == 1, "one that is on its way out still counts"
    made.child_died(2, 0.0)
    assert made.missing_children() == 2


def test_a_smaller_size_lets_idle_children_go_first() -> None:
    made = pool(3)
    running = job()
    made.claimed([running], 0.0)
    taken(made)
    made.resize(1)
    assert taken(made) == [Retire(2), Retire(3)]


def test_a_new_generation_lets_the_old_children_finish_their_job_and_no_other() -> None:
    made = pool(1, mean_seconds=0.0005)
    running, behind = jobs(2)
    made.claimed([running, behind], 0.0)
    made.retire_older_than(1)
    taken(made)
    made.retire_older_than(2)
    assert carry_out(made, {1: 1}, 0.001) == [TakeBack(1), Retire(1)]
    assert list(made.waiting) == [behind]
    made.ended(1, leases(running), 0.002)
    assert taken(made) == []


def test_a_child_of_an_old_generation_that_comes_late_gets_no_job() -> None:
    made = Pool(size=2, kill_grace=GRACE)
    made.starting = 2
    made.claimed(jobs(1), 0.0)
    made.retire_older_than(2)
    made.child_started(1, 1, 0.0)
    assert taken(made) == [Retire(1)]


# -- the end


@pytest.mark.parametrize("mean_seconds", [0.0005, 10.0])
def test_a_drain_lets_running_jobs_finish_and_gives_the_rest_back(mean_seconds: float) -> None:
    made = pool(1, mean_seconds=mean_seconds)
    batch = jobs(12)
    running, late = batch[0], job()
    made.claimed(batch, 0.0)
    taken(made)
    made.drain()
    actions = carry_out(made, {1: 1}, 0.001)
    assert sorted(released(actions)) == leases(*batch[1:])
    assert Retire(1) in actions
    assert made.demand() == made.missing_children() == 0
    made.claimed([late], 0.001)
    assert released(taken(made)) == leases(late)
    assert made.held_jobs() == [running]


def test_an_interrupt_calls_off_what_runs() -> None:
    made = pool(2)
    running = job(timeout=2)
    timed_out = job(timeout=1)
    made.claimed([timed_out, running], 0.0)
    taken(made)
    made.tick(1.0)
    carry_out(made, {1: 1, 2: 1}, 1.0)
    made.interrupt(1.5)
    assert carry_out(made, {1: 1, 2: 1}, 1.5) == [TakeBack(2), CallOff(2, running.lease, SoftReason.SHUTDOWN)]
    made.tick(1.0 + GRACE)
    assert [a for a in taken(made) if a != Remind(2)] == [Kill(1)], (
        "the one called off before keeps its time and its reason"
    )
    assert made.child_died(1, 7.0) == [(timed_out, SoftReason.TIMEOUT)]


def test_a_dead_child_is_not_interrupted_so_that_its_crash_stays_one() -> None:
    made = pool(1)
    running = job()
    made.claimed([running], 0.0)
    made.child_lost(1)
    carry_out(made, {1: 1}, 0.1)
    made.interrupt(0.2)
    assert taken(made) == []
    assert made.child_died(1, 0.3) == [(running, None)]


def test_kill_all_kills_each_child_once_and_blames_no_job() -> None:
    made = pool(2)
    running = job()
    made.claimed([running], 0.0)
    taken(made)
    made.kill_all()
    made.kill_all()
    assert taken(made) == [Kill(1), Kill(2)]
    assert made.child_died(1, 0.0) == [(running, SoftReason.SHUTDOWN)]


def test_kill_all_lets_go_of_what_has_not_started_too() -> None:
    """It is the answer to a lost database: what another worker may soon run must not be started here."""
    made = pool(1, mean_seconds=WINDOW_SECONDS / 2)
    running, behind, waiting = jobs(3)
    made.claimed([running, behind, waiting], 0.0)
    taken(made)
    made.kill_all()
    assert released(taken(made)) == leases(waiting)
    made.child_lost(1)
    assert released(carry_out(made, {1: 1}, 0.1)) == leases(behind)
    assert made.held_jobs() == [running]


# -- reports


def test_a_childs_reports_may_wait_while_it_has_enough_to_go_on_with() -> None:
    made = pool(1, mean_seconds=REST_SECONDS / 2)
    batch = jobs(6)
    made.claimed(batch, 0.0)
    taken(made)
    assert made.rest(1) == REST_SECONDS
    made.ended(1, leases(batch[0]), 0.001)
    assert len(made.children[1].assigned) == 5
    assert made.rest(1) == REST_SECONDS
    made.ended(1, leases(batch[1]), 0.002)
    assert made.rest(1) == 0.0
    assert made.rest(7) == 0.0


# -- demand


@pytest.mark.parametrize(
    ("mean_seconds", "expected"),
    [(None, 2), (1.0, 2), (0.05, 4), (0.001, 116), (1e-6, MAX_CLAIM)],
)
def test_an_idle_pool_claims_what_it_can_run_soon(mean_seconds: float | None, expected: int) -> None:
    assert pool(2, mean_seconds=mean_seconds).demand() == expected


def test_long_jobs_are_claimed_one_a_free_child() -> None:
    made = pool(3, mean_seconds=10.0)
    made.claimed(jobs(2), 0.0)
    assert made.demand() == 1
    made.claimed(jobs(1), 0.0)
    assert made.demand() == 0


def test_prefetch_bounds_what_is_claimed_but_for_one_a_child() -> None:
    assert pool(2, mean_seconds=1e-5, prefetch=7).demand() == 7
    assert pool(4, mean_seconds=1e-5, prefetch=1).demand() == 4


def test_small_claims_wait_until_they_pay() -> None:
    made = pool(1, mean_seconds=0.001)  # a window of 5, and 50 ahead
    made.claimed(jobs(55), 0.0)
    assert made.demand() == 0
    made.ended(1, leases(*list(made.children[1].assigned)), 0.005)
    assert made.demand() == 0
    for _ in range(7):
        made.ended(1, leases(*list(made.children[1].assigned)), 0.005)
    assert made.demand() > 20


def _retiring(pool: Pool) -> None:
    pool.retire(1)


def _killed(pool: Pool) -> None:
    pool.kill_all()


def _lost(pool: Pool) -> None:
    pool.child_lost(1)


def _called_off(pool: Pool) -> None:
    pool.claimed(jobs(1), 0.0)
    pool.interrupt(0.0)


def _draining(pool: Pool) -> None:
    pool.drain()


@pytest.mark.parametrize("befall", [_retiring, _killed, _lost, _called_off, _draining])
def test_nothing_is_claimed_when_nobody_could_run_it(befall: Callable[[Pool], None]) -> None:
    made = pool(1)
    befall(made)
    assert made.demand() == 0


def test_outcomes_of_long_jobs_are_written_at_once_and_those_of_short_ones_together() -> None:
    long, short = pool(1, mean_seconds=1.0), pool(1, mean_seconds=0.0001)
    assert short.flush_delay() == 0.0, "nothing runs, so there is no company to wait for"
    long.claimed(jobs(1), 0.0)
    short.claimed(jobs(1), 0.0)
    assert long.flush_delay() == 0.0
    assert short.flush_delay() > 0.0


# -- throttled jobs


def test_there_is_prompt_room_for_one_job_a_child_that_is_not_at_a_long_one() -> None:
    made = pool(3, mean_seconds=0.001)
    assert made.prompt_room(0.0) == 3
    made.claimed(jobs(6), 10.0)
    assert made.prompt_room(10.0) == 3
    assert made.prompt_room(10.0 + 2 * STALL_SECONDS) == 0
    made.retire(1)
    assert made.prompt_room(10.0) == 2


def test_throttled_jobs_that_wait_for_a_child_take_its_prompt_room() -> None:
    made = pool(2)
    made.claimed([job() for _ in range(2)], 10.0)
    made.claimed([job()._replace(start_by=11.0), job()], 10.0)
    assert made.prompt_room(10.0) == 1
