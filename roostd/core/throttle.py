"""When a pool looks for jobs of throttled tasks. The limits hold in the database: this only saves looks."""

from __future__ import annotations

import math

# A claim is no start yet. What has a rate starts within this time after it was asked for, or not at all, and counts for
# as much longer than a minute: so no minute holds too many. Longer would cost that much of the rate; shorter, and on a
# busy machine too many claims would be in vain.
START_WITHIN_SECONDS = 1.0
WINDOW_SECONDS = 60.0 + START_WITHIN_SECONDS
LOOK_SECONDS = 0.1  # from look to look while a pool gets no hints: it is busy, and polls much more often than that
OUTRANKED_SECONDS = 0.05  # until jobs may be the best that were not when last looked


class Looks:
    """One pool's view of when there may be a job of a throttled task for it."""

    def __init__(self) -> None:
        self.limits = False  # whether any task has limits, or had: each promotion tells
        self._look_at = 0.0
        self._hinted_at = -1.0

    @property
    def look_at(self) -> float:
        """The monotonic time from which a look makes sense; 0 for at once."""
        return self._look_at if self.limits else math.inf

    def hinted(self, now: float) -> None:
        """Takes in that a throttled job may have come, or room for one."""
        self._hinted_at = now
        self._look_at = 0.0

    def met(self, now: float) -> None:
        """Takes in that a claim met jobs of a throttled task, which can now be found where looks find them."""
        self.limits = True
        self.hinted(now)

    def looked(
        self,
        got: int,
        *,
        more: bool,
        next_in_seconds: float | None,
        asked_at: float,
        now: float,
        poll_interval: float,
        gets_hints: bool,
    ) -> None:
        """Takes in the answer to a look that was asked for at `asked_at` and got so many jobs."""
        if self._hinted_at >= asked_at:  # of something that this look may not have seen
            self._look_at = 0.0
        elif more:  # what was left for want of children is taken as soon as there are
            self._look_at = 0.0 if got else now + min(poll_interval, OUTRANKED_SECONDS)
        else:
            seconds = poll_interval if gets_hints else min(poll_interval, LOOK_SECONDS)
            self._look_at = now + min(seconds, math.inf if next_in_seconds is None else max(0.0, next_in_seconds))
