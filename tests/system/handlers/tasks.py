"""The tasks of the tests: well-behaved ones, and those that do to their process the worst that Python allows.

They leave their traces in the working directory, which is the folder of the test's daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from pydantic import BaseModel

import roost_client
from roost_client import SnoozeJob, current_job, job

# -- well-behaved


@job("noop")
def noop() -> None:
    pass


@job("echo")
def echo(value: Any) -> Any:
    return value


@job("whoami")
def whoami() -> int:
    return os.getpid()


@job("note")
def note(line: str, seconds: float = 0) -> int:
    """Appends a line to notes.txt, in one write; its process."""
    time.sleep(seconds)
    write_note(line)
    return os.getpid()


def write_note(line: str) -> None:
    with open("notes.txt", "a") as file:
        file.write(f"{line}\n")


@job("sleep")
def sleep(seconds: float) -> None:
    time.sleep(seconds)


@job("hold")
def hold(key: str) -> int:
    """Makes the file KEY.started, and ends when there is a file KEY.go."""
    Path(f"{key}.started").touch()
    while not Path(f"{key}.go").exists():
        time.sleep(0.01)
    return os.getpid()


@job("hold_and_fail")
def hold_and_fail(key: str) -> None:
    raise ValueError(f"after {hold(key)}")


@job("hold_cleanly")
def hold_cleanly(key: str) -> int:
    """As `hold`, with something to clean up that takes a moment."""
    try:
        return hold(key)
    finally:
        time.sleep(0.1)
        write_note(f"{key} cleaned up")


@job("typed", args_model=type("Order", (BaseModel,), {"__annotations__": {"number": int, "note": str}}))
def typed(number: int, note: str) -> str:
    return f"{number} {note}"


@job("enqueue_more")
def enqueue_more(dsn: str, task: str) -> int:
    roost_client.configure(dsn)
    return roost_client.enqueue(task)


@job("snooze")
def snooze(key: str, times: int, seconds: float) -> int:
    """Asks to run later the first `times` times; how often it ran."""
    write_note(key)
    ran = Path("notes.txt").read_text().splitlines().count(key)
    if ran <= times:
        raise SnoozeJob(seconds)
    return ran


@job("coroutine")
async def coroutine(seconds: float, key: str = "") -> str:
    if key:
        Path(f"{key}.started").touch()
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        write_note(f"{key} saw CancelledError")
        raise
    return "awaited"


@job("coroutine_cpu")
async def coroutine_cpu(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pass


# -- failures


@job("fail")
def fail(text: str = "it went wrong") -> None:
    raise ValueError(text)


@job("fail_first")
def fail_first(key: str, times: int) -> int:
    write_note(key)
    ran = Path("notes.txt").read_text().splitlines().count(key)
    if ran <= times:
        raise ValueError(f"run {ran} fails")
    return ran


@job("error_without_text")
def error_without_text() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    raise Unprintable


@job("error_with_odd_text")
def error_with_odd_text() -> None:
    raise ValueError("nul \0, surrogate \udc80, and the rest")


@job("huge_error")
def huge_error() -> None:
    raise ValueError("x" * 50_000_000)


@job("deep_recursion")
def deep_recursion(depth: int = 0) -> None:
    deep_recursion(depth + 1)


@job("unserialisable")
def unserialisable() -> object:
    return {"when": {1, 2}}


@job("huge_result")
def huge_result() -> str:
    return "x" * 100_000_000


@job("sized_result")
def sized_result(size_bytes: int) -> str:
    """A result that takes as many bytes as JSON."""
    return "x" * (size_bytes - 2)


@job("odd_result")
def odd_result(kind: str) -> Any:
    circle: list[Any] = []
    circle.append(circle)
    return {"nan": float("nan"), "nul": "a\0b", "surrogate": "\udc80", "circle": circle, "key": {(1, 2): 3}}[kind]


@job("returns_awaitable")
def returns_awaitable() -> Any:
    return asyncio.sleep(0)


# -- ends of the process


@job("os_exit")
def os_exit(status: int) -> None:
    os._exit(status)


@job("sys_exit")
def sys_exit(status: int) -> None:
    sys.exit(status)


@job("keyboard_interrupt")
def keyboard_interrupt() -> None:
    raise KeyboardInterrupt


@job("sigint_to_self")
def sigint_to_self() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


@job("signal_to_self")
def signal_to_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


@job("kill_group")
def kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


@job("segfault")
def segfault() -> None:
    ctypes.string_at(0)


@job("abort")
def abort() -> None:
    os.abort()


@job("crash_first")
def crash_first(key: str, times: int) -> int:
    write_note(key)
    ran = Path("notes.txt").read_text().splitlines().count(key)
    if ran <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return ran


# -- what else a process can do


@job("fork_and_return_twice")
def fork_and_return_twice() -> str:
    return "copy" if os.fork() == 0 else "original"


@job("fork_and_raise_twice")
def fork_and_raise_twice() -> None:
    os.fork()
    raise ValueError("both")


@job("close_descriptors")
def close_descriptors(first: int) -> str:
    os.closerange(first, 4096)
    return "done"


@job("reuse_descriptors")
def reuse_descriptors() -> str:
    """Puts other files under every number that was open."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number not in (0, 1, 2, null):
            os.dup2(null, number)
    return "done"


@job("print_much")
def print_much(number: int) -> None:
    line = "x" * 999 + "\n"
    for _ in range(number // len(line)):
        sys.stdout.write(line)


@job("swallow_everything")
def swallow_everything() -> None:
    while True:
        try:
            while True:
                time.sleep(0.01)
        except BaseException:
            continue


@job("swallow_once")
def swallow_once(key: str) -> str:
    """Catches what calls it off, and returns as if nothing had happened."""
    try:
        hold(key)
    except BaseException as error:
        write_note(f"{key} swallowed {type(error).__name__}")
    return "done anyway"


@job("stuck_in_sleep")
def stuck_in_sleep() -> None:
    time.sleep(3600)


@job("stuck_in_regex")
def stuck_in_regex() -> None:
    """Takes longer than the universe has; looks for signals now and then."""
    re.match(r"(?:a|aa)*b", "a" * 200)


@job("stuck_in_c")
def stuck_in_c(key: str = "") -> None:
    """Never gets back to the interpreter, so no exception can be raised in it."""
    if key:
        Path(f"{key}.started").touch()
    deque(itertools.repeat(None), maxlen=0)


@job("deaf")
def deaf(key: str = "") -> None:
    """Ignores and blocks every signal that can be."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            continue
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    if key:
        Path(f"{key}.started").touch()
    time.sleep(3600)


@job("daemonise")
def daemonise(key: str) -> None:
    """Starts a daemon of its own, in another session, whose pid stands in KEY.pid; then heeds nothing."""
    start_daemon(key)
    swallow_everything()


@job("daemonise_and_die")
def daemonise_and_die(key: str) -> None:
    start_daemon(key)
    os.kill(os.getpid(), signal.SIGKILL)


def start_daemon(key: str) -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path(f"{key}.part").write_text(str(os.getpid()))
            os.rename(f"{key}.part", f"{key}.pid")
            time.sleep(3600)
        os._exit(0)
    while not Path(f"{key}.pid").exists():
        time.sleep(0.01)


@job("fill_memory")
def fill_memory(size: int) -> int:
    """Takes memory and keeps it; its process."""
    kept.append(b"x" * size)
    return os.getpid()


kept: list[bytes] = []


@job("leave_zombies")
def leave_zombies(number: int) -> int:
    for _ in range(number):
        if os.fork() == 0:
            os._exit(0)
    return os.getpid()


@job("tick")
def tick(key: str) -> None:
    """Writes the time to KEY.ticks every few milliseconds, until there is a file KEY.go."""
    Path(f"{key}.started").touch()
    with open(f"{key}.ticks", "a") as file:
        while not Path(f"{key}.go").exists():
            file.write(f"{time.time()}\n")
            file.flush()
            time.sleep(0.005)


@job("environment")
def environment() -> list[str]:
    return list(os.environ)


# -- the current job, and transactions of its own


@job("tell_of_itself")
def tell_of_itself() -> dict[str, Any]:
    here = current_job()
    here.log.info("told", extra={"order": 17})
    return {"id": here.id, "tags": here.tags, "metadata": here.metadata, "lasts": here.deadline is not None}


kept_connection: psycopg.Connection[Any] | None = None


def connection(dsn: str) -> psycopg.Connection[Any]:
    """That of the process, or a new one where it is broken."""
    global kept_connection
    if kept_connection is None or kept_connection.info.transaction_status != TransactionStatus.IDLE:
        if kept_connection is not None:
            kept_connection.close()
        kept_connection = psycopg.connect(dsn, application_name="handler")
    return kept_connection


@job("add_one")
def add_one(dsn: str, before: float = 0, after: float = 0, nested: bool = False, dies: bool = False) -> None:
    """In its block it waits before and after it writes; in a later run than the first not for long."""
    before = min(before, 0.01) if current_job().attempt > 1 else before
    conn = connection(dsn)
    with conn.transaction() if nested else contextlib.nullcontext():
        with current_job().transaction(conn):
            time.sleep(before)
            conn.execute("UPDATE counter SET n = n + 1")
            time.sleep(after)
    if dies:
        os._exit(0)


@job("add_one_in_coroutine")
async def add_one_in_coroutine(dsn: str, before: float = 0, after: float = 0) -> None:
    async with await psycopg.AsyncConnection.connect(dsn, application_name="handler") as conn:
        async with current_job().transaction(conn):
            await asyncio.sleep(before)
            await conn.execute("UPDATE counter SET n = n + 1")
            await asyncio.sleep(after)


@job("add_one_and_fail")
def add_one_and_fail(dsn: str) -> None:
    add_one(dsn)
    raise ValueError("after the commit")


@job("add_one_and_hold")
def add_one_and_hold(dsn: str, key: str) -> None:
    """Completes the job in a transaction that it keeps open, until there is a file KEY.go; or KEY.undo."""
    with psycopg.connect(dsn, application_name="handler") as conn:
        with conn.transaction():
            with current_job().transaction(conn):
                conn.execute("UPDATE counter SET n = n + 1")
            Path(f"{key}.started").touch()
            while not Path(f"{key}.go").exists():
                if Path(f"{key}.undo").exists():
                    raise psycopg.Rollback
                time.sleep(0.01)


@job("add_one_and_leave_open")
def add_one_and_leave_open(dsn: str, key: str) -> None:
    """Returns, and leaves it to a thread to commit when there is a file KEY.go, or to roll back."""
    conn = psycopg.connect(dsn, application_name="handler")
    conn.execute("SELECT 1")
    with current_job().transaction(conn):
        conn.execute("UPDATE counter SET n = n + 1")

    def end() -> None:
        while not (go := Path(f"{key}.go").exists()) and not Path(f"{key}.undo").exists():
            time.sleep(0.01)
        conn.commit() if go else conn.rollback()
        conn.close()

    threading.Thread(target=end, daemon=True).start()


@job("add_one_later")
def add_one_later(dsn: str, key: str) -> None:
    """Waits in its block for a file KEY.go."""
    with psycopg.connect(dsn, application_name="handler") as conn, current_job().transaction(conn):
        conn.execute("UPDATE counter SET n = n + 1")
        hold(key)
        conn.execute("SELECT 1")


@job("add_one_and_lose_the_answer")
def add_one_and_lose_the_answer(dsn: str, key: str) -> None:
    """Cuts its own connection while the COMMIT waits for an advisory lock."""
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
                conn.execute("UPDATE counter SET n = n + 1")
        finally:
            thread.join()
