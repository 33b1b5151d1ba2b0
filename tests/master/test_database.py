"""What the master sets for its connections, on direct ones and behind a real PgBouncer."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict

from roostd.master.database import DatabaseGone, Link
from roostd.store import statements
from tests.bouncer import Bouncer, needs_pgbouncer

pytestmark = needs_pgbouncer

SETTINGS = (
    "enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "enable_material", "jit",
    "max_parallel_workers_per_gather", "lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout",
    "TimeZone", "transaction_isolation",
)  # fmt: skip


async def read_settings(conn: AsyncConnection) -> dict[str, Any]:
    """As a statement of the daemon finds them."""
    cursor = await conn.execute(
        "SELECT name, current_setting(name) FROM unnest(%(names)s::text[]) AS name",
        {"names": list(SETTINGS)},
        prepare=True,
    )
    return dict(await cursor.fetchall())


async def read_settings_in_block(conn: AsyncConnection) -> dict[str, Any]:
    async with conn.transaction():
        return await read_settings(conn)


@pytest.fixture
def odd_database(dsn: str) -> str:
    """One whose defaults would break or stall what the daemon does."""
    name = conninfo_to_dict(dsn)["dbname"]
    with psycopg.connect(dsn, autocommit=True) as conn:
        for setting in (
            "default_transaction_isolation = 'serializable'", "timezone = 'Asia/Tokyo'", "statement_timeout = '1h'",
            "lock_timeout = '1h'", "idle_in_transaction_session_timeout = '1h'",
        ):  # fmt: skip
            conn.execute(f"ALTER DATABASE {name} SET {setting}".encode())
    return dsn


@pytest.mark.parametrize("read", [read_settings, read_settings_in_block])
def test_behind_a_pooler_each_transaction_has_the_settings_of_a_session_and_leaves_none(
    odd_database: str, bouncer: Bouncer, read: Any
) -> None:
    async def main() -> None:
        direct = Link(odd_database, "direct", session=statements.WRITE_SESSION)
        links = [Link(bouncer.dsn, f"pooled {n}", session=statements.WRITE_SESSION) for n in range(4)]
        expected = await direct.run(read)
        assert expected["lock_timeout"] == "50ms"
        for _ in range(10):  # often enough for a statement to be prepared, were it not for the pooler
            assert await asyncio.gather(*(link.run(read) for link in links)) == [expected] * 4
        assert not direct.is_pooled
        assert all(link.is_pooled for link in links)
        for link in (direct, *links):
            await link.close()

    asyncio.run(main())
    with psycopg.connect(bouncer.dsn, autocommit=True, prepare_threshold=None) as conn:
        left = conn.execute("SELECT current_setting('lock_timeout'), current_setting('enable_seqscan')").fetchone()
        assert left == ("1h", "on")
        assert conn.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


def test_behind_a_pooler_an_error_of_a_statement_leaves_the_connection_usable(bouncer: Bouncer) -> None:
    async def main() -> None:
        link = Link(bouncer.dsn, "test")
        for _ in range(2):
            with pytest.raises(psycopg.errors.DivisionByZero):
                await link.run(lambda conn: conn.execute("SELECT 1 / %(zero)s", {"zero": 0}))
            with pytest.raises(psycopg.DataError):
                await link.run(lambda conn: conn.execute("SELECT %(text)s", {"text": "\0"}))
        assert link.connects == 1
        bouncer.kill()
        with pytest.raises(DatabaseGone):
            await link.run(read_settings)
        bouncer.start()
        await link.run(read_settings)
        assert link.is_pooled
        await link.close()

    asyncio.run(main())
