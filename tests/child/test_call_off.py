"""A running job is called off: its handler is told, no other job is hit, and what is reported is true."""

from __future__ import annotations

import random
import signal
import time
from collections import defaultdict
from typing import Any

import pytest

from roostd.core.outcome import SoftReason
from roostd.wire.frames import FrameKind
from roostd.wire.packets import encode_control
from roostd.wire.signals import SOFT
from tests.child.conftest import Child, Post

TIMEOUT, CANCEL, SHUTDOWN = SoftReason.TIMEOUT, SoftReason.CANCEL, SoftReason.SHUTDOWN
KIND = {TIMEOUT: FrameKind.TIMED_OUT, CANCEL: FrameKind.CANCELLED, SHUTDOWN: FrameKind.INTERRUPTED}
ERROR = {
    TIMEOUT: "TimeoutError: the job overran its timeout_seconds",
    CANCEL: "JobCancelled: the job was cancelled",
    SHUTDOWN: "JobInterrupted: the worker is shutting down",
}
NAME = {reason: error.partition(":")[0] for reason, error in ERROR.items()}


def started(child: Child, post: Post, task: str, **args: Any) -> int:
    lease = child.start(task, post=post.path, **args)
    post.wait_for("started")
    return lease


# -- the handler is told


@pytest.mark.parametrize("reason", SoftReason)
@pytest.mark.parametrize("task", ["sleep", "spin", "sleep_in_coroutine"])
def test_a_running_job_ends_for_the_reason_given(child: Child, post: Post, task: str, reason: SoftReason) -> None:
    lease = started(child, post, task)
    child.call_off(lease, reason)
    outcome = child.outcome()
    assert (outcome.kind, outcome.lease, outcome.error) == (KIND[reason], lease, ERROR[reason])
    assert f"in {task}" in outcome.trace
    assert child.result("pid") == child.pid


@pytest.mark.parametrize("task", ["wait_for_lock", "wait_for_thread", "wait_for_process", "match"])
def test_a_job_that_waits_in_c_is_reached_too(child: Child, post: Post, task: str) -> None:
    child.call_off(started(child, post, task), TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT
    assert child.result("pid") == child.pid


def test_a_handler_may_clean_up(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "clean_up"))
    assert child.outcome().kind is FrameKind.CANCELLED
    assert post.words() == ["started", "cleaning", "clean"]


def test_the_clean_up_is_not_interrupted_by_being_told_again(child: Child, post: Post) -> None:
    lease = started(child, post, "clean_up")
    child.call_off(lease)
    while "cleaning" not in post.words():
        assert child.says_nothing(0.01)  # and is reminded: a signal just before the sleep begins does not end it
    for reason in SoftReason:
        child.call_off(lease, reason)
    assert child.outcome().kind is FrameKind.CANCELLED
    assert post.words() == ["started", "cleaning", "clean"]


def test_a_coroutine_sees_a_cancellation(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "sleep_in_coroutine"), TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT
    assert post.words() == ["started", "cancelled"]


def test_a_coroutine_that_blocks_is_cancelled_when_it_next_waits(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "block_in_coroutine"))
    assert child.outcome().kind is FrameKind.CANCELLED


def test_a_group_of_tasks_is_cancelled(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "group_in_coroutine"))
    assert child.outcome().kind is FrameKind.CANCELLED
    assert child.result("echo_in_coroutine", value=1) == 1


@pytest.mark.parametrize("task", ["catch_everything", "match"])
def test_the_stack_is_noted_should_the_handler_be_stuck(child: Child, post: Post, task: str) -> None:
    lease = started(child, post, task)
    child.call_off(lease, TIMEOUT)
    deadline = time.monotonic() + 20
    while f"in {task}" not in child.process.read_dump():
        assert time.monotonic() < deadline
        child.process.remind(lease)
        time.sleep(0.005)


# -- handlers that won't hear


@pytest.mark.parametrize("reason", SoftReason)
def test_a_job_that_swallows_it_and_returns_was_called_off_all_the_same(
    child: Child, post: Post, reason: SoftReason
) -> None:
    child.call_off(started(child, post, "swallow", value=7), reason)
    outcome = child.outcome()
    assert outcome.kind is KIND[reason]
    assert outcome.error.startswith(NAME[reason] if reason is TIMEOUT else "Job")
    assert "caught the exception and returned" in outcome.error
    assert post.words() == ["started", NAME[reason]]


def test_a_coroutine_that_swallows_it_and_returns_was_too(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "swallow_in_coroutine"), TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT


def test_a_job_that_fails_with_something_else_was_called_off_and_both_are_told(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "swallow_and_fail"), TIMEOUT)
    outcome = child.outcome()
    assert outcome.kind is FrameKind.TIMED_OUT
    assert outcome.error == "TimeoutError: ended by ValueError: something else"


def test_a_job_that_catches_everything_goes_on_until_it_is_killed(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "catch_everything"))
    while post.words().count("started") < 2:
        assert child.is_alive()
    child.process.kill()
    assert child.exit_status() == -signal.SIGKILL


# -- the job that is meant, and no other


def test_a_call_off_of_another_lease_is_dropped(child: Child, post: Post) -> None:
    lease = started(child, post, "sleep")
    for other in (lease - 1, lease + 1, 0, -1, 2**62):
        child.call_off(other)
    child.call_off(lease, TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT


def test_a_call_off_that_comes_too_late_is_dropped(child: Child) -> None:
    for number in range(50):
        late = child.start("echo", value=number)
        assert child.outcome().kind is FrameKind.COMPLETED
        child.call_off(late)
        assert child.result("loop_count", number=100) == sum(range(100)) + 20


@pytest.mark.parametrize("task", ["sleep", "sleep_in_coroutine", "spin"])
def test_a_call_off_that_comes_before_the_job_is_heeded_at_its_start(child: Child, post: Post, task: str) -> None:
    """The master knows that the child has read the job, not how far it is with that: its arguments may be large."""
    lease = 10**9
    child.call_off(lease)
    child.start(task, post=post.path, lease=lease)
    assert child.outcome().kind is FrameKind.CANCELLED
    assert post.words() == []
    assert child.result("pid") == child.pid


def test_what_was_called_off_says_nothing_of_a_job_that_fails_before_its_handler_runs(child: Child, post: Post) -> None:
    child.call_off(started(child, post, "sleep"))
    assert child.outcome().kind is FrameKind.CANCELLED
    child.failure("no_such_task")
    child.start_raw("echo", '{"value": 1e5000}')
    assert child.outcome().kind is FrameKind.FAILED


def test_a_signal_without_a_message_means_nothing(child: Child, post: Post) -> None:
    lease = started(child, post, "sleep")
    for _ in range(100):
        signal.pidfd_send_signal(child.process.pidfd, SOFT)
    child.call_off(lease, TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT


def test_an_unknown_reason_means_nothing_either(child: Child, post: Post) -> None:
    lease = started(child, post, "sleep")
    child.process._control.send(encode_control(9, lease))
    child.process._control.send(b"garbage")
    signal.pidfd_send_signal(child.process.pidfd, SOFT)
    child.call_off(lease, TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT


def test_an_exception_of_the_handler_s_own_is_no_call_off(child: Child) -> None:
    assert child.failure("fail", kind="TimeoutError").kind is FrameKind.FAILED


@pytest.mark.parametrize(
    ("task", "numbers"), [("loop_count", (10, 4_000)), ("loop_count_in_coroutine", (10, 1_000)), ("echo", None)]
)
@pytest.mark.parametrize("seed", range(2))
def test_signals_at_random_moments_never_hit_another_job_and_lose_none(
    child: Child, task: str, numbers: tuple[int, int] | None, seed: int
) -> None:
    """Some thousand short jobs, each with call-offs in its way: of itself, of the one before it, of the next."""
    rng = random.Random(seed)
    meant: defaultdict[int, set[SoftReason]] = defaultdict(set)
    expected: dict[int, object] = {}
    waiting: list[int] = []
    hits = dict.fromkeys(FrameKind, 0)
    coroutines = task.endswith("coroutine")

    def give() -> None:
        if numbers is None:
            value = rng.random()
            lease = child.start(task, value=value)
            expected[lease] = value
        else:
            number = rng.randint(*numbers)
            lease = child.start(task, number=number)
            expected[lease] = sum(range(number)) + 20
        waiting.append(lease)

    def take() -> None:
        lease = waiting.pop(0)
        outcome = child.outcome()
        assert outcome.lease == lease
        hits[outcome.kind] += 1
        if outcome.kind is FrameKind.COMPLETED:
            assert outcome.body == expected[lease]
        else:
            assert any(KIND[reason] is outcome.kind for reason in meant[lease]), outcome
            assert outcome.error.startswith(("TimeoutError: ", "JobCancelled: ", "JobInterrupted: ")), outcome

    for _ in range(300 if coroutines else 1_000):
        while len(waiting) < rng.choice([1, 1, 2, 4]):
            give()
        for _ in range(rng.choice([0, 1, 1, 2])):
            pause_until = time.perf_counter() + rng.uniform(0, 0.0003)
            while time.perf_counter() < pause_until:
                pass
            reason = rng.choice(list(SoftReason))
            lease = rng.choice([waiting[0], waiting[0], waiting[0] - 1, waiting[-1], waiting[-1] + 1, 0])
            meant[lease].add(reason)
            child.call_off(lease, reason)
        take()
    while waiting:
        take()
    child.run("echo", value=None)  # it may have been called off
    assert child.result("pid") == child.pid
    assert hits[FrameKind.COMPLETED] > 50
    assert sum(hits.values()) - hits[FrameKind.COMPLETED] > 20, "no signal hit its mark"
    assert hits[FrameKind.FAILED] == hits[FrameKind.SNOOZED] == 0


def test_the_child_keeps_no_descriptor_of_coroutines_that_were_called_off(child: Child, post: Post) -> None:
    before = child.result("descriptors")
    for _ in range(20):
        lease = started(child, post, "sleep_in_coroutine")
        child.call_off(lease)
        child.outcome()
        post.forget()
    assert child.result("descriptors") == before
