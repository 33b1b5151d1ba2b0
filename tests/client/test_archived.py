"""A job that was archived is found by its id, and is not changed any more."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import psycopg
import pytest

from roost_client import JobFailed, JobNotFoundError, JobStateError, Roost
from roostd.store import statements
from tests.client.hand import Hand

Conn = psycopg.Connection[Any]


@pytest.fixture
def archived(roost: Roost, dsn: str, observer: Conn) -> list[int]:
    """A completed job, a discarded one, and a cancelled one."""
    job_ids = [roost.enqueue("a", args={"n": n}, tags=["x"]) for n in range(3)]
    roost.cancel(job_ids[2])
    with closing(Hand(dsn)) as hand:
        hand.complete(job_ids[0], result={"n": 1})
        hand.discard(job_ids[1], "ValueError: boom")
    before = [roost.get_job(job_id) for job_id in job_ids]
    observer.execute(statements.SQL["archive"], {"span": 0, "age": -1})
    assert observer.execute("SELECT count(*) AS number FROM roost.jobs").fetchone() == {"number": 0}
    assert [roost.get_job(job_id) for job_id in job_ids] == before
    return job_ids


def test_it_can_be_waited_for(roost: Roost, archived: list[int]) -> None:
    assert roost.wait_for(archived[0]).result == {"n": 1}
    with pytest.raises(JobFailed, match="ValueError: boom"):
        roost.wait_for(archived[1])
    assert roost.wait_for(archived[2], raise_on_failure=False).state == "cancelled"


def test_a_cancel_changes_nothing_and_says_how_it_ended(roost: Roost, archived: list[int]) -> None:
    assert [roost.cancel(job_id) for job_id in archived] == ["completed", "discarded", "cancelled"]


def test_it_is_not_retried(roost: Roost, archived: list[int]) -> None:
    for job_id, state in zip(archived, ["completed", "discarded", "cancelled"], strict=True):
        with pytest.raises(JobStateError, match=f"it was {state} and is in the archive; enqueue it anew") as refused:
            roost.retry(job_id)
        assert refused.value.state == state


def test_its_unique_key_is_free_and_it_is_found_as_a_parent(roost: Roost, archived: list[int]) -> None:
    child = roost.enqueue("a", depends_on=[archived[0]])
    assert roost.get_job(child).state == "available"


def test_an_id_that_is_in_neither_is_not_found(roost: Roost, archived: list[int]) -> None:
    for operation in (roost.get_job, roost.cancel, roost.retry, roost.wait_for):
        with pytest.raises(JobNotFoundError):
            operation(4711)
