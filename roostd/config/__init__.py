"""The daemon's settings: which keys there are, where values come from, what they may be.

A value comes from the configuration file, then its drop-ins, then the environment, then flags. The last one wins,
and each remembers where it was given. All mistakes are told in one `ConfigError`, a line for each, so that a broken
file is repaired in one go.

    settings   the dataclasses, their defaults
    kinds      what each value may be
    sources    files, environment and flags as trees, and how one is laid over another
    reading    from the merged tree to the dataclasses, with all problems found on the way
    report     the settings in force, as text
    dsn        connection strings: checked, and shown without their secrets

Must not import handlers: settings are read by processes that run no user code.
"""

from roostd.config.dsn import redact_dsn
from roostd.config.reading import LoadedConfig, load
from roostd.config.report import as_json, describe
from roostd.config.settings import (
    Config,
    ConfigError,
    CronConfig,
    DatabaseConfig,
    HandlersConfig,
    LogConfig,
    PoolConfig,
    RetryPolicy,
    WorkerConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "CronConfig",
    "DatabaseConfig",
    "HandlersConfig",
    "LoadedConfig",
    "LogConfig",
    "PoolConfig",
    "RetryPolicy",
    "WorkerConfig",
    "as_json",
    "describe",
    "load",
    "redact_dsn",
]
