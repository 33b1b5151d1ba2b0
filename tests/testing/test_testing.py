"""roost_client.testing: what a test sees of jobs, and runs in its own transaction as a worker would."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import BaseModel

from roost_client import (
    HandlerRegistry,
    Hooks,
    InvalidJobError,
    JobNotFoundError,
    JobState,
    JobStateError,
    Roost,
    RoostError,
    current_job,
    fixed,
    job,
)
from roost_client.testing import assert_enqueued, assert_not_enqueued, client_on, drain, run_job
from roostd import Worker

LATER = fixed(100)


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A test's connection, of which nothing is ever committed; with a row factory of the application's."""
    with psycopg.connect(dsn, row_factory=dict_row) as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def roost(dsn: str, conn: psycopg.Connection[Any]) -> Iterator[Roost]:
    with client_on(conn, dsn) as client:
        yield client


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with the handlers, imported anew, as children can import it, too."""
    folder = Path(__file__).parent
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("sample_tasks", folder / "sample_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sample_tasks", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registry() -> HandlerRegistry:
    return HandlerRegistry()


# What a run writes

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("result", {"value": {"deep": [1, 2.5, None, "ö"]}}, {}),
    ("result", {}, {}),
    ("result", {"unknown": 1}, {}),
    ("order", {"number": 3}, {}),
    ("order", {"number": "no number"}, {}),
    ("coroutine", {}, {}),
    ("coroutine", {"fails": True}, {}),
    ("fails", {}, {}),
    ("fails", {}, {"max_attempts": 1}),
    ("snoozes", {"seconds": 50}, {}),
    ("snoozes", {"seconds": -1e300}, {"max_attempts": 1}),
    *(("odd_result", {"kind": kind}, {}) for kind in ("set", "nan", "surrogate", "nul", "large", "awaitable")),
    *(("raises", {"kind": kind}, {}) for kind in ("odd", "interrupt", "cancelled", "nul", "long", "timeout")),
    ("exits", {}, {}),
    ("no_such_task", {}, {}),
    ("tells", {}, {"tags": ["a", "b"], "timeout_seconds": 60}),
    ("effect", {}, {}),
    *(("effect", {"fails": place}, {}) for place in ("inside", "statement", "after")),
]


def add_cases(roost: Roost, dsn: str, conn: psycopg.Connection[Any]) -> None:
    for number, (task, args, options) in enumerate(CASES):
        # A dsn is only passed where it is needed; what ends up in the traces is the same for both.
        given = {"dsn": dsn, **args} if task == "effect" else args
        roost.enqueue(task, args=given, metadata={"case": number}, conn=conn, **options)
    parent = roost.enqueue("result", metadata={"case": "parent"}, conn=conn)
    doomed = roost.enqueue("fails", max_attempts=1, metadata={"case": "doomed"}, conn=conn)
    child = roost.enqueue("result", depends_on=[parent], metadata={"case": "child"}, conn=conn)
    roost.enqueue("result", depends_on=[child], metadata={"case": "grandchild"}, conn=conn)
    roost.enqueue("result", depends_on=[doomed, parent], metadata={"case": "orphan"}, conn=conn)


def read_cases(conn: psycopg.Connection[Any]) -> dict[str, dict[str, Any]]:
    """What the runs have left of each job, without what differs from one run to the next."""
    cursor = psycopg.Cursor(conn, row_factory=dict_row)
    cursor.execute(
        "SELECT metadata ->> 'case' AS case, task, state, attempt, crashes, result, errors, cancel_requested,"
        " attempted_at IS NOT NULL AS attempted, completed_at IS NOT NULL AS completed,"
        " discarded_at IS NOT NULL AS discarded, cancelled_at IS NOT NULL AS cancelled,"
        " scheduled_at - greatest(attempted_at, inserted_at) > '40 s' AS is_later, lease"
        " FROM roost.jobs"
    )
    rows = {row.pop("case"): row for row in cursor}
    for row in rows.values():
        for error in row["errors"]:
            del error["at"]
            error["error"] = re.sub(r"job \d+", "job N", error["error"])
    return rows


def test_a_run_in_a_test_writes_what_a_run_under_a_worker_does(dsn: str, tasks: ModuleType) -> None:
    # Enqueued as by a program without the handlers: not all that they are given would pass their models.
    with Roost(dsn, registry=HandlerRegistry()) as roost, psycopg.connect(dsn) as conn:
        conn.execute("CREATE TABLE effects AS SELECT 0 AS n")
        conn.commit()
        add_cases(roost, dsn, conn)
        vars(tasks)["test_conn"] = conn
        drain(conn, registry=tasks.registry, retry_strategy=LATER)
        in_test = read_cases(conn)
        assert conn.execute("SELECT n FROM effects").fetchone() == (2,)
        conn.rollback()
        assert read_cases(conn) == {}
        add_cases(roost, dsn, conn)
        conn.commit()
        worker = Worker(dsn, registry=tasks.registry, concurrency=2, retry_strategy=LATER)
        asyncio.run(worker.run_once())
        under_worker = read_cases(conn)
    assert {row["state"] for row in in_test.values()} == {
        "available",
        "retryable",
        "completed",
        "discarded",
        "cancelled",
    }
    for case, row in under_worker.items():
        assert in_test[case] == row, case
    assert len(in_test) == len(under_worker) == len(CASES) + 5


def test_on_an_async_connection_the_same_is_awaited(dsn: str, tasks: ModuleType) -> None:
    async def main(roost: Roost) -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            with psycopg.connect(dsn) as other:
                ids = [roost.enqueue(task, conn=other) for task in ("coroutine", "fails", "result")]
                other.commit()
            with pytest.raises(RoostError, match="pass an AsyncConnection, and await"), psycopg.connect(dsn) as other:
                drain(other)
            found = await assert_enqueued(conn, task="fails", count=1)
            assert [each.id for each in found] == [ids[1]]
            await assert_not_enqueued(conn, task="tells")
            with pytest.raises(AssertionError, match="no job is enqueued with task='tells'"):
                await assert_enqueued(conn, task="tells")
            ran = await drain(conn, registry=tasks.registry, max_jobs=2)
            assert [each.state for each in ran] == ["completed", "retryable"]
            one = await run_job(conn, ids[2], registry=tasks.registry)
            assert one.state == "completed"
            await conn.rollback()
            await assert_enqueued(conn, count=3)

    with Roost(dsn) as roost:
        asyncio.run(main(roost))


def test_hooks_run_around_it_and_their_failures_are_logged(
    conn: psycopg.Connection[Any], roost: Roost, registry: HandlerRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    @job("hooked", registry=registry)
    async def hooked() -> str:
        seen.append("handler")
        return "r"

    async def before(job: Any, *, ctx: dict[str, Any]) -> None:
        ctx["n"] = job.id

    def after(job: Any, *, result: Any, error: Any, ctx: dict[str, Any]) -> None:
        seen.append((result, error, ctx))
        raise ValueError("a hook's")

    job_id = roost.enqueue("hooked")
    assert run_job(conn, job_id, registry=registry, hooks=Hooks(before, after)).state == "completed"
    assert seen == ["handler", ("r", None, {"n": job_id})]
    (record,) = caplog.records
    assert record.message.startswith("hook.failed hook=after_job")
    with pytest.raises(RoostError, match="no job runs here"):
        current_job()


# Which jobs run, and when


def test_jobs_run_in_a_workers_order_and_with_them_what_they_enqueue(
    conn: psycopg.Connection[Any], roost: Roost, registry: HandlerRegistry
) -> None:
    order: list[str] = []

    @job("note", registry=registry)
    def note(name: str, more: list[str] | None = None) -> None:
        order.append(name)
        for each in more or ():
            roost.enqueue("note", args={"name": each}, queue="b")

    roost.enqueue("note", args={"name": "second"})
    roost.enqueue("note", args={"name": "first", "more": ["third"]}, priority=-1)
    roost.enqueue("note", args={"name": "paused"}, queue="p")
    roost.enqueue("note", args={"name": "later"}, scheduled_at=datetime.now(UTC) + timedelta(hours=1))
    roost.enqueue("note", args={"name": "sooner"}, scheduled_at=datetime.now(UTC) + timedelta(minutes=1), priority=9)
    roost.pause_queue("p")
    assert len(drain(conn, queue="a", registry=registry)) == 0
    ran = drain(conn, queue=["default"], registry=registry)
    assert order == ["first", "second"]
    assert {each.state for each in ran} == {JobState.COMPLETED}
    assert len(drain(conn, registry=registry)) == 1
    assert len(drain(conn, registry=registry, with_scheduled=True, max_jobs=1)) == 1
    drain(conn, registry=registry, with_scheduled=True)
    assert order == ["first", "second", "third", "sooner", "later"]


def test_retries_run_when_what_is_due_later_does(
    conn: psycopg.Connection[Any], roost: Roost, tasks: ModuleType
) -> None:
    roost.enqueue("fails", max_attempts=3)
    assert [each.attempt for each in drain(conn, registry=tasks.registry, retry_strategy=LATER)] == [1]
    ran = drain(conn, registry=tasks.registry, retry_strategy=LATER, with_scheduled=True)
    assert [(each.attempt, each.state) for each in ran] == [(2, "retryable"), (3, "discarded")]
    assert len(ran[-1].errors) == 3
    ran = drain(conn, registry=tasks.registry, retry_strategy=fixed(0))
    assert ran == []


def test_a_job_of_a_throttled_task_runs_though_its_limit_is_reached(
    conn: psycopg.Connection[Any], roost: Roost, tasks: ModuleType
) -> None:
    conn.execute("INSERT INTO roost.throttles (task, rate_per_minute) VALUES ('result', 1)")
    for _ in range(3):
        roost.enqueue("result")
    assert len(drain(conn, registry=tasks.registry)) == 3


def test_one_job_runs_wherever_it_waits_and_else_the_error_says_why_not(
    conn: psycopg.Connection[Any], roost: Roost, tasks: ModuleType
) -> None:
    roost.pause_queue("default")
    job_id = roost.enqueue("result", args={"value": 1}, scheduled_at=datetime.now(UTC) + timedelta(days=1))
    child = roost.enqueue("result", depends_on=[job_id])
    with pytest.raises(JobStateError, match=f"cannot run job {child}: it waits for jobs on which it depends"):
        run_job(conn, child, registry=tasks.registry)
    assert run_job(conn, job_id, registry=tasks.registry).result == 1
    assert run_job(conn, child, registry=tasks.registry).state == "completed"
    with pytest.raises(JobStateError, match="it is completed"):
        run_job(conn, job_id, registry=tasks.registry)
    with pytest.raises(JobNotFoundError):
        run_job(conn, 10**15)
    with pytest.raises(InvalidJobError, match="job_id"):
        run_job(conn, "seven")  # type: ignore[call-overload]


def test_a_handler_that_ends_the_tests_transaction_is_told_of(
    conn: psycopg.Connection[Any], roost: Roost, registry: HandlerRegistry
) -> None:
    @job("commits", registry=registry)
    def commits() -> None:
        conn.rollback()

    roost.enqueue("commits")
    with pytest.raises(RoostError, match="its handler has ended the test's own transaction"):
        drain(conn, registry=registry)


def test_a_handler_whose_last_statement_failed_leaves_the_transaction_usable(
    conn: psycopg.Connection[Any], roost: Roost, registry: HandlerRegistry
) -> None:
    @job("divides", registry=registry)
    def divides() -> None:
        conn.execute("SELECT 1 / 0")

    roost.enqueue("divides", max_attempts=1)
    (ran,) = drain(conn, registry=registry)
    assert ran.state == "discarded"
    assert ran.errors[0]["error"].startswith("DivisionByZero: ")


def test_nothing_runs_on_a_connection_that_would_commit_it(dsn: str, tasks: ModuleType) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn, Roost(dsn) as roost:
        with pytest.raises(RoostError, match="commits each statement"):
            drain(conn)
        with conn.transaction(force_rollback=True):
            roost.enqueue("result", conn=conn)
            assert len(drain(conn, registry=tasks.registry)) == 1
        assert_not_enqueued(conn)


# What was enqueued


class Receipt(BaseModel):
    order: int
    when: datetime


def test_jobs_are_found_by_what_they_must_have(conn: psycopg.Connection[Any], roost: Roost, tasks: ModuleType) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    first = roost.enqueue("result", args={"value": [1, {"a": None}]}, tags=["x", "y"])
    second = roost.enqueue("result", args={"value": 2}, queue="other", scheduled_at=soon)
    third = roost.enqueue("send", args=Receipt(order=3, when=soon))

    def found(**wanted: Any) -> list[int]:
        return [each.id for each in assert_enqueued(conn, **wanted)]

    assert found() == [first, second, third]
    assert found(task="result", count=2) == [first, second]
    assert found(task=tasks.result, registry=tasks.registry) == [first, second]
    assert found(args={"value": (1, {"a": None})}) == [first]
    assert found(args=Receipt(order=3, when=soon)) == found(args={"order": 3}) == [third]
    assert found(queue="other", scheduled_at=soon) == [second]
    assert found(scheduled_at=(soon - timedelta(minutes=1), soon + timedelta(minutes=1))) == [second]
    assert found(tags=["y"]) == [first]
    assert found(task="nothing", count=0) == []
    assert_not_enqueued(conn, queue="other", args={"value": 3})
    drain(conn, queue="default", registry=tasks.registry)
    assert found(task="result") == [second]  # the other has run


def test_a_failure_tells_what_there_is_the_nearest_first(conn: psycopg.Connection[Any], roost: Roost) -> None:
    with pytest.raises(AssertionError, match=r"^no job is enqueued with any; there are none at all$"):
        assert_enqueued(conn)
    far = roost.enqueue("other", queue="q")
    near = roost.enqueue("send", args={"order": 2}, tags=["vip"])
    with pytest.raises(AssertionError) as caught:
        assert_enqueued(conn, task="send", args={"order": 1}, tags=["vip"])
    assert str(caught.value).splitlines() == [
        "no job is enqueued with task='send', args={'order': 1}, tags=('vip',); those that are, the nearest first:",
        f"  job {near}: 'send' in queue 'default', args {{'order': 2}}, tags ['vip']: differs in args.order",
        f"  job {far}: 'other' in queue 'q', args {{}}: differs in task, args.order, tag vip",
    ]
    with pytest.raises(AssertionError, match="1 jobs are enqueued with task='send', not 2"):
        assert_enqueued(conn, task="send", count=2)
    with pytest.raises(AssertionError, match=f"enqueued with task='send':\n  job {near}: 'send'"):
        assert_not_enqueued(conn, task="send")
    for _ in range(20):
        roost.enqueue("more")
    with pytest.raises(AssertionError, match="and 12 more"):
        assert_enqueued(conn, task="none")


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ({"task": ""}, "task"),
        ({"args": {"x": float("nan")}}, "args.x"),
        ({"tags": "one"}, "tags"),
        ({"tags": 5}, "tags"),
        ({"queue": 5}, "queue"),
        ({"count": "1"}, "count"),
        ({"count": -1}, "count"),
        ({"scheduled_at": datetime(2030, 1, 1)}, "scheduled_at"),
        ({"scheduled_at": datetime.max.replace(tzinfo=UTC)}, "scheduled_at"),
        ({"scheduled_at": 5}, "scheduled_at"),
    ],
)
def test_what_no_job_could_be_like_is_refused(conn: psycopg.Connection[Any], wanted: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        assert_enqueued(conn, **wanted)
    assert path in str(caught.value)


@pytest.mark.parametrize("option", ["queue", "max_jobs", "registry", "hooks", "retry_strategy"])
def test_what_nothing_could_run_by_is_refused(conn: psycopg.Connection[Any], option: str) -> None:
    with pytest.raises(InvalidJobError, match=f"cannot run jobs: {option} must be"):
        drain(conn, **{option: 1.5})  # type: ignore[call-overload]
