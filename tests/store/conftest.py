"""Databases that tests of one module share, because making one costs more than most tests do with it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roostd.embedded import EmbeddedPostgres


@pytest.fixture(scope="module")
def shared_dsn(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """For tests that commit nothing."""
    name = sql.Identifier("store_shared")
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(name, sql.Identifier(template)))
    yield make_conninfo(postgres.dsn, dbname="store_shared")
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def clean_dsn(shared_dsn: str) -> str:
    """For tests that leave rows behind, and nothing else."""
    with psycopg.connect(shared_dsn, autocommit=True) as conn:
        conn.execute(
            "TRUNCATE roost.job_rows, roost.ready, roost.scheduled, roost.claims, roost.unique_keys, roost.blocked,"
            " roost.dependencies, roost.cancelled_dependents, roost.ended_parents, roost.queues, roost.workers,"
            " roost.idle_workers, roost.jobs_archive, roost.spans, roost.throttles, roost.throttled,"
            " roost.throttle_starts"
        )
    return shared_dsn
