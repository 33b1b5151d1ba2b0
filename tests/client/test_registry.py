"""Which function has which name, and what @job takes."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from roost_client import DEFAULT_HANDLERS, HandlerRegistry, InvalidJobError, TaskDefaults, job


class Order(BaseModel):
    id: int


def test_job_returns_the_function_untouched(registry: HandlerRegistry) -> None:
    def handler(id: int) -> int:
        return id

    before = dict(vars(handler))
    assert job("send", registry=registry)(handler) is handler
    assert vars(handler) == before
    assert handler(id=3) == 3


def test_job_registers_with_all_its_keywords(registry: HandlerRegistry) -> None:
    @job(
        "send",
        args_model=Order,
        queue="emails",
        priority=-5,
        max_attempts=3,
        tags=["a", "b"],
        timeout_seconds=30,
        rate_per_minute=60,
        max_concurrency=2,
        registry=registry,
    )
    async def handler(id: int) -> None: ...

    spec = registry.get("send")
    assert spec is not None
    assert (spec.name, spec.func, spec.args_model, spec.is_async) == ("send", handler, Order, True)
    assert spec.defaults == TaskDefaults("emails", -5, 3, ("a", "b"), 30, 60, 2)
    assert registry.names() == ["send"]
    assert registry.names_of(handler) == ("send",)


def test_the_default_registry_is_used_without_one() -> None:
    @job("test_registry.default")
    def handler() -> None: ...

    assert DEFAULT_HANDLERS.get("test_registry.default") is not None


def test_an_unknown_name_is_none(registry: HandlerRegistry) -> None:
    assert registry.get("nothing") is None


BAD_KEYWORDS: list[tuple[str, dict[str, Any]]] = [
    ("queue", {"queue": ""}),
    ("queue", {"queue": "q" * 129}),
    ("queue", {"queue": 5}),
    ("priority", {"priority": 1.5}),
    ("priority", {"priority": True}),
    ("priority", {"priority": 2**31}),
    ("max_attempts", {"max_attempts": 0}),
    ("max_attempts", {"max_attempts": "3"}),
    ("tags", {"tags": "ab"}),
    ("tags[1]", {"tags": ["a", 1]}),
    ("tags[0]", {"tags": ("a\0",)}),
    ("timeout_seconds", {"timeout_seconds": 0}),
    ("timeout_seconds", {"timeout_seconds": 2.5}),
    ("rate_per_minute", {"rate_per_minute": 0}),
    ("max_concurrency", {"max_concurrency": -1}),
    ("args_model", {"args_model": dict}),
    ("args_model", {"args_model": Order(id=1)}),
]


@pytest.mark.parametrize(("path", "keywords"), BAD_KEYWORDS)
def test_a_bad_keyword_is_refused_by_its_name(registry: HandlerRegistry, path: str, keywords: dict[str, Any]) -> None:
    with pytest.raises(InvalidJobError, match="cannot register task 'send'") as refused:
        job("send", registry=registry, **keywords)(lambda: None)
    assert refused.value.path == path
    assert registry.names() == []


@pytest.mark.parametrize("name", ["", "n" * 129, "a\0b", "\ud800", None, 3])
def test_a_bad_name_is_refused(registry: HandlerRegistry, name: Any) -> None:
    with pytest.raises(InvalidJobError) as refused:
        registry.register(name, print)
    assert refused.value.path == "name"


def test_what_cannot_be_called_is_refused(registry: HandlerRegistry) -> None:
    with pytest.raises(InvalidJobError, match="callable"):
        registry.register("send", "send")  # type: ignore[arg-type]


def test_a_second_function_of_one_name_is_refused_and_both_are_named(registry: HandlerRegistry) -> None:
    def first() -> None: ...

    def second() -> None: ...

    registry.register("send", first)
    with pytest.raises(InvalidJobError, match=r"second.*first"):
        registry.register("send", second)
    spec = registry.get("send")
    assert spec is not None
    assert spec.func is first


def test_two_lambdas_of_one_place_are_two_functions(registry: HandlerRegistry) -> None:
    registry.register("send", lambda: 1)
    with pytest.raises(InvalidJobError):
        registry.register("send", lambda: 2)


def test_a_reloaded_module_registers_again(
    registry: HandlerRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "shop_jobs_of_a_test.py"
    text = "from roost_client import job\ndef setup(r):\n    @job('a', registry=r)\n    def inner(): ...\n"
    source.write_text(text + "def send(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module("shop_jobs_of_a_test")
    registry.register("send", module.send)
    former = module.send
    source.write_text(text + "# the file was edited\ndef send(): return 2\n")
    importlib.reload(module)
    registry.register("send", module.send)

    spec = registry.get("send")
    assert spec is not None
    assert spec.func() == 2
    assert registry.names_of(module.send) == ("send",)
    assert registry.names_of(former) == ()
    module.setup(registry)
    module.setup(registry)
    monkeypatch.delitem(sys.modules, "shop_jobs_of_a_test")


def test_a_function_is_found_through_its_wrapper(registry: HandlerRegistry) -> None:
    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper() -> Any:
            return function()

        return wrapper

    @traced
    @job("send", registry=registry)
    def send() -> None: ...

    assert registry.names_of(send) == ("send",)


def test_a_function_may_have_several_names(registry: HandlerRegistry) -> None:
    def send() -> None: ...

    registry.register("a", send)
    registry.register("b", send)
    assert registry.names_of(send) == ("a", "b")


def test_async_is_known_of_functions_wrappers_and_objects(registry: HandlerRegistry) -> None:
    async def coroutine() -> None: ...

    class Handler:
        async def __call__(self) -> None: ...

    class Blocking:
        def __call__(self) -> None: ...

    handlers: tuple[Callable[..., Any], ...] = (coroutine, functools.partial(coroutine), Handler(), Blocking(), print)
    for i, handler in enumerate(handlers):
        registry.register(str(i), handler)
    specs = [registry.get(str(i)) for i in range(len(handlers))]
    assert [spec.is_async for spec in specs if spec] == [True, True, True, False, False]
