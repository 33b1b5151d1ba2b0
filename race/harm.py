"""What becomes of the others when one job in twenty hangs, or takes its process down?

Worker processes that end are started again at once. Nobody helps one that hangs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from race.jobs import BAD_ONE_IN
from race.ledger import Event, Record
from race.rig import Place
from race.scale import Scale


def hang(place: Place, scale: Scale, _pace: float) -> dict[str, float]:
    """Where something other than a default is set for hangs alone, once with that and once without."""
    found = {f"hang_{key}": count for key, count in _run(place, scale, "hang").items()}
    if place.entrant.hang_setting:
        with place.rig.place(place.entrant) as other:
            found["hang_finished_unset"] = _run(other, scale, "hang", unset=True)["finished"]
    return found


def crash(place: Place, scale: Scale, _pace: float) -> dict[str, float]:
    return {f"crash_{key}": count for key, count in _run(place, scale, "crash").items()}


def _run(place: Place, scale: Scale, task: str, *, unset: bool = False) -> dict[str, float]:
    place.enqueue(task, scale.harm_jobs)
    good = scale.harm_jobs - scale.harm_jobs // BAD_ONE_IN
    with place.workers(scale.children, beside_harm=not unset) as workers:

        def check() -> None:
            workers.look_after()
            if len(place.ledger) >= 2 * good and outcome(place.ledger.read())["finished"] >= good:
                raise _AllFinished

        try:
            place.ledger.wait(1_000_000_000, scale.harm_seconds, check)
        except _AllFinished:
            pass
    found = outcome(place.ledger.read())
    return {"finished": 100 * found["finished"] / good, "cut": found["cut"], "twice": found["twice"]}


class _AllFinished(Exception):
    """Nothing is left to wait for."""


def outcome(records: Sequence[Record]) -> dict[str, int]:
    """Of the jobs that do no harm: how many finished, how many began only, and how many began more than once."""
    begun = Counter(record.number for record in records if record.event is Event.BEGAN and _harmless(record))
    done = {record.number for record in records if record.event is Event.DONE and _harmless(record)}
    return {
        "finished": len(done),
        "cut": len(begun.keys() - done),
        "twice": sum(count > 1 for count in begun.values()),
    }


def _harmless(record: Record) -> bool:
    return record.number % BAD_ONE_IN != 0
