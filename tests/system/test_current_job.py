"""Jobs that ask who they are and complete themselves: their effect happens once, and what stands in the log is true."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest

from roost_client import JobInsert
from tests.system.conftest import StartDaemon
from tests.system.daemon import COMMAND, HANDLERS, Daemon, Settings, eventually
from tests.system.jobs import Jobs
from tests.system.test_reload import assert_refused, reload

LATER = {"worker": {"retry_strategy": {"delay": 3600}}}
ONE_CHILD = {"pools": {"default": {"queues": ["default"], "concurrency": 1}}}


@pytest.fixture
def counting(jobs: Jobs) -> Jobs:
    jobs.query("CREATE TABLE counter (n integer)")
    jobs.query("INSERT INTO counter VALUES (0)")
    return jobs


def counter(jobs: Jobs) -> int:
    (row,) = jobs.query("SELECT n FROM counter")
    return int(row["n"])


def assert_nothing_was_lost(daemon: Daemon, jobs: Jobs) -> None:
    assert not daemon.entries("job.lease_lost")
    assert jobs.query("SELECT 1 FROM roost.claims") == []


def test_a_job_knows_what_it_was_enqueued_with_and_speaks_in_the_daemons_log(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon()
    options: dict[str, Any] = {"tags": ["a", "ü"], "metadata": {"trace": "00-1"}, "timeout_seconds": 60}
    job_id = jobs.add("tell_of_itself", **options)
    assert jobs.wait(job_id).result == {
        "id": job_id,
        "tags": ["a", "ü"],
        "metadata": {"trace": "00-1"},
        "lasts": True,
    }
    entry = daemon.wait_for("job.logged", job_id=job_id)
    assert (entry["message"], entry["order"], entry["task"], entry["level"]) == ("told", 17, "tell_of_itself", "info")
    plain = jobs.add("tell_of_itself")
    assert jobs.wait(plain).result == {"id": plain, "tags": [], "metadata": {}, "lasts": False}


# -- transactions


@pytest.mark.parametrize("task", ["add_one", "add_one_in_coroutine"])
def test_a_job_completes_in_its_own_transaction_and_no_lease_seems_lost(
    start_daemon: StartDaemon, counting: Jobs, task: str
) -> None:
    daemon = start_daemon()
    counting.wait_all(counting.add_many(100, task, {"dsn": counting.dsn}))
    assert counter(counting) == 100
    assert counting.query("SELECT 1 FROM roost.jobs WHERE attempt <> 1 OR errors <> '[]'") == []
    counting.wait_all(counting.add_many(10, "noop"))  # so that what was reported has been taken in
    assert_nothing_was_lost(daemon, counting)
    assert not daemon.entries("job.ended")


@pytest.mark.parametrize(
    "how", [{}, {"nested": True}, {"dies": True}], ids=["committed", "unconfirmed", "died after it"]
)
def test_what_depends_on_a_job_that_completes_itself_runs_at_once(
    start_daemon: StartDaemon, counting: Jobs, how: dict[str, bool]
) -> None:
    start_daemon({"worker": {"poll_interval": 60.0}})  # which would be too slow
    chain: list[JobInsert] = []
    for _ in range(10):
        chain.append(JobInsert("add_one", {"dsn": counting.dsn, **how}, depends_on=chain[-1:]))
    counting.roost.enqueue_many(chain)
    eventually(lambda: counter(counting) == 10, "end of the chain", seconds=40)


def test_a_dependent_that_is_held_delays_no_other_and_runs_when_it_is_free(
    start_daemon: StartDaemon, counting: Jobs
) -> None:
    start_daemon({"worker": {"poll_interval": 1000.0}})
    parent = JobInsert("add_one", {"dsn": counting.dsn, "before": 2})
    with psycopg.connect(counting.dsn) as conn:
        counting.roost.enqueue_many([parent, JobInsert("noop", depends_on=[parent])])
        conn.execute("SELECT roost.cancel(job_id) FROM roost.blocked")
        chain: list[JobInsert] = []
        for _ in range(50):
            chain.append(JobInsert("add_one", {"dsn": counting.dsn}, depends_on=chain[-1:]))
        eventually(lambda: counter(counting) == 1, "end of the parent")
        counting.roost.enqueue_many(chain)
        eventually(lambda: counter(counting) == 51, "end of the chain")
        conn.rollback()
    eventually(lambda: counting.count("completed") == 52, "end of the one that was held")


def test_jobs_that_complete_themselves_count_among_those_that_ended(start_daemon: StartDaemon, counting: Jobs) -> None:
    for nested in (False, True):
        counting.add_many(10, "add_one", {"dsn": counting.dsn, "nested": nested})
    daemon = start_daemon(None, "--once", ready=False)
    assert daemon.wait_exit() == 0
    assert daemon.stdout == "20\n"
    assert counter(counting) == 20
    assert_nothing_was_lost(daemon, counting)


def test_a_job_that_fails_after_its_commit_stays_completed_and_the_log_says_so(
    start_daemon: StartDaemon, counting: Jobs
) -> None:
    daemon = start_daemon()
    job_id = counting.add("add_one_and_fail", {"dsn": counting.dsn})
    entry = daemon.wait_for("job.failed_after_commit", job_id=job_id)
    assert (entry["error"], entry["attempt"]) == ("ValueError: after the commit", 1)
    job = counting.get(job_id)
    assert (job.state, job.errors, counter(counting)) == ("completed", [], 1)
    assert_nothing_was_lost(daemon, counting)


@pytest.mark.parametrize("task", ["add_one_and_hold", "add_one_and_leave_open"])
@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
def test_a_job_in_a_transaction_that_stays_open_holds_up_no_other_and_is_what_becomes_of_that(
    start_daemon: StartDaemon, counting: Jobs, task: str, commits: bool
) -> None:
    daemon = start_daemon(LATER)
    job_id = counting.add(task, {"dsn": counting.dsn, "key": "held"})
    if task == "add_one_and_hold":
        daemon.wait_started("held")
    else:
        daemon.wait_for("outcomes.locked", jobs=[job_id])
    counting.wait_all(counting.add_many(200, "noop"))
    assert counting.get(job_id).state == "executing"
    (daemon.folder / ("held.go" if commits else "held.undo")).touch()
    if commits:
        job = counting.wait(job_id)
        assert (job.state, job.attempt, job.errors, counter(counting)) == ("completed", 1, [], 1)
    else:
        job = counting.wait(job_id, "retryable")
        assert (job.attempt, counter(counting)) == (1, 0)
        assert job.errors[0]["error"].startswith("TransactionNotCommitted: ")
        daemon.wait_for("job.ended", job_id=job_id, ending="failed")
    eventually(lambda: not counting.query("SELECT 1 FROM roost.claims"), "end of the claim")
    assert_nothing_was_lost(daemon, counting)


@pytest.mark.parametrize("commits", [True, False], ids=["commits", "does not commit"])
def test_a_commit_whose_answer_is_lost_is_judged_by_the_lease(
    start_daemon: StartDaemon, counting: Jobs, commits: bool
) -> None:
    counting.query(
        "CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'"
    )
    counting.query(
        "CREATE CONSTRAINT TRIGGER waits AFTER UPDATE ON counter DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait_at_commit()"
    )
    daemon = start_daemon(LATER)
    with psycopg.connect(counting.dsn, autocommit=True) as conn:
        conn.execute("SELECT pg_advisory_lock(1)")
        job_id = counting.add("add_one_and_lose_the_answer", {"dsn": counting.dsn, "key": "lost"})
        daemon.wait_for("outcomes.locked", jobs=[job_id])  # the failure is reported while the server still commits
        counting.wait_all(counting.add_many(200, "noop"))
        if not commits:
            counting.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'handler'"
            )
        else:
            conn.execute("SELECT pg_advisory_unlock(1)")
        job = counting.wait(job_id, "completed" if commits else "retryable")
        assert (job.attempt, len(job.errors), counter(counting)) == ((1, 0, 1) if commits else (1, 1, 0))
    assert_nothing_was_lost(daemon, counting)


def test_a_job_that_is_killed_by_its_timeout_in_the_block_has_had_no_effect(
    start_daemon: StartDaemon, counting: Jobs
) -> None:
    daemon = start_daemon(LATER)
    job_id = counting.add("add_one_later", {"dsn": counting.dsn, "key": "held"}, timeout_seconds=1)
    daemon.wait_started("held")
    job = counting.wait(job_id, "retryable")
    assert job.errors[0]["error"].startswith("TimeoutError: ")
    eventually(
        lambda: not counting.query("SELECT 1 FROM pg_stat_activity WHERE application_name = 'handler'"),
        "end of its connection",
    )
    assert counter(counting) == 0
    assert_nothing_was_lost(daemon, counting)


def test_a_run_whose_job_another_worker_has_taken_rolls_back(start_daemon: StartDaemon, counting: Jobs) -> None:
    settings: Settings = {"worker": {"orphan_stale_after": 2.0}, **ONE_CHILD}
    stopped = start_daemon(settings)
    job_id = counting.add("add_one_later", {"dsn": counting.dsn, "key": "held"})
    stopped.wait_started("held")
    stopped.signal(signal.SIGSTOP)
    peer = start_daemon(settings)
    peer.wait_for("worker.declared_dead", pid=stopped.pid)
    # Until its claim is freed, which comes after that, the first run may complete.
    eventually(lambda: counting.query("SELECT 1 FROM roost.jobs WHERE attempt = 2"), "second claim")
    peer.let_go("held")
    # The first run, in its block still, holds the counter's row: it must end before the second can have it.
    stopped.let_go("held")
    assert counting.wait(job_id).attempt == 2
    stopped.signal(signal.SIGCONT)
    stopped.wait_for("worker.registered")
    assert counter(counting) == 1
    assert counting.query("SELECT 1 FROM roost.claims") == []


def test_two_thousand_jobs_that_add_one_have_added_two_thousand_whatever_was_killed_meanwhile(
    start_daemon: StartDaemon, counting: Jobs
) -> None:
    seed = int(os.environ.get("ROOST_TEST_SEED") or random.randrange(2**32))
    print(f"seed {seed}")
    rng = random.Random(seed)
    number = 2_000
    settings: Settings = {"worker": {"max_crashes": 1_000, "orphan_reaper_interval": 0.2, "orphan_stale_after": 2.0}}
    daemons = [start_daemon(settings), start_daemon(settings)]

    def one(index: int) -> JobInsert:
        args = {"dsn": counting.dsn, "before": rng.uniform(0, 0.004), "after": rng.uniform(0, 0.003)}
        if index % 10 == 0:
            return JobInsert("add_one_in_coroutine", args, max_attempts=10_000)
        return JobInsert("add_one", {**args, "nested": index % 10 == 1}, max_attempts=10_000)

    counting.roost.enqueue_many([one(index) for index in range(number - 3 * SLOW)])
    # What takes seconds to come back dies a few times, as the jobs go on; what is back at once, all the time, on a slow
    # machine a few times.
    every = ("master", "template", "lease", "child", "handler", "roostd")
    rare = sorted((rng.randrange(number * 9 // 10), what) for what in every * 3)
    done: Counter[str] = Counter()
    deadline = time.monotonic() + 100
    while (completed := counting.count("completed")) < number:
        assert time.monotonic() < deadline, f"{completed} after {done}; {[daemon.told() for daemon in daemons]}"
        what = (
            rare.pop(0)[1]
            if rare and rare[0][0] <= completed
            else rng.choices(["child", "handler", "roostd"], [5, 5, 1])[0]
        )
        done[what] += kill(what, rng.choice(daemons), counting, rng)
        time.sleep(rng.uniform(0, 0.15))
    print(done)
    assert counter(counting) == number
    assert min(done[what] for what in every) > 0


def watched(jobs: Jobs) -> str:
    """What the server says of workers and their sessions."""
    sessions = (
        "SELECT pid, application_name, state, wait_event_type, wait_event, now() - xact_start AS age,"
        " pg_blocking_pids(pid) AS blocked_by, left(query, 300) AS query"
        " FROM pg_stat_activity WHERE datname = current_database()"
    )
    return f"{jobs.query('SELECT * FROM roost.workers')} {jobs.query(sessions)} {jobs.told()}"


OLD_BLOCKS = (
    "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'handler'"
    " AND xact_start < now() - interval '1.5 s'"
)
SLOW = 4  # jobs that each loss of a lease brings along


def kill(what: str, daemon: Daemon, jobs: Jobs, rng: random.Random) -> int:
    """Kills one of a kind, of `daemon` or on the server; returns how many."""
    match what:
        case "master":
            daemon.signal(signal.SIGKILL)
            daemon.wait_exit()
            daemon.start().wait_ready()
            return 1
        case "lease":
            # A daemon is stopped while a job is in its block, which goes on until the other has taken it away.
            slow = jobs.add_many(SLOW, "add_one", {"dsn": jobs.dsn, "before": 3.0}, priority=-1, max_attempts=10_000)
            holds = (
                "SELECT w.pid FROM roost.claims c JOIN roost.workers w ON w.id = c.worker_id WHERE job_id = ANY (%s)"
            )
            pid = eventually(lambda: jobs.query(holds, slow), "claim of a slow job")[0]["pid"]
            os.kill(pid, signal.SIGSTOP)
            eventually(
                lambda: not jobs.query("SELECT 1 FROM roost.workers WHERE pid = %s", pid),
                lambda: f"end of the row of {pid}: {watched(jobs)}",
            )
            eventually(lambda: not jobs.query(OLD_BLOCKS), "end of the blocks that were open")
            os.kill(pid, signal.SIGCONT)
            return 1
        case "handler" | "roostd":
            pids = jobs.query(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE %s"
                " ORDER BY pid",
                f"{what}%",
            )
            if pids:
                jobs.query("SELECT pg_terminate_backend(%s)", rng.choice(pids)["pid"])
            return len(pids[:1])
        case _:
            processes = daemon.children() if what == "child" else [daemon.wait_template()]
            for pid in rng.sample(processes, min(1, len(processes))):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return len(processes[:1])


# -- hooks

HOOKS = """
import json, os
from roost_client import Hooks

def after_job(job, *, result, error, ctx):
    with open("hooked.txt", "a") as file:
        file.write(f"{job.task} {type(error).__name__} {VERSION}\\n")

hooks = Hooks(after_job=after_job)
not_hooks = 5
VERSION = 1
"""


@pytest.fixture
def hooked(folder: Path) -> Settings:
    (folder / "app").mkdir()
    (folder / "app" / "observed.py").write_text(HOOKS)
    return {
        "handlers": {"modules": ["tasks"], "pythonpath": [str(folder / "app"), str(HANDLERS)]},
        "worker": {"hooks": "observed:hooks"},
    }


def test_after_job_runs_for_jobs_that_time_out_and_a_hook_that_hangs_is_killed(
    start_daemon: StartDaemon, jobs: Jobs, hooked: Settings, folder: Path
) -> None:
    daemon = start_daemon({**hooked, "worker": {**hooked["worker"], **LATER["worker"]}})
    jobs.wait(jobs.add("stuck_in_sleep", timeout_seconds=1), "retryable")
    assert (daemon.folder / "hooked.txt").read_text() == "stuck_in_sleep TimeoutError 1\n"
    file = folder / "app" / "observed.py"
    file.write_text(HOOKS.replace("VERSION = 1", "VERSION = 2").replace("import json, os", "import time"))
    assert reload(daemon)["event"] == "reload.done"
    jobs.wait(jobs.add("noop"))
    assert (daemon.folder / "hooked.txt").read_text().endswith("noop NoneType 2\n")
    file.write_text(HOOKS.replace("    with open", "    import time; time.sleep(3600)\n    with open"))
    assert reload(daemon)["event"] == "reload.done"
    job = jobs.wait(jobs.add("noop", timeout_seconds=1), "retryable")
    assert job.errors[0]["error"].startswith("TimeoutError: overran timeout_seconds (1), did not stop, and was killed")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("observed:not_hooks", "cannot use worker.hooks 'observed:not_hooks': it is a int, not a Hooks"),
        ("observed:nothing", "cannot use worker.hooks 'observed:nothing': module 'observed' has no 'nothing'"),
        ("no_such:hooks", "cannot import worker.hooks 'no_such:hooks': ModuleNotFoundError: No module named 'no_such'"),
    ],
)
def test_hooks_that_are_not_there_are_an_error_of_a_check_and_of_a_reload(
    start_daemon: StartDaemon, jobs: Jobs, hooked: Settings, address: str, reason: str
) -> None:
    daemon = start_daemon(hooked)
    daemon.write_config({"worker": {"hooks": address}})
    assert_refused(daemon, address, reason)
    assert jobs.wait(jobs.add("noop")).state == "completed"
    check = subprocess.run(
        [str(COMMAND), "--check", "-c", str(daemon.config_file)], capture_output=True, text=True, check=False
    )
    assert check.returncode == 78
    assert reason in check.stderr
    assert f"correct the code, or worker.hooks from {daemon.config_file}" in check.stderr
    assert f"worker.hooks = {json.dumps(address)}" in check.stdout
