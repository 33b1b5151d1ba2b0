"""What one job, generation or signal leaves behind must not reach the next, nor a child's lie its master."""

from __future__ import annotations

import signal
import time

import psycopg
import pytest

from tests.system.conftest import StartDaemon
from tests.system.daemon import HANDLERS, Daemon, eventually
from tests.system.handlers.liars import BODIES
from tests.system.jobs import Jobs

SETTINGS = {
    "handlers": {"modules": ["tasks", "liars"]},
    "pools": {"default": {"queues": ["default"], "concurrency": 1}},
}

WAITS = """
import os, time
from pathlib import Path
while not Path("import.go").exists():
    time.sleep(0.01)
Path("import.new").write_text(str(os.getpid()))
Path("import.new").rename("import.pid")
"""


@pytest.mark.parametrize("task", ["no_such_task", "echo"])
def test_a_job_that_never_gets_to_its_handler_does_not_inherit_the_cancel_of_the_last(
    shared_daemon: Daemon, shared_jobs: Jobs, task: str
) -> None:
    cancelled = shared_jobs.add("hold_cleanly", {"key": task})
    shared_daemon.wait_started(task)
    shared_jobs.roost.cancel(cancelled)
    assert shared_jobs.wait(cancelled).state == "cancelled"
    (row,) = shared_jobs.query("""SELECT roost.enqueue(%s, '{"value": 1e5000}', max_attempts => 1) AS id""", task)
    job = shared_jobs.wait(row["id"])
    assert job.state == "discarded", job.errors


@pytest.mark.parametrize("what", BODIES)
def test_a_child_that_reports_nonsense_costs_its_own_job_only(
    shared_daemon: Daemon, shared_jobs: Jobs, what: str
) -> None:
    job = shared_jobs.wait(shared_jobs.add("lie", {"what": what}, max_attempts=1))
    assert job.state == "discarded"
    assert job.errors
    assert shared_jobs.wait(shared_jobs.add("echo", {"value": 1})).result == 1
    assert shared_daemon.runs


def test_a_job_that_was_cancelled_elsewhere_may_be_run_again_here_at_once(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemons = [start_daemon(SETTINGS), start_daemon(SETTINGS)]
    job = jobs.add("hold_cleanly", {"key": "first"})
    (ran,) = eventually(lambda: [d for d in daemons if (d.folder / "first.started").exists()], "start of the job")
    (other,) = [d for d in daemons if d is not ran]
    jobs.roost.cancel(job)
    assert jobs.wait(job).state == "cancelled"
    assert ran.stop() == 0
    jobs.roost.retry(job)
    other.wait_started("first")
    other.let_go("first")
    eventually(lambda: jobs.get(job).state != "executing", "end of the job")
    assert jobs.get(job).state == "completed", other.told()


def test_handlers_whose_import_starts_a_thread_are_refused_before_they_take_over(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon(SETTINGS)
    module = "import threading\nthreading.Thread(target=threading.Event().wait, name='pump', daemon=True).start()\n"
    (daemon.folder / "threaded.py").write_text(module)
    daemon.write_config(
        {"handlers": {"modules": ["tasks", "threaded"], "pythonpath": [str(HANDLERS), str(daemon.folder)]}}
    )
    daemon.signal(signal.SIGHUP)
    assert "pump" in daemon.wait_for("reload.failed")["error"]
    assert jobs.wait(jobs.add("echo", {"value": 1})).result == 1
    assert daemon.stop() == 0
    assert daemon.start(ready := "--once").wait_exit() == 78, ready


def test_a_generation_that_is_ready_during_a_stop_does_not_prolong_it(start_daemon: StartDaemon, jobs: Jobs) -> None:
    daemon = start_daemon(SETTINGS)
    held = jobs.add("hold", {"key": "held"})
    daemon.wait_started("held")
    (daemon.folder / "waits.py").write_text(WAITS)
    daemon.write_config(
        {"handlers": {"modules": ["tasks", "waits"], "pythonpath": [str(HANDLERS), str(daemon.folder)]}}
    )
    daemon.signal(signal.SIGHUP)
    daemon.wait_for("generation.starting", generation=2)
    daemon.signal(signal.SIGTERM)
    daemon.wait_for("worker.draining")
    (daemon.folder / "import.go").touch()
    template = int(daemon.wait_text("import.pid"))
    eventually(lambda: waits_for_orders(template), "generation that is ready")
    daemon.let_go("held")
    asked_at = time.monotonic()
    assert daemon.wait_exit() == 0
    assert time.monotonic() - asked_at < 20  # shutdown_timeout is 30 s
    assert jobs.get(held).state == "completed"


def waits_for_orders(template: int) -> bool:
    """Whether it has said all it has to say, which its master reads before it hears of anything later."""
    with open(f"/proc/{template}/wchan") as file:
        return "poll" in file.read()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU, signal.SIGHUP])
def test_a_signal_during_the_start_does_not_end_or_stop_it(
    start_daemon: StartDaemon, jobs: Jobs, number: signal.Signals
) -> None:
    daemon = start_daemon(SETTINGS, ready=False)
    caught = 0
    while not daemon.entries("generation.starting"):
        assert daemon.runs
        if ignores_or_catches(daemon.pid, signal.SIGHUP):  # the interpreter is up, and roostd has begun
            daemon.signal(number)
            caught += 1
        time.sleep(0.005)
    assert caught
    daemon.wait_ready()
    assert jobs.wait(jobs.add("echo", {"value": 1})).result == 1


def ignores_or_catches(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status") as file:
        masks = {line.split(":")[0]: int(line.split()[1], 16) for line in file if line.startswith(("SigIgn", "SigCgt"))}
    return bool((masks["SigIgn"] | masks["SigCgt"]) & 1 << (number - 1))


def test_settings_of_the_role_do_not_change_how_the_daemon_works(start_daemon: StartDaemon, jobs: Jobs) -> None:
    (row,) = jobs.query("SELECT current_user AS name")
    settings = {
        "default_transaction_isolation": "serializable",
        "statement_timeout": "1ms",
        "lock_timeout": "1ms",
        "idle_session_timeout": "200ms",
        "client_encoding": "SQL_ASCII",
        "search_path": "nowhere",
    }

    def connect() -> psycopg.Connection:
        options = "-c statement_timeout=0 -c lock_timeout=0 -c idle_session_timeout=0"
        return psycopg.connect(jobs.dsn, autocommit=True, client_encoding="utf8", options=options)

    with connect() as conn:
        database = conn.info.dbname
        for name, value in settings.items():
            conn.execute(f'ALTER ROLE "{row["name"]}" IN DATABASE "{database}" SET {name} = \'{value}\''.encode())
    try:
        daemon = start_daemon(SETTINGS)
        with connect() as conn:
            conn.execute("""SELECT roost.enqueue('echo', '{"value": "ü"}') FROM generate_series(1, 200)""")

        def is_done() -> bool:
            with connect() as conn:
                return conn.execute("SELECT count(*) FROM roost.jobs WHERE state = 'completed'").fetchone() == (200,)

        eventually(is_done, lambda: f"end of the jobs. {daemon.told()}")
        since = daemon.mark()
        time.sleep(0.5)
        assert not [e for e in daemon.entries(since=since) if e.get("level") in ("warning", "error")]
    finally:
        with connect() as conn:
            conn.execute(f'ALTER ROLE "{row["name"]}" IN DATABASE "{database}" RESET ALL'.encode())
