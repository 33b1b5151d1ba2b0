"""The blocks of a page of documentation, and a reader who does what they say, as they stand there.

    python, toml   with a name in its first line (`# shop/jobs.py`), a file; a python block without one is run, after
                   those before it on the page, and prints what the text block below it shows; a toml block without
                   one is a part of settings
    console        what follows each `$ ` is run by a shell, and prints what is shown below it
    sql            run in the database

What is shown is compared without times, ages, and numbers of three digits or more; `...` stands for anything. A command
that only looks is repeated until it shows what it should. One that fails shows its message, too. A block after
`<!-- not run: why -->` is left alone.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest

from roostd.config import load

DSN = "postgresql:///app"
PATIENCE_SECONDS = 60.0
_FENCE = re.compile(r"^(?:<!-- (not run: .*?) -->\n+)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LOOKS = re.compile(
    r"(cat |ls |roostctl (-c \S+ )?(jobs|show|explain|workers|queues|queue list|status|cron list|cron next)\b)"
)
_SAME_WHATEVER = [
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d(:?\d\d)?)?"), "(time)"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "(id)"),
    (re.compile(r"\b(Mon|Tue|Wed|Thu|Fri|Sat|Sun) \(time\) [+-]\d{4}\b"), "(local time)"),
    (re.compile(r"\b\d+s\b"), "(age)"),
    (re.compile(r"\b\d{3,}\b"), "(number)"),
]
_CHECKER = doctest.OutputChecker()
# Runs what comes as a line of JSON, in one namespace, and answers with what it printed and what it raised.
_SESSION = """
import contextlib, io, json, sys, traceback
namespace = {"__name__": "__page__"}
for line in sys.stdin:
    printed, raised = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(json.loads(line), "<page>", "exec"), namespace)
        except BaseException:
            raised = traceback.format_exc()
    print(json.dumps([printed.getvalue(), raised]), flush=True)
"""


class Block(NamedTuple):
    language: str
    text: str
    left_out: str = ""  # why it isn't run
    shown: str = ""  # what a python block prints

    @property
    def file(self) -> str | None:
        """The name that its first line gives it."""
        named = re.match(r"# (\S+\.(py|toml))\n", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command and the output that is shown for it."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]
        return [(command, shown) for command, _, shown in (part.partition("\n") for part in parts)]


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(page):
        block = Block(match[2], match[3], match[1] or "")
        if (
            block.language == "text"
            and found
            and found[-1].language == "python"
            and not page[end : match.start()].strip()
        ):
            found[-1] = found[-1]._replace(shown=block.text)
        found.append(block)
        end = match.end()
    return found


def is_as_shown(printed: str, shown: str) -> bool:
    """Whether it is what the page shows, but for what differs from run to run."""
    for pattern, name in _SAME_WHATEVER:
        printed, shown = pattern.sub(name, printed), pattern.sub(name, shown)
    if not shown:
        return not printed
    return _CHECKER.check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


class Reader:
    """Somebody who does what a page says, in a folder and on a database of their own."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder = folder
        self.dsn = dsn
        self.environ = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
            "ROOST_DSN": dsn,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._session: subprocess.Popen[str] | None = None

    def follow(self, block: Block) -> None:
        """Does what a block says; fails where something else comes of it."""
        if block.left_out:
            return
        match block.language:
            case "console":
                for command, shown in block.commands:
                    self.try_out(command, shown)
            case "python" | "toml" if block.file is not None:
                self.write(block)
            case "python":
                self._expect(self._execute(block.text), block.shown, block.text)
            case "toml":
                settings = self.folder / "part-of-settings"
                settings.write_text(block.text)
                load(settings, environ={"ROOST_DSN": self.dsn}, flags={})
            case "sql":
                with psycopg.connect(self.dsn, autocommit=True) as conn:
                    conn.execute(block.text.encode())

    def write(self, block: Block) -> None:
        assert block.file is not None, f"this block has no name:\n{block.text}"
        path = self.folder / block.file
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text.replace(DSN, self.dsn))

    def run(self, command: str) -> str:
        """What a command prints to stdout; it must succeed."""
        done = self._shell(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_out(self, command: str, shown: str) -> None:
        """Runs a command, and again if it only looks, until it prints what is shown."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            done = self._shell(command)
            printed = done.stdout if done.returncode == 0 else done.stdout + done.stderr
            if (done.returncode == 0 or shown) and is_as_shown(printed, shown):
                return
            if not _LOOKS.match(command) or time.monotonic() > deadline:
                self._expect(printed, shown, f"$ {command}\n{done.stderr}")
                pytest.fail(f"$ {command}: exit status {done.returncode}: {done.stderr}{self._logs()}")
            time.sleep(0.2)

    def close(self) -> None:
        if self._session is not None:
            assert self._session.stdin is not None
            self._session.stdin.close()
            self._session.wait(30)
            assert self._session.stdout is not None
            self._session.stdout.close()

    def _shell(self, command: str) -> subprocess.CompletedProcess[str]:
        # One shell a command; what it exports is there for the next.
        exported = self.folder / ".exported"
        script = f"[ -e {exported} ] && . {exported}\n{command}\nstatus=$?; export -p > {exported}; exit $status"
        return subprocess.run(
            ["bash", "-c", script.replace(DSN, f"'{self.dsn}'")],
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def _execute(self, code: str) -> str:
        if self._session is None:
            self._session = subprocess.Popen(
                [sys.executable, "-c", _SESSION],
                cwd=self.folder,
                env=self.environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._session.stdin is not None
        assert self._session.stdout is not None
        self._session.stdin.write(json.dumps(code.replace(DSN, self.dsn)) + "\n")
        self._session.stdin.flush()
        answer: list[Any] = json.loads(self._session.stdout.readline())
        printed, raised = answer
        assert not raised, f"{code}\n{raised}"
        return str(printed)

    def _expect(self, printed: str, shown: str, what: str) -> None:
        if not is_as_shown(printed, shown):
            pytest.fail(f"{what}\nprinted\n{printed}\nand not, as is shown,\n{shown}{self._logs()}")

    def _logs(self) -> str:
        return "".join(f"\n{log.name}:\n{log.read_text()[-10_000:]}" for log in self.folder.glob("*.log"))
