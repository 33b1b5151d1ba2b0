"""What must hold in a running system, each as a check that fails where it does not.

A check is a function of a Scene; its docstring is the sentence it proves. It waits for events, up to a deadline.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, LiteralString, TypeVar

import psycopg

from roost_client import Job, JobNotFoundError, JobState, Roost, RoostError

T = TypeVar("T")

PATIENCE_SECONDS = 15.0
HOPELESS_ITERATIONS = 2**31 - 1  # of PBKDF2: some twenty minutes
ANY_FILE = __file__  # for a job that has to read some file
ENDED = (JobState.COMPLETED, JobState.DISCARDED, JobState.CANCELLED)
_SAMPLE = 100


class CheckFailed(Exception):
    """The message says what was found instead."""


@dataclass(slots=True)
class Scene:
    """A system that runs the tasks of examples/, on the queues files, faults and emails.

    `directory` is where handlers and checks tell each other things by files; `enqueued` counts the jobs of committed
    transactions.
    """

    dsn: str
    roost: Roost
    directory: Path
    is_running: Callable[[], bool] = lambda: True
    enqueued: int = 0

    def enqueue(self, task: str, args: dict[str, Any], **options: Any) -> int:
        job_id = self.roost.enqueue(task, args=args, **options)
        self.enqueued += 1
        return job_id

    def wait_for(self, what: str, look: Callable[[], T | None]) -> T:
        """What `look` finds, once it finds anything. Raises CheckFailed."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            if found := look():
                return found
            require(self.is_running(), "roostd ended")
            require(time.monotonic() < deadline, f"after {PATIENCE_SECONDS:g} s there is no {what}")
            time.sleep(0.02)

    def wait_ended(self, job_id: int) -> Job:
        def look() -> Job | None:
            job = self.roost.get_job(job_id)
            return job if job.state in ENDED else None

        return self.wait_for(f"end of job {job_id}", look)

    def rows(self, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn) as conn:
            return conn.execute(query, parameters).fetchall()


Check = Callable[[Scene], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check came to; `reason` where it failed."""

    check: str
    ok: bool
    reason: str | None


def run_checks(scene: Scene, checks: Sequence[Check], tell: Callable[[Verdict], object]) -> list[Verdict]:
    """Carry out each check, also after one that failed, and tell of each."""
    verdicts = []
    for check in checks:
        try:
            check(scene)
            reason = None
        except (CheckFailed, RoostError, psycopg.Error) as error:
            reason = " ".join(str(error).split())
        verdicts.append(Verdict(" ".join(str(check.__doc__).split()), reason is None, reason))
        tell(verdicts[-1])
    return verdicts


def rolled_back_jobs_never_exist(scene: Scene) -> None:
    """a job enqueued in a transaction that rolls back never exists"""
    trace = scene.directory / "rolled-back"
    with psycopg.connect(scene.dsn) as conn:
        args = {"pid_file": str(trace), "until_exists": "/"}
        rolled_back = scene.roost.enqueue("hold", args=args, queue="faults", conn=conn)
        conn.rollback()
    # Once a job that stands behind it has run, it would have run too.
    scene.wait_ended(scene.enqueue("count_words", {"path": ANY_FILE}, queue="faults"))
    try:
        job = scene.roost.get_job(rolled_back)
    except JobNotFoundError:
        require(not trace.exists(), "it has run")
        return
    raise CheckFailed(f"it exists, and is {job.state}")


def committed_jobs_run(scene: Scene) -> None:
    """a job enqueued in a transaction that commits runs, and nobody sees it before"""
    with psycopg.connect(scene.dsn) as conn:
        job_id = scene.roost.enqueue("count_words", args={"path": ANY_FILE}, queue="faults", conn=conn)
        seen = scene.rows("SELECT 1 FROM roost.jobs WHERE id = %s", job_id)
        require(not seen, "another connection saw it before the commit")
    scene.enqueued += 1
    job = scene.wait_ended(job_id)
    require(job.state == JobState.COMPLETED, f"it ended {job.state}: {_errors(job)}")


def hung_jobs_are_killed(scene: Scene) -> None:
    """a job that hangs in C is killed at its timeout with what it started, and recorded as TimeoutError"""
    pid_file = scene.directory / "helper"
    args = {"password": "secret", "iterations": HOPELESS_ITERATIONS, "helper_pid_file": str(pid_file)}
    job = scene.wait_ended(scene.enqueue("derive_key", args, queue="faults", timeout_seconds=1, max_attempts=1))
    require(job.state == JobState.DISCARDED, f"it ended {job.state}")
    require(_errors(job).startswith("TimeoutError"), f"its error is {_errors(job)!r}")
    helper = int(pid_file.read_text())
    scene.wait_for(f"end of the program it started, pid {helper}", lambda: not _is_helper(helper))


def a_killed_child_costs_one_attempt(scene: Scene) -> None:
    """a child killed by SIGKILL in the middle of a job costs one attempt of that job, and none of any other"""
    release = scene.directory / "release"
    pid_files = [scene.directory / f"held-{number}" for number in range(3)]
    before = _attempts_lost(scene)
    victim, *others = (
        scene.enqueue("hold", {"pid_file": str(pid_file), "until_exists": str(release)}, queue="faults")
        for pid_file in pid_files
    )
    scene.wait_for("three jobs that run at once", lambda: all(pid_file.exists() for pid_file in pid_files))
    others += [scene.enqueue("count_words", {"path": ANY_FILE}, queue="faults") for _ in range(20)]
    killed = pid_files[0].read_text()
    os.kill(int(killed), signal.SIGKILL)
    try:
        scene.wait_for("second attempt", lambda: pid_files[0].read_text() != killed)
    finally:
        release.touch()
    job = scene.wait_ended(victim)
    require(job.state == JobState.COMPLETED, f"the job ended {job.state}: {_errors(job)}")
    require(job.attempt == 2, f"the job took {job.attempt} attempts")
    require(len(job.errors) == 1 and _errors(job).startswith("WorkerCrash"), f"the job's errors are {job.errors}")
    for other in others:
        require(scene.wait_ended(other).state == JobState.COMPLETED, f"job {other} did not complete")
    lost = _attempts_lost(scene)
    require(lost.keys() - before.keys() == {victim}, f"these lost attempts too: {lost.keys() - before.keys()}")
    require(before.items() <= lost.items(), "a job that had ended before was changed")


def paused_queues_wait(scene: Scene) -> None:
    """pause stops a queue and no other, and resume lets it go on"""
    scene.roost.pause_queue("emails")
    waiting = scene.enqueue("count_words", {"path": ANY_FILE}, queue="emails")
    # Due a little later, so that workers have looked for jobs a few times when it has run.
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    scene.wait_ended(scene.enqueue("count_words", {"path": ANY_FILE}, queue="faults", scheduled_at=soon))
    state = scene.roost.get_job(waiting).state
    require(state == JobState.AVAILABLE, f"a job of the paused queue is {state}")
    scene.roost.resume_queue("emails")
    job = scene.wait_ended(waiting)
    require(job.state == JobState.COMPLETED, f"after resume the job ended {job.state}: {_errors(job)}")


def cancelled_jobs_stop(scene: Scene) -> None:
    """a job that waits is cancelled at once, one that runs is stopped"""
    pid_file = scene.directory / "cancelled"
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    waiting = scene.enqueue("count_words", {"path": ANY_FILE}, queue="faults", scheduled_at=tomorrow)
    running = scene.enqueue("hold", {"pid_file": str(pid_file), "until_exists": "/never"}, queue="faults")
    scene.wait_for("job that runs", pid_file.exists)
    for job_id in (waiting, running):
        scene.roost.cancel(job_id)
    for job_id in (waiting, running):
        state = scene.wait_ended(job_id).state
        require(state == JobState.CANCELLED, f"job {job_id} ended {state}")


def results_are_right(scene: Scene) -> None:
    """the hashes are those that this process computes itself"""
    rows = scene.rows(
        "SELECT args ->> 'path', result #>> '{}' FROM roost.jobs"
        " WHERE task = 'hash_file' AND state = 'completed' ORDER BY random() LIMIT %s",
        _SAMPLE,
    )
    require(bool(rows), "no hash was computed")
    for path, found in rows:
        expected = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        require(found == expected, f"{path} has {expected}, not {found}")


def totals_add_up(scene: Scene) -> None:
    """enqueued = completed + discarded + cancelled"""
    ended: dict[str, int] = dict.fromkeys(ENDED, 0)
    unfinished = 0
    for counts in scene.roost.status().values():
        for state, count in counts.items():
            if state in ended:
                ended[state] += count
            else:
                unfinished += count
    told = " + ".join(f"{count} {state}" for state, count in ended.items())
    require(
        sum(ended.values()) == scene.enqueued and not unfinished,
        f"{scene.enqueued} enqueued, but {told}, and {unfinished} unfinished",
    )


CHECKS: tuple[Check, ...] = (
    rolled_back_jobs_never_exist,
    committed_jobs_run,
    hung_jobs_are_killed,
    a_killed_child_costs_one_attempt,
    paused_queues_wait,
    cancelled_jobs_stop,
    results_are_right,
    totals_add_up,
)


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CheckFailed(otherwise)


def _errors(job: Job) -> str:
    return "; ".join(str(error.get("error")) for error in job.errors)


def _attempts_lost(scene: Scene) -> dict[int, tuple[int, int]]:
    """Attempts and errors of each job that did not complete at its first attempt."""
    rows = scene.rows(
        "SELECT id, attempt, jsonb_array_length(errors) FROM roost.jobs WHERE attempt > 1 OR errors <> '[]'"
    )
    return {job_id: (attempt, errors) for job_id, attempt, errors in rows}


def _is_helper(pid: int) -> bool:
    """Whether the program that derive_key starts runs under this pid; a dead one has no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep\0")
    except OSError:
        return False
