"""roostctl as an operator runs it, on a database of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from roost_client import Roost
from roostd.ctl import main

COMMAND = str(Path(sys.executable).with_name("roostctl"))


@dataclass(frozen=True, slots=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Ctl = Callable[..., Result]


def read_terminal(end: int) -> bytes:
    """All that is shown on a terminal until its other end is closed; closes this one."""
    shown = b""
    while True:
        try:
            shown += os.read(end, 65536)
        except OSError:  # EIO: there is no other end any more
            os.close(end)
            return shown


@pytest.fixture
def bare_ctl(capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs one command in this process, with the environment as it is."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def ctl(dsn: str, bare_ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> Ctl:
    """Runs one command on the test's database."""
    monkeypatch.setenv("ROOST_DSN", dsn)
    return bare_ctl


@pytest.fixture
def ctl_process(dsn: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a shell command line, in which $roostctl is the command, in a process of its own."""

    def run(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            env={**os.environ, "ROOST_DSN": dsn, "roostctl": COMMAND},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **options,
        )

    return run


@pytest.fixture
def roost(dsn: str) -> Iterator[Roost]:
    with Roost(dsn) as roost:
        yield roost


@pytest.fixture
def discard(dsn: str) -> Callable[..., list[int]]:
    """Adds jobs that failed for good."""

    def discard(count: int = 1, queue: str = "default", task: str = "send", errors: object = None) -> list[int]:
        with psycopg.connect(dsn) as conn:
            rows = conn.execute(
                "INSERT INTO roost.job_rows (queue, task, state, attempt, max_attempts, discarded_at, errors)"
                " SELECT %s, %s, 'discarded', 3, 3, now(), %s FROM generate_series(1, %s) RETURNING id",
                [queue, task, json.dumps(errors) if errors else None, count],
            ).fetchall()
        return [job_id for (job_id,) in rows]

    return discard
