"""What JSON text arguments become, and the path that a refusal names. Needs no database."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import json
import math
import sys
import threading
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, RootModel, computed_field

from roost_client.arguments import MAX_ARGS_BYTES, MAX_DEPTH, object_text
from roost_client.fields import Refused


def nested(levels: int, inner: Any = None) -> Any:
    value = inner
    for _ in range(levels):
        value = [value]
    return value


def doubling(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def circular() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    inner["again"] = [inner]
    return inner


class Point(collections.namedtuple("Point", "x y")):
    pass


class Text(str):
    pass


class Color(enum.Enum):
    RED = 1


class Price(BaseModel):
    price: float


REFUSED: dict[str, tuple[Any, str, str]] = {
    "nan": ({"items": [0, 1, 2, {"price": math.nan}]}, "args.items[3].price", "nan"),
    "infinity": ({"x": math.inf}, "args.x", "inf"),
    "minus infinity": ({"x": [-math.inf]}, "args.x[0]", "-inf"),
    "nan in a tuple": ({"x": (1, math.nan)}, "args.x[1]", "nan"),
    "NUL": ({"a": {"b": "x\0y"}}, "args.a.b", "NUL"),
    "NUL in text that is not ascii": ({"a": "é\0"}, "args.a", "NUL"),
    "NUL in a key": ({"a": {"b\0": 1}}, "args.a", "NUL"),
    "NUL after a text that looks like one": ({"a": "\\u0000", "b": "\0"}, "args.b", "NUL"),
    "lone surrogate": ({"a": ["ok", "\ud800"]}, "args.a[1]", "surrogate"),
    "lone low surrogate": ({"a": "x\udfffy"}, "args.a", "surrogate"),
    "pair of surrogates": ({"a": "\ud83d\ude00"}, "args.a", "surrogate"),
    "surrogate in a key": ({"a": {"\udc00": 1}}, "args.a", "surrogate"),
    "integer key": ({"a": {1: 2}}, "args.a", "key 1"),
    "None key": ({None: 2}, "args", "key None"),
    "bool key": ({"a": [{True: 2}]}, "args.a[0]", "key True"),
    "tuple key": ({"a": {(1, 2): 2}}, "args.a", "not a string"),
    "bytes key": ({b"a": 1}, "args", "not a string"),
    "set": ({"a": {1, 2}}, "args.a", "list"),
    "frozenset": ({"a": frozenset()}, "args.a", "list"),
    "bytes": ({"a": b"x"}, "args.a", "base64"),
    "bytearray": ({"a": bytearray(b"x")}, "args.a", "base64"),
    "datetime": ({"at": datetime.datetime.now(datetime.UTC)}, "args.at", "isoformat"),
    "date": ({"at": datetime.date(2020, 1, 1)}, "args.at", "isoformat"),
    "decimal": ({"price": decimal.Decimal("1.5")}, "args.price", "str"),
    "uuid": ({"id": uuid.UUID(int=0)}, "args.id", "str"),
    "enum": ({"c": Color.RED}, "args.c", "Color"),
    "object": ({"o": object()}, "args.o", "object"),
    "function": ({"f": print}, "args.f", "JSON cannot hold"),
    "generator": ({"g": iter([1])}, "args.g", "JSON cannot hold"),
    "complex": ({"c": 1j}, "args.c", "complex"),
    "model in a dict": ({"m": Price(price=1)}, "args.m", "model_dump"),
    "mapping that is no dict": ({"m": types.MappingProxyType({})}, "args.m", "mappingproxy"),
    "circular": (circular(), "args.again[0]", "itself"),
    "too deep": ({"d": nested(MAX_DEPTH)}, "args.d" + "[0]" * (MAX_DEPTH - 1), "deep"),
    "much too deep": ({"d": nested(100_000)}, "args.d" + "[0]" * (MAX_DEPTH - 1), "deep"),
    "doubling": ({"d": doubling(200)}, "args", "values"),
    "long integer": ({"n": 10**4300}, "args.n", "digits"),
    "long negative integer": ({"n": [-(10**4300)]}, "args.n[0]", "digits"),
    "too large": ({"s": "x" * MAX_ARGS_BYTES}, "args", "1048585 bytes"),
    "too large in utf-8": ({"s": "é" * (MAX_ARGS_BYTES // 2)}, "args", "bytes"),
    "too large once written out": ({"f": [1e300] * 4000}, "args", "bytes"),
    "list": ([1], "args", "JSON object"),
    "string": ('{"a": 1}', "args", "JSON object"),
    "number": (3, "args", "JSON object"),
    "list of pairs": ([("a", 1)], "args", "JSON object"),
    "model with nan": (Price.model_construct(price=math.nan), "args.price", "nan"),
    "model that is no object": (RootModel[list[int]]([1]), "args", "JSON object"),
    "odd key on the way": ({"a b": {"x.y": math.nan}}, "args['a b']['x.y']", "nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_json_cannot_hold_is_refused_by_its_path(name: str) -> None:
    value, path, reason = REFUSED[name]
    with pytest.raises(Refused) as refused:
        object_text("args", value)
    assert refused.value.path == path
    assert reason in refused.value.reason


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": None, "b": True, "c": False, "d": 0, "e": -1, "f": 1.5, "g": "", "h": [], "i": {}},
        {"long": 10**4300 - 1, "short": -(10**4300) + 1},
        {"d": nested(MAX_DEPTH - 1, "bottom")},
        {"s": "x" * (MAX_ARGS_BYTES - len('{"s": ""}'))},
        {"text": '\\u0000 "quoted" \\ / \b\f\n\r\t\x1f \x7f é 😀 \u2028'},
        {"looks like a number": "1e+5", "3e-4-uuid": '\\"2e-3'},
        {"": {"": ""}, "π": 1, "a.b[0]": 2},
        {"shared": [x := [1], x, x]},
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_json_can_hold_is_accepted(value: dict[str, Any]) -> None:
    assert json.loads(object_text("args", value)) == value


def test_subclasses_of_json_types_are_what_they_extend() -> None:
    class Level(enum.IntEnum):
        HIGH = 3

    class Name(enum.StrEnum):
        ANNA = "anna"

    value = {
        Text("key"): Text("text"),
        "level": Level.HIGH,
        "name": Name.ANNA,
        "point": Point(1, 2),
        "ordered": collections.OrderedDict(a=1),
        "tuple": (1, (2,)),
    }
    assert json.loads(object_text("args", value)) == {
        "key": "text",
        "level": 3,
        "name": "anna",
        "point": [1, 2],
        "ordered": {"a": 1},
        "tuple": [1, [2]],
    }


def test_a_float_stays_a_float_without_an_exponent() -> None:
    value = {"f": [1e23, -1e23, 1e16, 1.7976931348623157e308, 5e-324, -1.5e-7, 0.1, -0.0, 123456789.0]}
    text = object_text("args", value)
    assert "e" not in text
    back = json.loads(text)["f"]
    assert back == value["f"]
    assert all(type(number) is float for number in back)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=20,
)


def has_fault(value: Any) -> bool:
    match value:
        case float():
            return not math.isfinite(value)
        case str():
            return "\0" in value or any("\ud800" <= character <= "\udfff" for character in value)
        case dict():
            return any(has_fault(key) or has_fault(child) for key, child in value.items())
        case list():
            return any(map(has_fault, value))
    return False


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values))
def test_any_json_is_accepted_and_read_back_equal_or_refused_with_a_path(value: dict[str, Any]) -> None:
    if has_fault(value):
        with pytest.raises(Refused) as refused:
            object_text("args", value)
        assert refused.value.path.startswith("args")
    else:
        assert json.loads(object_text("args", value)) == value


def test_values_are_refused_also_when_python_would_write_longer_integers() -> None:
    @contextmanager
    def digits(limit: int) -> Iterator[None]:
        former = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(limit)
        try:
            yield
        finally:
            sys.set_int_max_str_digits(former)

    for limit in (0, 10_000):
        with digits(limit):
            with pytest.raises(Refused, match="digits"):
                object_text("args", {"n": 10**5000})
            object_text("args", {"n": 10**4299, "s": "1" * 5000})
    with digits(1000), pytest.raises(Refused, match="written as JSON"):
        object_text("args", {"n": 10**2000})


def test_a_stack_that_is_nearly_used_up_makes_a_refusal_not_a_recursion_error() -> None:
    def deep(levels: int) -> Exception | None:
        if levels:
            return deep(levels - 1)
        try:
            object_text("args", {"d": nested(MAX_DEPTH - 1)})
        except Refused as refused:
            return refused
        return None

    found: list[Exception | None] = []
    # In a thread of its own, so that the test runner's frames don't count.
    thread = threading.Thread(target=lambda: found.append(deep(sys.getrecursionlimit() - 200)))
    thread.start()
    thread.join()
    assert found == [None] or isinstance(found[0], Refused)  # newer Pythons count C's frames apart


class Order(BaseModel):
    id: uuid.UUID
    at: datetime.datetime
    items: list[Price] = []


ORDER = Order(
    id=uuid.UUID(int=5), at=datetime.datetime(2030, 1, 2, 3, 4, 5, 6, datetime.UTC), items=[Price(price=1e30)]
)


def test_a_model_is_dumped_so_that_it_can_be_validated_again() -> None:
    for args_model in (None, Order):
        text = object_text("args", ORDER, args_model)
        assert Order.model_validate_json(text) == ORDER


def test_a_dict_is_validated_and_stored_as_it_is() -> None:
    value = {"id": str(uuid.UUID(int=5)), "at": "2030-01-02T03:04:05Z"}
    assert json.loads(object_text("args", value, Order)) == value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({}, "args.id"),
        ({"id": "x", "at": "2030-01-02T03:04:05Z"}, "args.id"),
        (
            {"id": str(uuid.UUID(int=5)), "at": "2030-01-02T03:04:05Z", "items": [{"price": 1}, {}]},
            "args.items[1].price",
        ),
        (Price(price=1), "args.id"),
        (ORDER.model_copy(update={"items": [Price.model_construct(price="much")]}), "args.items[0].price"),
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_does_not_fit_the_model_is_refused_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(Refused, match="does not fit Order") as refused:
        object_text("args", value, Order)
    assert refused.value.path == path


def test_a_model_that_takes_only_aliases_is_dumped_with_them() -> None:
    class Aliased(BaseModel):
        order_id: int = Field(alias="orderId")

    assert json.loads(object_text("args", Aliased(orderId=3), Aliased)) == {"orderId": 3}
    assert json.loads(object_text("args", Aliased(orderId=3))) == {"order_id": 3}


def test_a_model_with_a_computed_field_that_forbids_others_is_dumped_without_it() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        id: uuid.UUID

        @computed_field
        def short(self) -> str:
            return str(self.id)[:8]

    value = Strict(id=uuid.UUID(int=5))
    assert Strict.model_validate_json(object_text("args", value, Strict)) == value


def test_a_model_that_cannot_be_dumped_is_refused() -> None:
    class Odd(BaseModel):
        model_config = ConfigDict(arbitrary_types_allowed=True)
        thing: object

    with pytest.raises(Refused, match="cannot be written as JSON") as refused:
        object_text("args", Odd(thing=object()))
    assert refused.value.path == "args"


def test_a_model_that_holds_itself_is_refused() -> None:
    class Node(BaseModel):
        next: Any = None

    node = Node()
    node.next = node
    with pytest.raises(Refused, match="cannot be written as JSON"):
        object_text("args", node)
