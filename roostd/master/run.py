"""The master: connects the parts, carries out what core/ decides, and answers signals.

From here a job's path can be followed: `_on_claimed` → `_perform` (hand-over) → `_on_outcomes` or `_bury` (its end) →
writer. Start and end of the daemon are in `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import setproctitle
import structlog

import roost_client
import roostd
from roost_client import BackoffStrategy, JobState, SchemaError
from roost_client.schema import check_steps, run_steps_async
from roostd import linux, log
from roostd.config import Config, PoolConfig
from roostd.core.demand import Demand
from roostd.core.generations import Generations
from roostd.core.identity import Identity, is_dead_predecessor
from roostd.core.job import ClaimedJob
from roostd.core.outcome import Ending, Report, Settlement, SoftReason, settle
from roostd.core.pool import Assign, CallOff, Kill, Pool, ProtocolError, Remind, Retire, Settle, TakeBack
from roostd.core.timetable import Entry
from roostd.master import heart, housekeeping
from roostd.master.children import ChildProcess
from roostd.master.claimer import Claimer, PoolRun
from roostd.master.database import DatabaseGone, Link
from roostd.master.listener import Deaf, Listener
from roostd.master.orphans import Orphans
from roostd.master.reports import UNCONFIRMED, report_of_frame
from roostd.master.scheduler import Scheduler
from roostd.master.templates import TemplateProcess, describe_status
from roostd.master.writer import Writer
from roostd.sdnotify import Notifier
from roostd.store import statements
from roostd.wire.frames import Frame, FrameError, FrameKind
from roostd.wire.packets import close_all

EXIT_UNAVAILABLE = 69  # sysexits.h: EX_UNAVAILABLE, EX_CONFIG
EXIT_CONFIG = 78

_STATUS_SECONDS = 0.5  # how long a dead child's exit status may keep its job's outcome waiting
_RESPAWN_SECONDS = (0.0, 0.1, 0.5, 2.0, 5.0)  # pauses after children that ended without having run a job
_EARLY_CANCEL_SECONDS = 10.0
_MAX_UNWRITTEN = 5_000  # outcomes that wait to be written before no more jobs are claimed
_MAX_SPAWNING = 32  # asked for at a time: master and template must not wait for each other with full sockets
_SPAWN_SECONDS = 30.0  # for a fork, which takes milliseconds, to be answered
_DRAINING = "the worker is draining: it ends when its jobs have"
_log = structlog.get_logger()


class StartError(Exception):
    """The daemon can't start; `exit_code` is what to end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class HandlersError(StartError):
    """The handlers that the settings name can't be imported."""


class Master:
    """One worker: `run` it once, in an asyncio loop on the main thread.

    `reload_config` reads the settings again for a reload; it raises ConfigError where they are no good. With
    `owns_process` it answers signals, and takes every child process that it did not start, but those in `keep`, for
    one that a job left behind; inside another program it does neither. `retry_strategy` wins over that of the settings.
    """

    def __init__(
        self,
        config: Config,
        *,
        reload_config: Callable[[], Config],
        keep: Iterable[int] = (),
        owns_process: bool = True,
        retry_strategy: BackoffStrategy | None = None,
    ) -> None:
        self._config = config
        self._reload_config = reload_config
        self._keep_pids = set(keep)
        self._owns_process = owns_process
        self._open_files: int | None = None
        self._worker_id = uuid4()
        self._identity = _identify()
        self._pools: dict[str, PoolRun] = {}
        self._children: dict[int, ChildProcess] = {}
        self._templates: dict[int, TemplateProcess] = {}
        self._spawning: dict[int, tuple[str, int]] = {}  # child key -> pool, generation
        self._dying: dict[int, asyncio.TimerHandle] = {}
        self._orphans = Orphans()
        self._next_key = 1
        self._fruitless = 0  # children in a row that ended without having run a job
        self._respawn_timer: asyncio.TimerHandle | None = None
        self._generations = Generations()
        self._tasks: list[str] = []  # that the current generation has handlers for
        # The worker and the generation whose tasks its row has, and those that the beat under way tells.
        self._told_tasks: tuple[UUID, int] | None = None
        self._telling_tasks: tuple[UUID, int] | None = None
        self._import_timer: asyncio.TimerHandle | None = None
        self._reload_requests: list[str] = []  # not yet taken up, oldest first
        self._answering: list[str] = []  # to be answered with the reload under way
        self._answered_request: str | None = None
        self._first_import: asyncio.Future[None] | None = None
        self._reload_after_start = False
        self._tick_timer: asyncio.TimerHandle | None = None
        self._tick_at = 0.0
        self._draining = False
        self._stopping = False
        self._stop = asyncio.Event()
        self._quit = asyncio.Event()
        self._all_gone = asyncio.Event()
        self._up = asyncio.Event()
        self._broken: BaseException | None = None
        self._registered = False
        self._claiming: asyncio.Task[None] | None = None
        self._early_cancels: dict[int, float] = {}  # job id -> when; its claim may still be on its way to us
        self._notifier = Notifier() if owns_process else Notifier({})
        self._own_strategy = retry_strategy
        self._retry_delay = retry_strategy or _retry_strategy(config)

    # -- start and end ------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Lets running jobs finish for shutdown_timeout, then ends; a second time: at once."""
        if self._stop.is_set():
            self._quit.set()
        self._stop.set()

    def request_drain(self) -> None:
        """Starts no more jobs, lets those that run finish, however long that takes, then ends.

        Until then it is no stop: systemd is told of none, whose patience has an end, and the heart beats on. A stop
        meanwhile is what it always is.
        """
        if self._ending:
            return
        self._draining = True
        _log.info("drain.requested", **self._counts())
        if (candidate := self._generations.candidate) is not None:
            self._fail_generation(candidate, _DRAINING)
        for run in self._pools.values():
            run.pool.drain()
            self._perform(run)
        self._arm_tick()
        self._notifier.status(self._status())
        self._heart.beat_now()  # says so
        self._check_all_gone()

    @property
    def _ending(self) -> bool:
        return self._draining or self._stopping

    async def run(self, *, once: bool = False) -> int:
        """Runs jobs until stopped, or, with `once`, until none is left that may run now; returns how many ended.

        Raises StartError.
        """
        self._loop = asyncio.get_running_loop()
        if self._owns_process:
            setproctitle.setproctitle(f"roostd: master {self._config.worker.name}")
            linux.adopt_orphans()
            self._open_files = linux.raise_open_files_limit()  # six a child; handlers get the old limit
            self._install_signals()
            self._loop.set_exception_handler(self._on_broken_callback)
        database = self._config.database
        dsn = database.dsn
        assert dsn is not None, "load() or the embedded server has set it"
        self._claim_link = Link(dsn, "claim", session=statements.SESSION)
        self._write_link = Link(dsn, "write", session=statements.WRITE_SESSION)
        self._beat_link = Link(dsn, "heartbeat", timeout_seconds=max(1.0, self._config.worker.heartbeat_interval))
        self._listen_link = Link(database.listen_dsn or dsn, "listen", timeout_seconds=20.0)
        self._tidy_link = Link(
            dsn, "housekeeping", session=statements.SESSION
        )  # open only while there is something to do
        retry = database.listen_reconnect_delay
        self._writer = Writer(
            self._write_link,
            error_cap=lambda: self._config.worker.error_cap,
            retry_seconds=retry,
            decide=self._decide,
            on_settled=self._on_settled,
            on_parents=lambda parents: self._claimer.follow(parents),
            on_ended=lambda leases: self._claimer.ended(leases),
        )
        self._claimer = Claimer(
            self._claim_link,
            pools=self._pools,
            worker_id=lambda: self._worker_id,
            poll_interval=lambda: self._config.worker.poll_interval,
            retry_seconds=retry,
            on_claimed=self._on_claimed,
            on_unknown_claims=self._on_unknown_claims,
            known_leases=self._known_leases,
            may_claim=lambda: self._writer.pending < _MAX_UNWRITTEN and not self._heart.check(),
            is_deaf=lambda: self._listener.deaf,
        )
        self._heart = heart.Heart(
            self._beat_link,
            lambda: self._config.worker,
            interval=self._heartbeat_interval,
            worker_id=lambda: self._worker_id,
            figures=self._figures,
            on_beat=self._on_beat,
            on_fence=self._on_fence,
            on_dead=self._on_dead,
        )
        self._scheduler = Scheduler(self._claim_link, retry_seconds=retry)
        self._listener = Listener(
            self._listen_link,
            reconnect_seconds=retry,
            on_notice=self._on_notice,
            on_connect=self._on_listening,
            on_deaf=self._on_deaf,
            notify=None if database.listen_dsn is None else self._notify,
        )
        tasks: list[asyncio.Task[Any]] = [self._loop.create_task(self._writer.run())]
        try:
            await self._work(tasks, once=once)
        finally:
            await self._shut_down()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for link in (self._claim_link, self._write_link, self._beat_link, self._listen_link, self._tidy_link):
                await link.close()
            if self._owns_process:
                # The loop takes its handlers away as it closes, and an embedded database has yet to be stopped.
                signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
            _log.info("worker.stopped", worker=str(self._worker_id), jobs=self._writer.written)
        return self._writer.written  # with what was written as it shut down

    async def _work(self, tasks: list[asyncio.Task[Any]], *, once: bool) -> None:
        """Starts, and runs jobs until stopped; what runs beside it is added to `tasks`."""
        if not await self._until_stopped(self._start(listens=not once)):
            return
        tasks += [self._loop.create_task(part) for part in (self._heart.run(), self._heart.watch())]
        if not await self._until_stopped(self._up.wait()):
            return
        _log.info("worker.ready", worker=str(self._worker_id), **self._counts())
        self._notifier.ready(self._status())
        if once:
            await self._until_stopped(self._drain_once())
            return
        if self._reload_after_start:
            self._reload()
        self._claiming = self._loop.create_task(self._claimer.run())
        stopped = self._loop.create_task(self._stop.wait())
        parts = (self._reap_regularly(), self._tidy_regularly(), self._notify_regularly())
        regularly = (*parts, self._listener.run(), self._scheduler.run())
        tasks += [stopped, self._claiming, *map(self._loop.create_task, regularly)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            # A part that ends by itself is broken, and a worker that limps is worse than one that starts anew.
            task.result()
            raise RuntimeError(f"{task} has ended by itself")
        if self._broken is not None:
            raise self._broken

    async def _start(self, *, listens: bool) -> None:
        """Database, registration, handlers, children: each before the next."""
        await self._reach_database()
        if listens and self._config.database.listen_dsn is not None:
            await self._check_listening()
        self._notifier.extend_timeout(self._config.handlers.import_timeout + _SPAWN_SECONDS)
        self._set_up_pools(self._config)
        self._first_import = self._loop.create_future()
        self._begin_generation(self._config)
        await self._first_import
        self._spawn_missing()

    async def _reach_database(self) -> None:
        settings = self._config.database
        delay = settings.startup_retry_delay
        attempts = 1 + settings.startup_max_retries
        for attempt in range(1, attempts + 1):
            try:
                self._notifier.extend_timeout(delay + 60.0)
                await self._claim_link.run(lambda conn: run_steps_async(conn, check_steps()))
                await self._register()
                await self._free_predecessors()
                return
            except SchemaError as error:
                raise StartError(str(error), EXIT_CONFIG) from error
            except psycopg.Error as error:
                raise StartError(f"cannot use the database: {error}", EXIT_UNAVAILABLE) from error
            except DatabaseGone as error:
                _log.warning("db.unreachable", attempt=attempt, of=attempts, error=str(error))
                if attempt == attempts:
                    raise StartError(
                        f"cannot reach the database after {attempt} attempts: {error}", EXIT_UNAVAILABLE
                    ) from error
            await asyncio.sleep(min(delay, 30.0))
            delay = min(delay * 1.5, 30.0)

    async def _check_listening(self) -> None:
        """Refuses a listen_dsn that leads elsewhere; for one that can't be reached the start needn't wait."""
        try:
            await self._listener.check()
        except Deaf as error:
            raise StartError(f"cannot listen: {error}", EXIT_CONFIG) from error
        except DatabaseGone as error:
            _log.warning("listener.lost", error=str(error))

    async def _register(self) -> None:
        pools = self._config.pools
        self._registered = True
        await self._beat_link.run(
            lambda conn: statements.register_worker(
                conn,
                self._worker_id,
                name=self._config.worker.name,
                hostname=self._identity.hostname,
                pid=self._identity.pid,
                queues=[queue for pool in pools for queue in pool.queues],
                concurrency=sum(pool.concurrency for pool in pools),
                metadata=self._metadata(),
            )
        )

    async def _free_predecessors(self) -> None:
        """Frees at once what a master on this host held that is certainly dead."""
        rows = await self._beat_link.run(lambda conn: statements.list_workers_of_host(conn, self._identity.hostname))
        uptime_seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
        dead = [
            row_id
            for row_id, silent_seconds, metadata in rows
            if row_id != self._worker_id
            and is_dead_predecessor(
                metadata,
                silent_seconds,
                self._identity,
                uptime_seconds=uptime_seconds,
                heartbeat_interval=self._config.worker.heartbeat_interval,
                started_ticks_of=linux.started_ticks_of,
            )
        ]
        if not dead:
            return
        await self._beat_link.run(lambda conn: statements.remove_workers(conn, dead))
        freed = await heart.rescue(
            self._beat_link, self._config.worker.error_cap, "the worker that ran it died; its successor freed the job"
        )
        _log.warning("worker.predecessor_freed", workers=[str(row_id) for row_id in dead], jobs=freed)

    async def _until_stopped(self, work: Any) -> bool:
        """Waits for `work` or a stop, whichever is first; returns whether the work was done."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self._broken is not None:
            raise self._broken
        return False

    async def _drain_once(self) -> None:
        while True:
            try:
                claimed = await self._claimer.drain()
            except DatabaseGone as error:
                _log.warning("db.gone", error=str(error))
                await asyncio.sleep(self._config.database.listen_reconnect_delay)
                continue
            await self._writer.wait_empty()  # which may have made a job due again
            if not claimed:
                return

    async def _shut_down(self) -> None:
        """Stops claiming, lets jobs finish for shutdown_timeout, interrupts, kills, writes, and takes its row away."""
        self._stopping = True
        self._notifier.stopping()
        settings = self._config.worker
        self._claimer.stop()
        if self._import_timer:
            self._import_timer.cancel()
        _log.info("worker.draining", **self._counts())
        for run in self._pools.values():
            run.pool.drain()
            self._perform(run)
        self._check_all_gone()
        if self._claiming is not None:  # what its last answer brings is let go of before the writing ends
            await asyncio.wait({self._claiming}, timeout=5)
        if not await self._wait_gone(settings.shutdown_timeout):
            for run in self._pools.values():
                if self._quit.is_set():
                    run.pool.kill_all()
                else:
                    run.pool.interrupt(self._loop.time())
                self._perform(run)
            self._arm_tick()
            if not await self._wait_gone(settings.kill_grace + 0.5):
                for run in self._pools.values():
                    run.pool.kill_all()
                    self._perform(run)
                await self._wait_gone(10.0, interruptible=False)
        for template in list(self._templates.values()):
            self._drop_template(template)
        self._reap()
        if self._registered:
            await self._write_the_rest()

    async def _wait_gone(self, seconds: float, *, interruptible: bool = True) -> bool:
        """Whether all children are gone within `seconds`; a quit ends the wait."""
        deadline = self._loop.time() + seconds
        quit_wait = self._loop.create_task(self._quit.wait())
        gone_wait = self._loop.create_task(self._all_gone.wait())
        waits = {gone_wait, quit_wait} if interruptible else {gone_wait}
        try:
            while not self._all_gone.is_set() and (left := deadline - self._loop.time()) > 0:
                # systemd counts from the last word that it hears.
                self._notifier.extend_timeout(15)
                self._notifier.status(self._status())
                await asyncio.wait(waits, timeout=min(left, 5.0), return_when=asyncio.FIRST_COMPLETED)
                if interruptible and self._quit.is_set():
                    break
        finally:
            quit_wait.cancel()
            gone_wait.cancel()
        return self._all_gone.is_set()

    async def _write_the_rest(self) -> None:
        """Writes what is left, for as long as somebody may be expected to wait for it."""
        self._notifier.extend_timeout(20)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10.0):
                await self._writer.wait_empty()
        if pending := self._writer.pending:
            locked = self._writer.locked_jobs()
            _log.error("outcomes.unwritten", pending=pending, locked_jobs=locked, error="not written within 10 s")
            if len(locked) < pending:
                return
        self._heart.stop()
        try:
            async with asyncio.timeout(5.0):
                await self._beat_link.run(lambda conn: statements.remove_workers(conn, [self._worker_id]))
                # What was claimed by a statement whose answer nobody waited for.
                await heart.rescue(self._beat_link, self._config.worker.error_cap, "the worker was stopped")
                await self._beat_link.run(statements.remove_idle)
        except (TimeoutError, DatabaseGone, psycopg.Error) as error:
            _log.error("worker.not_removed", error=str(error) or type(error).__name__)

    def _on_broken_callback(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback that fails has left things half done: end, so that a new start can put them right."""
        error = context.get("exception")
        if "handle" not in context or error is None:
            loop.default_exception_handler(context)
            return
        _log.error("worker.broken", exc_info=error)
        self._broken = error
        self._stop.set()

    # -- signals ------------------------------------------------------------------------------------------------

    def _install_signals(self) -> None:
        meanings: dict[signal.Signals, tuple[str, Callable[[], None]]] = {
            signal.SIGTERM: ("stop when the running jobs are done", self._stop.set),
            signal.SIGINT: ("stop when the running jobs are done; again: stop at once", self.request_stop),
            signal.SIGQUIT: ("stop at once", self._stop_at_once),
            signal.SIGHUP: ("reload", self.request_reload),
            signal.SIGUSR1: ("dump the stacks of all children", self._dump_stacks),
            signal.SIGTTIN: ("one child more", lambda: self._resize_first_pool(+1)),
            signal.SIGTTOU: ("one child fewer", lambda: self._resize_first_pool(-1)),
        }
        self._signals = set(meanings)
        for number, (meaning, action) in meanings.items():
            self._loop.add_signal_handler(number, self._on_signal, number, meaning, action)
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def _on_signal(self, number: signal.Signals, meaning: str, action: Callable[[], None]) -> None:
        _log.info("signal.received", signal=number.name, meaning=meaning)
        action()

    def _stop_at_once(self) -> None:
        self._stop.set()
        self._quit.set()

    def _resize_first_pool(self, change: int) -> None:
        run = next(iter(self._pools.values()), None)
        if run is None or self._ending:
            return
        run.pool.resize(max(1, run.pool.size + change))
        _log.info("pool.resized", pool=run.config.name, children=run.pool.size)
        self._perform(run)
        self._spawn_missing()

    def _dump_stacks(self) -> None:
        children = list(self._children.values())
        for child in children:
            child.request_dump(self._pools[child.pool].pool.running_lease(child.key))
        self._loop.call_later(0.3, self._log_dumps, children)

    def _log_dumps(self, children: list[ChildProcess]) -> None:
        for child in children:
            if child.key in self._children:
                _log.info("child.stack", pid=child.pid, pool=child.pool, stack=child.read_dump())

    # -- generations --------------------------------------------------------------------------------------------

    def request_reload(self) -> None:
        """Reads settings and handlers anew; if they are no good, everything goes on as it is."""
        if self._draining:
            _log.warning("reload.refused", reason=_DRAINING)
        if self._ending:
            return
        if self._first_import is None or not self._first_import.done():
            self._reload_after_start = True  # what was read until now may be older than the request
            return
        self._reload()

    def _reload(self) -> None:
        if self._generations.candidate is not None:
            self._generations.request()
            _log.info("reload.queued", behind=self._generations.candidate)
            return
        self._answering, self._reload_requests = self._answering + self._reload_requests, []
        self._notifier.reloading()
        try:
            config = self._reload_config()
        except Exception as error:
            # Whatever is wrong with the files, the daemon that runs must not suffer from it.
            self._end_reload(f"cannot use the settings: {error}")
            return
        if config.database != self._config.database:
            _log.warning("reload.needs_restart", key="database", reason="connections are made once")
        if config.worker.name != self._config.worker.name:
            _log.warning("reload.needs_restart", key="worker.name", reason="the worker is registered once")
        self._begin_generation(config)

    def _begin_generation(self, config: Config) -> None:
        generation = self._generations.request()
        if generation is None:
            return
        try:
            template = TemplateProcess(generation, config, open_files=self._open_files)
        except OSError as error:
            self._fail_generation(generation, f"cannot start the template process: {error}")
            return
        self._templates[generation] = template
        self._loop.add_reader(template.fileno(), template.read, self._on_template)
        self._import_timer = self._loop.call_later(config.handlers.import_timeout, self._on_import_timeout, template)
        _log.info("generation.starting", generation=generation, pid=template.pid)

    def _on_import_timeout(self, template: TemplateProcess) -> None:
        seconds = template.config.handlers.import_timeout
        self._fail_generation(
            template.generation, f"importing the handlers took more than import_timeout ({seconds:g} s)"
        )

    def _on_template(self, template: TemplateProcess, message: dict[str, Any], fds: list[int]) -> None:
        match message["op"]:
            case "ready":
                self._on_imported(template, message)
            case "failed":
                if message["handlers"]:
                    _log.error("handlers.broken", generation=template.generation, trace=message["trace"])
                self._fail_generation(
                    template.generation, message["error"], HandlersError if message["handlers"] else StartError
                )
            case "forked":
                self._on_forked(template, message["key"], message["pid"], fds)
            case "refused":
                self._on_refused(message["key"], message["error"])
            case "lost":
                self._on_lost_descriptors(template, message["key"])
            case "exited":
                self._on_exit_status(message["key"], message["status"])
            case "gone":
                self._on_template_gone(template)
            case other:
                _log.error("template.unknown_message", op=other)

    def _on_imported(self, template: TemplateProcess, message: dict[str, Any]) -> None:
        template.ready = True
        if self._ending or not self._generations.ready(template.generation):
            return
        if self._import_timer:
            self._import_timer.cancel()
        for warning in message["warnings"]:
            _log.warning("handlers.warning", warning=warning)
        self._config = dataclasses.replace(template.config, database=self._config.database)
        self._tasks = message["tasks"]
        self._retry_delay = self._own_strategy or _retry_strategy(self._config)
        self._scheduler.load(
            [Entry.from_json(fields) for fields in message["cron"]] if self._config.worker.run_cron else []
        )
        self._claimer.declare((task, rate, concurrency) for task, rate, concurrency in message["limits"])
        self._set_up_pools(self._config)
        for run in self._pools.values():
            run.pool.retire_older_than(template.generation)
            self._perform(run)
        self._fruitless = 0
        self._spawn_missing()
        self._drop_unused_templates()
        _log.info("generation.ready", generation=template.generation, tasks=len(message["tasks"]))
        if self._first_import is not None and not self._first_import.done():
            self._first_import.set_result(None)
        else:
            if self._owns_process:
                log.configure(self._config.log.level, self._config.log.format)
            self._heart.beat_now()  # with the new interval from now on
            self._claimer.poll_now()
            self._end_reload(None)

    def _fail_generation(self, generation: int, reason: str, error_class: type[StartError] = HandlersError) -> None:
        template = self._templates.get(generation)
        was_candidate = self._generations.failed(generation)
        if template is not None:
            self._drop_template(template)
        if not was_candidate:
            return
        if self._import_timer:
            self._import_timer.cancel()
        if self._first_import is not None and not self._first_import.done():
            self._first_import.set_exception(error_class(reason, EXIT_CONFIG))
        else:
            self._end_reload(reason)

    def _end_reload(self, error: str | None) -> None:
        """Gives the verdict to the log, systemd and whoever asked; follows up what was asked meanwhile."""
        generation = self._generations.current
        if error is None:
            _log.info("reload.done", generation=generation)
        else:
            _log.error("reload.failed", error=error, still=generation)
        if not self._stopping:
            self._notifier.ready(self._status())
        requests, self._answering = self._answering, []
        self._answer_requests(requests, error)
        if self._generations.wants_another() and not self._ending:
            self._reload()
        elif self._generations.current not in self._templates and not self._ending:
            self._loop.call_later(5.0, self.request_reload)

    def _answer_requests(self, requests: list[str], error: str | None) -> None:
        generation = self._generations.current
        for request in requests:  # the last answer stays: that to the last request, which the row names too
            verdict = {"request": request, "ok": error is None, "error": error or "", "generation": generation}
            self._loop.create_task(self._answer_reload(verdict))

    async def _answer_reload(self, verdict: dict[str, Any]) -> None:
        if verdict["ok"]:
            await self._claimer.wait_declared()
        try:
            await self._beat_link.run(lambda conn: statements.answer_reload(conn, self._worker_id, verdict))
        except (DatabaseGone, psycopg.Error) as error:
            _log.warning("reload.unanswered", request=verdict["request"], error=str(error))

    def _on_template_gone(self, template: TemplateProcess) -> None:
        """A template that ends takes its children with it; their jobs are not to blame."""
        how = template.describe_exit()
        for child in self._children.values():
            if child.generation == template.generation:
                child.loss = child.loss or f"the process that its child was forked from {how}"
        for key, (pool, generation) in list(self._spawning.items()):
            if generation == template.generation:
                del self._spawning[key]
                self._pools[pool].pool.starting -= 1
        was_current = template.generation == self._generations.current
        self._drop_template(template)
        for key in [key for key in self._dying if self._children[key].generation == template.generation]:
            self._bury(key, None)
        if self._generations.candidate == template.generation:
            self._fail_generation(template.generation, f"the process that imports the handlers {how}")
        elif was_current and not self._ending:
            _log.error("template.died", generation=template.generation, how=how)
            if self._generations.candidate is None:
                self._begin_generation(self._config)
        self._check_all_gone()

    def _drop_template(self, template: TemplateProcess) -> None:
        if self._templates.pop(template.generation, None) is not None:
            self._loop.remove_reader(template.fileno())
            template.close()

    def _drop_unused_templates(self) -> None:
        in_use = {child.generation for child in self._children.values()}
        in_use |= {generation for _, generation in self._spawning.values()}
        in_use |= {self._generations.current, self._generations.candidate or 0}
        for template in [t for t in self._templates.values() if t.generation not in in_use]:
            self._drop_template(template)

    # -- pools and children -------------------------------------------------------------------------------------

    def _set_up_pools(self, config: Config) -> None:
        """Makes the pools those of `config`; one that is no longer there ends when its children have."""
        settings = config.worker
        wanted = {pool.name: pool for pool in config.pools}
        for name, pool_config in wanted.items():
            run = self._pools.get(name)
            if run is None:
                pool = Pool(size=pool_config.concurrency, kill_grace=settings.kill_grace, prefetch=settings.prefetch)
                self._pools[name] = PoolRun(pool_config, pool, Demand(settings.poll_interval))
                continue
            run.config = pool_config
            run.pool.kill_grace, run.pool.prefetch = settings.kill_grace, settings.prefetch
            run.demand.poll_interval = settings.poll_interval
            run.pool.draining = False
            run.pool.resize(pool_config.concurrency)
            run.hinted(self._loop.time())
            self._perform(run)
        for name in self._pools.keys() - wanted.keys():
            self._pools[name].pool.drain()
            self._perform(self._pools[name])
        self._forget_empty_pools(config)

    def _forget_empty_pools(self, config: Config) -> None:
        wanted = {pool.name for pool in config.pools}
        for name in [n for n, run in self._pools.items() if n not in wanted]:
            if not self._pools[name].pool.children and not self._pools[name].pool.starting:
                del self._pools[name]

    def _spawn_missing(self) -> None:
        template = self._templates.get(self._generations.current)
        if template is None or not template.ready or self._respawn_timer is not None:
            return
        for run in self._pools.values():
            for _ in range(min(run.pool.missing_children(), _MAX_SPAWNING - len(self._spawning))):
                key, self._next_key = self._next_key, self._next_key + 1
                run.pool.starting += 1
                self._spawning[key] = (run.config.name, template.generation)
                template.fork(key, self._child_settings(run.config))
                self._loop.call_later(_SPAWN_SECONDS, self._check_spawned, template, key)

    def _check_spawned(self, template: TemplateProcess, key: int) -> None:
        if key in self._spawning and not template.gone:
            _log.error("template.stuck", generation=template.generation, pid=template.pid)
            template.kill()

    def _child_settings(self, pool: PoolConfig) -> dict[str, Any]:
        return {
            "max_result_bytes": self._config.worker.max_result_bytes,
            "max_jobs_per_child": pool.max_jobs_per_child,
            "max_rss_bytes": pool.max_rss_bytes,
            "memory_limit_bytes": pool.memory_limit_bytes,
            "log_level": self._config.log.level,
            "log_format": self._config.log.format,
        }

    def _on_forked(self, template: TemplateProcess, key: int, pid: int, fds: list[int]) -> None:
        if key not in self._spawning:
            close_all(fds)
            return
        pool_name, _ = self._spawning.pop(key)
        run = self._pools[pool_name]
        # Above what a result may take there is still the frame of an error with its traceback.
        cap = max(self._config.worker.max_result_bytes, template.config.worker.max_result_bytes, 262_144)
        child = ChildProcess(key, pid, template.generation, pool_name, fds, cap)
        self._children[key] = child
        self._loop.add_reader(child.outcomes.fileno(), self._on_outcomes, child)
        self._loop.add_reader(child.pidfd, self._on_child_dead, child)
        _log.debug("child.started", pid=pid, pool=pool_name, generation=template.generation)
        run.pool.child_started(key, template.generation, self._loop.time())
        self._perform(run)
        self._spawn_missing()
        self._claimer.wake()
        if not self._up.is_set() and not any(
            r.pool.missing_children() or r.pool.starting for r in self._pools.values()
        ):
            self._up.set()

    def _on_refused(self, key: int, error: str) -> None:
        if key not in self._spawning:
            return
        pool_name, _ = self._spawning.pop(key)
        _log.error("child.refused", pool=pool_name, error=error)
        self._pools[pool_name].pool.starting -= 1
        self._respawn_later()
        self._check_all_gone()

    def _on_lost_descriptors(self, template: TemplateProcess, key: int | None) -> None:
        """The template is well, and it is this process that is full: try again when some child may have ended."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        error = f"the master has as many files open as RLIMIT_NOFILE allows ({soft}), and a child takes six; raise it"
        if not template.ready:
            self._fail_generation(template.generation, f"cannot receive what the template says: {error}")
        elif key is None:
            _log.error("template.unheard", generation=template.generation, error=error)
        else:
            self._on_refused(key, f"cannot take in a child: {error}")

    def _respawn_later(self) -> None:
        """Starts what is missing, after a pause that grows while children end without having run anything."""
        self._fruitless = min(self._fruitless + 1, len(_RESPAWN_SECONDS) - 1)
        if self._respawn_timer is None:
            self._respawn_timer = self._loop.call_later(_RESPAWN_SECONDS[self._fruitless], self._respawn)

    def _respawn(self) -> None:
        self._respawn_timer = None
        self._spawn_missing()

    def _on_child_dead(self, child: ChildProcess) -> None:
        """The kernel says that it is gone; how it ended the template knows, if it is there to tell."""
        self._loop.remove_reader(child.pidfd)
        self._lose(child)
        if child.generation not in self._templates:
            self._bury(child.key, None)
        else:
            self._dying[child.key] = self._loop.call_later(_STATUS_SECONDS, self._bury, child.key, None)

    def _lose(self, child: ChildProcess) -> None:
        """Hands a dead child nothing more, and what it had not started to others."""
        run = self._pools[child.pool]
        run.pool.child_lost(child.key)
        self._perform(run)

    def _on_exit_status(self, key: int, status: int) -> None:
        if key in self._children:
            self._bury(key, status)

    def _bury(self, key: int, status: int | None) -> None:
        """Takes in the last words of a dead child, settles the job it died under, and replaces it."""
        timer = self._dying.pop(key, None)
        if timer is not None:
            timer.cancel()
        child = self._children.get(key)
        if child is None:
            return
        run = self._pools[child.pool]
        self._lose(child)
        while self._read_outcomes(child, run):
            pass
        how = "vanished" if status is None else describe_status(status)
        ended = run.pool.child_died(key, self._loop.time())
        for job, reason in ended:
            dump = child.last_words(job.lease, status)
            self._settle(job, _report_of_death(job, child, reason, how, dump))
        log = _log.warning if ended else _log.debug
        log("child.exited", pid=child.pid, pool=child.pool, how=how, jobs=child.jobs_run, loss=child.loss)
        expected = bool(child.jobs_run or ended or child.retired)
        del self._children[key]
        self._loop.remove_reader(child.pidfd)
        self._loop.remove_reader(child.outcomes.fileno())
        child.close()
        self._reap()
        self._perform(run)
        self._after_outcomes(run)
        if expected:
            self._fruitless = 0
            self._spawn_missing()
        elif not self._ending and run.pool.missing_children():
            self._respawn_later()
        self._forget_empty_pools(self._config)
        self._drop_unused_templates()
        self._check_all_gone()

    def _check_all_gone(self) -> None:
        if not self._ending or self._children or self._spawning:
            return
        if self._stopping:
            self._all_gone.set()
        else:  # drained: what is left of the end is that of any stop
            self._stop.set()

    def _reap(self) -> None:
        if not self._owns_process:
            return
        killed = self._orphans.end(self._keep_pids | {template.pid for template in self._templates.values()})
        if killed:
            _log.info("orphan.killed", pids=killed)
        if self._orphans.left:
            self._loop.call_later(0.1, self._reap)

    # -- jobs ---------------------------------------------------------------------------------------------------

    def _on_claimed(self, run: PoolRun, jobs: list[ClaimedJob]) -> None:
        if self._heart.check():
            self._let_go([(job.id, job.lease) for job in jobs], "the answer to their claim came too late")
            return
        run.pool.claimed(jobs, self._loop.time())
        self._perform(run)
        if self._early_cancels and any(job.id in self._early_cancels for job in jobs):
            self._heart.beat_now()  # which says whether this claim is to be cancelled: it may have been an earlier one
        self._arm_tick()

    def _on_outcomes(self, child: ChildProcess) -> None:
        self._heart.check()  # this master may have been stopped for long: then no other job may follow
        run = self._pools[child.pool]
        more = self._read_outcomes(child, run)
        self._after_outcomes(run)
        if more and (rest := run.pool.rest(child.key)):
            self._loop.remove_reader(child.outcomes.fileno())
            self._loop.call_later(rest, self._watch_outcomes, child)

    def _watch_outcomes(self, child: ChildProcess) -> None:
        if self._children.get(child.key) is child:
            self._loop.add_reader(child.outcomes.fileno(), self._on_outcomes, child)

    def _read_outcomes(self, child: ChildProcess, run: PoolRun) -> bool:
        """Takes in what a child reported; returns whether there may be more."""
        try:
            frames, more = child.read_outcomes()
            if more is None:
                self._loop.remove_reader(child.outcomes.fileno())
            jobs = run.pool.ended(child.key, [frame.lease for frame in frames], self._loop.time())
        except (FrameError, ProtocolError) as error:
            _log.error("child.unintelligible", pid=child.pid, error=str(error))
            self._loop.remove_reader(child.outcomes.fileno())
            run.pool.child_lost(child.key)
            child.kill()
            return False
        for job, frame in zip(jobs, frames, strict=True):
            self._end(job, frame)
        self._perform(run)
        return bool(more)

    def _end(self, job: ClaimedJob, frame: Frame) -> None:
        try:
            if frame.kind is FrameKind.COMPLETED:
                self._writer.complete(job, frame.body.decode() if frame.body else None)
                return
            if frame.kind is FrameKind.COMMITTED:
                self._writer.written_by_handler(job.id, job.lease)
                if frame.body:
                    error = str(json.loads(frame.body)["error"])
                    _log.warning("job.failed_after_commit", **_named(job), error=error)
                return
            report = report_of_frame(frame.kind, frame.body)
        except Exception as error:
            # A handler shares its process with the sender: whatever comes in hurts its own job only.
            report = Report(Ending.FAILED, f"WorkerCrash: its child sent an outcome that can't be read: {error!r:.500}")
        self._settle(job, report)

    def _after_outcomes(self, run: PoolRun) -> None:
        self._writer.flush_within(run.pool.flush_delay())
        self._claimer.wake()
        self._arm_tick()

    def _settle(self, job: ClaimedJob, report: Report) -> None:
        self._writer.settle(self._decide(job, report))
        # An unconfirmed one most likely is completed; if it isn't, `_on_settled` tells.
        if report.ending not in (Ending.RELEASED, Ending.UNCONFIRMED):
            _log.info("job.ended", **_named(job), ending=report.ending.value, error=report.error or None)

    def _decide(self, job: ClaimedJob, report: Report) -> Settlement:
        return settle(job, report, retry_delay=self._retry_delay, max_crashes=self._config.worker.max_crashes)

    def _on_settled(self, settlement: Settlement, state: JobState) -> None:
        if settlement.unconfirmed:
            _log.info("job.ended", job_id=settlement.job_id, lease=settlement.lease, ending="failed", error=UNCONFIRMED)
        if state is JobState.DISCARDED:
            _log.warning("job.discarded", job_id=settlement.job_id)

    def _perform(self, run: PoolRun) -> None:
        """Carries out what the pool decided, and what follows from that."""
        pool = run.pool
        settled = False
        while pool.actions:
            actions, pool.actions = pool.actions, []
            for action in actions:
                if isinstance(action, Settle):
                    self._settle(action.job, action.report)
                    settled = True
                    continue
                child = self._children.get(action.child)
                if child is None or action.child not in pool.children:
                    continue
                match action:
                    case Assign(key, jobs):
                        unsent = child.send(jobs)
                        if unsent:
                            pool.unsent(key, unsent, self._loop.time())
                    case TakeBack(key):
                        pool.took_back(key, child.take_back(), self._loop.time())
                    case CallOff(_, lease, reason):
                        child.call_off(lease, reason)
                        _log.info("job.called_off", lease=lease, reason=reason.name.lower(), pid=child.pid)
                    case Remind(key):
                        child.remind(pool.running_lease(key))
                    case Kill():
                        child.kill()
                    case Retire():
                        child.retire()
        if settled:
            self._writer.flush_within(pool.flush_delay())

    def _arm_tick(self) -> None:
        """Has `_tick` called when time alone brings something about."""
        at = min((t for run in self._pools.values() if (t := run.pool.next_tick()) is not None), default=None)
        if at is None or (self._tick_timer is not None and self._tick_at <= at):
            return
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        self._tick_at = at
        self._tick_timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        self._tick_timer = None
        self._heart.check()
        for run in list(self._pools.values()):
            # What has been reported already is not late, however late it is read.
            for key in [key for key, child in run.pool.children.items() if child.assigned]:
                while key in run.pool.children and self._read_outcomes(self._children[key], run):
                    pass
            run.pool.tick(self._loop.time())
            self._perform(run)
            self._writer.flush_within(run.pool.flush_delay())
        self._claimer.wake()
        self._arm_tick()

    # -- what others say ----------------------------------------------------------------------------------------

    def _on_notice(self, channel: str, payload: str) -> None:
        match channel:
            case "roost_inserted":
                for run in self._pools.values():
                    if payload in run.config.queues:
                        run.hinted(self._loop.time())
                        self._claimer.wake()
            case "roost_cancel_requested":
                with contextlib.suppress(ValueError):  # anyone may send anything
                    self._cancel(int(payload))
            case "roost_queue_changed" | "roost_reload" | "roost_drain":
                self._heart.beat_now()

    async def _notify(self, channel: str, payload: str) -> None:
        await self._claim_link.run(lambda conn: conn.execute("SELECT pg_notify(%s, %s)", [channel, payload]))

    def _on_deaf(self) -> None:
        """Nothing is told from now on: no enqueue is to send a hint, and the heartbeat brings in all else."""
        self._claimer.wake()
        self._heart.beat_now()

    def _heartbeat_interval(self) -> float:
        worker = self._config.worker
        if self._listener.deaf:
            return min(worker.heartbeat_interval, worker.poll_interval)
        return worker.heartbeat_interval

    def _on_listening(self) -> None:
        """Notifications may have been missed."""
        for run in self._pools.values():
            run.hinted(self._loop.time())
        self._claimer.wake()
        self._heart.beat_now()

    def _on_beat(self, beat: statements.Beat) -> None:
        self._told_tasks = self._telling_tasks
        for run in self._pools.values():
            resumed = run.pool.paused - beat.paused
            run.pool.pause(beat.paused)
            self._perform(run)
            if resumed & set(run.config.queues):
                run.hinted(self._loop.time())
                self._claimer.wake()
        for job_id in beat.cancelled_jobs:
            self._cancel(job_id)
        self._scheduler.told_time(beat.now)
        request = None if beat.reload_request is None else str(beat.reload_request)
        if request is not None and request != self._answered_request and not self._stopping:
            self._answered_request = request
            _log.info("reload.requested", request=request)
            self._reload_requests.append(request)
            self.request_reload()
        if beat.drain_requested:
            self.request_drain()
        if self._draining and self._reload_requests:
            requests, self._reload_requests = self._reload_requests, []
            self._answer_requests(requests, _DRAINING)

    def _cancel(self, job_id: int) -> None:
        self._early_cancels.pop(job_id, None)
        for run in self._pools.values():
            if run.pool.cancel(job_id, self._loop.time()):
                self._perform(run)
                self._arm_tick()
                return
        now = self._loop.time()
        self._early_cancels[job_id] = now
        while now - self._early_cancels[oldest := next(iter(self._early_cancels))] > _EARLY_CANCEL_SECONDS:
            del self._early_cancels[oldest]

    def _known_leases(self) -> set[int]:
        """Of every claim that is held or waits to be written."""
        known = self._writer.pending_leases()
        known.update(job.lease for run in self._pools.values() for job in run.pool.held_jobs())
        return known

    def _on_unknown_claims(self, claims: list[tuple[int, int]]) -> None:
        if claims:
            self._let_go(claims, "the answer to their claim was lost")

    def _let_go(self, claims: list[tuple[int, int]], reason: str) -> None:
        for job_id, lease in claims:
            self._writer.settle(Settlement(job_id, lease, None, 0.0, None, False, False))
        _log.warning("claims.released", jobs=len(claims), reason=reason)
        self._writer.flush_within(0)

    def _on_fence(self) -> None:
        """The others may soon take our jobs: no child of ours may go on running them."""
        for child in self._children.values():
            child.loss = child.loss or "its worker lost the database and killed its own children"
        for run in self._pools.values():
            run.pool.kill_all()
            self._perform(run)

    async def _on_dead(self) -> None:
        """The others have taken our jobs: start afresh. What is reported under the old leases changes nothing."""
        _log.error("worker.was_declared_dead", worker=str(self._worker_id))
        self._on_fence()
        self._worker_id = uuid4()
        await self._register()
        _log.info("worker.registered", worker=str(self._worker_id))

    # -- regularly ----------------------------------------------------------------------------------------------

    async def _reap_regularly(self) -> None:
        noted = False
        while True:
            await asyncio.sleep(self._config.worker.orphan_reaper_interval)
            try:
                await heart.reap(self._claim_link, self._config.worker)
                self._claimer.check_claims()
                if not noted:
                    await heart.note_ended(self._claim_link)
                    noted = True
            except DatabaseGone as error:
                _log.warning("reaper.failed", error=str(error))

    async def _tidy_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._config.worker.archive_interval)
            try:
                await housekeeping.tidy(self._tidy_link, self._config.worker)
            except (DatabaseGone, psycopg.Error) as error:
                _log.warning("housekeeping.failed", error=str(error))
            finally:
                await self._tidy_link.close()

    async def _notify_regularly(self) -> None:
        interval = self._notifier.watchdog_interval_seconds or 10.0
        while True:
            self._notifier.watchdog()
            self._notifier.status(self._status())
            await asyncio.sleep(min(interval, 10.0))

    # -- figures ------------------------------------------------------------------------------------------------

    def _counts(self) -> dict[str, int]:
        return {
            "children": len(self._children),
            "running": sum(1 for run in self._pools.values() for c in run.pool.children.values() if c.assigned),
            "written": self._writer.written,
            "unwritten": self._writer.pending,
        }

    def _status(self) -> str:
        state = "draining" if self._ending else "running"
        return f"{state}: " + ", ".join(f"{name} {number}" for name, number in self._counts().items())

    def _metadata(self) -> dict[str, Any]:
        return {
            "identity": self._identity.as_json(),
            "generation": self._generations.current,
            "version": roostd.__version__,
        }

    def _figures(self) -> dict[str, Any]:
        runs = self._pools.values()
        return {
            "inflight": sum(len(run.pool.held_jobs()) for run in runs),
            "queues": [queue for run in runs if not run.pool.draining for queue in run.config.queues],
            "concurrency": sum(run.pool.size for run in runs),
            "metadata": self._metadata()
            | {"state": "draining" if self._ending else "running", **self._counts(), "clock": round(time.time(), 3)}
            | {"pools": [_figures_of(run) for run in runs]}
            | self._untold_tasks(),
        }

    def _untold_tasks(self) -> dict[str, Any]:
        """The names of all tasks, which may be many, unless its row has them: a beat keeps what is there."""
        self._telling_tasks = (self._worker_id, self._generations.current)
        return {} if self._telling_tasks == self._told_tasks else {"tasks": self._tasks}


def _figures_of(run: PoolRun) -> dict[str, Any]:
    pool = run.pool
    busy = sum(1 for child in pool.children.values() if child.assigned)
    return {"queues": list(run.config.queues), "children": pool.size, "busy": busy}


def _named(job: ClaimedJob) -> dict[str, Any]:
    """What a line of the log has to say of which job it is about."""
    return {"job_id": job.id, "lease": job.lease, "attempt": job.attempt, "queue": job.queue, "task": job.task}


def _report_of_death(job: ClaimedJob, child: ChildProcess, reason: SoftReason | None, how: str, dump: str) -> Report:
    """What a child's death means for the job it was running."""
    if child.loss is not None:
        return Report(Ending.LOST, f"WorkerCrash: {child.loss}")
    match reason:
        case SoftReason.TIMEOUT:
            error = f"TimeoutError: overran timeout_seconds ({job.timeout_seconds}), did not stop, and was killed"
            return Report(Ending.TIMED_OUT, error, dump)
        case SoftReason.CANCEL:
            return Report(Ending.CANCELLED, "JobCancelled: did not stop when cancelled, and was killed", dump)
        case SoftReason.SHUTDOWN:
            return Report(Ending.RELEASED)
        case _:
            return Report(Ending.CRASHED, f"WorkerCrash: its process (pid {child.pid}) {how}", dump)


def _retry_strategy(config: Config) -> Callable[[int], float]:
    policy = config.worker.retry_strategy
    strategy: Callable[[int], float] = getattr(roost_client, policy.strategy)(**policy.arguments())
    return strategy


def _identify() -> Identity:
    pid = os.getpid()
    return Identity(
        hostname=socket.gethostname(),
        machine_id=_read("/etc/machine-id"),
        boot_id=_read("/proc/sys/kernel/random/boot_id"),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        pid=pid,
        started_ticks=linux.started_ticks_of(pid) or 0,
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
