"""What a worker knows of cron: its entries, and which of their slots are due.

    entries    declared by @cron and [cron.NAME]     resolve
    due        the latest slot of each that is       Timetable

Whether a slot fires is decided in the database, where its row is unique: every worker tries. Of the slots that passed
since an entry was last looked at only the latest is tried; one more than LATE_SECONDS old only where the entry says
`catch_up = "latest"`. Must not read the clock: `now` is the database's, told by the caller.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Self
from zoneinfo import ZoneInfo

from roost_client.types import TaskDefaults
from roostd.core.cron import ExpressionError, Schedule, ZoneError, zone

# How late a slot may fire that is not caught up: a minute, which is cron's own grain. Restarts and failovers take less.
LATE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What to enqueue, and when. `args` is JSON text; `source` says who declared it: "config" or the function."""

    name: str
    expression: str
    task: str
    source: str
    timezone: str = "UTC"
    args: str = "{}"
    queue: str = "default"
    priority: int = 0
    max_attempts: int = 20
    tags: tuple[str, ...] = ()
    timeout_seconds: int | None = None
    enabled: bool = True
    catch_up: str = "none"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "tags": tuple(fields["tags"])})


def resolve(
    declared: Sequence[Mapping[str, Any]],
    configured: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, TaskDefaults],
    args_text: Callable[[str, Any], str],
) -> tuple[list[Entry], list[str]]:
    """The entries in force, and what is wrong with the others, a sentence each.

    `declared` are those of @cron, with only the fields that were passed, and with `where`, the function. `configured`
    are the keys given in [cron.NAME], which win over those of the @cron of that name; then come the defaults of the
    task's @job. `args_text` makes JSON text of a task's arguments; it raises ValueError that reads on from the value.
    """
    entries, problems = [], []
    functions = {each["name"]: each for each in declared}
    for name in dict.fromkeys([*functions, *configured]):
        function, keys = functions.get(name, {}), configured.get(name, {})
        where = f"@cron entry {name!r} of {function['where']}" if function else ""
        given = {**{key: value for key, value in function.items() if key != "where"}, **keys}
        found = _problems(name, given, tasks, args_text)
        for key, reason in found.items():
            what = f"cron.{name}" if key in keys or not function else where
            problems.append(f"cannot use {what}: {reason}")
        if not found:
            entries.append(_entry(name, given, tasks[given["task"]], args_text, function.get("where", "config")))
    return entries, problems


def _problems(
    name: str, given: Mapping[str, Any], tasks: Mapping[str, TaskDefaults], args_text: Callable[[str, Any], str]
) -> dict[str, str]:
    """What is wrong, by key."""
    found = {}
    for key in ("task", "expression"):
        if key not in given:
            found[key] = f"it has no {key}, and no @cron declares an entry {name!r}; give it one, or correct its name"
    if "expression" in given:
        try:
            Schedule.parse(given["expression"])
        except ExpressionError as error:
            found["expression"] = f"expression {_shown(given['expression'])} {error}"
    try:
        zone(given.get("timezone", "UTC"))
    except ZoneError as error:
        found["timezone"] = f"timezone {_shown(given['timezone'])} {error}"
    if (task := given.get("task")) is not None and task not in tasks:
        close = difflib.get_close_matches(task, tasks, 1, 0.6)
        fix = f"; did you mean {close[0]!r}?" if close else "; import its module in handlers.modules"
        found["task"] = f"task {_shown(task)} is registered by no handler module{fix}"
    elif task is not None:
        try:
            args_text(task, given.get("args", {}))
        except ValueError as error:
            found["args"] = str(error)
    return found


def _entry(
    name: str, given: Mapping[str, Any], defaults: TaskDefaults, args_text: Callable[[str, Any], str], source: str
) -> Entry:
    declared = {
        key: value
        for key in ("queue", "priority", "max_attempts", "tags", "timeout_seconds")
        if (value := getattr(defaults, key)) is not None
    }
    args = args_text(given["task"], given.get("args", {}))
    return Entry(**{**declared, **given, "name": name, "args": args, "source": source})


def _shown(value: str) -> str:
    return repr(value) if len(value) <= 80 else f"{value[:80]!r}…"


@dataclass(slots=True)
class Plan:
    """An entry that fires, the last slot that was seen to, and the next."""

    entry: Entry
    schedule: Schedule
    zone: ZoneInfo
    after: datetime
    next_slot: datetime | None = field(init=False)

    def __post_init__(self) -> None:
        self.seen_to(self.after)

    def seen_to(self, slot: datetime) -> None:
        """Neither this slot nor an earlier one will be tried again."""
        self.after = slot
        self.next_slot = self.schedule.next_after(slot, self.zone)


@dataclass(frozen=True, slots=True)
class Due:
    """A slot to try."""

    entry: Entry
    slot: datetime


class Timetable:
    """The entries of one worker. Keeps no time of its own."""

    def __init__(self) -> None:
        self._plans: dict[str, Plan] = {}

    def set(self, entries: Iterable[Entry], after: Mapping[str, datetime]) -> None:
        """Plans these entries and no others, each `after` the last slot that fired, or since it is known."""
        self._plans = {
            entry.name: Plan(entry, Schedule.parse(entry.expression), zone(entry.timezone), after[entry.name])
            for entry in entries
            if entry.enabled
        }

    def next_slot(self) -> datetime | None:
        """When to look again; None for never."""
        return min((plan.next_slot for plan in self._plans.values() if plan.next_slot is not None), default=None)

    def due(self, now: datetime) -> list[Due]:
        """Of each entry the latest slot that is due, by name. Passes over those that are too late."""
        found = []
        for plan in self._plans.values():
            if plan.next_slot is None or plan.next_slot > now:
                continue
            earliest = plan.after
            if plan.entry.catch_up == "none":
                earliest = max(earliest, now - timedelta(seconds=LATE_SECONDS))
            slot = plan.schedule.latest(earliest, now, plan.zone)
            if slot is None:
                plan.seen_to(earliest)
            else:
                found.append(Due(plan.entry, slot))
        return sorted(found, key=lambda due: due.entry.name)

    def tried(self, tried: Iterable[Due], now: datetime) -> None:
        """The database has been asked for these at `now`; what was not due yet by its clock will be tried again."""
        for due in tried:
            plan = self._plans.get(due.entry.name)
            if plan is not None and plan.entry is due.entry and due.slot <= now:
                plan.seen_to(due.slot)
