"""Archives jobs that ended long ago, clears old results, and empties the archive.

In batches of up to 1,000 rows, each committed by itself, with a pause after each that is as long as it took: so however
much there is to do, it takes half of one connection. Every master does it, and they share the work.

The jobs are found by spans, 10,000 ids in a row: of each the database keeps what there was at the last look, so that a
round reads a row for each span, and jobs only where some are old enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime

import structlog
from psycopg import AsyncConnection

from roostd.config import WorkerConfig
from roostd.master.database import Link
from roostd.store import statements

BATCH_SIZE = 1000  # as it stands in the statements
_log = structlog.get_logger()


async def tidy(link: Link, settings: WorkerConfig) -> None:
    """One round. Raises DatabaseGone, and psycopg's errors of a statement."""
    archived = cleared = deleted = 0
    archive_after, result_ttl = settings.archive_after_seconds, settings.result_ttl_seconds
    if archive_after is not None or result_ttl is not None:
        since: datetime | None = None
        while True:
            spans, at = await link.run(
                lambda conn, since=since: statements.list_spans(  # type: ignore[misc]
                    conn, archive_after=archive_after, result_ttl=result_ttl, since=since
                )
            )
            since = since or at
            if not spans:
                break
            for span in spans:
                if archive_after is not None:
                    archived += await _all(link, lambda conn, s=span: statements.archive(conn, s, archive_after))  # type: ignore[misc]
                if result_ttl is not None:
                    cleared += await _all(link, lambda conn, s=span: statements.clear_results(conn, s, result_ttl))  # type: ignore[misc]
                await link.run(lambda conn, s=span: statements.look_at_span(conn, s))  # type: ignore[misc]
    if result_ttl is not None:
        cleared += await _all(link, lambda conn: statements.clear_archived_results(conn, result_ttl))
    if settings.archive_delete_after_seconds is not None:
        deleted = await _delete(link, settings.archive_delete_after_seconds)
    if archived or cleared or deleted:
        _log.info("housekeeping.done", archived=archived, results_cleared=cleared, deleted=deleted)


async def _all(link: Link, batch: Callable[[AsyncConnection], Awaitable[int]]) -> int:
    """Runs a batch until it finds less than it could take; returns how many in all."""
    loop = asyncio.get_running_loop()
    total = 0
    while True:
        began_at = loop.time()
        done = await link.run(batch)
        total += done
        if done < BATCH_SIZE:
            return total
        await asyncio.sleep(loop.time() - began_at)


async def _delete(link: Link, age: float) -> int:
    since: datetime | None = None

    async def batch(conn: AsyncConnection) -> int:
        nonlocal since
        deleted, last_at = await statements.delete_archived(conn, age, since)
        since = last_at or since
        return deleted

    return await _all(link, batch)
