"""roostctl explain beside a real daemon: it says what is so, and the command that it names has the job run."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from roostd.ctl import main
from tests.system.daemon import HANDLERS, Daemon, eventually
from tests.system.jobs import Jobs

MORE = """
from roost_client import job
from tasks import hold

job("one_at_a_time", max_concurrency=1)(hold)
"""
Ctl = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def daemon(shared_jobs: Jobs) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        folder = Path(directory).resolve()
        (folder / "more.py").write_text(MORE)
        settings = {
            "worker": {"name": "alpha", "poll_interval": 0.3, "retry_strategy": {"strategy": "fixed", "delay": 3600}},
            "handlers": {"modules": ["tasks", "more"], "pythonpath": [str(HANDLERS), str(folder)]},
            "pools": {
                "default": {"queues": ["default"], "concurrency": 2},
                "narrow": {"queues": ["narrow"], "concurrency": 1},
            },
        }
        daemon = Daemon(folder, shared_jobs.dsn, settings)
        shared_jobs.told = daemon.told
        with closing(daemon.start()):
            yield daemon.wait_ready()


@pytest.fixture
def jobs(shared_jobs: Jobs, daemon: Daemon) -> Jobs:
    def told() -> bool:
        metadata = [worker.metadata for worker in shared_jobs.roost.list_workers()]
        return bool(metadata) and all("tasks" in each for each in metadata)

    eventually(told, "heartbeat with the names of the tasks")
    return shared_jobs


@pytest.fixture
def ctl(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs a command line as it is shown; what it printed as JSON."""

    def run(line: str) -> dict[str, Any]:
        program, *arguments = shlex.split(line)
        assert program == "roostctl"
        capsys.readouterr()
        code = main([*arguments, "--json", "--dsn", jobs.dsn])
        out, err = capsys.readouterr()
        assert code == 0, err
        return dict(found) if isinstance(found := json.loads(out), dict) else {"all": found}

    return run


@pytest.fixture
def explain(ctl: Ctl) -> Callable[[int], dict[str, Any]]:
    return lambda job_id: ctl(f"roostctl explain {job_id}")


Explain = Callable[[int], dict[str, Any]]


def test_a_paused_queue(jobs: Jobs, ctl: Ctl, explain: Explain) -> None:
    jobs.roost.pause_queue("default")
    job_id = jobs.add("noop")
    said = explain(job_id)
    assert (said["code"], said["command"]) == ("paused", "roostctl resume default")
    ctl(said["command"])
    jobs.wait(job_id, "completed")


def test_a_queue_that_nobody_serves(jobs: Jobs, daemon: Daemon, ctl: Ctl, explain: Explain) -> None:
    job_id = jobs.add("noop", queue="narow")
    said = explain(job_id)
    assert (said["code"], said["details"]["nearest"]) == ("no-worker", "narrow")
    assert said["command"] == "roostctl reload --worker alpha"
    daemon.write_config({"pools": {"narrow": {"queues": ["narrow", "narow"]}}})
    ctl(said["command"])
    jobs.wait(job_id, "completed")


def test_a_task_that_no_handler_is_for(jobs: Jobs, daemon: Daemon, ctl: Ctl, explain: Explain) -> None:
    job_id = jobs.add("nooop")
    jobs.wait(job_id, "retryable")
    said = explain(job_id)
    assert (said["code"], said["details"]["nearest"]) == ("unknown-task", "noop")
    assert said["details"]["also"] == ["retry-backoff"]
    (daemon.folder / "more.py").write_text(MORE + 'job("nooop")(lambda: None)\n')
    ctl(said["command"])
    said = eventually(lambda: s if (s := explain(job_id))["code"] != "unknown-task" else None, "news of the task")
    assert said["code"] == "retry-backoff"
    assert "UnknownTaskError" in said["details"]["error"]
    ctl(said["command"])
    jobs.wait(job_id, "completed")


def test_a_job_that_waits_for_another(jobs: Jobs, daemon: Daemon, ctl: Ctl, explain: Explain) -> None:
    parent = jobs.add("hold", {"key": "parent"})
    child = jobs.add("noop", depends_on=[parent])
    daemon.wait_started("parent")
    said = explain(child)
    assert (said["code"], said["details"]["parents"]) == ("blocked", [{"id": parent, "state": "executing"}])
    said = ctl(said["command"])
    assert (said["job_id"], said["code"], said["details"]["worker"]) == (parent, "executing", "alpha")
    daemon.let_go("parent")
    jobs.wait(child, "completed")
    assert explain(child)["code"] == "completed"


def test_jobs_whose_time_has_not_come(jobs: Jobs, daemon: Daemon, ctl: Ctl, explain: Explain) -> None:
    scheduled = jobs.add("noop", scheduled_at=datetime.now(UTC) + timedelta(hours=1))
    failed = jobs.add("fail_first", {"key": "once", "times": 1})
    jobs.wait(failed, "retryable")
    for job_id, code in ((scheduled, "scheduled"), (failed, "retry-backoff")):
        said = explain(job_id)
        assert (said["code"], said["details"].get("error")) == (code, {failed: "ValueError: run 1 fails"}.get(job_id))
        ctl(said["command"])
        jobs.wait(job_id, "completed")


def test_ends_that_can_be_mended(jobs: Jobs, ctl: Ctl, explain: Explain) -> None:
    parent = jobs.add("fail_first", {"key": "parent", "times": 1}, max_attempts=1)
    child = jobs.add("noop", depends_on=[parent])
    jobs.wait(child, "cancelled")
    assert explain(parent)["code"] == "discarded"
    said = explain(child)
    assert (said["code"], said["details"]["dead_parents"]) == ("cancelled", [parent])
    ctl(said["command"])
    jobs.wait(child, "completed")


def test_a_throttled_task(jobs: Jobs, daemon: Daemon, ctl: Ctl, explain: Explain) -> None:
    first = jobs.add("one_at_a_time", {"key": "first"})
    daemon.wait_started("first")
    second = jobs.add("one_at_a_time", {"key": "second"})
    said = explain(second)
    assert (said["code"], said["details"]["limits"]) == ("throttled", ["max_concurrency"])
    assert [job["id"] for job in ctl(said["command"])["all"]] == [first]
    daemon.let_go("first", "second")
    jobs.wait(second, "completed")


def test_jobs_behind_others_and_busy_children(jobs: Jobs, daemon: Daemon, explain: Explain) -> None:
    running = jobs.add("hold", {"key": "busy"}, queue="narrow")
    daemon.wait_started("busy")
    first, second = (jobs.add("noop", queue="narrow") for _ in range(2))
    assert explain(running)["code"] == "executing"
    # The other pool is idle, and the last heartbeat was before; for a moment the child may have been given it ahead.
    said = eventually(lambda: s if (s := explain(first))["code"] == "busy" else None, "busy children")
    assert (said["details"]["busy"], said["details"]["children"], said["command"]) == (1, 1, None)
    said = explain(second)
    assert (said["code"], said["details"]["ahead"]) == ("behind", 1)
    daemon.let_go("busy")
    jobs.wait(second, "completed")


def test_a_worker_tells_its_tasks_once(jobs: Jobs, ctl: Ctl) -> None:
    """Of each generation, and under each of its ids: there may be many, and a heartbeat every few seconds."""

    def metadata() -> dict[str, Any]:
        workers = jobs.roost.list_workers()
        return {"id": workers[0].id, "seen_at": workers[0].last_seen_at, **workers[0].metadata} if workers else {}

    before = metadata()
    assert {"noop", "hold", "one_at_a_time"} <= set(before["tasks"])
    jobs.query("UPDATE roost.workers SET metadata = metadata - 'tasks'")
    began = metadata()["seen_at"]
    eventually(lambda: metadata()["seen_at"] > began + timedelta(seconds=1), "some heartbeats")
    assert "tasks" not in metadata()
    ctl("roostctl reload --worker alpha")
    eventually(lambda: metadata().get("tasks") == before["tasks"], "the tasks of the new generation")
    jobs.query("DELETE FROM roost.workers")
    eventually(lambda: metadata().get("tasks") == before["tasks"], "the tasks under a new id")
    assert metadata()["id"] != before["id"]


def test_no_worker_at_all(jobs: Jobs, daemon: Daemon, explain: Explain) -> None:
    assert daemon.stop() == 0
    job_id = jobs.add("noop")
    said = explain(job_id)
    assert (said["code"], said["command"]) == ("no-worker", "roostd -c /etc/roost.toml")
    daemon.start().wait_ready()  # with -c and its own file
    jobs.wait(job_id, "completed")


def test_what_is_printed(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.roost.pause_queue("elsewhere\x1b")
    job_id = jobs.add("noop", queue="elsewhere\x1b", scheduled_at=datetime.now(UTC) + timedelta(hours=1))
    assert main(["explain", str(job_id), "--dsn", jobs.dsn]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("paused: queue 'elsewhere\\x1b' is paused, since 20")
    assert rest == ["try: roostctl resume $'elsewhere\\x1b'", "also: no-worker, scheduled"]
    assert main(["explain", "999999", "--dsn", jobs.dsn]) == 1
    assert capsys.readouterr().out.startswith("unknown: no job has ever had this id")
