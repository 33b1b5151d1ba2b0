"""What a child reports of a job, however its handler ends; and that the next job does not notice."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from roostd.child.running import ERROR_CHARACTERS, TRACE_CHARACTERS
from roostd.wire.frames import FrameKind
from tests.child.conftest import Child, Outcome, Template

MakeChild = Callable[..., Child]
SETTING_BYTES = 1 << 20  # max_result_bytes in conftest


@pytest.fixture(scope="module")
def holder() -> Iterator[list[Child]]:
    children: list[Child] = []
    yield children
    for child in children:
        child.close()


@pytest.fixture
def shared(forge: Template, holder: list[Child]) -> Iterator[Child]:
    """One child for the jobs that must not hurt it, nor be noticed by those after them. Another where one was hurt."""
    if not holder or not holder[-1].is_alive():
        holder.append(forge.child())
    child = holder[-1]
    yield child
    assert child.result("pid") == child.pid


def assert_fits_the_database(outcome: Outcome) -> None:
    for text in (outcome.error, outcome.trace):
        assert "\x00" not in text
        text.encode()


# -- completed


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1.5, "", "grüße 🦉", "\\u0000", [], {}, {"a": [1, {"b": None}]}, 2**80, "x" * 500_000],
)
def test_a_result_arrives_as_the_handler_returned_it(shared: Child, value: Any) -> None:
    assert shared.result("echo", value=value) == value


@pytest.mark.parametrize("value", [None, 7, "text"])
def test_a_coroutine_s_result_arrives_too(shared: Child, value: Any) -> None:
    assert shared.result("echo_in_coroutine", value=value) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("model", {"text": "grüße"}),
        ("models in a list", [{"text": "a"}, {"b": {"text": "b"}}]),
        ("tuple", [1, 2]),
        ("int keys", {"1": "a", "null": "b"}),
        ("text that says NUL", "\\u0000"),
    ],
)
def test_what_has_a_json_form_is_kept_in_it(shared: Child, kind: str, value: Any) -> None:
    assert shared.result("give", kind=kind) == value


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("object", "a object is no JSON value"),
        ("set", "a set is no JSON value"),
        ("bytes", "a bytes is no JSON value"),
        ("tuple keys", "keys must be str"),
        ("NaN", "not JSON compliant"),
        ("inf", "not JSON compliant"),
        ("surrogate", "lone surrogate"),
        ("surrogate key", "lone surrogate"),
        ("NUL", "NUL character"),
        ("nested", "nested too deeply"),
        ("circular", "Circular reference"),
        ("a number of many digits", "digits"),
        ("generator", "a generator is no JSON value"),
        ("async generator", "a async_generator is no JSON value"),
        ("coroutine", "declare it with `async def`"),
        ("awaitable", "declare it with `async def`"),
    ],
)
def test_a_result_that_can_t_be_kept_fails_its_job(shared: Child, kind: str, reason: str) -> None:
    outcome = shared.failure("give", kind=kind)
    assert reason in outcome.error
    assert_fits_the_database(outcome)


def test_a_result_may_have_as_many_bytes_as_allowed_and_no_more(shared: Child) -> None:
    assert len(shared.result("give_bytes", size=SETTING_BYTES - 2)) == SETTING_BYTES - 2
    error = shared.failure("give_bytes", size=SETTING_BYTES - 1).error
    assert f"{SETTING_BYTES + 1} bytes" in error
    assert "max_result_bytes" in error


# -- failed


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("ValueError", "ValueError: it is no good"),
        ("SystemExit", "SystemExit: 0"),
        ("KeyboardInterrupt", "KeyboardInterrupt: "),
        ("GeneratorExit", "GeneratorExit: "),
        ("CancelledError", "CancelledError: "),
        ("MemoryError", "MemoryError: "),
        ("Mine", "Mine: of a class of its own"),
        ("TimeoutError", "TimeoutError: of the handler's own"),
        ("ExceptionGroup", "ExceptionGroup: many (2 sub-exceptions)"),
        ("Unprintable", "Unprintable: <its str() raised RuntimeError>"),
        ("Exiting", "Exiting: <its str() raised SystemExit>"),
        ("NoText", "NoText: <its str() raised TypeError>"),
        ("NUL and surrogate", "Exception: a \\x00 and a \\udcff"),
    ],
)
def test_whatever_is_raised_is_that_job_s_failure(shared: Child, kind: str, error: str) -> None:
    outcome = shared.failure("fail", kind=kind)
    assert outcome.error == error
    assert_fits_the_database(outcome)


@pytest.mark.parametrize("kind", ["Sly", "WithoutName", "odd name", "a long chain", "notes", "odd snooze"])
def test_an_error_that_resists_its_description_is_a_failure_all_the_same(shared: Child, kind: str) -> None:
    outcome = shared.failure("fail", kind=kind)
    assert outcome.error
    assert_fits_the_database(outcome)


def test_the_trace_shows_the_handler_and_nothing_of_ours(shared: Child) -> None:
    trace = shared.failure("fail", kind="ValueError").trace
    assert trace.startswith("Traceback (most recent call last):")
    assert "handlers.py" in trace
    assert "raise ERRORS[kind]()" in trace
    assert "roostd" not in trace


def test_a_long_text_is_cut_in_its_middle(shared: Child) -> None:
    outcome = shared.failure("fail", kind="ten million characters")
    assert len(outcome.error) < ERROR_CHARACTERS + 100
    assert len(outcome.trace) < TRACE_CHARACTERS + 100
    assert outcome.error.startswith("Exception: xxx")
    assert outcome.error.endswith("xxx")
    assert "characters left out" in outcome.error


def test_endless_recursion_fails_with_the_last_frames(shared: Child) -> None:
    outcome = shared.failure("recurse")
    assert outcome.error.startswith("RecursionError: ")
    assert outcome.trace.count("in recurse") <= 60


def test_an_unknown_task_is_named(shared: Child) -> None:
    outcome = shared.failure("no_such_task")
    assert outcome.error.startswith("UnknownTaskError: ")
    assert "'no_such_task'" in outcome.error


@pytest.mark.parametrize("task", ["snooze", "snooze_later"])
@pytest.mark.parametrize("seconds", [0, 0.25, 3_155_760_000])
def test_a_snooze_says_for_how_long(shared: Child, task: str, seconds: float) -> None:
    outcome = shared.run(task, seconds=seconds)
    assert (outcome.kind, outcome.body) == (FrameKind.SNOOZED, {"seconds": seconds})


@pytest.mark.parametrize("seconds", [-1, 1e300])
def test_a_snooze_for_an_impossible_time_is_a_failure(shared: Child, seconds: float) -> None:
    assert shared.failure("snooze", seconds=seconds).error.startswith("ValueError: cannot snooze")


# -- arguments


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ('{"wrong": 1}', "unexpected keyword argument 'wrong'"),
        ("{}", "missing 1 required positional argument: 'value'"),
        ('{"value": 1, "more": 2}', "unexpected keyword argument 'more'"),
        ('{"value": 1e5000}', "the number 1e5000 is beyond a Python float"),
        ('{"value": -1e5000}', "the number -1e5000 is beyond a Python float"),
        ('{"value": ' + "[" * 5_000 + "]" * 5_000 + "}", "nested too deeply"),
        ('{"value": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}", "nested too deeply"),
        ('{"value": ' + "1" * 5_000 + "}", "digits"),
        ("[1]", "a JSON object is due, not list"),
        ("null", "a JSON object is due, not NoneType"),
        ("", "cannot decode args"),
        ('{"value"', "cannot decode args"),
    ],
    ids=lambda value: value[:30],
)
def test_arguments_that_python_or_the_handler_can_t_take_fail_their_job(shared: Child, args: str, reason: str) -> None:
    shared.start_raw("one_argument", args)
    outcome = shared.outcome()
    assert outcome.kind is FrameKind.FAILED
    assert reason in outcome.error
    assert_fits_the_database(outcome)


def test_arguments_of_any_size_arrive(shared: Child) -> None:
    for size in (10, 2_030, 2_048, 100_000, 900_000):
        value = "ü" * (size // 2)
        shared.start_raw("echo", json.dumps({"value": value}, ensure_ascii=False))
        assert shared.outcome().body == value


@pytest.mark.parametrize(
    ("task", "args", "result"),
    [
        ("takes_model", {"weight": 1.5}, ["Parcel", 1.5, "none"]),
        ("takes_dotted", {"weight": 1.5, "label": "a"}, ["Parcel", 1.5, "a"]),
        ("takes_fields", {"weight": 1.5}, [1.5, "none"]),
        ("takes_fields", {"weight": "1.5", "label": "a"}, [1.5, "a"]),
    ],
)
def test_a_model_of_the_arguments_is_passed_as_the_handler_takes_it(
    shared: Child, task: str, args: dict[str, Any], result: Any
) -> None:
    assert shared.result(task, **args) == result


@pytest.mark.parametrize("task", ["takes_model", "takes_fields"])
def test_arguments_that_the_model_refuses_fail_their_job(shared: Child, task: str) -> None:
    error = shared.failure(task, weight="heavy").error
    assert error.startswith("ValidationError: ")
    assert "weight" in error


# -- one after the other


def test_jobs_end_in_the_order_in_which_they_came(shared: Child) -> None:
    leases = [shared.start("echo", value=number) for number in range(64)]
    outcomes = [shared.outcome() for _ in leases]
    assert [outcome.lease for outcome in outcomes] == leases
    assert [outcome.body for outcome in outcomes] == list(range(64))


def test_an_outcome_is_sent_before_the_next_job_is_read(make_child: MakeChild) -> None:
    """What was read and not reported is what a dying child takes with it: never more than one job."""
    child = make_child()
    done = child.start("echo", value=1)
    dying = child.start("kill_itself")
    behind = [child.start("echo", value=number) for number in range(5)]
    assert child.outcome().lease == done
    assert child.exit_status() == -9
    assert child.process.take_back() == behind
    assert dying not in behind


# -- a time by which to start


@pytest.mark.parametrize(
    ("seconds", "kind"), [(-0.001, FrameKind.INTERRUPTED), (60, FrameKind.COMPLETED), (math.inf, FrameKind.COMPLETED)]
)
def test_a_job_that_comes_too_late_is_not_started(shared: Child, seconds: float, kind: FrameKind) -> None:
    start_by = time.clock_gettime(time.CLOCK_BOOTTIME) + seconds
    shared.start_raw("echo", '{"value": 1}', start_by=start_by)
    outcome = shared.outcome()
    assert outcome.kind is kind
    assert outcome.body == 1 if kind is FrameKind.COMPLETED else "too late" in outcome.error
