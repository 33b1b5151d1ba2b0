"""What was measured, and on what: the commit of the checkout, and the machine's processor."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def commit_of_checkout() -> str:
    """As git names it; "unknown" where there is no repository."""
    command = ["git", "describe", "--always", "--dirty=, with changes", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
