"""While an old transaction is open PostgreSQL removes no deleted row: claims and promotions don't read them each time.

Measured in rows that PostgreSQL read of an index, dead ones included.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.system.conftest import StartDaemon
from tests.system.daemon import eventually
from tests.system.jobs import Jobs

DEAD = 300_000
TIMES = 30  # that each would be read
OFTEN = {"worker": {"poll_interval": 0.1}}


@pytest.fixture
def dead_rows(jobs: Jobs) -> Iterator[None]:
    """Before all jobs, in `ready` and `scheduled`; no vacuum removes them until the test is over."""
    with psycopg.connect(jobs.dsn) as pin:
        pin.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        pin.execute("SELECT count(*) FROM roost.ready")
        rows = f"'2020-01-01Z'::timestamptz + n * interval '1 ms', -n FROM generate_series(1, {DEAD}) AS n"
        jobs.query(f"INSERT INTO roost.ready (queue, priority, scheduled_at, job_id) SELECT 'default', 0, {rows}")
        jobs.query(f"INSERT INTO roost.scheduled (queue, priority, scheduled_at, job_id) SELECT 'default', 0, {rows}")
        jobs.query("DELETE FROM roost.ready")
        jobs.query("DELETE FROM roost.scheduled")
        yield
        pin.rollback()


def _scans(jobs: Jobs, index: str) -> tuple[int, int]:
    """Of an index, as far as the daemon's connections have told: how often it was scanned, and the rows read."""
    (row,) = jobs.query("SELECT idx_scan, idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = %s", index)
    return row["idx_scan"], row["idx_tup_read"]


def _read(jobs: Jobs, index: str, before: tuple[int, int], scans: int) -> int:
    """Rows read once the index was scanned so many times since."""
    eventually(lambda: _scans(jobs, index)[0] - before[0] >= scans, f"{scans} scans of {index}")
    return _scans(jobs, index)[1] - before[1]


def _assert_few_are_read(jobs: Jobs) -> None:
    jobs.wait(jobs.add("noop"), "completed")
    jobs.wait(jobs.add("noop"), "completed")
    ready, scheduled = _scans(jobs, "ready_pkey"), _scans(jobs, "scheduled_pkey")
    for _ in range(TIMES):
        jobs.wait(jobs.add("noop"), "completed")
    assert _read(jobs, "ready_pkey", ready, TIMES) < DEAD * TIMES / 2
    # A promotion scans twice: for what is due, and for what will be next.
    assert _read(jobs, "scheduled_pkey", scheduled, 2 * TIMES) < DEAD * TIMES / 2


@pytest.mark.usefixtures("dead_rows")
def test_dead_rows_are_read_a_few_times_only_and_whatever_comes_late_is_found(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    first = start_daemon(OFTEN)
    jobs.wait_all(jobs.add_many(2500, "noop"))  # past what is looked through again
    _assert_few_are_read(jobs)
    first.stop()
    start_daemon(OFTEN)
    _assert_few_are_read(jobs)

    early = jobs.add("noop", priority=-1)
    late = jobs.add("noop")
    jobs.wait_all([early, late, _add_before_all(jobs, "ready"), _add_before_all(jobs, "scheduled")])


@pytest.mark.usefixtures("dead_rows")
def test_what_comes_late_is_found_by_a_pool_without_room_in_any_poll(start_daemon: StartDaemon, jobs: Jobs) -> None:
    waiting = jobs.add_many(1000, "sleep", {"seconds": 0.5})
    start_daemon({"pools": {"default": {"concurrency": 1}}})
    jobs.wait_all(waiting[:6])  # past them, and with two looks that were dear
    jobs.wait(_add_before_all(jobs, "ready"), "completed")
    assert jobs.count("available") > 500


def _add_before_all(jobs: Jobs, table: str) -> int:
    """A job as if its transaction had begun before those of all that were claimed."""
    row = (
        "INSERT INTO roost.job_rows (queue, task, scheduled_at) VALUES ('default', 'noop', '2019-01-01Z')"
        " RETURNING queue, priority, scheduled_at, id"
    )
    insert = f"INSERT INTO roost.{table} (queue, priority, scheduled_at, job_id) SELECT * FROM job RETURNING job_id"
    (added,) = jobs.query(f"WITH job AS ({row}) {insert}")
    return int(added["job_id"])
