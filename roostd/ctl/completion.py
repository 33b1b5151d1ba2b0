"""completion: what the shell asks while somebody types.

Names come from the database that the line so far leads to. Whatever is wrong with it, the shell is told nothing, and
soon: nobody wants an error in the middle of their line.
"""

from __future__ import annotations

import contextlib
import os
from typing import LiteralString

import click
import psycopg
from click.shell_completion import CompletionItem, get_completion_class, shell_complete
from psycopg.conninfo import make_conninfo

from roostd.ctl.command import Invocation, command

VARIABLE = "_ROOSTCTL_COMPLETE"
_SECONDS = 2  # to connect: libpq's least
_MILLISECONDS = 500  # to answer

# The names that are about just now. The newest jobs stand for all: no index leads to each name once.
_RECENT: LiteralString = "(SELECT * FROM roost.job_rows ORDER BY id DESC LIMIT 1000) AS recent"
_QUEUES: LiteralString = (
    "SELECT name FROM roost.queues UNION SELECT unnest(queues) FROM roost.workers"
    f" UNION SELECT queue FROM {_RECENT} ORDER BY 1"
)
_TASKS: LiteralString = (
    "SELECT jsonb_array_elements_text(metadata -> 'tasks') FROM roost.workers"
    " WHERE jsonb_typeof(metadata -> 'tasks') = 'array'"
    f" UNION SELECT task FROM roost.cron_entries UNION SELECT task FROM {_RECENT} ORDER BY 1"
)
_WORKERS: LiteralString = "SELECT name FROM roost.workers UNION SELECT id::text FROM roost.workers ORDER BY 1"
_HOSTS: LiteralString = "SELECT DISTINCT hostname FROM roost.workers ORDER BY 1"


@command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(invocation: Invocation, shell: str) -> None:
    """Print what makes a shell complete roostctl's commands, options and names.

    For bash, in ~/.bashrc: eval "$(roostctl completion bash)". For zsh likewise, in ~/.zshrc. For fish:
    roostctl completion fish > ~/.config/fish/completions/roostctl.fish
    """
    found = get_completion_class(shell)
    assert found is not None, "click has one for each of these"
    click.echo(found(click.get_current_context().find_root().command, {}, "roostctl", VARIABLE).source())


COMMANDS = (completion,)


def answer(group: click.Group) -> int | None:
    """Answer the shell, if it is the shell that asks; the exit status."""
    instruction = os.environ.get(VARIABLE)
    if not instruction:
        return None
    return shell_complete(group, {}, "roostctl", VARIABLE, instruction)


def queues(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, parameter, _QUEUES, incomplete)


def tasks(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, parameter, _TASKS, incomplete)


def workers(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, parameter, _WORKERS, incomplete)


def hosts(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _names(context, parameter, _HOSTS, incomplete)


def _names(
    context: click.Context, parameter: click.Parameter, query: LiteralString, incomplete: str
) -> list[CompletionItem]:
    """The names that begin with what is there already, but for those that a shell would take for several words."""
    given = context.params.get(parameter.name or "")
    used = set(given) if isinstance(given, (list, tuple)) else set()
    names: list[str] = []
    # Whatever is wrong, a word in the middle of the line that is being typed would be worse than no names.
    with contextlib.suppress(Exception):
        conninfo = make_conninfo(context.ensure_object(Invocation).conninfo(), connect_timeout=_SECONDS)
        with psycopg.connect(conninfo) as conn:
            conn.execute("SELECT set_config('statement_timeout', %s, true)", [str(_MILLISECONDS)])
            names = [name for (name,) in conn.execute(query)]
    return [
        CompletionItem(name)
        for name in names
        if name.startswith(incomplete) and name not in used and name.isprintable() and " " not in name
    ]
