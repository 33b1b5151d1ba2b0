"""Who may import whom: imports go down only, read from the source of every module."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names) | {"annotationlib"}  # which is there from Python 3.14 on

# Each part of the project, from the bottom up: the parts it may import besides itself, and the libraries besides
# Python's own.
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    # 0: what applications import
    "roost_client": (set(), {"psycopg", "psycopg_binary", "pydantic", "pydantic_core"}),
    # 1: no I/O of their own
    "core": ({"roost_client"}, set()),
    "wire": (set(), set()),
    "linux": (set(), set()),
    # 2: one thing of the outside world each
    "store": ({"core", "roost_client"}, {"psycopg"}),
    "config": ({"core", "roost_client"}, {"psycopg"}),
    "lines": (set(), {"structlog"}),
    "log": ({"config", "lines"}, {"structlog"}),
    "sdnotify": (set(), set()),
    "embedded": (set(), set()),
    # 3: the processes
    "child": ({"lines", "core", "wire", "linux", "roost_client"}, {"pydantic", "setproctitle"}),
    "template": ({"child", "core", "wire", "linux", "roost_client"}, {"pydantic", "pydantic_core", "setproctitle"}),
    "master": (
        {"store", "config", "log", "sdnotify", "core", "wire", "linux", "roost_client"},
        {"psycopg", "setproctitle", "structlog"},
    ),
    # 4: entry points
    "serve": (
        {"master", "config", "log", "embedded", "core", "roost_client"},
        {"click", "psycopg", "structlog"},
    ),
    "worker": (
        {"serve", "master", "config", "log", "embedded", "roost_client"},
        {"structlog"},
    ),
    "testing": ({"master", "child", "store", "config", "core", "wire", "roost_client"}, {"psycopg"}),
    "pytest_plugin": ({"embedded", "roost_client"}, {"psycopg", "pytest"}),
    "cli": ({"serve"}, {"click"}),
    "ctl": (
        {"config", "embedded", "core", "linux", "roost_client"},
        {"click", "psycopg", "pydantic", "rich"},
    ),
}

# What would make a decision depend on more than its arguments.
IMPURE = {
    "asyncio", "ctypes", "io", "logging", "multiprocessing", "os", "pathlib", "resource", "select", "selectors",
    "signal", "socket", "subprocess", "tempfile", "threading", "time",
}  # fmt: skip
CLOCKS_AND_DICE = {"datetime.now", "datetime.utcnow", "datetime.today", "date.today", "random.random"}


class Import(NamedTuple):
    """One imported module, and the name taken from it ("" where it is the module itself)."""

    where: str
    module: str
    name: str


def modules() -> list[Path]:
    return sorted(path for package in ("roostd", "roost_client") for path in (REPOSITORY / package).rglob("*.py"))


def parts_of(path: Path) -> list[str]:
    return list(path.relative_to(REPOSITORY).with_suffix("").parts)


def unit_of(module: list[str]) -> str:
    """The part that a module belongs to; "" for the package `roostd` itself."""
    if module[0] == "roost_client":
        return "roost_client"
    return "" if len(module) == 1 or module[1] == "__init__" else module[1]


def imports_of(path: Path) -> Iterator[Import]:
    package = parts_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(f"{path.relative_to(REPOSITORY)}:{node.lineno}", alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{path.relative_to(REPOSITORY)}:{node.lineno}", module, alias.name)


def imported_unit(imported: Import) -> str:
    module = imported.module.split(".")
    names_a_part = module == ["roostd"] and imported.name != "__version__"
    return unit_of([*module, imported.name] if names_a_part and imported.name else module)


def test_every_module_has_its_layer() -> None:
    homeless = {unit_of(parts_of(path)) for path in modules()} - LAYERS.keys() - {""}
    assert not homeless, f"give these a layer in {Path(__file__).name}: {sorted(homeless)}"


@pytest.mark.parametrize("unit", LAYERS)
def test_imports_go_down_only(unit: str) -> None:
    below, libraries = LAYERS[unit]
    for path in modules():
        if unit_of(parts_of(path)) != unit:
            continue
        for imported in imports_of(path):
            top = imported.module.split(".")[0]
            if top in ("roostd", "roost_client"):
                # The package by itself holds the version and no more (see the last test).
                itself = unit != "roost_client" and imported_unit(imported) == ""
                allowed = itself or imported_unit(imported) in below | {unit}
            else:
                allowed = top in STANDARD | libraries
            assert allowed, f"{imported.where}: {unit} may not import {imported.module} {imported.name}".rstrip()


def test_the_table_of_layers_has_no_way_up() -> None:
    order = list(LAYERS)
    for unit, (below, _) in LAYERS.items():
        assert all(order.index(each) < order.index(unit) for each in below), unit


def test_core_reads_no_clock_rolls_no_dice_and_does_no_io() -> None:
    for path in (REPOSITORY / "roostd/core").rglob("*.py"):
        for imported in imports_of(path):
            assert imported.module.split(".")[0] not in IMPURE, f"{imported.where}: core is pure"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in CLOCKS_AND_DICE, (
                    f"{path.name}:{node.lineno}: core takes it as an argument"
                )


def test_core_takes_only_types_from_the_client() -> None:
    pure = {"roost_client.types", "roost_client.errors", "roost_client.backoff"}
    for path in (REPOSITORY / "roostd/core").rglob("*.py"):
        for imported in imports_of(path):
            if imported.module == "roost_client":
                origin = getattr(importlib.import_module("roost_client"), imported.name).__module__
                assert origin in pure, f"{imported.where}: {imported.name} is of {origin}"
            elif imported.module.startswith("roost_client."):
                assert imported.module in pure, f"{imported.where}: {imported.module}"


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_the_client_loads_psycopg_pydantic_and_the_standard_library_only() -> None:
    own = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}  # pydantic's
    own |= {"psycopg", "psycopg_binary", "psycopg_c", "cython_runtime", "tzdata"}  # psycopg's
    loaded = {name.split(".")[0] for name in loaded_by("import roost_client")} - STANDARD
    assert {name for name in loaded - own if not name.startswith("_")} == {"roost_client"}


def test_the_daemons_package_loads_none_of_its_parts_by_itself() -> None:
    assert not {name for name in loaded_by("import roostd") if name.startswith(("roostd.", "roost_client", "psycopg"))}
