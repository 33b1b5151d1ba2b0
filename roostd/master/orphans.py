"""What jobs left behind when their child died: the master adopts it, and ends it."""

from __future__ import annotations

import os

from roostd import linux


class Orphans:
    """The processes that this one adopted: what a dead child's job left behind."""

    def __init__(self) -> None:
        self.left = False  # some are dying yet, or have come meanwhile: to be called again soon
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
                linux.kill_tree(pid)
                self._killed.add(pid)
                killed.append(pid)
                self._reap(pid)
        self.left = any(pid not in ours for pid in linux.children_of(os.getpid()))
        return killed

    def _reap(self, pid: int) -> bool:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                return False
        except ChildProcessError:
            pass  # it is reaped: the list of our children is not of one moment
        self._killed.discard(pid)
        return True
