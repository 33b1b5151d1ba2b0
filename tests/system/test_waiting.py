"""wait_for against the real daemon: results of every size, ends of every kind, a thousand waiters."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from roost_client import AsyncRoost, JobFailed, JobInsert, Roost
from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon, eventually
from tests.system.jobs import Jobs

MIB = 1 << 20
LONG = 60.0  # a poll interval that no test outlasts


def test_a_result_of_a_mebibyte_is_kept_and_one_byte_more_is_a_failure(
    shared_daemon: Daemon, shared_jobs: Jobs
) -> None:
    largest = shared_jobs.add("sized_result", {"size_bytes": MIB})
    outcome = shared_jobs.roost.wait_for(largest, poll_interval=LONG)
    assert (outcome.state, outcome.errors, outcome.result) == ("completed", [], "x" * (MIB - 2))
    too_large = shared_jobs.add("sized_result", {"size_bytes": MIB + 1}, max_attempts=1)
    with pytest.raises(JobFailed, match=f"it takes {MIB + 1} bytes as JSON, more than max_result_bytes") as failed:
        shared_jobs.roost.wait_for(too_large, poll_interval=LONG)
    assert failed.value.state == "discarded"
    assert shared_jobs.get(too_large).result is None


@pytest.mark.parametrize("value", [None, 0, "", [], {"ü": [1.5, None, True]}])
def test_a_result_comes_back_as_it_was(shared_daemon: Daemon, shared_jobs: Jobs, value: Any) -> None:
    assert shared_jobs.roost.wait_for(shared_jobs.add("echo", {"value": value}), poll_interval=LONG).result == value


def test_every_end_wakes_the_waiter(shared_daemon: Daemon, shared_jobs: Jobs) -> None:
    fails = shared_jobs.add("fail", {"text": "no luck"}, max_attempts=2)
    with pytest.raises(JobFailed, match="discarded: ValueError: no luck"):
        shared_jobs.roost.wait_for(fails, poll_interval=LONG)
    crashes = shared_jobs.add("os_exit", {"status": 3}, max_attempts=1)
    with pytest.raises(JobFailed, match="discarded: WorkerCrash"):
        shared_jobs.roost.wait_for(crashes, poll_interval=LONG)
    late = shared_jobs.add("sleep", {"seconds": 60}, timeout_seconds=1, max_attempts=1)
    with pytest.raises(JobFailed, match="discarded: TimeoutError"):
        shared_jobs.roost.wait_for(late, poll_interval=LONG)
    parent = shared_jobs.add("hold", {"key": "parent"})
    child = shared_jobs.add("noop", depends_on=[parent])
    shared_daemon.wait_started("parent")
    with ThreadPoolExecutor(2) as pool:
        futures = [
            pool.submit(shared_jobs.roost.wait_for, id, poll_interval=LONG, raise_on_failure=False)
            for id in (parent, child)
        ]
        awaited = "SELECT 1 FROM roost.job_rows WHERE id = ANY (%s) AND awaited"
        eventually(lambda: len(shared_jobs.query(awaited, [parent, child])) == 2, "registered waiters")
        shared_jobs.roost.cancel(parent)
        assert [future.result(30).state for future in futures] == ["cancelled", "cancelled"]
    assert shared_jobs.get(child).errors[0]["error"].startswith("DependencyFailed")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as pool:
        yield pool


@pytest.mark.timeout(300)
def test_a_thousand_wait_while_the_daemon_works(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"pools": {"default": {"concurrency": 1}}})
    held = jobs.add("hold", {"key": "first"})  # so that all have begun to wait
    daemon.wait_started("first")
    jobs.roost.enqueue_many([JobInsert("echo", {"value": n}) for n in range(1000)])
    job_ids = [row["id"] for row in jobs.query("SELECT id FROM roost.jobs WHERE task = 'echo' ORDER BY id")]
    awaited = "SELECT count(*) AS number FROM roost.job_rows WHERE awaited"
    with Roost(jobs.dsn) as roost, ThreadPoolExecutor(500) as pool:
        futures = [pool.submit(roost.wait_for, job_id, poll_interval=LONG, timeout=120) for job_id in job_ids[:500]]

        async def wait_for_the_others() -> list[Any]:
            async with AsyncRoost(jobs.dsn) as client:
                waits = [client.wait_for(job_id, poll_interval=LONG, timeout=120) for job_id in job_ids[500:]]
                tasks = [asyncio.ensure_future(wait) for wait in waits]
                await asyncio.to_thread(
                    eventually, lambda: jobs.query(awaited) == [{"number": 1000}], "registered waiters"
                )
                waiting = (
                    "SELECT 1 FROM pg_stat_activity"
                    " WHERE application_name = 'roost_client waiting' AND datname = current_database()"
                )
                assert len(await asyncio.to_thread(jobs.query, waiting)) == 2
                daemon.let_go("first")
                return [outcome.result for outcome in await asyncio.gather(*tasks)]

        assert asyncio.run(wait_for_the_others()) == list(range(500, 1000))
        assert [future.result(60).result for future in futures] == list(range(500))
    jobs.wait(held)


@pytest.mark.timeout(300)
def test_no_end_is_missed_while_the_connection_is_killed_again_and_again(
    start_daemon: StartDaemon, jobs: Jobs, pool: ThreadPoolExecutor
) -> None:
    start_daemon()
    dice = random.Random(11)
    stopped = threading.Event()

    def kill() -> int:
        kills = 0
        while not stopped.wait(dice.random() * 0.2):
            kills += len(
                jobs.query(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'roost_client waiting' AND datname = current_database()"
                )
            )
        return kills

    with Roost(jobs.dsn) as roost:
        roost.wait_for(roost.enqueue("noop"), poll_interval=LONG)  # a first connection that fails is an error

        def run(number: int) -> Any:
            job_id = roost.enqueue("echo", args={"value": number})
            return roost.wait_for(job_id, poll_interval=LONG, timeout=120).result

        killer = pool.submit(kill)
        try:
            assert list(pool.map(run, range(400))) == list(range(400))
        finally:
            stopped.set()
        assert killer.result(30) > 3
