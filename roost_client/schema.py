"""Brings a database's `roost` schema to the version this package knows, and refuses one it doesn't know.

Migrations are the numbered files in migrations/: forward only, never edited once released (their checksums
are kept in roost.migrations), applied in one transaction under an advisory lock, so that any number of
processes may do it at once. Each operation is a generator that yields statements and is sent rows, so that
Roost and AsyncRoost share it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import psycopg
from psycopg.rows import tuple_row

from .errors import SchemaError

# Held until the end of the transaction by whoever migrates; any number no other program uses. "roost" in
# ASCII.
LOCK_KEY = 0x726F6F7374

_CREATE_BOOKKEEPING = """\
CREATE TABLE roost.migrations (
    version    integer     PRIMARY KEY,
    name       text        NOT NULL,
    checksum   text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""

T = TypeVar("T")
Rows: TypeAlias = list[tuple[Any, ...]]
Step: TypeAlias = tuple[str, tuple[object, ...] | None]
Steps: TypeAlias = Generator[Step, Rows, T]


@dataclass(frozen=True, slots=True)
class Migration:
    """A file of migrations/; `checksum` is the SHA-256 of its bytes."""

    version: int
    name: str
    checksum: str
    sql: str


@dataclass(frozen=True, slots=True)
class MigrationStatus:
    """Where one migration stands. `altered`: applied with another text; `unknown`: by a newer version of Roost."""

    version: int
    name: str
    state: Literal["applied", "pending", "altered", "unknown"]
    applied_at: datetime | None


@functools.cache
def migrations() -> tuple[Migration, ...]:
    """Return the migrations this package knows, in order."""
    found = []
    for path in sorted((Path(__file__).parent / "migrations").glob("*.sql")):
        version, _, name = path.stem.partition("_")
        content = path.read_bytes()
        found.append(Migration(int(version), name, hashlib.sha256(content).hexdigest(), content.decode()))
    return tuple(found)


def apply_migrations(conn: psycopg.Connection[Any]) -> list[Migration]:
    """Apply what is missing and return it, an empty list when nothing was. Idempotent; safe for many processes at once.

    In a transaction of the caller's it takes part in that; else it is committed on return. Raises SchemaError
    for a schema that is newer than this package or was applied with another text.
    """
    owns_transaction = conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    with conn.transaction():
        return run_steps(conn, apply_steps(owns_transaction))


async def apply_migrations_async(conn: psycopg.AsyncConnection[Any]) -> list[Migration]:
    """As apply_migrations."""
    owns_transaction = conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    async with conn.transaction():
        return await run_steps_async(conn, apply_steps(owns_transaction))


def status(conn: psycopg.Connection[Any]) -> list[MigrationStatus]:
    """Return where each migration stands, those this package doesn't know included, in order of version."""
    return run_steps(conn, status_steps())


def check(conn: psycopg.Connection[Any]) -> None:
    """Raise SchemaError, which says what to do, unless the schema is exactly the one this package works with."""
    run_steps(conn, check_steps())


def sql(since: int = 0) -> str:
    """Return a script that applies and records all migrations after version `since`, for those who run their own."""
    parts = ["BEGIN;", f"SELECT pg_advisory_xact_lock({LOCK_KEY});"]
    if since == 0:
        parts += ["CREATE SCHEMA IF NOT EXISTS roost;", _CREATE_BOOKKEEPING + ";"]
    for migration in migrations():
        if migration.version > since:
            parts += [
                f"-- {migration.version:04} {migration.name}",
                migration.sql.strip(),
                "INSERT INTO roost.migrations (version, name, checksum) "
                f"VALUES ({migration.version}, '{migration.name}', '{migration.checksum}');",
            ]
    return "\n\n".join([*parts, "COMMIT;"]) + "\n"


def apply_steps(owns_transaction: bool) -> Steps[list[Migration]]:
    """The statements of apply_migrations, to be run inside a transaction."""
    if owns_transaction:
        # A snapshot taken before the lock is granted would not show what the process before us applied.
        yield "SET TRANSACTION ISOLATION LEVEL READ COMMITTED", None
    yield f"SELECT pg_advisory_xact_lock({LOCK_KEY})", None
    # CREATE SCHEMA IF NOT EXISTS asks for the right to create one even where it exists.
    if (yield "SELECT to_regnamespace('roost') IS NULL", None)[0][0]:
        yield "CREATE SCHEMA roost", None
    if (yield "SELECT to_regclass('roost.migrations') IS NULL", None)[0][0]:
        yield _CREATE_BOOKKEEPING, None
    states = yield from status_steps()
    _refuse_unknown("migrate", states)
    pending = {state.version for state in states if state.state == "pending"}
    applied = [migration for migration in migrations() if migration.version in pending]
    for migration in applied:
        yield migration.sql, None
        yield (
            "INSERT INTO roost.migrations (version, name, checksum) VALUES (%s, %s, %s)",
            (migration.version, migration.name, migration.checksum),
        )
    return applied


def status_steps() -> Steps[list[MigrationStatus]]:
    """The statements of status."""
    rows: Rows = []
    if (yield "SELECT to_regclass('roost.migrations') IS NOT NULL", None)[0][0]:
        rows = yield "SELECT version, name, checksum, applied_at FROM roost.migrations", None
    known = {migration.version: migration for migration in migrations()}
    states = {
        version: MigrationStatus(version, migration.name, "pending", None) for version, migration in known.items()
    }
    for version, name, checksum, applied_at in rows:
        state: Literal["applied", "altered", "unknown"] = (
            "unknown" if version not in known else "applied" if known[version].checksum == checksum else "altered"
        )
        states[version] = MigrationStatus(version, name, state, applied_at)
    return [states[version] for version in sorted(states)]


def check_steps() -> Steps[None]:
    """The statements of check."""
    states = yield from status_steps()
    _refuse_unknown("use", states)
    pending = [state for state in states if state.state == "pending"]
    if len(pending) == len(states):
        raise SchemaError(
            "cannot use the schema roost: it is not in this database; create it with `roostctl migrate up`",
            "missing",
        )
    if pending:
        raise SchemaError(
            f"cannot use the schema roost: {_named(pending)} not applied; run `roostctl migrate up`",
            "outdated",
        )


def run_steps(conn: psycopg.Connection[Any], steps: Steps[T]) -> T:
    """Run the statements of `steps` on a connection, whatever its row and cursor factories."""
    cursor = psycopg.Cursor(conn, row_factory=tuple_row)
    rows: Rows | None = None
    try:
        while True:
            cursor.execute(*(next(steps) if rows is None else steps.send(rows)))
            rows = cursor.fetchall() if cursor.description else []
    except StopIteration as stop:
        value: T = stop.value
        return value


async def run_steps_async(conn: psycopg.AsyncConnection[Any], steps: Steps[T]) -> T:
    """As run_steps, on an async connection."""
    cursor = psycopg.AsyncCursor(conn, row_factory=tuple_row)
    rows: Rows | None = None
    try:
        while True:
            await cursor.execute(*(next(steps) if rows is None else steps.send(rows)))
            rows = await cursor.fetchall() if cursor.description else []
    except StopIteration as stop:
        value: T = stop.value
        return value


def _refuse_unknown(verb: str, states: list[MigrationStatus]) -> None:
    unknown = [state for state in states if state.state == "unknown"]
    if unknown:
        raise SchemaError(
            f"cannot {verb} the schema roost: it has {_named(unknown)}, which this version does not know;"
            " install the version of roostd that the others on this database run",
            "newer",
        )
    altered = [state for state in states if state.state == "altered"]
    if altered:
        raise SchemaError(
            f"cannot {verb} the schema roost: {_named(altered)} was applied with another text than this version has;"
            " install the version that applied it, or compare with `roostctl migrate sql`",
            "altered",
        )


def _named(states: list[MigrationStatus]) -> str:
    numbers = ", ".join(f"{state.version:04} {state.name}" for state in states)
    return f"migration{'s' if len(states) > 1 else ''} {numbers}"
