"""The life of a child: read a job, run it, report what became of it, and so on until its intake is closed.

The order matters: an outcome is sent before the next job is read, so that whatever has been read and not reported is
what a dying child took with it. Nothing here may fail because of what a handler did to its process: descriptors
closed, signals taken, a copy of the process that returns too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import setproctitle

from roost_client import HandlerRegistry, Hooks
from roostd import linux
from roostd.child.invoke import Invoker
from roostd.child.logs import ChildLog
from roostd.child.running import Runs
from roostd.wire.frames import encode_frame
from roostd.wire.packets import JobPacket, PacketReader, decode_job
from roostd.wire.signals import DUMP, EXIT_UNUSABLE

_MAX_LEFT_ZOMBIES = 16

# Exit statuses, for the log: the master learns what became of the job from its frames alone.
EXIT_DONE = 0


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a pool asks of its children; bytes and counts, None for no limit."""

    max_result_bytes: int
    max_jobs_per_child: int | None
    max_rss_bytes: int | None
    memory_limit_bytes: int | None
    log_level: str
    log_format: str


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
        self._runs = Runs(self._invoker, registry, hooks, ChildLog(settings.log_level, settings.log_format))
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
            kind, body = self._runs.run(job)
            self._runs.end_copy()
            if not self._report(encode_frame(kind, job.lease, body)):
                return
            self._done += 1
            if self._must_end():
                self.exit_status = EXIT_DONE
                return

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
