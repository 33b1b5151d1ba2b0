"""The hooks around a handler, called out of reach of call-offs, and in the handler's event loop where it has one."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol, Self

from roost_client import CurrentJob, Hooks


class EventLog(Protocol):
    def event(self, level: str, name: str, **values: Any) -> None: ...


class HookedRun:
    """One run with its hooks; nothing here raises. Leave it when both hooks are over."""

    def __init__(self, hooks: Hooks, job: CurrentJob, log: EventLog) -> None:
        self._hooks = hooks
        self._job = job
        self._log = log
        self._ctx: dict[str, Any] = {}
        self._runner: asyncio.Runner | None = None

    @property
    def runner(self) -> asyncio.Runner:
        """The event loop of this run."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner

    def before(self) -> None:
        self._call("before_job", self._hooks.before_job)

    def after(self, result: Any, error: BaseException | None) -> None:
        self._call("after_job", self._hooks.after_job, result=result, error=error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner is not None:
            with self._failures_logged("event_loop"):  # what is left in it may not want to end
                self._runner.close()

    def _call(self, name: str, hook: Callable[..., Any] | None, **values: Any) -> None:
        if hook is None:
            return
        with self._failures_logged(name):
            answer = hook(self._job, **values, ctx=self._ctx)
            if inspect.isawaitable(answer):
                self.runner.run(_awaited(answer))

    @contextlib.contextmanager
    def _failures_logged(self, name: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # a sys.exit() in a hook is no end of the job either
            job = self._job
            self._log.event(
                "error",
                "hook.failed",
                hook=name,
                job_id=job.id,
                attempt=job.attempt,
                lease=job.lease,
                queue=job.queue,
                task=job.task,
                exc_info=error,
            )


async def _awaited(awaitable: Awaitable[Any]) -> None:
    await awaitable
