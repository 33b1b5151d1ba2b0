"""The demo as a user runs it; and each of its checks against a system in which what it checks does not hold."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from chaos.fleet import title_of
from roost_client import JobState, Roost
from roostd.ctl.demo import checks
from roostd.ctl.demo.checks import CHECKS, Check, CheckFailed, Scene, run_checks
from roostd.ctl.demo.workload import MAX_FILES, _display, _library_files
from roostd.embedded import EmbeddedPostgres, running_dsn
from tests.ctl.conftest import COMMAND, read_terminal
from tests.system.daemon import Daemon, eventually

pytestmark = pytest.mark.daemon

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the demo makes its temporary files; nothing may be left in it."""
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        yield Path(directory).resolve()


@contextmanager
def started(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A demo under way; when it has ended, nothing of it is left."""
    process = subprocess.Popen(
        [COMMAND, "demo", *options],
        cwd="/",
        # What a developer may have set must not lead the demo's daemon to another database.
        env={**os.environ, "TMPDIR": str(folder), "ROOST_DSN": "host=/nowhere", "ROOST_WORKER__POLL_INTERVAL": "no"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
        process.wait(60)
        assert os.listdir(folder) == []
        assert processes_in(folder) == []
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def processes_in(folder: Path) -> list[str]:
    """The titles of the processes whose working directory is below the folder."""

    def works_there(pid: str) -> bool:
        try:
            return os.readlink(f"/proc/{pid}/cwd").startswith(str(folder))
        except OSError:
            return False

    return [f"{pid} {title_of(int(pid))}" for pid in os.listdir("/proc") if pid.isdigit() and works_there(pid)]


def read_until(stream: IO[str] | None, text: str) -> None:
    assert stream is not None
    for line in stream:
        if text in line:
            return
    pytest.fail(f"the demo ended before it said {text!r}")


def test_the_demo_passes_says_so_in_plain_lines_and_leaves_nothing(folder: Path) -> None:
    with started(folder) as process:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, out + err
    assert err == ""
    assert "\x1b" not in out
    lines = out.splitlines()
    assert [line[:8] for line in lines if line.startswith(("ok", "FAILED"))] == ["ok      "] * len(CHECKS)
    assert [line for line in lines if "files hashed, compressed" in line]
    assert lines[-1].startswith(f"all {len(CHECKS)} checks passed")


def test_there_are_some_thousands_of_files_to_work_through_each_once() -> None:
    files = list(islice(_library_files(), MAX_FILES))
    assert len(set(files)) == len(files) > 2000
    assert all(file.is_file() for file in files)


def test_a_promise_that_is_broken_meanwhile_ends_the_demo_with_1_and_the_verdicts(folder: Path) -> None:
    with started(folder, "--json") as process:
        read_until(process.stderr, f"ok      {checks.rolled_back_jobs_never_exist.__doc__}")
        [directory] = folder.glob("roost-demo-*")
        dsn = running_dsn(directory / "postgres")
        assert dsn is not None
        with psycopg.connect(dsn) as conn:
            conn.execute("DELETE FROM roost.job_rows WHERE id = (SELECT min(id) FROM roost.job_rows)")
        out, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert f"FAILED  {checks.totals_add_up.__doc__}: " in err
    assert f"1 of {len(CHECKS)} checks FAILED" in err
    assert "roostd's last" in err
    report = json.loads(out)
    assert report["ok"] is False
    assert [verdict["check"] for verdict in report["checks"]] == [check.__doc__ for check in CHECKS]
    assert [verdict["ok"] for verdict in report["checks"]] == [True] * (len(CHECKS) - 1) + [False]
    assert report["workload"]["jobs"] == 3 * report["workload"]["files"] > 0


def test_a_daemon_that_dies_ends_the_demo_with_1(folder: Path) -> None:
    with started(folder, "--json") as process:

        def master() -> int | None:
            pids = [int(title.split()[0]) for title in processes_in(folder) if "roostd: master" in title]
            return pids[0] if pids else None

        os.kill(eventually(master, "roostd"), signal.SIGKILL)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "roostd ended" in err


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGTERM, ""), (signal.SIGINT, "PostgreSQL and roostd are up"), (signal.SIGHUP, "ok      a job enqueued")],
)
def test_a_demo_that_is_interrupted_cleans_up(folder: Path, number: signal.Signals, after: str) -> None:
    with started(folder) as process:
        if after:
            read_until(process.stdout, after)
        else:
            eventually(lambda: list(folder.glob("roost-demo-*/postgres/*")), "database under way")
        process.send_signal(number)
        time.sleep(0.05)  # an impatient user, in the middle of the cleaning up
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "roostctl: interrupted"


def test_on_a_terminal_each_task_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream, _display(stream) as show:
        show(500, {"hash_file": 500, "compress_file": 20, "count_words": 3})
    shown = read_terminal(ours).decode()
    for bar in ("hash_file", "500/500", "compress_file", "20/500", "count_words", "3/500"):
        assert bar in shown


class LyingRoost(Roost):
    """A client that breaks its promises: it leaves transactions alone, and only says that it pauses and cancels."""

    def enqueue(self, task: Any, *, conn: Any = None, **options: Any) -> int:
        return super().enqueue(task, **options)

    def pause_queue(self, name: str, *, conn: Any = None) -> None:
        pass

    def cancel(self, job_id: int, *, conn: Any = None) -> JobState:
        return JobState.CANCELLED


@pytest.fixture(scope="module")
def system(postgres: EmbeddedPostgres, template: str) -> Iterator[tuple[str, Daemon]]:
    """A database and a daemon with the settings of the demo, that the tests of checks share."""
    name = "demo_checks"
    with psycopg.connect(postgres.dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
    dsn = make_conninfo(postgres.dsn, dbname=name)
    settings = {
        "worker": {"poll_interval": 0.1, "retry_strategy": {"strategy": "fixed", "delay": 0.1}},
        "handlers": {"modules": ["files", "faults"], "pythonpath": [str(EXAMPLES)]},
        "pools": {"default": {"queues": ["files", "faults", "emails"], "concurrency": 4}},
    }
    with tempfile.TemporaryDirectory(prefix="roost-test-") as directory:
        with closing(Daemon(Path(directory).resolve() / "daemon", dsn, settings)) as daemon:
            yield dsn, daemon.start().wait_ready()


@pytest.fixture
def scene(system: tuple[str, Daemon], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    dsn, daemon = system
    with Roost(dsn) as roost:
        # What the tests before have left, as if this scene had enqueued it.
        already = sum(sum(counts.values()) for counts in roost.status().values())
        yield Scene(dsn, roost, folder, lambda: daemon.runs, already)
        monkeypatch.undo()
        for job in roost.list_jobs(limit=1000):
            if job.state not in checks.ENDED:
                roost.cancel(job.id)
                Scene(dsn, roost, folder).wait_ended(job.id)
    for path in folder.iterdir():
        path.unlink()


def enqueue_a_hash(scene: Scene) -> int:
    job_id = scene.enqueue("hash_file", {"path": __file__}, queue="files")
    assert scene.wait_ended(job_id).state == "completed"
    return job_id


def test_every_check_passes_where_its_promise_holds(scene: Scene) -> None:
    enqueue_a_hash(scene)
    told: list[checks.Verdict] = []
    verdicts = run_checks(scene, CHECKS, told.append)
    assert [verdict for verdict in verdicts if not verdict.ok] == []
    assert told == verdicts


def lie(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.roost = LyingRoost(scene.dsn)
    monkeypatch.setattr(checks, "PATIENCE_SECONDS", 1.0)


def hang_briefly(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "HOPELESS_ITERATIONS", 1)


def forget_an_attempt(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(scene, "NEW.attempt := 0")


def blame_another_job(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue_a_hash(scene)
    spoil(scene, "UPDATE roost.job_rows SET attempt = 2 WHERE id = (SELECT max(id) FROM roost.job_rows"
                 " WHERE task = 'hash_file')")  # fmt: skip


def spoil(scene: Scene, statement: str) -> None:
    """Has PostgreSQL carry out a statement whenever a job is to be retried."""
    with psycopg.connect(scene.dsn) as conn:
        conn.execute(
            "CREATE OR REPLACE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN {statement}; RETURN NEW; END $$;"
            "CREATE OR REPLACE TRIGGER spoil BEFORE UPDATE ON roost.job_rows"
            " FOR EACH ROW WHEN (NEW.state = 'retryable') EXECUTE FUNCTION spoil()"
        )


def change_a_result(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue_a_hash(scene)
    with psycopg.connect(scene.dsn) as conn:
        conn.execute("UPDATE roost.job_rows SET result = '\"0\"' WHERE task = 'hash_file'")


def lose_a_job(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue_a_hash(scene)
    with psycopg.connect(scene.dsn) as conn:
        conn.execute("DELETE FROM roost.job_rows WHERE id = (SELECT max(id) FROM roost.job_rows)")


def leave_a_job(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.enqueue("hold", {"pid_file": str(scene.directory / "left"), "until_exists": "/never"}, queue="faults")


@pytest.mark.parametrize(
    ("check", "break_it", "reason"),
    [
        (checks.rolled_back_jobs_never_exist, lie, "it exists"),
        (checks.committed_jobs_run, lie, "another connection saw it"),
        (checks.hung_jobs_are_killed, hang_briefly, "it ended completed"),
        (checks.a_killed_child_costs_one_attempt, forget_an_attempt, "the job took 1 attempts"),
        (checks.a_killed_child_costs_one_attempt, blame_another_job, "these lost attempts too"),
        (checks.paused_queues_wait, lie, "a job of the paused queue is completed"),
        (checks.cancelled_jobs_stop, lie, "there is no end of job"),
        (checks.results_are_right, change_a_result, "not 0"),
        (checks.totals_add_up, lose_a_job, "enqueued, but"),
        (checks.totals_add_up, leave_a_job, "and 1 unfinished"),
    ],
)
def test_a_check_fails_where_its_promise_is_broken(
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
    check: Check,
    break_it: Callable[[Scene, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    break_it(scene, monkeypatch)
    try:
        with pytest.raises(CheckFailed, match=reason):
            check(scene)
        [verdict] = run_checks(scene, [checks.results_are_right], lambda _: None)
        assert verdict.check == checks.results_are_right.__doc__
    finally:
        with psycopg.connect(scene.dsn) as conn:
            conn.execute("DROP TRIGGER IF EXISTS spoil ON roost.job_rows")
