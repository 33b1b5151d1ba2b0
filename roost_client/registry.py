"""Which function handles which task, and what `@job` and `@cron` declare for it. Knows nothing of the database."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel

from . import fields
from .arguments import object_text
from .errors import InvalidJobError
from .fields import UNSET, shows_documented_defaults
from .types import CronEntry, TaskDefaults

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class HandlerSpec:
    """A task: its name, the function that handles it, the model of its arguments, and its defaults."""

    name: str
    func: Callable[..., Any]
    args_model: type[BaseModel] | None
    defaults: TaskDefaults
    is_async: bool


@dataclass(frozen=True, slots=True)
class CronSpec:
    """A cron entry and the function that declares it; `passed` holds the fields that win over the task's defaults."""

    entry: CronEntry
    func: Callable[..., Any]
    passed: frozenset[str]

    @property
    def where(self) -> str:
        return _where(self.func)


class HandlerRegistry:
    """The tasks of an application, by name, and its cron entries."""

    def __init__(self) -> None:
        self._specs: dict[str, HandlerSpec] = {}
        self._names: dict[Callable[..., Any], tuple[str, ...]] = {}
        self._cron: dict[str, CronSpec] = {}
        self._implied: dict[str, Callable[..., Any]] = {}  # tasks that only @cron has registered

    def register(
        self,
        name: str,
        func: Callable[..., Any],
        *,
        args_model: type[BaseModel] | None = None,
        defaults: TaskDefaults | None = None,
    ) -> None:
        """Make `func` the handler of the task `name`.

        Registering the same function again (a module is reloaded) replaces it. Raises InvalidJobError when
        another function has the name, and for a value that a job could not have.
        """
        try:
            checked = fields.name("name", name)
            if not callable(func):
                raise fields.Refused("func", f"must be callable, unlike {fields.shown(func)}")
            if args_model is not None and not (isinstance(args_model, type) and issubclass(args_model, BaseModel)):
                raise fields.Refused("args_model", f"must be a pydantic model, not {fields.shown(args_model)}")
            defaults = _checked(defaults or TaskDefaults())
        except fields.Refused as refused:
            raise refused.as_invalid_job(f"register task {fields.shown(name)}") from None

        present = self._specs.get(checked)
        if present is not None and not _same_function(present.func, func):
            raise InvalidJobError(
                f"cannot register {_where(func)} as task {checked!r}: {_where(present.func)} has that name already",
                "name",
            )
        if present is not None:
            self._names.pop(present.func, None)
        self._specs[checked] = HandlerSpec(checked, func, args_model, defaults, _is_async(func))
        self._implied.pop(checked, None)
        self._name_anew(checked, func)
        self._names[func] = tuple(n for n, spec in self._specs.items() if spec.func is func)

    def _name_anew(self, name: str, func: Callable[..., Any]) -> None:
        """Gives a function the task's name of its @job in place of the one that the @cron below it made up."""
        for made_up in [task for task, implied in self._implied.items() if implied is func]:
            del self._implied[made_up], self._specs[made_up]
            for spec in [spec for spec in self._cron.values() if spec.entry.task == made_up]:
                del self._cron[spec.entry.name]
                entry_name = spec.entry.name if "name" in spec.passed else name
                self._add_cron(replace(spec, entry=replace(spec.entry, task=name, name=entry_name)))

    def register_cron(
        self,
        func: Callable[..., Any],
        expression: str,
        *,
        name: str | None = None,
        args: dict[str, Any] | None = None,
        timezone: str | None = None,
        **passed: Any,
    ) -> None:
        """Have `func` run at the slots of `expression`; what `@cron` does. `passed` are queue, priority, max_attempts.

        A function without @job becomes a task of the entry's name. Raises InvalidJobError, as `register` does, and
        when another entry has the name.
        """
        try:
            if not callable(func):
                raise fields.Refused("func", f"must be callable, unlike {fields.shown(func)}")
            names = self.names_of(func)
            if len(names) > 1 and name not in names:
                raise fields.Refused("name", f"must be one of the tasks that it handles: {', '.join(names)}")
            entry_name = fields.name("name", name if name is not None else names[0] if names else _where(func))
            task = entry_name if entry_name in names else names[0] if names else entry_name
            entry = CronEntry(
                name=entry_name,
                expression=fields.text("expression", expression),
                task=task,
                args={} if args is None else args,
                timezone_name=None if timezone is None else fields.text("timezone", timezone),
                **_checked_cron(passed),
            )
            object_text("args", entry.args)
        except fields.Refused as refused:
            raise refused.as_invalid_job(f"schedule {_where(func)}") from None
        self._add_cron(CronSpec(entry, func, frozenset(passed if name is None else {*passed, "name"})))
        if not names:
            self.register(task, func)
            self._implied[task] = func

    def _add_cron(self, spec: CronSpec) -> None:
        name = spec.entry.name
        present = self._cron.get(name)
        if present is not None and (present.func is spec.func or not _same_function(present.func, spec.func)):
            raise InvalidJobError(
                f"cannot schedule {spec.where}: {present.where} has a cron entry {name!r} already;"
                " give one of them another name",
                "name",
            )
        self._cron[name] = spec

    def cron_entries(self) -> list[CronSpec]:
        """Return what was declared by @cron, sorted by name."""
        return [self._cron[name] for name in sorted(self._cron)]

    def get(self, name: str) -> HandlerSpec | None:
        """Return the task of this name, None when there is none."""
        return self._specs.get(name)

    def names(self) -> list[str]:
        """Return the names of all tasks, sorted."""
        return sorted(self._specs)

    def names_of(self, func: Callable[..., Any]) -> tuple[str, ...]:
        """Return the names `func` is registered under; a wrapper made with functools.wraps counts as what it wraps."""
        try:
            while func not in self._names and hasattr(func, "__wrapped__"):
                func = func.__wrapped__
            return self._names.get(func, ())
        except TypeError:  # not hashable, so never registered
            return ()


DEFAULT_HANDLERS = HandlerRegistry()


def job(
    name: str,
    *,
    args_model: type[BaseModel] | None = None,
    queue: str | None = None,
    priority: int | None = None,
    max_attempts: int | None = None,
    tags: list[str] | tuple[str, ...] | None = None,
    timeout_seconds: int | None = None,
    rate_per_minute: int | None = None,
    max_concurrency: int | None = None,
    registry: HandlerRegistry | None = None,
) -> Callable[[F], F]:
    """Register the function as the handler of the task `name` and return it untouched.

    queue, priority, max_attempts, tags and timeout_seconds apply to every enqueue of the task that doesn't
    pass the keyword itself. With `args_model` the arguments are validated when the job is enqueued and again
    before it runs. rate_per_minute and max_concurrency hold across all workers. Raises InvalidJobError for a
    value that a job could not have, and when another function has the name.
    """
    defaults = TaskDefaults(
        queue=queue,
        priority=priority,
        max_attempts=max_attempts,
        tags=tuple(tags) if isinstance(tags, list) else tags,
        timeout_seconds=timeout_seconds,
        rate_per_minute=rate_per_minute,
        max_concurrency=max_concurrency,
    )

    def register(func: F) -> F:
        (DEFAULT_HANDLERS if registry is None else registry).register(
            name, func, args_model=args_model, defaults=defaults
        )
        return func

    return register


@shows_documented_defaults
def cron(
    expression: str,
    *,
    name: str | None = None,
    queue: str = UNSET,
    args: dict[str, Any] | None = None,
    priority: int = UNSET,
    max_attempts: int = UNSET,
    timezone: str | None = None,
    handler_registry: HandlerRegistry | None = None,
) -> Callable[[F], F]:
    """Have the function run at every slot of `expression`, once across all workers, and return it untouched.

    `expression` has five fields (minute, hour, day of month, month, day of week), or is @hourly, @daily, @weekly,
    @monthly or @yearly; it means the clock of `timezone`, an IANA name (default: UTC). roostd checks both before it
    runs anything. A function that @job registers as well keeps the name and the defaults of its task, which apply where
    a keyword is not passed here; another becomes a task called `name`. The entry is called `name`, or as its task, or
    MODULE.FUNCTION. Raises InvalidJobError for a value that a job could not have, and when another entry has the name.
    """
    given = {"queue": queue, "priority": priority, "max_attempts": max_attempts}
    passed = {key: value for key, value in given.items() if value is not UNSET}

    def register(func: F) -> F:
        registry = DEFAULT_HANDLERS if handler_registry is None else handler_registry
        registry.register_cron(func, expression, name=name, args=args, timezone=timezone, **passed)
        return func

    return register


def _checked_cron(passed: dict[str, Any]) -> dict[str, Any]:
    checks: dict[str, Callable[[str, object], Any]] = {
        "queue": fields.name,
        "priority": fields.integer,
        "max_attempts": fields.count,
    }
    return {key: checks[key](key, value) for key, value in passed.items()}


def _checked(defaults: TaskDefaults) -> TaskDefaults:
    return TaskDefaults(
        queue=None if defaults.queue is None else fields.name("queue", defaults.queue),
        priority=None if defaults.priority is None else fields.integer("priority", defaults.priority),
        max_attempts=fields.optional_count("max_attempts", defaults.max_attempts),
        tags=None if defaults.tags is None else fields.tags("tags", defaults.tags),
        timeout_seconds=fields.optional_count("timeout_seconds", defaults.timeout_seconds),
        rate_per_minute=fields.optional_count("rate_per_minute", defaults.rate_per_minute),
        max_concurrency=fields.optional_count("max_concurrency", defaults.max_concurrency),
    )


def _same_function(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    if one == other:
        return True
    place, other_place = _place(one), _place(other)
    if place != other_place or place[1] is None:
        return False
    # Two lambdas, or two functions made inside others, may share a place and still be different code.
    return "<" not in place[1] or getattr(one, "__code__", None) == getattr(other, "__code__", None)


def _place(func: Callable[..., Any]) -> tuple[str | None, str | None]:
    return getattr(func, "__module__", None), getattr(func, "__qualname__", None)


def _where(func: Callable[..., Any]) -> str:
    module, qualname = _place(func)
    return f"{module}.{qualname}" if qualname else repr(func)


def _is_async(func: Callable[..., Any]) -> bool:
    # A callable object is async when its __call__ is.
    return inspect.iscoroutinefunction(inspect.unwrap(func)) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004
    )
