"""pause, resume, queues: which queues there are, and whether workers start jobs of them."""

from __future__ import annotations

import click

from roostd.ctl import completion
from roostd.ctl.command import Invocation, command
from roostd.ctl.output import note, print_json, print_table

_names = click.argument("names", metavar="QUEUE...", nargs=-1, required=True, shell_complete=completion.queues)


@command("pause")
@_names
def pause(invocation: Invocation, names: tuple[str, ...]) -> None:
    """Stop workers from starting jobs of a queue; those that run go on."""
    _set_paused(invocation, names, True)


@command("resume")
@_names
def resume(invocation: Invocation, names: tuple[str, ...]) -> None:
    """Let workers start jobs of a queue again."""
    _set_paused(invocation, names, False)


@command("queues")
def queues(invocation: Invocation) -> None:
    """List the queues that have an unfinished job or a worker, or were paused once."""
    with invocation.client() as roost:
        found = roost.list_queues()
    if invocation.json:
        print_json(found)
        return
    print_table(
        ("QUEUE", "STATE", "AVAILABLE", "SCHEDULED", "EXECUTING", "BLOCKED"),
        [
            (
                queue.name,
                "paused" if queue.paused else "active",
                queue.available,
                queue.scheduled,
                queue.executing,
                queue.blocked,
            )
            for queue in found
        ],
    )


@click.group("queue", no_args_is_help=False)
def queue() -> None:
    """The same as queues, pause and resume."""


for name, each in (("list", queues), ("pause", pause), ("resume", resume)):
    queue.add_command(each, name)

COMMANDS = (pause, resume, queues, queue)


def _set_paused(invocation: Invocation, names: tuple[str, ...], paused: bool) -> None:
    with invocation.client() as roost:
        known = {queue.name for queue in roost.list_queues()}
        for name in names:
            if paused:
                roost.pause_queue(name)
            else:
                roost.resume_queue(name)
            if name not in known:
                note(f"queue {name!r} has neither jobs nor workers: is that its name?")
    if invocation.json:
        print_json([{"queue": name, "paused": paused} for name in names])
    else:
        print_table(("QUEUE", "STATE"), [(name, "paused" if paused else "active") for name in names])
