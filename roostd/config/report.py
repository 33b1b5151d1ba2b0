"""The settings in force, as text that may be shown to anybody."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from roostd.config.dsn import redact_dsn
from roostd.config.settings import Config, RetryPolicy

if TYPE_CHECKING:
    from roostd.config.reading import LoadedConfig


def describe(loaded: LoadedConfig) -> str:
    """One `key = value   # origin` a line, in the order of the sections; the DSN without its secrets."""
    return "\n".join(f"{key} = {_spell(key, value)}   # {loaded.origins[key]}" for key, value in flatten(loaded.config))


def as_json(loaded: LoadedConfig) -> dict[str, dict[str, Any]]:
    """The same, by key."""
    return {
        key: {"value": redact_dsn(value) if key == "database.dsn" and value else value, "origin": loaded.origins[key]}
        for key, value in flatten(loaded.config)
    }


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """Each setting under its dotted key; of a retry policy only what its strategy takes, of cron only what is given."""
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        named = isinstance(value, tuple)  # pools, cron
        tables = {f"{section.name}.{each.name}": each for each in value} if named else {section.name: value}
        for path, table in tables.items():
            for entry in dataclasses.fields(table):
                setting = getattr(table, entry.name)
                if isinstance(setting, RetryPolicy):
                    yield f"{path}.{entry.name}.strategy", setting.strategy
                    yield from ((f"{path}.{entry.name}.{key}", item) for key, item in setting.arguments().items())
                elif not (named and entry.name == "name") and not (section.name == "cron" and setting is None):
                    yield f"{path}.{entry.name}", setting


def _spell(key: str, value: Any) -> str:
    if value is None:
        return "(not set)"
    if key in ("database.dsn", "database.listen_dsn"):
        value = redact_dsn(value)
    return json.dumps(value, ensure_ascii=False, default=str)
