"""jobs, show: many jobs in a line each, and one with all there is to know of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from roost_client import Job, JobState
from roost_client.fields import INT4_MAX
from roostd.ctl.command import EXIT_NOTHING, Invocation, command
from roostd.ctl.filters import JOB_ID, filter_options
from roostd.ctl.output import compact_json, note, print_json, print_table, printable, shorten, time_text


@command("jobs")
@filter_options
@click.option(
    "--state",
    "states",
    type=click.Choice([state.value for state in JobState]),
    multiple=True,
    help="Only those in this state; may be given more than once.",
)
@click.option("--archived", is_flag=True, help="Those in the archive, which are left out otherwise.")
@click.option("--before", metavar="ID", type=JOB_ID, help="Only those with a lower id: the page after.")
@click.option("--limit", type=click.IntRange(1, INT4_MAX), default=50, show_default=True, help="How many.")
def jobs(
    invocation: Invocation, states: tuple[str, ...], archived: bool, before: int | None, limit: int, **filters: Any
) -> int:
    """List jobs, newest first.

    Ages are of the enqueue, by the database's clock. A filter to which no index leads, such as a tag that nobody has,
    has all jobs read; --newer-than bounds that.
    """
    with invocation.client() as roost:
        found = roost.list_jobs(state=states or None, archived=archived, before_id=before, limit=limit, **filters)
    if invocation.json:
        print_json(found)
    elif found:
        print_table(
            ("ID", "STATE", "QUEUE", "TASK", "ATTEMPT", "SCHEDULED", "ERROR"),
            [
                (job.id, job.state, job.queue, job.task, _attempt(job), job.scheduled_at, shorten(_last_error(job)))
                for job in found
            ],
        )
    if not found:
        note("no job matches")
        return EXIT_NOTHING
    if len(found) == limit:
        note(f"there may be more: add --before {found[-1].id}")
    return 0


@command("show")
@click.argument("job_id", metavar="ID", type=JOB_ID)
def show(invocation: Invocation, job_id: int) -> None:
    """Show a job: its arguments, its result, its errors with their tracebacks."""
    with invocation.client() as roost:
        job = roost.get_job(job_id)
    if invocation.json:
        print_json(job)
        return
    fields = [(name, text) for name, text in _fields(job) if text]
    width = max(len(name) for name, _ in fields)
    for name, text in fields:
        click.echo(f"{_label(name.ljust(width))}  {printable(text)}")
    for error in job.errors:
        attempt, at, text = (error.get(key, "") for key in ("attempt", "at", "error"))
        click.echo(f"\n{_label(f'attempt {attempt}')} at {printable(str(at))}: {printable(str(text))}")
        for line in str(error.get("trace") or "").splitlines():
            click.echo(f"    {printable(line)}".rstrip())


COMMANDS = (jobs, show)


def _fields(job: Job) -> Iterator[tuple[str, str]]:
    yield "id", str(job.id)
    yield "task", job.task
    yield "queue", job.queue
    yield "state", job.state
    yield "attempt", _attempt(job)
    yield "priority", str(job.priority)
    yield "timeout", f"{job.timeout_seconds} s" if job.timeout_seconds else ""
    yield "tags", ", ".join(job.tags)
    yield "cancel requested", "yes" if job.cancel_requested else ""
    for name in ("inserted", "scheduled", "attempted", "completed", "cancelled", "discarded"):
        at = getattr(job, f"{name}_at")
        yield name, time_text(at) if at else ""
    yield "metadata", compact_json(job.metadata) if job.metadata else ""
    yield "args", compact_json(job.args)
    yield "result", compact_json(job.result) if job.state is JobState.COMPLETED else ""


def _attempt(job: Job) -> str:
    return f"{job.attempt}/{job.max_attempts}"


def _last_error(job: Job) -> str:
    return str(job.errors[-1].get("error") or "") if job.errors else ""


def _label(text: str) -> str:
    return click.style(text, bold=True) if sys.stdout.isatty() else text
