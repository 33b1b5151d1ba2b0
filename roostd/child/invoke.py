"""How a handler is called, and how a job that runs is called off from a signal.

The rule: an exception is raised only while the handler of the lease that is meant runs, and never in this module's own
frames, so it can hit neither the runner, nor its bookkeeping, nor another job. A call-off that comes late is dropped.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal makes an enum of every answer: 3 µs a job
import asyncio
import inspect
import json
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

from pydantic import BaseModel

from roost_client import JobCancelled
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


class Invoker:
    """Calls handlers, one at a time, on the main thread."""

    def __init__(self, control: socket.socket) -> None:
        self.delivered: SoftReason | None = None  # what was raised in the handler that ran last
        self._control = control
        self._lease = 0
        self._running = False
        self._pending: SoftReason | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._own_code = {Invoker.call.__code__, Invoker._call_async.__code__, Invoker._run_task.__code__}
        control.setblocking(False)
        signal.signal(SOFT, self._on_soft)

    def call(self, spec: HandlerSpec, args: dict[str, Any], lease: int) -> Any:
        """The handler's result; whatever it raises."""
        self.delivered = self._pending = self._task = None
        self._lease = lease
        self._running = True
        try:
            if self._pending is not None:
                raise self._deliver(self._pending)
            if spec.is_async:
                return self._call_async(spec, args)
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

    def _call_async(self, spec: HandlerSpec, args: dict[str, Any]) -> Any:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            try:
                return runner.run(self._run_task(spec, args))
            except asyncio.CancelledError as cancelled:
                if self.delivered is None:
                    raise
                # Where the coroutine was is worth more than where this is raised.
                raise _EXCEPTIONS[self.delivered]().with_traceback(cancelled.__traceback__) from None
            finally:
                self._loop = None

    async def _run_task(self, spec: HandlerSpec, args: dict[str, Any]) -> Any:
        self._task = asyncio.current_task()
        if self._pending is not None:
            self._deliver(self._pending)
            raise asyncio.CancelledError
        try:
            return await _bound_call(spec, args)
        finally:
            self._task = None

    def _on_soft(self, _signal: int, frame: FrameType | None) -> None:
        reason: SoftReason | None = None
        while True:
            try:
                packet = self._control.recv(64)
            except OSError:
                break
            if not packet:
                break
            number, lease = decode_control(packet)
            if lease == self._lease:
                reason = SoftReason(number)
        if reason is None or not self._running or self.delivered is not None:
            return
        if self._loop is not None:
            # Into the task, not into whatever frame of the event loop this signal hit.
            if self._task is None:
                self._pending = reason
            else:
                self._deliver(reason)
                self._loop.call_soon_threadsafe(self._task.cancel)
        elif frame is None or frame.f_code in self._own_code:
            self._pending = reason
        else:
            raise self._deliver(reason)

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


_TAKES_MODEL: dict[int, bool] = {}


def _takes_model(spec: HandlerSpec) -> bool:
    """Whether the handler has one parameter, annotated with its args_model: then it gets the model, else its fields."""
    known = _TAKES_MODEL.get(id(spec))
    if known is None:
        known = _TAKES_MODEL[id(spec)] = _annotated_with(spec.func, spec.args_model)
    return known


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
