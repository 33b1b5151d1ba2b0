"""Which rows of roost.workers were certainly left by a dead process of this host; in doubt, none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from roostd.core.identity import Identity, is_dead_predecessor

UPTIME_SECONDS = 100.0
HEARTBEAT_INTERVAL = 15.0
ME = Identity("host", "machine", "boot", "pid:[1]", pid=100, started_ticks=5000)


def is_dead(
    row: dict[str, Any],
    me: Identity,
    started_ticks_of: Callable[[int], int | None],
    silent_seconds: float = UPTIME_SECONDS + 60,
    uptime_seconds: float = UPTIME_SECONDS,
) -> bool:
    return is_dead_predecessor(
        row,
        silent_seconds,
        me,
        uptime_seconds=uptime_seconds,
        heartbeat_interval=HEARTBEAT_INTERVAL,
        started_ticks_of=started_ticks_of,
    )


def metadata(**changes: Any) -> dict[str, Any]:
    return {"identity": dataclasses.replace(ME, **{"pid": 50, "started_ticks": 10} | changes).as_json()}


def processes(**alive: int) -> Callable[[int], int | None]:
    """Start times by pid, as `pid_50=10`."""
    return {int(name[4:]): ticks for name, ticks in alive.items()}.get


@pytest.mark.parametrize(
    ("changes", "alive", "dead"),
    [
        # the same boot and pid namespace: the process table tells
        ({}, {}, True),
        ({}, {"pid_50": 10}, False),
        ({}, {"pid_50": 11}, True),  # another process has the pid now
        ({"pid": 100, "started_ticks": 4999}, {"pid_100": 5000}, True),  # ours has it: containers start at pid 1
        ({"pid": 100, "started_ticks": 5000}, {"pid_100": 5000}, False),  # it is this very process
        # another pid namespace: its pids say nothing here
        ({"pid_namespace": "pid:[2]"}, {}, False),
        ({"pid_namespace": "pid:[2]"}, {"pid_50": 11}, False),
        # an earlier boot of the same machine: nothing of it can live
        ({"boot_id": "earlier"}, {"pid_50": 10}, True),
        ({"boot_id": "earlier", "pid_namespace": "pid:[2]"}, {}, True),
        # another machine, or perhaps one: its heartbeat decides
        ({"machine_id": "other"}, {}, False),
        ({"machine_id": "other", "boot_id": "earlier"}, {}, False),
        ({"hostname": "other"}, {}, False),
    ],
)
def test_who_is_dead(changes: dict[str, Any], alive: dict[str, int], dead: bool) -> None:
    assert is_dead(metadata(**changes), ME, processes(**alive)) is dead


@pytest.mark.parametrize(
    ("silent_seconds", "uptime_seconds", "dead"),
    [
        (0.0, 100.0, False),
        (15.0, 100.0, False),
        (100.0, 100.0, False),
        (101.0, 100.0, False),  # the clocks may run apart that much
        (103.0, 100.0, True),
        (300.0, 100.0, True),
        (300.0, 3_000_000.0, False),
        (-5.0, 100.0, False),  # the database's clock was put back
        # a boot so short ago that a clone may not have been heard of since
        (14.0, 3.0, False),
        (16.0, 3.0, False),
        (18.0, 3.0, True),
    ],
)
def test_another_boot_is_an_earlier_one_only_if_it_was_last_heard_of_before_this_one(
    silent_seconds: float, uptime_seconds: float, dead: bool
) -> None:
    row = metadata(boot_id="another")
    assert is_dead(row, ME, processes(), silent_seconds, uptime_seconds) is dead


def test_in_the_same_boot_the_process_table_tells_however_short_the_silence() -> None:
    assert is_dead(metadata(), ME, processes(), silent_seconds=0.1)


def test_without_a_machine_id_another_boot_may_be_another_machine() -> None:
    me = dataclasses.replace(ME, machine_id="")
    assert not is_dead(metadata(machine_id="", boot_id="earlier"), me, processes())
    assert is_dead(metadata(machine_id=""), me, processes())


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"identity": None},
        {"identity": "host"},
        {"identity": []},
        {"identity": {}},
        {"identity": {"hostname": "host"}},
        {"identity": ME.as_json() | {"of_a_later_version": 1}},
    ],
)
def test_a_row_that_does_not_say_who_it_is_is_left_alone(broken: dict[str, Any]) -> None:
    assert not is_dead(broken, ME, processes())


def test_an_identity_survives_the_database() -> None:
    assert Identity(**ME.as_json()) == ME
