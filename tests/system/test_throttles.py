"""The limits of tasks through real daemons, several at a time, as their own handlers measure them."""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import islice
from pathlib import Path

import psycopg
import pytest

from roost_client import JobInsert
from tests.system.conftest import StartDaemon
from tests.system.daemon import HANDLERS, Daemon, Settings, eventually
from tests.system.jobs import Jobs

SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))

# What runs holds a lock on one of as many files as may run at once: the kernel frees it when the process is gone.
SHOP = """
import fcntl, os, time
from pathlib import Path
import psycopg
from roost_client import current_job, job

HERE = Path(__file__).parent

def note(name, line):
    with open(HERE / name, "a") as file:
        file.write(f"{{line}}\\n")

@job("slow", {slow})
def slow(seconds=0.0, key=None, slots={slots}, dsn=None):
    with open(os.devnull) as nothing:
        for number in range(slots):
            slot = open(HERE / f"slot-{{number}}", "a")
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                slot.close()
        else:
            note("exceeded.txt", f"{{os.getpid()}} at {{time.monotonic()}}")
        note("slow.txt", number)
        if key is not None:
            (HERE / f"{{key}}.started").touch()
            while not (HERE / f"{{key}}.go").exists():
                time.sleep(0.005)
        time.sleep(seconds)
        slot.close()
    if dsn is not None:
        with psycopg.connect(dsn) as conn, current_job().transaction(conn):
            pass

@job("rated", {rated})
def rated(seconds=0.0):
    note("rated.txt", time.clock_gettime(time.CLOCK_BOOTTIME))
    time.sleep(seconds)
"""


class Shop:
    """The handlers of a test, and what they have noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write(self, *, slow: str = "", rated: str = "", slots: int = 3) -> None:
        (self.folder / "shop.py").write_text(SHOP.format(slow=slow, rated=rated, slots=slots))

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def settings(self, concurrency: int = 3, **worker: float) -> Settings:
        return {
            "handlers": {"modules": ["tasks", "shop"], "pythonpath": [str(self.folder), str(HANDLERS)]},
            "worker": {"poll_interval": 0.3, "max_crashes": 1000, **worker},
            "pools": {"default": {"concurrency": concurrency}},
        }

    def started(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.started"))

    def let_go(self, *keys: str) -> None:
        for key in keys:
            (self.folder / f"{key}.go").touch()

    def assert_rate(self, rate: int) -> None:
        starts = sorted(map(float, self.lines("rated.txt")))
        for first, last in zip(starts, islice(starts, rate, None), strict=False):
            assert last - first >= 60, starts


@pytest.fixture
def shop(folder: Path) -> Shop:
    return Shop(folder / "shop")


def test_three_masters_never_run_more_at_once_than_one_task_may(
    start_daemon: StartDaemon, jobs: Jobs, shop: Shop
) -> None:
    shop.write(slow="max_concurrency=3")
    for _ in range(3):
        start_daemon(shop.settings())
    throttled = jobs.add_many(150, "slow", {"seconds": 0.02})
    free = jobs.add_many(300, "noop")
    jobs.wait_all(free)
    jobs.wait_all(throttled)
    assert shop.lines("exceeded.txt") == []
    assert set(shop.lines("slow.txt")) == {"0", "1", "2"}
    assert jobs.query("SELECT id FROM roost.jobs WHERE attempt <> 1") == []


@pytest.mark.parametrize("by_itself", [False, True], ids=["completed", "completed by itself"])
def test_a_place_that_becomes_free_is_filled_at_once(
    start_daemon: StartDaemon, jobs: Jobs, shop: Shop, by_itself: bool
) -> None:
    shop.write(slow="max_concurrency=1")
    start_daemon(shop.settings(poll_interval=20))
    jobs.query("UPDATE roost.throttles SET limited_since = '2020-01-01Z'")
    jobs.wait_all(jobs.add_many(20, "slow", {"dsn": jobs.dsn} if by_itself else {}), seconds=15)
    assert shop.lines("exceeded.txt") == []


@pytest.mark.timeout(180)
def test_kills_of_children_and_masters_leak_no_place_and_exceed_no_limit(
    start_daemon: StartDaemon, jobs: Jobs, shop: Shop
) -> None:
    print(f"KILL_SEED={SEED}")
    dice = random.Random(SEED)
    shop.write(slow="max_concurrency=3")
    daemons = [start_daemon(shop.settings()) for _ in range(2)]
    ids = jobs.add_many(400, "slow", {"seconds": 0.03}, max_attempts=1000)
    for _ in range(25):
        time.sleep(dice.uniform(0.05, 0.5))
        _kill_something(dice, dice.choice(daemons))
    for daemon in daemons:
        daemon.wait_children(3)
    jobs.wait_all(ids, seconds=90)
    assert shop.lines("exceeded.txt") == [], f"seed {SEED}"
    held = [f"held-{n}" for n in range(4)]
    for key in held:
        jobs.add("slow", {"key": key})
    eventually(lambda: len(shop.started()) == 3, lambda: f"three at once, but {shop.started()}, seed {SEED}")
    shop.let_go(*held)
    eventually(lambda: len(shop.started()) == 4, "the fourth")
    eventually(lambda: jobs.query("SELECT 1 FROM roost.claims") == [], "end of all")


def _kill_something(dice: random.Random, daemon: Daemon) -> None:
    if dice.random() < 0.75:
        children = daemon.children()
        if children:
            try:
                os.kill(dice.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                pass
        return
    daemon.signal(signal.SIGKILL)
    daemon.wait_exit()
    since = daemon.mark()
    daemon.start()
    daemon.wait_for("worker.ready", since=since)


@pytest.mark.timeout(150)
def test_no_minute_holds_more_starts_than_the_rate_of_a_task(start_daemon: StartDaemon, jobs: Jobs, shop: Shop) -> None:
    shop.write(rated="rate_per_minute=6")
    daemons = [start_daemon(shop.settings()) for _ in range(2)]
    jobs.add_many(40, "rated", {"seconds": 0.01}, max_attempts=1000)
    eventually(lambda: len(shop.lines("rated.txt")) == 6, lambda: f"six starts: {shop.lines('rated.txt')}")
    jobs.wait_all(jobs.add_many(50, "noop"))
    daemons[0].signal(signal.SIGKILL)
    daemons[0].wait_exit()
    daemons[0].start()
    eventually(lambda: len(shop.lines("rated.txt")) == 12, lambda: f"six more: {shop.lines('rated.txt')}", 75)
    shop.assert_rate(6)
    starts = sorted(map(float, shop.lines("rated.txt")))
    assert starts[6] - starts[0] < 64  # and it is made use of


def test_a_job_that_comes_too_late_for_its_rate_is_not_started_but_waits_again(
    start_daemon: StartDaemon, jobs: Jobs, shop: Shop
) -> None:
    shop.write(rated="rate_per_minute=1")
    daemon = start_daemon(shop.settings(concurrency=2))
    first, second = daemon.wait_children(2)
    jobs.query("UPDATE roost.throttles SET limited_since = '2020-01-01Z'")
    for child in (first, second):
        os.kill(child, signal.SIGSTOP)
    job_id = jobs.add("rated")
    jobs.wait(job_id, "executing")
    eventually(lambda: jobs.query("SELECT 1 FROM roost.throttled"), lambda: f"a new wait. {daemon.told()}", 20)
    assert jobs.get(job_id).attempt == 0
    assert shop.lines("rated.txt") == []
    jobs.query("DELETE FROM roost.throttle_starts")
    assert jobs.wait(job_id).attempt == 1
    eventually(lambda: shop.lines("rated.txt"), "first start, a second after its limit was declared")
    assert len(shop.lines("rated.txt")) == 1


def test_a_reload_changes_limits_live(start_daemon: StartDaemon, jobs: Jobs, shop: Shop) -> None:
    shop.write(slow="max_concurrency=1")
    daemon = start_daemon(shop.settings(concurrency=6, prefetch=1))  # what is claimed while there is no limit may start
    keys = [f"key-{n}" for n in range(9)]
    for key in keys:
        jobs.add("slow", {"key": key})
    eventually(lambda: shop.started() == keys[:1], lambda: f"the first: {shop.started()}")
    jobs.wait_all(jobs.add_many(20, "noop"))
    assert shop.started() == keys[:1]
    shop.write(slow="max_concurrency=3")
    daemon.signal(signal.SIGHUP)
    # Not always the first: a child of the old generation may hand its next job back.
    eventually(lambda: len(shop.started()) == 3, lambda: f"three: {shop.started()}")
    running = shop.started()
    jobs.wait_all(jobs.add_many(20, "noop"))
    assert shop.started() == running
    shop.write(slow="")
    daemon.signal(signal.SIGHUP)
    eventually(lambda: len(shop.started()) == 6, lambda: f"as many as there are children: {shop.started()}")
    running = shop.started()
    shop.write(slow="max_concurrency=2")
    daemon.signal(signal.SIGHUP)
    eventually(lambda: jobs.query("SELECT 1 FROM roost.throttles WHERE max_concurrency = 2"), "the new limit")
    shop.let_go(*running[:4])
    eventually(lambda: len(jobs.query("SELECT 1 FROM roost.claims")) == 2, "end of four")
    jobs.wait_all(jobs.add_many(20, "noop"))
    assert shop.started() == running
    shop.let_go(running[4])
    eventually(lambda: len(shop.started()) == 7, lambda: f"one more: {shop.started()}")
    shop.let_go(*keys)
    eventually(lambda: jobs.count("completed") == 60 + len(keys), lambda: f"the end. {daemon.told()}")


@pytest.mark.timeout(120)
def test_the_backlog_of_a_throttled_task_delays_no_other(start_daemon: StartDaemon, jobs: Jobs, shop: Shop) -> None:
    shop.write(rated="rate_per_minute=1")
    # Before anybody knows of the limit, and after.
    jobs.roost.enqueue_many([JobInsert("rated")] * 20_000)
    start_daemon(shop.settings(concurrency=2))
    jobs.wait_all([jobs.add("noop")])
    eventually(lambda: jobs.query("SELECT count(*) AS n FROM roost.ready")[0]["n"] == 0, "all set aside")
    # Two at a time, which is what the pool had room for, would be ten thousand claims.
    commits = jobs.query("SELECT xact_commit AS n FROM pg_stat_database WHERE datname = current_database()")[0]["n"]
    assert commits < 4000
    jobs.roost.enqueue_many([JobInsert("rated")] * 50_000)
    assert jobs.query("SELECT count(*) AS n FROM roost.ready")[0]["n"] == 0
    began_at = time.monotonic()
    for _ in range(20):
        jobs.wait_all([jobs.add("noop")])
    assert time.monotonic() - began_at < 10
    eventually(lambda: shop.lines("rated.txt"), "first start, a second after its limit was declared")
    assert len(shop.lines("rated.txt")) == 1


def test_once_runs_what_the_limits_allow_and_does_not_wait_for_more(
    start_daemon: StartDaemon, jobs: Jobs, shop: Shop
) -> None:
    shop.write(slow="max_concurrency=1", rated="rate_per_minute=2")
    slow, rated = jobs.add_many(5, "slow"), jobs.add_many(5, "rated")
    daemon = start_daemon(shop.settings(), "--once", ready=False)
    assert daemon.wait_exit() == 0
    # Limits that are new give nothing free for a second: what waits for them is left to the next run.
    jobs.query("UPDATE roost.throttles SET limited_since = '2020-01-01Z'")
    daemon.start("--once")
    assert daemon.wait_exit() == 0
    states = jobs.query("SELECT id, state FROM roost.jobs ORDER BY id")
    assert [row["state"] for row in states if row["id"] in slow] == ["completed"] * 5
    assert sorted(row["state"] for row in states if row["id"] in rated) == ["available"] * 3 + ["completed"] * 2
    assert shop.lines("exceeded.txt") == []


def test_who_holds_the_row_of_a_limit_holds_up_its_task_alone(
    start_daemon: StartDaemon, jobs: Jobs, shop: Shop
) -> None:
    shop.write(slow="max_concurrency=1")
    start_daemon(shop.settings())
    jobs.wait_all([jobs.add("slow")])
    with psycopg.connect(jobs.dsn) as conn:
        conn.execute("SELECT FROM roost.throttles FOR SHARE")
        held = jobs.add("slow")
        for _ in range(10):
            jobs.wait_all([jobs.add("noop")])
        assert jobs.get(held).state == "available"
    jobs.wait_all([held])
