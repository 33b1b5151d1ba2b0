"""What a task takes, as JSON Schema: from its args_model, or else from its handler's signature.

Runs where the handlers are imported, and nowhere else. What can't be said of a parameter is not said: its schema is {},
which allows anything, as the handler's call does.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import to_jsonable_python

from roost_client import HandlerRegistry, HandlerSpec

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def describe_tasks(registry: HandlerRegistry) -> list[dict[str, Any]]:
    """Of each task its name, the handler and its docstring, what @job declares, and the schema of its arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types that are half understood: the schema says what is known
        return [_describe(spec) for name in registry.names() if (spec := registry.get(name)) is not None]


def _describe(spec: HandlerSpec) -> dict[str, Any]:
    declared = {name: value for name, value in dataclasses.asdict(spec.defaults).items() if value is not None}
    func = inspect.unwrap(spec.func)
    module, name = getattr(func, "__module__", None), getattr(func, "__qualname__", None)
    return {
        "name": spec.name,
        "handler": f"{module}.{name}" if name else type(func).__qualname__,
        "description": inspect.getdoc(func) if name else None,
        "defaults": declared,
        "schema": {"$schema": _DIALECT, **_schema(spec)},
    }


def _schema(spec: HandlerSpec) -> dict[str, Any]:
    if spec.args_model is not None:
        return _schema_of_model(spec.args_model)
    return {"title": spec.name, "type": "object", **_schema_of_signature(spec.func)}


def _schema_of_model(model: type[BaseModel]) -> dict[str, Any]:
    try:
        schema = model.model_json_schema()
        json.dumps(schema)
    except Exception:  # a field of a type that JSON has no word for
        return {"title": model.__name__, "type": "object"}
    return schema


def _schema_of_signature(func: Callable[..., Any]) -> dict[str, Any]:
    try:
        signature = _signature(func)
    except (TypeError, ValueError, NameError):  # not every callable has one
        return {}
    named, others = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            named.append(parameter)
    adapters = {each.name: _adapter(each.annotation, func) for each in named}
    schemas, definitions = _schemas({name: adapter for name, adapter in adapters.items() if adapter is not None})
    properties = {each.name: {**schemas.get(each.name, {}), **_default(each.default)} for each in named}
    required = [each.name for each in named if each.default is each.empty]
    return {
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": others,
        **({"$defs": definitions} if definitions else {}),
    }


def _signature(func: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Where one annotation names what does not exist at run time, the others are worth having.
        return inspect.signature(func, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(func)


def _adapter(annotation: Any, func: Callable[..., Any]) -> TypeAdapter[Any] | None:
    """What knows the schema of an annotation; None where there is none to be had."""
    if annotation is inspect.Parameter.empty:
        return None
    try:
        if isinstance(annotation, str):
            # As inspect and pydantic do with it: it is code of the module that has just been imported.
            annotation = eval(annotation, getattr(inspect.unwrap(func), "__globals__", {}))
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        json.dumps(adapter.json_schema())
    except Exception:
        return None
    return adapter


def _schemas(adapters: dict[str, TypeAdapter[Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of each, and the definitions that they share: made together, so that no two of these have one name."""
    by_key, joint = TypeAdapter.json_schemas([(name, "validation", adapter) for name, adapter in adapters.items()])
    return {name: dict(schema) for (name, _), schema in by_key.items()}, dict(joint.get("$defs", {}))


def _default(value: Any) -> dict[str, Any]:
    if value is inspect.Parameter.empty:
        return {}
    try:
        plain = to_jsonable_python(value)
        json.dumps(plain, allow_nan=False)
    except Exception:
        return {}
    return {"default": plain}
