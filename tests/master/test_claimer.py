"""The claimer tells dependents of ends that no worker has told it of."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from roostd.core.demand import PROMOTE_BATCH
from roostd.master.claimer import Claimer
from roostd.master.database import Link
from roostd.store import statements
from tests.store.rows import connect, enqueue, value


def test_all_dependents_of_a_cancelled_job_are_told_at_one_poll(dsn: str) -> None:
    """However many: a batch at each poll would take the longer the rarer these are."""

    async def main() -> None:
        link = Link(dsn, "claim", session=statements.SESSION)
        claimer = Claimer(
            link,
            pools={},
            worker_id=uuid4,
            poll_interval=lambda: 3600.0,
            retry_seconds=0.1,
            on_claimed=lambda *_: None,
            on_unknown_claims=lambda _: None,
            known_leases=set,
            may_claim=lambda: True,
            is_deaf=lambda: False,
        )
        async with await connect(dsn) as conn, asyncio.timeout(60):
            (parent,) = await enqueue(conn)
            await enqueue(conn, 2 * PROMOTE_BATCH + 1, depends_on=[parent])
            await conn.execute("SELECT roost.cancel(%s)", (parent,))
            task = asyncio.create_task(claimer.run())
            try:
                while await value(conn, "SELECT count(*) FROM roost.blocked"):
                    await asyncio.sleep(0.01)
            finally:
                claimer.stop()
                await task
                await link.close()

    asyncio.run(main())
