"""The daemon's log: structlog, whose events `lines.py` writes to stderr.

Event names are `noun.verb`. Must not import anything else of ours.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any, cast

import structlog
from structlog.typing import FilteringBoundLogger

from roostd.lines import LEVELS, Write, level_of, open_log


def configure(level: str = "info", format: str = "auto") -> None:
    """Set up this process's log; may be called again, when a reload changes the settings.

    A logger from `get_logger` follows at once; one made of it by `bind` keeps its level, which makes a filtered call
    twenty times cheaper (0.1 µs to 2 µs).
    """
    logger = _Logger(open_log(format))
    structlog.configure(
        processors=[structlog.processors.add_log_level, _as_arguments],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *args: logger,
        cache_logger_on_first_use=False,
    )
    _forward_libraries()


def get_logger(**context: Any) -> FilteringBoundLogger:
    return cast(FilteringBoundLogger, structlog.get_logger(**context))


class _Logger:
    """The end of structlog's chain: whatever the level's method is, the line is written."""

    def __init__(self, write: Write) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = write


def _as_arguments(logger: Any, method: str, event: MutableMapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (event.pop("level"), event.pop("event"), event), {}


class _Forwarder(logging.Handler):
    """Brings what libraries log (asyncio, psycopg, warnings) into the stream, as an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception as error:  # arguments that don't fit the library's own text
            message = f"{record.msg} {record.args!r} ({type(error).__name__}: {error})"
        level = LEVELS[level_of(record.levelno)]
        get_logger().log(level, "library.logged", logger=record.name, message=message.strip(), exc_info=record.exc_info)


def _forward_libraries() -> None:
    root = logging.getLogger()
    if not any(isinstance(handler, _Forwarder) for handler in root.handlers):
        root.addHandler(_Forwarder())
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
