"""What the client's tests share: a client on a fresh database, and a look at what is stored."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from roost_client import AsyncRoost, HandlerRegistry, Roost


@pytest.fixture
def registry() -> HandlerRegistry:
    return HandlerRegistry()


@pytest.fixture
def roost(dsn: str, registry: HandlerRegistry) -> Iterator[Roost]:
    with Roost(dsn, registry=registry) as client:
        yield client


@pytest.fixture
def conn(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """The application's own connection, not in autocommit."""
    with psycopg.connect(dsn) as connection:
        yield connection


@pytest.fixture
def observer(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Sees only what is committed."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as connection:
        yield connection


@pytest.fixture
def jobs(observer: psycopg.Connection[dict[str, Any]]) -> Callable[[], list[dict[str, Any]]]:
    """Reads all committed jobs, in order of id."""
    return lambda: observer.execute("SELECT * FROM roost.jobs ORDER BY id").fetchall()


@pytest.fixture
def notified() -> Callable[[psycopg.Connection[Any]], list[tuple[str, str]]]:
    """Reads what a connection was notified of, as (channel, payload), by transactions that have committed."""

    def read(listener: psycopg.Connection[Any]) -> list[tuple[str, str]]:
        listener.execute("SELECT 1")  # a server sends what is due before it says that it is ready again
        return [(notify.channel, notify.payload) for notify in listener.notifies(timeout=0)]

    return read


class Blocking:
    """AsyncRoost as if it were Roost: each call is a run of one event loop."""

    def __init__(self, client: AsyncRoost, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        assert inspect.iscoroutinefunction(method)
        return lambda *args, **keywords: self._runner.run(method(*args, **keywords))


@pytest.fixture(params=["Roost", "AsyncRoost"])
def client(request: pytest.FixtureRequest, dsn: str) -> Iterator[Roost]:
    """Either client; a test that takes it runs on both."""
    if request.param == "Roost":
        with Roost(dsn) as roost:
            yield roost
    else:
        with asyncio.Runner() as runner:
            wrapped: Any = Blocking(AsyncRoost(dsn), runner)
            yield wrapped
            wrapped.close()
