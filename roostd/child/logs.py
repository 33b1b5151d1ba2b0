"""What a child and its job have to say in the daemon's log, which the child writes to itself, as the master does.

The logging that the handlers have set up for themselves is left alone, structlog's configuration too.
"""

from __future__ import annotations

import logging
from typing import Any

from roostd.lines import LEVELS, Write, level_of, open_log

_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_OF_EVERY_LINE = frozenset({"timestamp", "level", "event"})


class ChildLog(logging.Handler):
    """Takes in what jobs say by `current_job().log`, as `job.logged`, and what the child says of them."""

    def __init__(self, level: str, format: str) -> None:
        super().__init__()
        self._format = format
        self._least = LEVELS[level]
        self._write: Write | None = None
        logger = logging.getLogger("roost.job")
        logger.addHandler(self)
        logger.setLevel(self._least)
        logger.propagate = False  # or what the handlers have set up would write it once more

    def event(self, level: str, name: str, **values: Any) -> None:
        if LEVELS[level] >= self._least:
            if self._write is None:  # most children never say anything
                self._write = open_log(self._format)
            self._write(level, name, values)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            values = {k: v for k, v in vars(record).items() if k not in _OF_EVERY_RECORD | _OF_EVERY_LINE}
            self.event(
                level_of(record.levelno),
                "job.logged",
                **{**values, "message": record.getMessage(), "exc_info": record.exc_info},
            )
        except Exception:
            self.handleError(record)
