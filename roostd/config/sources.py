"""Where values come from: each source becomes a tree, and is laid over those before it.

Files first, then the environment, then flags. Every value keeps the name of its source. Must not judge values: that
is done once, on the merged tree, so that a value which a later source replaces need not be right.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from roostd.config.kinds import parse_literal
from roostd.config.settings import ConfigError

# Each of these names the database, so a source that gives one of them takes back the others, and with them the other
# way to the same database.
LISTEN_CHOICES = ("listen_dsn", "listen_dsn_file")
DATABASE_CHOICES = ("dsn", "dsn_file", "embedded")

_DEEPEST_KEY = 3  # worker.retry_strategy.strategy, pools.NAME.queues, cron.NAME.args


@dataclass(frozen=True, slots=True)
class Value:
    value: Any
    origin: str
    base: Path  # of relative paths
    is_text: bool = False  # not yet parsed: from a variable or a flag


@dataclass(frozen=True, slots=True)
class Table:
    entries: dict[str, Table | Value]
    origin: str


def gather(path: Path | None, environ: Mapping[str, str], flags: Mapping[str, Any]) -> Table:
    """All sources in one tree. Raises ConfigError where a file can't be read or parsed."""
    tree = Table({}, "default")
    for layer in _read_files(path):
        tree = _overlay(tree, layer)
    tree = _overlay(tree, _read_environment(environ, tree))
    tree = _overlay(tree, _read_flags(flags))
    return _find_database(tree, environ)


def _read_files(path: Path | None) -> Iterator[Table]:
    if path is None:
        return
    problems = []
    layers = []
    for file in [path, *_list_drop_ins(path.parent / f"{path.stem}.d")]:
        try:
            document = tomllib.loads(file.read_bytes().decode())
        except FileNotFoundError:
            problems.append(f"cannot read {file}: no such file; create it, or name another one with -c")
        except IsADirectoryError:
            problems.append(f"cannot read {file}: it is a directory; name a file, as {file / 'roost.toml'}")
        except OSError as error:
            problems.append(f"cannot read {file}: {error.strerror}; let the user who runs this read it")
        except UnicodeDecodeError as error:
            problems.append(f"cannot read {file}: byte {error.start} is not UTF-8; save it as UTF-8")
        except (ValueError, RecursionError) as error:
            problems.append(f"cannot parse {file}: {error}; correct the TOML there")
        else:
            # A drop-in is a part of its file: to move a setting between them changes no path.
            layers.append(_as_table(document, Value(None, str(file), path.parent)))
    if problems:
        raise ConfigError(*problems)
    yield from layers


def _list_drop_ins(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(
            f"cannot read drop-ins in {folder}: {error.strerror}; make it a directory that the user who runs this "
            "can read, or remove it"
        ) from None
    return [folder / name for name in names if name.endswith(".toml") and not name.startswith(".")]


def _as_table(document: Mapping[str, Any], source: Value, depth: int = _DEEPEST_KEY) -> Table:
    """Below the deepest key all is one value, or a line of dots in a file could exhaust the stack."""
    entries: dict[str, Table | Value] = {
        key: _as_table(value, source, depth - 1)
        if isinstance(value, dict) and depth > 1
        else replace(source, value=value)
        for key, value in document.items()
    }
    return Table(entries, source.origin)


def _read_environment(environ: Mapping[str, str], below: Table) -> Table:
    """ROOST_SECTION__KEY; a pool or cron entry is matched to those in `below` as a variable spells it."""
    spelled = {
        section: {_in_variable(name): name for name in table.entries}
        for section in ("pools", "cron")
        if isinstance(table := below.entries.get(section), Table)
    }
    tree = Table({}, "environment")
    for variable, text in sorted(environ.items()):
        if not variable.startswith("ROOST_") or "__" not in variable:
            continue
        path = variable.removeprefix("ROOST_").lower().split("__")
        if path[0] in ("pools", "cron") and len(path) > 2:
            name = "__".join(path[1:-1])
            path = [path[0], spelled.get(path[0], {}).get(name, name), path[-1]]
        _insert(tree, path, Value(text, f"environment {variable}", Path(), is_text=True))
    return tree


def _in_variable(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")


def _read_flags(flags: Mapping[str, Any]) -> Table:
    tree = Table({}, "flags")
    for dotted, value in flags.items():
        if value is not None:
            section, _, key = dotted.rpartition(".")
            flag = (f"--{section}-{key}" if section == "log" else f"--{key}").replace("_", "-")
            _insert(tree, dotted.split("."), Value(value, f"flag {flag}", Path(), is_text=isinstance(value, str)))
    return tree


def _insert(tree: Table, path: list[str], value: Value) -> None:
    for key in path[:-1]:
        inner = tree.entries.get(key)
        if not isinstance(inner, Table):
            inner = tree.entries[key] = Table({}, value.origin)
        tree = inner
    tree.entries[path[-1]] = value


def _overlay(below: Table, above: Table, path: str = "") -> Table:
    """Tables merge, values and lists replace. A named strategy replaces the whole of another one."""
    entries = dict(below.entries)
    if path == "database":
        for choices in (DATABASE_CHOICES, LISTEN_CHOICES):
            if any(key in above.entries for key in choices):
                taken_back = {*choices, *LISTEN_CHOICES}
                entries = {key: node for key, node in entries.items() if key not in taken_back}
    for key, upper in above.entries.items():
        lower = entries.get(key)
        inner = f"{path}.{key}" if path else key
        if inner == "worker.retry_strategy":
            upper = _as_strategy(upper)
            if isinstance(upper, Table) and "strategy" in upper.entries:
                lower = None
        if isinstance(upper, Table):
            upper = _overlay(lower if isinstance(lower, Table) else Table({}, upper.origin), upper, inner)
        entries[key] = upper
    return Table(entries, below.origin if below.entries else above.origin)


def _as_strategy(node: Table | Value) -> Table | Value:
    """`retry_strategy = "linear"` means `{ strategy = "linear" }`; in a variable, the table is a literal."""
    if isinstance(node, Value):
        value = parse_literal(node.value) if node.is_text else node.value
        if isinstance(value, str):
            return Table({"strategy": node}, node.origin)
        if isinstance(value, dict):
            return _as_table(value, replace(node, is_text=False), depth=1)
    return node


def _find_database(tree: Table, environ: Mapping[str, str]) -> Table:
    """Look where the settings name no database: a systemd credential `dsn`, then the variables of clients."""
    section = tree.entries.get("database", Table({}, "default"))
    if not isinstance(section, Table):
        return tree
    entries = dict(section.entries)
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if not any(key in entries for key in DATABASE_CHOICES):
        variables = [variable for variable in ("ROOST_DSN", "DATABASE_URL") if environ.get(variable)]
        if credentials and os.path.exists(os.path.join(credentials, "dsn")):
            entries["dsn_file"] = Value("dsn", "systemd credential dsn", Path())
        elif variables:
            entries["dsn"] = Value(environ[variables[0]], f"environment {variables[0]}", Path())
    for key in ("dsn_file", "listen_dsn_file"):
        file = entries.get(key)
        if credentials and isinstance(file, Value):
            entries[key] = replace(file, base=Path(credentials))
    return replace(tree, entries={**tree.entries, "database": replace(section, entries=entries)})
