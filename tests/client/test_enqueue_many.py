"""Many jobs in one round trip: every field, the order, and all or none."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from roost_client import HandlerRegistry, InvalidJobError, JobInsert, Roost, TaskDefaults, statements

Jobs = Callable[[], list[dict[str, Any]]]
FIELDS = ("task", "args", "queue", "priority", "max_attempts", "scheduled_at", "tags", "timeout_seconds", "metadata")


def random_job(rng: random.Random, number: int) -> JobInsert:
    return JobInsert(
        rng.choice(["a", "b'\"\\", "é😀", "\x01"]),
        {"number": number, "text": rng.choice(["\x01\x02\x1f", '"\\,{}', "NULL", "é😀", ""])},
        queue=rng.choice(["q1", "q2"]),
        priority=rng.randrange(-3, 3),
        max_attempts=rng.randrange(1, 4),
        scheduled_at=rng.choice([datetime(2020, 1, 1, tzinfo=UTC), datetime(2050, 1, 1, tzinfo=UTC)])
        + timedelta(seconds=rng.randrange(3)),
        tags=rng.choice([[], ["x"], ["x", 'y"\\,{}'], ["NULL", ""]]),
        timeout_seconds=rng.choice([None, 1, 60]),
        metadata=rng.choice([{}, {}, {"trace": number, "sep": "\x01"}]),
    )


def test_every_field_and_the_order_are_kept(roost: Roost, jobs: Jobs, observer: psycopg.Connection[Any]) -> None:
    rng = random.Random(4)
    inserts = [random_job(rng, number) for number in range(2000)]
    assert roost.enqueue_many(inserts) == 2000
    rows = jobs()
    assert [{name: row[name] for name in FIELDS} for row in rows] == [
        {name: getattr(insert, name) for name in FIELDS} for insert in inserts
    ]
    now = datetime.now(UTC)
    for table, due in (("ready", True), ("scheduled", False)):
        found = observer.execute(
            f"SELECT job_id AS id, queue, priority, scheduled_at FROM roost.{table} ORDER BY job_id"
        ).fetchall()
        assert found == [
            {name: row[name] for name in ("id", "queue", "priority", "scheduled_at")}
            for row in rows
            if (row["scheduled_at"] <= now) == due
        ]


def test_one_at_a_time_and_many_store_the_same(roost: Roost, jobs: Jobs) -> None:
    rng = random.Random(5)
    inserts = [*[random_job(rng, number) for number in range(20)], JobInsert("plain")]
    roost.enqueue_many(inserts)
    for insert in inserts:
        roost.enqueue(**{name: getattr(insert, name) for name in FIELDS})
    rows = jobs()
    varying = ("id", "inserted_at", "scheduled_at")
    for one, other in zip(rows[: len(inserts)], rows[len(inserts) :], strict=True):
        assert {k: v for k, v in one.items() if k not in varying} == {
            k: v for k, v in other.items() if k not in varying
        }


def test_an_empty_list_costs_no_trip() -> None:
    assert Roost("host=/nonexistent").enqueue_many([]) == 0
    assert Roost("host=/nonexistent").enqueue_many(iter(())) == 0


def test_a_generator_will_do(roost: Roost, jobs: Jobs) -> None:
    assert roost.enqueue_many(JobInsert("a", {"n": n}) for n in range(3)) == 3
    assert [row["args"]["n"] for row in jobs()] == [0, 1, 2]


def test_a_hundred_thousand_jobs_are_one_statement(roost: Roost, observer: psycopg.Connection[Any]) -> None:
    assert roost.enqueue_many([JobInsert("a", {"n": n}) for n in range(100_000)]) == 100_000
    row = observer.execute(
        "SELECT count(*), count(DISTINCT xmin::text) AS transactions, sum((args->>'n')::int) AS total"
        " FROM roost.job_rows"
    ).fetchone()
    assert row == {"count": 100_000, "transactions": 1, "total": sum(range(100_000))}


def test_each_distinct_combination_of_fields_is_sent_once(registry: HandlerRegistry) -> None:
    inserts = [JobInsert("a", {"n": n}, queue=f"q{n % 3}", tags=["x"], metadata={"n": n}) for n in range(1000)]
    statement = statements.enqueue_many(registry, inserts)
    assert next(iter(statement.parameters)).count('"task"') == 3


EQUAL_BUT_BAD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"priority": 1}, {"priority": True}),
    ({"priority": 1}, {"priority": 1.0}),
    ({"max_attempts": 20}, {"max_attempts": 20.0}),
    ({"timeout_seconds": 1}, {"timeout_seconds": True}),
    ({"tags": ["a", "b"]}, {"tags": "ab"}),
    ({}, {"depends_on": ["1"]}),
    ({"depends_on": [1]}, {"depends_on": [True]}),
    ({"unique_key": "k"}, {"unique_key": ""}),
]


@pytest.mark.parametrize(("good", "bad"), EQUAL_BUT_BAD)
def test_a_bad_job_after_one_that_compares_equal_is_refused(
    registry: HandlerRegistry, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    statements.enqueue_many(registry, [JobInsert("a", **good)])
    with pytest.raises(InvalidJobError, match=r"jobs\[1\]"):
        statements.enqueue_many(registry, [JobInsert("a", **good), JobInsert("a", **bad)])


def test_what_is_no_job_is_refused(roost: Roost, jobs: Jobs) -> None:
    for other in ("a", {"task": "a"}, None):
        with pytest.raises(InvalidJobError, match="must be a JobInsert") as refused:
            roost.enqueue_many([JobInsert("a"), other])  # type: ignore[list-item]
        assert refused.value.path == "jobs[1]"
    assert jobs() == []


def test_one_bad_job_refuses_all(roost: Roost, jobs: Jobs) -> None:
    inserts = [JobInsert("a", {"x": n}) for n in range(20)]
    inserts[17] = JobInsert("a", {"x": float("nan")})
    with pytest.raises(InvalidJobError, match=r"cannot enqueue 20 jobs: jobs\[17\]\.args\.x is nan"):
        roost.enqueue_many(inserts)
    assert jobs() == []


def test_more_than_a_message_holds_is_refused(registry: HandlerRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statements, "MAX_MESSAGE_BYTES", 10_000_000)
    large = JobInsert("a", {"s": "é" * 500_000})
    statements.enqueue_many(registry, [large] * 9)
    with pytest.raises(InvalidJobError, match="in parts") as refused:
        statements.enqueue_many(registry, [large] * 11)
    assert refused.value.path == "jobs"


def test_what_was_passed_survives_replace(registry: HandlerRegistry) -> None:
    registry.register("a", print, defaults=TaskDefaults(queue="emails", timeout_seconds=30))

    def kind(insert: JobInsert) -> str:
        return next(iter(statements.enqueue_many(registry, [insert]).parameters))

    base = JobInsert("a")
    assert '"emails"' in kind(dataclasses.replace(base, args={"n": 1}))
    assert '"timeout_seconds": 30' in kind(dataclasses.replace(base, priority=3))
    assert '"other"' in kind(dataclasses.replace(base, queue="other"))
    explicit = JobInsert("a", queue="default", timeout_seconds=None)
    assert '"default"' in kind(dataclasses.replace(explicit, args={"n": 1}))
    assert '"timeout_seconds": null' in kind(dataclasses.replace(explicit, args={"n": 1}))
    assert explicit == base  # as data they are the same
