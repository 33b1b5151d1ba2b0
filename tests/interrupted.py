"""That a program which is interrupted ends all it started, and leaves no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.machine import CHECKOUT
from chaos.fleet import title_of
from roostd import linux


def interrupt_once_children_run(module: str, options: list[str], folder: Path) -> int:
    """Interrupts `python -m module` while a daemon of its own runs, checks what is left, and returns its pid."""
    program = subprocess.Popen(
        [sys.executable, "-m", module, *options],
        cwd=CHECKOUT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not any("roostd: child" in title_of(pid) for pid in linux.descendants_of(program.pid)):
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = linux.descendants_of(program.pid)
        program.send_signal(signal.SIGINT)
        assert program.wait(60) != 0
    finally:
        program.kill()
        program.wait()
    assert [pid for pid in started if title_of(pid)] == []
    assert list(folder.iterdir()) == []
    return program.pid
