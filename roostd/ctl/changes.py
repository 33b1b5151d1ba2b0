"""cancel, retry, requeue: what an operator changes about jobs.

Jobs named by their ids are changed without a question, all of them even if some can't be. A change of all jobs that
match asks first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from roost_client import DuplicateUniqueJobError, JobNotFoundError, JobState, JobStateError, RequeuedCount, Roost
from roost_client.client import execute
from roost_client.fields import INT8_MAX
from roost_client.statements import JobFilter, first_discarded
from roostd.ctl.command import EXIT_NOTHING, Failure, Invocation, command, confirm
from roostd.ctl.filters import JOB_ID, filter_options
from roostd.ctl.output import note, print_json, print_table

_ids = click.argument("job_ids", metavar="ID...", type=JOB_ID, nargs=-1, required=True)


@command("cancel")
@_ids
def cancel(invocation: Invocation, job_ids: tuple[int, ...]) -> int:
    """Cancel waiting jobs at once, and ask running ones to stop."""

    def change(roost: Roost, job_id: int) -> str:
        state = roost.cancel(job_id)
        if state in (JobState.COMPLETED, JobState.DISCARDED):
            raise JobStateError(f"cannot cancel job {job_id}: it is {state} already", state)
        return "cancelled" if state is JobState.CANCELLED else "cancel requested"

    return _change_each(invocation, job_ids, change)


@command("retry")
@_ids
@click.option("--with-dependents", is_flag=True, help="Also the jobs that were cancelled for their sake.")
def retry(invocation: Invocation, job_ids: tuple[int, ...], with_dependents: bool) -> int:
    """Make waiting, discarded or cancelled jobs due now; finished ones start at their first attempt."""

    def change(roost: Roost, job_id: int) -> str:
        return f"available, was {roost.retry(job_id, with_dependents=with_dependents)}"

    return _change_each(invocation, job_ids, change)


@command("requeue")
@click.option("--discarded", is_flag=True, help="Those that are discarded; there are no others yet, but say so.")
@filter_options
@click.option("--limit", type=click.IntRange(1, INT8_MAX), help="How many at most, the oldest first.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--dry-run", is_flag=True, help="Only say how many there are, and some of their ids.")
def requeue(
    invocation: Invocation, discarded: bool, limit: int | None, yes: bool, dry_run: bool, **filters: Any
) -> int:
    """Let all discarded jobs start again at their first attempt.

    In batches, so that no lock is held for long. Interrupted, it has done what it did; started again, it goes on. A job
    is skipped whose unique key an active one has, that depends on a dead one, or that another transaction holds.
    """
    if not discarded:
        raise click.UsageError("say which jobs: --discarded")
    with invocation.client() as roost:
        count = roost.count_discarded(**filters)
        if not count:
            raise Failure("cannot requeue: no discarded job matches")
        count = min(count, limit or count)
        if dry_run:
            with invocation.connect() as conn:
                sample = execute(conn, first_discarded(JobFilter(**filters), min(count, 10)))
            _print_dry_run(invocation, count, sample)
            return 0
        if not yes:
            confirm(f"Requeue {count} discarded jobs?", f"requeue {count} discarded jobs")
        done = RequeuedCount(0)
        with Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        ) as progress:
            bar = progress.add_task("requeue", total=count)

            def show(so_far: RequeuedCount) -> None:
                nonlocal done
                done = so_far
                progress.update(bar, completed=so_far + so_far.skipped)

            try:
                done = roost.requeue_discarded(limit=limit, progress=show, **filters)
            except KeyboardInterrupt:
                note(f"at least {_jobs(done)} were requeued before")  # and those of the batch, if that came through
                raise
    _print_requeued(invocation, done)
    return 0 if done else EXIT_NOTHING


COMMANDS = (cancel, retry, requeue)


def _change_each(invocation: Invocation, job_ids: tuple[int, ...], change: Callable[[Roost, int], str]) -> int:
    done: list[tuple[int, str]] = []
    try:
        with invocation.client() as roost:
            for job_id in job_ids:
                try:
                    done.append((job_id, change(roost, job_id)))
                except (JobNotFoundError, JobStateError, DuplicateUniqueJobError) as error:
                    note(str(error))
    except BaseException:  # interrupted, or without the database any more: what was done is done
        if done:
            _print_done(invocation, done)
        raise
    _print_done(invocation, done)
    return 0 if len(done) == len(job_ids) else EXIT_NOTHING


def _print_done(invocation: Invocation, done: list[tuple[int, str]]) -> None:
    if invocation.json:
        print_json([{"id": job_id, "outcome": outcome} for job_id, outcome in done])
    else:
        print_table(("ID", "OUTCOME"), done)


def _print_dry_run(invocation: Invocation, count: int, sample: list[int]) -> None:
    if invocation.json:
        print_json({"outcome": "would requeue", "jobs": count, "sample": sample})
    else:
        click.echo(f"would requeue {_jobs(count)}, such as {', '.join(map(str, sample))}")


def _print_requeued(invocation: Invocation, done: RequeuedCount) -> None:
    skipped = {name: getattr(done, name) for name in _SKIPPED}
    if invocation.json:
        print_json({"outcome": "requeued", "jobs": int(done), "skipped": skipped})
        return
    click.echo(f"requeued {_jobs(done)}")
    for name, reason in _SKIPPED.items():
        if skipped[name]:
            click.echo(f"skipped {_jobs(skipped[name])}: {reason}")


_SKIPPED = {
    "duplicates": "an active job has their unique key",
    "dead_parents": "a job that they depend on was discarded or cancelled",
    "held": "another transaction holds them or has changed them",
}


def _jobs(count: int) -> str:
    return f"{int(count)} job{'s' if count != 1 else ''}"
