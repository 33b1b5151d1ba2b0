"""migrate up, status, sql: the schema of the database."""

from __future__ import annotations

import click

from roost_client import schema
from roostd.ctl.command import Invocation, command
from roostd.ctl.output import print_json, print_table


@command("up")
def up(invocation: Invocation) -> None:
    """Bring the schema up to date. May run anywhere, at any time, also twice at once."""
    with invocation.connect() as conn:
        applied = [f"{migration.version:04} {migration.name}" for migration in schema.apply_migrations(conn)]
    if invocation.json:
        print_json({"applied": applied})
        return
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("nothing to do: the schema is up to date")


@command("status")
def status(invocation: Invocation) -> None:
    """Show which migrations are applied."""
    with invocation.connect() as conn:
        found = schema.status(conn)
    if invocation.json:
        print_json(found)
    else:
        print_table(
            ("VERSION", "NAME", "STATE", "APPLIED"),
            [(f"{each.version:04}", each.name, each.state, each.applied_at) for each in found],
        )


@command("sql")
@click.option("--since", metavar="VERSION", type=click.IntRange(0), default=0, help="Only those after this version.")
def sql(invocation: Invocation, since: int) -> None:
    """Print the migrations as a script, for those who run their own. Needs no database."""
    newest = schema.migrations()[-1].version
    if since > newest:
        raise click.UsageError(f"--since {since}: the newest migration is {newest}")
    script = schema.sql(since)
    if invocation.json:
        print_json({"sql": script})
    else:
        click.echo(script, nl=False)


@click.group("migrate", no_args_is_help=False)
def migrate() -> None:
    """The schema of the database."""


for each in (up, status, sql):
    migrate.add_command(each)

COMMANDS = (migrate,)
