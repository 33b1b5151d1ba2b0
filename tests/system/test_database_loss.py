"""The database crashes, drops our connections, or stops answering: nothing of ours is restarted, no outcome is lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from roost_client import JobInsert
from roostd.embedded import EmbeddedPostgres
from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon, eventually
from tests.system.jobs import Jobs
from tests.system.proxy import Proxy

PURPOSES = ("claim", "write", "heartbeat", "listen")
OUTAGE_SECONDS = 10.0


def test_a_crash_of_the_database_under_load_loses_and_repeats_nothing(
    own_postgres: EmbeddedPostgres, folder: Path
) -> None:
    with closing(Jobs(own_postgres.dsn)) as jobs, closing(Daemon(folder / "daemon", own_postgres.dsn)) as daemon:
        jobs.told = daemon.told
        daemon.start().wait_ready()
        processes = set(daemon.processes())
        add_load(jobs, 4000)
        held = jobs.add("hold", {"key": "held"}, priority=-1)
        eventually(lambda: jobs.count("completed") > 300, "load")
        daemon.wait_started("held")
        own_postgres.stop("immediate")
        daemon.wait_for("db.gone")
        daemon.let_go("held")  # it completes while there is no database to tell
        time.sleep(OUTAGE_SECONDS)
        own_postgres.start()
        eventually(lambda: jobs.count("completed") == 4001, lambda: f"end of all jobs. {daemon.told()}")
        assert jobs.get(held).attempt == 1
        assert_each_ran_once(daemon, jobs, 4000)
        assert set(daemon.processes()) == processes
        assert jobs.wait(jobs.add("noop")).state == "completed"
        assert daemon.stop() == 0


def test_connections_that_are_terminated_under_load_are_made_again(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"database": {"listen_reconnect_delay": 0.05}})
    processes = set(daemon.processes())
    add_load(jobs, 4000)
    for _ in range(3):
        for purpose in PURPOSES:
            eventually(lambda purpose=purpose: terminate(jobs, purpose), f"connection to {purpose}")  # type: ignore[misc]
            jobs.add("noop")
    assert jobs.count("completed") < 4000, "the load ended before the last connection did"
    eventually(lambda: jobs.count("completed") == 4012, lambda: f"end of all jobs. {daemon.told()}")
    assert_each_ran_once(daemon, jobs, 4000)
    assert set(daemon.processes()) == processes
    eventually(lambda: len(connections(jobs)) == 4, lambda: f"four connections, but {connections(jobs)}")


def test_a_listening_connection_that_is_dead_but_open_is_noticed(
    start_daemon: StartDaemon, jobs: Jobs, folder: Path
) -> None:
    with Proxy(jobs.dsn, folder) as proxy:
        daemon = start_daemon({"database": {"dsn": proxy.dsn}})
        daemon.wait_for("listener.connected")
        proxy.freeze("roostd listen")
        assert jobs.wait(jobs.add("noop")).attempt == 1  # found by the poll meanwhile
        daemon.wait_for("listener.lost")
        since = daemon.mark()
        proxy.thaw()
        daemon.wait_for("listener.connected", since=since)


def test_outcomes_wait_for_a_database_that_does_not_answer(start_daemon: StartDaemon, jobs: Jobs, folder: Path) -> None:
    with Proxy(jobs.dsn, folder) as proxy:
        daemon = start_daemon({"database": {"dsn": proxy.dsn}})
        held = [jobs.add("hold", {"key": key}) for key in ("one", "two")]
        daemon.wait_started("one", "two")
        proxy.freeze()
        daemon.let_go("one", "two")
        daemon.wait_for("worker.heartbeat_failed")
        assert {jobs.get(job_id).state for job_id in held} == {"executing"}
        proxy.thaw()
        jobs.wait_all(held)
        assert [jobs.get(job_id).attempt for job_id in held] == [1, 1]


@pytest.fixture
def stopped_daemon(own_postgres: EmbeddedPostgres, folder: Path) -> Iterator[Daemon]:
    with closing(Daemon(folder / "daemon", own_postgres.dsn)) as daemon:
        yield daemon


def test_a_daemon_stops_in_time_without_its_database_and_its_successor_runs_what_it_could_not_tell(
    own_postgres: EmbeddedPostgres, stopped_daemon: Daemon
) -> None:
    daemon = stopped_daemon.start().wait_ready()
    with closing(Jobs(own_postgres.dsn)) as jobs:
        held = jobs.add("hold", {"key": "held"})
        daemon.wait_started("held")
        own_postgres.stop("immediate")
        daemon.let_go("held")
        started_at = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started_at < 20
        daemon.wait_for("outcomes.unwritten", pending=1)
        own_postgres.start()
        daemon.start().wait_ready()
        assert jobs.wait(held).attempt == 2


def test_a_daemon_that_starts_before_its_database_waits_for_it(
    own_postgres: EmbeddedPostgres, stopped_daemon: Daemon
) -> None:
    own_postgres.stop()
    stopped_daemon.write_config({"database": {"startup_max_retries": 1000}})
    stopped_daemon.start().wait_for("db.unreachable")
    own_postgres.start()
    stopped_daemon.wait_ready()


def add_load(jobs: Jobs, number: int) -> None:
    """Jobs that each write their number: some hundreds a second."""
    jobs.roost.enqueue_many([JobInsert("note", {"line": f"job {each}", "seconds": 0.002}) for each in range(number)])


def assert_each_ran_once(daemon: Daemon, jobs: Jobs, number: int) -> None:
    ran = Counter(line for line in daemon.notes() if line.startswith("job "))
    assert [line for line, times in ran.items() if times != 1] == []
    assert len(ran) == number
    assert jobs.query("SELECT id, attempt, errors::text FROM roost.jobs WHERE attempt <> 1") == []


def connections(jobs: Jobs) -> list[str]:
    rows = jobs.query(
        "SELECT application_name FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'roostd %%' AND true = %s",
        True,
    )
    return [row["application_name"] for row in rows]


def terminate(jobs: Jobs, purpose: str) -> bool:
    with psycopg.connect(jobs.dsn, autocommit=True) as conn:
        cursor = conn.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = %s",
            (f"roostd {purpose}",),
        )
        return cursor.fetchall() == [(True,)]
