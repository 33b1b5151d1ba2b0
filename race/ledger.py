"""Who ran which job when: one file that the client and every handler append to, whatever queue is between them.

That is the only measure of the race, so that it costs all competitors the same: one write of 24 bytes a job, about a
microsecond, to a file in memory where there is one. Standard library only: it is imported by every worker.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

PATH_VARIABLE = "RACE_LEDGER"
_RECORD = struct.Struct("=IIqBxxxxxxx")
_descriptor: int | None = None


class Event(IntEnum):
    CALLED = 0  # the client is about to enqueue it
    BEGAN = 1  # the first line of a handler that may not come to its end
    DONE = 2  # the last line of a handler, and the only one of a no-op


@dataclass(frozen=True, slots=True)
class Record:
    """`at` is in ns of the clock that all processes of a machine share."""

    number: int
    pid: int
    at: int
    event: Event


def write(event: Event, number: int) -> None:
    """Appends one record: whole, whoever else writes."""
    global _descriptor
    if _descriptor is None:
        _descriptor = os.open(os.environ[PATH_VARIABLE], os.O_WRONLY | os.O_APPEND)
    os.write(_descriptor, _RECORD.pack(number, os.getpid(), time.monotonic_ns(), event))


class Ledger:
    """The reader's side."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def clear(self) -> None:
        os.truncate(self.path, 0)

    def __len__(self) -> int:
        """How many records there are: a question that costs the writers nothing."""
        return self.path.stat().st_size // _RECORD.size

    def read(self) -> list[Record]:
        data = self.path.read_bytes()
        whole = data[: len(data) // _RECORD.size * _RECORD.size]
        return [Record(number, pid, at, Event(event)) for number, pid, at, event in _RECORD.iter_unpack(whole)]

    def wait(self, records: int, seconds: float, check: Callable[[], None] = lambda: None) -> bool:
        """Waits until there are that many records; False if that took too long. `check` is called meanwhile."""
        deadline = time.monotonic() + seconds
        while len(self) < records:
            if time.monotonic() > deadline:
                return False
            check()
            time.sleep(0.01)
        return True
