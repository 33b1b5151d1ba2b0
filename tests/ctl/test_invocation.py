"""Which database is meant, what exit status a failure has, and how output looks on a terminal and off it."""

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from roost_client import Roost
from roostd.embedded import EmbeddedPostgres
from tests.conftest import FAST
from tests.ctl.conftest import COMMAND, Ctl, read_terminal
from tests.system.daemon import eventually

NOWHERE = "host=/nowhere dbname=nothing"


@pytest.fixture
def other_dsn(empty_dsn: str) -> str:
    with Roost(empty_dsn) as roost:
        roost.setup_schema()
        roost.pause_queue("other")
    return empty_dsn


def write_config(folder: Path, **database: str) -> Path:
    path = folder / "roost.toml"
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in database.items())
    path.write_text(f"[database]\n{lines}\n")
    return path


def test_the_database_is_that_of_dsn_then_config_then_roost_dsn_then_database_url(
    bare_ctl: Ctl, dsn: str, other_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def queues(*options: object) -> list[str]:
        result = bare_ctl("queues", "--json", *options)
        assert result.code == 0, result.err
        return [queue["name"] for queue in result.json]

    with Roost(dsn) as roost:
        roost.pause_queue("here")
    monkeypatch.setenv("DATABASE_URL", dsn)
    assert queues() == ["here"]
    monkeypatch.setenv("ROOST_DSN", other_dsn)
    assert queues() == ["other"]
    config = write_config(tmp_path, dsn=dsn)
    assert queues("-c", config) == ["here"]
    assert queues("-c", config, "--dsn", other_dsn) == ["other"]


def test_common_options_may_stand_before_the_command_or_after_it(bare_ctl: Ctl, dsn: str) -> None:
    for arguments in (
        ["--dsn", dsn, "--json", "queue", "list"],
        ["queue", "list", "--dsn", dsn, "--json"],
        ["--dsn", NOWHERE, "--json", "queues", "--dsn", dsn],
    ):
        assert bare_ctl(*arguments).json == []


def test_an_embedded_database_is_found_where_its_daemon_runs_it(bare_ctl: Ctl, tmp_path: Path) -> None:
    config = write_config(tmp_path, embedded="postgres")
    result = bare_ctl("-c", config, "queues")
    assert result.code == 69
    assert f"cannot reach the database in {tmp_path / 'postgres'}: it is not running" in result.err
    with EmbeddedPostgres(tmp_path / "postgres", settings=FAST):
        assert bare_ctl("-c", config, "migrate", "up").code == 0
        assert bare_ctl("-c", config, "queues", "--json").json == []


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--dsn", NOWHERE, "status"], 69, "cannot reach the database: "),
        (["--dsn", "postgresql://me:s3cret@/x?nonsense=1", "status"], 78, "cannot use database.dsn from flag --dsn"),
        (["status"], 78, "cannot find a database"),
        (["-c", "/nowhere.toml", "status"], 78, "cannot read /nowhere.toml"),
        ([], 64, "Missing command; see roostctl --help"),
        (["migrate"], 64, "Missing command; see roostctl migrate --help"),
        (["nonsense"], 64, "No such command 'nonsense'; see roostctl --help"),
        (["show"], 64, "Missing argument 'ID'; see roostctl show --help"),
        (["jobs", "--limit", "0"], 64, "--limit"),
        (["jobs", "--limit", "-3"], 64, "--limit"),
        (["jobs", "--before", str(2**63)], 64, "--before"),
        (["jobs", "--state", "done"], 64, "--state"),
        (
            ["jobs", "--older-than", "yesterday"],
            64,
            "'--older-than': 'yesterday' is no age: pass a number",
        ),
        (["jobs", "--newer-than", "-5m"], 64, "--newer-than"),
        (["jobs", "--newer-than", "1000y"], 64, "--newer-than"),
        (["jobs", "--newer-than", "9" * 400 + "w"], 64, "more than a hundred years"),
        (["show", "--", str(-(2**63) - 1)], 64, "'ID'"),
        (["cancel", "1", str(2**63)], 64, "'ID...'"),
        (["requeue", "--discarded", "--limit", "0"], 64, "--limit"),
        (["drain", "--timeout", "-1", "--wait"], 64, "--timeout"),
        (["drain", "--timeout", "nan", "--wait"], 64, "'--timeout': 'nan' is no number of seconds"),
        (["reload", "--timeout", "nan"], 64, "'--timeout': 'nan' is no number of seconds"),
        (["drain", "--host", ""], 64, "'--host': it is empty"),
        (["drain", "--timeout", "5"], 64, "--timeout is of no use without --wait"),
        (["completion", "csh"], 64, "'csh'"),
        (["queue", "nonsense"], 64, "see roostctl queue --help"),
    ],
)
def test_a_failure_has_its_exit_status_and_one_line(bare_ctl: Ctl, arguments: list[str], code: int, told: str) -> None:
    result = bare_ctl(*arguments)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("roostctl: cannot ")
    assert told in result.err
    assert len(result.err.splitlines()) == 1
    assert "s3cret" not in result.err


def test_a_database_that_refuses_is_told_in_one_line(bare_ctl: Ctl, dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("CREATE ROLE guest LOGIN")
    try:
        result = bare_ctl("--dsn", make_conninfo(dsn, user="guest"), "queues")
        assert result.code == 69
        assert "cannot use the database: permission denied" in result.err
        assert len(result.err.splitlines()) == 1
    finally:
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute("DROP ROLE guest")


def test_a_reader_that_has_enough_ends_the_output_quietly(
    ctl_process: Callable[..., subprocess.CompletedProcess[str]], roost: Roost
) -> None:
    for _ in range(200):
        roost.enqueue("send", args={"filler": "x" * 1000})
    for command in ("jobs --json --limit 200", "jobs --limit 200", "migrate sql"):
        result = ctl_process(f"$roostctl {command} | head -n 1 > /dev/null; echo ${{PIPESTATUS[0]}}")
        assert result.stderr.replace("roostctl: there may be more: add --before 1\n", "") == ""
        assert result.stdout in ("141\n", "0\n")  # 0 where all of it fitted into the pipe


def on_a_terminal(dsn: str, *arguments: object, keys: bytes = b"") -> tuple[int, str]:
    """Run a command on a terminal of its own; its exit status and what it showed."""
    ours, theirs = pty.openpty()
    environ = {**os.environ, "ROOST_DSN": dsn, "TERM": "xterm-256color", "COLUMNS": "160"}
    command = [COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        os.write(ours, keys)
        shown = read_terminal(ours).decode()
        return process.wait(60), shown


def test_output_that_cannot_be_written_is_one_line(
    ctl_process: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    for command in ("status", "jobs --json", "migrate sql"):
        result = ctl_process(f"$roostctl {command} > /dev/full")
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == "roostctl: cannot write the output: No space left on device"
        assert "Traceback" not in result.stderr
    assert ctl_process("$roostctl status >&-").returncode == 0
    assert ctl_process("$roostctl show 4711 2>&-").returncode == 1


def test_output_is_coloured_on_a_terminal_and_plain_off_it(dsn: str, ctl: Ctl, roost: Roost) -> None:
    roost.cancel(roost.enqueue("send"))
    plain = ctl("jobs").out
    assert "\x1b" not in plain
    assert not re.search("[\u2500-\u257f]", plain)
    code, shown = on_a_terminal(dsn, "jobs")
    assert code == 0
    assert "\x1b[35mcancelled\x1b[0m" in shown
    assert on_a_terminal(dsn, "jobs", "--json")[1].strip().startswith("[")


def test_requeue_on_a_terminal_takes_another_answer_for_no(
    dsn: str, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    discard(2)
    code, shown = on_a_terminal(dsn, "requeue", "--discarded", keys=b"n\n")
    assert (code, "nothing was changed; --yes goes ahead" in shown) == (1, True)
    assert len(roost.list_jobs(state="discarded")) == 2


def test_requeue_on_a_terminal_asks_and_shows_its_progress(
    dsn: str, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    discard(2500)
    code, shown = on_a_terminal(dsn, "requeue", "--discarded", keys=b"y\n")
    assert code == 0
    assert "Requeue 2500 discarded jobs? [y/N]" in shown
    assert "2500/2500" in shown
    assert "requeued 2500 jobs" in shown
    assert roost.list_jobs(state="discarded") == []


@pytest.mark.parametrize("option", ["--queue", "--task", "--tag", "--error"])
def test_text_that_postgresql_cannot_hold_is_wrong_usage(ctl: Ctl, option: str) -> None:
    for text in ("a\0b", "\udcff"):
        result = ctl("jobs", option, text)
        assert (result.code, result.out) == (64, "")
        assert f"cannot list jobs: {option.removeprefix('--')} holds" in result.err


def test_an_answer_that_takes_long_can_be_interrupted(dsn: str) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%tags @>%'"
    with psycopg.connect(dsn) as blocker, psycopg.connect(dsn, autocommit=True) as observer:
        blocker.execute("LOCK TABLE roost.job_rows")
        with subprocess.Popen([COMMAND, "--dsn", dsn, "jobs", "--tag", "x"], stderr=subprocess.PIPE) as process:
            eventually(lambda: observer.execute(waiting).fetchone() == (1,), "query that waits")
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=30)
        assert (process.returncode, told) == (130, b"roostctl: interrupted\n")
        eventually(lambda: observer.execute(waiting).fetchone() == (0,), "query that has ended")
