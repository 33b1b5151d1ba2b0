"""When a pool asks the database for jobs, when it wants to be told of new ones, and when due jobs are looked for.

Polling alone is correct; a notification is a hint that saves the wait. It costs every enqueue that sends one a lock
shared by the whole PostgreSQL instance, so a pool asks for hints only while it has nothing to do and few come.
While it is busy it finds new jobs by asking again anyway.
"""

from __future__ import annotations

BUSY_POLL_SECONDS = 0.005
EMPTY_POLLS = 4  # empty answers in a row, at doubling intervals, before a busy pool calls itself idle: 75 ms in all
FULL_SECONDS = 0.2  # of claims that got all they asked for, before an idle pool calls itself busy
PROMOTE_BATCH = 1000  # the most jobs that one promotion makes ready; see promote.sql
HINTS_PER_SECOND = 200  # above this the hints are the cost, and polling every few milliseconds is cheaper
_HINT_SPAN = 0.1


def promote_in(promoted: int, next_due_seconds: float | None, poll_interval: float) -> float:
    """Seconds from a promotion of `promoted` jobs to the next; None: no job is scheduled.

    Jobs that fall due microseconds apart are made ready together: one by one, each would cost a transaction.
    """
    if promoted >= PROMOTE_BATCH:
        return 0.0
    if next_due_seconds is None:
        return poll_interval
    return min(poll_interval, max(next_due_seconds, BUSY_POLL_SECONDS))


class Demand:
    """One pool's view of whether there is anything to claim."""

    def __init__(self, poll_interval: float) -> None:
        self.poll_interval = poll_interval
        self.wants_hints = False
        self._dry = False  # the last claim took all there was
        self._poll_at = 0.0
        self._empty_polls = 0
        self._full_since: float | None = None
        self._hinted_at = -1.0
        self._hints = 0
        self._hints_since = 0.0

    def claim_at(self) -> float:
        """The monotonic time from which a claim makes sense; 0 for at once."""
        return self._poll_at if self._dry else 0.0

    def hinted(self, now: float) -> None:
        """Takes in a notification, or any other reason to think that there are new jobs."""
        self._dry = False
        self._hinted_at = now
        if now - self._hints_since > _HINT_SPAN:
            self._hints, self._hints_since = 0, now
        self._hints += 1
        if self._hints > HINTS_PER_SECOND * _HINT_SPAN:
            self._call_busy()

    def made_ready(self) -> None:
        """Takes note that there may be new jobs, by our own doing."""
        self._dry = False

    def claimed(self, asked: int, got: int, asked_at: float, now: float) -> None:
        """Takes in the answer to a claim of `asked` jobs that was made at `asked_at`."""
        if got >= asked:
            self._dry = False
            self._empty_polls = 0
            if self._full_since is None:
                self._full_since = now
            elif now - self._full_since > FULL_SECONDS:
                self._call_busy()
            return
        self._full_since = None
        self._dry = True
        if self.wants_hints:
            self._poll_at = now + self.poll_interval
            # A hint that came meanwhile may be of a job that the claim did not see.
            self._dry = self._hinted_at < asked_at
        elif got:
            self._empty_polls = 0
            self._poll_at = now + BUSY_POLL_SECONDS
        elif self._empty_polls < EMPTY_POLLS:
            self._poll_at = now + BUSY_POLL_SECONDS * 2**self._empty_polls
            self._empty_polls += 1
        else:
            # Ask once more after saying so: a job enqueued before the word was out sent no hint.
            self.wants_hints = True
            self._dry = False

    def _call_busy(self) -> None:
        self.wants_hints = False
        self._empty_polls = 0
