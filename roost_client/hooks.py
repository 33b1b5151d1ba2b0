"""What an application has run before and after every job. Only data; roostd calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import RoostError
from .fields import shown


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions, sync or async, that run around every call of a handler, in its process.

    `before_job(job, *, ctx)` and `after_job(job, *, result, error, ctx)`: `job` is what current_job() returns, `ctx` a
    dict of this run's, `result` what the handler returned, `error` what the run failed with, of whatever class (an
    exception that was raised, or the one that called it off; a SnoozeJob too), None when it did not. An async hook of
    an async handler runs in the handler's event loop. What a hook raises is logged and changes nothing.

    Hooks run on the job's time: its deadline counts from `before_job`, and a call-off is raised in the handler only.
    One that lasts longer than kill_grace after it is killed with its process.

    Raises RoostError for what can't be called.
    """

    before_job: Callable[..., Any] | None = None
    after_job: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name in ("before_job", "after_job"):
            hook = getattr(self, name)
            if hook is not None and not callable(hook):
                raise RoostError(f"cannot use {shown(hook)} as {name}: pass a function")
