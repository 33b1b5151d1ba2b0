"""What the exceptions carry, also through pickle."""

from __future__ import annotations

import pickle

import pytest

from roost_client import (
    InvalidJobError,
    JobCancelled,
    JobFailed,
    JobStateError,
    JobTimeoutError,
    RoostError,
    SchemaError,
    SnoozeJob,
)


@pytest.mark.parametrize(
    "error",
    [
        InvalidJobError("cannot enqueue 'a': args.x is odd", "args.x"),
        JobStateError("cannot retry job 1", "completed"),
        JobFailed(7, "discarded", [{"error": "ValueError: no"}]),
        SchemaError("cannot use the schema", "newer"),
        SnoozeJob(2.5),
    ],
)
def test_an_exception_survives_pickle(error: BaseException) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_failed_job_says_what_its_last_error_was() -> None:
    assert str(JobFailed(7, "discarded", [{"error": "first"}, {"error": "last"}])) == "job 7 ended discarded: last"
    assert str(JobFailed(7, "cancelled")) == "job 7 ended cancelled"
    assert JobFailed(7, "cancelled").errors == []


def test_no_except_exception_catches_a_cancel() -> None:
    assert not issubclass(JobCancelled, Exception)


def test_the_builtin_bases_let_general_handlers_catch_them() -> None:
    assert issubclass(JobTimeoutError, TimeoutError)
    assert issubclass(JobFailed, RuntimeError)
    assert issubclass(InvalidJobError, ValueError)
    assert issubclass(InvalidJobError, RoostError)


@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), float("-inf"), 10**40, 1e300])
def test_a_snooze_of_no_sensible_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError):
        SnoozeJob(seconds)


@pytest.mark.parametrize("seconds", ["5", None, True, [1]])
def test_a_snooze_of_no_number_is_refused(seconds: object) -> None:
    with pytest.raises(TypeError):
        SnoozeJob(seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0, 0.5, 86400, 10 * 365 * 86400])
def test_a_snooze_keeps_its_seconds(seconds: float) -> None:
    assert SnoozeJob(seconds).seconds == seconds
