"""One job: what is stored, whose defaults apply, and that a refusal leaves the caller's transaction as it was."""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from roost_client import HandlerRegistry, InvalidJobError, JobInsert, JobState, Roost, job
from roost_client.arguments import object_text
from roostd.embedded import EmbeddedPostgres

Jobs = Callable[[], list[dict[str, Any]]]

NAMES = [
    "x",
    "n" * 128,
    "é" * 128,
    "😀" * 128,
    "with 'quotes' and \"more\"",
    "dots.and.more::text",
    "'; DROP TABLE roost.job_rows; --",
    "%s %(x)s {0} $1 \\ \n\t\x01\x7f",
    " leading and trailing ",
    "null",
    "ﬁ\u202e\u200b",
]


def test_a_job_without_keywords_has_the_documented_defaults(roost: Roost, jobs: Jobs) -> None:
    before = datetime.now(UTC) - timedelta(minutes=1)
    job_id = roost.enqueue("send_receipt")
    (row,) = jobs()
    assert type(job_id) is int
    expected = {
        "id": job_id,
        "queue": "default",
        "task": "send_receipt",
        "args": {},
        "state": "available",
        "priority": 0,
        "attempt": 0,
        "max_attempts": 20,
        "errors": [],
        "unique_key": None,
        "tags": [],
        "timeout_seconds": None,
        "cancel_requested": False,
        "result": None,
        "depends_on": [],
        "metadata": {},
    }
    assert {name: row[name] for name in expected} == expected
    assert before < row["scheduled_at"] == row["inserted_at"] < before + timedelta(minutes=2)


def test_every_field_is_stored(roost: Roost, jobs: Jobs) -> None:
    at = datetime(2040, 2, 29, 23, 59, 59, 123456, timezone(timedelta(hours=-7)))
    roost.enqueue(
        "send",
        args={"a": [1, {"b": None}]},
        queue="emails",
        priority=-(2**31),
        max_attempts=2**31 - 1,
        scheduled_at=at,
        tags=["a", 'with "quotes", \\ and {braces}', "", "NULL", "é"],
        timeout_seconds=1,
        metadata={"trace": "00-ab"},
    )
    (row,) = jobs()
    assert row["args"] == {"a": [1, {"b": None}]}
    assert (row["queue"], row["priority"], row["max_attempts"]) == ("emails", -(2**31), 2**31 - 1)
    assert row["scheduled_at"] == at
    assert row["tags"] == ["a", 'with "quotes", \\ and {braces}', "", "NULL", "é"]
    assert (row["timeout_seconds"], row["metadata"]) == (1, {"trace": "00-ab"})


def test_a_due_job_is_ready_and_a_later_one_scheduled(roost: Roost, observer: psycopg.Connection[Any]) -> None:
    due = [roost.enqueue("a"), roost.enqueue("a", scheduled_at=datetime(1, 1, 2, tzinfo=UTC))]
    later = [roost.enqueue("a", scheduled_at=datetime(9999, 12, 30, 23, tzinfo=UTC))]
    ready = observer.execute("SELECT job_id FROM roost.ready ORDER BY 1").fetchall()
    scheduled = observer.execute("SELECT job_id FROM roost.scheduled ORDER BY 1").fetchall()
    assert [row["job_id"] for row in ready] == due
    assert [row["job_id"] for row in scheduled] == later


def test_a_name_is_just_characters(roost: Roost, jobs: Jobs) -> None:
    for name in NAMES:
        job_id = roost.enqueue(name, queue=name)
        found = roost.get_job(job_id)
        assert (found.task, found.queue) == (name, name)
        assert [j.id for j in roost.list_jobs(queue=name, task=name)] == [job_id]
    assert roost.enqueue_many([JobInsert(name, queue=name) for name in NAMES]) == len(NAMES)
    assert [(row["task"], row["queue"]) for row in jobs()] == [(name, name) for name in [*NAMES, *NAMES]]


# Defaults


def stored(jobs: Jobs) -> dict[str, Any]:
    return {name: jobs()[-1][name] for name in ("task", "queue", "priority", "max_attempts", "tags", "timeout_seconds")}


DECLARED = {"queue": "emails", "priority": 5, "max_attempts": 3, "tags": ["x"], "timeout_seconds": 30}
DOCUMENTED = {"queue": "default", "priority": 0, "max_attempts": 20, "tags": None, "timeout_seconds": None}


@pytest.fixture
def send(registry: HandlerRegistry) -> Callable[..., Any]:
    @job("send", registry=registry, **DECLARED)  # type: ignore[arg-type]
    def handler() -> None: ...

    return handler


@pytest.mark.parametrize("by_name", [False, True])
def test_the_defaults_of_the_task_apply(roost: Roost, jobs: Jobs, send: Callable[..., Any], by_name: bool) -> None:
    roost.enqueue("send" if by_name else send)
    assert stored(jobs) == {"task": "send", **DECLARED}
    roost.enqueue_many([JobInsert("send" if by_name else send)])
    assert stored(jobs) == {"task": "send", **DECLARED}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_keyword_wins_over_the_task_also_when_it_says_the_documented_default(
    roost: Roost, jobs: Jobs, send: Callable[..., Any], name: str
) -> None:
    expected = {"task": "send", **DECLARED, name: DOCUMENTED[name] if name != "tags" else []}
    roost.enqueue(send, **{name: DOCUMENTED[name]})  # type: ignore[arg-type]
    assert stored(jobs) == expected
    roost.enqueue_many([JobInsert(send, **{name: DOCUMENTED[name]})])  # type: ignore[arg-type]
    assert stored(jobs) == expected


def test_a_task_without_defaults_has_the_documented_ones(roost: Roost, jobs: Jobs, registry: HandlerRegistry) -> None:
    registry.register("plain", print)
    roost.enqueue(print)
    assert stored(jobs) == {"task": "plain", **DOCUMENTED, "tags": []}


def test_a_function_that_is_not_registered_is_refused(roost: Roost) -> None:
    for function in (print, len):
        with pytest.raises(InvalidJobError, match="not registered") as refused:
            roost.enqueue(function)
        assert refused.value.path == "task"


def test_a_function_of_two_names_is_refused(roost: Roost, registry: HandlerRegistry) -> None:
    registry.register("a", print)
    registry.register("b", print)
    with pytest.raises(InvalidJobError, match="'a' and 'b'"):
        roost.enqueue(print)


def test_arguments_are_validated_by_the_model_of_the_task(roost: Roost, jobs: Jobs, registry: HandlerRegistry) -> None:
    class Order(BaseModel):
        id: uuid.UUID
        at: datetime

    registry.register("send", print, args_model=Order)
    order = Order(id=uuid.uuid4(), at=datetime.now(UTC))
    for task in (print, "send"):
        roost.enqueue(task, args=order)
        assert Order.model_validate(jobs()[-1]["args"]) == order
        for bad in ({"id": "x", "at": "2030-01-01"}, None, {}):
            with pytest.raises(InvalidJobError, match=r"args\.id does not fit Order"):
                roost.enqueue(task, args=bad)
    with pytest.raises(InvalidJobError, match=r"jobs\[1\]\.args\.id does not fit Order"):
        roost.enqueue_many([JobInsert("send", order), JobInsert("send", {})])
    assert len(jobs()) == 2


# Refusals

BAD: list[tuple[str, dict[str, Any]]] = [
    ("task", {"task": ""}),
    ("task", {"task": "n" * 129}),
    ("task", {"task": "a\0b"}),
    ("task", {"task": "\ud800"}),
    ("task", {"task": None}),
    ("task", {"task": 5}),
    ("task", {"task": b"send"}),
    ("queue", {"queue": ""}),
    ("queue", {"queue": "q" * 129}),
    ("queue", {"queue": "a\0b"}),
    ("queue", {"queue": "é\udc00"}),
    ("queue", {"queue": None}),
    ("queue", {"queue": ["a"]}),
    ("priority", {"priority": "1"}),
    ("priority", {"priority": 1.0}),
    ("priority", {"priority": True}),
    ("priority", {"priority": None}),
    ("priority", {"priority": 2**31}),
    ("priority", {"priority": -(2**31) - 1}),
    ("priority", {"priority": 10**5000}),
    ("max_attempts", {"max_attempts": 0}),
    ("max_attempts", {"max_attempts": -1}),
    ("max_attempts", {"max_attempts": True}),
    ("max_attempts", {"max_attempts": None}),
    ("max_attempts", {"max_attempts": 2**31}),
    ("scheduled_at", {"scheduled_at": datetime(2030, 1, 1)}),
    ("scheduled_at", {"scheduled_at": "2030-01-01T00:00:00Z"}),
    ("scheduled_at", {"scheduled_at": 1893456000}),
    ("scheduled_at", {"scheduled_at": datetime(2030, 1, 1).date()}),
    ("scheduled_at", {"scheduled_at": datetime.max.replace(tzinfo=UTC)}),
    ("scheduled_at", {"scheduled_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=14)))}),
    ("unique_key", {"unique_key": ""}),
    ("unique_key", {"unique_key": 1}),
    ("depends_on", {"depends_on": 1}),
    ("depends_on", {"depends_on": {1}}),
    ("depends_on[1]", {"depends_on": [1, "2"]}),
    ("depends_on[0]", {"depends_on": [True]}),
    ("depends_on[0]", {"depends_on": [2**63]}),
    ("depends_on[0]", {"depends_on": [JobInsert("a")]}),
    ("tags", {"tags": "ab"}),
    ("tags", {"tags": {"a"}}),
    ("tags[0]", {"tags": [1]}),
    ("tags[1]", {"tags": ["a", None]}),
    ("tags[1]", {"tags": ["a", "\0"]}),
    ("tags[0]", {"tags": ["\ud800"]}),
    ("timeout_seconds", {"timeout_seconds": 0}),
    ("timeout_seconds", {"timeout_seconds": -1}),
    ("timeout_seconds", {"timeout_seconds": 1.5}),
    ("timeout_seconds", {"timeout_seconds": True}),
    ("timeout_seconds", {"timeout_seconds": 2**31}),
    ("metadata", {"metadata": [1]}),
    ("metadata.a", {"metadata": {"a": math.nan}}),
    ("metadata", {"metadata": {"a": "x" * 2**20}}),
    ("args", {"args": [1]}),
    ("args", {"args": "{}"}),
    ("args", {"args": {"a": "x" * 2**20}}),
    ("args.items[3].price", {"args": {"items": [1, 2, 3, {"price": math.inf}]}}),
    ("args.a", {"args": {"a": "\0"}}),
    ("args.a", {"args": {"a": "\ud800"}}),
    ("args.a", {"args": {"a": {1: 2}}}),
    ("args.a", {"args": {"a": {1, 2}}}),
]
BAD_IDS = [f"{path}-{i}" for i, (path, _) in enumerate(BAD)]


@pytest.fixture(scope="module")
def shared_conn(postgres: EmbeddedPostgres) -> Iterator[psycopg.Connection[Any]]:
    """One for all refusals, to a database without our schema: nothing reaches it."""
    with psycopg.connect(postgres.dsn) as connection:
        yield connection


@pytest.mark.parametrize("in_transaction", [False, True])
@pytest.mark.parametrize(("path", "keywords"), BAD, ids=BAD_IDS)
def test_a_bad_argument_is_refused_by_its_path_before_anything_is_sent(
    shared_conn: psycopg.Connection[Any], path: str, keywords: dict[str, Any], in_transaction: bool
) -> None:
    keywords = {"task": "send", **keywords}
    if in_transaction:
        shared_conn.execute("SELECT 1")
    status = shared_conn.info.transaction_status
    with pytest.raises(InvalidJobError) as refused:
        Roost("host=/nonexistent").enqueue(**keywords, conn=shared_conn)
    assert refused.value.path == path
    assert str(refused.value).startswith("cannot enqueue ")
    assert f": {path} " in str(refused.value)
    with pytest.raises(InvalidJobError) as refused:
        Roost("host=/nonexistent").enqueue_many([JobInsert("ok"), JobInsert(**keywords)], conn=shared_conn)
    assert refused.value.path == f"jobs[1].{path}"
    assert str(refused.value).startswith(f"cannot enqueue 2 jobs: jobs[1].{path} ")
    assert shared_conn.info.transaction_status == status
    shared_conn.execute("SELECT 1")
    shared_conn.rollback()


def test_the_same_is_refused_without_a_connection(registry: HandlerRegistry) -> None:
    with pytest.raises(InvalidJobError):
        Roost("host=/nonexistent", registry=registry).enqueue("a", priority=True)


def test_empty_tags_and_dependencies_are_none(roost: Roost, jobs: Jobs) -> None:
    roost.enqueue("a", tags=[], depends_on=[], metadata={})
    (row,) = jobs()
    assert (row["tags"], row["depends_on"], row["metadata"]) == ([], [], {})


# JSON there and back

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
json_objects = st.dictionaries(
    texts,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
        lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
        max_leaves=15,
    ),
)


def without_minus_zero(text: str) -> str:
    """As PostgreSQL writes it, whose numbers have no such thing."""
    return re.sub(r"-0\.0(?!\d)", "0.0", text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(args=json_objects, metadata=json_objects)
def test_any_json_is_read_back_equal(
    roost: Roost, conn: psycopg.Connection[Any], args: dict[str, Any], metadata: dict[str, Any]
) -> None:
    job_id = roost.enqueue("a", args=args, metadata=metadata, conn=conn)
    assert roost.enqueue_many([JobInsert("a", args, metadata=metadata), JobInsert("b")], conn=conn) == 2
    one = roost.get_job(job_id, conn=conn)
    other = roost.list_jobs(limit=1, task="a", conn=conn)[0]
    assert other.id > job_id
    assert one.args == other.args == args
    assert one.metadata == other.metadata == metadata
    raw = conn.execute("SELECT args FROM roost.jobs WHERE id = %s", (job_id,)).fetchone()
    assert raw is not None
    assert without_minus_zero(json.dumps(raw[0], sort_keys=True)) == without_minus_zero(
        json.dumps(args, sort_keys=True)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(), min_size=1), text=texts)
def test_the_size_the_client_measures_is_the_size_the_database_sees(
    roost: Roost, conn: psycopg.Connection[Any], numbers: list[float], text: str
) -> None:
    args = {"numbers": numbers, "text": text}
    job_id = roost.enqueue("a", args=args, conn=conn)
    row = conn.execute("SELECT octet_length(args::text) FROM roost.jobs WHERE id = %s", (job_id,)).fetchone()
    assert row is not None
    assert row[0] == len(without_minus_zero(object_text("args", args)).encode())


def test_a_job_at_the_size_limit_is_stored(roost: Roost, jobs: Jobs) -> None:
    args = {"s": "é" * ((2**20 - 9) // 2)}
    roost.enqueue("a", args=args)
    roost.enqueue("a", args={"f": [1.5e300] * 3400})
    assert jobs()[0]["args"] == args


def test_a_job_read_has_a_state_and_times_in_utc(roost: Roost) -> None:
    found = roost.get_job(roost.enqueue("a"))
    assert found.state == "available"
    assert found.state is JobState.AVAILABLE
    assert found.model_dump(mode="json")["state"] == "available"
    assert found.scheduled_at.tzinfo is UTC
