"""The settings and their defaults, which stand here and nowhere else.

What each value may be is in `kinds`, what each is for in etc/roost.toml. Intervals, delays and timeouts are seconds.
Must not import anything but the standard library.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class ConfigError(Exception):
    """The settings can't be used; `str()` has a line for each problem, with its file, key and fix."""

    exit_code = os.EX_CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseConfig:
    """`[database]`; once loaded, `dsn` or `embedded` is set, not both; `…_file` is where its DSN was read."""

    dsn: str | None = field(default=None, repr=False)
    dsn_file: Path | None = None
    embedded: Path | None = None
    listen_dsn: str | None = field(default=None, repr=False)
    listen_dsn_file: Path | None = None
    startup_max_retries: int = 30
    startup_retry_delay: float = 1.0
    listen_reconnect_delay: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """`[worker] retry_strategy`: a factory of `roost_client` by name, and what any of the three takes."""

    strategy: str = "exponential"
    base: float = 2.0
    step: float = 10.0
    delay: float = 60.0
    jitter: bool = True
    cap: float = 86400.0

    def arguments(self) -> dict[str, Any]:
        """What to call the factory with: `getattr(roost_client, policy.strategy)(**policy.arguments())`."""
        return {name: getattr(self, name) for name in STRATEGY_ARGUMENTS[self.strategy]}


STRATEGY_ARGUMENTS = {
    "exponential": ("base", "jitter", "cap"),
    "linear": ("step", "cap"),
    "fixed": ("delay",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """`[worker]`"""

    name: str = field(default_factory=socket.gethostname)
    poll_interval: float = 1.0
    prefetch: int | None = None
    heartbeat_interval: float = 15.0
    orphan_reaper_interval: float = 30.0
    orphan_stale_after: float = 300.0
    shutdown_timeout: float = 30.0
    kill_grace: float = 5.0
    error_cap: int = 20
    max_crashes: int = 3
    max_result_bytes: int = 1048576
    archive_after_seconds: float | None = None
    archive_interval: float = 60.0
    archive_delete_after_seconds: float | None = None
    result_ttl_seconds: float | None = None
    run_cron: bool = True
    retry_strategy: RetryPolicy = field(default_factory=RetryPolicy)
    hooks: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlersConfig:
    """`[handlers]`; once loaded, every path is absolute."""

    modules: tuple[str, ...] = ()
    pythonpath: tuple[Path, ...] = ()
    import_timeout: float = 60.0
    registry: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """`[pools.NAME]`: queues, and the number of children that serve them."""

    name: str
    queues: tuple[str, ...]
    concurrency: int = 4
    max_jobs_per_child: int | None = None
    max_rss_bytes: int | None = None
    memory_limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CronConfig:
    """`[cron.NAME]`: an entry of its own, or what is different from the @cron entry of this name. None: not given."""

    name: str
    task: str | None = None
    expression: str | None = None
    timezone: str | None = None
    args: Mapping[str, Any] | None = None
    queue: str | None = None
    priority: int | None = None
    max_attempts: int | None = None
    enabled: bool | None = None
    catch_up: str | None = None

    def given(self) -> dict[str, Any]:
        """The keys that were given."""
        keys = (entry.name for entry in fields(self) if entry.name != "name")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """`[log]`"""

    level: str = "info"
    format: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings; once loaded, there is a pool at least and no queue is in two."""

    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    handlers: HandlersConfig = field(default_factory=HandlersConfig)
    pools: tuple[PoolConfig, ...] = (PoolConfig(name="default", queues=("default",)),)
    cron: tuple[CronConfig, ...] = ()
    log: LogConfig = field(default_factory=LogConfig)
