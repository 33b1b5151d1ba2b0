"""How a process is killed with all it started.

A child leads a process group of its own, and adopts every orphan among its descendants, so whatever a job started is
below it in the process tree, also a daemon that left the session. Where cgroups are delegated to us systemd kills the
whole service; here the tree is walked.
"""

from __future__ import annotations

import contextlib
import os
import signal

from roostd import linux

_ROUNDS = 20


def kill_tree(pid: int) -> None:
    """Kills `pid` and all its descendants. They are stopped first, from the top, so that none can fork meanwhile."""
    stopped: list[int] = []
    pending = [pid]
    for _ in range(_ROUNDS):
        if not pending:
            break
        for process in pending:
            _signal(process, signal.SIGSTOP)
        stopped += pending
        pending = [process for process in linux.descendants_of(pid) if process not in stopped]
    for process in reversed(stopped[1:]):
        _signal(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _signal(pid, signal.SIGKILL)


class Orphans:
    """The processes that this one adopted: what a dead child's job left behind."""

    def __init__(self) -> None:
        self._killed: set[int] = set()  # not reaped yet: dying may take a moment

    def end(self, ours: set[int]) -> list[int]:
        """Kills those that are new, and reaps the dead; returns the pids of those that it killed.

        `ours` are the direct children that were started on purpose.
        """
        killed = []
        for pid in linux.children_of(os.getpid()):
            if pid in ours or self._reap(pid):
                continue
            if pid not in self._killed:
                kill_tree(pid)
                self._killed.add(pid)
                killed.append(pid)
                self._reap(pid)
        return killed

    def _reap(self, pid: int) -> bool:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                return False
        except ChildProcessError:
            pass  # it is reaped: the list of our children is not of one moment
        self._killed.discard(pid)
        return True


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
