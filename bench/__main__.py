"""Runs the measurements one after the other, and prints and keeps what they found."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from bench import backlog, cron, crowd, drain, enqueue, following, idle, latency, memory, operating, waiting
from bench.figures import Figure, table, write_json
from bench.rig import BenchError, Rig
from bench.scale import FULL, QUICK, Scale
from roostd.embedded import EmbeddedError, EmbeddedPostgres

LIMIT_SECONDS = 1800  # for all of it; it takes about half on two cores
MEASUREMENTS: dict[str, Callable[[Rig, Scale], Iterable[Figure]]] = {
    "drain": drain.measure,
    "latency": latency.measure,
    "waiting": waiting.measure,
    "enqueue": enqueue.measure,
    "crowd": crowd.measure,
    "following": following.measure,
    "backlog": backlog.measure,
    "cron": cron.measure,
    "operating": operating.measure,
    "memory": memory.measure,
    "idle": idle.measure,
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Tiny numbers: shows that it runs, not how fast Roost is.")
@click.option("--only", multiple=True, type=click.Choice([*MEASUREMENTS]), help="One measurement; may be repeated.")
@click.option("--pg-version", type=int, help="Major version of PostgreSQL. Default: the best installed.")
@click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("bench/results/bench.json"),
    show_default=True,
    help="Where to keep the figures.",
)
def main(quick: bool, only: tuple[str, ...], pg_version: int | None, path: Path) -> None:
    """Measures Roost: the real daemon on a private PostgreSQL with default, durable settings."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(LIMIT_SECONDS)
    figures: list[Figure] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="roost-bench-") as directory,
            EmbeddedPostgres(Path(directory) / "postgres", version=pg_version) as server,
        ):
            rig = Rig(Path(directory), server)
            machine = rig.describe()
            for name in only or MEASUREMENTS:
                started_at = time.monotonic()
                for figure in MEASUREMENTS[name](rig, QUICK if quick else FULL):
                    figures.append(figure)
                print(f"{name}: {time.monotonic() - started_at:.0f} s", file=sys.stderr)
    except (BenchError, EmbeddedError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
    print(table(machine, figures))
    write_json(path, machine, figures)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that everything that was started is stopped on the way out.
    sys.exit(f"bench: ended by {signal.Signals(number).name}")


if __name__ == "__main__":
    main()
