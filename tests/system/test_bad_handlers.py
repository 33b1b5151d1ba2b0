"""Handlers that do the worst: that one job ends as it must, with an error that helps; nobody else notices."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import pytest

from chaos.fleet import state_of
from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon, eventually, is_alive
from tests.system.jobs import Jobs


@dataclass(frozen=True)
class Case:
    """A job that may run once, the state it ends in, and what its error and the trace must hold."""

    task: str
    args: dict[str, Any] = field(default_factory=dict)
    state: str = "discarded"
    error: str = ""
    trace: str = ""
    result: Any = None
    timeout_seconds: int | None = None
    label: str = ""

    def __str__(self) -> str:
        return self.label or self.task


CRASHES = [
    Case("os_exit", {"status": 0}, error="WorkerCrash: its process (pid ", label="os._exit(0)"),
    Case("signal_to_self", {"number": signal.SIGKILL}, error="was killed by signal 9 (SIGKILL)", label="SIGKILL"),
    Case("signal_to_self", {"number": signal.SIGTERM}, error="was killed by signal 15 (SIGTERM)", label="SIGTERM"),
    Case("signal_to_self", {"number": signal.SIGHUP}, error="was killed by signal 1 (SIGHUP)", label="SIGHUP"),
    Case("kill_group", error="was killed by signal 9 (SIGKILL)"),
    Case("segfault", error="was killed by signal 11 (SIGSEGV)", trace="in segfault"),
    Case("abort", error="was killed by signal 6 (SIGABRT)", trace="in abort"),
    Case("close_descriptors", {"first": 3}, error="closed file descriptors", label="close all but stdio"),
    Case("close_descriptors", {"first": 0}, error="closed file descriptors", label="close all"),
    Case("reuse_descriptors", error="closed file descriptors"),
]

FAILURES = [
    Case("sys_exit", {"status": 0}, error="SystemExit: 0", trace="in sys_exit"),
    Case("keyboard_interrupt", error="KeyboardInterrupt", trace="in keyboard_interrupt"),
    Case("sigint_to_self", error="KeyboardInterrupt", trace="in sigint_to_self"),
    Case("fork_and_return_twice", state="completed", result="original"),
    Case("fork_and_raise_twice", error="ValueError: both"),
    Case("print_much", {"number": 100_000_000}, state="completed"),
    Case("fail", error="ValueError: it went wrong", trace="raise ValueError(text)\nValueError: it went wrong"),
    Case("unserialisable", error="BadResult: cannot keep the result: a set is no JSON value"),
    Case("huge_result", error="it takes 100000002 bytes as JSON, more than max_result_bytes (1048576)"),
    Case("odd_result", {"kind": "nan"}, error="cannot keep the result: ", label="result NaN"),
    Case("odd_result", {"kind": "nul"}, error="it holds a NUL character", label="result with NUL"),
    Case("odd_result", {"kind": "surrogate"}, error="it holds a lone surrogate", label="result with surrogate"),
    Case("odd_result", {"kind": "circle"}, error="cannot keep the result: ", label="result in a circle"),
    Case("odd_result", {"kind": "key"}, error="cannot keep the result: ", label="result with a tuple for a key"),
    Case("returns_awaitable", error="declare it with `async def`"),
    Case("error_without_text", error="Unprintable: <its str() raised RuntimeError>", trace="in error_without_text"),
    Case("error_with_odd_text", error=r"ValueError: nul \x00, surrogate \udc80, and the rest"),
    Case("huge_error", error="characters left out"),
    Case("deep_recursion", error="RecursionError: maximum recursion depth exceeded", trace="in deep_recursion"),
    Case("echo", {"valeu": 1}, error="TypeError: echo() got an unexpected keyword argument 'valeu'"),
    Case("echo", {}, error="TypeError: echo() missing 1 required positional argument: 'value'", label="no args"),
    Case("typed", {"number": "seven"}, error="ValidationError: 2 validation errors for Order\nnumber\n"),
    Case("no_such_task", error="UnknownTaskError: no handler is registered for task 'no_such_task'"),
]

STUCK = [
    Case("stuck_in_sleep", timeout_seconds=1, error="TimeoutError", trace="in stuck_in_sleep"),
    Case("stuck_in_regex", timeout_seconds=1, error="TimeoutError", trace="in stuck_in_regex"),
    Case("stuck_in_c", timeout_seconds=1, error="and was killed", trace="in stuck_in_c"),
    Case("swallow_everything", timeout_seconds=1, error="and was killed", trace="in swallow_everything"),
    Case("deaf", timeout_seconds=1, error="TimeoutError: overran timeout_seconds (1)"),
    Case("coroutine", {"seconds": 60}, timeout_seconds=1, error="TimeoutError", trace="in coroutine"),
    Case("coroutine_cpu", {"seconds": 60}, timeout_seconds=1, error="and was killed", trace="in coroutine_cpu"),
]


@pytest.mark.parametrize("case", [*CRASHES, *FAILURES, *STUCK], ids=str)
def test_a_bad_handler_ends_its_own_job_and_no_other(shared_daemon: Daemon, shared_jobs: Jobs, case: Case) -> None:
    daemon, jobs = shared_daemon, shared_jobs
    with Neighbours(daemon, jobs):
        bad = jobs.add(case.task, case.args, max_attempts=1, timeout_seconds=case.timeout_seconds)
        behind = jobs.add_many(20, "noop")
        job = jobs.wait(bad)
        jobs.wait_all(behind)

    assert job.state == case.state, job
    assert job.attempt == 1
    assert job.result == case.result
    assert [(j.attempt, j.errors) for j in map(jobs.get, behind) if j.attempt != 1] == [], daemon.told()
    if case.state == "completed":
        assert job.errors == []
    else:
        (entry,) = job.errors
        assert entry["attempt"] == 1
        assert case.error in entry["error"]
        assert case.trace in entry["trace"]
        assert len(entry["error"]) <= 5_000
    assert jobs.crashes(bad) == (case in CRASHES)
    assert_at_full_strength(daemon, jobs)


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ("""{"x": 1e5000}""", "cannot decode args: Exceeds the limit (4300 digits) for integer string conversion"),
        ('{"x": 1%s.5}' % ("0" * 400), "cannot decode args: the number 1000"),
        ('{"x": ' + "[" * 5_000 + "]" * 5_000 + "}", "cannot decode args: they are nested too deeply for Python"),
    ],
    ids=["1e5000", "no float", "5,000 nested arrays"],
)
def test_arguments_that_python_cannot_decode_fail_their_own_job(
    shared_daemon: Daemon, shared_jobs: Jobs, args: str, error: str
) -> None:
    daemon, jobs = shared_daemon, shared_jobs
    with Neighbours(daemon, jobs):
        ((bad,),) = [
            row.values()
            for row in jobs.query("SELECT roost.enqueue('echo', args => %s::jsonb, max_attempts => 1)", args)
        ]
        behind = jobs.add_many(20, "noop")
        job = jobs.wait(bad)
        jobs.wait_all(behind)
    assert job.state == "discarded"
    assert error in job.errors[0]["error"]
    assert_at_full_strength(daemon, jobs)


@pytest.mark.parametrize("task", ["daemonise", "daemonise_and_die"])
def test_a_grandchild_in_its_own_session_dies_with_the_job(shared_daemon: Daemon, shared_jobs: Jobs, task: str) -> None:
    daemon, jobs = shared_daemon, shared_jobs
    job = jobs.add(task, {"key": task}, max_attempts=1, timeout_seconds=1)  # which it does not heed
    grandchild = int(daemon.wait_text(f"{task}.pid"))
    assert jobs.wait(job).state == "discarded"
    eventually(lambda: not is_alive(grandchild), f"end of the grandchild {grandchild}")
    eventually(lambda: state_of(grandchild) == "", f"burial of the grandchild {grandchild}", seconds=10)
    assert_at_full_strength(daemon, jobs)


def test_a_crash_is_not_given_the_stack_of_another_job(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"pools": {"default": {"queues": ["default"], "concurrency": 1}}})
    timed_out = jobs.add("stuck_in_sleep", max_attempts=1, timeout_seconds=1)
    assert "in stuck_in_sleep" in jobs.wait(timed_out).errors[0]["trace"]
    assert jobs.wait(jobs.add("os_exit", {"status": 3}, max_attempts=1)).errors[0]["trace"] == ""

    held = jobs.add("hold", {"key": "held"})
    daemon.wait_started("held")
    daemon.signal(signal.SIGUSR1)
    daemon.wait_for("child.stack", stack=lambda stack: "in hold" in stack)
    daemon.let_go("held")
    jobs.wait(held, "completed")
    assert jobs.wait(jobs.add("os_exit", {"status": 3}, max_attempts=1)).errors[0]["trace"] == ""


def test_zombies_of_handlers_are_gone_with_the_child_that_is_replaced_for_them(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    jobs = [shared_jobs.add("leave_zombies", {"number": 3}) for _ in range(100)]
    shared_jobs.wait_all(jobs)
    assert_at_full_strength(shared_daemon, shared_jobs)
    eventually(lambda: len(shared_daemon.zombies()) < 200, "end of the zombies")


class Neighbours:
    """A job in the other child of the pool, that must not notice what happens to this one's."""

    def __init__(self, daemon: Daemon, jobs: Jobs) -> None:
        self._daemon, self._jobs = daemon, jobs

    def __enter__(self) -> None:
        self._key = f"neighbour-{self._daemon.mark()}"
        self._job = self._jobs.add("hold", {"key": self._key})
        self._daemon.wait_started(self._key)

    def __exit__(self, *_: object) -> None:
        self._daemon.let_go(self._key)
        job = self._jobs.wait(self._job)
        assert (job.state, job.attempt, job.errors) == ("completed", 1, [])


def assert_at_full_strength(daemon: Daemon, jobs: Jobs) -> None:
    """Both children run a job at the same time, in processes that are the daemon's."""
    keys = [f"strength-{uuid4().hex}" for _ in range(2)]
    held = [jobs.add("hold", {"key": key}) for key in keys]
    daemon.wait_started(*keys)
    children = daemon.wait_children(2)
    daemon.let_go(*keys)
    assert {jobs.wait(job).result for job in held} == set(children)
