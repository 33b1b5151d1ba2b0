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


def reap_adopted(ours: set[int]) -> list[int]:
    """Kills and reaps the processes that this one adopted: what a dead child's job left behind. Returns their pids.

    `ours` are the direct children that were started on purpose.
    """
    adopted = [pid for pid in linux.children_of(os.getpid()) if pid not in ours]
    for pid in adopted:
        kill_tree(pid)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return adopted


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
