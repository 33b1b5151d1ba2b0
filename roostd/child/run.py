"""The life of a child: read a job, run it, report what became of it, and so on until its intake is closed.

The order matters: an outcome is sent before the next job is read, so that whatever has been read and not reported is
what a dying child took with it. Nothing here may fail because of what a handler did to its process: descriptors
closed, signals taken, a copy of the process that returns too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import setproctitle

from roost_client import CurrentJob, HandlerRegistry, Hooks, JobCancelled, SnoozeJob, UnknownTaskError
from roost_client.current import Completion, set_current
from roost_client.registry import HandlerSpec
from roost_client.results import encode_result
from roostd import linux
from roostd.child import invoke
from roostd.child.hooks import HookedRun
from roostd.child.invoke import Invoker
from roostd.child.logs import ChildLog
from roostd.core.outcome import SoftReason
from roostd.wire.frames import FrameKind, encode_frame
from roostd.wire.packets import JobPacket, PacketReader, decode_job
from roostd.wire.signals import DUMP, EXIT_UNUSABLE

ERROR_CHARACTERS = 4_000
TRACE_CHARACTERS = 32_000
TRACE_FRAMES = 60
_MAX_LEFT_ZOMBIES = 16

# Exit statuses, for the log: the master learns what became of the job from its frames alone.
EXIT_DONE = 0
EXIT_COPY = 71  # a copy made by os.fork() in a handler came back


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a pool asks of its children; bytes and counts, None for no limit."""

    max_result_bytes: int
    max_jobs_per_child: int | None
    max_rss_bytes: int | None
    memory_limit_bytes: int | None
    log_level: str
    log_format: str


class StrictArguments(ValueError):
    """Arguments that jsonb holds and Python can't: `1e5000`, or thousands of brackets."""


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise StrictArguments(f"the number {text[:40]} is beyond a Python float")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite)


def run_child(
    jobs: socket.socket,
    outcomes: socket.socket,
    control: socket.socket,
    dump_fd: int,
    registry: HandlerRegistry,
    hooks: Hooks | None,
    settings: ChildSettings,
) -> NoReturn:
    """Runs jobs until the intake is closed, and ends the process. Call it in a fresh fork, on the main thread."""
    _watch_crashes(dump_fd)
    if settings.memory_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (settings.memory_limit_bytes, settings.memory_limit_bytes))
    gc.enable()
    child = _Child(jobs, outcomes, control, registry, hooks, settings)
    try:
        child.serve()
    finally:
        # Whatever happens, never fall back into the template's code.
        _end_what_is_left()
        _flush_streams()
        os._exit(child.exit_status)


class _Child:
    def __init__(
        self,
        jobs: socket.socket,
        outcomes: socket.socket,
        control: socket.socket,
        registry: HandlerRegistry,
        hooks: Hooks | None,
        settings: ChildSettings,
    ) -> None:
        self.exit_status = EXIT_UNUSABLE
        self._pid = os.getpid()
        self._reader = PacketReader(jobs, wait=True)
        self._jobs = jobs
        self._outcomes = outcomes
        self._outcomes_inode = os.fstat(outcomes.fileno()).st_ino
        self._invoker = Invoker(control, settings.max_result_bytes)
        self._registry = registry
        self._hooks = hooks
        self._log = ChildLog(settings.log_level, settings.log_format)
        self._settings = settings
        self._title = ""
        self._done = 0
        self._left_zombies = 0

    def serve(self) -> None:
        while True:
            try:
                received = self._reader.read()
            except OSError as error:  # a handler closed it behind our back
                print(f"roostd: child {self._pid} ends: its intake is gone: {error}", file=sys.stderr)
                return
            if received is None:
                self.exit_status = EXIT_DONE
                return
            job = decode_job(*received)
            self._name_process(job)
            kind, body = self._run(job)
            if os.getpid() != self._pid:
                os._exit(EXIT_COPY)
            if not self._report(encode_frame(kind, job.lease, body)):
                return
            self._done += 1
            if self._must_end():
                self.exit_status = EXIT_DONE
                return

    def _run(self, job: JobPacket) -> tuple[FrameKind, bytes]:
        """Runs the job's handler, with the hooks around it; never raises."""
        self._invoker.forget()
        self._start_by = job.start_by
        deadline = None if job.timeout_seconds is None else time.monotonic() + job.timeout_seconds
        current = CurrentJob(
            self._invoker, job.job_id, job.attempt, job.lease, job.queue, job.task, job.labels, deadline
        )
        set_current(current)
        try:
            spec = self._registry.get(job.task)
            if spec is None:
                raise UnknownTaskError(f"no handler is registered for task {job.task!r}")
            args = _decode_arguments(job.args)
        except BaseException as error:
            return self._failure(error)
        if self._hooks is None:
            kind, body, _, _ = self._handle(spec, args, current)
        else:
            with HookedRun(self._hooks, current, self._log) as hooked:
                hooked.before()
                kind, body, result, failure = self._handle(spec, args, current, hooked)
                if os.getpid() != self._pid:
                    os._exit(EXIT_COPY)
                hooked.after(result, failure)
        return (kind, body) if current.completion is Completion.OPEN else _after_commit(current.completion, kind, body)

    def _handle(
        self, spec: HandlerSpec, args: dict[str, Any], job: CurrentJob, hooked: HookedRun | None = None
    ) -> tuple[FrameKind, bytes, Any, BaseException | None]:
        """Calls the handler: what to report of it, what it returned, what it failed with. Never raises."""
        invoker = self._invoker
        try:
            if self._start_by is not None and time.clock_gettime(time.CLOCK_BOOTTIME) > self._start_by:
                late = JobCancelled("not started: it came too late for its task's rate")
                return FrameKind.INTERRUPTED, _error_body(late), None, late
            runner = hooked.runner if hooked is not None and spec.is_async else None
            result = invoker.call(spec, args, job.lease, runner)
            if invoker.delivered is not None:
                # The handler swallowed the exception and returned: it was called off all the same.
                failure = _called_off_error(invoker.delivered)
                return _KIND_OF[invoker.delivered], _error_body(failure), None, failure
            if result is None or job.completion is not Completion.OPEN:
                return FrameKind.COMPLETED, b"", result, None
            return FrameKind.COMPLETED, encode_result(result, self._settings.max_result_bytes), result, None
        except BaseException as error:
            return *self._failure(error), None, error

    def _failure(self, error: BaseException) -> tuple[FrameKind, bytes]:
        """What to report of a run that ended with this; never raises."""
        reason = self._invoker.delivered
        kind = FrameKind.FAILED if reason is None else _KIND_OF[reason]
        try:
            if reason is None and isinstance(error, SnoozeJob):
                return FrameKind.SNOOZED, json.dumps({"seconds": float(error.seconds)}).encode()
            return kind, _error_body(error, named=None if reason is None else _NAME_OF[reason])
        except BaseException as second:  # an error is the application's: all of its parts may raise
            return kind, _text_body(f"{_name_of(error)}: <its description raised {_name_of(second)}>", "")

    def _report(self, frame: bytes) -> bool:
        """Sends an outcome; False when the channel is gone (the handler closed it, or put a file in its place)."""
        try:
            if os.fstat(self._outcomes.fileno()).st_ino != self._outcomes_inode:
                raise OSError("another file stands under its descriptor")
            self._outcomes.sendall(frame)
        except OSError as error:
            with contextlib.suppress(OSError):
                print(f"roostd: child {self._pid} ends: its outcome channel is gone: {error}", file=sys.stderr)
            return False
        return True

    def _must_end(self) -> bool:
        settings = self._settings
        if settings.max_jobs_per_child is not None and self._done >= settings.max_jobs_per_child:
            return True
        if settings.max_rss_bytes is not None and linux.rss_bytes() > settings.max_rss_bytes:
            return True
        if not self._invoker.still_armed():
            return True
        if signal.getitimer(signal.ITIMER_REAL)[0]:  # an alarm that the job left behind would hit another
            return True
        try:
            os.close(os.dup(self._outcomes.fileno()))
        except OSError:  # handlers have left so many files open that the arguments of the next job may find no room
            return True
        return self._collects_zombies()

    def _collects_zombies(self) -> bool:
        """Whether handlers have left so many dead processes behind that it is time for a new child.

        They can't be reaped here: one may belong to a Popen object whose owner still wants its status.
        """
        try:
            left = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        if left is not None:
            self._left_zombies += 1
        return self._left_zombies > _MAX_LEFT_ZOMBIES

    def _name_process(self, job: JobPacket) -> None:
        title = f"roostd: child {job.queue} {job.task}"
        if title != self._title:
            self._title = title
            setproctitle.setproctitle(title)


_KIND_OF = {
    SoftReason.TIMEOUT: FrameKind.TIMED_OUT,
    SoftReason.CANCEL: FrameKind.CANCELLED,
    SoftReason.SHUTDOWN: FrameKind.INTERRUPTED,
}
_NAME_OF = {
    SoftReason.TIMEOUT: "TimeoutError",
    SoftReason.CANCEL: "JobCancelled",
    SoftReason.SHUTDOWN: "JobInterrupted",
}


def _after_commit(completion: Completion, kind: FrameKind, body: bytes) -> tuple[FrameKind, bytes]:
    """What to report of a run that has completed its job in a transaction of its own, and then ended as said."""
    if completion is Completion.COMMITTED:
        return FrameKind.COMMITTED, _text_body("SnoozeJob", "") if kind is FrameKind.SNOOZED else body
    # A failure is written if the claim still stands, and else changes nothing: as every failure is.
    return FrameKind.UNCONFIRMED if kind is FrameKind.COMPLETED else kind, body


def _called_off_error(reason: SoftReason) -> BaseException:
    if reason is SoftReason.TIMEOUT:
        return TimeoutError("the job overran its timeout_seconds; its handler caught the exception and returned")
    return JobCancelled("the job was called off; its handler caught the exception and returned")


def _decode_arguments(text: bytes) -> dict[str, Any]:
    try:
        args = _DECODER.decode(text.decode())
    except RecursionError:
        raise StrictArguments("cannot decode args: they are nested too deeply for Python") from None
    except ValueError as error:
        raise StrictArguments(f"cannot decode args: {error}") from None
    if not isinstance(args, dict):
        raise StrictArguments(f"cannot use args: a JSON object is due, not {type(args).__name__}")
    return args


def _error_body(error: BaseException, *, named: str | None = None) -> bytes:
    name = _name_of(error)
    text = f"{name}: {_text_of(error)}" if named in (None, name) else f"{named}: ended by {name}: {_text_of(error)}"
    return _text_body(text, _trace_of(error))


def _text_body(error: str, trace: str) -> bytes:
    return json.dumps(
        {"error": safe_text(error, ERROR_CHARACTERS), "trace": safe_text(trace, TRACE_CHARACTERS)}
    ).encode()


def _name_of(error: BaseException) -> str:
    """The name of its class, whatever its metaclass says of that."""
    name: str = type.__dict__["__name__"].__get__(type(error))
    return name


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as second:
        return f"<its str() raised {_name_of(second)}>"


def _trace_of(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in _OWN_FILES:
        trace = trace.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace, limit=-TRACE_FRAMES)).strip()
    except BaseException as second:
        return f"<its traceback could not be printed: {_name_of(second)}>"


_OWN_FILES = frozenset({__file__, invoke.__file__})


def safe_text(text: str, limit: int) -> str:
    """`text` as PostgreSQL can store it (no NUL, no lone surrogate), its middle cut out where it is too long."""
    if len(text) > limit:
        half = limit // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode().replace("\x00", "\\x00")


def _watch_crashes(dump_fd: int) -> None:
    """Has stacks written to the file that the master reads: on a fatal signal, and whenever it asks."""
    # Opened anew to append: the master truncates it between dumps.
    dump = open(f"/proc/self/fd/{dump_fd}", "ab", buffering=0)  # noqa: SIM115 - faulthandler keeps the descriptor
    os.close(dump_fd)
    faulthandler.enable(dump, all_threads=False)
    faulthandler.register(DUMP, dump, all_threads=True)
    _keep.append(dump)


_keep: list[Any] = []


def _end_what_is_left() -> None:
    """Kills what jobs have left running: adopted by this process, it would be nobody's if the master is gone, too."""
    for pid in linux.children_of(os.getpid()):
        linux.kill_tree(pid)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


def reset_signals() -> None:
    """Gives handlers the dispositions a Python program starts with; the template's own would surprise them."""
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGCHLD,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGQUIT,
    ):
        signal.signal(number, signal.SIG_DFL)
    # A Ctrl-C in the terminal is the master's to handle; children are in a session of their own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
