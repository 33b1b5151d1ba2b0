"""Migrations: once, by whoever comes first, and only on a schema this version knows."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from roost_client import AsyncRoost, Roost, SchemaError, schema
from roost_client.schema import Migration

Conn = psycopg.Connection[Any]


def described(dsn: str) -> list[tuple[Any, ...]]:
    """Every object of the schema with its definition."""
    with psycopg.connect(dsn) as conn:
        return conn.execute(
            """
            SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                   pg_get_expr(d.adbin, d.adrelid)
              FROM pg_class c
              JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
              LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
             WHERE c.relnamespace = 'roost'::regnamespace
            UNION ALL
            SELECT proname, pg_get_functiondef(oid), NULL, NULL, NULL
              FROM pg_proc WHERE pronamespace = 'roost'::regnamespace
            UNION ALL
            SELECT conname, pg_get_constraintdef(oid), NULL, NULL, NULL
              FROM pg_constraint WHERE connamespace = 'roost'::regnamespace
            UNION ALL
            SELECT name, checksum, version::text, NULL, NULL FROM roost.migrations
             ORDER BY 1, 2, 3"""
        ).fetchall()


def test_it_is_applied_once(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        assert [m.version for m in schema.apply_migrations(conn)] == [m.version for m in schema.migrations()]
        assert schema.apply_migrations(conn) == []
        schema.check(conn)
        assert {s.state for s in schema.status(conn)} == {"applied"}


def test_it_is_committed_on_return_unless_the_caller_is_in_a_transaction(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn) as conn, psycopg.connect(empty_dsn, autocommit=True) as other:
        conn.execute("SELECT 1")
        schema.apply_migrations(conn)
        assert {s.state for s in schema.status(other)} == {"pending"}
        conn.rollback()
        assert {s.state for s in schema.status(conn)} == {"pending"}
        conn.rollback()

        schema.apply_migrations(conn)
        assert conn.info.transaction_status == TransactionStatus.IDLE
        schema.check(other)


def test_it_takes_connections_of_any_make(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, row_factory=dict_row, cursor_factory=psycopg.ClientCursor) as conn:
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        assert schema.apply_migrations(conn)
        assert schema.apply_migrations(conn) == []
        schema.check(conn)


def test_ten_processes_at_once_apply_it_once(empty_dsn: str) -> None:
    program = f"""if True:
        import sys
        from roost_client import Roost
        with Roost({empty_dsn!r}) as roost:
            sys.stdin.read()
            roost.setup_schema()
            roost.enqueue("a")
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(10)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.close()  # all are let go together
    for process in processes:
        process.stdin = None
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0
    with psycopg.connect(empty_dsn) as conn:
        schema.check(conn)
        assert conn.execute("SELECT count(*) FROM roost.jobs").fetchone() == (10,)


def test_a_snapshot_taken_before_the_lock_does_not_hide_what_another_applied(empty_dsn: str) -> None:
    options = {**os.environ, "PGOPTIONS": r"-c default_transaction_isolation=repeatable\ read"}
    program = f"from roost_client import Roost; Roost({empty_dsn!r}).setup_schema()"
    with psycopg.connect(empty_dsn) as first, psycopg.connect(empty_dsn, autocommit=True) as observer:
        first.execute("SELECT 1")
        schema.apply_migrations(first)
        second = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, env=options)
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        while observer.execute(waiting).fetchone() is None:
            assert second.poll() is None
        first.commit()
        assert second.communicate(timeout=60)[1] == b""
        assert second.returncode == 0


def test_both_clients_set_it_up(empty_dsn: str) -> None:
    async def main() -> None:
        async with AsyncRoost(empty_dsn) as roost:
            await roost.setup_schema()
            await roost.setup_schema()
            await roost.enqueue("a")
            async with await psycopg.AsyncConnection.connect(empty_dsn) as conn:
                await roost.setup_schema(conn)

    asyncio.run(main())
    with Roost(empty_dsn) as roost, psycopg.connect(empty_dsn) as conn:
        roost.setup_schema()
        roost.setup_schema(conn)
        assert roost.status()["default"]["available"] == 1


def test_a_role_that_may_not_create_schemas_can_use_one_made_for_it(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        role = f"app_of_{conn.info.dbname}"
        conn.execute(f"CREATE ROLE {role}")
        conn.execute(f"CREATE SCHEMA roost AUTHORIZATION {role}")
        conn.execute(f"SET ROLE {role}")
        assert schema.apply_migrations(conn)
        schema.check(conn)
        conn.execute("SELECT roost.enqueue('a')")
        conn.execute("RESET ROLE")
        conn.execute("DROP SCHEMA roost CASCADE")
        conn.execute(f"DROP ROLE {role}")


# The printed script


def test_the_script_makes_the_same_schema(empty_dsn: str, dsn: str) -> None:
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        conn.execute(schema.sql())
        schema.check(conn)
        assert schema.apply_migrations(conn) == []
    assert described(empty_dsn) == described(dsn)


def test_the_script_runs_in_psql(empty_dsn: str, dsn: str) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("no psql on this machine")
    command = [psql, "--no-psqlrc", "--quiet", "--output=/dev/null", "--set=ON_ERROR_STOP=1", "--dbname", empty_dsn]
    subprocess.run(command, input=schema.sql().encode(), check=True)
    assert described(empty_dsn) == described(dsn)


def test_the_script_of_what_is_new_leaves_out_what_is_applied() -> None:
    latest = schema.migrations()[-1].version
    assert "CREATE" not in schema.sql(since=latest)
    assert "INSERT" not in schema.sql(since=latest)


# Schemas that are refused


@pytest.fixture
def future(monkeypatch: pytest.MonkeyPatch) -> Migration:
    """This version of the package has one migration more."""
    text = "CREATE TABLE roost.future (id integer);"
    known = schema.migrations()
    migration = Migration(known[-1].version + 1, "future", hashlib.sha256(text.encode()).hexdigest(), text)
    monkeypatch.setattr(schema, "migrations", lambda: (*known, migration))
    return migration


def refusal(conn: Conn) -> SchemaError:
    with pytest.raises(SchemaError) as refused:
        schema.check(conn)
    return refused.value


def test_a_missing_schema_is_refused(empty_dsn: str) -> None:
    with psycopg.connect(empty_dsn) as conn:
        error = refusal(conn)
        assert (error.problem, error.code) == ("missing", "roost.schema")
        assert "roostctl migrate up" in str(error)
        assert conn.info.transaction_status == TransactionStatus.INTRANS


def test_an_outdated_schema_is_refused_and_can_be_brought_up_to_date(dsn: str, conn: Conn, future: Migration) -> None:
    error = refusal(conn)
    assert error.problem == "outdated"
    assert f"{future.version:04} future not applied" in str(error)
    assert [s.state for s in schema.status(conn)][-2:] == ["applied", "pending"]
    assert schema.apply_migrations(conn) == [future]
    schema.check(conn)


def test_the_script_since_a_version_brings_it_up_to_date(dsn: str, future: Migration) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(schema.sql(since=future.version - 1))
        schema.check(conn)


def test_a_newer_schema_is_refused_by_check_and_by_apply(conn: Conn) -> None:
    conn.execute("INSERT INTO roost.migrations (version, name, checksum) VALUES (99, 'from_the_future', 'x')")
    conn.commit()
    error = refusal(conn)
    assert error.problem == "newer"
    assert "0099 from_the_future" in str(error)
    conn.rollback()
    with pytest.raises(SchemaError, match="does not know"):
        schema.apply_migrations(conn)
    assert [s.state for s in schema.status(conn)] == ["applied"] * len(schema.migrations()) + ["unknown"]


def test_an_altered_migration_is_refused_by_check_and_by_apply(conn: Conn) -> None:
    conn.execute("UPDATE roost.migrations SET checksum = 'other'")
    conn.commit()
    error = refusal(conn)
    assert error.problem == "altered"
    assert "another text" in str(error)
    conn.rollback()
    with pytest.raises(SchemaError, match="another text"):
        schema.apply_migrations(conn)


def test_a_migration_that_fails_leaves_nothing(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Migration(2, "broken", "x", "CREATE TABLE roost.half (id integer); SELECT 1/0;")
    known = schema.migrations()
    monkeypatch.setattr(schema, "migrations", lambda: (*known, broken))
    with psycopg.connect(empty_dsn) as conn:
        with pytest.raises(psycopg.errors.DivisionByZero):
            schema.apply_migrations(conn)
        assert conn.execute("SELECT to_regnamespace('roost')").fetchone() == (None,)


# The files


def test_the_files_are_numbered_without_gaps_and_ascii() -> None:
    migrations = schema.migrations()
    assert [m.version for m in migrations] == list(range(1, len(migrations) + 1))
    for migration in migrations:
        path = Path(schema.__file__).parent / "migrations" / f"{migration.version:04}_{migration.name}.sql"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == migration.checksum
        assert migration.sql.isascii()  # readable whatever encoding the connection has
