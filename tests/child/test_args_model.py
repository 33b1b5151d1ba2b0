"""What a handler with an `args_model` is called with."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from roost_client import HandlerRegistry
from roost_client.registry import HandlerSpec
from roostd.child.invoke import _bound_call


class Parcel(BaseModel):
    model_config = ConfigDict(strict=True)
    number: uuid.UUID
    weight: float


ARGS: dict[str, Any] = {"number": "7d9b3a5e-6c0f-4f55-9a57-0a5d5a4a2a11", "weight": 1.5}


def spec_of(func: Any) -> HandlerSpec:
    registry = HandlerRegistry()
    registry.register("parcel", func, args_model=Parcel)
    spec = registry.get("parcel")
    assert spec is not None
    return spec


def test_a_handler_with_one_parameter_of_the_model_gets_the_model() -> None:
    def handler(parcel: Parcel) -> Any:
        return parcel

    handler.__annotations__["parcel"] = Parcel
    assert _bound_call(spec_of(handler), ARGS) == Parcel(number=uuid.UUID(ARGS["number"]), weight=1.5)


def test_any_other_handler_gets_the_model_s_values_by_name_also_of_a_strict_one() -> None:
    def handler(number: uuid.UUID, weight: float) -> Any:
        return number, weight

    assert _bound_call(spec_of(handler), ARGS) == (uuid.UUID(ARGS["number"]), 1.5)


def test_what_is_known_of_a_task_that_is_gone_is_not_believed_of_another() -> None:
    for _ in range(20):  # where a spec was, the next one comes to be
        test_a_handler_with_one_parameter_of_the_model_gets_the_model()
        test_any_other_handler_gets_the_model_s_values_by_name_also_of_a_strict_one()


def test_what_does_not_fit_the_model_never_reaches_the_handler() -> None:
    def handler(**values: Any) -> Any:
        raise AssertionError(values)

    with pytest.raises(ValidationError, match="weight"):
        _bound_call(spec_of(handler), ARGS | {"weight": "heavy"})
