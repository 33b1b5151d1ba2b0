"""Tasks that go wrong in the ways that jobs do, to see what Roost makes of it."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from roost_client import SnoozeJob, job


@job("derive_key", queue="faults", timeout_seconds=1, max_attempts=1)
def derive_key(password: str, iterations: int, helper_pid_file: str | None = None) -> str:
    """Hangs in C: with too many iterations the call below takes hours, and looks at no signal while it does.

    Before that it starts a helper program in a session of its own, as a job might, to see what becomes of it.
    """
    if helper_pid_file is not None:
        helper = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        Path(helper_pid_file).write_text(str(helper.pid))
    return hashlib.pbkdf2_hmac("sha256", password.encode(), b"salt", iterations).hex()


@job("match_backtracking", queue="faults", timeout_seconds=1, max_attempts=1)
def match_backtracking(text: str) -> bool:
    """A regular expression that takes time exponential in the length of its text: try 40 times "a" and a "b"."""
    return re.fullmatch("(a+)+", text) is not None


@job("crash", queue="faults", max_attempts=2)
def crash() -> None:
    """Takes its own process down, as a bug in an extension module does."""
    os.kill(os.getpid(), signal.SIGSEGV)


@job("refuse_to_stop", queue="faults", timeout_seconds=1, max_attempts=1)
def refuse_to_stop() -> None:
    """Catches everything and goes on for ever."""
    while True:
        try:
            time.sleep(3600)
        except BaseException:  # not a thing to do: this is what swallows the TimeoutError
            continue


@job("hold", queue="faults")
def hold(pid_file: str, until_exists: str) -> str:
    """Runs until a file appears; tells before in which process it does."""
    partial = Path(f"{pid_file}.{os.getpid()}")
    partial.write_text(str(os.getpid()))
    partial.rename(pid_file)  # whole or not at all: whoever waits for it reads it at once
    while not os.path.exists(until_exists):
        time.sleep(0.01)
    return until_exists


@job("wait_for_file", queue="faults")
def wait_for_file(path: str) -> int:
    """Looks again in a second, without counting the attempt, as long as the file is not there."""
    if not os.path.exists(path):
        raise SnoozeJob(1)
    return os.path.getsize(path)
