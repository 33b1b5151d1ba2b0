"""How much more do eight clients enqueue than one, each job in a transaction of its own, while nobody runs the jobs?

Each client is a process with a connection of its own. When the last is connected the first enqueues alone, then all do.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from race.ledger import Event, Record
from race.rig import Place, RaceError
from race.scale import Scale

CLIENTS = 8
CROWD_SECONDS = 60.0  # for all of them to start, too
ROOM = 1_000_000  # of numbers that a client may use


def measure(place: Place, scale: Scale, _pace: float) -> dict[str, float]:
    place.ledger.clear()
    started = [
        place.start_client("crowd", "noop", 1 + ROOM * index, CLIENTS, index, scale.crowd_seconds)
        for index in range(CLIENTS)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=CROWD_SECONDS + 2 * scale.crowd_seconds)
            if process.returncode != 0:
                raise RaceError(f"{place.entrant.name}: crowd failed: {errors[-2000:]}")
    except subprocess.TimeoutExpired:
        raise RaceError(f"{place.entrant.name}: {CLIENTS} clients at once took too long") from None
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    records = place.ledger.read()
    one, eight = (rate(records, event, scale.crowd_seconds) for event in (Event.BEGAN, Event.DONE))
    return {"crowd_rate": eight, "crowd_ratio": eight / one}


def rate(records: Sequence[Record], event: Event, seconds: float) -> float:
    """Jobs a second that were safe within so many seconds of the first."""
    done = sorted(record.at for record in records if record.event is event)
    if len(done) < 2:
        raise RaceError(f"only {len(done)} jobs were enqueued")
    return sum(at < done[0] + seconds * 1e9 for at in done) / seconds
