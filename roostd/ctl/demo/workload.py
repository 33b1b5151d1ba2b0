"""Files of this machine's Python library, hashed, compressed and counted: shown while it goes on.

Bounded by a number of files and by time, so that a slow machine does fewer and not longer.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from roost_client import JobInsert
from roostd.ctl.demo.checks import ENDED, Scene, require

TASKS = ("hash_file", "compress_file", "count_words")
MAX_FILES = 4000
MAX_SECONDS = 8.0  # after these no more files are taken
PATIENCE_SECONDS = 15.0  # how long the last jobs may take then
_FILES_AT_ONCE = 200
_POLL_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Work:
    """What was done."""

    files: int
    jobs: int
    seconds: float
    bytes: int
    compressed_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.files:,} files hashed, compressed ({self.bytes / 1e6:.1f} to {self.compressed_bytes / 1e6:.1f} MB)"
            f" and counted: {self.jobs:,} jobs in {self.seconds:.1f} s, {self.jobs / self.seconds:,.0f} a second"
        )


def run_workload(scene: Scene, stream: TextIO) -> Work:
    """Enqueue a job for each file and task, and wait for all of them. Raises CheckFailed."""
    started_at = time.monotonic()
    files = islice(_library_files(), MAX_FILES)
    taken = done = 0
    more = True
    with _display(stream) as show:
        while more or done < taken * len(TASKS):
            seconds = time.monotonic() - started_at
            # Enough is kept waiting that no child is idle.
            if more and taken * len(TASKS) - done < _FILES_AT_ONCE * len(TASKS):
                batch = list(islice(files, _FILES_AT_ONCE)) if seconds < MAX_SECONDS else []
                more = bool(batch)
                taken += len(batch)
                scene.enqueued += scene.roost.enqueue_many(
                    JobInsert(task, {"path": str(file)}, queue="files") for task in TASKS for file in batch
                )
            counts = _counts(scene)
            done = sum(counts.values())
            show(taken, counts)
            require(scene.is_running(), "roostd ended")
            require(seconds < MAX_SECONDS + PATIENCE_SECONDS, f"{taken * len(TASKS) - done} jobs are not done in time")
            time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - started_at
    [(bytes, compressed_bytes, unsuccessful)] = scene.rows(
        "SELECT coalesce(sum((result -> 'bytes')::bigint) FILTER (WHERE task = 'compress_file'), 0)::bigint,"
        " coalesce(sum((result -> 'compressed_bytes')::bigint) FILTER (WHERE task = 'compress_file'), 0)::bigint,"
        " count(*) FILTER (WHERE state <> 'completed') FROM roost.jobs WHERE queue = 'files'"
    )
    require(unsuccessful == 0, f"{unsuccessful} jobs did not complete")
    return Work(taken, done, seconds, bytes, compressed_bytes)


def _library_files() -> Iterator[Path]:
    """Modules of the standard library, then those of the packages that are installed beside it."""
    standard, installed = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    for root in (standard, installed):
        for path in sorted(root.rglob("*.py")):
            packaged = {"site-packages", "dist-packages"} & set(path.relative_to(root).parts)
            if not packaged and path.is_file():
                yield path


def _counts(scene: Scene) -> dict[str, int]:
    """How many jobs of each task have ended."""
    rows = scene.rows(
        "SELECT task, count(*) FROM roost.jobs WHERE queue = 'files' AND state = ANY (%s) GROUP BY task", [*ENDED]
    )
    return dict.fromkeys(TASKS, 0) | dict(rows)


@contextmanager
def _display(stream: TextIO) -> Iterator[Callable[[int, dict[str, int]], None]]:
    """A bar for each task on a terminal, a line a second off it."""
    if not stream.isatty():
        shown_at = time.monotonic()

        def tell(files: int, counts: dict[str, int]) -> None:
            nonlocal shown_at
            if time.monotonic() >= shown_at + 1:
                shown_at = time.monotonic()
                click.echo(f"  {sum(counts.values()):,} of {files * len(TASKS):,} jobs done", file=stream)

        yield tell
        return
    columns = (TextColumn("  {task.description:<14}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as progress:
        bars = {task: progress.add_task(task, total=None) for task in TASKS}

        def draw(files: int, counts: dict[str, int]) -> None:
            for task, bar in bars.items():
                progress.update(bar, total=files, completed=counts[task])

        yield draw
