"""The daemon's settings: what keys there are, where their values come from, which values are allowed.

A setting comes from the configuration file, then its drop-ins, then the environment, then flags; the later one wins and
every value remembers which it was. Each key's type, default and limits stand once, in the dataclasses below. Anything
wrong is one `ConfigError` with a line for each mistake, so that a broken file is repaired in one go.

Must not import handlers or `roost_client`: a broken handler module must not keep the settings from being read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Config",
    "ConfigError",
    "DatabaseConfig",
    "HandlersConfig",
    "LoadedConfig",
    "LogConfig",
    "PoolConfig",
    "RetryPolicy",
    "WorkerConfig",
]


class ConfigError(Exception):
    """The configuration cannot be used; `str()` has one line for each problem: file, key and fix."""

    exit_code = os.EX_CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


# What a value must be. `expected` completes "expected …" in an error; `read` returns the value or raises ValueError.


@dataclass(frozen=True, slots=True)
class _Kind:
    expected: str
    read: Callable[[Any, Path], Any]
    text: Callable[[str], Any] = lambda text: text
    secret: bool = False


def _literal(text: str) -> Any:
    """Text of a variable or a flag as the TOML or JSON value it spells, or as it is."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except ValueError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return text


def _list_literal(text: str) -> Any:
    if text.lstrip().startswith("["):
        return _literal(text)
    return [item.strip() for item in text.split(",") if item.strip()]


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _is_name(value: Any, longest: int = 128) -> bool:
    """Any characters but NUL and lone surrogates: PostgreSQL can store neither."""
    return (
        isinstance(value, str)
        and 1 <= len(value) <= longest
        and "\0" not in value
        and not any("\ud800" <= c <= "\udfff" for c in value)
    )


def _number(expected: str, lowest: float, highest: float, *, above: bool = False) -> _Kind:
    def read(value: Any, base: Path) -> float:
        _require(isinstance(value, int | float) and not isinstance(value, bool))
        # The upper limit also keeps out infinity and integers too large for a float; the comparisons, NaN.
        _require(lowest < value <= highest if above else lowest <= value <= highest)
        return float(value)

    return _Kind(expected, read, _literal)


_YEAR_SECONDS = 31_536_000.0
_INTERVAL = _number("a number of seconds, above 0 and at most a year", 0, _YEAR_SECONDS, above=True)
_DURATION = _number("a number of seconds, from 0 to a year", 0, _YEAR_SECONDS)
_BASE = _number("a number from 1 to 1000", 1, 1000)


def _integer(lowest: int, highest: int) -> _Kind:
    def read(value: Any, base: Path) -> int:
        _require(isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest)
        return int(value)

    return _Kind(f"a whole number from {lowest} to {highest}", read, _literal)


_SIZE_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size(lowest: int, highest: int) -> _Kind:
    def read(value: Any, base: Path) -> int:
        if isinstance(value, str):
            match = re.fullmatch(r"([0-9]{1,15})\s*([KMGkmg])", value)
            _require(match is not None)
            assert match is not None
            value = int(match[1]) * _SIZE_UNITS[match[2].upper()]
        _require(isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest)
        return int(value)

    return _Kind(
        f'a number of bytes from {lowest} to {highest}, or a string as "512M" (K, M, G)', read, _literal
    )


def _string(expected: str, accepts: Callable[[str], bool], *, secret: bool = False) -> _Kind:
    def read(value: Any, base: Path) -> str:
        _require(isinstance(value, str) and accepts(value))
        return str(value)

    return _Kind(expected, read, secret=secret)


def _choice(*names: str) -> _Kind:
    return _string("one of " + ", ".join(f'"{name}"' for name in names), names.__contains__)


def _list(expected: str, accepts: Callable[[Any], bool], *, empty: bool = True) -> _Kind:
    def read(value: Any, base: Path) -> tuple[str, ...]:
        _require(isinstance(value, list | tuple) and all(accepts(item) for item in value))
        _require((empty or len(value) > 0) and len(set(value)) == len(value))
        return tuple(value)

    return _Kind(expected, read, _list_literal)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path) and str(value) != "" and "\0" not in str(value)


def _path(expected: str, *, resolve: bool = True) -> _Kind:
    def read(value: Any, base: Path) -> Path:
        _require(_is_path(value))
        return base / value if resolve else Path(value)

    return _Kind(expected, read)


def _read_paths(value: Any, base: Path) -> tuple[Path, ...]:
    _require(isinstance(value, list | tuple) and all(_is_path(item) for item in value))
    return tuple(base / item for item in value)


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def _is_attribute(value: str) -> bool:
    module, colon, attribute = value.partition(":")
    return bool(colon) and _is_module(module) and _is_module(attribute)


_MIB = 1 << 20
_NAME = _string("1 to 128 characters without NUL", _is_name)
_STRATEGY = _choice("exponential", "linear", "fixed")


def _read_bool(value: Any, base: Path) -> bool:
    _require(isinstance(value, bool))
    return bool(value)


def _key(kind: _Kind, default: Any = None, **options: Any) -> Any:
    if "default_factory" not in options:
        options["default"] = default
    return field(metadata={"kind": kind}, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """`[database]`: after `load`, exactly one of `dsn` and `embedded` is set; `dsn_file` says where `dsn` was read."""

    dsn: str | None = _key(_string("a libpq connection string or URI", bool, secret=True), repr=False)
    dsn_file: Path | None = _key(_path("the path of a file that holds the dsn", resolve=False))
    embedded: Path | None = _key(_path("the path of a directory"))
    startup_max_retries: int = _key(_integer(0, 1_000_000), 30)
    startup_retry_delay: float = _key(_INTERVAL, 1.0)
    listen_reconnect_delay: float = _key(_INTERVAL, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """`[worker] retry_strategy`: the name of a factory in `roost_client` and what to call it with."""

    strategy: str = _key(_STRATEGY, "exponential")
    base: float = _key(_BASE, 2.0)
    step: float = _key(_INTERVAL, 30.0)
    delay: float = _key(_DURATION, 30.0)
    jitter: bool = _key(_Kind("true or false", _read_bool, _literal), True)
    cap: float = _key(_INTERVAL, 86400.0)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the strategy's factory: `getattr(roost_client, strategy)(**arguments())`."""
        return {name: getattr(self, name) for name in _STRATEGY_KEYS[self.strategy]}


_STRATEGY_KEYS = {
    "exponential": ("base", "jitter", "cap"),
    "linear": ("step", "jitter", "cap"),
    "fixed": ("delay", "jitter"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """`[worker]`: how this host claims, supervises and gives up jobs. Intervals and delays in seconds."""

    name: str = _key(_NAME, default_factory=socket.gethostname)
    poll_interval: float = _key(_INTERVAL, 1.0)
    prefetch: int | None = _key(_integer(1, 100_000))
    heartbeat_interval: float = _key(_INTERVAL, 15.0)
    orphan_reaper_interval: float = _key(_INTERVAL, 30.0)
    orphan_stale_after: float = _key(_INTERVAL, 300.0)
    shutdown_timeout: float = _key(_DURATION, 30.0)
    kill_grace: float = _key(_DURATION, 5.0)
    error_cap: int = _key(_integer(1, 1000), 20)
    max_crashes: int = _key(_integer(1, 1000), 3)
    max_result_bytes: int = _key(_size(1024, 64 * _MIB), _MIB)
    retry_strategy: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlersConfig:
    """`[handlers]`: the modules whose import registers the tasks; `pythonpath` is absolute."""

    modules: tuple[str, ...] = _key(_list("a list of dotted module names", _is_module), ())
    pythonpath: tuple[Path, ...] = _key(_Kind("a list of directories", _read_paths, _list_literal), ())
    import_timeout: float = _key(_INTERVAL, 60.0)
    registry: str | None = _key(_string('"module:attribute"', _is_attribute))


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """`[pools.NAME]`: a set of queues and the number of children that serve them."""

    name: str
    queues: tuple[str, ...] = _key(
        _list(
            "a list of one or more different queue names, each 1 to 128 characters without NUL",
            _is_name,
            empty=False,
        ),
        dataclasses.MISSING,
    )
    concurrency: int = _key(_integer(1, 1000), 4)
    max_jobs_per_child: int | None = _key(_integer(1, 1_000_000_000))
    max_rss_bytes: int | None = _key(_size(_MIB, 1 << 50))
    memory_limit_bytes: int | None = _key(_size(_MIB, 1 << 50))


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """`[log]`"""

    level: str = _key(_choice("debug", "info", "warning", "error", "critical"), "info")
    format: str = _key(_choice("auto", "json", "console", "journald"), "auto")


_DEFAULT_POOL = PoolConfig(name="default", queues=("default",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, checked. `pools` is in the order of the files; no queue is in two of them."""

    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    handlers: HandlersConfig = field(default_factory=HandlersConfig)
    pools: tuple[PoolConfig, ...] = (_DEFAULT_POOL,)
    log: LogConfig = field(default_factory=LogConfig)

    def template_settings(self) -> dict[str, Any]:
        """Everything but `[database]` as JSON values, field by field: what a template needs, and no secret."""
        settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        del settings["database"]
        return settings


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """`origins` maps each dotted key to where its value came from; `warnings` are for the log or the terminal."""

    config: Config
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()
