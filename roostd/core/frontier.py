"""Where in its queues a pool looks for jobs: everywhere, or only past what it has claimed lately.

A claim reads each queue in order from its beginning. What was claimed is deleted there, but while any transaction is
open that is older, PostgreSQL can't remove it, and each claim wades through all of it. So a pool remembers where it
has been, and while looking everywhere is dear it looks mostly behind that. A job that comes in before that place (its
transaction was long, it was handed back) is found when the pool looks everywhere again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from roostd.core.job import ClaimedJob

KEPT_JOBS = 2000  # the last that were claimed, which are looked through again: most of what comes late comes among them
KEPT_SECONDS = 1.0  # how long at most
CHEAP_SECONDS = 0.003  # what a look everywhere may take beyond its jobs, and beyond what any look takes here
JOB_SECONDS = 0.000025
PAST_SECONDS = 10.0  # of the jobs that fall due, those that are looked through again
MOST_PLACES = 100  # of queues and priorities that are remembered; with more, a claim would have too many ranges
PAUSE = 20  # how many times as long as a dear look took it is till the next

_Place = tuple[str, int]  # a queue and a priority in it
_Mark = tuple[str, int, float]  # scheduled_at and id of a job in it, and the seconds before that


class Range(NamedTuple):
    """The jobs of `queue` after (priority, scheduled_at, job_id), in that order, up to the last of `last_priority`.

    It begins `early_seconds` before scheduled_at.
    """

    queue: str
    priority: int
    scheduled_at: str
    job_id: int
    last_priority: int
    early_seconds: float = 0.0


LOWEST, HIGHEST = -(2**31), 2**31 - 1


def everywhere(queues: Iterable[str]) -> list[Range]:
    return [Range(queue, LOWEST, "-infinity", 0, HIGHEST) for queue in queues]


class Looks:
    """How often it is worth while to look everywhere: always while that is cheap, else a twentieth of the time."""

    def __init__(self) -> None:
        self.dear_seconds = 0.0
        self._over_before = 0.0
        self._next_at = 0.0
        self._least: float | None = None  # that a look takes here, wherever it looks: the way to the database, a commit

    @property
    def is_dear(self) -> bool:
        return self.dear_seconds > 0

    def due(self, now: float) -> bool:
        return now >= self._next_at

    def took(self, seconds: float, jobs: int, now: float) -> None:
        """Takes in that a look everywhere took `seconds` and found so many jobs."""
        alone = max(0.0, seconds - JOB_SECONDS * jobs)
        over = max(0.0, alone - CHEAP_SECONDS - (self._least or 0.0))
        was_dear = self.is_dear
        # Once, it may be for another reason: a disk, a busy machine.
        self.dear_seconds, self._over_before = min(over, self._over_before), over
        self._next_at = now + PAUSE * self.dear_seconds
        if self.is_dear and not was_dear:
            self._least = None  # the looks that don't go everywhere will tell
        elif self._least is not None:
            self._least = min(self._least, alone)

    def took_elsewhere(self, seconds: float, jobs: int) -> None:
        """Takes in what a look past what was claimed took."""
        if JOB_SECONDS * jobs < CHEAP_SECONDS:
            self._least = seconds if self._least is None else min(self._least, seconds)


class Frontier:
    def __init__(self) -> None:
        self.looks = Looks()
        self._kept: deque[tuple[float, int, dict[_Place, _Mark]]] = (
            deque()
        )  # of a claim: when, jobs, last of each place
        self._kept_jobs = 0
        self._been: dict[_Place, _Mark] = {}  # all up to there was claimed
        self._poll_missed = False

    def ranges(self, queues: Sequence[str], now: float, *, polling: bool) -> list[Range]:
        """Where to look now; `claimed` must be told what was found.

        A dear look everywhere is for a poll: where a job is known to be, it should not wait for that.
        """
        polling, self._poll_missed = polling or self._poll_missed, False
        if not self.looks.is_dear or (polling and self.looks.due(now)):
            return everywhere(queues)
        return self.cheap_ranges(queues)

    def cheap_ranges(self, queues: Sequence[str]) -> list[Range]:
        """Where to look for what a claim might find next, claiming none of it: never where that is dear."""
        return [each for queue in queues for each in self._past(queue)] if self.looks.is_dear else everywhere(queues)

    def miss_poll(self) -> None:
        """The pool has no room to claim for: its next claim stands in for the poll."""
        self._poll_missed = True

    def _past(self, queue: str) -> list[Range]:
        """One range from each priority in which something was claimed up to the next such."""
        known = sorted(priority for name, priority in self._been if name == queue)
        if not known:
            return everywhere([queue])
        ranges = [Range(queue, LOWEST, "-infinity", 0, known[0] - 1)] if known[0] > LOWEST else []
        for priority, following in zip(known, [*known[1:], HIGHEST + 1], strict=True):
            scheduled_at, job_id, early_seconds = self._been[queue, priority]
            ranges.append(Range(queue, priority, scheduled_at, job_id, following - 1, early_seconds))
        return ranges

    def claimed(self, ranges: Sequence[Range], jobs: Sequence[ClaimedJob], seconds: float, now: float) -> None:
        """Takes in what a claim over these ranges found, best first, and how long it took."""
        if ranges == everywhere(each.queue for each in ranges):
            self.looks.took(seconds, len(jobs), now)
            for job in jobs:  # before the first of each place there was nothing
                self._been.setdefault((job.queue, job.priority), (job.scheduled_at, job.id, KEPT_SECONDS))
        else:
            self.looks.took_elsewhere(seconds, len(jobs))
        if jobs:
            last = {(job.queue, job.priority): (job.scheduled_at, job.id, 0.0) for job in jobs}
            self._kept.append((now, len(jobs), last))
            self._kept_jobs += len(jobs)
        while self._kept and (self._kept_jobs - self._kept[0][1] >= KEPT_JOBS or self._kept[0][0] < now - KEPT_SECONDS):
            _, number, last = self._kept.popleft()
            self._kept_jobs -= number
            self._been |= last
        if len(self._been) > MOST_PLACES:
            self._been.clear()
