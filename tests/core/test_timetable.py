"""Which entries there are, and which of their slots are to be tried."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from roost_client import TaskDefaults
from roostd.core.timetable import LATE_SECONDS, Due, Entry, Timetable, resolve

NOON = datetime(2026, 5, 5, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)


def entry(name: str = "a", expression: str = "* * * * *", **fields: Any) -> Entry:
    return Entry(name=name, expression=expression, task="t", source="config", **fields)


def timetable(*entries: Entry, after: datetime = NOON) -> Timetable:
    table = Timetable()
    table.set(entries, {each.name: after for each in entries})
    return table


def tried(table: Timetable, now: datetime) -> list[Due]:
    due = table.due(now)
    table.tried(due, now)
    return due


# -- what is due


def test_a_slot_is_due_from_its_time_on_and_once() -> None:
    one = entry()
    table = timetable(one)
    assert table.next_slot() == NOON + MINUTE
    assert tried(table, NOON + MINUTE - SECOND) == []
    assert tried(table, NOON + MINUTE) == [Due(one, NOON + MINUTE)]
    assert tried(table, NOON + MINUTE) == []
    assert table.next_slot() == NOON + 2 * MINUTE


def test_of_the_slots_that_were_missed_only_the_latest_is_due() -> None:
    one = entry()
    table = timetable(one)
    assert tried(table, NOON + 10 * MINUTE + SECOND) == [Due(one, NOON + 10 * MINUTE)]
    assert table.next_slot() == NOON + 11 * MINUTE


def test_a_slot_that_is_too_late_is_passed_over_unless_it_is_to_be_caught_up() -> None:
    hourly, caught_up = entry("a", "@hourly"), entry("b", "@hourly", catch_up="latest")
    late = timedelta(seconds=LATE_SECONDS)
    table = timetable(hourly, caught_up)
    assert tried(table, NOON + timedelta(hours=3) + late) == [Due(caught_up, NOON + timedelta(hours=3))]
    assert table.next_slot() == NOON + timedelta(hours=4)
    table = timetable(hourly)
    assert tried(table, NOON + timedelta(hours=3) + late - SECOND) == [Due(hourly, NOON + timedelta(hours=3))]


def test_what_passed_before_an_entry_was_known_is_not_due() -> None:
    table = timetable(entry("a", "0 12 * * *", catch_up="latest"), after=NOON)
    assert table.due(NOON + SECOND) == []
    assert table.next_slot() == NOON + timedelta(days=1)


def test_a_slot_that_was_not_due_by_the_databases_clock_is_tried_again() -> None:
    one = entry()
    table = timetable(one)
    due = table.due(NOON + MINUTE)
    table.tried(due, NOON + MINUTE - SECOND)
    assert table.due(NOON + MINUTE) == due


def test_an_entry_that_was_replaced_meanwhile_keeps_its_slots() -> None:
    table = timetable(entry())
    due = table.due(NOON + MINUTE)
    anew = entry(priority=5)
    table.set([anew], {"a": NOON})
    table.tried(due, NOON + MINUTE)
    assert table.due(NOON + MINUTE) == [Due(anew, NOON + MINUTE)]


def test_entries_that_are_not_enabled_have_no_slots() -> None:
    table = timetable(entry(enabled=False))
    assert table.next_slot() is None
    assert table.due(NOON + timedelta(days=1)) == []


def test_what_is_due_comes_in_order_of_name() -> None:
    table = timetable(*(entry(name) for name in "cab"))
    assert [due.entry.name for due in table.due(NOON + MINUTE)] == ["a", "b", "c"]


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=30), st.sampled_from(["none", "latest"]))
def test_whatever_the_clock_does_no_slot_is_due_twice_early_or_before_one_that_was(
    pauses: list[int], catch_up: str
) -> None:
    table = timetable(entry("a", "*/7 * * * *", catch_up=catch_up))
    now, last = NOON, NOON
    for pause in pauses:
        now += timedelta(milliseconds=pause)
        for due in tried(table, now):
            assert last < due.slot <= now
            assert due.slot.minute % 7 == 0
            assert catch_up == "latest" or now - due.slot < timedelta(seconds=LATE_SECONDS)
            last = due.slot
        following = table.next_slot()
        assert following is not None
        assert following > now


# -- which entries there are

TASKS = {"send": TaskDefaults(queue="emails", max_attempts=3, timeout_seconds=30, tags=("x",)), "clean": TaskDefaults()}


def args_text(task: str, args: Any) -> str:
    if not isinstance(args, dict):
        raise ValueError(f"args must be a JSON object for {task}")
    return json.dumps(args)


def resolved(declared: list[dict[str, Any]], configured: dict[str, dict[str, Any]]) -> tuple[list[Entry], list[str]]:
    return resolve(declared, configured, TASKS, args_text)


def declare(name: str = "nightly", **fields: Any) -> dict[str, Any]:
    return {"name": name, "expression": "@daily", "task": "send", "args": {}, "where": "shop.jobs.send", **fields}


def test_an_entry_takes_the_defaults_of_its_task_where_it_says_nothing() -> None:
    entries, problems = resolved(
        [declare(max_attempts=1)], {"b": {"task": "send", "expression": "@hourly", "queue": "q"}}
    )
    assert problems == []
    assert entries == [
        Entry(
            name="nightly", expression="@daily", task="send", source="shop.jobs.send", queue="emails", max_attempts=1,
            timeout_seconds=30, tags=("x",),
        ),
        Entry(
            name="b", expression="@hourly", task="send", source="config", queue="q", max_attempts=3,
            timeout_seconds=30, tags=("x",),
        ),
    ]  # fmt: skip


def test_the_settings_win_key_by_key_over_the_function_of_the_same_name() -> None:
    (one,), problems = resolved(
        [declare(queue="q", timezone="Europe/Berlin", args={"a": 1})],
        {"nightly": {"expression": "0 4 * * *", "enabled": False, "catch_up": "latest"}},
    )
    assert problems == []
    assert (one.expression, one.timezone, one.queue, one.args) == ("0 4 * * *", "Europe/Berlin", "q", '{"a": 1}')
    assert (one.enabled, one.catch_up, one.source) == (False, "latest", "shop.jobs.send")


def test_an_entry_with_another_task_has_the_defaults_of_that() -> None:
    (one,), _ = resolved([declare()], {"nightly": {"task": "clean"}})
    assert (one.task, one.queue, one.max_attempts, one.timeout_seconds) == ("clean", "default", 20, None)


def test_each_problem_names_the_entry_and_the_key_or_the_function() -> None:
    entries, problems = resolved(
        [declare(expression="61 * * * *", timezone="Mars"), declare("fine")],
        {
            "x": {"task": "sned", "expression": "@daily"},
            "y": {"task": "clean"},
            "z": {"expression": "0 0 30 2 *", "task": "clean", "args": 3},
        },
    )
    assert [each.name for each in entries] == ["fine"]
    assert len(problems) == 6
    told = "\n".join(problems)
    assert "cannot use @cron entry 'nightly' of shop.jobs.send: expression '61 * * * *' has '61' as minute" in told
    assert "cannot use @cron entry 'nightly' of shop.jobs.send: timezone 'Mars' is not the name of" in told
    assert "cannot use cron.x: task 'sned' is registered by no handler module; did you mean 'send'?" in told
    assert "cannot use cron.y: it has no expression, and no @cron declares an entry 'y'" in told
    assert "cannot use cron.z: expression '0 0 30 2 *' never fires" in told
    assert "cannot use cron.z: args must be a JSON object for clean" in told


def test_an_entry_travels_as_json() -> None:
    one = entry(tags=("a", "b"), timeout_seconds=3, args='{"x": "\u00e9"}')
    assert Entry.from_json(json.loads(json.dumps(one.as_json()))) == one
