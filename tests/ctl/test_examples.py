"""The handlers of examples/, run by a daemon as a user would run them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from roost_client import Job, Roost
from tests.system.daemon import Daemon, eventually

pytestmark = pytest.mark.daemon

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def daemon(dsn: str) -> Iterator[Daemon]:
    settings = {
        "handlers": {"modules": ["files", "faults", "orders"], "pythonpath": [str(EXAMPLES)]},
        "pools": {"default": {"queues": ["files", "faults", "emails"], "concurrency": 3}},
    }
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        with closing(Daemon(Path(directory).resolve() / "daemon", dsn, settings)) as daemon:
            yield daemon.start().wait_ready()


@pytest.fixture
def roost(dsn: str) -> Iterator[Roost]:
    with Roost(dsn) as roost:
        yield roost


def ended(roost: Roost, job_id: int) -> Job:
    states = ("completed", "discarded", "cancelled")
    return eventually(lambda: job if (job := roost.get_job(job_id)).state in states else None, f"end of job {job_id}")


def last_error(job: Job) -> str:
    return str(job.errors[-1]["error"])


def test_the_tasks_over_files_give_what_they_say(roost: Roost, daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"def f(x1): return 12 + x1  # two words")
    args = {"path": str(file)}
    hashed, compressed, counted = (
        ended(roost, roost.enqueue(task, args=args | more, queue="files"))
        for task, more in (("hash_file", {}), ("compress_file", {"level": 9}), ("count_words", {}))
    )
    content = file.read_bytes()
    assert hashed.result == hashlib.sha256(content).hexdigest()
    assert compressed.result == {"bytes": len(content), "compressed_bytes": len(zlib.compress(content, 9))}
    assert counted.result == 7


def test_the_tasks_that_go_wrong_end_as_they_say_and_the_pool_goes_on(
    roost: Roost, daemon: Daemon, tmp_path: Path
) -> None:
    limits: dict[str, Any] = {"queue": "faults", "timeout_seconds": 1, "max_attempts": 1}
    never = [
        roost.enqueue("derive_key", args={"password": "x", "iterations": 2**31 - 1}, **limits),
        roost.enqueue("match_backtracking", args={"text": "a" * 40 + "b"}, **limits),
        roost.enqueue("refuse_to_stop", **limits),
    ]
    crash = roost.enqueue("crash", queue="faults", max_attempts=2)
    absent = tmp_path / "absent"
    waits = roost.enqueue("wait_for_file", args={"path": str(absent)}, queue="faults")
    for job in (ended(roost, job_id) for job_id in never):
        assert job.state == "discarded"
        assert last_error(job).startswith("TimeoutError"), job.errors
    job = ended(roost, crash)
    assert job.state == "discarded"
    assert [error["error"].split(":")[0] for error in job.errors] == ["WorkerCrash", "WorkerCrash"]
    assert "SIGSEGV" in last_error(job)
    absent.write_text("here")
    job = ended(roost, waits)
    assert (job.result, job.attempt, job.errors) == (4, 1, [])


def test_an_order_and_its_receipt_exist_together_or_not_at_all(roost: Roost, dsn: str, daemon: Daemon) -> None:
    told = subprocess.run(
        [sys.executable, EXAMPLES / "orders.py"],
        env={**os.environ, "ROOST_DSN": dsn},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    [job] = roost.list_jobs()
    with psycopg.connect(dsn) as conn:
        orders = conn.execute("SELECT id, item FROM orders").fetchall()
    assert orders == [(1, "a chair")]
    assert told == [
        f"order 1 is placed; its receipt is job {job.id}",
        "no order, no receipt: the card was declined",
    ]
    # The defaults of @job applied, since the function was passed.
    assert (job.queue, job.max_attempts, job.timeout_seconds) == ("emails", 5, 30)
    job = ended(roost, job.id)
    assert (daemon.folder / str(job.result)).read_text() == "Thank you for order 1.\n"
