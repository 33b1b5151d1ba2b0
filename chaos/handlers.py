"""The tasks of the campaign. Each notes its start and end in the ledger, and reports the lease that it ran under."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

from chaos.jobs import MAX_CONCURRENCY, RATE_PER_MINUTE
from chaos.ledger import Writer
from roost_client import SnoozeJob, current_job, job
from roostd.wire.packets import JobPacket

FOLDER = "CHAOS_LEDGER"  # environment variables, set for each daemon
MASTER = "CHAOS_MASTER"
DSN = "CHAOS_DSN"  # the way of handlers to the database, past the proxy

_writer: Writer | None = None


class Planned(Exception):
    """The failure that a job is there to show."""


def _current() -> JobPacket:
    """The job that this process runs, from the frame of its runner: handlers are told their arguments only."""
    frame = sys._getframe(1)
    while not isinstance(packet := frame.f_locals.get("job"), JobPacket):
        assert frame.f_back is not None, "no runner calls this"
        frame = frame.f_back
    return packet


def _connect_once() -> None:
    """Takes the 1.5 MiB that psycopg and libpq take with a first connection, so that no later job grows by them."""
    with contextlib.suppress(psycopg.OperationalError):  # a fault may have the database away
        psycopg.connect(os.environ[DSN], connect_timeout=2).close()


def noted(handler: Callable[..., None]) -> Callable[..., dict[str, int]]:
    """Has the ledger know of each run; the handler takes the packet of its job first."""

    @functools.wraps(handler)
    def run(**args: Any) -> dict[str, int]:
        global _writer
        packet = _current()
        is_first = _writer is None
        if _writer is None:
            _writer = Writer(Path(os.environ[FOLDER]), os.environ[MASTER])
        how = "returned"
        _writer.start(packet.job_id, packet.lease, packet.attempt)
        try:
            if is_first:
                _connect_once()
            handler(packet, **args)
            return {"lease": packet.lease}
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            _writer.end(packet.job_id, packet.lease, how)

    return run


@job("chaos_sleep")
@noted
def sleep(packet: JobPacket, key: int, seconds: float = 0.0) -> None:
    """Short and long ones, and those that are cancelled as they run."""
    if seconds:
        time.sleep(seconds)


@job("chaos_tick")
@noted
def tick(packet: JobPacket) -> None:
    """What cron entries enqueue."""


job("chaos_throttled", max_concurrency=MAX_CONCURRENCY)(sleep)
job("chaos_rated", rate_per_minute=RATE_PER_MINUTE)(sleep)


@job("chaos_fail")
@noted
def fail(packet: JobPacket, key: int, until: int) -> None:
    """Fails in all attempts up to `until`."""
    if packet.attempt <= until:
        raise Planned(f"attempt {packet.attempt} under lease {packet.lease}")


@job("chaos_snooze")
@noted
def snooze(packet: JobPacket, key: int, seconds: float) -> None:
    """Asks once to run later."""
    try:
        (Path(os.environ[FOLDER]) / f"snoozed-{key}").touch(exist_ok=False)
    except FileExistsError:
        return
    raise SnoozeJob(seconds)


@job("chaos_effect")
@noted
def effect(packet: JobPacket, key: int) -> None:
    """Has an effect on the database that is committed with its completion."""
    with psycopg.connect(os.environ[DSN], connect_timeout=10, options="-c statement_timeout=20s") as conn:
        with current_job().transaction(conn) as done:
            conn.execute("INSERT INTO chaos.effects (job_id, lease) VALUES (%s, %s)", (packet.job_id, packet.lease))
            done.result = {"lease": packet.lease}


@job("chaos_hang")
@noted
def hang(packet: JobPacket, key: int) -> None:
    """Never returns from C in its first attempt, whatever signals come."""
    if packet.attempt > 1:
        return
    mutex = ctypes.create_string_buffer(64)  # zeros: PTHREAD_MUTEX_INITIALIZER
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


@job("chaos_crash")
@noted
def crash(packet: JobPacket, key: int, until: int, by: str) -> None:
    """Takes its process down in all attempts up to `until`."""
    if packet.attempt > until:
        return
    if by == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@job("chaos_spawn")
@noted
def spawn(packet: JobPacket, key: int) -> None:
    """Leaves a process behind that has nothing to do with it any more: its own session, its parent gone."""
    subprocess.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 </dev/null &"], check=False)
