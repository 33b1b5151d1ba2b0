"""Which generation is in charge, in whatever order reloads are asked for, succeed and fail."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from roostd.core.generations import Generations


def test_the_first_generation_takes_over_when_it_is_ready() -> None:
    generations = Generations()
    assert generations.current == 0
    assert generations.request() == 1
    assert (generations.current, generations.candidate) == (0, 1)
    assert generations.ready(1)
    assert (generations.current, generations.candidate) == (1, None)


def test_a_candidate_that_fails_changes_nothing_and_its_number_is_not_used_again() -> None:
    generations = Generations()
    generations.request()
    generations.ready(1)
    assert generations.request() == 2
    assert generations.failed(2)
    assert (generations.current, generations.candidate) == (1, None)
    assert generations.request() == 3


def test_requests_during_a_reload_lead_to_one_more() -> None:
    generations = Generations()
    generations.request()
    assert [generations.request() for _ in range(20)] == [None] * 20
    assert generations.ready(1)
    assert generations.wants_another()
    assert not generations.wants_another()


def test_requests_during_a_reload_that_fails_lead_to_one_more_too() -> None:
    generations = Generations()
    generations.request()
    generations.request()
    assert generations.failed(1)
    assert generations.wants_another()


def test_a_reload_that_nobody_interrupts_leads_to_no_other() -> None:
    generations = Generations()
    generations.request()
    generations.ready(1)
    assert not generations.wants_another()


def test_what_is_no_longer_the_candidate_is_not_listened_to() -> None:
    generations = Generations()
    generations.request()
    generations.failed(1)
    generations.request()
    assert not generations.ready(1)
    assert not generations.failed(1)
    assert (generations.current, generations.candidate) == (0, 2)
    generations.ready(2)
    assert not generations.ready(2)
    assert not generations.failed(2), "the one in charge can't fail as a candidate"
    assert generations.current == 2


@given(st.lists(st.tuples(st.sampled_from(["request", "ready", "failed"]), st.integers(0, 8)), max_size=60))
def test_the_numbers_only_grow_and_one_candidate_is_under_way_at_most(steps: list[tuple[str, int]]) -> None:
    generations = Generations()
    started: list[int] = []
    for step, number in steps:
        before = generations.current
        if step == "request":
            had = generations.candidate
            candidate = generations.request()
            assert (candidate is None) == (had is not None)
            if candidate is not None:
                started.append(candidate)
        else:
            getattr(generations, step)(number)
        assert generations.current >= before
        assert generations.current in (0, *started)
        assert generations.candidate in (None, *started[-1:])
    assert started == sorted(set(started))
