"""Which child runs which job, and when one is called off, killed, taken back or let go: a pool's whole state.

Events come in as method calls, with `now` from a monotonic clock; what is to be done collects in `actions`, which
the master carries out in order. A job is in exactly one place: `waiting` here, `assigned` to a child, or handed back
to the caller by the method that ended it.

The rules it keeps:
- A child gets more than one job at a time only where jobs are short (see pace.py), and what it has not started is
  taken back as soon as the running one proves long, or another child stands idle.
- The clock of a job starts when it is handed to an idle child, or when the outcome of the one before it arrives.
- A child that was called off gets nothing more until its job has ended; one that does not end in time is killed.
- So is one that does not even read what it is handed (it may be stopped): its jobs have not started, and go to others.
- Never more children than `size`, retiring ones included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from roostd.core.job import ClaimedJob
from roostd.core.outcome import Ending, Report, SoftReason
from roostd.core.pace import Pace

STEAL_SECONDS = 0.002  # how long a job runs, or others stand behind it, before an idle child may take those
STALL_SECONDS = 0.02  # how long before nothing may stand behind it at all
RELEASE_SECONDS = 0.5  # how long a job is held with no child free for it
UNREAD_SECONDS = 2.0  # how long a child with nothing else to do may leave a job unread
REMIND_SECONDS = 0.02  # when a child is first told again; then after twice the time, and so on
MAX_CLAIM = 1000


@dataclass(frozen=True, slots=True)
class Assign:
    """Hand these jobs to the child, in this order."""

    child: int
    jobs: Sequence[ClaimedJob]


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Read back what the child has not started, and tell it to `took_back`."""

    child: int


@dataclass(frozen=True, slots=True)
class CallOff:
    """Tell the child to stop the job under this lease, and signal it."""

    child: int
    lease: int
    reason: SoftReason


@dataclass(frozen=True, slots=True)
class Remind:
    """Signal a child that was told to stop once more: a signal that comes just before it waits in C wakes nothing."""

    child: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill the child and all it started."""

    child: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Close the child's intake: it ends when its job is done."""

    child: int


@dataclass(frozen=True, slots=True)
class Settle:
    """Write this ending of a job that no child is running."""

    job: ClaimedJob
    report: Report


Action = Assign | TakeBack | CallOff | Remind | Kill | Retire | Settle


class ProtocolError(Exception):
    """A child reported what it can't know: its outcomes are not to be believed."""


@dataclass(slots=True)
class Child:
    key: int
    generation: int
    assigned: deque[ClaimedJob] = field(default_factory=deque)
    head_since: float = 0.0  # when the clock of assigned[0] started; of an idle child, when it became idle
    behind_since: float = 0.0  # since when others stand behind assigned[0]
    deadline: float | None = None  # of assigned[0]
    read: bool = False  # assigned[0], for certain
    called_off: SoftReason | None = None
    told_at: float | None = None  # when it was told that assigned[0] is called off
    remind_at: float = 0.0
    kill_at: float = 0.0
    retiring: bool = False
    killed: bool = False
    full: bool = False  # its socket takes no more until it has read something

    @property
    def takes_work(self) -> bool:
        return not (self.retiring or self.killed or self.called_off or self.full)


_RELEASED = Report(Ending.RELEASED)
_CANCELLED = Report(Ending.CANCELLED)


class Pool:
    """The children and claimed jobs of one `[pools.NAME]`."""

    def __init__(self, *, size: int, kill_grace: float, prefetch: int | None = None) -> None:
        self.size = size
        self.kill_grace = kill_grace
        self.prefetch = prefetch
        self.pace = Pace()
        self.children: dict[int, Child] = {}
        self.starting = 0  # children asked for, not yet there
        self.waiting: deque[ClaimedJob] = deque()
        self.paused: frozenset[str] = frozenset()
        self.draining = False
        self.actions: list[Action] = []
        self._generation = 0  # what is older gets nothing any more
        self._progress_at = 0.0  # when a waiting job last found a child
        self._cancels: set[int] = set()

    # -- what the pool wants ------------------------------------------------------------------------------------

    def demand(self) -> int:
        """How many jobs to claim now; 0 while a claim would be too small to pay, or nothing could run them."""
        able = sum(1 for child in self.children.values() if child.takes_work)
        if self.draining or not able:
            return 0
        window = self.pace.window()
        limit = able * window + self.pace.ahead(able)
        if self.prefetch is not None:
            limit = min(limit, max(able, self.prefetch))
        free = limit - len(self.waiting) - self.assigned_count(able_only=True)
        if free <= 0:
            return 0
        starved = not self.waiting and any(
            child.takes_work and len(child.assigned) < window for child in self.children.values()
        )
        return min(free, MAX_CLAIM) if starved or free >= limit // 2 else 0

    def prompt_room(self, now: float) -> int:
        """How many jobs, one a child, would start at once or nearly so: behind no long one, nor behind each other."""
        prompt = sum(
            1
            for child in self.children.values()
            if child.takes_work and (not child.assigned or now - child.head_since < STALL_SECONDS)
        )
        return max(0, prompt - sum(1 for job in self.waiting if job.start_by is not None))

    def missing_children(self) -> int:
        """How many children to start."""
        return 0 if self.draining else max(0, self.size - len(self.children) - self.starting)

    def flush_delay(self) -> float:
        """How long an outcome may wait to be written with others (seconds)."""
        return self.pace.flush_delay(len(self.children)) if self.is_busy else 0.0

    def rest(self, key: int) -> float:
        """How long the child's reports may wait to be read (seconds): each look at them interrupts a job."""
        child = self.children.get(key)
        return 0.0 if child is None else self.pace.rest(len(child.assigned))

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting) or any(child.assigned for child in self.children.values())

    def assigned_count(self, *, able_only: bool = False) -> int:
        return sum(len(c.assigned) for c in self.children.values() if c.takes_work or not able_only)

    def held_jobs(self) -> list[ClaimedJob]:
        """Every job that is claimed and not ended."""
        return [*self.waiting, *(job for child in self.children.values() for job in child.assigned)]

    def running_lease(self, key: int) -> int:
        """The lease of the job that the child has been at, or is about to be at, as far as is known; 0 for none."""
        child = self.children.get(key)
        return child.assigned[0].lease if child and child.assigned else 0

    # -- jobs ---------------------------------------------------------------------------------------------------

    def claimed(self, jobs: Iterable[ClaimedJob], now: float) -> None:
        """Takes in newly claimed jobs and hands them out."""
        if not self.waiting:
            self._progress_at = now
        self.waiting.extend(jobs)
        self._sort_out_waiting()
        self.assign(now)

    def ended(self, key: int, leases: Sequence[int], now: float) -> list[ClaimedJob]:
        """Takes in the outcomes a child reported, in order; returns their jobs, and hands out the next ones.

        Raises ProtocolError when the child reports a job it was not running: kill it then.
        """
        child = self.children[key]
        if not leases:
            return []
        running = [job.lease for job in islice(child.assigned, len(leases))]
        if running != list(leases):  # nothing is taken in then: what it holds is settled when it is dead
            raise ProtocolError(f"child {key} reported the leases {list(leases)}, but was running {running}")
        jobs = [child.assigned.popleft() for _ in leases]
        self.pace.observe(len(jobs), now - child.head_since)
        if self._cancels:
            self._cancels.difference_update(job.id for job in jobs)
        child.called_off = child.told_at = None
        child.full = False
        self._start_clock(child, now)
        if child.assigned and child.assigned[0].id in self._cancels:  # had started when the cancel came
            self.actions.append(TakeBack(key))
        self.assign(now)
        return jobs

    def took_back(self, key: int, leases: Sequence[int], now: float) -> None:
        """Takes in what a child had not started. What it still has assigned, it is running."""
        child = self.children[key]
        returned = set(leases)
        back = [job for job in child.assigned if job.lease in returned]
        if back:
            child.assigned = deque(job for job in child.assigned if job.lease not in returned)
            if not self.waiting:
                self._progress_at = now
            self.waiting.extendleft(reversed(back))
            self._sort_out_waiting()
            if child.killed and child.called_off is SoftReason.SHUTDOWN:  # by kill_all: others may have these jobs soon
                self._release_waiting()
        running = child.assigned[0] if child.assigned else None
        if running is None:
            stuck = child.called_off is SoftReason.TIMEOUT or now - child.head_since >= UNREAD_SECONDS
            if back and stuck and not child.killed:
                self._kill(child)
            child.called_off = child.deadline = None
            child.full = False
            child.head_since = now
            self.assign(now)
            return
        child.read = True
        if child.called_off:
            if child.told_at is None and not child.killed:
                child.told_at, child.remind_at = now, now + REMIND_SECONDS
                self.actions.append(CallOff(key, running.lease, child.called_off))
        elif running.id in self._cancels and not child.killed:
            self._call_off(child, SoftReason.CANCEL, now)
        self.assign(now)

    def unsent(self, key: int, leases: Sequence[int], now: float) -> None:
        """Takes in that the child's socket had no room for these.

        An empty one always has: if it takes nothing, something broke it, and another child must be tried.
        """
        child = self.children[key]
        child.full = True
        if len(leases) == len(child.assigned):
            self.retire(key)
        self.took_back(key, leases, now)

    def cancel(self, job_id: int, now: float) -> bool:
        """Cancels the job if this pool holds it: at once where it has not started. Returns whether it does."""
        if any(job.id == job_id for job in self.waiting):
            self._cancels.add(job_id)
            self._sort_out_waiting()
            return True
        for child in self.children.values():
            if any(job.id == job_id for job in child.assigned):
                self._cancels.add(job_id)
                self.actions.append(TakeBack(child.key))
                return True
        return False

    def pause(self, queues: frozenset[str]) -> None:
        """Sets the paused queues; what has not started of them goes back to the database."""
        newly_paused = queues - self.paused
        self.paused = queues
        if newly_paused:
            self._take_back_all()
            self._sort_out_waiting()

    def assign(self, now: float) -> None:
        """Hands waiting jobs to the children that may take them, evenly."""
        if not self.waiting:
            return
        window = self.pace.window()
        able = [
            child
            for child in self.children.values()
            if child.takes_work and (not child.assigned or now - child.head_since < STALL_SECONDS)
        ]
        if not able:
            return
        able.sort(key=lambda child: len(child.assigned))
        load = len(self.waiting) + sum(len(child.assigned) for child in able)
        level = min(window, -(-load // len(able)))
        for child in able:
            room = min(level - len(child.assigned), len(self.waiting))
            if room <= 0:
                continue
            jobs = [self.waiting.popleft() for _ in range(room)]
            held = len(child.assigned)
            child.assigned.extend(jobs)
            if not held:
                self._start_clock(child, now)
            if held < 2:
                child.behind_since = now
            self._progress_at = now
            self.actions.append(Assign(child.key, jobs))

    # -- time ---------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Does what time alone brings about: deadlines, kills, stalls."""
        idle_since = self._idle_since()
        for child in self.children.values():
            if not child.assigned or child.killed:
                continue
            if child.called_off:
                if now >= child.kill_at:
                    self._kill(child)
                elif child.told_at is not None and now >= child.remind_at:
                    child.remind_at = now + (now - child.told_at)
                    self.actions.append(Remind(child.key))
                continue
            if child.deadline is not None and now >= child.deadline:
                self._call_off(child, SoftReason.TIMEOUT, now)
                continue
            if len(child.assigned) > 1 and now >= _take_back_at(child, idle_since):
                self.pace.at_least(now - child.head_since)
                self.actions.append(TakeBack(child.key))
            elif not child.read and now >= child.head_since + UNREAD_SECONDS:
                self.actions.append(TakeBack(child.key))
        if self.waiting and now - self._progress_at >= RELEASE_SECONDS:
            self.pace.at_least(now - self._progress_at)
            self._release_waiting()

    def next_tick(self) -> float | None:
        """When `tick` has something to do next, should nothing else happen; None for never."""
        times: list[float] = []
        idle_since = self._idle_since()
        for child in self.children.values():
            if not child.assigned or child.killed:
                continue
            if child.called_off:
                times.append(child.kill_at if child.told_at is None else min(child.kill_at, child.remind_at))
                continue
            if child.deadline is not None:
                times.append(child.deadline)
            if len(child.assigned) > 1:
                times.append(_take_back_at(child, idle_since))
            elif not child.read:
                times.append(child.head_since + UNREAD_SECONDS)
        if self.waiting:
            times.append(self._progress_at + RELEASE_SECONDS)
        return min(times) if times else None

    # -- children -----------------------------------------------------------------------------------------------

    def child_started(self, key: int, generation: int, now: float) -> None:
        self.starting -= 1
        self.children[key] = Child(key, generation, head_since=now)
        if self.draining or len(self.children) > self.size or generation < self._generation:
            self.retire(key)
        self.assign(now)

    def child_lost(self, key: int) -> None:
        """The child is dead, or as good as that: it gets nothing more. Its last outcomes and `child_died` follow."""
        self.children[key].killed = True
        self.actions.append(TakeBack(key))

    def child_died(self, key: int, now: float) -> list[tuple[ClaimedJob, SoftReason | None]]:
        """Removes a child, after its last outcomes were read and what it had not started was taken back.

        Returns the job it died under (at most one, unless it lied), with the reason it had been called off for.
        """
        child = self.children.pop(key)
        reason = child.called_off
        self._cancels.difference_update(job.id for job in child.assigned)
        self.assign(now)
        return [(job, reason) for job in child.assigned]

    def retire(self, key: int) -> None:
        """Lets a child finish its job and end; what it has not started goes to the others."""
        child = self.children[key]
        if not child.retiring:
            child.retiring = True
            if child.assigned:
                self.actions.append(TakeBack(key))
            self.actions.append(Retire(key))

    def retire_older_than(self, generation: int) -> None:
        """Lets the children of earlier generations end, those still to come included."""
        self._generation = generation
        for child in list(self.children.values()):
            if child.generation < generation:
                self.retire(child.key)

    def resize(self, size: int) -> None:
        """Changes the number of children; the idle ones go first."""
        self.size = size
        staying = [child for child in self.children.values() if not child.retiring]
        staying.sort(key=lambda child: len(child.assigned))
        for child in staying[: max(0, len(staying) - size)]:
            self.retire(child.key)

    def drain(self) -> None:
        """Starts nothing more: what has not started goes back, what runs may finish."""
        self.draining = True
        for child in list(self.children.values()):
            self.retire(child.key)
        self._release_waiting()

    def interrupt(self, now: float) -> None:
        """Calls off every running job for a shutdown."""
        for child in self.children.values():
            if child.assigned and not (child.called_off or child.killed):
                self._call_off(child, SoftReason.SHUTDOWN, now)

    def kill_all(self) -> None:
        """Kills every child and lets go of all jobs; those that ran count as called off for a shutdown."""
        for child in self.children.values():
            if not child.killed:
                child.called_off = child.called_off or SoftReason.SHUTDOWN
                self._kill(child)
        self._release_waiting()

    # -- helpers ------------------------------------------------------------------------------------------------

    def _start_clock(self, child: Child, now: float) -> None:
        child.head_since = now
        child.read = False
        head = child.assigned[0] if child.assigned else None
        child.deadline = None if head is None or head.timeout_seconds is None else now + head.timeout_seconds

    def _idle_since(self) -> float | None:
        """Since when a child that could take more has had nothing to do."""
        return min((c.head_since for c in self.children.values() if c.takes_work and not c.assigned), default=None)

    def _call_off(self, child: Child, reason: SoftReason, now: float) -> None:
        """Has `took_back` tell the child, once it is certain that it has started the job."""
        child.called_off = reason
        child.kill_at = now + self.kill_grace
        self.actions.append(TakeBack(child.key))

    def _kill(self, child: Child) -> None:
        child.killed = True
        self.actions.append(Kill(child.key))

    def _sort_out_waiting(self) -> None:
        """Lets go of waiting jobs that may not start: cancelled ones, those of a paused queue, all in a drain."""
        if not (self._cancels or self.paused or self.draining):
            return
        keep: deque[ClaimedJob] = deque()
        for job in self.waiting:
            if job.id in self._cancels:
                self._cancels.discard(job.id)
                self.actions.append(Settle(job, _CANCELLED))
            elif self.draining or job.queue in self.paused:
                self.actions.append(Settle(job, _RELEASED))
            else:
                keep.append(job)
        self.waiting = keep

    def _release_waiting(self) -> None:
        self.actions.extend(Settle(job, _RELEASED) for job in self.waiting)
        self.waiting.clear()

    def _take_back_all(self) -> None:
        self.actions.extend(TakeBack(child.key) for child in self.children.values() if child.assigned)


def _take_back_at(child: Child, idle_since: float | None) -> float:
    """When others are to have what stands behind the first job of `child`."""
    if idle_since is None:
        return child.head_since + STALL_SECONDS
    # Not as soon as one is idle: where jobs are short, a child is so for a moment now and then.
    return min(child.head_since, max(child.behind_since, idle_since)) + STEAL_SECONDS
