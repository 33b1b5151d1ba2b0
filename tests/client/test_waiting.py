"""wait_for: returns as soon as a job has ended, never later than it was told, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from roost_client import (
    AsyncRoost,
    InvalidJobError,
    JobFailed,
    JobInsert,
    JobNotFoundError,
    JobOutcome,
    JobTimeoutError,
    Roost,
    RoostError,
    SchemaError,
    schema,
    statements,
)
from roostd.embedded import EmbeddedPostgres
from tests.client.hand import Hand
from tests.system.proxy import Proxy

Conn = psycopg.Connection[Any]
LONG = 60.0  # a poll interval that no test outlasts: what returns sooner was told


class AsyncInThreads:
    """AsyncRoost as a blocking client: each call in an event loop of its own, in the thread that calls."""

    def __init__(self, dsn: str) -> None:
        self.roost = AsyncRoost(dsn)

    def wait_for(self, job_id: int, **options: Any) -> JobOutcome:
        return asyncio.run(self.roost.wait_for(job_id, **options))

    def close(self) -> None:
        asyncio.run(self.roost.close())


MakeClient = Callable[[str], Roost | AsyncInThreads]
Client = Roost | AsyncInThreads


@pytest.fixture(params=[Roost, AsyncInThreads], ids=["sync", "async"])
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    return request.param


@pytest.fixture
def client(make_client: MakeClient, dsn: str) -> Iterator[Client]:
    with closing(make_client(dsn)) as client:
        yield client
    no_thread_is_left()


@pytest.fixture
def hand(dsn: str) -> Iterator[Hand]:
    with closing(Hand(dsn)) as hand:
        yield hand


@pytest.fixture
def add(observer: Conn) -> Callable[[], int]:
    """Enqueues a job past the client under test, so that all connections but the observer's are for waiting."""
    return lambda: observer.execute("SELECT roost.enqueue('a') AS id").fetchone()["id"]  # type: ignore[index]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(50) as pool:
        yield pool


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.001)  # the test's timeout is the deadline


def waiting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "roost_client waiting"]


def no_thread_is_left() -> None:
    wait_until(lambda: not waiting_threads())


def ours(observer: Conn) -> list[dict[str, Any]]:
    """The connections of clients."""
    query = (
        "SELECT pid, query FROM pg_stat_activity WHERE application_name LIKE 'roost_client%'"
        " AND datname = current_database()"
    )
    return observer.execute(query).fetchall()


def is_awaited(observer: Conn, *job_ids: int) -> bool:
    """Whether all of the jobs are, so that their waiters have been registered."""
    row = observer.execute(
        "SELECT count(*) AS number FROM roost.job_rows WHERE id = ANY (%s) AND awaited", (list(job_ids),)
    ).fetchone()
    return row is not None and row["number"] == len(job_ids)


# What it returns and raises


def test_a_job_that_has_ended_already_is_returned_at_once(client: Client, add: Callable[[], int], hand: Hand) -> None:
    job_id = add()
    hand.complete(job_id, result={"n": [1, None, "ü"]})
    for timeout in (None, 30.0, 0):
        outcome = client.wait_for(job_id, timeout=timeout)
        assert outcome == JobOutcome(job_id, "completed", {"n": [1, None, "ü"]}, [])


def test_the_end_is_told_and_not_polled(
    client: Client, add: Callable[[], int], hand: Hand, observer: Conn, pool: ThreadPoolExecutor
) -> None:
    for _ in range(3):  # from the second on, with the connection that was kept
        job_id = add()
        future = pool.submit(client.wait_for, job_id, poll_interval=LONG)
        wait_until(lambda: is_awaited(observer, job_id))  # noqa: B023
        assert not future.done()
        hand.complete(job_id, result=7)
        assert future.result(20).result == 7


def test_a_discarded_job_raises_with_its_last_error(client: Client, add: Callable[[], int], hand: Hand) -> None:
    job_id = add()
    hand.discard(job_id, "ValueError: no such order")
    with pytest.raises(JobFailed, match=f"job {job_id} ended discarded: ValueError: no such order") as failed:
        client.wait_for(job_id)
    assert (failed.value.job_id, failed.value.state) == (job_id, "discarded")
    assert failed.value.errors[-1]["error"] == "ValueError: no such order"
    assert isinstance(failed.value, RuntimeError)
    outcome = client.wait_for(job_id, raise_on_failure=False)
    assert (outcome.state, outcome.result, len(outcome.errors)) == ("discarded", None, 1)


def test_a_job_that_is_cancelled_meanwhile_raises(
    client: Client, add: Callable[[], int], observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    futures = [
        pool.submit(client.wait_for, job_id, poll_interval=LONG, raise_on_failure=raising) for raising in (True, False)
    ]
    wait_until(lambda: is_awaited(observer, job_id))
    observer.execute("SELECT roost.cancel(%s)", (job_id,))
    with pytest.raises(JobFailed, match="cancelled"):
        futures[0].result(20)
    assert futures[1].result(20).state == "cancelled"


def test_a_timeout_is_kept_and_the_job_goes_on(client: Client, add: Callable[[], int], observer: Conn) -> None:
    job_id = add()
    for timeout in (0, 0.3):
        began_at = time.monotonic()
        with pytest.raises(JobTimeoutError, match=f"job {job_id} has not ended within {timeout:g} seconds"):
            client.wait_for(job_id, timeout=timeout, poll_interval=LONG)
        assert timeout <= time.monotonic() - began_at < 20
    row = observer.execute("SELECT state FROM roost.jobs WHERE id = %s", (job_id,)).fetchone()
    assert row == {"state": "available"}


def test_what_nobody_told_is_seen_right_before_the_timeout(
    client: Client, add: Callable[[], int], observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    future = pool.submit(client.wait_for, job_id, timeout=1.0, poll_interval=LONG)
    wait_until(lambda: is_awaited(observer, job_id))
    end_untold(observer, job_id)
    assert future.result(20).state == "completed"


def end_untold(observer: Conn, job_id: int) -> None:
    observer.execute("UPDATE roost.job_rows SET state = 'completed', completed_at = now() WHERE id = %s", (job_id,))
    observer.execute("DELETE FROM roost.ready WHERE job_id = %s", (job_id,))


def test_polling_alone_carries_it(
    client: Client, add: Callable[[], int], observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    future = pool.submit(client.wait_for, job_id, timeout=None, poll_interval=0.05)
    wait_until(lambda: is_awaited(observer, job_id))
    end_untold(observer, job_id)
    assert future.result(20).state == "completed"


def test_an_id_without_a_job_is_not_found(client: Client, conn: Conn) -> None:
    with pytest.raises(JobNotFoundError, match="cannot wait for job 4711: there is no such job"):
        client.wait_for(4711)
    uncommitted = Roost("host=/nonexistent").enqueue("a", conn=conn)
    with pytest.raises(JobNotFoundError, match="commit the transaction that enqueues a job before"):
        client.wait_for(uncommitted)
    conn.rollback()


def test_a_job_that_is_deleted_meanwhile_is_not_found(
    client: Client, add: Callable[[], int], observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    future = pool.submit(client.wait_for, job_id, poll_interval=0.05)
    wait_until(lambda: is_awaited(observer, job_id))
    observer.execute("DELETE FROM roost.job_rows WHERE id = %s", (job_id,))
    with pytest.raises(JobNotFoundError, match="deleted"):
        future.result(20)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": -1}, {"timeout": float("nan")}, {"timeout": "5"}, {"timeout": True}, {"timeout": float("inf")},
        {"poll_interval": 0}, {"poll_interval": None}, {"poll_interval": -0.1}, {"poll_interval": 1e9},
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_is_refused_by_name(client: Client, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidJobError) as refused:
        client.wait_for(1, **options)
    assert refused.value.path == next(iter(options))


@pytest.mark.parametrize("job_id", ["1", True, 2**63, None])
def test_an_id_that_cannot_be_is_refused(client: Client, job_id: Any) -> None:
    with pytest.raises(InvalidJobError, match="job_id"):
        client.wait_for(job_id)


def test_a_database_without_the_schema_is_said_to_be_so(make_client: MakeClient, empty_dsn: str) -> None:
    with closing(make_client(empty_dsn)) as client, pytest.raises(SchemaError, match="roostctl migrate up"):
        client.wait_for(1)


def test_a_database_that_was_never_reached_is_an_error_at_once(make_client: MakeClient) -> None:
    with closing(make_client("host=/nonexistent")) as client, pytest.raises(psycopg.OperationalError):
        client.wait_for(1, timeout=None)
    no_thread_is_left()


# How many share what


@pytest.mark.timeout(300)
def test_a_thousand_threads_share_one_connection(dsn: str, observer: Conn, hand: Hand) -> None:
    Roost("host=/nonexistent").enqueue_many([JobInsert("a")] * 1000, conn=observer)
    job_ids = [row["id"] for row in observer.execute("SELECT id FROM roost.jobs ORDER BY id").fetchall()]
    with Roost(dsn) as roost, ThreadPoolExecutor(1000) as pool:
        futures = {job_id: pool.submit(roost.wait_for, job_id, timeout=None, poll_interval=LONG) for job_id in job_ids}
        wait_until(lambda: is_awaited(observer, *job_ids))
        assert len(ours(observer)) == 1
        assert len(waiting_threads()) == 1
        for start in range(0, 1000, 100):
            hand.complete(*job_ids[start : start + 100], result="done")
        assert [futures[job_id].result(60).id for job_id in job_ids] == job_ids
        assert len(ours(observer)) == 1
        no_thread_is_left()


@pytest.mark.timeout(300)
def test_a_thousand_tasks_share_one_connection(dsn: str, observer: Conn, hand: Hand) -> None:
    Roost("host=/nonexistent").enqueue_many([JobInsert("a")] * 1000, conn=observer)
    job_ids = [row["id"] for row in observer.execute("SELECT id FROM roost.jobs ORDER BY id").fetchall()]

    async def main() -> None:
        async with AsyncRoost(dsn) as roost:
            tasks = [asyncio.create_task(roost.wait_for(id, timeout=None, poll_interval=LONG)) for id in job_ids]
            while not is_awaited(observer, *job_ids):
                await asyncio.sleep(0.01)
            assert len(ours(observer)) == 1
            await asyncio.to_thread(hand.complete, *job_ids)
            assert [outcome.id for outcome in await asyncio.gather(*tasks)] == job_ids
            assert len(ours(observer)) == 1

    asyncio.run(main())
    no_thread_is_left()


def test_all_that_are_due_are_looked_at_in_one_query(
    dsn: str, observer: Conn, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    Roost("host=/nonexistent").enqueue_many([JobInsert("a")] * 40, conn=observer)
    sizes: list[int] = []
    look = statements.look_at_jobs

    def counted(job_ids: list[int]) -> Any:
        sizes.append(len(job_ids))
        return look(job_ids)

    monkeypatch.setattr(statements, "look_at_jobs", counted)
    with Roost(dsn) as roost:
        futures = []
        for job_id in range(1, 41):  # at different times, so that their polls are due at different times
            futures.append(pool.submit(roost.wait_for, job_id, poll_interval=0.2))
            wait_until(lambda: is_awaited(observer, job_id))  # noqa: B023
        del sizes[:]
        wait_until(lambda: sum(sizes) >= 400)  # each ten times
        assert len(sizes) <= 40
        roost.close()
        assert all(isinstance(future.exception(), RoostError) for future in futures)


def test_several_that_wait_for_one_job_all_hear_of_it(
    client: Client, add: Callable[[], int], hand: Hand, observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    futures = [pool.submit(client.wait_for, job_id, poll_interval=LONG) for _ in range(20)]
    wait_until(lambda: is_awaited(observer, job_id))
    hand.complete(job_id, result=[1])
    outcomes = [future.result(20) for future in futures]
    outcomes[0].result.append(2)  # type: ignore[union-attr]
    assert [outcome.result for outcome in outcomes[1:]] == [[1]] * 19


def test_no_end_falls_between_the_look_and_the_listening(
    client: Client, add: Callable[[], int], hand: Hand, pool: ThreadPoolExecutor
) -> None:
    for _ in range(10):
        job_ids = [add() for _ in range(30)]
        futures = []
        for job_id in job_ids:
            futures.append(pool.submit(client.wait_for, job_id, timeout=40.0, poll_interval=LONG))
            if random.random() < 0.5:
                time.sleep(random.random() * 0.005)
            hand.complete(job_id)
        for future in futures:
            assert future.result(20).state == "completed"


# What it costs


def test_nobody_pays_for_a_notification_when_nobody_waits(
    client: Client,
    add: Callable[[], int],
    hand: Hand,
    observer: Conn,
    pool: ThreadPoolExecutor,
    dsn: str,
    notified: Callable[[Conn], list[tuple[str, str]]],
) -> None:
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN roost_ended")
        unawaited, cancelled, awaited = add(), add(), add()
        hand.complete(unawaited)
        observer.execute("SELECT roost.cancel(%s)", (cancelled,))
        assert notified(listener) == []
        future = pool.submit(client.wait_for, awaited, poll_interval=LONG)
        wait_until(lambda: is_awaited(observer, awaited))
        hand.complete(awaited)
        future.result(20)
        assert notified(listener) == [("roost_ended", str(awaited))]


def test_when_nobody_waits_no_thread_is_left_and_nothing_listens(
    client: Client, add: Callable[[], int], hand: Hand, observer: Conn
) -> None:
    job_id = add()
    hand.complete(job_id)
    client.wait_for(job_id)
    no_thread_is_left()
    assert [row["query"] for row in ours(observer)] == ["UNLISTEN *"]
    (before,) = ours(observer)
    client.wait_for(job_id)
    no_thread_is_left()
    assert [row["pid"] for row in ours(observer)] == [before["pid"]]


def test_close_ends_the_waits_with_an_error_and_the_client_can_still_be_used(
    client: Client, add: Callable[[], int], hand: Hand, observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    futures = [pool.submit(client.wait_for, job_id, timeout=None, poll_interval=LONG) for _ in range(3)]
    wait_until(lambda: is_awaited(observer, job_id))
    client.close()
    for future in futures:
        with pytest.raises(RoostError, match=f"cannot wait for job {job_id} any longer: the client was closed"):
            future.result(20)
    no_thread_is_left()
    wait_until(lambda: ours(observer) == [])
    hand.complete(job_id)
    assert client.wait_for(job_id).state == "completed"


# Locks


def test_a_row_that_another_transaction_holds_keeps_nobody_past_the_timeout(
    client: Client, add: Callable[[], int], hand: Hand, observer: Conn, conn: Conn, pool: ThreadPoolExecutor
) -> None:
    held, free = add(), add()
    conn.execute("SELECT FROM roost.job_rows WHERE id = %s FOR SHARE", (held,))
    of_held = pool.submit(client.wait_for, held, timeout=40.0, poll_interval=LONG)
    of_free = pool.submit(client.wait_for, free, timeout=40.0, poll_interval=LONG)
    began_at = time.monotonic()
    with pytest.raises(JobTimeoutError):
        client.wait_for(held, timeout=0.5)
    assert time.monotonic() - began_at < 20
    wait_until(lambda: is_awaited(observer, free))
    hand.complete(free)
    assert of_free.result(20).state == "completed"
    conn.rollback()
    wait_until(lambda: is_awaited(observer, held))  # it is tried again
    hand.complete(held)
    assert of_held.result(20).state == "completed"


def test_a_table_that_is_locked_keeps_nobody_past_the_timeout(client: Client, add: Callable[[], int], dsn: str) -> None:
    job_id = add()
    with psycopg.connect(dsn) as blocker:
        blocker.execute("LOCK TABLE roost.job_rows")
        began_at = time.monotonic()
        with pytest.raises(JobTimeoutError):
            client.wait_for(job_id, timeout=0.5)
        no_thread_is_left()  # the statement is given up with the last waiter
        assert time.monotonic() - began_at < 5


# Connections that are lost


def allow_connections(postgres: EmbeddedPostgres, observer: Conn, allowed: bool) -> None:
    name = sql.Identifier(observer.info.dbname)
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:  # from another database: its own it refuses
        conn.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(name, sql.Literal(allowed)))


@pytest.mark.parametrize("ends", ["meanwhile", "afterwards"])
def test_a_connection_that_is_killed_is_made_again(
    postgres: EmbeddedPostgres,
    client: Client,
    add: Callable[[], int],
    hand: Hand,
    observer: Conn,
    pool: ThreadPoolExecutor,
    ends: str,
) -> None:
    job_id = add()
    future = pool.submit(client.wait_for, job_id, timeout=None, poll_interval=LONG)
    wait_until(lambda: is_awaited(observer, job_id))
    (row,) = ours(observer)
    if ends == "meanwhile":
        allow_connections(postgres, observer, False)
    observer.execute("SELECT pg_terminate_backend(%s)", (row["pid"],))
    wait_until(lambda: row not in ours(observer))
    if ends == "meanwhile":
        hand.complete(job_id)
        allow_connections(postgres, observer, True)
    else:
        wait_until(lambda: ours(observer))
        assert not future.done()
        hand.complete(job_id)
    assert future.result(20).state == "completed"


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


def test_a_restart_of_the_server_goes_unnoticed(
    make_client: MakeClient, server: EmbeddedPostgres, pool: ThreadPoolExecutor
) -> None:
    with Roost(server.dsn) as roost, closing(make_client(server.dsn)) as client:
        job_ids = [roost.enqueue("a") for _ in range(5)]
        futures = [pool.submit(client.wait_for, job_id, timeout=60.0, poll_interval=LONG) for job_id in job_ids]
        for mode in ("fast", "immediate"):
            with psycopg.connect(server.dsn, autocommit=True, row_factory=dict_row) as observer:
                wait_until(lambda: is_awaited(observer, *job_ids))
            server.restart(mode)
        assert not any(future.done() for future in futures)
        with closing(Hand(server.dsn)) as hand:
            hand.complete(*job_ids)
        assert {future.result(30).state for future in futures} == {"completed"}


def test_a_server_that_stays_away_is_the_reason_of_the_timeout(
    make_client: MakeClient, server: EmbeddedPostgres, pool: ThreadPoolExecutor
) -> None:
    with Roost(server.dsn) as roost, closing(make_client(server.dsn)) as client:
        job_id = roost.enqueue("a")
        with pytest.raises(JobTimeoutError):
            client.wait_for(job_id, timeout=0)
        future = pool.submit(client.wait_for, job_id, timeout=3.0)
        server.stop()
        with pytest.raises(JobTimeoutError, match="the database could not be asked: ") as timed_out:
            future.result(20)
        assert isinstance(timed_out.value.__cause__, psycopg.Error)
    no_thread_is_left()


def test_a_connection_that_swallows_everything_keeps_nobody_past_the_timeout(
    make_client: MakeClient, dsn: str, add: Callable[[], int], hand: Hand
) -> None:
    job_id = add()
    with tempfile.TemporaryDirectory(prefix="roost-test-") as folder, Proxy(dsn, Path(folder)) as proxy:
        with closing(make_client(proxy.dsn)) as client:
            hand.complete(job_id)
            client.wait_for(job_id)
            proxy.freeze()
            began_at = time.monotonic()
            with pytest.raises(JobTimeoutError):
                client.wait_for(job_id, timeout=0.5)
            assert time.monotonic() - began_at < 10
            no_thread_is_left()
            proxy.thaw()
            assert client.wait_for(job_id).state == "completed"


# Forks, interrupts, event loops


def test_a_forked_child_waits_by_itself_and_leaves_the_parent_alone(
    client: Client, add: Callable[[], int], hand: Hand, observer: Conn, pool: ThreadPoolExecutor
) -> None:
    of_parent, of_child = add(), add()
    future = pool.submit(client.wait_for, of_parent, poll_interval=LONG)
    wait_until(lambda: is_awaited(observer, of_parent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            client.close()  # has nothing of its own to close
            if client.wait_for(of_child, poll_interval=LONG).result == "child":
                client.close()
                status = 0
        finally:
            os._exit(status)
    wait_until(lambda: is_awaited(observer, of_child))
    assert len(ours(observer)) == 2
    hand.complete(of_child, result="child")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not future.done()
    hand.complete(of_parent, result="parent")
    assert future.result(20).result == "parent"


def test_an_exception_out_of_a_signal_handler_ends_the_wait(dsn: str, add: Callable[[], int], observer: Conn) -> None:
    job_id = add()

    def interrupt() -> None:
        wait_until(lambda: is_awaited(observer, job_id))
        os.kill(os.getpid(), signal.SIGINT)

    with Roost(dsn) as roost:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            roost.wait_for(job_id, timeout=None)
        thread.join()
        no_thread_is_left()


def test_a_cancelled_task_stops_waiting_and_the_others_go_on(
    dsn: str, add: Callable[[], int], hand: Hand, observer: Conn
) -> None:
    job_ids = [add() for _ in range(4)]

    async def main() -> None:
        roost = AsyncRoost(dsn)
        tasks = [asyncio.create_task(roost.wait_for(job_id, timeout=None, poll_interval=LONG)) for job_id in job_ids]
        while not is_awaited(observer, *job_ids):
            await asyncio.sleep(0.01)
        for task in tasks[:2]:
            task.cancel()
        done = await asyncio.gather(*tasks[:2], return_exceptions=True)
        assert [type(error) for error in done] == [asyncio.CancelledError] * 2
        with pytest.raises(TimeoutError) as outer:
            async with asyncio.timeout(0.05):
                await roost.wait_for(job_ids[0])
        assert not isinstance(outer.value, JobTimeoutError)
        await asyncio.to_thread(hand.complete, *job_ids[2:])
        assert [outcome.id for outcome in await asyncio.gather(*tasks[2:])] == job_ids[2:]
        no_thread_is_left()  # nobody looks for what nobody waits for any more
        await roost.close()

    asyncio.run(main())


def test_an_event_loop_that_ends_takes_its_waits_along_and_leaves_those_of_others(
    dsn: str, add: Callable[[], int], hand: Hand, observer: Conn, pool: ThreadPoolExecutor
) -> None:
    first, second = add(), add()
    roost = AsyncRoost(dsn)

    async def main() -> None:
        task = asyncio.create_task(roost.wait_for(first, timeout=None, poll_interval=LONG))
        while not is_awaited(observer, first):
            await asyncio.sleep(0.01)
        assert not task.done()

    def run(job_id: int) -> JobOutcome:
        return asyncio.run(roost.wait_for(job_id, timeout=None, poll_interval=LONG))

    future: Future[JobOutcome] = pool.submit(run, second)
    asyncio.run(main())
    wait_until(lambda: is_awaited(observer, second))
    assert len(waiting_threads()) == 1
    hand.complete(first, second)
    assert future.result(20).id == second
    no_thread_is_left()
    assert run(first).id == first
    asyncio.run(roost.close())


def test_a_loop_that_was_closed_over_a_wait_harms_nobody(
    dsn: str, add: Callable[[], int], hand: Hand, observer: Conn, pool: ThreadPoolExecutor
) -> None:
    job_id = add()
    roost = AsyncRoost(dsn)
    loop = asyncio.new_event_loop()
    waiting = roost.wait_for(job_id, timeout=None, poll_interval=LONG)
    task = loop.create_task(waiting)
    while not is_awaited(observer, job_id):
        loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    future = pool.submit(lambda: asyncio.run(roost.wait_for(job_id, timeout=None, poll_interval=LONG)))
    hand.complete(job_id)
    assert future.result(20).id == job_id
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    waiting.close()
    no_thread_is_left()
