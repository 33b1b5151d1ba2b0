"""What @cron takes, and which task and entry it makes of a function."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from roost_client import DEFAULT_HANDLERS, CronEntry, HandlerRegistry, InvalidJobError, cron, job


def entries(registry: HandlerRegistry) -> list[CronEntry]:
    return [spec.entry for spec in registry.cron_entries()]


def test_cron_alone_makes_a_task_called_as_the_entry(registry: HandlerRegistry) -> None:
    def clean() -> None: ...

    assert cron("@daily", name="nightly", handler_registry=registry)(clean) is clean
    assert registry.names() == ["nightly"]
    assert entries(registry) == [CronEntry("nightly", "@daily", "nightly")]
    (spec,) = registry.cron_entries()
    assert spec.func is clean
    assert spec.where == f"{__name__}.{clean.__qualname__}"


def test_without_a_name_it_is_called_as_the_function_and_its_module(registry: HandlerRegistry) -> None:
    @cron("@daily", handler_registry=registry)
    def clean() -> None: ...

    name = f"{__name__}.{clean.__qualname__}"
    assert entries(registry) == [CronEntry(name, "@daily", name)]
    assert registry.names_of(clean) == (name,)


@pytest.mark.parametrize("named", [None, "nightly"])
@pytest.mark.parametrize("job_is_above", [False, True])
def test_a_function_of_both_keeps_the_task_of_its_job(
    registry: HandlerRegistry, job_is_above: bool, named: str | None
) -> None:
    def clean() -> None: ...

    as_job = job("clean_up", queue="slow", registry=registry)
    as_cron = cron("@daily", name=named, timezone="Europe/Berlin", args={"a": 1}, handler_registry=registry)
    for decorate in (as_cron, as_job) if job_is_above else (as_job, as_cron):
        decorate(clean)
    assert registry.names() == ["clean_up"]
    assert registry.names_of(clean) == ("clean_up",)
    assert entries(registry) == [
        CronEntry(named or "clean_up", "@daily", "clean_up", {"a": 1}, timezone_name="Europe/Berlin")
    ]


def test_a_function_may_fire_by_several_expressions(registry: HandlerRegistry) -> None:
    @job("clean", registry=registry)
    @cron("@daily", name="b", queue="default", handler_registry=registry)
    @cron("@hourly", name="a", priority=3, max_attempts=1, handler_registry=registry)
    def clean() -> None: ...

    assert entries(registry) == [
        CronEntry("a", "@hourly", "clean", priority=3, max_attempts=1),
        CronEntry("b", "@daily", "clean"),
    ]
    # What was passed wins over the defaults of the task, also where it is the same as the documented default.
    assert [spec.passed for spec in registry.cron_entries()] == [
        {"name", "priority", "max_attempts"},
        {"name", "queue"},
    ]


def test_of_several_tasks_the_name_says_which(registry: HandlerRegistry) -> None:
    @job("a", registry=registry)
    @job("b", registry=registry)
    def either() -> None: ...

    with pytest.raises(InvalidJobError, match="must be one of the tasks that it handles: b, a"):
        cron("@daily", handler_registry=registry)(either)
    cron("@daily", name="b", handler_registry=registry)(either)
    assert entries(registry) == [CronEntry("b", "@daily", "b")]


def test_the_default_registry_is_used_without_one() -> None:
    @cron("@daily", name="test_cron.default")
    def handler() -> None: ...

    try:
        assert DEFAULT_HANDLERS.names_of(handler) == ("test_cron.default",)
        assert "test_cron.default" in [entry.name for entry in entries(DEFAULT_HANDLERS)]
    finally:
        del DEFAULT_HANDLERS._specs["test_cron.default"], DEFAULT_HANDLERS._cron["test_cron.default"]
        DEFAULT_HANDLERS._implied.clear()
        DEFAULT_HANDLERS._names.pop(handler)


def test_a_name_that_another_entry_has_is_refused_and_both_are_named(registry: HandlerRegistry) -> None:
    @cron("@daily", name="nightly", handler_registry=registry)
    def one() -> None: ...

    def two() -> None: ...

    with pytest.raises(InvalidJobError) as caught:
        cron("@hourly", name="nightly", handler_registry=registry)(two)
    assert "two" in str(caught.value)
    assert "one has a cron entry 'nightly' already" in str(caught.value)
    with pytest.raises(InvalidJobError, match="give one of them another name"):
        cron("@hourly", name="nightly", handler_registry=registry)(one)


@pytest.mark.parametrize(
    ("path", "keywords"),
    [
        ("expression", {"expression": None}),
        ("expression", {"expression": "* * * * *\0"}),
        ("name", {"name": ""}),
        ("name", {"name": 3}),
        ("name", {"name": "x" * 129}),
        ("queue", {"queue": None}),
        ("queue", {"queue": ""}),
        ("priority", {"priority": "1"}),
        ("priority", {"priority": True}),
        ("max_attempts", {"max_attempts": 0}),
        ("timezone", {"timezone": 1}),
        ("args", {"args": [1]}),
        ("args.a", {"args": {"a": {1}}}),
        ("args.a", {"args": {"a": float("nan")}}),
    ],
)
def test_a_bad_value_is_refused_by_its_name(registry: HandlerRegistry, path: str, keywords: dict[str, Any]) -> None:
    def handler() -> None: ...

    arguments: dict[str, Any] = {"expression": "@daily", **keywords}
    with pytest.raises(InvalidJobError) as caught:
        cron(**arguments, handler_registry=registry)(handler)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"cannot schedule {__name__}.")
    assert registry.names() == []
    assert entries(registry) == []


def test_what_cannot_be_called_is_refused(registry: HandlerRegistry) -> None:
    thing: Any = 3
    with pytest.raises(InvalidJobError, match="must be callable"):
        cron("@daily", name="x", handler_registry=registry)(thing)


@pytest.mark.parametrize("decorators", ["@cron('@daily')", "@job('x')\n@cron('@daily')", "@cron('@daily')\n@job('x')"])
def test_a_reloaded_module_declares_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decorators: str) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    text = "from roost_client import HandlerRegistry, cron as c, job as j\n"
    text += "registry = globals().get('registry') or HandlerRegistry()\n"
    text += "def cron(e): return c(e, handler_registry=registry)\ndef job(n): return j(n, registry=registry)\n"
    (tmp_path / "cron_reloaded.py").write_text(f"{text}{decorators}\ndef f(): return 1\n")
    module = importlib.import_module("cron_reloaded")
    try:
        before = entries(module.registry)
        module = importlib.reload(module)
        assert entries(module.registry) == before
        assert len(before) == 1
        (task,) = module.registry.names()
        assert task == before[0].task
        assert module.registry.get(task).func is module.f
    finally:
        del sys.modules["cron_reloaded"]
