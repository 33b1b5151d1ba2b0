"""A claimed job as the master holds it, from claim to settlement."""

from __future__ import annotations

from typing import NamedTuple


class ClaimedJob(NamedTuple):
    """One claim. A tuple, because tens of thousands a second are made straight from database rows.

    `args` and `labels` (tags and metadata, None for a job without either) are JSON text as PostgreSQL printed it: only
    the child that runs the job decodes it.
    """

    id: int
    lease: int
    attempt: int
    max_attempts: int
    crashes: int
    timeout_seconds: int | None
    queue: str
    task: str
    args: str
    priority: int = 0
    scheduled_at: str = ""  # as PostgreSQL prints it, for `core/frontier.py` alone: nothing here compares times
    labels: str | None = None
    start_by: float | None = None  # CLOCK_BOOTTIME by which it must start, or not at all; of throttled tasks only
