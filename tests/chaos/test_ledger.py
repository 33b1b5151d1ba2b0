"""That the ledger says what happened, whatever becomes of the processes that write it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from chaos.ledger import Run, Writer, read_runs


def in_child(act: Callable[[], None]) -> tuple[int, int]:
    """The pid of a process that does this, and the descriptor on which it says that it is done; it then waits."""
    done, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.write(say, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(say)
    assert os.read(done, 4) == b"done"
    os.close(done)
    return pid, done


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_run_is_told_with_its_start_its_end_and_how(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "m1")
    writer.start(5, 17, 2)
    writer.end(5, 17, "ValueError")
    (run,) = read_runs(tmp_path)
    assert (run.job_id, run.lease, run.attempt, run.pid, run.master) == (5, 17, 2, os.getpid(), "m1")
    assert run.how == "ValueError"
    assert run.ended_at is not None
    assert run.started_at <= run.ended_at


def test_a_run_that_its_process_did_not_survive_has_no_end(tmp_path: Path) -> None:
    pid, _ = in_child(lambda: Writer(tmp_path, "m1").start(5, 17, 1))
    end(pid)
    assert [(run.pid, run.ended_at, run.how) for run in read_runs(tmp_path)] == [(pid, None, None)]


def beside(tmp_path: Path, job_id: int) -> int:
    """Which process a run of this job would find at it."""

    def run() -> None:
        writer = Writer(tmp_path, "m2")
        writer.start(job_id, 99, 1)
        writer.end(job_id, 99, "returned")

    pid, _ = in_child(run)
    end(pid)
    (found,) = [run for run in read_runs(tmp_path) if run.pid == pid]
    return found.beside


def test_a_second_run_knows_of_the_one_beside_it(tmp_path: Path) -> None:
    pid, _ = in_child(lambda: Writer(tmp_path, "m1").start(5, 17, 1))
    assert beside(tmp_path, 5) == pid
    assert beside(tmp_path, 6) == 0
    end(pid)
    assert beside(tmp_path, 5) == 0


def test_runs_one_after_the_other_are_not_beside_each_other(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "m1")
    for lease in (1, 2):
        writer.start(5, lease, lease)
        writer.end(5, lease, "returned")
    assert beside(tmp_path, 5) == 0
    assert all(isinstance(run, Run) and run.beside == 0 for run in read_runs(tmp_path))
