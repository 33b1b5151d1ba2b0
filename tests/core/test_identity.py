"""Which rows of roost.workers were certainly left by a dead process of this host; in doubt, none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from roostd.core.identity import Identity, is_dead_predecessor

ME = Identity("host", "machine", "boot", "pid:[1]", pid=100, started_ticks=5000)


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
        # another boot of the same machine: nothing of it can live
        ({"boot_id": "earlier"}, {"pid_50": 10}, True),
        ({"boot_id": "earlier", "pid_namespace": "pid:[2]"}, {}, True),
        # another machine, or perhaps one: its heartbeat decides
        ({"machine_id": "other"}, {}, False),
        ({"machine_id": "other", "boot_id": "earlier"}, {}, False),
        ({"hostname": "other"}, {}, False),
    ],
)
def test_who_is_dead(changes: dict[str, Any], alive: dict[str, int], dead: bool) -> None:
    assert is_dead_predecessor(metadata(**changes), ME, processes(**alive)) is dead


def test_without_a_machine_id_another_boot_may_be_another_machine() -> None:
    me = dataclasses.replace(ME, machine_id="")
    assert not is_dead_predecessor(metadata(machine_id="", boot_id="earlier"), me, processes())
    assert is_dead_predecessor(metadata(machine_id=""), me, processes())


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
    assert not is_dead_predecessor(broken, ME, processes())


def test_an_identity_survives_the_database() -> None:
    assert Identity(**ME.as_json()) == ME
