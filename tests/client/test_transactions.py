"""conn=: the job is part of the caller's transaction, whatever that connection is like and whatever state it is in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg.adapt import Dumper, Loader
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row, namedtuple_row, scalar_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg.types.string import StrBinaryDumper, StrDumper

from roost_client import (
    AsyncRoost,
    InvalidJobError,
    JobInsert,
    JobNotFoundError,
    JobState,
    Roost,
    SchemaError,
    enqueue,
)

Jobs = Callable[[], list[dict[str, Any]]]
Conn = psycopg.Connection[Any]
AsyncConn = psycopg.AsyncConnection[Any]

# A client that could not connect by itself: whatever works here works on the caller's connection.
NOWHERE = "host=/nonexistent"


def tasks(jobs: Jobs) -> list[str]:
    return [row["task"] for row in jobs()]


def test_a_job_is_committed_with_the_transaction(conn: Conn, jobs: Jobs) -> None:
    Roost(NOWHERE).enqueue("a", conn=conn)
    assert jobs() == []
    conn.commit()
    assert tasks(jobs) == ["a"]


def test_a_job_is_rolled_back_with_the_transaction(conn: Conn, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    job_id = roost.enqueue("a", conn=conn)
    roost.enqueue_many([JobInsert("b"), JobInsert("c")], conn=conn)
    conn.rollback()
    assert jobs() == []
    with pytest.raises(JobNotFoundError):
        roost.get_job(job_id, conn=conn)


def test_a_job_is_rolled_back_with_its_savepoint_alone(conn: Conn, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    with conn.transaction():
        roost.enqueue("a", conn=conn)
        with conn.transaction(force_rollback=True):
            roost.enqueue("b", conn=conn)
        roost.enqueue("c", conn=conn)
    assert tasks(jobs) == ["a", "c"]


def test_in_autocommit_a_job_is_committed_at_once(dsn: str, jobs: Jobs) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        Roost(NOWHERE).enqueue("a", conn=conn)
        assert conn.info.transaction_status == TransactionStatus.IDLE
        assert tasks(jobs) == ["a"]


def test_the_module_level_function_takes_a_connection_without_any_dsn(conn: Conn, jobs: Jobs) -> None:
    enqueue("a", conn=conn)
    conn.commit()
    assert tasks(jobs) == ["a"]


def test_every_operation_takes_part_in_the_transaction(conn: Conn, roost: Roost, jobs: Jobs) -> None:
    kept = roost.enqueue("kept")
    nowhere = Roost(NOWHERE)
    job_id = nowhere.enqueue("a", conn=conn)
    assert nowhere.get_job(job_id, conn=conn).task == "a"
    assert [job.id for job in nowhere.list_jobs(conn=conn)] == [job_id, kept]
    assert nowhere.status(conn=conn)["default"][JobState.AVAILABLE] == 2
    assert nowhere.cancel(kept, conn=conn) == JobState.CANCELLED
    assert nowhere.retry(kept, conn=conn) == JobState.CANCELLED
    nowhere.pause_queue("q", conn=conn)
    assert [queue.name for queue in nowhere.list_queues(conn=conn)] == ["default", "q"]
    nowhere.resume_queue("q", conn=conn)
    assert nowhere.list_workers(conn=conn) == []
    assert nowhere.requeue_discarded(conn=conn) == nowhere.count_discarded(conn=conn) == 0
    conn.rollback()
    assert [queue.name for queue in roost.list_queues()] == ["default"]
    assert tasks(jobs) == ["kept"]


# States that can only fail


def test_a_failed_transaction_is_refused_and_left_to_its_owner(conn: Conn, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    with pytest.raises(psycopg.errors.DivisionByZero):
        conn.execute("SELECT 1/0")
    for operation in (lambda: roost.enqueue("a", conn=conn), lambda: roost.setup_schema(conn)):
        with pytest.raises(InvalidJobError, match="failed already; roll it back") as refused:
            operation()
        assert refused.value.path == "conn"
    assert conn.info.transaction_status == TransactionStatus.INERROR
    conn.rollback()
    roost.enqueue("a", conn=conn)
    conn.commit()
    assert tasks(jobs) == ["a"]


def test_a_closed_connection_is_refused(conn: Conn) -> None:
    conn.close()
    with pytest.raises(InvalidJobError, match="conn is closed") as refused:
        Roost(NOWHERE).enqueue("a", conn=conn)
    assert refused.value.path == "conn"


def test_a_connection_of_another_kind_is_refused_by_name(dsn: str, conn: Conn) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as async_conn:
            for operation in (Roost(NOWHERE).enqueue, enqueue):
                with pytest.raises(InvalidJobError, match=r"must be a psycopg\.Connection.*AsyncRoost"):
                    operation("a", conn=async_conn)  # type: ignore[arg-type]
            with pytest.raises(InvalidJobError, match=r"must be a psycopg\.AsyncConnection.*goes with Roost"):
                await AsyncRoost(NOWHERE).enqueue("a", conn=conn)  # type: ignore[arg-type]
            with pytest.raises(InvalidJobError, match=r"must be a psycopg\.AsyncConnection"):
                await AsyncRoost(NOWHERE).setup_schema(conn)  # type: ignore[arg-type]

    asyncio.run(main())
    for other in (object(), dsn, conn.cursor()):
        with pytest.raises(InvalidJobError, match=f"not a {type(other).__qualname__}"):
            Roost(NOWHERE).enqueue("a", conn=other)  # type: ignore[arg-type]
    assert conn.info.transaction_status == TransactionStatus.IDLE


def test_a_database_without_the_schema_says_what_to_do(empty_dsn: str) -> None:
    with Roost(empty_dsn) as roost:
        for operation in (lambda: roost.enqueue("a"), lambda: roost.status(), lambda: roost.cancel(1)):
            with pytest.raises(SchemaError, match=r"roostctl migrate up|setup_schema\(\)") as missing:
                operation()
            assert missing.value.problem == "missing"


def test_a_client_encoding_that_cannot_hold_the_arguments_is_named(conn: Conn, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    conn.execute("SET client_encoding TO latin1")
    roost.enqueue("é", args={"é": "é"}, conn=conn)
    with pytest.raises(InvalidJobError, match="client_encoding"):
        roost.enqueue("a", args={"a": "😀"}, conn=conn)
    conn.commit()
    assert [(row["task"], row["args"]) for row in jobs()] == [("é", {"é": "é"})]


# Pipelines


def test_a_pipeline_takes_an_enqueue_between_its_statements(conn: Conn, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    with conn.pipeline():
        before = conn.execute("SELECT 1")
        first = roost.enqueue("a", args={"n": 1}, conn=conn)
        after = conn.execute("SELECT 2")
        assert roost.enqueue_many([JobInsert("b"), JobInsert("c")], conn=conn) == 2
        assert roost.get_job(first, conn=conn).args == {"n": 1}
        assert before.fetchone() == (1,)
        assert after.fetchone() == (2,)
    conn.commit()
    assert tasks(jobs) == ["a", "b", "c"]


def test_a_refusal_leaves_a_pipeline_as_it_was(conn: Conn, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    with conn.pipeline():
        one = conn.execute("SELECT 1")
        with pytest.raises(InvalidJobError):
            roost.enqueue("a", args={"n": float("nan")}, conn=conn)
        roost.enqueue("b", conn=conn)
        assert one.fetchone() == (1,)
    conn.commit()
    assert tasks(jobs) == ["b"]


# Connections of every make


class UpsideDown(Loader):
    def load(self, data: Any) -> Any:
        return Decimal(bytes(data).decode())


class Shouting(Dumper):
    def dump(self, obj: Any) -> bytes:
        return b"999"


def with_odd_adapters(conn: Conn) -> None:
    conn.adapters.register_loader("int8", UpsideDown)
    conn.adapters.register_loader("int4", UpsideDown)
    conn.adapters.register_dumper(int, Shouting)
    conn.adapters.register_dumper(list, Shouting)
    conn.adapters.register_dumper(dict, Shouting)
    set_json_loads(lambda data: "not yours", conn)
    set_json_dumps(lambda value: '"not yours"', conn)


def with_text_dumper(conn: Conn) -> None:
    conn.adapters.register_dumper(str, StrDumper)


def with_binary_text_dumper(conn: Conn) -> None:
    conn.adapters.register_dumper(str, StrBinaryDumper)


def with_other_settings(conn: Conn) -> None:
    conn.execute(
        "SET datestyle TO 'German, DMY'; SET timezone TO 'Asia/Kathmandu'; SET intervalstyle TO 'sql_standard'"
    )
    conn.execute("SET bytea_output TO 'escape'; SET search_path TO ''; SET standard_conforming_strings TO off")
    conn.execute("SET quote_all_identifiers TO on; SET default_transaction_isolation TO 'serializable'")
    conn.commit()


MAKES: dict[str, tuple[dict[str, Any], Callable[[Conn], object]]] = {
    "plain": ({}, lambda conn: None),
    "dict rows": ({"row_factory": dict_row}, lambda conn: None),
    "named tuple rows": ({"row_factory": namedtuple_row}, lambda conn: None),
    "scalar rows": ({"row_factory": scalar_row}, lambda conn: None),
    "client-side binding": ({"cursor_factory": psycopg.ClientCursor}, lambda conn: None),
    "raw binding": ({"cursor_factory": psycopg.RawCursor}, lambda conn: None),
    "server-side cursors": ({}, lambda conn: setattr(conn, "cursor_factory", psycopg.ServerCursor)),
    "never prepared": ({"prepare_threshold": None}, lambda conn: None),
    "always prepared": ({"prepare_threshold": 0}, lambda conn: None),
    "odd adapters": ({}, with_odd_adapters),
    "text dumper": ({}, with_text_dumper),
    "binary text dumper": ({}, with_binary_text_dumper),
    "other settings": ({}, with_other_settings),
    "repeatable read": ({}, lambda conn: setattr(conn, "isolation_level", psycopg.IsolationLevel.REPEATABLE_READ)),
}
JOB = JobInsert(
    "task",
    {"n": [1, {"é": 1.5}]},
    queue="emails",
    priority=3,
    max_attempts=4,
    scheduled_at=psycopg.TimestampFromTicks(2_000_000_000),
    tags=["a", "b,{}"],
    timeout_seconds=5,
    metadata={"t": 1},
)
FIELDS = ("args", "queue", "priority", "max_attempts", "scheduled_at", "tags", "timeout_seconds", "metadata")


@pytest.mark.parametrize("make", MAKES)
def test_a_connection_of_any_make_works(dsn: str, jobs: Jobs, make: str) -> None:
    options, prepare = MAKES[make]
    roost = Roost(NOWHERE)
    with psycopg.connect(dsn, **options) as conn:
        prepare(conn)
        keywords: dict[str, Any] = {name: getattr(JOB, name) for name in FIELDS}
        job_id = roost.enqueue("task", **keywords, conn=conn)
        assert type(job_id) is int
        assert roost.enqueue_many([JOB, JOB], conn=conn) == 2
        read = roost.get_job(job_id, conn=conn)
        assert {name: getattr(read, name) for name in FIELDS} == keywords
        assert roost.status(conn=conn)["emails"][JobState.AVAILABLE] == 3
        assert roost.list_queues(conn=conn)[0].scheduled == 3
        assert roost.cancel(job_id, conn=conn) == JobState.CANCELLED
        roost.pause_queue("emails", conn=conn)
    assert [{name: row[name] for name in FIELDS} for row in jobs()] == [keywords] * 3
    assert [row["state"] for row in jobs()] == ["cancelled", "available", "available"]


def test_the_arguments_stored_do_not_depend_on_prepared_statements(dsn: str, jobs: Jobs) -> None:
    roost = Roost(NOWHERE)
    with psycopg.connect(dsn, prepare_threshold=2) as conn:
        for n in range(10):
            roost.enqueue("task", args={"n": n}, priority=n % 2, conn=conn)
    assert [row["args"]["n"] for row in jobs()] == list(range(10))


# Async


def run(main: Awaitable[None]) -> None:
    async def wrapped() -> None:
        await main

    asyncio.run(wrapped())


def test_async_a_job_follows_the_transaction(dsn: str, jobs: Jobs) -> None:
    async def main() -> None:
        roost = AsyncRoost(NOWHERE)
        async with await psycopg.AsyncConnection.connect(dsn, row_factory=dict_row) as conn:
            await roost.enqueue("rolled back", conn=conn)
            await conn.rollback()
            job_id = await roost.enqueue("a", args={"n": 1}, conn=conn)
            assert await roost.enqueue_many([JobInsert("b"), JobInsert("c")], conn=conn) == 2
            assert (await roost.get_job(job_id, conn=conn)).args == {"n": 1}
            with pytest.raises(InvalidJobError):
                await roost.enqueue("a", args={"n": float("nan")}, conn=conn)
            async with conn.transaction(force_rollback=True):
                await roost.enqueue("d", conn=conn)
            async with conn.pipeline():
                await conn.execute("SELECT 1")
                await roost.enqueue("e", conn=conn)

    run(main())
    assert tasks(jobs) == ["a", "b", "c", "e"]


def test_async_a_failed_transaction_and_a_closed_connection_are_refused(dsn: str) -> None:
    async def main() -> None:
        roost = AsyncRoost(NOWHERE)
        async with await psycopg.AsyncConnection.connect(dsn) as conn:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("SELECT 1/0")
            with pytest.raises(InvalidJobError, match="failed already"):
                await roost.enqueue("a", conn=conn)
            await conn.close()
            with pytest.raises(InvalidJobError, match="closed"):
                await roost.enqueue("a", conn=conn)

    run(main())


@pytest.mark.parametrize("make", ["client-side binding", "raw binding", "server-side cursors", "scalar rows"])
def test_async_a_connection_of_any_make_works(dsn: str, jobs: Jobs, make: str) -> None:
    makes: dict[str, dict[str, Any]] = {
        "client-side binding": {"cursor_factory": psycopg.AsyncClientCursor},
        "raw binding": {"cursor_factory": psycopg.AsyncRawCursor},
        "server-side cursors": {},
        "scalar rows": {"row_factory": scalar_row},
    }

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, **makes[make]) as conn:
            if make == "server-side cursors":
                conn.cursor_factory = psycopg.AsyncServerCursor
            job_id = await AsyncRoost(NOWHERE).enqueue("a", args={"n": 1}, tags=["x"], conn=conn)
            assert (await AsyncRoost(NOWHERE).get_job(job_id, conn=conn)).tags == ["x"]

    run(main())
    assert json.dumps(jobs()[0]["args"]) == '{"n": 1}'
