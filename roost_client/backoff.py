"""How long a failed job waits before its next attempt. Pure values: no clock, and the random numbers can be given."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

JITTER = 0.1  # of the delay, taken off: so the cap holds and jobs at the cap spread out too; a tenth, as in Oban


class BackoffStrategy(Protocol):
    """Maps an attempt number (1-indexed) to seconds until the next attempt."""

    def __call__(self, attempt: int, /) -> float: ...


@dataclass(frozen=True, slots=True)
class Exponential:
    """`base ** attempt` seconds. `random01` gives numbers in [0, 1); a simulation passes a seeded one."""

    base: float
    jitter: bool
    cap: float
    random01: Callable[[], float] = random.random

    def __call__(self, attempt: int, /) -> float:
        try:
            delay = min(self.base**attempt, self.cap)
        except OverflowError:
            delay = self.cap
        return delay * (1 - JITTER * self.random01()) if self.jitter else delay


@dataclass(frozen=True, slots=True)
class Linear:
    """`step * attempt` seconds."""

    step: float
    cap: float

    def __call__(self, attempt: int, /) -> float:
        return min(self.step * attempt, self.cap)


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same number of seconds each time."""

    delay: float

    def __call__(self, attempt: int, /) -> float:
        return self.delay


def exponential(base: float = 2.0, *, jitter: bool = True, cap: float = 86400) -> Exponential:
    """Wait `base ** attempt` seconds, at most `cap`: 2, 4, 8, 16, … up to a day, as Oban does.

    With `jitter` up to a tenth is taken off at random, so that jobs that failed together don't come back
    together.
    """
    return Exponential(_seconds("base", base), jitter, _seconds("cap", cap))


def linear(step: float = 10.0, *, cap: float = 86400) -> Linear:
    """Wait `step * attempt` seconds, at most `cap`."""
    return Linear(_seconds("step", step), _seconds("cap", cap))


def fixed(delay: float = 60.0) -> Fixed:
    """Wait `delay` seconds before every attempt."""
    return Fixed(_seconds("delay", delay))


def resolve(strategy: BackoffStrategy | None) -> BackoffStrategy:
    """Return the strategy, `exponential()` for None. Raises TypeError for what can't be called."""
    if strategy is None:
        return exponential()
    if not callable(strategy):
        raise TypeError(f"cannot use {strategy!r} as retry strategy: it must be callable with the attempt number")
    return strategy


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"cannot use {name}={value!r}: must be a number")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"cannot use {name}={value!r}: must be finite and not negative")
    return float(value)
