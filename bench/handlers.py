"""The tasks of the benchmark: as little as a handler can do."""

from __future__ import annotations

import time

from roost_client import job


@job("noop")
def noop() -> None:
    """Costs nothing, so that what is measured is Roost."""


@job("note_start")
def note_start() -> int:
    """When the handler began, by the clock that all processes of a machine share."""
    return time.monotonic_ns()
