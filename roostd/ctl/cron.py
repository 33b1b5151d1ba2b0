"""cron: which entries fire when, and keeping them from it.

Entries are what workers have written into the database, so no handlers and no settings of theirs are needed here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import psycopg

from roost_client import schema
from roostd.core.cron import Schedule, zone
from roostd.ctl.command import EXIT_NOTHING, Failure, Invocation, command
from roostd.ctl.output import note, print_json, print_table

# Workers say every five minutes what they know: one that has not been named for three such times nobody knows.
UNKNOWN_AFTER = timedelta(minutes=15)

_COLUMNS = (
    "name, expression, timezone, task, args, queue, priority, max_attempts, enabled, paused_at, catch_up, source,"
    " seen_at"
)
_name = click.argument("name")
_names = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@dataclass(frozen=True, slots=True)
class Seen:
    """An entry as the database has it, and the state and next slot that follow."""

    fields: dict[str, Any]
    now: datetime

    @property
    def state(self) -> str:
        if self.now - self.fields["seen_at"] > UNKNOWN_AFTER:
            return "unknown"
        if not self.fields["enabled"]:
            return "disabled"
        return "paused" if self.fields["paused_at"] is not None else "active"

    def slots(self) -> Iterator[datetime]:
        """Those to come, by the database's clock, whatever its state."""
        schedule, place = Schedule.parse(self.fields["expression"]), zone(self.fields["timezone"])
        slot = schedule.next_after(self.now, place)
        while slot is not None:
            yield slot
            slot = schedule.next_after(slot, place)

    def next_slot(self) -> datetime | None:
        return next(self.slots(), None) if self.state == "active" else None


@click.group("cron", no_args_is_help=False)
def cron() -> None:
    """List the cron entries, run one now, keep one from firing."""


@command("list")
def list_entries(invocation: Invocation) -> None:
    """List all entries: what they run and when, when they fire next, and when they last did.

    One is `unknown` that no worker has named for a quarter of an hour; after 30 days it is forgotten.
    """
    with _connect(invocation) as conn:
        found = _read(conn)
        runs = {
            name: (slot, fired_at, job_id)
            for name, slot, fired_at, job_id in conn.execute(
                "SELECT e.name, r.slot, r.fired_at, r.job_id FROM roost.cron_entries e CROSS JOIN LATERAL"
                " (SELECT * FROM roost.cron_runs r WHERE r.name = e.name ORDER BY r.slot DESC LIMIT 1) AS r"
            )
        }
    if invocation.json:
        print_json(
            [
                {
                    **seen.fields,
                    "state": seen.state,
                    "next_slot": seen.next_slot(),
                    **dict(
                        zip(("last_slot", "last_fired_at", "last_job_id"), runs.get(name, (None,) * 3), strict=True)
                    ),
                }
                for name, seen in found.items()
            ]
        )
        return
    print_table(
        ("NAME", "EXPRESSION", "ZONE", "TASK", "STATE", "NEXT", "LAST", "JOB", "SOURCE"),
        [
            (
                name,
                seen.fields["expression"],
                seen.fields["timezone"],
                seen.fields["task"],
                seen.state,
                seen.next_slot(),
                runs[name][1] if name in runs else None,
                runs[name][2] if name in runs else None,
                seen.fields["source"],
            )
            for name, seen in found.items()
        ],
    )


@command("next")
@_name
@click.option("-n", "count", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many.")
def next_slots(invocation: Invocation, name: str, count: int) -> int:
    """Show when an entry fires next, in UTC and by the clock of its zone."""
    with _connect(invocation) as conn:
        seen = _one(_read(conn), name, "show")
    if seen.state != "active":
        note(f"cron entry {name!r} is {seen.state}, so it does not fire at these times")
    slots = [slot for slot, _ in zip(seen.slots(), range(count), strict=False)]
    place = zone(seen.fields["timezone"])
    local = [slot.astimezone(place) for slot in slots]
    if invocation.json:
        print_json([{"slot": slot, "local": here.isoformat()} for slot, here in zip(slots, local, strict=True)])
    else:
        shown = [each.strftime("%a %Y-%m-%d %H:%M:%S %z") for each in local]
        print_table(("SLOT", seen.fields["timezone"]), list(zip(slots, shown, strict=True)))
    return 0 if slots else EXIT_NOTHING


@command("run")
@_name
def run(invocation: Invocation, name: str) -> None:
    """Enqueue the job of an entry now, outside its slots, and print the job's id."""
    with _connect(invocation) as conn:
        seen = _one(_read(conn), name, "run")
        row = conn.execute("SELECT roost.run_cron(%s)", [name]).fetchone()
    assert row is not None
    if seen.state == "unknown":
        note(f"no worker has named cron entry {name!r} for a while: its task may be gone as well")
    if invocation.json:
        print_json({"id": row[0]})
    else:
        click.echo(row[0])


@command("pause")
@_names
def pause(invocation: Invocation, names: tuple[str, ...]) -> int:
    """Keep entries from firing, until they are resumed: across restarts, reloads and changes."""
    return _set_paused(invocation, names, True)


@command("resume")
@_names
def resume(invocation: Invocation, names: tuple[str, ...]) -> int:
    """Let entries fire again; what they missed is not made up for."""
    return _set_paused(invocation, names, False)


for each in (list_entries, next_slots, run, pause, resume):
    cron.add_command(each)

COMMANDS = (cron,)


@contextmanager
def _connect(invocation: Invocation) -> Iterator[psycopg.Connection[Any]]:
    with invocation.connect() as conn:
        schema.check(conn)
        yield conn


def _read(conn: psycopg.Connection[Any]) -> dict[str, Seen]:
    cursor = conn.execute(f"SELECT now(), {_COLUMNS} FROM roost.cron_entries ORDER BY name")
    names = [column.name for column in cursor.description or ()]
    return {row[1]: Seen(dict(zip(names[1:], row[1:], strict=True)), row[0].astimezone(UTC)) for row in cursor}


def _one(found: dict[str, Seen], name: str, verb: str) -> Seen:
    if name not in found:
        raise Failure(_no_entry(found, name, verb))
    return found[name]


def _no_entry(found: dict[str, Seen], name: str, verb: str) -> str:
    close = difflib.get_close_matches(name, found, 1, 0.6)
    fix = f"did you mean {close[0]!r}?" if close else "see roostctl cron list"
    return f"cannot {verb} cron entry {name!r}: no worker has made one of that name known; {fix}"


def _set_paused(invocation: Invocation, names: tuple[str, ...], paused: bool) -> int:
    done = []
    with _connect(invocation) as conn:
        known = _read(conn)
        for name in names:
            # What is not among them may be no text that the database could be asked for.
            if name in known and conn.execute("SELECT roost.pause_cron(%s, %s)", [name, paused]).fetchone() == (True,):
                done.append(name)
            else:
                note(_no_entry(known, name, "pause" if paused else "resume"))
    if invocation.json:
        print_json([{"name": name, "paused": paused} for name in done])
    else:
        print_table(("NAME", "STATE"), [(name, "paused" if paused else "active") for name in done])
    return 0 if len(done) == len(names) else EXIT_NOTHING
