"""How fast is a full queue drained by fresh workers: of jobs that do nothing, and of jobs of 1 ms of CPU?"""

from __future__ import annotations

from collections.abc import Sequence

from race.ledger import Event, Record
from race.rig import START_SECONDS, Place, RaceError
from race.scale import Scale

STALL_SECONDS = 10.0


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


def drain(place: Place, scale: Scale, jobs: int, seconds: float) -> float:
    """Jobs a second of fresh workers on a queue that holds at least `jobs`, looked at for about `seconds`."""
    place.settle_down()
    with place.workers(scale.children) as workers:
        if not place.ledger.wait(1, START_SECONDS, workers.look_after):
            raise RaceError(f"no job ran within {START_SECONDS:g} s")
        place.ledger.wait(jobs, max(seconds, STALL_SECONDS), workers.look_after)
    return rate(place.ledger.read(), scale.children, jobs)


def rate(records: Sequence[Record], children: int, jobs: int) -> float:
    """Jobs a second from when all children are at work to the job that makes `jobs`, or the last.

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
    return (len(done) - 1 - first) / ((done[-1].at - done[first].at) / 1e9)
