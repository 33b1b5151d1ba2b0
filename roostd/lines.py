"""An event as a line of the log on stderr, in the form its reader wants.

    journald   <6>job.completed job_id=1 queue=emails     the priority in front; journald adds the time
    json       {"timestamp": "…Z", "level": "info", "event": "job.completed", "job_id": 1, …}
    console    the same, aligned and coloured

A log that can't be written is no reason to stop or stall: lines are dropped, counted, and told of by `log.dropped` once
there is room. For the master's log (`log.py`) and that of the children (`child/logs.py`), which load nothing for it but
Python's own library. Must not import anything else of ours.
"""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any

_STDERR = 2
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
# syslog(3); "notice" has no level of its own here.
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

Renderer = Callable[[MutableMapping[str, Any]], str]
Write = Callable[[str, str, Mapping[str, Any]], None]


def open_log(format: str) -> Write:
    """A function that writes an event: its level, its name, its values; `exc_info` among them is an exception."""
    _hold_stderr_open()
    render = _RENDERERS[choose_format(format, os.environ)]()
    writer = _Writer(_STDERR, lambda count: render(_order("warning", "log.dropped", {"count": count})))

    def write(level: str, name: str, values: Mapping[str, Any]) -> None:
        writer.write(_render(render, level, name, values))

    return write


def choose_format(format: str, environ: Mapping[str, str]) -> str:
    """What "auto" means for this process's stderr: journald, json or console."""
    if format != "auto":
        return format
    status = os.fstat(_STDERR)
    # systemd.exec(5): the variable is inherited, so it tells about stderr only while it names this very stream.
    if environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}":
        return "journald"
    return "console" if os.isatty(_STDERR) else "json"


def level_of(number: int) -> str:
    """The level of a record of the standard library's logging."""
    return max((name for name in LEVELS if LEVELS[name] <= number), key=LEVELS.__getitem__, default="debug")


def _hold_stderr_open() -> None:
    """Closed, its number would go to the next file or socket opened, and the log into that."""
    try:
        os.fstat(_STDERR)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDERR)
        os.set_inheritable(_STDERR, True)


class _Writer:
    """Writes lines to a descriptor that may be closed, full, or a pipe that nobody reads."""

    _PATIENCE_MS = 50  # for a busy reader; not spent again on every line while it stays busy
    _ROOM = 4096  # bytes that a pipe which polls as writable takes without blocking (PIPE_BUF)

    def __init__(self, fd: int, notice: Callable[[int], str]) -> None:
        self._fd = fd
        self._notice = notice
        self._dropped = 0
        self._mid_line = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, line: str) -> None:
        if self._dropped and self._put(self._notice(self._dropped)):
            self._dropped = 0
        if self._dropped or not self._put(line):
            self._dropped += 1

    def _put(self, line: str) -> bool:
        data = memoryview(("\n" * self._mid_line + line + "\n").encode("utf-8", "backslashreplace"))
        try:
            while data:
                if not self._poll.poll(0 if self._dropped else self._PATIENCE_MS):
                    return False
                written = os.write(self._fd, data[: self._ROOM])
                data = data[written:]
                self._mid_line = len(data) > 0
        except OSError:
            return False
        return True


def _order(level: str, name: str, values: Mapping[str, Any]) -> MutableMapping[str, Any]:
    return {"level": level, "event": name, **values}


def _render(render: Renderer, level: str, name: str, values: Mapping[str, Any]) -> str:
    try:
        return render(_order(level, name, values))
    except Exception as error:
        # A value whose repr() raises, a dict whose keys JSON can't hold: what happened must still be told.
        return render(_order(level, name, {"unrenderable": type(error).__name__}))


def _json_renderer() -> Renderer:
    def render(event: MutableMapping[str, Any]) -> str:
        return json.dumps({"timestamp": _now(), **_with_traceback(event)}, default=repr)

    return render


def _journald_renderer() -> Renderer:
    def render(event: MutableMapping[str, Any]) -> str:
        event = _with_traceback(event)
        prefix = f"<{_PRIORITIES[event.pop('level')]}>"
        trace = event.pop("exception", "")
        first = " ".join([event.pop("event"), *(f"{key}={_quote(value)}" for key, value in event.items())])
        # journald makes an entry of each line, at the default priority where a line names none.
        return "\n".join(prefix + line for line in [first, *trace.splitlines()])

    return render


def _console_renderer() -> Renderer:
    from structlog import dev  # here: it takes a tenth of a second, and somebody who sits in front of a terminal

    colors = os.isatty(_STDERR) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    renderer = dev.ConsoleRenderer(
        colors=colors,
        # As repr, or a task's name could hold what steers the terminal.
        repr_native_str=True,
        sort_keys=False,
        # The rich one shows local variables, a DSN among them.
        exception_formatter=dev.plain_traceback,
    )
    return lambda event: str(renderer(None, "", {"timestamp": _now(), **event}))


_RENDERERS: dict[str, Callable[[], Renderer]] = {
    "json": _json_renderer,
    "journald": _journald_renderer,
    "console": _console_renderer,
}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _with_traceback(event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    error = _error_of(event.pop("exc_info", None))
    if error is not None:
        event["exception"] = "".join(traceback.format_exception(error)).rstrip("\n")
    return event


def _error_of(exc_info: Any) -> BaseException | None:
    """What `exc_info` of a log call may be: an exception, a tuple that holds one, true for the one being handled."""
    if exc_info and not isinstance(exc_info, BaseException | tuple):
        exc_info = sys.exc_info()
    return exc_info[1] if isinstance(exc_info, tuple) else exc_info or None


def _quote(value: Any) -> str:
    if isinstance(value, str) and value.isprintable() and value and not any(c in ' "=\\' for c in value):
        return value
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if text.isprintable() else json.dumps(value, default=repr)
