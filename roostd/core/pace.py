"""How fast a pool's jobs run, and what follows: how many to hand to a child ahead, how many to claim, when to write.

Short jobs must be handed over, claimed and written in batches, or the trips cost more than the work; long ones one
by one, or they wait in line here while another host is idle. All three are one rule: as many as run within a few
milliseconds.
"""

from __future__ import annotations

WINDOW_SECONDS = 0.008  # what may be queued to one child
REST_SECONDS = 0.002  # what a child's reports may wait while it has twice as much to go on with
MAX_WINDOW = 64  # a child's socket holds 278 small packets by default; far above where batching stops paying
AHEAD_SECONDS = 0.05  # what may be claimed beyond that: a claim takes about 10 ms under load
MAX_AHEAD = 2000
FLUSH_SECONDS = 0.02  # what an outcome may wait for company
_WEIGHT = 0.1  # of one more job in the mean


class Pace:
    """A moving mean of the seconds a job takes in a child of the pool."""

    __slots__ = ("mean_seconds",)

    def __init__(self) -> None:
        self.mean_seconds: float | None = None

    def observe(self, jobs: int, seconds: float) -> None:
        """Takes in that a child did `jobs` jobs, one after the other, in `seconds`."""
        sample = max(seconds / jobs, 1e-6)
        if self.mean_seconds is None:
            self.mean_seconds = sample
        else:
            self.mean_seconds += (1 - (1 - _WEIGHT) ** jobs) * (sample - self.mean_seconds)

    def at_least(self, seconds: float) -> None:
        """Takes in that a job has been running for `seconds` already."""
        if self.mean_seconds is None or self.mean_seconds < seconds:
            self.mean_seconds = seconds

    def window(self) -> int:
        """Jobs that may be in a child's hands at once, the running one included."""
        if self.mean_seconds is None:
            return 1
        return max(1, min(MAX_WINDOW, int(WINDOW_SECONDS / self.mean_seconds)))

    def rest(self, assigned: int) -> float:
        """Seconds that what a child reports may wait to be read, when so many jobs are in its hands."""
        if self.mean_seconds is None or (assigned - 1) * self.mean_seconds < 2 * REST_SECONDS:
            return 0.0
        return REST_SECONDS

    def ahead(self, children: int) -> int:
        """Jobs that may be claimed beyond what the children hold."""
        if self.mean_seconds is None:
            return 0
        return min(MAX_AHEAD, int(children * AHEAD_SECONDS / self.mean_seconds))

    def flush_delay(self, children: int) -> float:
        """Seconds an outcome may wait to be written with others; 0 where no others are to be expected."""
        if self.mean_seconds is None or children * FLUSH_SECONDS < 2 * self.mean_seconds:
            return 0.0
        return FLUSH_SECONDS
