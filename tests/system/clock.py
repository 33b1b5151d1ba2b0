"""The database's clock, which a test may set ahead, so that it need not wait for the full minute.

The test puts a now() in the place of PostgreSQL's: each database has a pg_catalog of its own. The defaults of columns
know the function by its number, and keep the server's own time.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

MINUTE = timedelta(minutes=1)


class DatabaseClock:
    def __init__(self, dsn: str) -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("CREATE SCHEMA clock")
            conn.execute("CREATE TABLE clock.setting AS SELECT interval '0' AS ahead")
            conn.execute("SET allow_system_table_mods = on")
            conn.execute("ALTER FUNCTION pg_catalog.now() RENAME TO server_now")
            conn.execute(
                "CREATE FUNCTION pg_catalog.now() RETURNS timestamptz LANGUAGE sql STABLE AS"
                " 'SELECT pg_catalog.server_now() + (SELECT ahead FROM clock.setting)'"
            )
        self.dsn = make_conninfo(dsn, options="-c timezone=UTC")

    def now(self) -> datetime:
        (row,) = self._run("SELECT now()")
        time = row[0]
        assert isinstance(time, datetime)
        return time

    def set_ahead(self, by: timedelta) -> None:
        self._run("UPDATE clock.setting SET ahead = ahead + %s RETURNING 1", by)

    def approach_minute(self, seconds: float = 1.0) -> datetime:
        """Sets the clock to so many seconds before the next full minute, or leaves it if it is closer; that minute."""
        now = self.now()
        minute = now.replace(second=0, microsecond=0) + MINUTE
        ahead = minute - now - timedelta(seconds=seconds)
        if ahead > timedelta(0):
            self.set_ahead(ahead)
        return minute

    def _run(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as conn:
            return conn.execute(statement.encode(), parameters or None).fetchall()
