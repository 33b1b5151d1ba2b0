"""What every test may ask for: a PostgreSQL server of this run's own, and fresh databases on it.

ROOST_TEST_PG_VERSION chooses the major version. A test that asks for the server is marked `database` by
itself, one in tests/system `daemon`, so that `make check` can leave them out. Hypothesis tries the same examples in
every run; `--hypothesis-profile=explore --timeout=0` (PYTEST_ARGS of make) has it look for others, and for longer.
"""

import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from hypothesis import settings
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roostd.embedded import EmbeddedPostgres
from tests.bouncer import Bouncer

TESTS = Path(__file__).parent

# Losing the data is fine here, waiting for the disk is not.
FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "200",
}

settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", max_examples=5_000, deadline=None)
settings.load_profile("fixed")

_numbers = itertools.count(1)


for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    # By nohup, or a shell that put the tests in the background. What they start would inherit that, but no handler.
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_configure() -> None:
    # A developer's own database must not be reached by a test that forgot to say which one it means.
    for name in list(os.environ):
        ours = name.startswith(("PG", "ROOST_")) or name == "DATABASE_URL"
        if ours and name != "ROOST_TEST_PG_VERSION":
            del os.environ[name]


@pytest.hookimpl(tryfirst=True)  # before -m selects by the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder == "system":
            item.add_marker("daemon")
        if folder == "embedded" or "postgres" in getattr(item, "fixturenames", ()):
            item.add_marker("database")


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The server of this run; shared, so a test that stops or breaks a server starts one of its own."""
    version = os.environ.get("ROOST_TEST_PG_VERSION")
    with (
        tempfile.TemporaryDirectory(prefix="roost-test-") as directory,
        EmbeddedPostgres(directory, version=int(version) if version else None, settings=FAST) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """The name of a database that holds the current schema and no rows, to copy from."""
    from roost_client import schema  # here, so that tests without a database don't need it to import

    name = "template_roost"
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with psycopg.connect(make_conninfo(postgres.dsn, dbname=name)) as conn:
        schema.apply_migrations(conn)
    return name


@pytest.fixture
def dsn(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The DSN of a fresh database with the schema applied."""
    with _database(postgres, template) as dsn:
        yield dsn


@pytest.fixture
def empty_dsn(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The DSN of a fresh database with nothing in it."""
    with _database(postgres, "template1") as dsn:
        yield dsn


@pytest.fixture
def bouncer(dsn: str) -> Iterator[Bouncer]:
    """A PgBouncer before the test's database; only for tests marked `needs_pgbouncer`."""
    with tempfile.TemporaryDirectory(prefix="roost-bouncer-") as folder:
        with closing(Bouncer(dsn, Path(folder))) as bouncer:
            bouncer.start()
            yield bouncer


@contextmanager
def _database(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
    yield make_conninfo(postgres.dsn, dbname=name)
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
