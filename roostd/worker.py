"""Worker: a roostd inside another program, which runs it in an event loop of its own.

Jobs run in child processes as those of the daemon do. The rest of the process is the program's: no signal is answered,
no process title set, and its other child processes are left alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

from roost_client import DEFAULT_HANDLERS, BackoffStrategy, HandlerRegistry, Hooks, exponential
from roostd.config import Config, DatabaseConfig, HandlersConfig, PoolConfig, WorkerConfig
from roostd.config.kinds import KINDS
from roostd.master.run import Master

_log = structlog.get_logger()


class Worker:
    """Runs jobs of `queues` in `concurrency` child processes.

    Each child imports the modules in which the functions of `registry` (default: what @job filled) are defined, found
    on this process's `sys.path`; importing them must register the tasks. The options mean what the keys of the same
    name mean in the daemon's configuration, and intervals are seconds. The `hooks` need a name in one of these
    modules, or in the module of one of their functions: the children find them there.

    Unlike the daemon, it cannot catch what a job puts into a session of its own if the job's child then crashes. It
    logs by structlog as the program has configured that, or else to stderr.

    Raises ValueError for an option that can't be used.
    """

    def __init__(
        self,
        dsn: str,
        *,
        queues: Iterable[str] = ("default",),
        concurrency: int = 4,
        prefetch: int | None = None,
        poll_interval: float = 1.0,
        retry_strategy: BackoffStrategy | None = None,
        registry: HandlerRegistry | None = None,
        run_cron: bool = True,
        heartbeat_interval: float = 15.0,
        orphan_reaper_interval: float = 30.0,
        orphan_stale_after: float = 300.0,
        shutdown_timeout: float = 30.0,
        listen_reconnect_delay: float = 1.0,
        error_cap: int = 20,
        archive_after_seconds: float | None = None,
        archive_interval: float = 60.0,
        result_ttl_seconds: float | None = None,
        startup_max_retries: int = 30,
        startup_retry_delay: float = 1.0,
        hooks: Hooks | None = None,
    ) -> None:
        self._database = DatabaseConfig(
            **_checked("database", dsn=dsn),
            **_checked(
                "database",
                listen_reconnect_delay=listen_reconnect_delay,
                startup_max_retries=startup_max_retries,
                startup_retry_delay=startup_retry_delay,
            ),
        )
        self._worker = WorkerConfig(
            **_checked(
                "worker",
                poll_interval=poll_interval,
                run_cron=run_cron,
                heartbeat_interval=heartbeat_interval,
                orphan_reaper_interval=orphan_reaper_interval,
                orphan_stale_after=orphan_stale_after,
                shutdown_timeout=shutdown_timeout,
                error_cap=error_cap,
                archive_interval=archive_interval,
                **{
                    name: value
                    for name, value in (
                        ("prefetch", prefetch),
                        ("archive_after_seconds", archive_after_seconds),
                        ("result_ttl_seconds", result_ttl_seconds),
                    )
                    if value is not None
                },
            )
        )
        if orphan_stale_after <= 2 * heartbeat_interval:
            raise ValueError(
                f"cannot use orphan_stale_after={orphan_stale_after!r}: it must be more than twice heartbeat_interval"
            )
        if isinstance(queues, Iterable) and not isinstance(queues, str):  # its letters are not what was meant
            queues = list(queues)
        self._pool = PoolConfig(name="default", **_checked("pools.NAME", queues=queues, concurrency=concurrency))
        if retry_strategy is not None and not callable(retry_strategy):
            raise ValueError(f"cannot use retry_strategy={retry_strategy!r}: expected a function of the attempt")
        self._retry_strategy = None if retry_strategy is None else _guarded(retry_strategy)
        if registry is not None and not isinstance(registry, HandlerRegistry):
            raise ValueError(f"cannot use registry={registry!r}: expected a HandlerRegistry")
        self._registry = DEFAULT_HANDLERS if registry is None else registry
        if hooks is not None and not isinstance(hooks, Hooks):
            raise ValueError(f"cannot use hooks={hooks!r}: expected a Hooks")
        self._hooks = hooks
        self._master: Master | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stops = 0

    async def run(self) -> None:
        """Run jobs until `request_stop`, or until cancelled; either way, running jobs may finish first.

        Raises StartError (roostd.master.run) when the database or the handlers can't be used.
        """
        await self._run(once=False)

    async def run_once(self) -> int:
        """Run the jobs that are available now, and return how many ended. Raises as `run`."""
        return await self._run(once=True)

    def request_stop(self) -> None:
        """Let running jobs finish for shutdown_timeout, then end; a second time: end at once.

        May be called from any thread and from a signal handler, also before `run`.
        """
        self._stops += 1
        if self._master is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._master.request_stop)

    async def _run(self, *, once: bool) -> int:
        if self._master is not None:
            raise RuntimeError("cannot run this worker: it runs already; make another one")
        handlers = _handlers_of(self._registry)
        hooks = None if self._hooks is None else _address_of_hooks(self._hooks, handlers.modules)
        worker = dataclasses.replace(self._worker, hooks=hooks)
        config = Config(database=self._database, worker=worker, handlers=handlers, pools=(self._pool,))
        if not structlog.is_configured():  # its own default is stdout, where the program's data goes
            structlog.configure(
                wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
                logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            )
        self._loop = asyncio.get_running_loop()
        self._master = master = Master(
            config, reload_config=lambda: config, owns_process=False, retry_strategy=self._retry_strategy
        )
        try:
            for _ in range(self._stops):
                master.request_stop()
            return await master.run(once=once)
        finally:
            self._master = None
            self._stops = 0


def _checked(section: str, **options: Any) -> dict[str, Any]:
    """The options as the settings hold them."""
    checked = {}
    for name, value in options.items():
        kind = KINDS[section][name]
        try:
            checked[name] = kind.read(value, Path())
        except ValueError:
            shown = name if name == "dsn" else f"{name}={value!r}"  # a DSN may hold a password
            raise ValueError(f"cannot use {shown}: expected {kind.expected}") from None
    return checked


def _guarded(strategy: BackoffStrategy) -> BackoffStrategy:
    """The strategy, with exponential() for what it fails at: an error of the caller's must not end the worker."""
    fallback = exponential()

    def delay(attempt: int, /) -> float:
        try:
            seconds = float(strategy(attempt))
            if math.isfinite(seconds):
                return seconds
            reason = f"it returned {seconds}"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        _log.error("retry_strategy.failed", attempt=attempt, error=reason)
        return fallback(attempt)

    return delay


def _handlers_of(registry: HandlerRegistry) -> HandlersConfig:
    """What a child has to import to have the same handlers. Raises ValueError where it can't."""
    modules: dict[str, None] = {}
    for name in registry.names():
        spec = registry.get(name)
        assert spec is not None
        module = spec.func.__module__
        if module == "__main__":
            raise ValueError(
                f"cannot run task {name!r} in a child: its handler is defined in __main__, which cannot be imported;"
                " move it into a module"
            )
        modules[module] = None
    if not modules:
        raise ValueError("cannot run a worker without tasks: import the modules of your handlers before")
    return HandlersConfig(
        modules=tuple(modules),
        pythonpath=tuple(Path(entry).absolute() for entry in sys.path),
        registry=None if registry is DEFAULT_HANDLERS else _address_of(registry, modules),
    )


def _address_of(registry: HandlerRegistry, modules: Iterable[str]) -> str:
    """Where the modules of the handlers have the registry, as module:attribute."""
    if (address := _find(registry, modules)) is None:
        raise ValueError(
            f"cannot find the registry in the modules of its handlers ({', '.join(modules)}): give it a name there"
        )
    return address


def _address_of_hooks(hooks: Hooks, modules: Iterable[str]) -> str:
    """Where the modules of the handlers, or those of the hooks' own functions, have the hooks."""
    of_functions = [getattr(hook, "__module__", None) for hook in (hooks.before_job, hooks.after_job)]
    # What stands in __main__ no child can import.
    searched = dict.fromkeys([*modules, *(name for name in of_functions if name in sys.modules and name != "__main__")])
    if (address := _find(hooks, searched)) is None:
        raise ValueError(f"cannot find the hooks in the modules {', '.join(searched)}: give them a name there")
    return address


def _find(what: object, modules: Iterable[str]) -> str | None:
    for module in modules:
        for attribute, value in vars(sys.modules[module]).items():
            if value is what:
                return f"{module}:{attribute}"
    return None
