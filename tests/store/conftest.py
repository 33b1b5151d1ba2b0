"""A database that the tests of one module share, each in a transaction that it rolls back."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roostd.embedded import EmbeddedPostgres


@pytest.fixture(scope="module")
def shared_dsn(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """For many small tests that commit nothing: a database of its own costs a test more than all that it does."""
    name = sql.Identifier("store_shared")
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(template)))
    yield make_conninfo(postgres.dsn, dbname="store_shared")
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))
