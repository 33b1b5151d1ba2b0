"""Behind a real PgBouncer in transaction mode, where each transaction may run on another server connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import psycopg
import pytest

from roost_client import AsyncRoost, JobInsert, JobOutcome, Roost
from tests.bouncer import Bouncer, needs_pgbouncer
from tests.client.hand import Hand

Jobs = Callable[[], list[dict[str, Any]]]
pytestmark = needs_pgbouncer


@pytest.fixture
def pooled(bouncer: Bouncer) -> str:
    """The DSN that leads through PgBouncer to the test's database."""
    return bouncer.dsn


def test_a_client_of_its_own_connections_works(pooled: str, jobs: Jobs) -> None:
    with Roost(pooled) as roost, Roost(pooled) as other:
        for n in range(20):
            client = (roost, other)[n % 2]
            job_id = client.enqueue("a", args={"n": n}, tags=["x"])
            assert client.get_job(job_id).args == {"n": n}
        assert roost.enqueue_many([JobInsert("b")] * 10) == 10
        assert other.cancel(job_id) == "cancelled"
        assert other.retry(job_id) == "cancelled"
        roost.setup_schema()
        with roost._connections.borrow() as own:
            assert own.prepare_threshold is None
    assert len(jobs()) == 30


def test_a_transaction_of_the_caller_works(pooled: str, jobs: Jobs) -> None:
    # What an application behind PgBouncer sets anyway.
    with (
        psycopg.connect(pooled, prepare_threshold=None) as one,
        psycopg.connect(pooled, prepare_threshold=None) as two,
    ):
        for n in range(20):
            conn = (one, two)[n % 2]
            Roost("host=/nonexistent").enqueue("a", args={"n": n}, conn=conn)
            if n % 4 < 2:
                conn.commit()
            else:
                conn.rollback()
    assert [row["args"]["n"] for row in jobs()] == [n for n in range(20) if n % 4 < 2]


def test_a_job_is_waited_for_by_polling_and_nothing_listens_on_a_shared_server(pooled: str, dsn: str) -> None:
    with (
        Roost(pooled) as roost,
        psycopg.connect(dsn, autocommit=True) as observer,
        ThreadPoolExecutor(20) as pool,
    ):
        job_ids = [roost.enqueue("a") for _ in range(20)]
        futures = [pool.submit(roost.wait_for, job_id, poll_interval=0.1, timeout=60) for job_id in job_ids]
        with closing(Hand(dsn)) as hand:
            for n, job_id in enumerate(job_ids):
                hand.complete(job_id, result=n)
        assert [future.result(30).result for future in futures] == list(range(20))
        awaited = observer.execute("SELECT count(*) FROM roost.job_rows WHERE awaited").fetchone()
        assert awaited == (0,)  # so no end of theirs was told, which nobody would have heard

        async def main() -> JobOutcome:
            async with AsyncRoost(pooled) as client:
                return await client.wait_for(job_ids[0], poll_interval=0.1)

        assert asyncio.run(main()).result == 0


def test_async_works(pooled: str, jobs: Jobs) -> None:
    async def main() -> None:
        async with AsyncRoost(pooled) as roost:
            await asyncio.gather(*[roost.enqueue("a", args={"n": n}) for n in range(50)])

    asyncio.run(main())
    assert len(jobs()) == 50
