"""Every snippet of README.md, run in the order in which it stands there, on a database of the test's own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
import pytest

from roost_client import Roost
from tests.documented import Block, Reader, blocks
from tests.system.daemon import eventually

pytestmark = pytest.mark.daemon

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def reader(tmp_path: Path, empty_dsn: str) -> Reader:
    with psycopg.connect(empty_dsn) as conn:
        conn.execute("CREATE TABLE orders (id serial PRIMARY KEY, item text NOT NULL)")
    return Reader(tmp_path, empty_dsn)


@pytest.mark.timeout(400)  # a third of a minute, but of many processes one after the other
def test_what_the_readme_shows_works_as_it_shows(reader: Reader) -> None:
    found = blocks(README.read_text())
    operating = next(block for block in found if "roostctl reload" in block.text)
    seen = 0
    for block in found:
        seen += 1
        if block.language != "console":
            reader.write(block)
            if block.file == "test_receipts.py":
                command = f"python -m pytest -p no:cacheprovider --roost-dsn '{reader.dsn}' {block.file}"
                assert "1 passed" in reader.run(command)
            if block.file in ("more.py", "run_worker.py"):
                output = reader.run(f"python {block.file}")
                assert output == {"more.py": "cancelled\n", "run_worker.py": "1\n"}[block.file]
        elif block is operating:
            operate(reader, block)
        elif not block.text.startswith("$ pip install"):
            reader.follow(block)
    assert seen == 11


def operate(reader: Reader, block: Block) -> None:
    """Each command succeeds where there is something for it to do."""
    with Roost(reader.dsn) as roost, psycopg.connect(reader.dsn, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO roost.job_rows (queue, task, state, attempt, discarded_at)"
            " VALUES ('emails', 'send_receipt', 'discarded', 5, now())"
        )
        for command, shown in block.commands:
            if command == "roostctl reload":
                reload_a_daemon(reader, roost, command)
            elif not command.startswith("export"):
                assert reader.run(command), command
            assert shown == "", "the README shows output that this test does not compare"
        eventually(lambda: roost.get_job(2).state == "completed", "job that was cancelled, and then retried")
        assert roost.get_job(3).state == "cancelled"
        # What is left for the worker of the next snippet.
        for job in roost.list_jobs(state="available", limit=1000):
            roost.cancel(job.id)
        roost.enqueue("send_receipt", args={"order": 7}, queue="emails")


def reload_a_daemon(reader: Reader, roost: Roost, command: str) -> None:
    daemon = subprocess.Popen(
        ["roostd", "-c", "roost.toml"],
        cwd=reader.folder,
        env=reader.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: [worker for worker in roost.list_workers() if worker.metadata.get("generation")], "worker")
        assert " ok " in reader.run(command)
    finally:
        daemon.terminate()
        _, log = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, log
