"""A connection of the daemon's is what it has to be, whatever the role, the database or other people have set."""

from __future__ import annotations

import asyncio

from psycopg import AsyncConnection

from roost_client import JobState
from roostd.master.database import Link
from roostd.store import statements
from tests.store.rows import add_worker, claim, connect, enqueue, job_row, settlement


def test_no_function_that_others_have_put_into_the_search_path_is_called(dsn: str) -> None:
    """One whose parameters fit better than those of PostgreSQL's own would be, with the rights of the daemon."""

    async def main() -> None:
        link = Link(dsn, "write", session=statements.WRITE_SESSION)
        async with await connect(dsn) as conn:
            await conn.execute(
                "CREATE FUNCTION public.jsonb_build_object(text, integer, text, timestamptz) RETURNS jsonb"
                " LANGUAGE plpgsql AS $$ BEGIN RAISE 'called'; END $$"
            )
            worker_id = await add_worker(conn)
            await enqueue(conn)
            (job,) = await claim(conn, worker_id)
            failed = settlement(job.id, job.lease, JobState.DISCARDED, error="boom")

            async def settle(own: AsyncConnection) -> None:
                await statements.settle(own, [failed], 10)

            try:
                await link.run(settle)
            finally:
                await link.close()
            assert (await job_row(conn, job.id))["errors"][0]["error"] == "boom"

    asyncio.run(main())
