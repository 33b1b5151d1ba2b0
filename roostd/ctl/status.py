"""status: the whole system on one screen."""

from __future__ import annotations

import click

from roost_client import JobState
from roostd.ctl.command import Invocation, command
from roostd.ctl.output import print_json, print_table
from roostd.ctl.workers import print_workers, read_workers


@command("status")
def status(invocation: Invocation) -> None:
    """Count the jobs of each queue by state, and list the workers. Reads all jobs."""
    with invocation.connect() as conn, invocation.client() as roost:
        # One snapshot, so that the figures agree with each other.
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        counts = roost.status(conn=conn)
        queues = {queue.name: queue for queue in roost.list_queues(conn=conn)}
        workers = read_workers(roost, conn)
        conn.execute("COMMIT")
    names = sorted(counts.keys() | queues.keys())
    none = dict.fromkeys(JobState, 0)
    if invocation.json:
        jobs = {
            name: {"paused": name in queues and queues[name].paused, "jobs": counts.get(name, none)} for name in names
        }
        print_json({"queues": jobs, "workers": [seen.as_json() for seen in workers]})
        return
    print_table(
        ("QUEUE", "STATE", *(state.upper() for state in JobState)),
        [
            (
                name,
                "paused" if name in queues and queues[name].paused else "active",
                *counts.get(name, none).values(),
            )
            for name in names
        ],
    )
    click.echo()
    print_workers(workers)


COMMANDS = (status,)
