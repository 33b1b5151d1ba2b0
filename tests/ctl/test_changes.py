"""cancel, retry, requeue."""

import subprocess
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from roost_client import Roost
from tests.ctl.conftest import Ctl

LATER = datetime(2040, 1, 1, tzinfo=UTC)


def test_cancel_goes_through_all_ids_and_ends_with_1_if_any_cannot_be(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    waiting, later = roost.enqueue("send"), roost.enqueue("send", scheduled_at=LATER)
    [discarded] = discard()
    result = ctl("cancel", waiting, 4711, discarded, later)
    assert result.code == 1
    assert [line.split() for line in result.lines[1:]] == [[str(waiting), "cancelled"], [str(later), "cancelled"]]
    assert result.err.splitlines() == [
        "roostctl: cannot cancel job 4711: there is no such job",
        f"roostctl: cannot cancel job {discarded}: it is discarded already",
    ]
    assert ctl("cancel", waiting, "--json").json == [{"id": waiting, "outcome": "cancelled"}]


def test_retry_makes_a_job_due_and_refuses_one_that_cannot_be(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    later = roost.enqueue("send", scheduled_at=LATER)
    [discarded] = discard()
    result = ctl("retry", later, discarded)
    assert result.code == 0
    assert result.lines[1:] == [f" {later}  available, was available", f" {discarded}  available, was discarded"]
    assert roost.get_job(later).scheduled_at < LATER
    assert (roost.get_job(discarded).state, roost.get_job(discarded).attempt) == ("available", 0)
    assert ctl("retry", 4711).code == 1


@pytest.mark.parametrize("command", ["cancel", "retry"])
def test_an_id_that_is_none_is_wrong_usage(ctl: Ctl, command: str) -> None:
    assert ctl(command, "x").code == 64
    assert ctl(command, 2**63).code == 64
    assert ctl(command).code == 64


def test_requeue_asks_for_what_it_is_to_requeue(ctl: Ctl, discard: Callable[..., list[int]]) -> None:
    discard()
    result = ctl("requeue", "--yes")
    assert result.code == 64
    assert "--discarded" in result.err


def test_requeue_lets_all_that_match_start_again(ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]) -> None:
    for queue in ("emails", "images"):
        for task in ("send", "resize"):
            discard(3, queue, task)
    assert (
        ctl("requeue", "--discarded", "--queue", "emails", "--task", "send", "--dry-run").out
        == "would requeue 3 jobs\n"
    )
    assert len(roost.list_jobs(state="discarded")) == 12
    assert ctl("requeue", "--discarded", "--queue", "emails", "--task", "send", "--yes").out == "requeued 3 jobs\n"
    assert {(job.queue, job.task, job.attempt) for job in roost.list_jobs(state="available")} == {("emails", "send", 0)}
    assert ctl("requeue", "--discarded", "--yes", "--json").json == {"outcome": "requeued", "jobs": 9}
    result = ctl("requeue", "--discarded", "--yes")
    assert (result.code, result.out) == (1, "")
    assert "no discarded job matches" in result.err


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("n", 1, 2), ("", 1, 2)])
def test_requeue_asks_first_and_takes_silence_for_no(
    ctl_process: Callable[..., subprocess.CompletedProcess[str]],
    roost: Roost,
    discard: Callable[..., list[int]],
    answer: str,
    code: int,
    left: int,
) -> None:
    discard(2)
    result = ctl_process("$roostctl requeue --discarded", input=answer)
    assert result.returncode == code
    assert "Requeue 2 discarded jobs?" in result.stderr
    assert result.stdout == ("requeued 2 jobs\n" if code == 0 else "")
    assert ("--yes" in result.stderr) == (code == 1)
    assert len(roost.list_jobs(state="discarded")) == left
