"""explain: why a job isn't running."""

from __future__ import annotations

import click

from roostd.ctl.command import EXIT_NOTHING, Invocation, command
from roostd.ctl.output import print_json, printable


@command("explain")
@click.argument("job_id", metavar="ID", type=int)
def explain(invocation: Invocation, job_id: int) -> int:
    """Say why a job isn't running, and which command helps."""
    stale_after = invocation.settings().worker.orphan_stale_after
    with invocation.client() as roost:
        found = roost.explain(job_id, stale_after=stale_after)
    if invocation.json:
        print_json(found)
    else:
        click.echo(f"{found.code}: {printable(found.reason)}")
        if found.command:
            click.echo(f"try: {printable(found.command)}")
        if also := found.details.get("also"):
            click.echo(f"also: {', '.join(also)}")
    return EXIT_NOTHING if found.code == "unknown" else 0


COMMANDS = (explain,)
