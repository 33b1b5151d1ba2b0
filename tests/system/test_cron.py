"""Cron entries as daemons fire them: once each slot, whatever becomes of the masters and their clocks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from roostd.ctl import main as roostctl
from tests.system.clock import MINUTE, DatabaseClock
from tests.system.conftest import StartDaemon
from tests.system.daemon import COMMAND, HANDLERS, Daemon, Settings, eventually
from tests.system.jobs import Jobs

SKEW = Path(__file__).parents[2] / "chaos" / "skew"
# The clock of these tests jumps, and the age of a heartbeat is told by it.
PATIENT = {"orphan_stale_after": 1_000_000.0}
EVERY_MINUTE = {"expression": "* * * * *", "task": "noop"}
SHOP = """
from roost_client import cron, job

@cron("* * * * *", args={"n": 1})
@job("count", queue="other", timeout_seconds=7, max_attempts=2, tags=["x"])
def count(n):
    return n

@cron("0 4 * * *", name="early", timezone="Europe/Berlin")
def early():
    pass
"""


@pytest.fixture
def clock(dsn: str) -> DatabaseClock:
    return DatabaseClock(dsn)


@pytest.fixture
def start(start_daemon: StartDaemon, clock: DatabaseClock) -> StartDaemon:
    """Starts daemons that read the test's clock."""

    def start(settings: Settings | None = None, *options: str, **keywords: Any) -> Daemon:
        settings = settings or {}
        given = {"database": {"dsn": clock.dsn}, **settings, "worker": {**PATIENT, **settings.get("worker", {})}}
        return start_daemon(given, *options, **keywords)

    return start


@pytest.fixture
def app(folder: Path) -> Path:
    (folder / "app").mkdir()
    return folder / "app"


def handlers(app: Path) -> Settings:
    return {"modules": ["tasks", "shop"], "pythonpath": [str(app), str(HANDLERS)]}


def fired(jobs: Jobs, name: str = "every") -> list[datetime]:
    rows = jobs.query("SELECT slot FROM roost.cron_runs WHERE name = %s ORDER BY slot", name)
    return [row["slot"] for row in rows]


def wait_fired(jobs: Jobs, name: str, slot: datetime, seconds: float = 60.0) -> None:
    eventually(lambda: slot in fired(jobs, name), lambda: f"firing of {name} at {slot}. {jobs.told()}", seconds)


def assert_each_slot_once(jobs: Jobs, name: str, slots: list[datetime]) -> None:
    """Each of these slots has fired and no other, and each has one job."""
    assert fired(jobs, name) == slots, jobs.told()
    query = (
        "SELECT id, metadata #>> '{cron,slot}' AS slot FROM roost.jobs WHERE metadata #>> '{cron,name}' = %s ORDER BY 2"
    )
    rows = jobs.query(query, name)
    assert [datetime.fromisoformat(row["slot"]) for row in rows] == slots
    runs = jobs.query("SELECT job_id FROM roost.cron_runs WHERE name = %s ORDER BY slot", name)
    assert [run["job_id"] for run in runs] == [row["id"] for row in rows]


def every_minute(jobs: Jobs, name: str, last: datetime) -> list[datetime]:
    """All minutes since the entry is known."""
    (row,) = jobs.query("SELECT since FROM roost.cron_entries WHERE name = %s", name)
    first = row["since"].replace(second=0, microsecond=0) + MINUTE
    return [first + n * MINUTE for n in range((last - first) // MINUTE + 1)]


def reload(daemon: Daemon, verdict: str = "reload.done") -> dict[str, Any]:
    """The verdict, and what was registered then."""
    since = daemon.mark()
    daemon.signal(signal.SIGHUP)
    found = daemon.wait_for(verdict, since=since)
    return {**daemon.wait_for("cron.registered", since=since), **found} if verdict == "reload.done" else found


# -- one slot, many masters


def test_three_masters_fire_each_slot_once_though_clocks_are_off_and_one_was_stopped(
    start: StartDaemon, jobs: Jobs, clock: DatabaseClock
) -> None:
    settings = {"cron": {f"every{n}": EVERY_MINUTE for n in range(5)}}
    plain, ahead, stopped = (
        start(settings, environ={"CHAOS_SKEW": skew, "PYTHONPATH": str(SKEW)}) for skew in ("0", "600", "-600")
    )
    for daemon in (plain, ahead, stopped):
        daemon.wait_for("cron.registered", entries=5)
    first = clock.approach_minute()
    for name in settings["cron"]:
        wait_fired(jobs, name, first)
    stopped.signal(signal.SIGSTOP)
    second = clock.approach_minute()
    wait_fired(jobs, "every0", second)
    third = clock.approach_minute()
    wait_fired(jobs, "every0", third)
    for name in settings["cron"]:
        wait_fired(jobs, name, third)
    stopped.signal(signal.SIGCONT)
    fourth = clock.approach_minute()
    for name in settings["cron"]:
        wait_fired(jobs, name, fourth)
    # With one more slot that only the one fires that was stopped: it goes on as the others.
    plain.stop()
    ahead.stop()
    fifth = clock.approach_minute()
    for name in settings["cron"]:
        wait_fired(jobs, name, fifth)
        assert_each_slot_once(jobs, name, every_minute(jobs, name, fifth))
    assert len(stopped.entries("cron.fired", slot=fifth.isoformat())) == 5
    assert not [entry for daemon in (plain, ahead, stopped) for entry in daemon.entries("cron.refused")]


@pytest.mark.timeout(300)
def test_masters_that_are_killed_at_random_fire_no_slot_twice_and_lose_none(
    start: StartDaemon, jobs: Jobs, clock: DatabaseClock
) -> None:
    seed = int(os.environ.get("CRON_SEED", "0")) or random.randrange(1, 1_000_000)
    print(f"CRON_SEED={seed}")
    rng = random.Random(seed)
    names = [f"every{n:02}" for n in range(20)]
    settings = {"cron": dict.fromkeys(names, EVERY_MINUTE)}
    daemons = [start(settings) for _ in range(3)]
    for daemon in daemons:
        daemon.wait_for("cron.registered")
    slot = clock.approach_minute()
    for name in names:
        wait_fired(jobs, name, slot)
    for _ in range(6):
        slot = clock.approach_minute(0.5)
        deadline = time.monotonic() + 0.5
        victims = rng.sample(daemons, rng.choice([1, 2, 2, 3, 3]))
        for victim, after in sorted(((v, rng.uniform(-0.1, 0.15)) for v in victims), key=lambda pair: pair[1]):
            while time.monotonic() < deadline + after:  # a point in time, that nothing tells of
                time.sleep(0.001)
            victim.signal(signal.SIGKILL)
        for victim in victims:
            victim.wait_exit()
        for victim in victims:
            victim.start()
        for name in names:
            wait_fired(jobs, name, slot)
        for victim in victims:
            victim.wait_ready()
    for name in names:
        assert_each_slot_once(jobs, name, every_minute(jobs, name, slot))


# -- what was missed


def test_what_no_master_saw_is_skipped_or_its_latest_fires_once(
    start: StartDaemon, jobs: Jobs, clock: DatabaseClock
) -> None:
    hourly = {"expression": "@hourly", "task": "noop"}
    settings = {"cron": {"none": hourly, "latest": {**hourly, "catch_up": "latest"}, "every": EVERY_MINUTE}}
    now = clock.now()
    clock.set_ahead(now.replace(minute=30, second=5, microsecond=0) + timedelta(hours=1) - now)
    daemon = start(settings)
    daemon.wait_for("cron.registered")
    daemon.stop()
    clock.set_ahead(timedelta(hours=3))
    daemon.start()
    hour = clock.now().replace(minute=0, second=0, microsecond=0)
    wait_fired(jobs, "latest", hour)
    minute = clock.approach_minute()
    wait_fired(jobs, "every", minute)
    daemon.stop()
    since = daemon.mark()
    daemon.start().wait_for("cron.registered", since=since)
    minute = clock.approach_minute()
    wait_fired(jobs, "every", minute)
    assert_each_slot_once(jobs, "latest", [hour])
    assert fired(jobs, "none") == []


def test_a_new_entry_fires_for_no_slot_of_before(start: StartDaemon, jobs: Jobs, clock: DatabaseClock) -> None:
    daemon = start()
    daemon.write_config({"cron": {"new": {"expression": "* * * * *", "task": "noop", "catch_up": "latest"}}})
    clock.approach_minute(0.0)
    assert reload(daemon)["entries"] == 1
    known_at = jobs.query("SELECT since FROM roost.cron_entries")[0]["since"]
    minute = clock.approach_minute()
    wait_fired(jobs, "new", minute, seconds=25.0)  # a heartbeat tells of the clock that was set
    assert all(slot > known_at for slot in fired(jobs, "new"))


# -- where entries come from


def test_functions_and_settings_declare_entries_and_a_reload_changes_them(
    start: StartDaemon, jobs: Jobs, clock: DatabaseClock, app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (app / "shop.py").write_text(SHOP)
    daemon = start(
        {
            "handlers": handlers(app),
            "cron": {
                "early": {"expression": "* * * * *"},
                "own": {**EVERY_MINUTE, "args": {}},
                "off": {**EVERY_MINUTE, "enabled": False},
            },
            "pools": {"default": {"queues": ["default", "other"]}},
        }
    )
    daemon.wait_for("cron.registered", entries=4, enabled=3)
    first = clock.approach_minute()
    for name in ("count", "early", "own"):
        wait_fired(jobs, name, first)
    (row,) = jobs.query("SELECT id FROM roost.jobs WHERE task = 'count'")
    job = jobs.wait(row["id"])
    assert (job.state, job.queue, job.timeout_seconds, job.max_attempts, job.tags) == (
        "completed",
        "other",
        7,
        2,
        ["x"],
    )
    assert (job.args, job.result) == ({"n": 1}, 1)
    assert job.metadata == {"cron": {"name": "count", "slot": first.isoformat()}}
    listed = listing(clock, capsys)
    assert {name: entry["state"] for name, entry in listed.items()} == {
        "count": "active", "early": "active", "own": "active", "off": "disabled",
    }  # fmt: skip
    assert (listed["early"]["source"], listed["early"]["timezone"]) == ("shop.early", "Europe/Berlin")
    assert listed["own"]["source"] == "config"

    assert roostctl(["cron", "pause", "own", "--dsn", clock.dsn]) == 0
    (app / "shop.py").write_text(SHOP.replace('{"n": 1}', '{"n": 2}'))
    daemon.write_config({"cron": {"early": {"enabled": False}, "own": {"priority": 3}, "off": {"enabled": True}}})
    assert reload(daemon)["enabled"] == 3
    second = clock.approach_minute()
    for name in ("count", "off"):
        wait_fired(jobs, name, second)
    assert [row["args"] for row in jobs.query("SELECT args FROM roost.jobs WHERE task = 'count' ORDER BY id")][-1] == {
        "n": 2
    }
    assert listing(clock, capsys)["own"]["state"] == "paused"
    assert roostctl(["cron", "resume", "own", "--dsn", clock.dsn]) == 0
    third = clock.approach_minute()
    wait_fired(jobs, "own", third)
    assert second not in fired(jobs, "own")
    assert second not in fired(jobs, "early")

    daemon.write_config({"cron": None})
    assert reload(daemon)["entries"] == 2
    fourth = clock.approach_minute()
    wait_fired(jobs, "count", fourth)
    assert fourth not in fired(jobs, "own")


def listing(clock: DatabaseClock, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert roostctl(["cron", "list", "--json", "--dsn", clock.dsn]) == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}


MISTAKES = {
    "expression": (
        {"x": {"task": "noop", "expression": "61 * * * *"}},
        "",
        ["cron.x.expression", "numbers from 0 to 59"],
    ),
    "never": ({"x": {"task": "noop", "expression": "0 0 30 2 *"}}, "", ["cron.x.expression", "never fires"]),
    "zone": ({"x": {**EVERY_MINUTE, "timezone": "Mars"}}, "", ["cron.x.timezone", "Mars"]),
    "task": ({"x": {**EVERY_MINUTE, "task": "nop"}}, "", ["cron.x", "task 'nop'", "did you mean 'noop'?"]),
    "no task": ({"x": {"expression": "@daily"}}, "", ["cron.x", "it has no task"]),
    "model": ({"x": {**EVERY_MINUTE, "task": "order"}}, "", ["cron.x", "args.id does not fit Order: Field required"]),
    "function": ({}, "@cron('* * * *', name='y')\ndef f(): pass\n", ["@cron entry 'y' of shop.f", "has 4 fields"]),
    "function's zone": ({}, "@cron('@daily', timezone='Mars')\ndef f(): pass\n", ["@cron entry 'shop.f'", "'Mars'"]),
    "function's args": ({}, "@cron('@daily', args={'a': {1}})\ndef f(): pass\n", ["shop.f", "args.a is a set"]),
}
MODELS = """
from pydantic import BaseModel
from roost_client import cron, job

class Order(BaseModel):
    id: int

@job("order", args_model=Order)
def order(id): pass

"""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_entry_that_is_no_good_is_an_error_of_check_start_and_reload(
    start_daemon: StartDaemon, jobs: Jobs, app: Path, mistake: str
) -> None:
    entries, code, named = MISTAKES[mistake]
    (app / "shop.py").write_text(MODELS)
    daemon = start_daemon({"handlers": handlers(app)})
    (app / "shop.py").write_text(MODELS + code)
    daemon.write_config({"cron": entries} if entries else {})
    error = reload(daemon, "reload.failed")["error"]
    assert jobs.wait(jobs.add("noop")).state == "completed"
    command = [str(COMMAND), "-c", str(daemon.config_file)]
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    check = subprocess.run([*command, "--check"], cwd=app, env=environ, capture_output=True, text=True, timeout=60)
    started = subprocess.run(command, cwd=app, env=environ, capture_output=True, text=True, timeout=60)
    assert (check.returncode, started.returncode) == (78, 78)
    for told in (error, check.stderr, started.stderr):
        for part in named:
            assert part in told, told


def test_check_prints_the_entries(start_daemon: StartDaemon, app: Path) -> None:
    (app / "shop.py").write_text(SHOP)
    daemon = start_daemon({"handlers": handlers(app), "cron": {"early": {"enabled": False}}})
    command = [str(COMMAND), "-c", str(daemon.config_file), "--check"]
    check = subprocess.run(command, cwd=app, capture_output=True, text=True, timeout=60)
    assert check.returncode == 0
    lines = [line for line in check.stdout.splitlines() if "cron" in line]
    assert any(line.startswith("cron.early.enabled = false") for line in lines)
    assert "# cron: count: * * * * * UTC, task count" in lines
    assert "# cron: early: 0 4 * * * Europe/Berlin, task early, not enabled" in lines


# -- who fires


def test_a_worker_that_is_told_not_to_fires_nothing_and_knows_nothing(
    start: StartDaemon, jobs: Jobs, clock: DatabaseClock
) -> None:
    settings = {"cron": {"every": EVERY_MINUTE}}
    silent = start({**settings, "worker": {"run_cron": False}})
    silent.wait_for("cron.registered", entries=0)
    assert jobs.query("SELECT 1 FROM roost.cron_entries") == []
    firing = start(settings)
    firing.wait_for("cron.registered", entries=1)
    slot = clock.approach_minute()
    wait_fired(jobs, "every", slot)
    firing.wait_for("cron.fired", slot=slot.isoformat())
    assert not silent.entries("cron.fired")


def test_once_fires_nothing(start: StartDaemon, jobs: Jobs, clock: DatabaseClock) -> None:
    clock.approach_minute(0.0)
    daemon = start({"cron": {"every": {**EVERY_MINUTE, "catch_up": "latest"}}}, "--once", ready=False)
    assert daemon.wait_exit() == 0
    assert jobs.query("SELECT 1 FROM roost.cron_runs") == []
    assert jobs.query("SELECT 1 FROM roost.cron_entries") == []


def test_a_slot_that_the_database_refuses_keeps_no_other_back(
    start: StartDaemon, jobs: Jobs, clock: DatabaseClock
) -> None:
    entries = {f"e{n}": {**EVERY_MINUTE, "queue": f"q{n}"} for n in range(7)}
    daemon = start({"cron": entries})
    daemon.wait_for("cron.registered", entries=7)
    jobs.query("ALTER TABLE roost.job_rows ADD CONSTRAINT no_q3 CHECK (queue <> 'q3')")
    slot = clock.approach_minute()
    for name in entries.keys() - {"e3"}:
        wait_fired(jobs, name, slot)
    daemon.wait_for("cron.refused", entry="e3")
    jobs.query("ALTER TABLE roost.job_rows DROP CONSTRAINT no_q3")
    slot = clock.approach_minute()
    wait_fired(jobs, "e3", slot)
    assert fired(jobs, "e3") == [slot]
