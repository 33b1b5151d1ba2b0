"""The pytest plugin, as an application's own suite has it: found by itself, and silent where it isn't used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = """
import pytest
from roost_client import job

@job("greet")
def greet(name):
    return f"hello {name}"
"""
SUITE = """
import roost_client
from roost_client.testing import assert_enqueued, assert_not_enqueued, drain

def sign_up(conn, name):
    roost_client.enqueue("greet", args={"name": name}, conn=conn)

def test_one(roost_conn):
    sign_up(roost_conn, "ann")
    assert_enqueued(roost_conn, task="greet", args={"name": "ann"}, count=1)
    (job,) = drain(roost_conn)
    assert job.result == "hello ann"
    sign_up(roost_conn, "cid")

def test_nothing_is_left_of_the_one_before(roost_conn, roost):
    assert_not_enqueued(roost_conn)
    job_id = roost.enqueue("greet", args={"name": "bob"})
    assert roost.get_job(job_id).state == "available"
    assert drain(roost_conn)[0].id == job_id

def test_a_failure_shows_the_message_alone(roost_conn):
    assert_enqueued(roost_conn, task="greet")
"""
PLAIN = """
import sys

def test_that_uses_nothing_of_it():
    assert not {name for name in sys.modules if name.startswith(("roostd.embedded", "roost_client", "psycopg"))}
"""


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist", *options],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.database
def test_a_suite_gets_a_database_of_its_own_and_a_transaction_a_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_suite.py").write_text(SUITE)
    ran = run_pytest(tmp_path)
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr
    assert "1 failed" in ran.stdout, ran.stdout + ran.stderr
    assert "AssertionError: no job is enqueued with task='greet'; there are none at all" in ran.stdout
    assert "roost_client/testing.py" not in ran.stdout


def test_the_database_may_be_one_that_is_there(empty_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nroost_dsn = {empty_dsn}\n")
    ran = run_pytest(tmp_path, "-k", "not failure")
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr
    ran = run_pytest(tmp_path, "-k", "failure", "--roost-dsn", "host=/nowhere")  # wins over the file
    assert "No such file or directory" in ran.stdout, ran.stdout + ran.stderr


def test_a_suite_that_does_not_use_it_loads_nothing_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(PLAIN)
    ran = run_pytest(tmp_path)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
