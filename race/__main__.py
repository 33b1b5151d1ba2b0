"""Runs the race: measure by measure, round by round, competitor by competitor, and keeps what was found."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click
import psycopg

from race import backlog, crowd, drain, enqueue, harm, horizon, latency, memory
from race.figures import said, table, text
from race.rig import Entrant, Place, RaceError, Rig, names, redis_server
from race.scale import FULL, QUICK, Scale
from roostd.embedded import EmbeddedError, EmbeddedPostgres

Measure = Callable[[Place, Scale, float], dict[str, float]]
MEASURES: dict[str, Measure] = {
    "noops": drain.noops,
    "burns": drain.burns,
    "latency": latency.measure,
    "enqueue": enqueue.measure,
    "crowd": crowd.measure,
    "memory": memory.measure,
    "hang": harm.hang,
    "crash": harm.crash,
    "backlog": backlog.measure,
    "horizon": horizon.measure,
}
ONCE = {"memory", "hang", "crash", "backlog", "horizon"}  # counts, sizes, and what has rounds of its own
POSTGRESQL_ONLY = {"crowd", "backlog", "horizon"}
LONG = {"horizon"}  # minutes for each competitor: only when asked for
LIMIT_SECONDS = 5400  # for all but those. What was found by then is kept
LONG_LIMIT_SECONDS = 3 * 5400
# What a sample takes on two cores with nothing else to do, with --quick and in full.
SECONDS = {
    "warm-up": (0, 4),
    "noops": (2.5, 6),
    "burns": (3, 6),
    "latency": (3.5, 8),
    "enqueue": (1, 5),
    "crowd": (3, 10),
    "memory": (4, 9),
    "hang": (4, 33),
    "crash": (4, 22),
    "backlog": (6, 60),
    "horizon": (11, 370),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Tiny numbers: shows that it runs, not how fast anything is.")
@click.option("--only", multiple=True, type=click.Choice(names()), help="One competitor; may be repeated.")
@click.option("--measure", multiple=True, type=click.Choice([*MEASURES]), help="One measure; may be repeated.")
@click.option("--full", is_flag=True, help="The pinned horizon too, ten minutes more for each on PostgreSQL.")
@click.option("--rounds", type=click.IntRange(1), help="How often each is measured.  [default: 5, with --quick 1]")
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to keep results; other figures there stay.  [default: race/results/race.json, with --quick quick.json]",
)
def main(
    quick: bool, only: tuple[str, ...], measure: tuple[str, ...], full: bool, rounds: int | None, path: Path | None
) -> None:
    """Sends the same work through Roost and its peers, each tuned as its own documentation says."""
    signal.signal(signal.SIGTERM, _stop)
    scale = QUICK if quick else FULL
    if rounds:
        scale = replace(scale, rounds=rounds)
    chosen = [name for name in MEASURES if (name in measure if measure else full or quick or name not in LONG)]
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LONG_LIMIT_SECONDS if LONG & set(chosen) else LIMIT_SECONDS)
    path = path or Path("race/results") / ("quick.json" if quick else "race.json")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="roost-race-") as directory,
            EmbeddedPostgres(Path(directory) / "postgres") as server,
            redis_server(Path(directory)) as redis,
        ):
            rig = Rig(Path(directory), server, redis)
            try:
                before = json.loads(path.read_text()) if path.exists() else None
                for results in _run(rig, scale, only or tuple(names()), chosen):
                    _keep(path, joined(before, results) if before else results)
            finally:
                rig.close()
    except (RaceError, EmbeddedError) as error:
        sys.exit(f"race: {error}")
    except KeyboardInterrupt as reason:
        if path.exists():
            _print(json.loads(path.read_text()))
        sys.exit(f"race: {str(reason) or 'interrupted'}; what was found by then is in {path}")
    _print(json.loads(path.read_text()))


def _run(rig: Rig, scale: Scale, competitors: tuple[str, ...], chosen: list[str]) -> Iterator[dict[str, Any]]:
    """Yields all that was found so far, after each sample."""
    entrants: dict[str, Entrant] = {}
    skipped: dict[str, str] = {}
    for name in competitors:
        match rig.enter(name):
            case Entrant() as entrant:
                entrants[name] = entrant
            case reason:
                skipped[name] = reason
                print(f"{name}: skipped: {reason}", file=sys.stderr)
    race = _Race(rig, scale, entrants)
    minutes = estimate(entrants, chosen, scale.rounds, quick=scale.quick) / 60
    print(f"race: {len(entrants)} competitors, about {minutes:.0f} min; Ctrl-C keeps what was found", file=sys.stderr)
    machine = rig.describe()
    for name in list(entrants):
        race.warm_up(name)
    for measure in chosen:
        for number in range(_rounds(measure, scale.rounds)):
            for name in entrants:
                race.sample(measure, name, number)
                yield {
                    "machine": machine | {"load at end": f"{os.getloadavg()[0]:.1f}"},
                    "scale": asdict(scale),
                    "measures": chosen,
                    "entrants": {name: asdict(entrant) for name, entrant in entrants.items()},
                    "skipped": skipped,
                    "samples": race.samples,
                    "problems": race.problems,
                }


def _rounds(measure: str, rounds: int) -> int:
    return 1 if measure in ONCE else rounds


def _takes_part(measure: str, entrant: Entrant) -> bool:
    return measure not in POSTGRESQL_ONLY or entrant.store == "PostgreSQL"


def estimate(entrants: Mapping[str, Entrant], chosen: Sequence[str], rounds: int, *, quick: bool) -> float:
    """The seconds that it takes, more or less."""
    column = 0 if quick else 1
    samples = sum(
        SECONDS[measure][column]
        * _rounds(measure, rounds)
        * sum(_takes_part(measure, one) for one in entrants.values())
        for measure in chosen
    )
    return samples + SECONDS["warm-up"][column] * len(entrants)


def _keep(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


class _Race:
    def __init__(self, rig: Rig, scale: Scale, entrants: dict[str, Entrant]) -> None:
        self._rig = rig
        self._scale = scale
        self._entrants = entrants
        self._paces: dict[str, float] = {}
        self.samples: dict[str, dict[str, list[float]]] = {name: {} for name in entrants}
        self.problems: dict[str, dict[str, str]] = {name: {} for name in entrants}

    def warm_up(self, name: str) -> None:
        """A drain that isn't counted: compiles what there is to compile, and tells how many jobs fill the time."""
        if self._scale.quick:
            self._paces[name] = self._scale.least_jobs / self._scale.drain_seconds
            return
        try:
            with self._rig.place(self._entrants[name]) as place:
                place.enqueue("noop", self._scale.least_jobs)
                jobs, seconds = self._scale.least_jobs, self._scale.drain_seconds
                pace = drain.drain(place, self._scale, jobs, seconds, all_there_are=False)
        except (RaceError, psycopg.Error) as error:
            self._note(name, "warm-up", error)
            return
        self._paces[name] = pace
        print(f"{name}: about {pace:,.0f} jobs/s", file=sys.stderr)

    def sample(self, measure: str, name: str, number: int) -> None:
        entrant = self._entrants[name]
        if name not in self._paces or not _takes_part(measure, entrant):
            return
        started_at = time.monotonic()
        try:
            with self._rig.place(entrant) as place:
                found = MEASURES[measure](place, self._scale, self._paces[name])
        except (RaceError, psycopg.Error) as error:
            self._note(name, measure, error)
            return
        # A start-up that takes long makes the warm-up's figure too low.
        self._paces[name] = max(self._paces[name], found.get("noops", 0))
        for key, value in found.items():
            self.samples[name].setdefault(key, []).append(value)
        words = " ".join(f"{key} {value:,.1f}" for key, value in found.items())
        print(f"{measure} {number + 1} {name}: {words} ({time.monotonic() - started_at:.0f} s)", file=sys.stderr)

    def _note(self, name: str, measure: str, error: Exception) -> None:
        self.problems[name][measure] = str(error).splitlines()[0]
        print(f"{measure} {name}: FAILED: {error}", file=sys.stderr)


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new results, with what the old ones have of other competitors and other figures."""
    merged = old | new
    merged["machine"] = new["machine"] | {
        key: ", then ".join(dict.fromkeys([old["machine"][key], new["machine"][key]]))
        for key in ("commit", "load at start", "load at end")
    }
    for key in ("entrants", "skipped"):
        merged[key] = old[key] | new[key]
    merged["samples"] = {
        name: old["samples"].get(name, {}) | new["samples"].get(name, {}) for name in merged["entrants"]
    }
    merged["problems"] = {}
    for name in merged["entrants"]:
        solved = {"warm-up", *new["measures"]} if name in new["entrants"] else ()
        kept = {measure: why for measure, why in old["problems"].get(name, {}).items() if measure not in solved}
        merged["problems"][name] = kept | new["problems"].get(name, {})
    for name in new["entrants"]:
        merged["skipped"].pop(name, None)
    return merged


def _print(results: dict[str, Any]) -> None:
    for key, value in results["machine"].items():
        print(f"{key}: {value}")
    labels = {name: entrant["label"] for name, entrant in results["entrants"].items()}
    print()
    print(text(table(labels, results["samples"])))
    for line in said(results["samples"]):
        print(line)
    for name, reason in results["skipped"].items():
        print(f"{name}: skipped: {reason}")
    for name, found in results["problems"].items():
        for measure, reason in found.items():
            print(f"{labels[name]}: {measure}: {reason}")


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that everything that was started is stopped on the way out.
    raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
