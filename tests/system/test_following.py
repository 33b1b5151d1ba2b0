"""Unique and dependent jobs through the daemon, also one that is killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import psycopg
import pytest

from roost_client import DuplicateUniqueJobError, JobInsert, Roost
from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon, eventually
from tests.system.jobs import Jobs

KILLS = 8
LATER = datetime(2100, 1, 1, tzinfo=UTC)
SETTINGS = {"worker": {"poll_interval": 0.3, "max_crashes": 1000}}
SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))

# The states of jobs with a key in the order in which they were committed: the same row of `turns` is updated by each.
HISTORY = """
CREATE TABLE public.turns (last bigint NOT NULL);
INSERT INTO public.turns VALUES (0);
CREATE TABLE public.history (turn bigint PRIMARY KEY, unique_key text, job_id bigint, is_active boolean);
CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE turn bigint;
BEGIN
    UPDATE public.turns SET last = last + 1 RETURNING last INTO turn;
    INSERT INTO public.history VALUES (turn, NEW.unique_key, NEW.id, NEW.state IN ('available', 'retryable'));
    RETURN NULL;
END $$;
CREATE TRIGGER noted AFTER INSERT OR UPDATE OF state ON roost.job_rows
    FOR EACH ROW WHEN (NEW.unique_key IS NOT NULL) EXECUTE FUNCTION public.note();
"""


class Killer:
    """Kills by a seed: children, the master (and starts another), and the server's ends of its connections."""

    def __init__(self, daemon: Daemon, jobs: Jobs, dice: random.Random) -> None:
        self._daemon = daemon
        self._jobs = jobs
        self._dice = dice
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1
        match self._dice.choice(["child", "child", "master", "backend", "backend"]):
            case "child":
                if children := self._daemon.children():
                    _kill(self._dice.choice(children))
            case "backend":
                backends = self._jobs.query(
                    "SELECT pid FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name LIKE 'roostd%'"
                )
                if backends:
                    self._jobs.query("SELECT pg_terminate_backend(%s)", self._dice.choice(backends)["pid"])
            case "master":
                self._daemon.signal(signal.SIGKILL)
                self._daemon.wait_exit()
                since = self._daemon.mark()
                self._daemon.start()
                self._daemon.wait_for("worker.ready", since=since)

    def kill_until(self, done: threading.Event, pause_seconds: float) -> None:
        while not done.wait(self._dice.uniform(0.2, 1.8) * pause_seconds):
            self.kill()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def test_a_chain_runs_in_its_order_and_each_link_at_once(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"worker": {"poll_interval": 20.0}})  # which would be too slow
    chain: list[JobInsert] = []
    for n in range(30):
        chain.append(JobInsert("note", {"line": str(n)}, depends_on=chain[-1:]))
    assert jobs.roost.enqueue_many(chain) == 30
    eventually(lambda: jobs.count("completed") == 30, lambda: f"end of the chain. {daemon.told()}", seconds=18)
    assert daemon.notes() == [str(n) for n in range(30)]


def test_a_join_runs_after_a_wide_fan_out(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    first = JobInsert("note", {"line": "first"})
    middle = [JobInsert("noop", depends_on=[first]) for _ in range(3000)]
    last = JobInsert("note", {"line": "last"}, depends_on=middle)
    jobs.roost.enqueue_many([first, *middle, last])
    eventually(lambda: daemon.notes() == ["first", "last"], lambda: f"last job. {daemon.told()}")
    assert jobs.count("completed") >= 3001


def test_what_a_worker_of_before_dependencies_has_ended_is_told(start_daemon: StartDaemon, jobs: Jobs) -> None:
    """Such a worker goes on while the schema is migrated and others are started, and leaves no note."""
    parents = [jobs.add("noop", queue="elsewhere") for _ in range(2)]
    child = jobs.add("noop", depends_on=parents)
    grandchild = jobs.add("noop", depends_on=[child])
    with psycopg.connect(jobs.dsn) as conn:
        conn.execute("DELETE FROM roost.ready")
        conn.execute(
            "UPDATE roost.job_rows SET state = 'completed', completed_at = now() WHERE id = ANY (%s)", (parents,)
        )
    start_daemon({"worker": {"orphan_reaper_interval": 0.1}})
    for job_id in (child, grandchild):
        assert jobs.wait(job_id).state == "completed"


def test_what_depends_on_a_job_that_fails_is_cancelled_all_the_way_down(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon({"worker": {"poll_interval": 20.0}})
    parent = jobs.add("hold_and_fail", {"key": "parent"}, max_attempts=1)
    daemon.wait_started("parent")
    down = [parent]
    for _ in range(10):
        down.append(jobs.add("noop", depends_on=[down[-1]]))
    daemon.let_go("parent")
    assert jobs.wait(down[-1], seconds=18).state == "cancelled"
    (error,) = jobs.get(down[1]).errors
    assert error["error"] == f"DependencyFailed: job {parent}, on which this one depends, was discarded"


def test_what_depends_on_a_job_that_is_cancelled_while_nothing_runs_is_cancelled_by_a_poll(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    start_daemon()
    parent = jobs.add("noop", scheduled_at=LATER)
    child = jobs.add("noop", depends_on=[parent])
    jobs.roost.cancel(parent)
    assert jobs.wait(child).state == "cancelled"


def test_an_enqueue_that_depends_on_a_running_job_holds_back_its_end_and_no_other(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon()
    parent = jobs.add("hold", {"key": "parent"})
    daemon.wait_started("parent")
    with psycopg.connect(jobs.dsn) as conn:
        child = jobs.roost.enqueue("noop", depends_on=[parent], conn=conn)
        daemon.let_go("parent")
        daemon.wait_for("outcomes.locked", jobs=[parent])
        for _ in range(20):
            jobs.wait(jobs.add("noop"), "completed")
        assert jobs.get(parent).state == "executing"
    jobs.wait_all([parent, child])


def test_once_runs_dependents_too(start_daemon: StartDaemon, jobs: Jobs) -> None:
    parent = jobs.add("noop")
    child = jobs.add("noop", depends_on=[parent])
    daemon = start_daemon(None, "--once", ready=False)
    assert daemon.wait_exit() == 0
    assert jobs.get(child).state == "completed"


def test_a_key_is_free_the_moment_its_job_has_ended(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon()
    job_id = jobs.add("hold", {"key": "held"}, unique_key="k")
    daemon.wait_started("held")
    with pytest.raises(DuplicateUniqueJobError):
        jobs.add("noop", unique_key="k")
    daemon.let_go("held")
    jobs.wait(job_id, "completed")
    jobs.wait(jobs.add("noop", unique_key="k"), "completed")


@pytest.mark.timeout(240)
def test_no_job_runs_before_its_parents_have_ended_whatever_is_killed(start_daemon: StartDaemon, jobs: Jobs) -> None:
    print(f"KILL_SEED={SEED}")
    dice = random.Random(SEED)
    daemon = start_daemon({**SETTINGS, "pools": {"default": {"concurrency": 3}}})
    pauses = [dice.choice([0, 0, 0.02]) for _ in range(400)]
    parents = [dice.sample(range(max(0, n - 30), n), min(n, dice.choice([0, 1, 1, 2, 5]))) for n in range(400)]
    killer = Killer(daemon, jobs, dice)
    for at in range(0, 400, 40):
        ids = {row["line"]: row["id"] for row in jobs.query("SELECT id, args ->> 'line' AS line FROM roost.jobs")}
        made: dict[int, JobInsert] = {}  # of this call; those before it are named by their ids
        for n in range(at, at + 40):
            depends_on = [made.get(parent) or ids[str(parent)] for parent in parents[n]]
            made[n] = JobInsert("note", {"line": str(n), "seconds": pauses[n]}, depends_on=depends_on)
        jobs.roost.enqueue_many(made.values())
        time.sleep(dice.uniform(0, 0.3))  # into the middle of them
        killer.kill()
    eventually(lambda: jobs.count("completed") == 400, lambda: f"end of all jobs. {daemon.told()}", 200)
    rows = jobs.query("SELECT id, depends_on, (args ->> 'line') AS line FROM roost.jobs")
    line_of = {row["id"]: row["line"] for row in rows}
    first = {line: place for place, line in reversed(list(enumerate(daemon.notes())))}
    for row in rows:
        for parent in row["depends_on"]:
            assert first[line_of[parent]] < first[row["line"]], f"job {row['id']} ran before its parent {parent}"
    assert jobs.query("SELECT * FROM roost.blocked") == jobs.query("SELECT * FROM roost.dependencies") == []
    eventually(lambda: not jobs.query("SELECT * FROM roost.ended_parents"), "end of what was noted")


@pytest.mark.timeout(240)
def test_no_key_is_twice_active_and_none_stays_taken_whatever_is_killed(start_daemon: StartDaemon, jobs: Jobs) -> None:
    print(f"KILL_SEED={SEED}")
    jobs.query(HISTORY)
    daemon = start_daemon({**SETTINGS, "pools": {"default": {"concurrency": 3}}})
    done = threading.Event()
    killer = Killer(daemon, jobs, random.Random(SEED))

    def enqueue(worker: int) -> tuple[int, int]:
        dice, added, refused = random.Random(SEED + worker), 0, 0
        with Roost(jobs.dsn) as roost:
            while added + refused < 400 or killer.kills < KILLS:
                task, args = dice.choice([("noop", {}), ("sleep", {"seconds": 0.01}), ("fail", {})])
                keys = [f"k{dice.randrange(12)}" for _ in range(dice.choice([1, 1, 5]))]
                inserts = [JobInsert(task, args, unique_key=key, max_attempts=dice.choice([1, 50])) for key in keys]
                count = roost.enqueue_many([insert for insert in inserts if task != "fail" or insert.max_attempts == 1])
                added, refused = added + count, refused + count.duplicates
                time.sleep(0.002)
        return added, refused

    with ThreadPoolExecutor(5) as pool:
        killing = pool.submit(killer.kill_until, done, 0.5)
        try:
            counts = list(pool.map(enqueue, range(4)))
            unfinished = "SELECT 1 FROM roost.jobs WHERE state IN ('available', 'retryable', 'executing')"
            eventually(
                lambda: not jobs.query(unfinished) or killing.done(), lambda: f"end of all jobs. {daemon.told()}", 150
            )
        finally:
            done.set()
        killing.result()
    assert killer.kills >= KILLS
    assert all(added and refused for added, refused in counts)
    active: dict[str, int] = {}
    for row in jobs.query("SELECT * FROM public.history ORDER BY turn"):
        holder = active.get(row["unique_key"], row["job_id"])
        assert holder == row["job_id"], f"{row['unique_key']} was of jobs {holder} and {row['job_id']} at once"
        if row["is_active"]:
            active[row["unique_key"]] = row["job_id"]
        else:
            active.pop(row["unique_key"], None)
    assert active == {}
    assert jobs.query("SELECT * FROM roost.unique_keys") == []
