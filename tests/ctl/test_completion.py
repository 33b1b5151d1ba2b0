"""What a shell completes: asked as the shell asks, by running the program with its variables, and by a real bash."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psycopg
import pytest

from roost_client import Roost
from tests.ctl.conftest import COMMAND, Ctl


def completions(*words: str, dsn: str | None = None, **environ: str) -> list[str]:
    """What bash is told for the last of these words."""
    line = ["roostctl", *words]
    variables = {
        **os.environ,
        "_ROOSTCTL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
        **({} if dsn is None else {"ROOST_DSN": dsn}),
        **environ,
    }
    done = subprocess.run([COMMAND], env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [answer.partition(",")[2] for answer in done.stdout.splitlines() if answer]


def test_commands_options_and_states_are_completed_without_a_database() -> None:
    assert completions("jobs", "--ar") == ["--archived"]
    assert completions("jobs", "--state", "c") == ["completed", "cancelled"]
    assert completions("jobs", "--state", "completed", "--state", "d") == ["discarded"]
    assert completions("completion", "") == ["bash", "zsh", "fish"]


def test_names_are_completed_from_the_database_that_the_line_leads_to(dsn: str, roost: Roost, tmp_path: Path) -> None:
    roost.enqueue("send_receipt", queue="emails")
    roost.enqueue("send report", queue="evil\nqueue")
    roost.pause_queue("empty")
    with psycopg.connect(dsn) as conn:
        conn.execute(
            "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, metadata) VALUES"
            " (gen_random_uuid(), 'alpha', 'web1', 1, '{exports}', 1, '{\"tasks\": [\"send_export\"]}')"
        )
    assert completions("jobs", "--queue", "e", dsn=dsn) == ["emails", "empty", "exports"]
    assert completions("jobs", "--task", "send", dsn=dsn) == ["send_export", "send_receipt"]
    assert completions("enqueue", "send_r", dsn=dsn) == ["send_receipt"]
    assert completions("pause", "emails", "e", dsn=dsn) == ["empty", "exports"]
    assert completions("drain", "--worker", "al", dsn=dsn) == ["alpha"]
    config = tmp_path / "roost.toml"
    config.write_text(f'[database]\ndsn = "{dsn}"\n')
    assert completions("-c", str(config), "jobs", "--queue", "em") == ["emails", "empty"]


def test_a_database_that_cannot_be_asked_or_takes_long_is_told_by_silence(dsn: str, roost: Roost) -> None:
    assert completions("jobs", "--queue", "e", dsn="host=/nowhere dbname=x") == []
    assert completions("jobs", "--queue", "e") == []
    assert completions("-c", "/nowhere.toml", "jobs", "--queue", "e") == []
    roost.pause_queue("emails")
    with psycopg.connect(dsn) as blocker:
        blocker.execute("LOCK TABLE roost.job_rows")
        began = time.monotonic()
        assert completions("jobs", "--queue", "e", dsn=dsn) == []
        assert time.monotonic() - began < 30, "it does not wait for the lock"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(bare_ctl: Ctl, shell: str) -> None:
    result = bare_ctl("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert "_ROOSTCTL_COMPLETE" in result.out
    assert f"{shell}_complete" in result.out


def test_a_real_bash_completes_with_the_script(dsn: str, roost: Roost) -> None:
    roost.pause_queue("emails")
    script = (
        'eval "$(roostctl completion bash)"\n'
        "COMP_WORDS=(roostctl jobs --queue em) COMP_CWORD=3 COMPREPLY=()\n"
        '_roostctl_completion roostctl\necho "${COMPREPLY[@]}"\n'
    )
    environ = {**os.environ, "ROOST_DSN": dsn, "PATH": f"{Path(COMMAND).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "emails\n"), done.stderr
