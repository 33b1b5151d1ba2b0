"""docs/privileges.md: what it grants an application is enough to enqueue."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from roost_client import JobInsert, Roost

DOCUMENT = Path(__file__).parents[2] / "docs" / "privileges.md"


@pytest.mark.parametrize("is_throttled", [False, True])
def test_an_application_may_enqueue_with_what_the_document_grants(dsn: str, is_throttled: bool) -> None:
    grants = re.search(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert grants is not None
    with psycopg.connect(dsn) as conn, Roost(dsn) as roost:
        conn.execute("CREATE ROLE app")
        conn.execute(grants[1].encode())
        if is_throttled:
            conn.execute("INSERT INTO roost.throttles (task, rate_per_minute) VALUES ('a', 1)")
        conn.execute("SET LOCAL ROLE app")
        roost.enqueue("a", conn=conn)
        assert roost.enqueue_many([JobInsert("a")] * 3, conn=conn) == 3
        conn.execute("RESET ROLE")
        where = conn.execute("SELECT count(*) FROM roost.throttled").fetchone()
        assert where == (4 if is_throttled else 0,)
        conn.rollback()  # a role is the whole server's
