"""How fast is a full queue drained by fresh workers: of jobs that do nothing, and of jobs of 1 ms of CPU?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from race.ledger import Event, Record
from race.rig import START_SECONDS, Place, RaceError, connect, value
from race.scale import Scale

STALL_SECONDS = 10.0
RECORDED_SECONDS = 60.0  # after the last job has run


def noops(place: Place, scale: Scale, pace: float) -> dict[str, float]:
    jobs = fitting(scale.drain_jobs, scale, pace)
    place.enqueue("noop", jobs)
    return {"noops": drain(place, scale, jobs, scale.drain_seconds)}


def burns(place: Place, scale: Scale, pace: float) -> dict[str, float]:
    jobs = fitting(scale.burn_jobs, scale, pace)
    place.enqueue("burn", jobs)
    return {"burns": drain(place, scale, jobs, scale.drain_seconds)}


def fitting(jobs: int, scale: Scale, pace: float) -> int:
    """As many jobs as a competitor of that pace drains in the time there is, and no more than `jobs`."""
    return max(scale.least_jobs, min(jobs, int(pace * scale.drain_seconds)))


def drain(place: Place, scale: Scale, jobs: int, seconds: float, *, all_there_are: bool = True) -> float:
    """Jobs a second of fresh workers on a queue that holds `jobs` or more, looked at for about `seconds`.

    Where these are all there are, the clock stops when they are recorded as done too: some run ahead of that.
    """
    place.settle_down()
    with place.workers(scale.children) as workers:
        if not place.ledger.wait(1, START_SECONDS, workers.look_after):
            raise RaceError(f"no job ran within {START_SECONDS:g} s")
        all_ran = place.ledger.wait(jobs, max(seconds, STALL_SECONDS), workers.look_after)
        recorded_at = _wait_recorded(place) if all_ran and all_there_are else None
    return rate(place.ledger.read(), scale.children, jobs, recorded_at)


def _wait_recorded(place: Place) -> int | None:
    """When the last job was recorded as done, in ns; None where the store is not asked."""
    if not place.entrant.unfinished:
        return None
    deadline = time.monotonic() + RECORDED_SECONDS
    with connect(place.dsn) as conn:
        while value(conn, place.entrant.unfinished):
            if time.monotonic() > deadline:
                raise RaceError(f"all jobs ran, but {RECORDED_SECONDS:g} s later not all are recorded as done")
            time.sleep(0.02)
    return time.monotonic_ns()


def rate(records: Sequence[Record], children: int, jobs: int, recorded_at: int | None = None) -> float:
    """Jobs a second from when all children are at work to the job that makes `jobs`, or the last, or `recorded_at`.

    Workers start one after the other. What is done before the last of them is there would count the start of the
    interpreter as work; unless one of them had most of the jobs by then.
    """
    done = sorted((record for record in records if record.event is Event.DONE), key=lambda record: record.at)[:jobs]
    if len(done) < 2:
        raise RaceError(f"only {len(done)} jobs were done")
    first, seen = 0, set[int]()
    for index, record in enumerate(done):
        seen.add(record.pid)
        if len(seen) == children:
            first = index
            break
    if first > len(done) // 2:
        first = 0
    return (len(done) - 1 - first) / (((recorded_at or done[-1].at) - done[first].at) / 1e9)
