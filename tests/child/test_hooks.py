"""Hooks around real handlers in real children: when they run, what they are told, and what can't be done to them."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from roostd.core.outcome import SoftReason
from roostd.wire.frames import FrameKind
from tests.child.conftest import PATIENCE_SECONDS, Child, Template
from tests.child.test_current_job import Database, database  # noqa: F401 - a fixture

HOOKS = ["hooks", "async_hooks"]


class Hooked:
    """A child whose jobs say what happens to them in a file."""

    def __init__(self, child: Child, path: Path) -> None:
        self.child = child
        self._path = path

    def start(self, task: str, args: str = "{}", **metadata: Any) -> int:
        self._path.unlink(missing_ok=True)
        labels = json.dumps({"tags": None, "metadata": {"path": str(self._path), **metadata}})
        return self.child.start_raw(task, args, id=77, labels=labels)

    def lines(self) -> list[str]:
        return self._path.read_text().splitlines() if self._path.exists() else []

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while line not in self.lines():
            assert time.monotonic() < deadline, self.lines()
            time.sleep(0.005)


@pytest.fixture
def hooked(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Hooked]]:
    """Makes a child with these hooks; its standard error is that of the test."""
    with contextlib.ExitStack() as stack:

        def make(hooks: str) -> Hooked:
            template = Template(f"hooked:{hooks}")
            stack.enter_context(contextlib.closing(template.process))
            child = template.start().child()
            stack.callback(child.close)
            return Hooked(child, tmp_path / "said")

        yield make


Make = Callable[[str], Hooked]


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(
    ("task", "said", "kind"),
    [
        ("seen", ["handler", "after 'a result' NoneType"], FrameKind.COMPLETED),
        ("seen_in_coroutine", ["handler", "after True NoneType"], FrameKind.COMPLETED),
        ("seen_and_fail", ["after None KeyError"], FrameKind.FAILED),
        ("seen_and_snooze", ["after None SnoozeJob"], FrameKind.SNOOZED),
        ("seen_and_bad_result", ["after None BadResult"], FrameKind.FAILED),
    ],
)
def test_hooks_run_before_and_after_a_handler_and_are_told_how_it_ended(
    hooked: Make, hooks: str, task: str, said: list[str], kind: FrameKind
) -> None:
    it = hooked(hooks)
    for _ in range(2):
        it.start(task)
        assert it.child.outcome().kind is kind
        lines = [line.partition(" trace")[0].removesuffix(" none") for line in it.lines()]
        assert lines == [f"before {task}", *said, "end"]


@pytest.mark.parametrize(
    ("hooks", "task"), [("hooks", "seen"), ("hooks", "seen_in_coroutine"), ("async_hooks", "seen_in_coroutine")]
)
def test_what_a_hook_sets_in_the_context_the_handler_sees(hooked: Make, hooks: str, task: str) -> None:
    it = hooked(hooks)
    it.start(task)
    it.child.outcome()
    assert "handler trace 77" in it.lines()


def test_a_copy_of_the_process_that_before_job_made_does_not_run_the_handler(hooked: Make) -> None:
    it = hooked("hooks")
    it.start("seen", fork="before")
    assert it.child.outcome().kind is FrameKind.COMPLETED
    assert [line for line in it.lines() if line.startswith("handler")] == ["handler trace 77"]


def test_one_hook_is_enough(hooked: Make) -> None:
    it = hooked("only_after")
    it.start("seen")
    assert it.child.outcome().kind is FrameKind.COMPLETED
    assert it.lines() == ["handler none", "after a result {}"]


def test_no_hook_runs_for_a_job_without_a_handler(hooked: Make) -> None:
    it = hooked("hooks")
    it.start("no_such_task")
    assert it.child.outcome().kind is FrameKind.FAILED
    it.start("seen", '{"value": 1e5000}')
    assert it.child.outcome().kind is FrameKind.FAILED
    assert it.lines() == []


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("fails", ["before", "after"])
def test_a_hook_that_fails_is_logged_and_changes_nothing(
    hooked: Make, hooks: str, fails: str, capfd: pytest.CaptureFixture[str]
) -> None:
    it = hooked(hooks)
    lease = it.start("seen", fail=fails)
    outcome = it.child.outcome()
    assert (outcome.kind, outcome.body) == (FrameKind.COMPLETED, "a result")
    (entry,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if "hook.failed" in line]
    assert (entry["event"], entry["level"], entry["hook"]) == ("hook.failed", "error", f"{fails}_job")
    assert (entry["job_id"], entry["lease"], entry["task"]) == (77, lease, "seen")
    assert {"before": "ValueError: in before_job", "after": "SystemExit: 3"}[fails] in entry["exception"]
    it.start("seen")
    assert it.child.outcome().kind is FrameKind.COMPLETED


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("task", ["seen_and_sleep", "seen_and_sleep_in_coroutine"])
@pytest.mark.parametrize("reason", [SoftReason.TIMEOUT, SoftReason.CANCEL])
def test_after_job_runs_for_a_job_that_is_called_off(hooked: Make, hooks: str, task: str, reason: SoftReason) -> None:
    it = hooked(hooks)
    lease = it.start(task)
    it.wait_for("handler")
    it.child.call_off(lease, reason)
    kind, error = {
        SoftReason.TIMEOUT: (FrameKind.TIMED_OUT, "TimeoutError"),
        SoftReason.CANCEL: (FrameKind.CANCELLED, "JobCancelled"),
    }[reason]
    assert it.child.outcome().kind is kind
    assert it.lines()[-2:] == [f"after None {error}", "end"]


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("task", ["seen_and_sleep", "seen_and_sleep_in_coroutine"])
def test_a_call_off_during_before_job_is_raised_where_the_handler_would_start(
    hooked: Make, hooks: str, task: str
) -> None:
    it = hooked(hooks)
    lease = it.start(task, sleep_before=0.4)
    it.wait_for(f"before {task}")
    it.child.call_off(lease, SoftReason.TIMEOUT)
    outcome = it.child.outcome()
    assert (outcome.kind, outcome.error) == (FrameKind.TIMED_OUT, "TimeoutError: the job overran its timeout_seconds")
    assert it.lines() == [f"before {task}", "after None TimeoutError", "end"]


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("task", ["seen", "seen_in_coroutine"])
def test_a_call_off_during_after_job_is_not_raised_in_it_and_the_job_ends_as_it_had(
    hooked: Make, hooks: str, task: str
) -> None:
    it = hooked(hooks)
    lease = it.start(task, sleep_after=0.4)
    it.wait_for("after 'a result' NoneType" if task == "seen" else "after True NoneType")
    it.child.call_off(lease, SoftReason.TIMEOUT)
    assert it.child.outcome().kind is FrameKind.COMPLETED
    assert it.lines()[-1] == "end"


def test_a_hook_that_does_not_end_can_be_killed(hooked: Make) -> None:
    it = hooked("hooks")
    it.start("seen", sleep_after=60)
    it.wait_for("after 'a result' NoneType")
    it.child.process.kill()
    assert it.child.exit_status() == -signal.SIGKILL


def test_after_job_is_told_what_was_raised_after_a_commit(hooked: Make, database: Database) -> None:  # noqa: F811
    it = hooked("hooks")
    path = it._path
    labels = json.dumps({"tags": None, "metadata": {"path": str(path)}})
    lease = 5 * 10**7
    database.conn.execute("INSERT INTO roost.job_rows (id, task) VALUES (%s, 'seen_and_commit')", [lease])
    database.conn.execute("INSERT INTO roost.claims VALUES (%s, %s, gen_random_uuid(), now(), 1)", [lease, lease])
    args = json.dumps({"dsn": database.dsn})
    it.child.start_raw("seen_and_commit", args, lease=lease, id=lease, labels=labels)
    assert it.child.outcome().kind is FrameKind.COMMITTED
    assert it.lines()[-2:] == ["after None ValueError", "end"]
