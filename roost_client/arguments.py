"""Turns a job's arguments into JSON text that PostgreSQL stores and Python reads back equal, or says what is wrong.

The text is what jsonb gives back, but for the order of keys: spaces after ',' and ':', no exponents. So a
size checked here is the size the database sees, and a float stays a float. The common case costs two passes
in C and one short loop; only what looks suspicious is walked value by value, which finds the path to name.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ValidationError

from .fields import MAX_INTEGER_DIGITS, Refused, shown, text

MAX_ARGS_BYTES = 1_048_576  # of UTF-8; the database holds the same bound
MAX_DEPTH = 500  # levels of nesting; Python's own reader gives up at about 1000

_MAX_VALUES = MAX_ARGS_BYTES // 3  # the shortest is a digit and ", "
_SCALARS = frozenset((str, int, float, bool, type(None)))
_CONTAINERS = frozenset((dict, list, tuple))
_INTEGER_BOUND = 10**MAX_INTEGER_DIGITS
_NUMBER_WITH_EXPONENT = re.compile(r'("(?:[^"\\]++|\\.)*+")|-?[0-9][0-9.]*+e[+-][0-9]++', re.DOTALL)
_HINTS = {
    "bytes": "decode it, or encode it as base64",
    "bytearray": "decode it, or encode it as base64",
    "set": "use a list",
    "frozenset": "use a list",
    "datetime": "use .isoformat(), or pass args as a pydantic model",
    "date": "use .isoformat(), or pass args as a pydantic model",
    "time": "use .isoformat(), or pass args as a pydantic model",
    "UUID": "use str(), or pass args as a pydantic model",
    "Decimal": "use str(), or pass args as a pydantic model",
}

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode


def object_text(path: str, value: object, args_model: type[BaseModel] | None = None) -> str:
    """Return the JSON text of a dict or pydantic model. Raises Refused, which names the path of the offending value.

    With `args_model` the text is also validated, as it will be before the job runs.
    """
    if not isinstance(value, BaseModel):
        encoded = _dict_text(path, value)
        return encoded if args_model is None else _valid(path, encoded, args_model)
    if args_model is None:
        return _dict_text(path, _dumped(path, value))
    try:
        return _valid(path, _dict_text(path, _dumped(path, value, round_trip=True)), args_model)
    except Refused:
        # A model whose fields have aliases may accept only these.
        try:
            return _valid(path, _dict_text(path, _dumped(path, value, round_trip=True, by_alias=True)), args_model)
        except Refused:
            pass
        raise


def _dict_text(path: str, value: object) -> str:
    if not isinstance(value, dict):
        raise Refused(path, f"must be a JSON object (a dict or a pydantic model), not {shown(value)}")
    if not _is_plain(value):
        _refuse_first_fault(path, value)
    try:
        encoded = _encode(value)
    except (TypeError, ValueError) as error:
        _refuse_first_fault(path, value)
        raise Refused(path, f"cannot be written as JSON: {error}") from None
    except RecursionError:
        raise Refused(path, "is nested too deeply for what is left of Python's stack") from None

    if "e-" in encoded or "e+" in encoded:
        encoded = _NUMBER_WITH_EXPONENT.sub(_without_exponent, encoded)
    if encoded.isascii():
        size_bytes = len(encoded)
    else:
        try:
            size_bytes = len(encoded.encode())
        except UnicodeEncodeError:
            _refuse_first_fault(path, value)
            raise
    if size_bytes > MAX_ARGS_BYTES:
        raise _too_large(path, f"takes {size_bytes} bytes as JSON")
    if "\\u0000" in encoded:  # a NUL, or a backslash before the text u0000
        _refuse_first_fault(path, value)
    if len(encoded) > MAX_INTEGER_DIGITS and not 0 < sys.get_int_max_str_digits() <= MAX_INTEGER_DIGITS:
        _refuse_first_fault(path, value)
    return encoded


def _is_plain(root: dict[Any, Any]) -> bool:
    """Whether there are but exact JSON types, string keys, and a nesting in bounds. False: look closer."""
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for node in level:
            if type(node) is dict:
                for key in node:
                    if type(key) is not str:
                        return False
                node = node.values()
            for value in node:
                kind = type(value)
                if kind in _SCALARS:
                    continue
                if kind not in _CONTAINERS:
                    return False
                deeper.append(value)
        if not deeper:
            return True
        # One list held in two places of another, and so on, doubles with each level.
        if len(deeper) > _MAX_VALUES:
            return False
        level = deeper
    return False


def _refuse_first_fault(path: str, root: dict[Any, Any]) -> None:
    """Walk all values in order; raise Refused at the first that cannot be sent, return if all can."""
    walks = [_children(path, root)]
    ids = [id(root)]
    seen = 0
    while walks:
        for child_path, child in walks[-1]:
            seen += 1
            if seen > _MAX_VALUES:
                raise _too_large(path, f"has more than {_MAX_VALUES} values")
            if isinstance(child, (dict, list, tuple)):
                if id(child) in ids:
                    raise Refused(child_path, "contains itself")
                if len(walks) == MAX_DEPTH:
                    raise Refused(child_path, f"is nested more than {MAX_DEPTH} levels deep")
                walks.append(_children(child_path, child))
                ids.append(id(child))
                break
            _check_scalar(child_path, child)
        else:
            walks.pop()
            ids.pop()


def _children(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield from ((f"{path}[{i}]", child) for i, child in enumerate(node))
        return
    for key, child in node.items():
        if not isinstance(key, str):
            raise Refused(path, f"has the key {shown(key)}, which is not a string")
        try:
            text(path, key)
        except Refused as refused:
            raise Refused(path, f"has a key that {refused.reason}") from None
        yield (f"{path}.{key}" if key.isidentifier() else f"{path}[{shown(key)}]"), child


def _check_scalar(path: str, value: object) -> None:
    if isinstance(value, str):
        text(path, value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise Refused(path, f"is {float(value)}, which JSON cannot hold")
    elif isinstance(value, int):
        if not -_INTEGER_BOUND < value < _INTEGER_BOUND:
            raise Refused(path, f"is an integer of more than {MAX_INTEGER_DIGITS} digits: use a string")
    elif value is not None:
        kind = type(value).__name__
        hint = "use .model_dump(mode='json')" if isinstance(value, BaseModel) else _HINTS.get(kind)
        raise Refused(path, f"is a {kind}, which JSON cannot hold" + (f": {hint}" if hint else ""))


def _without_exponent(match: re.Match[str]) -> str:
    if match[1] is not None:
        return match[1]
    digits = format(Decimal(match[0]), "f")
    return digits if "." in digits else digits + ".0"


def _too_large(path: str, what: str) -> Refused:
    return Refused(
        path, f"{what}, too much for max_args_bytes={MAX_ARGS_BYTES}: store the data elsewhere and pass a reference"
    )


def _dumped(path: str, model: BaseModel, *, round_trip: bool = False, by_alias: bool | None = None) -> Any:
    options: dict[str, Any] = {} if by_alias is None else {"by_alias": by_alias}
    try:
        return model.model_dump(mode="json", round_trip=round_trip, **options)
    except (ValueError, RecursionError) as error:  # no serializer for a type, or it contains itself
        raise Refused(path, f"cannot be written as JSON: {error}") from None


def _valid(path: str, encoded: str, args_model: type[BaseModel]) -> str:
    try:
        args_model.model_validate_json(encoded)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        where = path
        for step in faults[0]["loc"]:
            where += f"[{step}]" if isinstance(step, int) else f".{step}"
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise Refused(where, f"does not fit {args_model.__name__}: {faults[0]['msg']}{more}") from None
    return encoded
