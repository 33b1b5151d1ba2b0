"""migrate up, status, sql; and what the other commands say of a schema that is not there."""

import psycopg
import pytest

from roost_client import schema
from tests.ctl.conftest import Ctl


def test_up_applies_what_is_missing_and_then_nothing(
    bare_ctl: Ctl, empty_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOST_DSN", empty_dsn)
    names = [f"{migration.version:04} {migration.name}" for migration in schema.migrations()]
    assert {row["state"] for row in bare_ctl("migrate", "status", "--json").json} == {"pending"}
    assert bare_ctl("migrate", "up").lines == [f"applied {name}" for name in names]
    assert bare_ctl("migrate", "up").out == "nothing to do: the schema is up to date\n"
    assert bare_ctl("migrate", "up", "--json").json == {"applied": []}
    assert {row["state"] for row in bare_ctl("migrate", "status", "--json").json} == {"applied"}
    assert bare_ctl("migrate", "status").lines[1].split()[:3] == [*names[0].split(), "applied"]
    with psycopg.connect(empty_dsn) as conn:
        schema.check(conn)


def test_sql_needs_no_database_and_makes_the_schema(bare_ctl: Ctl, empty_dsn: str) -> None:
    script = bare_ctl("migrate", "sql")
    assert (script.code, script.err) == (0, "")
    assert bare_ctl("migrate", "sql", "--json").json == {"sql": script.out}
    with psycopg.connect(empty_dsn, autocommit=True) as conn:
        conn.execute(script.out)
        schema.check(conn)


def test_sql_since_a_version_that_cannot_be_is_wrong_usage(bare_ctl: Ctl) -> None:
    for since in (-1, 99):
        result = bare_ctl("migrate", "sql", "--since", since)
        assert (result.code, result.out) == (64, "")
        assert "--since" in result.err


@pytest.mark.parametrize(
    "command",
    [
        ["status"], ["queues"], ["jobs"], ["show", "1"], ["workers"], ["cancel", "1"], ["retry", "1"], ["pause", "q"],
        ["enqueue", "send"], ["requeue", "--discarded"], ["reload"],
    ],
)  # fmt: skip
def test_a_missing_schema_is_one_line_that_says_what_to_run(
    bare_ctl: Ctl, empty_dsn: str, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("ROOST_DSN", empty_dsn)
    result = bare_ctl(*command)
    assert (result.code, result.out) == (78, "")
    assert result.err.startswith("roostctl: cannot ")
    assert "`roostctl migrate up`" in result.err
    assert len(result.err.splitlines()) == 1


def test_a_schema_of_a_newer_version_is_not_touched(bare_ctl: Ctl, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOST_DSN", dsn)
    with psycopg.connect(dsn) as conn:
        conn.execute("INSERT INTO roost.migrations (version, name, checksum) VALUES (9999, 'future', 'x')")
    result = bare_ctl("migrate", "up")
    assert result.code == 78
    assert "9999 future" in result.err
    assert bare_ctl("migrate", "status", "--json").json[-1]["state"] == "unknown"
