"""How a handler is called, and how a job that runs is called off from a signal.

The rule: an exception is raised only while the handler of the lease that is meant runs, and never in this module's own
frames, so it can hit neither the runner, nor its bookkeeping, nor another job. A call-off that comes late is dropped,
one that comes early is kept until the handler is to run, one that comes while the handler commits with its job until it
is through with that.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal makes an enum of every answer: 3 µs a job
import asyncio
import contextlib
import inspect
import json
import signal
import socket
import struct
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from pydantic import BaseModel

from roost_client import JobCancelled
from roost_client.current import UNINTERRUPTED
from roost_client.registry import HandlerSpec
from roostd.core.outcome import SoftReason
from roostd.wire.packets import decode_control
from roostd.wire.signals import SOFT


class JobInterrupted(JobCancelled):
    """The worker is shutting down and the job did not end in time; it runs again elsewhere, at no cost."""


_EXCEPTIONS: dict[SoftReason, Callable[[], BaseException]] = {
    SoftReason.TIMEOUT: lambda: TimeoutError("the job overran its timeout_seconds"),
    SoftReason.CANCEL: lambda: JobCancelled("the job was cancelled"),
    SoftReason.SHUTDOWN: lambda: JobInterrupted("the worker is shutting down"),
}


_KEPT_CALL_OFFS = 64  # a late one has nobody to take it out


class Invoker:
    """Calls handlers, one at a time, on the main thread; it is the `Runner` of their current job.

    Without `control` no job is called off: then it takes no signal, and any thread will do.
    """

    def __init__(self, control: socket.socket | None, max_result_bytes: int) -> None:
        self.max_result_bytes = max_result_bytes
        self.delivered: SoftReason | None = None  # what was raised in the handler that ran last
        self._control = control
        self._called_off: dict[int, SoftReason] = {}  # by lease; of jobs that are over, or yet to start
        self._lease = 0
        self._running = False
        self._is_async = False
        self._task: asyncio.Task[Any] | None = None
        self._held = 0
        self._put_off = False
        self._reading = False
        self._unread = True
        own = (
            Invoker.call,
            Invoker._call_async,
            Invoker._run_task,
            Invoker._on_soft,
            Invoker._read_control,
            Invoker._deliver,
            Invoker.cancel_requested,
            Invoker.hold,
            Invoker.let_go,
            *UNINTERRUPTED,
        )
        self._own_code = {function.__code__ for function in own}
        if control is not None:
            control.setblocking(False)
            signal.signal(SOFT, self._on_soft)
            self._read_control()  # until now the signal was ignored

    def call(self, spec: HandlerSpec, args: dict[str, Any], lease: int, runner: asyncio.Runner | None = None) -> Any:
        """The handler's result; whatever it raises. An async one runs in the loop of `runner`, or else in its own."""
        self.delivered = self._task = None
        self._held, self._put_off = 0, False
        self._lease = lease
        self._is_async = spec.is_async
        self._running = True
        try:
            # The job may be called off from the moment that it is read. Python takes in signals where a function is
            # called or has returned: there is no such place between this look and the handler's own frames.
            if lease in self._called_off:
                raise self._deliver(self._called_off[lease])
            if spec.is_async:
                return self._call_async(spec, args, runner)
            result = _bound_call(spec, args)
        finally:
            self._running = False
        if inspect.isawaitable(result):
            _close(result)
            raise TypeError(f"handler {spec.name!r} returned an awaitable: declare it with `async def`")
        return result

    def forget(self) -> None:
        """Forgets what the last job was called off for: the next one may never get as far as `call`."""
        self.delivered = None

    def still_armed(self) -> bool:
        """Whether the signal still reaches us: a handler may have taken it for itself, or blocked it."""
        blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
        return bool(_signal.getsignal(SOFT) == self._on_soft) and SOFT not in blocked

    def cancel_requested(self, lease: int) -> bool:
        """Whether a cancel of this lease has come, also one that its signal has yet to tell of. For any thread."""
        self._unread = True
        if not self._reading:
            self._read_control()  # a signal meanwhile leaves the raising to the reminder that follows it
        return self._called_off.get(lease) is SoftReason.CANCEL

    def hold(self, lease: int) -> None:
        """Raises nothing in the handler of this lease until `let_go`. For any thread."""
        if lease == self._lease and self._running:
            self._held += 1

    def let_go(self, lease: int) -> None:
        """Ends a `hold`, and raises what came meanwhile: here, or in the task."""
        if lease != self._lease or not self._held:
            return
        self._held -= 1
        if self._held or not self._running:
            return
        if self._put_off and self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._cancel_task)
        elif (
            not self._is_async
            and self.delivered is None
            and lease in self._called_off
            and threading.current_thread() is threading.main_thread()  # to another it means nothing
        ):
            raise self._deliver(self._called_off[lease])

    def _call_async(self, spec: HandlerSpec, args: dict[str, Any], given: asyncio.Runner | None) -> Any:
        with asyncio.Runner() if given is None else contextlib.nullcontext(given) as runner:
            try:
                return runner.run(self._run_task(spec, args))
            except asyncio.CancelledError as cancelled:
                if self.delivered is None:
                    raise
                # Where the coroutine was is worth more than where this is raised.
                raise _EXCEPTIONS[self.delivered]().with_traceback(cancelled.__traceback__) from None

    async def _run_task(self, spec: HandlerSpec, args: dict[str, Any]) -> Any:
        self._task = asyncio.current_task()
        try:
            if self._lease in self._called_off:
                self._deliver(self._called_off[self._lease])
                raise asyncio.CancelledError
            return await _bound_call(spec, args)
        finally:
            self._task = None

    def _on_soft(self, _number: int, frame: FrameType | None) -> None:
        self._unread = True
        if self._reading:  # this signal has come while the one before it was taken in
            return
        self._read_control()
        if not self._running or self.delivered is not None or self._lease not in self._called_off:
            return
        reason = self._called_off[self._lease]
        if self._is_async:
            # Into the task, not into whatever frame of the event loop this signal hit. The task looks before it starts.
            if self._task is not None:
                self._deliver(reason)
                self._task.get_loop().call_soon_threadsafe(self._cancel_task)
        elif not self._held and frame is not None and frame.f_code not in self._own_code:
            raise self._deliver(reason)

    def _cancel_task(self) -> None:
        """In the loop, between two steps of the task."""
        self._put_off = self._held > 0
        if self._task is not None and not self._put_off:
            self._task.cancel()

    def _read_control(self) -> None:
        if self._control is None:
            return
        self._reading = True
        while self._unread:
            self._unread = False
            with contextlib.suppress(OSError):  # there is no more; or the handler closed it
                while packet := self._control.recv(64):
                    with contextlib.suppress(ValueError, struct.error):  # nothing that the master sends
                        number, lease = decode_control(packet)
                        self._called_off[lease] = SoftReason(number)
        while len(self._called_off) > _KEPT_CALL_OFFS:
            del self._called_off[next(iter(self._called_off))]
        self._reading = False

    def _deliver(self, reason: SoftReason) -> BaseException:
        self.delivered = reason
        return _EXCEPTIONS[reason]()


def _bound_call(spec: HandlerSpec, args: dict[str, Any]) -> Any:
    if spec.args_model is None:
        return spec.func(**args)
    # From JSON, as at enqueue: by its rules a strict model takes a UUID or a time as text.
    model = spec.args_model.model_validate_json(json.dumps(args))
    if _takes_model(spec):
        return spec.func(model)
    return spec.func(**{name: getattr(model, name) for name in type(model).model_fields}, **(model.model_extra or {}))


_TAKES_MODEL: dict[int, tuple[HandlerSpec, bool]] = {}  # by identity; a spec that is kept here lends its id to no other


def _takes_model(spec: HandlerSpec) -> bool:
    """Whether the handler has one parameter, annotated with its args_model: then it gets the model, else its fields."""
    known = _TAKES_MODEL.get(id(spec))
    if known is None:
        known = _TAKES_MODEL[id(spec)] = spec, _annotated_with(spec.func, spec.args_model)
    return known[1]


def _annotated_with(func: Callable[..., Any], model: type[BaseModel] | None) -> bool:
    if model is None:
        return False
    try:
        signature = inspect.signature(func, eval_str=True)
    except Exception:  # not all that an annotation names need exist at run time
        signature = inspect.signature(func)
    parameters = list(signature.parameters.values())
    return (
        len(parameters) == 1
        and parameters[0].kind in (parameters[0].POSITIONAL_ONLY, parameters[0].POSITIONAL_OR_KEYWORD)
        and parameters[0].annotation in (model, model.__name__)
    )


def _close(awaitable: Any) -> None:
    """Keeps Python from complaining of a coroutine that was never awaited; the job fails with our own words."""
    if inspect.iscoroutine(awaitable):
        awaitable.close()
