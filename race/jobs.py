"""What the jobs of the race do, for all competitors alike. Standard library only."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable

from race import ledger
from race.ledger import Event

BURN_NS = 1_000_000
HANG_TIMEOUT_SECONDS = 2
BAD_ONE_IN = 20


def noop(number: int) -> None:
    """Nothing but the note that it ran."""
    ledger.write(Event.DONE, number)


def burn(number: int) -> None:
    """One millisecond of CPU, however long that takes on a machine that has other things to do."""
    until = time.thread_time_ns() + BURN_NS
    while time.thread_time_ns() < until:
        pass
    ledger.write(Event.DONE, number)


def hang(number: int) -> None:
    """One in twenty computes in C for hours, where no Python code runs: no signal handler, no exception from outside.

    It lets go of the GIL, as most libraries do when they compute, so that other threads of its process go on.
    """
    ledger.write(Event.BEGAN, number)
    if number % BAD_ONE_IN == 0:
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 2**31 - 1)
    ledger.write(Event.DONE, number)


def crash(number: int) -> None:
    """One in twenty takes its process down, as a segmentation fault or the kernel's memory killer would."""
    ledger.write(Event.BEGAN, number)
    if number % BAD_ONE_IN == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    ledger.write(Event.DONE, number)


TASKS: dict[str, Callable[[int], None]] = {"noop": noop, "burn": burn, "hang": hang, "crash": crash}
