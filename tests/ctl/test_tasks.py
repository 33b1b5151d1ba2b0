"""tasks, tasks export: what handlers take, told by a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.ctl.conftest import Ctl

HANDLERS = '''
"""Handlers that print when they are imported, without ending the line."""
from __future__ import annotations

import os
import sys
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field
from roost_client import job

if TYPE_CHECKING:
    from nowhere import Something

print("imported", end="")
open(os.environ["NOTE"], "a").write(f"{os.getpid()}\\n")


class Item(BaseModel):
    name: str


class Order(BaseModel):
    """What was ordered."""

    items: list[Item]
    due: date | None = None


@job("order", args_model=Order, queue="orders", max_attempts=3, tags=["a"], timeout_seconds=9, rate_per_minute=60)
def order(items: list[Item], due: date | None) -> None:
    """Ships an order."""


@job("annotated")
def annotated(
    number: Annotated[int, Field(gt=0)],
    *,
    kind: Literal["a", "b"] = "a",
    item: Item | None = None,
    bare=None,
    unknown: Something = None,
    odd: type[os.PathLike] | sys.__class__ = os.PathLike,
) -> None: ...


@job("anything")
def anything(**fields: Any) -> None: ...


class Callable:
    def __call__(self, n: int) -> None: ...


job("object")(Callable())
job("builtin")(print)
'''


@pytest.fixture
def config(tmp_path: Path, dsn: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "taking.py").write_text(HANDLERS)
    monkeypatch.setenv("NOTE", str(tmp_path / "note"))
    path = tmp_path / "roost.toml"
    path.write_text(
        f"[database]\ndsn = {json.dumps(dsn)}\n"
        f'[handlers]\nmodules = ["taking"]\npythonpath = [{json.dumps(str(tmp_path))}]\n'
    )
    return path


def test_export_tells_the_schema_of_each_task(bare_ctl: Ctl, config: Path, tmp_path: Path) -> None:
    result = bare_ctl("tasks", "export", "-c", config)
    assert (result.code, result.err) == (0, "imported")
    tasks = {task["name"]: task for task in result.json}
    assert sorted(tasks) == ["annotated", "anything", "builtin", "object", "order"]

    order = tasks["order"]
    assert (order["handler"], order["description"]) == ("taking.order", "Ships an order.")
    assert order["defaults"] == {
        "queue": "orders", "max_attempts": 3, "tags": ["a"], "timeout_seconds": 9, "rate_per_minute": 60,
    }  # fmt: skip
    schema = order["schema"]
    assert (schema["title"], schema["required"]) == ("Order", ["items"])
    assert schema["$defs"]["Item"]["properties"]["name"]["type"] == "string"

    schema = tasks["annotated"]["schema"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["number"]
    assert schema["additionalProperties"] is False
    assert schema["properties"] == {
        "number": {"exclusiveMinimum": 0, "type": "integer"},
        "kind": {"default": "a", "enum": ["a", "b"], "type": "string"},
        "item": {"anyOf": [{"$ref": "#/$defs/Item"}, {"type": "null"}], "default": None},
        "bare": {"default": None},
        "unknown": {"default": None},
        "odd": {},
    }
    assert list(schema["$defs"]) == ["Item"]
    assert tasks["anything"]["schema"]["additionalProperties"] is True
    assert tasks["object"]["schema"]["properties"] == {"n": {"type": "integer"}}
    assert tasks["builtin"]["schema"]["type"] == "object"
    importers = (tmp_path / "note").read_text().split()
    assert len(importers) == 1, "the template alone imports handlers"
    assert str(os.getpid()) not in importers


def test_tasks_lists_what_is_declared_and_which_workers_have_it(bare_ctl: Ctl, config: Path, dsn: str) -> None:
    with psycopg.connect(dsn) as conn:
        for name, tasks in (("one", '["order", "elsewhere"]'), ("two", '["order"]'), ("old", "null"), ("odd", "3")):
            conn.execute(
                "INSERT INTO roost.workers (id, name, hostname, pid, queues, concurrency, metadata)"
                " VALUES (gen_random_uuid(), %s, 'h', 1, '{}', 1, jsonb_build_object('tasks', %s::jsonb))",
                (name, tasks),
            )
    result = bare_ctl("tasks", "-c", config)
    assert result.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.lines}
    assert rows["order"] == ["orders", "-", "3", "9", "60", "-", "one,two"]
    assert rows["anything"] == ["-"] * 7
    assert rows["elsewhere"] == ["-"] * 6 + ["one"]
    listed = {row["task"]: row for row in bare_ctl("tasks", "--json", "-c", config).json}
    assert listed["order"]["tags"] == ["a"]
    assert [listed[name]["declared"] for name in ("order", "elsewhere")] == [True, False]
    # From elsewhere, without the settings: what the workers say.
    assert [row["task"] for row in bare_ctl("tasks", "--dsn", dsn, "--json").json] == ["elsewhere", "order"]


def test_tasks_without_any_end_with_1_and_export_without_settings_with_78(ctl: Ctl) -> None:
    assert (ctl("tasks").code, "name no handlers" in ctl("tasks").err) == (1, True)
    exported = ctl("tasks", "export")
    assert (exported.code, exported.out) == (78, "")
    assert "cannot export tasks: the settings name no handlers" in exported.err


def test_handlers_that_cannot_be_imported_are_told_with_their_trace(
    bare_ctl: Ctl, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "taking.py").write_text("def broken(:\n")
    for command in (["tasks"], ["tasks", "export"]):
        result = bare_ctl(*command, "-c", config)
        assert (result.code, result.out) == (78, "")
        assert "SyntaxError" in result.err
        assert "correct the code" in result.err


def test_check_prints_the_settings_as_json_without_secrets(
    config: Path, ctl_process: Callable[..., Any], dsn: str
) -> None:
    secret = "postgresql://me:s3cret@nowhere/x"
    line = f"ROOST_DATABASE__DSN={secret} $(dirname $roostctl)/roostd --check --json -c {config}"
    done = ctl_process(line)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["settings"]["handlers.modules"] == {"value": ["taking"], "origin": str(config)}
    assert told["settings"]["database.dsn"]["origin"] == "environment ROOST_DATABASE__DSN"
    assert "s3cret" not in done.stdout + done.stderr
    refused = ctl_process(f"$(dirname $roostctl)/roostd --json -c {config}")
    assert refused.returncode == 2
    assert "--json goes with --check" in refused.stderr
