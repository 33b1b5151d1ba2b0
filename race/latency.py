"""How long from the enqueue call to the handler's first line, with workers that have nothing else to do?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.figures import percentile
from race.ledger import Event, Record
from race.rig import START_SECONDS, Place, RaceError, Workers
from race.scale import Scale

WARM_UP_JOBS = 20
WAIT_SECONDS = 20.0


def measure(place: Place, scale: Scale, _pace: float) -> dict[str, float]:
    with place.workers(scale.children) as workers:
        warm_up(place, workers, scale)
        waits = pickup(place, scale)
    return {f"pickup_{percent}": percentile(waits, percent) for percent in (50, 95, 99)}


def warm_up(place: Place, workers: Workers, scale: Scale, children: int = 0) -> None:
    """Returns when every child has run something, or one at least and the others had time to; clears the ledger."""
    children = children or scale.children
    since, asked = time.monotonic(), 0
    while True:
        place.enqueue("noop", WARM_UP_JOBS, first=1 + asked)
        asked += WARM_UP_JOBS
        if not place.ledger.wait(asked, START_SECONDS, workers.look_after):
            raise RaceError(f"only {len(place.ledger)} of {asked} jobs ran within {START_SECONDS:g} s")
        if len({record.pid for record in place.ledger.read()}) >= children:
            break
        if time.monotonic() > since + scale.all_there_seconds:
            break
    place.ledger.clear()


def pickup(place: Place, scale: Scale) -> list[float]:
    """The waits of jobs that are enqueued one by one, in ms, in order of size."""
    place.ask("drip", "noop", 1, scale.latency_jobs, scale.latency_interval_seconds)
    if not place.ledger.wait(2 * scale.latency_jobs, WAIT_SECONDS):
        raise RaceError(f"only {len(place.ledger) - scale.latency_jobs} of {scale.latency_jobs} jobs ran")
    return waits(place.ledger.read())


def waits(records: Sequence[Record]) -> list[float]:
    calls = {record.number: record.at for record in records if record.event is Event.CALLED}
    starts: dict[int, int] = {}
    for record in records:
        if record.event is not Event.CALLED:
            starts.setdefault(record.number, record.at)
    return sorted((starts[number] - called_at) / 1e6 for number, called_at in calls.items())
