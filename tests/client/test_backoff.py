"""The delays before the next attempt: exact without jitter, never above the cap, no overflow, repeatable."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roost_client import exponential, fixed, linear
from roost_client.backoff import JITTER, BackoffStrategy, resolve


def test_exponential_doubles_up_to_a_day() -> None:
    strategy = exponential(jitter=False)
    assert [strategy(attempt) for attempt in (1, 2, 3, 4, 16)] == [2, 4, 8, 16, 65536]
    assert strategy(17) == strategy(10_000) == 86400


def test_linear_and_fixed_are_what_they_say() -> None:
    assert [linear(5)(attempt) for attempt in (1, 2, 10_000)] == [5, 10, 50_000]
    assert linear(5, cap=60)(10_000) == 60
    assert [fixed(3)(attempt) for attempt in (1, 10_000)] == [3, 3]


@settings(deadline=None)
@given(
    attempt=st.integers(0, 10**6),
    base=st.floats(0, 1e6),
    cap=st.floats(0, 1e9),
)
def test_no_delay_is_above_the_cap_or_less_than_the_jitter_allows(attempt: int, base: float, cap: float) -> None:
    exact = exponential(base, jitter=False, cap=cap)(attempt)
    jittered = exponential(base, cap=cap)(attempt)
    assert math.isfinite(exact)
    assert exact * (1 - JITTER) <= jittered <= exact <= cap


def test_jobs_at_the_cap_are_spread_too() -> None:
    assert len({exponential()(100) for _ in range(50)}) > 40


def test_a_seeded_strategy_repeats() -> None:
    def delays(seed: int) -> list[float]:
        strategy = dataclasses.replace(exponential(), random01=random.Random(seed).random)
        return [strategy(attempt) for attempt in range(1, 20)]

    assert delays(7) == delays(7) != delays(8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_a_strategy_of_no_sensible_time_is_refused(value: float) -> None:
    for make in (exponential, linear, fixed, lambda cap: exponential(cap=cap), lambda cap: linear(cap=cap)):
        with pytest.raises(ValueError):
            make(value)


@pytest.mark.parametrize("value", [True, "2", None])
def test_a_strategy_of_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        fixed(value)  # type: ignore[arg-type]


def test_resolve_takes_any_callable_and_defaults_to_exponential() -> None:
    def mine(attempt: int) -> float:
        return 1.0

    strategy: BackoffStrategy = mine
    assert resolve(strategy) is mine
    assert resolve(None) == exponential()
    with pytest.raises(TypeError):
        resolve("exponential")  # type: ignore[arg-type]
