"""tasks: what the handlers are, what they take, and which workers have them.

Handlers are user code, which is not imported here: `roostd --check` does it, in a process of its own, with the modules
that the settings name.
"""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import click

from roost_client import WorkerInfo
from roostd.ctl.command import EXIT_CONFIG, Failure, Invocation, command, common_options, find_roostd
from roostd.ctl.output import print_json, print_table

_DEFAULTS = (
    "queue", "priority", "max_attempts", "tags", "timeout_seconds", "rate_per_minute", "max_concurrency",
)  # fmt: skip


@click.group("tasks", invoke_without_command=True, no_args_is_help=False)
@common_options
def tasks() -> int | None:
    """List the tasks: what @job declares for each, and which workers have it.

    They are those of the handlers that the settings (-c) name. Without any, those that workers have.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        return None
    invocation = context.ensure_object(Invocation)
    declared = {task["name"]: task["defaults"] for task in _described(invocation)} if _has_handlers(invocation) else {}
    with invocation.client() as roost:
        known = _known(roost.list_workers())
    rows: list[dict[str, Any]] = [
        {
            "task": name,
            "declared": name in declared,
            **{key: declared.get(name, {}).get(key) for key in _DEFAULTS},
            "workers": known.get(name, []),
        }
        for name in sorted(declared.keys() | known.keys())
    ]
    if not rows:
        raise Failure("cannot list tasks: the settings name no handlers, and no worker has any; name a file with -c")
    if invocation.json:
        print_json(rows)
        return 0
    print_table(
        ("TASK", "QUEUE", "PRIORITY", "ATTEMPTS", "TIMEOUT", "A MINUTE", "AT ONCE", "WORKERS"),
        [
            (
                row["task"],
                row["queue"],
                row["priority"],
                row["max_attempts"],
                row["timeout_seconds"],
                row["rate_per_minute"],
                row["max_concurrency"],
                ",".join(sorted(row["workers"])),
            )
            for row in rows
        ],
    )
    return 0


@command("export")
def export(invocation: Invocation) -> None:
    """Print the JSON Schema of each task's arguments, with its handler and what @job declares. Always JSON.

    From its args_model, or else from the handler's signature; one whose annotation says nothing may be anything.
    """
    if not _has_handlers(invocation):
        raise Failure("cannot export tasks: the settings name no handlers; name a file that does with -c", EXIT_CONFIG)
    print_json(_described(invocation))


tasks.add_command(export)

COMMANDS = (tasks,)


def _has_handlers(invocation: Invocation) -> bool:
    handlers = invocation.settings().handlers
    return bool(handlers.modules or handlers.registry)


def _described(invocation: Invocation) -> list[dict[str, Any]]:
    """What `roostd --check` says of each task. Raises Failure where the handlers can't be imported."""
    line = [find_roostd("read the tasks"), "--check", "--json"]
    line += ["-c", str(invocation.config)] if invocation.config is not None else []
    # By the environment: a command line is for all to see.
    environ = {**os.environ, "ROOST_DATABASE__DSN": invocation.dsn} if invocation.dsn is not None else None
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environ)
    click.echo(done.stderr, err=True, nl=False)
    if done.returncode:
        raise Failure(f"cannot read the tasks: roostd --check ended with status {done.returncode}", EXIT_CONFIG)
    described: list[dict[str, Any]] = json.loads(done.stdout)["tasks"]
    return described


def _known(workers: list[WorkerInfo]) -> dict[str, list[str]]:
    """The names of the workers that have each task, as far as they say."""
    known: dict[str, list[str]] = {}
    for worker in workers:
        names = worker.metadata.get("tasks")
        for name in names if isinstance(names, list) else []:
            known.setdefault(name, []).append(worker.name)
    return known
