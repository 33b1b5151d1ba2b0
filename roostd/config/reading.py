"""From the merged tree to the settings: every value judged, every problem told.

Must not decide where values come from.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roost_client.arguments import object_text
from roost_client.fields import Refused
from roostd.config import dsn as dsns
from roostd.config.kinds import KINDS, Kind, is_name
from roostd.config.report import flatten
from roostd.config.settings import (
    STRATEGY_ARGUMENTS,
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
from roostd.config.sources import DATABASE_CHOICES, LISTEN_CHOICES, Table, Value, gather
from roostd.core.cron import ExpressionError, Schedule, ZoneError, zone

_SECTIONS = ("database", "worker", "handlers", "pools", "cron", "log")
_KEYS = [f"{section}.{key}" for section, kinds in KINDS.items() for key in kinds]


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """`origins`: where each dotted key's value was given. `warnings`: sentences for the operator."""

    config: Config
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def load(path: Path | None, *, environ: Mapping[str, str], flags: Mapping[str, Any]) -> LoadedConfig:
    """Read the settings from `path` and its drop-ins, `environ`, and `flags` by dotted key (None: not given).

    Relative paths in files start at the folder of `path`, others at the working directory. Raises ConfigError.
    """
    reading = _Reading(gather(path, environ, flags))
    database = reading.database(path)
    worker = reading.worker()
    handlers = HandlersConfig(**reading.section("handlers"))
    pools = reading.pools()
    cron = reading.cron()
    log = LogConfig(**reading.section("log"))
    if reading.problems:
        raise ConfigError(*reading.problems)
    for folder in handlers.pythonpath:
        # No error: roostctl, which only wants the database, may run where the handlers aren't.
        if not os.path.isdir(folder):
            reading.warnings.append(f"handlers.pythonpath has {folder}, which is not a directory")
    config = Config(database=database, worker=worker, handlers=handlers, pools=pools, cron=cron, log=log)
    origins = {key: reading.origin(key) for key, _ in flatten(config)}
    return LoadedConfig(config, origins, tuple(reading.warnings))


class _Reading:
    """One pass over the tree. Problems pile up, so that all of them are told at once."""

    def __init__(self, tree: Table) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._origins: dict[str, str] = {}
        self._sections = {name: Table({}, "default") for name in _SECTIONS}
        for name, node in tree.entries.items():
            if self._is_key(name, node, "", _SECTIONS):
                self._sections[name] = self._table(name, node)

    def origin(self, dotted: str) -> str:
        return self._origins.get(dotted, "default")

    def section(self, name: str) -> dict[str, Any]:
        return self._values(name, self._sections[name], KINDS[name])

    def database(self, path: Path | None) -> DatabaseConfig:
        entries = self._sections["database"].entries
        values = self.section("database")
        chosen = [key for key in DATABASE_CHOICES if key in entries]
        if not chosen:
            where = f"in {path}" if path else "in a file, named with -c"
            self.problems.append(f"cannot find a database: set dsn or embedded under [database] {where}, or ROOST_DSN")
        listening = [key for key in LISTEN_CHOICES if key in entries]
        for first, *others in filter(None, (chosen, listening)):
            for key in others:
                self.problems.append(
                    f"cannot use database.{key} from {entries[key].origin}: "
                    f"database.{first} from {entries[first].origin} names a database too; leave one of them"
                )
        if listening and chosen == ["embedded"]:
            self.problems.append(
                f"cannot use database.{listening[0]} from {entries[listening[0]].origin}: "
                "no pooler stands before an embedded database; remove it"
            )
        for key, given in (("dsn", chosen), ("listen_dsn", listening)):
            if given == [f"{key}_file"] and given[0] in values:
                values[key] = self._read_dsn_file(given[0], values[given[0]])
        return DatabaseConfig(**values)

    def _read_dsn_file(self, key: str, file: Path) -> str | None:
        what = f"database.{key} {file} from {self.origin(f'database.{key}')}"
        try:
            dsn = file.read_bytes().decode().strip()
            dsns.parse_dsn(dsn)
            if file.stat().st_mode & stat.S_IROTH:
                self.warnings.append(f"everybody may read database.{key} {file}; run chmod o-r {file}")
        except FileNotFoundError:
            self.problems.append(f"cannot read {what}: no such file; create it, or correct its name")
        except OSError as error:
            self.problems.append(f"cannot read {what}: {error.strerror}; let the user who runs this read it")
        except ValueError:
            self.problems.append(f"cannot use {what}: expected in it {dsns.EXPECTED}")
        else:
            self._origins[f"database.{key.removesuffix('_file')}"] = str(file)
            return dsn
        return None

    def worker(self) -> WorkerConfig:
        table = self._sections["worker"]
        strategy = table.entries.pop("retry_strategy", None)
        values = self.section("worker")
        if strategy is not None:
            values["retry_strategy"] = self._retry_strategy(strategy)
        worker = WorkerConfig(**values)
        given = table.entries.keys() & {"orphan_stale_after", "heartbeat_interval"}
        if worker.orphan_stale_after <= 2 * worker.heartbeat_interval and given <= values.keys():
            self.problems.append(
                f"cannot use worker.orphan_stale_after = {worker.orphan_stale_after} "
                f"from {self.origin('worker.orphan_stale_after')}: it must be more than twice "
                f"worker.heartbeat_interval = {worker.heartbeat_interval} "
                f"from {self.origin('worker.heartbeat_interval')}, or one late heartbeat would hand a living "
                f"worker's jobs to its peers; set it above {2 * worker.heartbeat_interval}"
            )
        return worker

    def _retry_strategy(self, node: Table | Value) -> RetryPolicy:
        path = "worker.retry_strategy"
        if isinstance(node, Value):
            self._reject(path, node, f"{KINDS[path]['strategy'].expected}, or a table")
            return RetryPolicy()
        policy = RetryPolicy(**self._values(path, node, KINDS[path]))
        allowed = ("strategy", *STRATEGY_ARGUMENTS[policy.strategy])
        for key in [key for key in node.entries if key in KINDS[path] and key not in allowed]:
            self.problems.append(
                f"cannot use {path}.{key} from {node.entries[key].origin}: "
                f"{policy.strategy} takes only {', '.join(allowed[1:])}; remove it, or name its strategy"
            )
        return policy

    def pools(self) -> tuple[PoolConfig, ...]:
        pools = []
        owners: dict[str, str] = {}
        for name, node in self._sections["pools"].entries.items():
            is_valid = re.fullmatch("[A-Za-z0-9_-]{1,64}", name) is not None
            path = f"pools.{name if is_valid else _brief(name)}"
            table = self._table(path, node)
            values = self._values(path, table, KINDS["pools.NAME"])
            if not is_valid:
                self.problems.append(
                    f"cannot use pool {_brief(name)} from {node.origin}: "
                    "expected a name of 1 to 64 letters, digits, underscores and hyphens"
                )
            elif isinstance(node, Table) and "queues" not in node.entries and name != "default":
                self.problems.append(
                    f'cannot use {path} from {node.origin}: it has no queues; write queues = ["{name}"] under [{path}]'
                )
            if "queues" not in table.entries:
                values["queues"] = ("default",) if name == "default" else ()
            for queue in values.setdefault("queues", ()):
                place = f"{path}.queues from {self.origin(f'{path}.queues')}"
                if owners.setdefault(queue, place) != place:
                    self.problems.append(
                        f"cannot use {place}: queue {_brief(queue)} is also in {owners[queue]}; leave it in one of them"
                    )
            pools.append(PoolConfig(name=name, **values))
        return tuple(pools) or Config().pools

    def cron(self) -> tuple[CronConfig, ...]:
        """Whether an entry has all that it needs, and its task exists, shows only beside those of @cron."""
        entries = []
        for name, node in self._sections["cron"].entries.items():
            path = f"cron.{name if is_name(name) else _brief(name)}"
            if not is_name(name):
                self.problems.append(f"cannot use {path} from {node.origin}: expected a name of 1 to 128 characters")
            values = self._values(path, self._table(path, node), KINDS["cron.NAME"])
            for key, check in (("expression", Schedule.parse), ("timezone", zone)):
                try:
                    if key in values:
                        check(values[key])
                except (ExpressionError, ZoneError) as error:
                    what = f"{path}.{key} = {_brief(values[key])} from {self.origin(f'{path}.{key}')}"
                    self.problems.append(f"cannot use {what}: it {error}")
            try:
                object_text(f"{path}.args", values.get("args", {}))
            except Refused as refused:
                self.problems.append(
                    f"cannot use {refused.path} from {self.origin(f'{path}.args')}: it {refused.reason}"
                )
            entries.append(CronConfig(name=name, **values))
        return tuple(entries)

    def _table(self, path: str, node: Table | Value) -> Table:
        if isinstance(node, Table):
            return node
        self._reject(path, node, f"a table, [{path}{'.NAME' if path in ('pools', 'cron') else ''}]")
        return Table({}, node.origin)

    def _values(self, path: str, table: Table, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        values = {}
        for key, node in table.entries.items():
            if self._is_key(key, node, path, kinds):
                try:
                    values[key] = _read(kinds[key], node)
                    self._origins[f"{path}.{key}"] = node.origin
                except (ValueError, OSError):
                    self._reject(f"{path}.{key}", node, kinds[key].expected)
        return values

    def _is_key(self, key: str, node: Table | Value, path: str, keys: Iterable[str]) -> bool:
        if key in keys:
            return True
        prefix = f"{path}." if path else ""
        shown = prefix + (key if re.fullmatch(r"[\w-]{1,80}", key) else _brief(key))
        meant = _meant_by(key, prefix, list(keys))
        if node.origin.startswith("environment "):
            meant = ["ROOST_" + dotted.upper().replace(".", "__") for dotted in meant]
        fix = f"did you mean {meant[0]}?" if len(meant) == 1 else f"there are {', '.join(meant)}"
        self.problems.append(f"cannot use {shown} from {node.origin}: no such key; {fix}")
        return False

    def _reject(self, path: str, node: Table | Value, expected: str) -> None:
        value = "a table" if isinstance(node, Table) else _brief(node.value)
        # What was meant for a connection string may hold a password.
        is_secret = path.removeprefix("database.") in DATABASE_CHOICES + LISTEN_CHOICES
        shown = path if is_secret else f"{path} = {value}"
        self.problems.append(f"cannot use {shown} from {node.origin}: expected {expected}")


def _read(kind: Kind, node: Table | Value) -> Any:
    if isinstance(node, Table):
        raise ValueError
    return kind.read(kind.parse(node.value) if node.is_text else node.value, node.base)


def _meant_by(key: str, prefix: str, siblings: list[str]) -> list[str]:
    """One that is nearly it, the same key elsewhere, the nearest one here, or else any of those there are here."""
    if close := difflib.get_close_matches(key, siblings, 1, 0.9):
        return [prefix + close[0]]
    elsewhere = {known.rpartition(".")[2]: known for known in _KEYS}
    if key in elsewhere:
        return [elsewhere[key]]
    if close := difflib.get_close_matches(key, siblings, 1, 0.6):
        return [prefix + close[0]]
    if close := difflib.get_close_matches(key, elsewhere, 1, 0.7):
        return [elsewhere[close[0]]]
    return [prefix + sibling for sibling in siblings]


_abbreviate = reprlib.Repr()
_abbreviate.maxstring = _abbreviate.maxother = _abbreviate.maxlong = 60


def _brief(value: Any) -> str:
    return _abbreviate.repr(value)
