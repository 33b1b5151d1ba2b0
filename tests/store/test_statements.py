"""The rules that every file of store/sql/ keeps, read from the files and told by PostgreSQL."""

from __future__ import annotations

import inspect
import re
from typing import Any

import psycopg
import pytest

from roostd.store import statements
from tests.store.rows import numbered

NAMES = sorted(statements.SQL)


def _code(name: str) -> str:
    """The statement without its comments, on one line."""
    return " ".join(re.sub(r"--[^\n]*", "", statements.SQL[name]).split())


def _clauses(name: str, start: str) -> list[str]:
    """What follows `start` up to the end of that part of the statement: a RETURNING, or its closing parenthesis."""
    return [re.split(r" RETURNING |\) *(?:, \w+ AS|SELECT)", part)[0] for part in _code(name).split(start)[1:]]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_it_is_for_who_calls_it_and_what_it_locks(name: str) -> None:
    header = re.match(r"(--[^\n]*\n)+", statements.SQL[name])
    assert header is not None
    assert "Called by:" in header[0]
    if re.search(r"\b(INSERT|UPDATE|DELETE)\b", _code(name)):
        assert "Locks:" in header[0] or name == "remove_idle"
    assert all(len(line) <= 140 for line in header[0].splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_one_statement_that_one_function_of_its_name_runs(name: str) -> None:
    assert ";" not in _code(name)
    function = getattr(statements, name)
    assert inspect.iscoroutinefunction(function)
    assert f'"{name}"' in inspect.getsource(function)


@pytest.mark.parametrize("session", ["SELECT 1", statements.SESSION], ids=["plain", "SESSION"])
def test_postgresql_prepares_every_file_and_infers_no_other_type(dsn: str, session: Any) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute(session)
        for name in NAMES:
            text, names = numbered(name)
            conn.execute(b"PREPARE statement AS " + text.encode())
            row = conn.execute("SELECT parameter_types::text[] FROM pg_prepared_statements WHERE name = 'statement'")
            ((types,),) = row.fetchall()
            assert len(types) == len(names)
            assert "unknown" not in types
            conn.execute("DEALLOCATE statement")


def test_whatever_deletes_claims_names_the_lease() -> None:
    seen = [(name, clause) for name in NAMES for clause in _clauses(name, "DELETE FROM roost.claims")]
    assert {name for name, _ in seen} == {"complete", "settle", "rescue"}
    named = r"claims\.job_id (?:= |BETWEEN \w+\.job_id AND )(\w+)\.job_id AND claims\.lease = \1\.lease"
    for name, clause in seen:
        assert re.search(named, clause), name


def test_whatever_updates_job_rows_names_the_state_it_expects() -> None:
    seen = [(name, clause) for name in NAMES for clause in _clauses(name, "UPDATE roost.job_rows")]
    assert {name for name, _ in seen} == {"complete", "settle", "rescue", "clear_results"}
    for name, clause in seen:
        where = clause.split(" WHERE ")[-1]
        expected = r"= 'completed'" if name == "clear_results" else r"IN \('available', 'retryable'\)"
        assert re.search(rf"\.state {expected}", where), name


def test_whatever_a_worker_takes_from_others_skips_what_they_hold() -> None:
    taking = {name for name in NAMES if re.search(r"\bFOR (?:NO KEY )?UPDATE\b", _code(name))}
    assert taking == {
        "claim", "set_aside", "promote", "rescue", "remove_stale_workers", "lock_claims", "archive", "clear_results",
        "clear_archived_results", "delete_archived", "touch_cron", "prune_cron",
    }  # fmt: skip
    for name in taking:
        locks = re.findall(r"FOR (?:NO KEY )?UPDATE(?: OF \w+)?( SKIP LOCKED)?", _code(name))
        assert all(locks), name
        if name not in ("remove_stale_workers", "lock_claims"):  # no limit that a second run would exceed
            assert re.match(r"WITH \w+ AS MATERIALIZED \(", _code(name))


def test_no_index_names_a_column_that_a_completion_changes(dsn: str) -> None:
    """Or the update of job_rows would not be HOT; expressions and predicates count as well.

    A run that fails changes what indexes name, `errors` above all: operators look for those.
    """
    with psycopg.connect(dsn) as conn:
        cursor = conn.execute(
            "SELECT indexrelid::regclass::text, pg_get_indexdef(indexrelid) FROM pg_index"
            " WHERE indrelid = 'roost.job_rows'::regclass"
        )
        indexes: dict[str, str] = dict(cursor.fetchall())
    changed = {
        column
        for clause in _clauses("complete", "UPDATE roost.job_rows")
        for column in re.findall(r"(?:SET|,) (\w+) = ", clause.split(" FROM ended")[0])
    }
    assert {"state", "attempt", "completed_at", "cancel_requested", "result"} <= changed
    for index, definition in indexes.items():
        named = set(re.findall(r"\w+", definition.split(" USING ")[1]))
        assert not named & changed, index
