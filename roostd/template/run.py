"""The life of a template: import the handlers, report them, fork children on request, report their ends.

It runs user code only by importing it, and has no database connection and no thread: a fork copies the thread that
forks and no other, so a lock that another thread held stays locked in the child for ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import setproctitle

from roost_client import DEFAULT_HANDLERS, HandlerRegistry, Hooks
from roost_client.arguments import object_text
from roost_client.fields import Refused
from roostd import linux
from roostd.child.run import ChildSettings, reset_signals, run_child
from roostd.core.timetable import Entry, resolve
from roostd.template.describe import describe_tasks
from roostd.wire.packets import PacketReader, decode_message, job_socketpair, send_message
from roostd.wire.signals import DUMP, SOFT


class NoRegistry(Exception):
    """`handlers.registry` does not lead to a HandlerRegistry."""


class BadEntries(Exception):
    """Cron entries that can't be used; `str()` has a line for each problem."""


class NoHooks(Exception):
    """`worker.hooks` does not lead to Hooks."""


class ThreadsStarted(Exception):
    """Threads run here, which a fork would lose."""


def main(master_fd: int, master_pid: int) -> NoReturn:
    """Serves the master until it closes the socket."""
    if not linux.die_with_parent(signal.SIGKILL, master_pid):
        os._exit(0)
    # A child inherits this until it has handlers of its own for the last two; a Ctrl-C is the master's to handle.
    for number in (signal.SIGINT, SOFT, DUMP):
        signal.signal(number, signal.SIG_IGN)
    master = socket.socket(fileno=master_fd)
    reader = PacketReader(master, wait=True)
    first = reader.read()
    if first is None:
        os._exit(0)
    settings = decode_message(*first)
    setproctitle.setproctitle(f"roostd: template {settings['generation']}")
    try:
        registry = import_handlers(settings["modules"], settings["pythonpath"], settings["registry"])
        hooks = import_hooks(settings["hooks"])
        for thread in _other_threads():
            thread.join(0.5)  # it may be about to end
        _refuse_threads()
        entries = cron_entries(registry, settings["cron"])
    except BadEntries as error:
        send_message(master, {"op": "failed", "error": str(error), "trace": "", "handlers": False})
        os._exit(1)
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        told = f"cannot import the handlers: {type(error).__name__}: {error}"
        send_message(master, {"op": "failed", "error": told, "trace": trace, "handlers": True})
        os._exit(1)
    # Children write whole lines, and share the master's streams.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    gc.collect()
    gc.freeze()  # what is here now is never garbage: the collector leaves its pages shared
    # From here on it is able to end by itself when the master is gone, and to take all along that its children started;
    # it only must not be stopped then.
    if not linux.die_with_parent(signal.SIGCONT, master_pid):
        os._exit(0)
    ready = {
        "op": "ready",
        "tasks": registry.names(),
        "cron": [entry.as_json() for entry in entries],
        "limits": _limits(registry),
        "warnings": _warnings(registry),
        # Only for those who ask: it takes longer than all else here, and a reload has no use for it.
        "described": describe_tasks(registry) if settings["describe"] else None,
    }
    send_message(master, ready)
    _Template(master, reader, registry, hooks, settings["open_files"]).serve()
    os._exit(0)


def import_handlers(modules: list[str], pythonpath: list[str], registry: str | None) -> HandlerRegistry:
    """Imports the handler modules; returns the registry that they filled. Raises whatever an import raises."""
    sys.path[:0] = [path for path in pythonpath if path not in sys.path]
    for module in modules:
        importlib.import_module(module)
    if registry is None:
        return DEFAULT_HANDLERS
    module_name, _, attribute = registry.partition(":")
    found = getattr(importlib.import_module(module_name), attribute, None)
    if not isinstance(found, HandlerRegistry):
        raise NoRegistry(
            f"cannot use handlers.registry {registry!r}: it is a {type(found).__name__}, not a HandlerRegistry"
        )
    return found


def cron_entries(registry: HandlerRegistry, configured: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    """The entries of the registry and of the settings, with the tasks' defaults. Raises BadEntries.

    Here, because only here the tasks and the models of their arguments are known.
    """

    def args_text(task: str, args: Any) -> str:
        spec = registry.get(task)
        try:
            return object_text("args", args, None if spec is None else spec.args_model)
        except Refused as refused:
            raise ValueError(f"{refused.path} {refused.reason}") from None

    declared = []
    for spec in registry.cron_entries():
        entry = spec.entry
        fields = {key: getattr(entry, key) for key in ("name", "expression", "task", "args", *sorted(spec.passed))}
        zone = {} if entry.timezone_name is None else {"timezone": entry.timezone_name}
        declared.append({**fields, **zone, "where": spec.where})
    tasks = {name: task.defaults for name in registry.names() if (task := registry.get(name)) is not None}
    entries, problems = resolve(declared, configured, tasks, args_text)
    if problems:
        raise BadEntries("\n".join(problems))
    return entries


def import_hooks(address: str | None) -> Hooks | None:
    """The hooks at "module:attribute". Raises NoHooks, which names the key, whatever is wrong with them."""
    if address is None:
        return None
    module_name, _, attribute = address.partition(":")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute, module)
    except BaseException as error:
        raise NoHooks(f"cannot import worker.hooks {address!r}: {type(error).__name__}: {error}") from error
    if found is module:
        raise NoHooks(f"cannot use worker.hooks {address!r}: module {module_name!r} has no {attribute!r}")
    if not isinstance(found, Hooks):
        raise NoHooks(f"cannot use worker.hooks {address!r}: it is a {type(found).__name__}, not a Hooks")
    return found


class _Template:
    def __init__(
        self,
        master: socket.socket,
        reader: PacketReader,
        registry: HandlerRegistry,
        hooks: Hooks | None,
        open_files: int | None,
    ) -> None:
        self._master = master
        self._reader = reader
        self._registry = registry
        self._hooks = hooks
        self._open_files = open_files  # that a child may have; the template needs one a child
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> key, pid

    def serve(self) -> None:
        """Until the master closes the socket, or is gone; then no child may be left, nor anything that one started."""
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._serve()
        finally:
            for _, pid in self._children.values():
                linux.kill_tree(pid)

    def _serve(self) -> None:
        self._selector.register(self._master, selectors.EVENT_READ)
        while True:
            for ready, _ in self._selector.select():
                if ready.fd != self._master.fileno():
                    self._bury(ready.fd)
                    continue
                received = self._reader.read()
                if received is None:
                    return
                message = decode_message(*received)
                self._fork(message["key"], ChildSettings(**message["settings"]))

    def _fork(self, key: int, settings: ChildSettings) -> None:
        """Forks a child and sends its ends to the master, in the order that master/templates.py reads them."""
        try:
            _refuse_threads()
        except ThreadsStarted as error:
            self._refuse(key, str(error))
            return
        with contextlib.ExitStack() as ends:
            try:
                jobs, jobs_read = map(ends.enter_context, job_socketpair())
                outcomes, outcomes_write = map(ends.enter_context, socket.socketpair())
                control, control_read = map(ends.enter_context, socket.socketpair(type=socket.SOCK_SEQPACKET))
                dump = os.memfd_create("roost-dump", os.MFD_CLOEXEC)
                ends.callback(os.close, dump)
                spare = os.dup(dump)  # its place is the pidfd's, which must not be lacking once there is a child
                template_pid = os.getpid()
                try:
                    pid = os.fork()
                finally:
                    os.close(spare)
            except OSError as error:
                self._refuse(key, f"cannot fork: {error}")
                return
            if pid == 0:
                self._become_child(template_pid, [jobs, outcomes, control])
                run_child(jobs_read, outcomes_write, control_read, dump, self._registry, self._hooks, settings)
            pidfd = os.pidfd_open(pid)
            self._children[pidfd] = (key, pid)
            self._selector.register(pidfd, selectors.EVENT_READ)
            fds = [jobs.fileno(), jobs_read.fileno(), outcomes.fileno(), control.fileno(), dump, pidfd]
            send_message(self._master, {"op": "forked", "key": key, "pid": pid}, fds)

    def _become_child(self, template_pid: int, masters_ends: list[socket.socket]) -> None:
        """The first steps of a child: out of the template's session, and with none of its descriptors."""
        os.setsid()
        if not linux.die_with_parent(signal.SIGKILL, template_pid):
            os._exit(0)
        linux.adopt_orphans()
        reset_signals()
        if self._open_files is not None:
            linux.lower_open_files_limit(self._open_files)
        self._selector.close()
        self._master.close()
        for sock in masters_ends:
            sock.close()
        for pidfd in self._children:
            os.close(pidfd)
        setproctitle.setproctitle("roostd: child idle")

    def _bury(self, pidfd: int) -> None:
        """Kills what is left of a dead child's process group, reaps it, and tells the master how it ended."""
        key, pid = self._children.pop(pidfd)
        self._selector.unregister(pidfd)
        # Before the reaping: until then the pid, which is the group's too, can't be another process's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        send_message(self._master, {"op": "exited", "key": key, "status": os.waitstatus_to_exitcode(status)})

    def _refuse(self, key: int, error: str) -> None:
        send_message(self._master, {"op": "refused", "key": key, "error": error})


def _other_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def _refuse_threads() -> None:
    names = ", ".join(thread.name for thread in _other_threads())
    if names:
        raise ThreadsStarted(
            f"cannot fork: importing the handlers started threads, which a child would not have: {names}; "
            "start them in the handler that needs them"
        )


def _limits(registry: HandlerRegistry) -> list[tuple[str, int | None, int | None]]:
    """Of every task, (name, rate_per_minute, max_concurrency)."""
    specs = [spec for name in registry.names() if (spec := registry.get(name)) is not None]
    return [(spec.name, spec.defaults.rate_per_minute, spec.defaults.max_concurrency) for spec in specs]


def _warnings(registry: HandlerRegistry) -> list[str]:
    """What an operator should know of the handlers, though they can run."""
    warnings = []
    if not registry.names():
        warnings.append("the handler modules register no task: every job will fail as unknown")
    native = len(list(Path("/proc/self/task").iterdir())) - threading.active_count()
    if native > 0:
        warnings.append(f"importing the handlers started {native} native threads, which children will not have")
    return warnings
