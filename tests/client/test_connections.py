"""The client's own connections: kept, replaced, bounded, and never shared with a fork."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roost_client import AsyncRoost, JobInsert, Roost, RoostError, schema
from roost_client.connections import MAX_CONNECTIONS
from roostd.embedded import EmbeddedPostgres

Jobs = Callable[[], list[dict[str, Any]]]
Conn = psycopg.Connection[Any]


def ours(observer: Conn) -> list[int]:
    """The servers of our connections."""
    rows = observer.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'roost_client' AND datname = current_database()"
        " ORDER BY backend_start"
    ).fetchall()
    return [row["pid"] for row in rows]


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass  # the test's timeout is the deadline


def test_nothing_connects_before_the_first_need_and_one_connection_is_kept(roost: Roost, observer: Conn) -> None:
    assert ours(observer) == []
    roost.enqueue("a")
    before = ours(observer)
    for _ in range(5):
        roost.enqueue("a")
    assert len(before) == 1
    assert ours(observer) == before


def prepared(connection: Conn) -> list[str]:
    cursor = connection.execute("SELECT statement FROM pg_prepared_statements")
    return [row[0] for row in cursor.fetchall()]


def test_statements_are_prepared_on_a_connection_to_postgresql_itself(dsn: str, jobs: Jobs) -> None:
    with Roost(dsn) as roost:
        for _ in range(5):
            roost.enqueue("a")
        with roost._connections.borrow() as own:
            assert any("roost.enqueue" in statement for statement in prepared(own))

    async def main() -> None:
        async with AsyncRoost(dsn) as roost:
            for _ in range(5):
                await roost.enqueue("a")
            async with roost._connections.borrow() as own:
                cursor = await own.execute("SELECT statement FROM pg_prepared_statements")
                assert any("roost.enqueue" in row[0] for row in await cursor.fetchall())

    asyncio.run(main())
    assert len(jobs()) == 10


def test_close_closes_and_the_client_can_still_be_used(roost: Roost, observer: Conn) -> None:
    roost.enqueue("a")
    roost.close()
    wait_until(lambda: ours(observer) == [])
    roost.enqueue("a")
    assert len(ours(observer)) == 1


@pytest.mark.parametrize("told_by", ["environment", "dsn", "database"])
def test_text_arrives_whole_whatever_encoding_is_the_default(
    dsn: str, observer: Conn, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, told_by: str
) -> None:
    if told_by == "environment":
        monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    elif told_by == "dsn":
        dsn = make_conninfo(dsn, client_encoding="LATIN1")
    else:
        name = sql.Identifier(observer.info.dbname)
        observer.execute(sql.SQL("ALTER DATABASE {} SET client_encoding = 'LATIN1'").format(name))
    task, args = "t\u00e4sk \u20ac", {"\u00e9": "\u65e5\u672c \U0001f413"}
    with Roost(dsn) as roost:
        read = [roost.get_job(roost.enqueue(task, args=args, queue="\u65e5"))]
        roost.enqueue_many([JobInsert(task, args, queue="\u65e5")])

    async def use_async() -> None:
        async with AsyncRoost(dsn) as client:
            read.append(await client.get_job(await client.enqueue(task, args=args, queue="\u65e5")))

    asyncio.run(use_async())
    assert [(job["task"], job["queue"], job["args"]) for job in jobs()] == [(task, "\u65e5", args)] * 3
    assert [(job.task, job.queue, job.args) for job in read] == [(task, "\u65e5", args)] * 2


def test_a_connection_that_failed_a_statement_is_kept(roost: Roost, observer: Conn) -> None:
    roost.enqueue("a")
    before = ours(observer)
    observer.execute("ALTER TABLE roost.job_rows ADD CONSTRAINT no_b CHECK (task <> 'b')")
    with pytest.raises(psycopg.errors.CheckViolation):
        roost.enqueue("b")
    roost.enqueue("a")
    assert ours(observer) == before


def test_an_idle_connection_that_was_killed_is_replaced_unnoticed(roost: Roost, observer: Conn) -> None:
    for _ in range(3):
        roost.enqueue("a")
        (pid,) = ours(observer)
        observer.execute("SELECT pg_terminate_backend(%s)", (pid,))
        wait_until(lambda: ours(observer) == [])
        roost.enqueue_many([JobInsert("a")])


def test_a_connection_killed_in_use_is_an_error_and_is_not_used_again(roost: Roost, observer: Conn, dsn: str) -> None:
    errors: list[BaseException] = []

    def enqueue() -> None:
        try:
            roost.enqueue("a")
        except psycopg.OperationalError as error:
            errors.append(error)

    with psycopg.connect(dsn) as blocker:
        blocker.execute("LOCK TABLE roost.job_rows")
        thread = threading.Thread(target=enqueue)
        thread.start()
        wait_until(lambda: len(ours(observer)) == 1)
        observer.execute("SELECT pg_terminate_backend(%s)", (ours(observer)[0],))
        thread.join()
    assert len(errors) == 1
    roost.enqueue("b")
    assert [row["task"] for row in observer.execute("SELECT task FROM roost.jobs").fetchall()] == ["b"]


def test_an_exception_out_of_a_signal_handler_leaves_no_connection_half_used(
    roost: Roost, observer: Conn, dsn: str
) -> None:
    def soft_timeout(*_: object) -> None:
        raise TimeoutError

    def interrupt() -> None:
        waiting = "SELECT FROM pg_stat_activity WHERE application_name = 'roost_client' AND wait_event_type = 'Lock'"
        wait_until(lambda: observer.execute(waiting).fetchone() is not None)
        os.kill(os.getpid(), signal.SIGUSR1)

    former = signal.signal(signal.SIGUSR1, soft_timeout)
    try:
        with psycopg.connect(dsn) as blocker:
            blocker.execute("LOCK TABLE roost.job_rows")
            thread = threading.Thread(target=interrupt)
            thread.start()
            with pytest.raises(TimeoutError):
                roost.enqueue("a")
            thread.join()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert roost.list_workers() == []


def test_threads_share_a_client_and_open_no_more_than_its_bound(roost: Roost, observer: Conn, jobs: Jobs) -> None:
    most: list[int] = []

    def work(number: int) -> None:
        for n in range(10):
            roost.enqueue("a", args={"thread": number, "n": n})
        most.append(len(ours(observer)) if number == 0 else 0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs()) == 250
    assert len({(row["args"]["thread"], row["args"]["n"]) for row in jobs()}) == 250
    assert len(ours(observer)) <= MAX_CONNECTIONS


def test_a_connection_is_free_again_after_a_failed_connect(dsn: str) -> None:
    roost = Roost(f"{dsn} user=nobody_of_this_name")
    for _ in range(MAX_CONNECTIONS + 2):
        with pytest.raises(psycopg.OperationalError):
            roost.enqueue("a")


# Forks


def in_a_child(work: Callable[[], object]) -> int:
    """Run in a fork that ends as programs end, not by os._exit alone; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_opens_its_own_and_leaves_the_parents_alone(roost: Roost, observer: Conn, jobs: Jobs) -> None:
    roost.enqueue("parent")
    before = ours(observer)

    def work() -> None:
        roost.close()  # has nothing of its own to close
        roost.enqueue("child")
        roost.enqueue("child")
        roost.close()

    assert in_a_child(work) == 0
    assert in_a_child(work) == 0
    roost.enqueue("parent")
    assert ours(observer)[:1] == before
    assert [row["task"] for row in jobs()] == ["parent", "child", "child", "child", "child", "parent"]


def test_threads_of_a_forked_child_that_come_at_once_start_afresh_together(roost: Roost) -> None:
    job_id = roost.enqueue("a")
    start_afresh = roost._waits._start_afresh
    both = threading.Barrier(2)

    def wait(held_up_seconds: float) -> None:
        threading.current_thread().name = str(held_up_seconds)
        both.wait()
        roost.wait_for(job_id, timeout=5, raise_on_failure=False)

    def held_up() -> None:
        time.sleep(float(threading.current_thread().name))
        start_afresh()

    def work() -> None:
        roost._waits._start_afresh = held_up  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(wait, seconds) for seconds in (0.2, 0.5)]
            time.sleep(1)
            roost.cancel(job_id)
            for future in futures:
                future.result()

    assert in_a_child(work) == 0


def test_a_fork_while_every_connection_is_in_use_does_not_wait_for_them(roost: Roost, dsn: str, observer: Conn) -> None:
    with psycopg.connect(dsn) as blocker:
        blocker.execute("LOCK TABLE roost.ready")
        threads = [threading.Thread(target=roost.enqueue, args=("a",)) for _ in range(MAX_CONNECTIONS)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(ours(observer)) == MAX_CONNECTIONS)
        assert in_a_child(lambda: roost.list_workers()) == 0
        blocker.rollback()
        for thread in threads:
            thread.join()


PROGRAM = """
import asyncio, multiprocessing, os, sys
import roost_client
from roost_client import AsyncRoost, Roost

dsn = sys.argv[1]
roost = Roost(dsn)
roost.enqueue("a")
roost_client.configure(dsn)
roost_client.enqueue("a")
async_roost = AsyncRoost(dsn)
asyncio.run(async_roost.enqueue("a"))

def child():
    roost.enqueue("b")
    asyncio.run(async_roost.enqueue("b"))

process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0

pid = os.fork()
if pid == 0:
    child()
    sys.exit(0)  # the interpreter ends as usual, with all the parent's objects in it
assert os.waitpid(pid, 0)[1] == 0
roost.enqueue("a")
asyncio.run(async_roost.enqueue("a"))
"""


def test_a_program_that_never_closes_its_clients_ends_without_a_warning(dsn: str, jobs: Jobs) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, dsn], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(row["task"] for row in jobs()) == ["a"] * 5 + ["b"] * 4


# Event loops


def test_one_async_client_works_in_one_loop_after_the_other(dsn: str, observer: Conn) -> None:
    roost = AsyncRoost(dsn)
    for _ in range(3):
        asyncio.run(roost.enqueue("a"))
        wait_until(lambda: len(ours(observer)) == 1)  # that of the loop before was closed
    asyncio.run(roost.close())
    wait_until(lambda: ours(observer) == [])


def test_many_tasks_share_a_client_and_open_no_more_than_its_bound(dsn: str, observer: Conn, jobs: Jobs) -> None:
    async def main() -> None:
        async with AsyncRoost(dsn) as roost:
            await asyncio.gather(*[roost.enqueue("a", args={"n": n}) for n in range(100)])
            assert len(ours(observer)) <= MAX_CONNECTIONS

    asyncio.run(main())
    assert sorted(row["args"]["n"] for row in jobs()) == list(range(100))


def test_a_cancelled_task_leaves_no_connection_half_used(dsn: str, observer: Conn, jobs: Jobs) -> None:
    async def main() -> None:
        async with AsyncRoost(dsn) as roost, await psycopg.AsyncConnection.connect(dsn) as blocker:
            await blocker.execute("LOCK TABLE roost.job_rows")
            tasks = [asyncio.create_task(roost.enqueue("lost")) for _ in range(MAX_CONNECTIONS)]
            while len(ours(observer)) < MAX_CONNECTIONS:
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await blocker.rollback()
            assert await asyncio.gather(*[roost.enqueue("a") for _ in range(20)])

    asyncio.run(main())
    assert [row["task"] for row in jobs()] == ["a"] * 20


def test_async_an_idle_connection_that_was_killed_is_replaced_unnoticed(dsn: str, observer: Conn) -> None:
    async def main() -> None:
        async with AsyncRoost(dsn) as roost:
            for _ in range(3):
                await roost.enqueue("a")
                (pid,) = ours(observer)
                observer.execute("SELECT pg_terminate_backend(%s)", (pid,))
                wait_until(lambda: ours(observer) == [])
                await roost.enqueue("a")

    asyncio.run(main())


# A server that restarts


@pytest.fixture
def server() -> Iterator[EmbeddedPostgres]:
    version = os.environ.get("ROOST_TEST_PG_VERSION")
    with (
        tempfile.TemporaryDirectory(prefix="roost-test-") as directory,
        EmbeddedPostgres(directory, version=int(version) if version else None, settings={"fsync": "off"}) as server,
    ):
        with psycopg.connect(server.dsn) as conn:
            schema.apply_migrations(conn)
        yield server


def test_a_restart_of_the_server_between_two_enqueues_goes_unnoticed(server: EmbeddedPostgres) -> None:
    async_roost = AsyncRoost(server.dsn)
    with Roost(server.dsn) as roost, asyncio.Runner() as runner:
        for mode in ("fast", "immediate"):
            roost.enqueue("a")
            runner.run(async_roost.enqueue("a"))
            server.restart(mode)
            roost.enqueue("a")
            runner.run(async_roost.enqueue("a"))
        assert roost.status()["default"]["available"] == 8
        runner.run(async_roost.close())


# DSNs


@pytest.mark.parametrize(
    "dsn",
    ["postgresql+psycopg://app:secret@db/app", "host=db password=secret nonsense", "mysql://app:secret@db/app", 5],
)
def test_a_dsn_that_cannot_be_read_is_refused_without_being_shown(dsn: Any) -> None:
    for client in (Roost, AsyncRoost):
        with pytest.raises(RoostError, match="DSN") as refused:
            client(dsn)
        assert "secret" not in f"{refused.value!r}"
        assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_the_application_may_name_itself(dsn: str, observer: Conn) -> None:
    with Roost(f"{dsn} application_name=shop") as roost:
        roost.enqueue("a")
        assert ours(observer) == []


def test_event_loops_of_many_threads_come_and_go_beside_each_other(dsn: str) -> None:
    """Each that is new lets go of those that are closed, and finds that others do the same."""
    client = AsyncRoost(dsn)

    async def enqueue() -> int:
        return await client.enqueue("a")

    def loops() -> list[int]:
        return [asyncio.run(enqueue()) for _ in range(20)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(10) as threads:
            ids = [job_id for started in [threads.submit(loops) for _ in range(10)] for job_id in started.result()]
    finally:
        sys.setswitchinterval(interval)
    assert len(set(ids)) == 200
    asyncio.run(client.close())
