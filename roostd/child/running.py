"""One run of a job: its arguments decoded, its handler called with the hooks around it, and what to report of it.

Never raises, whatever the handler, its hooks or its error do. Knows neither where the job came from nor where the
report goes: a child runs jobs by this, and a test does that runs them in its own process.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from typing import Any

from roost_client import CurrentJob, HandlerRegistry, Hooks, JobCancelled, SnoozeJob, UnknownTaskError
from roost_client.current import Completion, set_current
from roost_client.registry import HandlerSpec
from roost_client.results import encode_result
from roostd.child import invoke
from roostd.child.hooks import EventLog, HookedRun
from roostd.child.invoke import Invoker
from roostd.core.outcome import SoftReason
from roostd.wire.frames import FrameKind
from roostd.wire.packets import JobPacket

ERROR_CHARACTERS = 4_000
TRACE_CHARACTERS = 32_000
TRACE_FRAMES = 60

EXIT_COPY = 71  # a copy of the process, made by os.fork() in a handler, came back


class Runs:
    """What runs jobs, one at a time, with these handlers and hooks; `log` takes what their failures are."""

    def __init__(self, invoker: Invoker, registry: HandlerRegistry, hooks: Hooks | None, log: EventLog) -> None:
        self._invoker = invoker
        self._registry = registry
        self._hooks = hooks
        self._log = log
        self._pid = os.getpid()
        self._start_by: float | None = None

    def run(self, job: JobPacket) -> tuple[FrameKind, bytes]:
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
                self.end_copy()
                kind, body, result, failure = self._handle(spec, args, current, hooked)
                self.end_copy()
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
            return FrameKind.COMPLETED, encode_result(result, self._invoker.max_result_bytes), result, None
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

    def end_copy(self) -> None:
        """Ends this process if it is a copy of the one that runs jobs: the handler has forked, and both came back."""
        if os.getpid() != self._pid:
            os._exit(EXIT_COPY)


class StrictArguments(ValueError):
    """Arguments that jsonb holds and Python can't: `1e5000`, or thousands of brackets."""


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise StrictArguments(f"the number {text[:40]} is beyond a Python float")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite)


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
