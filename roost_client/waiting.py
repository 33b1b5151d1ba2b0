"""Waits for jobs to end. All that a client waits for, in threads and event loops, shares one thread and one connection.

The thread LISTENs, marks the jobs as awaited, and then looks at them, in this order: whoever ends a marked job says so,
and what ended before the mark is seen. Nobody who ends a job that is not awaited pays for that. Behind it each job is
looked at every `poll_interval`, all that are due in one query, which carries alone what is not told: behind a pooler
that gives each transaction another server a LISTEN would be lost, and none is sent.

The thread is there while somebody waits; its connection is kept, without LISTEN. Waiters keep their own time, so that
none waits longer than it was told, whatever the connection is stuck in. Knows nothing of what a job is.
"""

from __future__ import annotations

import copy
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row

from . import statements
from .connections import (
    OPTIONS,
    PREPARE_AFTER,
    SERVER_PID,
    OfOneProcess,
    OwnConnection,
    check_dsn,
    is_direct,
    is_usable,
)
from .errors import JobFailed, JobNotFoundError, JobTimeoutError, RoostError
from .statements import Look, Statement
from .types import JobOutcome, JobState

T = TypeVar("T")

CHANNEL: LiteralString = "roost_ended"
FIRST_LOOK_SECONDS = 1.0  # that even a shorter timeout gives the first look: a job that has ended is found
LAST_LOOK_SECONDS = 0.05  # before a timeout a job is looked at once more
STATEMENT_SECONDS = 10.0  # a connection that has not answered by then is dead
ABANDONED_SECONDS = 0.1  # how soon a statement notices that nobody waits any more
FIRST_PAUSE_SECONDS = 0.05  # before connecting again, doubled each time
LONGEST_PAUSE_SECONDS = 2.0
FIRST_LOCKED_SECONDS = 0.005  # before a job whose row was locked is marked again, doubled each time
LONGEST_SLEEP_SECONDS = 3600.0

# What the thread's connection says if the DSN doesn't: without it a server that vanished would be waited for for hours.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
    "fallback_application_name": "roost_client waiting",
}
# Marks need not survive a crash of the server: after one they are made again. A statement that waits for a lock on a
# table must not go on in the server when it was given up here. What the role or the database sets may not interfere.
_SESSION: LiteralString = (
    "SET synchronous_commit = off; SET default_transaction_isolation = 'read committed'; SET statement_timeout = '9s'; "
    "SET lock_timeout = 0; SET idle_session_timeout = 0; SET enable_seqscan = off"
)
# The SQLSTATE classes of a statement that will fail the same way next time: data, constraint, rights and names, limits,
# no such schema, a server that only reads.
_LASTING_CLASSES = frozenset({"22", "23", "25", "3F", "42", "54"})

_log = logging.getLogger("roost_client")


class Waiter:
    """One call of wait_for. `wake` is called, by another thread, when there is news: `looked` or `end` was set."""

    __slots__ = (
        "began_at", "end", "ends_at", "job_id", "locked_pause", "look_at", "looked", "marked", "poll_interval",
        "timeout", "told", "wake",
    )  # fmt: skip

    def __init__(self, job_id: int, timeout: float | None, poll_interval: float, wake: Callable[[], object]) -> None:
        self.job_id, self.timeout, self.poll_interval = statements.checked_wait(job_id, timeout, poll_interval)
        self.wake = wake
        self.began_at = time.monotonic()
        self.ends_at = None if self.timeout is None else self.began_at + self.timeout
        self.end: Look | Exception | None = None
        self.looked = False
        self.marked = False
        self.told = False
        self.look_at = 0.0
        self.locked_pause = FIRST_LOCKED_SECONDS

    def outcome(self, raise_on_failure: bool) -> JobOutcome:
        """What wait_for returns, once there is an `end`. Raises what it raises."""
        assert self.end is not None
        if isinstance(self.end, Exception):
            raise self.end
        outcome = JobOutcome.from_texts(self.job_id, self.end.state, self.end.result, self.end.errors)
        if raise_on_failure and self.end.state is not JobState.COMPLETED:
            raise JobFailed(self.job_id, outcome.state, outcome.errors)
        return outcome

    def plan(self, now: float) -> None:
        """Decides when to look next, after a look."""
        if self.told:  # while that look was under way: it may have been a moment too early
            self.look_at = 0.0
            return
        pause = self.poll_interval
        if not self.marked:
            pause = min(pause, self.locked_pause)
            self.locked_pause *= 2
        self.look_at = now + pause
        if self.ends_at is not None and self.look_at > self.ends_at > now + 2 * LAST_LOOK_SECONDS:
            self.look_at = self.ends_at - LAST_LOOK_SECONDS


class Waits(OfOneProcess):
    """Everybody who waits through one client, and the thread that looks for them."""

    def __init__(self, dsn: str) -> None:
        self._dsn = check_dsn(dsn)
        self._become_of_this_process()

    def _start_afresh(self) -> None:
        self._lock = threading.RLock()  # held for what follows, but never while anything is waited for
        self._waiters: dict[int, set[Waiter]] = {}
        self._thread: threading.Thread | None = None
        # In a forked child that of the parent is left open: its number may be another file's by now.
        self._nudges = -1
        self._connection_may_stay = True
        # The rest is the thread's alone.
        self._connection: _Connection | None = None
        self._has_connected = False
        self._listens = False
        self._is_direct = False
        self._trouble: Exception | None = None

    def join(self, waiter: Waiter) -> None:
        self._become_of_this_process()  # after a fork: thread, connection and those who waited are the parent's
        with self._lock:
            self._waiters.setdefault(waiter.job_id, set()).add(waiter)
            if self._thread is not None:
                self._nudge()
                return
            self._trouble = None
            self._nudges = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            # Ends with the process: those who wait in its other threads keep it alive, or do not.
            self._thread = threading.Thread(target=self._run, name="roost_client waiting", daemon=True)
            try:
                self._thread.start()
            except BaseException:
                self._forget_thread()
                raise

    def leave(self, waiter: Waiter) -> None:
        """Idempotent."""
        if not self._is_of_this_process():
            return
        with self._lock:
            self._remove(waiter)
            if not self._waiters and self._thread is not None:
                self._nudge()

    def seconds_left(self, waiter: Waiter) -> float | None:
        """How long the waiter may sleep before it asks again; None: until it is woken. Raises JobTimeoutError."""
        if waiter.ends_at is None:
            return None
        ends_at = waiter.ends_at if waiter.looked else max(waiter.ends_at, waiter.began_at + FIRST_LOOK_SECONDS)
        left = ends_at - time.monotonic()
        if left > 0:
            return min(left, LONGEST_SLEEP_SECONDS)
        trouble = self._trouble
        if trouble is not None:
            reason = f"; the database could not be asked: {_one_line(trouble)}"
        else:
            reason = "" if waiter.looked else "; the database has not answered"
        raise JobTimeoutError(
            f"job {waiter.job_id} has not ended within {waiter.timeout:g} seconds, and goes on{reason}"
        ) from trouble

    def close(self) -> None:
        """End every wait with an error, and the thread and the connection with them."""
        if not self._is_of_this_process():
            return
        with self._lock:
            for waiter in self._everybody():
                self._end(waiter, RoostError(f"cannot wait for job {waiter.job_id} any longer: the client was closed"))
            if self._thread is None:
                self._drop()
            else:
                self._connection_may_stay = False
                self._nudge()

    # -- with the lock held

    def _everybody(self) -> list[Waiter]:
        return [waiter for waiters in self._waiters.values() for waiter in waiters]

    def _remove(self, waiter: Waiter) -> None:
        others = self._waiters.get(waiter.job_id)
        if others is not None:
            others.discard(waiter)
            if not others:
                del self._waiters[waiter.job_id]

    def _end(self, waiter: Waiter, end: Look | Exception) -> None:
        waiter.end = end
        self._remove(waiter)
        waiter.wake()

    def _nudge(self) -> None:
        os.eventfd_write(self._nudges, 1)

    def _forget_thread(self) -> None:
        self._thread = None
        os.close(self._nudges)

    # -- the thread

    def _run(self) -> None:
        try:
            pause = FIRST_PAUSE_SECONDS
            while self._goes_on():
                try:
                    self._look()
                    pause = FIRST_PAUSE_SECONDS
                    self._trouble = None
                    self._hear()
                except _Abandoned:
                    self._drop()
                except psycopg.Error as error:
                    if self._is_lasting(error):
                        self._fail(error)
                    else:
                        self._trouble = error
                        self._rest(pause)
                        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        except BaseException as error:
            # A defect of ours: nobody may be left to wait for ever.
            self._fail(error)
            with self._lock:
                if self._thread is threading.current_thread():
                    self._forget_thread()
                    self._drop()
            raise

    def _goes_on(self) -> bool:
        """Whether anybody waits. If nobody does, the thread has let go of everything and is to end."""
        while True:
            with self._lock:
                if self._thread is not threading.current_thread():
                    return False  # an interrupt of join() has disowned it
                if self._waiters:
                    return True
                if not self._connection_may_stay:
                    self._drop()
                if not self._listens:
                    self._connection_may_stay = True
                    self._forget_thread()
                    return False
            # What is told from now on, nobody would read: the server would have to keep it.
            try:
                assert self._connection is not None
                self._connection.run("UNLISTEN *")
                self._listens = False
            except psycopg.Error:
                self._drop()

    def _look(self) -> None:
        """Looks at the jobs that are due, and ends the waits for those that have ended."""
        now = time.monotonic()
        with self._lock:
            everybody = self._everybody()
        if self._connection is not None and not any(waiter.look_at <= now for waiter in everybody):
            return
        connection = self._connected()
        # With those that would be due soon: so polls come to be made together, whenever the waits began.
        due = [waiter for waiter in everybody if waiter.look_at <= now + waiter.poll_interval / 2]
        for waiter in due:
            waiter.told = False
        if self._is_direct:
            if not self._listens:
                connection.run(f"LISTEN {CHANNEL}")
                self._listens = True
            unmarked = {waiter.job_id for waiter in due if not waiter.marked}
            if unmarked:
                connection.ask(statements.await_jobs(sorted(unmarked)))
        found = connection.ask(statements.look_at_jobs(sorted({waiter.job_id for waiter in due})))
        now = time.monotonic()
        with self._lock:
            for waiter in due:
                seen = found.get(waiter.job_id)
                if seen is None:
                    self._end(waiter, _no_job(waiter))
                elif seen.state.is_terminal:
                    self._end(waiter, seen)
                else:
                    waiter.marked = seen.awaited or not self._is_direct
                    waiter.plan(now)
                    if not waiter.looked:
                        waiter.looked = True
                        waiter.wake()

    def _hear(self) -> None:
        """Waits until a job is due: by its time, because its end was told, or because somebody new waits for it."""
        connection = self._connection
        assert connection is not None
        with self._lock:
            if not self._waiters:
                return
            look_at = min(waiter.look_at for waiter in self._everybody())
        self._sleep_until(look_at, connection.fileno())
        connection.pgconn.consume_input()
        while (notify := connection.pgconn.notifies()) is not None:
            self._on_told(notify.extra)

    def _on_told(self, payload: bytes) -> None:
        try:
            job_id = int(payload)
        except ValueError:  # anyone may send anything
            return
        with self._lock:
            for waiter in self._waiters.get(job_id, ()):
                waiter.told, waiter.look_at = True, 0.0

    def _sleep_until(self, at: float, *descriptors: int) -> None:
        """Sleeps until then, or until a nudge or one of the descriptors has something to say."""
        poll = select.poll()
        for descriptor in (self._nudges, *descriptors):
            poll.register(descriptor, select.POLLIN)
        seconds = min(max(0.0, at - time.monotonic()), LONGEST_SLEEP_SECONDS)
        poll.poll(seconds * 1000)
        try:
            os.eventfd_read(self._nudges)
        except BlockingIOError:
            pass  # it was something else

    def _rest(self, seconds: float) -> None:
        """Lets go of the connection, and sleeps as long as somebody waits; nobody new shortens it."""
        self._drop()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self._lock:
                if not self._waiters:
                    return
            self._sleep_until(until)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            for waiter in self._everybody():
                self._end(waiter, _error_for(waiter, error, self._connection))

    def _is_lasting(self, error: psycopg.Error) -> bool:
        """Whether there is no point in trying again. What was never reached is more likely misnamed than away."""
        if not self._has_connected:
            return True
        return error.sqlstate is not None and error.sqlstate[:2] in _LASTING_CLASSES

    def _connected(self) -> _Connection:
        if self._connection is None or not (self._listens or is_usable(self._connection)):
            self._drop()
            given = conninfo_to_dict(self._dsn)
            defaults: dict[str, Any] = {key: value for key, value in _DEFAULTS.items() if key not in given}
            connection = _Connection.connect(self._dsn, **{**OPTIONS, **defaults})
            self._has_connected = True
            connection.is_abandoned = lambda: not self._waiters
            self._connection = connection
            connection.add_notify_handler(lambda notify: self._on_told(notify.payload.encode()))
            self._is_direct = is_direct(connection, connection.execute(SERVER_PID).fetchone())
            if self._is_direct:
                connection.prepare_threshold = PREPARE_AFTER
                connection.run(_SESSION)
            else:
                _log.info("a pooler stands before the database: jobs that are waited for are polled")
            with self._lock:
                for waiter in self._everybody():
                    waiter.marked, waiter.look_at = False, 0.0
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._listens = False
        if connection is not None:
            connection.pgconn.finish()


class _Abandoned(psycopg.OperationalError):
    """A statement was given up because nobody waits any more; its connection is of no use."""


class _Connection(OwnConnection):
    """That of the thread: no statement on it outlasts the interest in it."""

    is_abandoned: Callable[[], bool] = staticmethod(lambda: False)

    def run(self, sql: LiteralString) -> None:
        self.execute(sql)

    def ask(self, statement: Statement[T]) -> T:
        cursor = psycopg.Cursor(self, row_factory=tuple_row)
        cursor.execute(statement.sql, statement.parameters)
        return statement.read(cursor.fetchall())

    def wait(self, gen: PQGen[T], interval: float = ABANDONED_SECONDS, timeout: float | None = None) -> T:
        """As psycopg's, but it gives up, and the connection with it."""
        return super().wait(self._bounded(gen), ABANDONED_SECONDS)

    def _bounded(self, gen: PQGen[T]) -> PQGen[T]:
        ends_at = time.monotonic() + STATEMENT_SECONDS
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and self.is_abandoned():
                    raise _Abandoned("nobody waits any more")
                if not ready and time.monotonic() > ends_at:
                    raise psycopg.OperationalError(f"no answer within {STATEMENT_SECONDS:g} seconds")
                wanted = gen.send(ready)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def _no_job(waiter: Waiter) -> JobNotFoundError:
    return JobNotFoundError(
        f"cannot wait for job {waiter.job_id}: there is no such job, or it was deleted; commit the transaction that"
        " enqueues a job before you wait for it"
        if not waiter.looked
        else f"cannot wait for job {waiter.job_id} any longer: it was deleted"
    )


def _error_for(waiter: Waiter, error: BaseException, connection: OwnConnection | None) -> Exception:
    """An error of the waiter's own: many threads can't raise one and the same."""
    what = f"wait for job {waiter.job_id}"
    if not isinstance(error, psycopg.Error):
        own: Exception = RoostError(f"cannot {what}: {type(error).__name__}: {error}")
    else:
        clearer = None if connection is None else statements.explained(error, what, connection)
        own = copy.copy(error) if clearer is None else clearer
    own.__cause__ = error
    return own


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
