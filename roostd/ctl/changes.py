"""cancel, retry, requeue: what an operator changes about jobs.

Jobs named by their ids are changed without a question, all of them even if some can't be. A change of all jobs that
match asks first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from roost_client import DuplicateUniqueJobError, JobNotFoundError, JobState, JobStateError, Roost
from roostd.ctl.command import EXIT_NOTHING, Failure, Invocation, command
from roostd.ctl.output import note, print_json, print_table

_ids = click.argument("job_ids", metavar="ID...", type=int, nargs=-1, required=True)


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
@click.option("--queue", help="Only this queue's.")
@click.option("--task", help="Only this task's.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--dry-run", is_flag=True, help="Only say how many there are.")
def requeue(
    invocation: Invocation, discarded: bool, queue: str | None, task: str | None, yes: bool, dry_run: bool
) -> int:
    """Let all discarded jobs start again at their first attempt."""
    if not discarded:
        raise click.UsageError("say which jobs: --discarded")
    with invocation.client() as roost:
        count = roost.count_discarded(queue, task)
        if not count:
            raise Failure("cannot requeue: no discarded job matches")
        if dry_run:
            _print_count(invocation, "would requeue", count)
            return 0
        if not yes and not _is_confirmed(f"Requeue {count} discarded jobs?"):
            raise Failure("nothing was changed; --yes requeues without a question")
        with Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        ) as progress:
            bar = progress.add_task("requeue", total=count)
            requeued = roost.requeue_discarded(queue, task, progress=lambda done: progress.update(bar, completed=done))
    _print_count(invocation, "requeued", requeued)
    return 0


COMMANDS = (cancel, retry, requeue)


def _change_each(invocation: Invocation, job_ids: tuple[int, ...], change: Callable[[Roost, int], str]) -> int:
    done: list[tuple[int, str]] = []
    with invocation.client() as roost:
        for job_id in job_ids:
            try:
                done.append((job_id, change(roost, job_id)))
            except (JobNotFoundError, JobStateError, DuplicateUniqueJobError) as error:
                note(str(error))
    if invocation.json:
        print_json([{"id": job_id, "outcome": outcome} for job_id, outcome in done])
    else:
        print_table(("ID", "OUTCOME"), done)
    return 0 if len(done) == len(job_ids) else EXIT_NOTHING


def _print_count(invocation: Invocation, outcome: str, count: int) -> None:
    if invocation.json:
        print_json({"outcome": outcome, "jobs": count})
    else:
        click.echo(f"{outcome} {count} job{'s' if count != 1 else ''}")


def _is_confirmed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # there is nobody to answer
        click.echo(err=True)
        return False
