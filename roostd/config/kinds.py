"""What the value of each key may be.

A kind turns a value of a TOML file, or the text of a variable or flag, into that of a setting, or refuses it.
Must not read files: a kind judges a value by itself.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roostd.config import dsn
from roostd.config.settings import STRATEGY_ARGUMENTS


@dataclass(frozen=True, slots=True)
class Kind:
    """`read` takes a value and the folder of relative paths; it raises ValueError, which says nothing."""

    expected: str  # the end of the error message
    read: Callable[[Any, Path], Any]
    parse: Callable[[str], Any] = str  # the text of a variable or flag to a value for `read`


def parse_literal(text: str) -> Any:
    """The TOML or JSON value that the text spells, or else the text itself."""
    try:
        document = tomllib.loads(f"value = {text}")
        if list(document) == ["value"]:  # more keys: the text has lines of its own
            return document["value"]
    except (ValueError, RecursionError):
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _parse_list(text: str) -> Any:
    if text.lstrip().startswith("["):
        return parse_literal(text)
    return [item.strip() for item in text.split(",") if item.strip()]


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _number(expected: str, accepts: Callable[[float], bool]) -> Kind:
    def read(value: Any, base: Path) -> float:
        _require(isinstance(value, int | float) and not isinstance(value, bool) and accepts(value))
        return float(value)

    return Kind(expected, read, parse_literal)


def _integer(lowest: int, highest: int) -> Kind:
    def read(value: Any, base: Path) -> int:
        _require(isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest)
        return int(value)

    return Kind(f"a whole number from {lowest} to {highest}", read, parse_literal)


def _size(lowest: int, highest: int) -> Kind:
    whole = _integer(lowest, highest)

    def read(value: Any, base: Path) -> Any:
        if isinstance(value, str) and (match := re.fullmatch("([0-9]{1,15})([KMG])", value.upper())):
            value = int(match[1]) << {"K": 10, "M": 20, "G": 30}[match[2]]
        return whole.read(value, base)

    expected = f'a number of bytes from {lowest} to {highest}, or a string like "512M" (K, M or G)'
    return Kind(expected, read, parse_literal)


def _read_boolean(value: Any, base: Path) -> bool:
    _require(isinstance(value, bool))
    return bool(value)


def _read_table(value: Any, base: Path) -> dict[str, Any]:
    _require(isinstance(value, dict))
    return dict(value)


def _string(expected: str, accepts: Callable[[str], bool]) -> Kind:
    def read(value: Any, base: Path) -> str:
        _require(isinstance(value, str) and accepts(value))
        return str(value)

    return Kind(expected, read)


def _choice(*names: str) -> Kind:
    return _string("one of " + ", ".join(f'"{name}"' for name in names), names.__contains__)


def _strings(expected: str, accepts: Callable[[str], bool], *, at_least: int = 0) -> Kind:
    def read(value: Any, base: Path) -> tuple[str, ...]:
        _require(isinstance(value, list | tuple) and len(value) >= at_least)
        _require(all(isinstance(item, str) and accepts(item) for item in value))
        _require(len(set(value)) == len(value))
        return tuple(value)

    return Kind(expected, read, _parse_list)


def is_name(value: str) -> bool:
    """PostgreSQL's text holds neither NUL nor the lone surrogates that stand for bytes which aren't UTF-8."""
    return 1 <= len(value) <= 128 and not re.search("[\0\ud800-\udfff]", value)


def _is_module(value: str) -> bool:
    return all(part.isidentifier() for part in value.split("."))


def _is_attribute(value: str) -> bool:
    module, _, attribute = value.partition(":")
    return _is_module(module) and _is_module(attribute)


def _read_path(value: Any, base: Path) -> Path:
    _require(isinstance(value, str | Path) and str(value) != "")
    # A connection string given for a path would be shown, password and all, where no such file is found.
    _require(not re.search("\0|://|password=", str(value)))
    return base.joinpath(value).absolute()


def _read_paths(value: Any, base: Path) -> tuple[Path, ...]:
    _require(isinstance(value, list | tuple))
    return tuple(_read_path(item, base) for item in value)


def _read_dsn(value: Any, base: Path) -> str:
    _require(isinstance(value, str))
    dsn.parse_dsn(value)
    return str(value)


# Upper limits keep out infinity, and integers too large for a float.
_YEAR_SECONDS = 366 * 86400
_INTERVAL = _number("a number of seconds, above 0 and at most a year", lambda value: 0 < value <= _YEAR_SECONDS)
_DURATION = _number("a number of seconds, from 0 to a year", lambda value: 0 <= value <= _YEAR_SECONDS)
_AGE = _number("a number of seconds, from 0 to a hundred years", lambda value: 0 <= value <= 100 * _YEAR_SECONDS)
_MEMORY = _size(1 << 20, 1 << 50)
_BOOLEAN = Kind("true or false", _read_boolean, parse_literal)
_NAME = "a string of 1 to 128 characters without NUL"

KINDS: Mapping[str, Mapping[str, Kind]] = {
    "database": {
        "dsn": Kind(dsn.EXPECTED, _read_dsn),
        "dsn_file": Kind("the path of a file", _read_path),
        "embedded": Kind("the path of a directory", _read_path),
        "listen_dsn": Kind(dsn.EXPECTED, _read_dsn),
        "listen_dsn_file": Kind("the path of a file", _read_path),
        "startup_max_retries": _integer(0, 1_000_000),
        "startup_retry_delay": _INTERVAL,
        "listen_reconnect_delay": _INTERVAL,
    },
    "worker": {
        "name": _string(_NAME, is_name),
        "poll_interval": _INTERVAL,
        "prefetch": _integer(1, 100_000),
        "heartbeat_interval": _INTERVAL,
        "orphan_reaper_interval": _INTERVAL,
        "orphan_stale_after": _INTERVAL,
        "shutdown_timeout": _DURATION,
        "kill_grace": _DURATION,
        "error_cap": _integer(1, 1000),
        "max_crashes": _integer(1, 1000),
        "max_result_bytes": _size(1 << 10, 1 << 26),
        "archive_after_seconds": _AGE,
        "archive_interval": _INTERVAL,
        "archive_delete_after_seconds": _AGE,
        "result_ttl_seconds": _AGE,
        "run_cron": _BOOLEAN,
        "hooks": _string('a string "module:attribute"', _is_attribute),
    },
    "worker.retry_strategy": {
        "strategy": _choice(*STRATEGY_ARGUMENTS),
        "base": _number("a number from 1 to 1000", lambda value: 1 <= value <= 1000),
        "step": _INTERVAL,
        "delay": _DURATION,
        "jitter": _BOOLEAN,
        "cap": _INTERVAL,
    },
    "handlers": {
        "modules": _strings("a list of different dotted module names", _is_module),
        "pythonpath": Kind("a list of directories", _read_paths, _parse_list),
        "import_timeout": _INTERVAL,
        "registry": _string('a string "module:attribute"', _is_attribute),
    },
    "pools.NAME": {
        "queues": _strings(
            "a list of one or more different queue names, each 1 to 128 characters without NUL",
            is_name,
            at_least=1,
        ),
        "concurrency": _integer(1, 1000),
        "max_jobs_per_child": _integer(1, 1_000_000_000),
        "max_rss_bytes": _MEMORY,
        "memory_limit_bytes": _MEMORY,
    },
    "cron.NAME": {
        "task": _string(_NAME, is_name),
        # What these say is judged in core/, which tells what is wrong with it.
        "expression": _string("a string of five fields, or @hourly and its like", lambda value: True),
        "timezone": _string("the name of an IANA time zone", lambda value: True),
        "args": Kind("a table", _read_table, parse_literal),
        "queue": _string(_NAME, is_name),
        "priority": _integer(-(1 << 31), (1 << 31) - 1),
        "max_attempts": _integer(1, (1 << 31) - 1),
        "enabled": _BOOLEAN,
        "catch_up": _choice("none", "latest"),
    },
    "log": {
        "level": _choice("debug", "info", "warning", "error", "critical"),
        "format": _choice("auto", "json", "console", "journald"),
    },
}
