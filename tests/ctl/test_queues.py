"""pause, resume, queues, status, workers without a worker."""

import pytest

from roost_client import Roost
from tests.ctl.conftest import Ctl


@pytest.mark.parametrize("group", [[], ["queue"]])
def test_pause_and_resume_change_the_queues_that_are_named(ctl: Ctl, roost: Roost, group: list[str]) -> None:
    roost.enqueue("send", queue="emails")
    roost.enqueue("send", queue='it\'s "odd".')
    paused = ctl(*group, "pause", "emails", 'it\'s "odd".')
    assert (paused.code, paused.err) == (0, "")
    assert paused.lines[1].split() == ["emails", "paused"]
    assert {queue.name for queue in roost.list_queues() if queue.paused} == {"emails", 'it\'s "odd".'}
    resumed = ctl(*group, "resume", "emails", "--json")
    assert resumed.json == [{"queue": "emails", "paused": False}]
    assert {queue.name for queue in roost.list_queues() if queue.paused} == {'it\'s "odd".'}


def test_a_queue_that_nobody_knows_is_paused_with_a_word_about_it(ctl: Ctl, roost: Roost) -> None:
    result = ctl("pause", "emials")
    assert result.code == 0
    assert "queue 'emials' has neither jobs nor workers" in result.err
    assert [queue.name for queue in roost.list_queues() if queue.paused] == ["emials"]
    assert ctl("resume", "emials").err == ""


def test_a_queue_name_that_cannot_be_is_wrong_usage(ctl: Ctl) -> None:
    assert ctl("pause", "").code == 64
    assert ctl("pause", "q" * 129).code == 64
    assert ctl("pause").code == 64


@pytest.mark.parametrize("command", [["queues"], ["queue", "list"]])
def test_queues_counts_what_waits(ctl: Ctl, roost: Roost, command: list[str]) -> None:
    for _ in range(3):
        roost.enqueue("send", queue="emails")
    roost.pause_queue("emails")
    assert ctl(*command).lines == [
        "QUEUE   STATE   AVAILABLE  SCHEDULED  EXECUTING  BLOCKED",
        "emails  paused          3          0          0        0",
    ]
    assert ctl(*command, "--json").json == [
        {"name": "emails", "paused": True, "available": 3, "scheduled": 0, "executing": 0, "blocked": 0}
    ]


def test_status_counts_states_by_queue_and_shows_what_is_paused(ctl: Ctl, roost: Roost) -> None:
    roost.cancel(roost.enqueue("send", queue="emails"))
    roost.enqueue("send", queue="emails")
    roost.pause_queue("images")
    result = ctl("status")
    assert result.code == 0
    assert result.lines[:3] == [
        "QUEUE   STATE   AVAILABLE  EXECUTING  RETRYABLE  COMPLETED  DISCARDED  CANCELLED",
        "emails  active          1          0          0          0          0          1",
        "images  paused          0          0          0          0          0          0",
    ]
    status = ctl("status", "--json").json
    assert status["workers"] == []
    assert status["queues"]["images"]["paused"] is True
    assert status["queues"]["emails"]["jobs"] == {
        "available": 1, "executing": 0, "retryable": 0, "completed": 0, "discarded": 0, "cancelled": 1,
    }  # fmt: skip


def test_workers_of_none_is_an_empty_list(ctl: Ctl) -> None:
    assert ctl("workers", "--json").json == []
    assert ctl("workers").code == 0
