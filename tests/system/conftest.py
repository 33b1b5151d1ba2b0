"""A daemon, and the jobs it is given: each test has its own, or a module's tests share one (`shared_…`)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from roostd.embedded import EmbeddedPostgres
from tests.conftest import FAST
from tests.system.daemon import Daemon, Settings
from tests.system.jobs import Jobs

StartDaemon = Callable[..., Daemon]

_numbers = itertools.count(1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a name short enough for the sockets in it."""
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        yield Path(directory).resolve()


@pytest.fixture
def jobs(dsn: str) -> Iterator[Jobs]:
    with closing(Jobs(dsn)) as jobs:
        yield jobs


@pytest.fixture
def start_daemon(folder: Path, dsn: str, jobs: Jobs) -> Iterator[StartDaemon]:
    """Starts daemons on the test's database, and ends them; waits until each is ready unless told otherwise."""
    with ExitStack() as stack:

        def start(settings: Settings | None = None, *options: str, ready: bool = True, **keywords: Any) -> Daemon:
            daemon = Daemon(folder / f"daemon-{next(_numbers)}", dsn, settings)
            stack.callback(daemon.close)
            jobs.told = daemon.told
            daemon.start(*options, **keywords)
            return daemon.wait_ready() if ready else daemon

        yield start


@pytest.fixture
def own_postgres() -> Iterator[EmbeddedPostgres]:
    """A server that the test may stop; its database has the current schema."""
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        with EmbeddedPostgres(directory, settings=FAST) as server:
            from roost_client import Roost

            with Roost(server.dsn) as roost:
                roost.setup_schema()
            yield server


@pytest.fixture(scope="module")
def shared_jobs(postgres: EmbeddedPostgres, template: str) -> Iterator[Jobs]:
    with _database(postgres, template) as dsn, closing(Jobs(dsn)) as jobs:
        yield jobs


@pytest.fixture(scope="module")
def shared_daemon(request: pytest.FixtureRequest, shared_jobs: Jobs) -> Iterator[Daemon]:
    """A daemon with the settings that the module has in SETTINGS."""
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        daemon = Daemon(Path(directory).resolve(), shared_jobs.dsn, getattr(request.module, "SETTINGS", None))
        shared_jobs.told = daemon.told
        with closing(daemon.start()):
            yield daemon.wait_ready()


@contextmanager
def _database(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"system_{next(_numbers)}"
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
    yield make_conninfo(postgres.dsn, dbname=name)
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
