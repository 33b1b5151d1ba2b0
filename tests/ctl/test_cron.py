"""cron list, next, run, pause and resume, on entries as workers write them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from roost_client import Roost
from roostd.core.timetable import Entry
from roostd.store import statements
from tests.ctl.conftest import Ctl

NIGHTLY = Entry(
    name="nightly", expression="30 2 * * *", timezone="Europe/Berlin", task="clean", source="shop.jobs.clean",
    args='{"days": 3}', queue="slow",
)  # fmt: skip
HOURLY = Entry(name="hourly", expression="@hourly", task="count", source="config", enabled=False)

Query = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def query(dsn: str) -> Query:
    def query(statement: Any, *parameters: Any) -> list[dict[str, Any]]:
        with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
            cursor = conn.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else []

    return query


@pytest.fixture(autouse=True)
def known(dsn: str) -> Callable[..., None]:
    """Makes entries known as a worker does; NIGHTLY and HOURLY are."""

    def know(*entries: Entry) -> None:
        async def register() -> None:
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
                await statements.register_cron(conn, entries)

        asyncio.run(register())

    know(NIGHTLY, HOURLY)
    return know


def test_list_shows_what_runs_when_and_who_says_so(ctl: Ctl, query: Query) -> None:
    query("INSERT INTO roost.cron_runs VALUES ('nightly', '2026-01-01T01:30Z', '2026-01-01T01:30:01Z', 7)")
    result = ctl("cron", "list")
    assert (result.code, result.err) == (0, "")
    assert result.lines[0].split() == ["NAME", "EXPRESSION", "ZONE", "TASK", "STATE", "NEXT", "LAST", "JOB", "SOURCE"]
    assert result.lines[1].split()[:1] + result.lines[1].split()[-5:] == ["hourly", "disabled", "-", "-", "-", "config"]
    nightly = result.lines[2]
    for text in ("nightly", "30 2 * * *", "Europe/Berlin", "clean", "active", "2026-01-01T01:30:01Z", "7", "shop.jobs"):
        assert text in nightly
    hourly, as_json = ctl("cron", "list", "--json").json
    assert (hourly["state"], hourly["next_slot"], hourly["last_slot"]) == ("disabled", None, None)
    assert as_json["args"] == {"days": 3}
    assert (as_json["last_slot"], as_json["last_job_id"]) == ("2026-01-01T01:30:00+00:00", 7)
    slot = datetime.fromisoformat(as_json["next_slot"])
    (row,) = query("SELECT now()")
    assert timedelta(0) < slot - row["now"] < timedelta(hours=26)


def test_an_entry_that_no_worker_names_any_more_is_unknown(ctl: Ctl, query: Query) -> None:
    query("UPDATE roost.cron_entries SET seen_at = now() - interval '16 minutes'")
    assert [each["state"] for each in ctl("cron", "list", "--json").json] == ["unknown", "unknown"]
    assert ctl("cron", "list", "--json").json[1]["next_slot"] is None
    result = ctl("cron", "run", "nightly")
    assert result.code == 0
    assert "no worker has named cron entry 'nightly' for a while" in result.err


def test_next_shows_slots_in_utc_and_by_the_clock_of_the_zone(ctl: Ctl) -> None:
    found = ctl("cron", "next", "nightly", "-n", "400", "--json").json
    assert len(found) == 400
    slots = [datetime.fromisoformat(each["slot"]) for each in found]
    local = [datetime.fromisoformat(each["local"]) for each in found]
    assert slots == sorted(set(slots))
    assert slots == local
    assert {each.utcoffset() for each in slots} == {timedelta(0)}
    assert {each.utcoffset() for each in local} == {timedelta(hours=1), timedelta(hours=2)}
    assert {f"{each:%H:%M}" for each in local} == {"02:30", "03:00"}
    table = ctl("cron", "next", "nightly")
    assert len(table.lines) == 6
    assert table.lines[0].split() == ["SLOT", "Europe/Berlin"]
    assert table.lines[1].split()[0].endswith(":30:00Z")


def test_next_of_an_entry_that_does_not_fire_says_so(ctl: Ctl) -> None:
    result = ctl("cron", "next", "hourly", "-n", "2")
    assert (result.code, len(result.lines)) == (0, 3)
    assert "is disabled, so it does not fire" in result.err


def test_run_enqueues_the_job_of_the_entry(ctl: Ctl, roost: Roost) -> None:
    ctl("cron", "pause", "nightly")
    job = roost.get_job(int(ctl("cron", "run", "nightly").out))
    assert (job.task, job.args, job.queue, job.state) == ("clean", {"days": 3}, "slow", "available")
    assert job.metadata == {"cron": {"name": "nightly", "slot": None}}
    assert roost.get_job(ctl("cron", "run", "hourly", "--json").json["id"]).task == "count"


def test_pause_lasts_until_resume(ctl: Ctl, known: Callable[..., None]) -> None:
    result = ctl("cron", "pause", "nightly")
    assert (result.code, result.err) == (0, "")
    assert result.lines == ["NAME     STATE", "nightly  paused"]
    known(Entry(**{**NIGHTLY.as_json(), "expression": "@daily"}))  # a reload with a change
    paused = ctl("cron", "list", "--json").json[1]
    assert (paused["state"], paused["expression"], paused["next_slot"]) == ("paused", "@daily", None)
    assert ctl("cron", "resume", "nightly", "--json").json == [{"name": "nightly", "paused": False}]
    assert ctl("cron", "list", "--json").json[1]["state"] == "active"


@pytest.mark.parametrize("command", ["next", "run", "pause", "resume"])
def test_an_entry_that_is_none_is_not_found_and_the_nearest_is_named(ctl: Ctl, command: str) -> None:
    result = ctl("cron", command, "nightl")
    assert result.code == 1
    assert "cron entry 'nightl': no worker has made one of that name known; did you mean 'nightly'?" in result.err
    assert "see roostctl cron list" in ctl("cron", command, "xyzzy").err


def test_all_that_are_named_are_paused_even_if_some_cannot_be(ctl: Ctl) -> None:
    result = ctl("cron", "pause", "nightly", "xyzzy", "hourly", "--json")
    assert result.code == 1
    assert [each["name"] for each in result.json] == ["nightly", "hourly"]


@pytest.mark.parametrize("command", ["next", "run", "pause", "resume"])
def test_a_name_that_no_database_could_hold_is_not_found(ctl: Ctl, command: str) -> None:
    result = ctl("cron", command, "\udcff")
    assert result.code == 1
    assert "see roostctl cron list" in result.err


def test_wrong_usage_is_told(ctl: Ctl, bare_ctl: Ctl, empty_dsn: str) -> None:
    assert ctl("cron").code in (0, 64)
    assert ctl("cron", "next", "nightly", "-n", "0").code == 64
    assert ctl("cron", "pause").code == 64
    assert bare_ctl("cron", "list", "--dsn", empty_dsn).code == 78
    assert bare_ctl("cron", "list", "--dsn", "host=/nowhere").code == 69
