"""enqueue: one job, by hand."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal

import click

from roostd.ctl import completion
from roostd.ctl.command import Invocation, command
from roostd.ctl.output import print_json


def _read_args(context: click.Context, parameter: click.Parameter, text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{error}; pass a JSON object, such as '{{\"order\": 1}}'") from None


def _read_time(context: click.Context, parameter: click.Parameter, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise click.BadParameter(f"{error}; pass an ISO 8601 time, such as 2030-01-31T09:00:00Z") from None
    if time.tzinfo is None:
        raise click.BadParameter(f"{text} has no time zone; add it, as in {time.isoformat()}Z")
    return time


@command("enqueue")
@click.argument("task", shell_complete=completion.tasks)
@click.option("--args", metavar="JSON", callback=_read_args, help="The arguments, a JSON object.")
@click.option("--queue", default="default", show_default=True, shell_complete=completion.queues)
@click.option("--priority", type=int, default=0, show_default=True, help="The lower runs first.")
@click.option("--max-attempts", type=int, default=20, show_default=True)
@click.option("--at", metavar="TIME", callback=_read_time, help="When it is due, in ISO 8601 (default: now).")
@click.option("--timeout", metavar="SECONDS", type=int, help="How long it may run (default: as long as it takes).")
@click.option("--tag", "tags", multiple=True, help="May be given more than once.")
@click.option("--unique-key", metavar="KEY", help="Of one job at a time that has not ended.")
@click.option(
    "--on-duplicate",
    type=click.Choice(["raise", "return", "replace"]),
    default="raise",
    show_default=True,
    help="Where a job has the key: fail, print that job's id, or give it these arguments and this time.",
)
@click.option("--depends-on", metavar="ID", type=int, multiple=True, help="Runs after it; may be given more than once.")
def enqueue(
    invocation: Invocation,
    task: str,
    args: Any,
    queue: str,
    priority: int,
    max_attempts: int,
    at: datetime | None,
    timeout: int | None,
    tags: tuple[str, ...],
    unique_key: str | None,
    on_duplicate: Literal["raise", "return", "replace"],
    depends_on: tuple[int, ...],
) -> None:
    """Enqueue a job and print its id.

    The handlers are not at hand here, so what @job declares for the task does not apply.
    """
    with invocation.client() as roost:
        job_id = roost.enqueue(
            task,
            args=args,
            queue=queue,
            priority=priority,
            max_attempts=max_attempts,
            scheduled_at=at,
            timeout_seconds=timeout,
            tags=list(tags),
            unique_key=unique_key,
            on_duplicate=on_duplicate,
            depends_on=list(depends_on),
        )
    if invocation.json:
        print_json({"id": job_id})
    else:
        click.echo(job_id)


COMMANDS = (enqueue,)
