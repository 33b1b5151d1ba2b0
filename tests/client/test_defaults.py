"""The module's own enqueue and enqueue_many: which database they use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import roost_client
from roost_client import JobInsert, RoostError, defaults, job

Jobs = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(defaults, "_client", None)
    yield
    if defaults._client is not None:
        defaults._client.close()


def test_configure_sets_the_database(dsn: str, jobs: Jobs) -> None:
    roost_client.configure(dsn)
    assert roost_client.enqueue("a", args={"n": 1}) > 0
    assert roost_client.enqueue_many([JobInsert("b"), JobInsert("c")]) == 2
    assert [row["task"] for row in jobs()] == ["a", "b", "c"]


@pytest.mark.parametrize("variable", ["ROOST_DSN", "DATABASE_URL"])
def test_the_environment_is_read_at_the_first_need(
    dsn: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", "host=/nonexistent")
    monkeypatch.setenv("ROOST_DSN", "")
    monkeypatch.setenv(variable, dsn)
    roost_client.enqueue("a")
    assert len(jobs()) == 1


def test_configure_wins_over_the_environment(dsn: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOST_DSN", "host=/nonexistent")
    roost_client.configure(dsn)
    roost_client.enqueue("a")
    assert len(jobs()) == 1


def test_configure_again_changes_the_database(dsn: str, jobs: Jobs) -> None:
    roost_client.configure("host=/nonexistent")
    roost_client.configure(dsn)
    roost_client.enqueue("a")
    assert len(jobs()) == 1


def test_without_any_dsn_the_error_says_how_to_set_one() -> None:
    with pytest.raises(RoostError, match=r"roost_client\.configure\(dsn\).*ROOST_DSN.*DATABASE_URL"):
        roost_client.enqueue("a")
    with pytest.raises(RoostError, match="no database"):
        roost_client.enqueue_many([JobInsert("a")])


def test_the_default_handlers_give_their_defaults(dsn: str, jobs: Jobs) -> None:
    @job("test_defaults.send", queue="emails", timeout_seconds=7)
    def send() -> None: ...

    roost_client.configure(dsn)
    roost_client.enqueue(send)
    roost_client.enqueue(send, queue="default")
    assert [(row["queue"], row["timeout_seconds"]) for row in jobs()] == [("emails", 7), ("default", 7)]
