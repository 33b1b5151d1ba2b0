"""More handlers of the child's tests: those that ask for their job, and complete it in a transaction of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import psycopg

from roost_client import CurrentJob, JobCancelled, RoostError, current_job, job
from roostd.wire.signals import SOFT
from tests.child.telling import tell

ADD = "UPDATE counter SET n = n + 1"


def describe() -> dict[str, Any]:
    job = current_job()
    return {
        "id": job.id,
        "attempt": job.attempt,
        "lease": job.lease,
        "queue": job.queue,
        "task": job.task,
        "tags": list(job.tags),
        "metadata": job.metadata,
        "left": None if job.deadline is None else job.deadline - time.monotonic(),
    }


@job("describe")
def describe_in_helper() -> dict[str, Any]:
    assert current_job() is current_job()
    return describe()


@job("describe_in_coroutine")
async def describe_in_coroutine() -> dict[str, Any]:
    await asyncio.sleep(0)
    here = current_job()

    async def in_task() -> CurrentJob:
        return current_job()

    assert await asyncio.create_task(in_task()) is here
    assert await asyncio.to_thread(current_job) is here
    return await asyncio.to_thread(describe)


@job("describe_in_thread")
def describe_in_thread() -> str:
    """A thread that is there for longer than the job must not take the next one for its own."""
    said: list[str] = []

    def ask() -> None:
        try:
            current_job()
        except RoostError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return said[0]


@job("say")
def say(text: str, level: int) -> None:
    current_job().log.log(level, "%s", text, extra={"order": 17, "level": "not this", "event": "nor this"})


@job("say_error")
def say_error() -> None:
    logging.basicConfig(format="of the application's own: %(message)s", force=True)
    try:
        raise ValueError("no good")
    except ValueError:
        current_job().log.exception("it failed")


@job("see_cancel")
def see_cancel(post: str) -> list[bool]:
    """What cancel_requested says before, while the signal is blocked, and in the exception."""
    seen = [current_job().cancel_requested]
    signal.pthread_sigmask(signal.SIG_BLOCK, [SOFT])
    tell(post)
    while not current_job().cancel_requested:
        time.sleep(0.001)
    tell(post, "seen")
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SOFT])
        time.sleep(60)
    except JobCancelled:
        tell(post, f"and {current_job().cancel_requested}")
        raise
    return seen


@job("look_for_cancel")
def look_for_cancel(number: int) -> int:
    """Asks again and again, as a handler with a loop of its own does; most of its time is its own."""
    seen = 0
    for _ in range(number):
        seen += current_job().cancel_requested
        for _ in range(500):
            pass
    return seen


# -- transactions


@job("commit")
def commit(dsn: str, mode: str = "plain", then: str = "return", result: Any = None) -> Any:
    with psycopg.connect(dsn, application_name="handler", autocommit=mode == "autocommit") as conn:
        with conn.transaction() if mode == "nested" else contextlib.nullcontext():
            with current_job().transaction(conn) as tx:
                conn.execute(ADD)
                tx.result = result
            if then == "fail":
                raise ValueError("after it")
    return {"fail": None, "return an object": object(), "sleep": None}.get(then)


@job("commit_and_wait")
def commit_and_wait(dsn: str, post: str) -> None:
    with psycopg.connect(dsn) as conn, current_job().transaction(conn):
        conn.execute(ADD)
    tell(post, "committed")
    time.sleep(60)


@job("commit_in_coroutine")
async def commit_in_coroutine(dsn: str, then: str = "return") -> None:
    async with await psycopg.AsyncConnection.connect(dsn, application_name="handler") as conn:
        async with current_job().transaction(conn):
            await conn.execute(ADD)
        if then == "wait":
            await asyncio.sleep(60)


@job("commit_in_thread")
def commit_in_thread(dsn: str) -> None:
    here = current_job()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with psycopg.connect(dsn, application_name="handler") as conn, here.transaction(conn):
                conn.execute(ADD)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@job("swallow_rollback")
def swallow_rollback(dsn: str) -> str:
    with psycopg.connect(dsn) as conn:
        with contextlib.suppress(KeyError), current_job().transaction(conn):
            conn.execute(ADD)
            raise KeyError("no")
    return "done another way"


kept: list[psycopg.Connection[Any]] = []


@job("sleep_in_block")
def sleep_in_block(dsn: str, post: str) -> None:
    """On a connection that outlives the job, as that of a pool does."""
    kept.append(psycopg.connect(dsn, application_name="handler"))
    with current_job().transaction(kept[-1]):
        kept[-1].execute(ADD)
        tell(post)
        kept[-1].execute("SELECT pg_sleep(60)")


@job("is_kept_connection_closed")
def is_kept_connection_closed() -> bool:
    return kept[-1].closed


@job("lose_the_answer")
def lose_the_answer(dsn: str) -> None:
    """Cuts its own connection while the COMMIT is under way: the server learns of it when it has committed."""
    with psycopg.connect(dsn, application_name="handler") as conn:

        def cut() -> None:
            with psycopg.connect(dsn, autocommit=True) as other:
                waiting = "SELECT 1 FROM pg_locks WHERE pid = %s AND locktype = 'advisory' AND NOT granted"
                while not other.execute(waiting, [conn.info.backend_pid]).fetchone():
                    time.sleep(0.005)
            with socket.socket(fileno=os.dup(conn.fileno())) as ours:
                ours.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            with current_job().transaction(conn):
                conn.execute(ADD)
        finally:
            thread.join()
