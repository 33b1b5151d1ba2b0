"""Fixtures for tests of an application that enqueues jobs; pytest loads this by itself where roostd is installed.

roost_dsn    the database of this run: one that starts and ends with it (extra `embedded`), or that of --roost-dsn
roost_conn   a connection to it, in a transaction that is rolled back when the test ends
roost        a Roost whose operations take part in that transaction

Every suite in an environment loads this, so it imports nothing but pytest before a test asks for a fixture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import psycopg

    from roost_client import Roost

# Losing the data is fine here, waiting for the disk is not.
_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "database for the fixtures of roost_client.testing, which bring its schema roost up to date (default: one of"
    parser.getgroup("roost").addoption("--roost-dsn", metavar="DSN", help=f"{what} this run's own)")
    parser.addini("roost_dsn", f"{what} the run's own)", default="")


@pytest.fixture(scope="session")
def roost_dsn(pytestconfig: pytest.Config) -> Iterator[str]:
    """The DSN of a database with the schema roost, for the whole run."""
    from roost_client import Roost

    given = pytestconfig.getoption("--roost-dsn") or pytestconfig.getini("roost_dsn")
    if given:
        with Roost(given) as roost:
            roost.setup_schema()
        yield given
        return
    from roostd.embedded import EmbeddedPostgres

    with tempfile.TemporaryDirectory(prefix="roost-pytest-") as directory:
        with EmbeddedPostgres(directory, settings=_FAST) as server:
            with Roost(server.dsn) as roost:
                roost.setup_schema()
            yield server.dsn


@pytest.fixture
def roost_conn(roost_dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection in a transaction of the test's own, which is rolled back."""
    import psycopg

    with psycopg.connect(roost_dsn, client_encoding="UTF8") as conn:
        yield conn
        if not conn.closed:
            conn.rollback()


@pytest.fixture
def roost(roost_dsn: str, roost_conn: psycopg.Connection[Any]) -> Iterator[Roost]:
    """A client that is part of the test's transaction where no other `conn` is passed."""
    from roost_client.testing import client_on

    with client_on(roost_conn, roost_dsn) as client:
        yield client
