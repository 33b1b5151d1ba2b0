"""The few Linux calls that Python does not wrap, and what /proc tells of processes. No policy."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_KILL_ROUNDS = 20

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"prctl({option}, {value}): {os.strerror(errno)}")


def die_with_parent(signal_number: int, parent_pid: int) -> bool:
    """Has the kernel send this process the signal when the thread of the parent that started it ends.

    Returns False when the parent is gone already: the caller must end itself then.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    return os.getppid() == parent_pid


def signal_main_thread(pid: int, number: int) -> None:
    """Sends a signal to the main thread of a process, where it interrupts what that waits for in C.

    Of a signal to the process the kernel may choose another thread, and does when the main one has one to take in yet.
    Raises ProcessLookupError.
    """
    if _libc.tgkill(pid, pid, number) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"tgkill({pid}, {number}): {os.strerror(error)}")


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends (a daemonised grandchild)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def children_of(pid: int) -> Iterator[int]:
    """The pids of a process's direct children, zombies included; none when it is gone, or hidden from us."""
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def descendants_of(pid: int) -> list[int]:
    """The pids of all processes below `pid`, parents before their children."""
    found: list[int] = []
    queue = [pid]
    while queue:
        children = [child for child in children_of(queue.pop()) if child not in found]
        found += children
        queue += children
    return found


def kill_tree(pid: int) -> None:
    """Kills `pid`, all its descendants and its process group.

    They are stopped first, from the top, so that none can fork meanwhile. Where `pid` adopts orphans, daemons that left
    its session and group are among its descendants.
    """
    stopped: list[int] = []
    pending = [pid]
    for _ in range(_KILL_ROUNDS):
        if not pending:
            break
        for process in pending:
            _signal(process, signal.SIGSTOP)
        stopped += pending
        pending = [process for process in descendants_of(pid) if process not in stopped]
    for process in reversed(stopped[1:]):
        _signal(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def started_ticks_of(pid: int) -> int | None:
    """A process's start time in clock ticks since boot (proc(5), stat, field 22); None where none lives.

    Raises PermissionError where there is one that is hidden from us.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        raise PermissionError(f"cannot read /proc/{pid}/stat") from None
    return None if fields[0] in "ZX" else int(fields[19])


def raise_open_files_limit() -> int:
    """Allows this process as many open files as it may have; returns what it was allowed before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft


def lower_open_files_limit(soft: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def rss_bytes() -> int:
    """The resident memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
