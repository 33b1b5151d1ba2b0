"""When a pool looks for jobs of throttled tasks."""

from __future__ import annotations

import math
from typing import Any

from roostd.core.throttle import LOOK_SECONDS, OUTRANKED_SECONDS, Looks

POLL = 1.0


def new() -> Looks:
    looks = Looks()
    looks.limits = True
    return looks


def looked(looks: Looks, got: int = 0, *, now: float = 100.0, **answer: Any) -> float:
    """Takes in a look that was asked for a moment ago; the seconds to the next."""
    given: dict[str, Any] = {"more": False, "next_in_seconds": None, "gets_hints": True}
    looks.looked(got, **given | answer, asked_at=now - 0.001, now=now, poll_interval=POLL)
    return round(max(0.0, looks.look_at - now), 6)


def test_without_limits_it_never_looks_whatever_hints_come() -> None:
    looks = Looks()
    looks.hinted(100.0)
    assert looks.look_at == math.inf
    looks.limits = True
    assert looks.look_at == 0


def test_a_claim_that_meets_a_throttled_job_tells_of_limits() -> None:
    looks = Looks()
    looks.met(100.0)
    assert looks.look_at == 0


def test_a_hint_has_it_look_at_once_also_one_that_came_during_a_look() -> None:
    looks = new()
    assert looked(looks) == POLL
    looks.hinted(100.5)
    assert looks.look_at == 0
    assert looked(looks, now=100.5) == 0
    assert looked(looks, now=100.6) == POLL


def test_what_is_left_for_want_of_children_is_taken_as_soon_as_there_are() -> None:
    assert looked(new(), 3, more=True) == 0


def test_what_is_left_because_others_come_first_is_not_asked_for_in_every_claim() -> None:
    assert looked(new(), 0, more=True) == OUTRANKED_SECONDS


def test_it_looks_when_time_makes_room_but_never_later_than_the_next_poll() -> None:
    assert looked(new(), 2, next_in_seconds=0.25) == 0.25
    assert looked(new(), 2, next_in_seconds=30.0) == POLL
    assert looked(new(), next_in_seconds=-0.5) == 0


def test_without_hints_it_looks_more_often() -> None:
    assert looked(new(), gets_hints=False) == LOOK_SECONDS
    assert looked(new(), gets_hints=False, next_in_seconds=0.02) == 0.02
