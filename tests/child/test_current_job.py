"""What current_job() says in a real child, and what a child reports of jobs that completed themselves."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from roostd.core.outcome import SoftReason
from roostd.wire.frames import FrameKind
from tests.child.conftest import PATIENCE_SECONDS, Child, Outcome, Post, Template

TIMEOUT, CANCEL = SoftReason.TIMEOUT, SoftReason.CANCEL
_leases = itertools.count(10**7)


# -- the job


@pytest.mark.parametrize("task", ["describe", "describe_in_coroutine"])
def test_a_handler_and_its_helpers_see_the_job(child: Child, task: str) -> None:
    labels = json.dumps({"tags": ["a", "ü"], "metadata": {"trace": "00-1"}})
    lease = child.start_raw(task, "{}", id=77, attempt=3, queue="emails", timeout_seconds=1000, labels=labels)
    body = child.outcome().body
    left = body.pop("left")
    assert body == {
        "id": 77,
        "attempt": 3,
        "lease": lease,
        "queue": "emails",
        "task": task,
        "tags": ["a", "ü"],
        "metadata": {"trace": "00-1"},
    }
    assert 900 < left < 1000
    body = child.result(task)  # which has none of that
    assert (body["tags"], body["metadata"], body["left"]) == ([], {}, None)


def test_metadata_as_large_as_they_may_be_reach_the_job(child: Child) -> None:
    metadata = {"text": "x" * 1_000_000}
    child.start_raw("describe", "{}", labels=json.dumps({"tags": None, "metadata": metadata}))
    assert child.outcome().body["metadata"] == metadata


def test_a_thread_of_the_handlers_own_has_no_current_job(child: Child) -> None:
    assert "hand the object to the threads" in child.result("describe_in_thread")


def test_a_cancel_is_seen_before_its_signal_is_and_while_it_is_handled(child: Child, post: Post) -> None:
    lease = child.start("see_cancel", post=post.path)
    post.wait_for("started")
    child.call_off(lease)
    post.wait_for("seen")
    assert child.outcome().kind is FrameKind.CANCELLED
    assert "and True" in post.words()


def test_a_timeout_is_no_cancel(child: Child, post: Post) -> None:
    lease = child.start("look_for_cancel", number=1_000_000)
    child.call_off(lease, TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT


@pytest.mark.parametrize("pause", [number / 20_000 for number in range(20)])
def test_a_handler_that_looks_for_a_cancel_all_the_time_is_interrupted_by_it(child: Child, pause: float) -> None:
    lease = child.start("look_for_cancel", number=1_000_000)
    time.sleep(pause)
    child.call_off(lease)
    assert child.outcome().kind is FrameKind.CANCELLED
    assert child.result("look_for_cancel", number=10) == 0


# -- its log


@pytest.fixture
def talking(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[Child, Callable[[], list[str]]]]]:
    """Makes a child, of a template of its own, whose stderr is read. In the test: until then capfd has not begun."""
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> tuple[Child, Callable[[], list[str]]]:
            template = Template()
            stack.enter_context(contextlib.closing(template.process))
            child = template.start().child(**settings)
            stack.callback(child.close)
            return child, lambda: capfd.readouterr().err.splitlines()

        yield make


def test_what_a_job_logs_is_a_line_of_the_daemons_log(talking: Callable[..., Any]) -> None:
    child, lines = talking()
    lease = child.start_raw(
        "say", json.dumps({"text": "line 1\nline 2", "level": 30}), id=77, attempt=3, queue="emails"
    )
    assert child.outcome().kind is FrameKind.COMPLETED
    (line,) = lines()
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "level": "warning",
        "event": "job.logged",
        "job_id": 77,
        "attempt": 3,
        "lease": lease,
        "queue": "emails",
        "task": "say",
        "order": 17,
        "message": "line 1\nline 2",
    }


def test_the_level_of_the_daemons_log_holds_for_it(talking: Callable[..., Any]) -> None:
    child, lines = talking(log_level="warning")
    for level in (10, 20, 30, 35, 50):
        child.result("say", text="x", level=level)
    assert [json.loads(line)["level"] for line in lines()] == ["warning", "warning", "critical"]


def test_under_journald_it_bears_its_priority(talking: Callable[..., Any]) -> None:
    child, lines = talking(log_format="journald")
    child.result("say", text="to whom", level=40)
    (line,) = lines()
    assert line.startswith("<3>job.logged ")
    assert 'message="to whom"' in line


def test_an_exception_comes_with_its_traceback_and_but_once(talking: Callable[..., Any]) -> None:
    child, lines = talking()
    child.result("say_error")
    (line,) = lines()
    entry = json.loads(line)
    assert (entry["message"], entry["level"]) == ("it failed", "error")
    assert entry["exception"].endswith("ValueError: no good")


# -- its transaction


class Database:
    """A database with a counter, and the claims that the children's jobs stand for."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True)
        self.conn.execute("CREATE TABLE counter (n integer)")
        self.conn.execute("INSERT INTO counter VALUES (0)")

    def start(self, child: Child, task: str, **args: Any) -> int:
        lease = next(_leases)
        self.conn.execute(
            "INSERT INTO roost.job_rows (id, task) OVERRIDING SYSTEM VALUE VALUES (%s, %s)", [lease, task]
        )
        self.conn.execute(
            "INSERT INTO roost.claims (job_id, lease, worker_id, attempt) VALUES (%s, %s, gen_random_uuid(), 1)",
            [lease, lease],
        )
        return child.start_raw(task, json.dumps({"dsn": self.dsn, **args}), lease=lease, id=lease)

    def run(self, child: Child, task: str, **args: Any) -> Outcome:
        self.start(child, task, **args)
        return child.outcome()

    def holds(self) -> tuple[int, list[str]]:
        """The counter, and the states of the jobs."""
        (n,) = self.conn.execute("SELECT n FROM counter").fetchone() or (None,)
        return int(n), [row[0] for row in self.conn.execute("SELECT state FROM roost.jobs ORDER BY id")]

    def wait(self, query: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.conn.execute(query.encode()).fetchone():
            assert time.monotonic() < deadline, query
            time.sleep(0.005)

    def slow_commits(self) -> None:
        """Has COMMITs wait for a lock, which is held from now on."""
        self.conn.execute(
            "CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'"
        )
        self.conn.execute(
            "CREATE CONSTRAINT TRIGGER waits AFTER UPDATE ON counter DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION wait_at_commit()"
        )
        self.conn.execute("SELECT pg_advisory_lock(1)")

    def wait_commit(self) -> None:
        self.wait(
            "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'handler'"
            " AND query = 'COMMIT' AND wait_event_type = 'Lock'"
        )

    def let_commit(self) -> None:
        self.conn.execute("SELECT pg_advisory_unlock(1)")


@pytest.fixture
def database(dsn: str) -> Iterator[Database]:
    made = Database(dsn)
    with contextlib.closing(made.conn):
        yield made


@pytest.mark.parametrize("mode", ["plain", "autocommit"])
@pytest.mark.parametrize("then", ["return", "return an object"])
def test_a_job_that_has_committed_is_reported_as_that(child: Child, database: Database, mode: str, then: str) -> None:
    outcome = database.run(child, "commit", mode=mode, then=then, result=[7])
    assert (outcome.kind, outcome.body) == (FrameKind.COMMITTED, None)
    assert database.holds() == (1, ["completed"])
    assert database.conn.execute("SELECT result FROM roost.jobs").fetchone() == ([7],)


@pytest.mark.parametrize("task", ["commit_in_coroutine", "commit_in_thread"])
def test_so_is_one_whose_coroutine_or_thread_has(child: Child, database: Database, task: str) -> None:
    assert database.run(child, task).kind is FrameKind.COMMITTED
    assert database.holds() == (1, ["completed"])


def test_what_a_handler_raises_after_the_commit_is_told_with_it(child: Child, database: Database) -> None:
    outcome = database.run(child, "commit", then="fail")
    assert (outcome.kind, outcome.error) == (FrameKind.COMMITTED, "ValueError: after it")
    assert database.holds() == (1, ["completed"])


@pytest.mark.parametrize("reason", SoftReason)
def test_so_is_a_call_off_after_the_commit(child: Child, database: Database, post: Post, reason: SoftReason) -> None:
    lease = database.start(child, "commit_and_wait", post=post.path)
    post.wait_for("committed")
    child.call_off(lease, reason)
    assert child.outcome().kind is FrameKind.COMMITTED
    assert database.holds() == (1, ["completed"])


def test_of_a_commit_that_is_left_to_the_surrounding_transaction_the_child_is_not_sure(
    child: Child, database: Database
) -> None:
    outcome = database.run(child, "commit", mode="nested", then="return")
    assert (outcome.kind, outcome.body) == (FrameKind.UNCONFIRMED, None)
    assert database.holds() == (1, ["completed"])


def test_a_handler_that_fails_in_the_surrounding_transaction_has_just_failed(child: Child, database: Database) -> None:
    outcome = database.run(child, "commit", mode="nested", then="fail")
    assert (outcome.kind, outcome.error) == (FrameKind.FAILED, "ValueError: after it")
    assert database.holds() == (0, ["executing"])


def test_a_handler_that_swallows_its_rollback_and_returns_has_completed(child: Child, database: Database) -> None:
    outcome = database.run(child, "swallow_rollback")
    assert (outcome.kind, outcome.body) == (FrameKind.COMPLETED, "done another way")
    assert database.holds() == (0, ["executing"])


def test_a_lease_that_was_lost_fails_the_run(child: Child, database: Database) -> None:
    lease = next(_leases)
    child.start_raw("commit", json.dumps({"dsn": database.dsn}), lease=lease, id=lease)
    outcome = child.outcome()
    assert outcome.kind is FrameKind.FAILED
    assert outcome.error.startswith("LeaseLostError: cannot complete job ")
    assert database.holds() == (0, [])


@pytest.mark.parametrize("reason", SoftReason)
def test_a_call_off_waits_for_the_commit_and_is_then_told(child: Child, database: Database, reason: SoftReason) -> None:
    database.slow_commits()
    lease = database.start(child, "commit", then="sleep")
    database.wait_commit()
    child.call_off(lease, reason)
    assert child.says_nothing(0.3)
    database.let_commit()
    outcome = child.outcome()
    assert outcome.kind is FrameKind.COMMITTED
    assert outcome.error.startswith(("TimeoutError: the", "JobCancelled: the", "JobInterrupted: the"))
    assert database.holds() == (1, ["completed"])
    assert child.result("pid") == child.pid


@pytest.mark.parametrize("then", ["return", "wait"])
def test_a_call_off_of_a_coroutine_waits_for_the_commit_too(child: Child, database: Database, then: str) -> None:
    database.slow_commits()
    lease = database.start(child, "commit_in_coroutine", then=then)
    database.wait_commit()
    child.call_off(lease, TIMEOUT)
    assert child.says_nothing(0.3)
    database.let_commit()
    outcome = child.outcome()
    assert outcome.kind is FrameKind.COMMITTED
    assert outcome.error.startswith("TimeoutError: the job overran")
    assert database.holds() == (1, ["completed"])


def test_a_commit_whose_answer_is_lost_is_a_failure_that_the_lease_will_judge(child: Child, database: Database) -> None:
    database.slow_commits()
    outcome = database.run(child, "lose_the_answer")
    assert outcome.kind is FrameKind.FAILED
    assert outcome.error.startswith("OperationalError: ")
    assert database.holds() == (0, ["executing"])
    database.let_commit()
    database.wait("SELECT 1 FROM counter WHERE n = 1")
    assert database.holds() == (1, ["completed"])


def test_a_block_that_is_called_off_in_a_statement_is_rolled_back_and_its_connection_closed(
    child: Child, database: Database, post: Post
) -> None:
    lease = database.start(child, "sleep_in_block", post=post.path)
    post.wait_for("started")
    database.wait("SELECT 1 FROM pg_stat_activity WHERE application_name = 'handler' AND query LIKE '%pg_sleep%'")
    child.call_off(lease, TIMEOUT)
    assert child.outcome().kind is FrameKind.TIMED_OUT
    assert child.result("is_kept_connection_closed")
    assert database.holds() == (0, ["executing"])


@pytest.mark.parametrize("seed", range(2))
def test_signals_at_random_moments_leave_what_is_reported_and_what_is_stored_in_agreement(
    make_child: Callable[..., Child], database: Database, seed: int
) -> None:
    rng = random.Random(seed)
    child = make_child()
    database.run(child, "commit")  # imports, first connection
    effects = 1
    kinds = dict.fromkeys(FrameKind, 0)
    for _ in range(150):
        lease = database.start(child, rng.choice(["commit", "commit_in_coroutine"]))
        time.sleep(rng.uniform(0, 0.02))
        child.call_off(lease, rng.choice([TIMEOUT, CANCEL]))
        kind = child.outcome().kind
        kinds[kind] += 1
        (state,) = database.conn.execute("SELECT state FROM roost.jobs WHERE id = %s", [lease]).fetchone() or ("",)
        assert (state == "completed") == (kind is FrameKind.COMMITTED)
        effects += kind is FrameKind.COMMITTED
    assert database.holds()[0] == effects
    assert kinds[FrameKind.COMMITTED] > 5
    assert kinds[FrameKind.TIMED_OUT] + kinds[FrameKind.CANCELLED] > 5
