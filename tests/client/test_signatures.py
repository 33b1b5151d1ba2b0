"""The public names have the parameters and defaults of the API reference, and the exceptions their codes."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

import roost_client
from roost_client import errors, types

ENQUEUE = (
    "task, *, args=None, queue='default', priority=0, max_attempts=20, scheduled_at=None, unique_key=None, tags=None,"
    " timeout_seconds=None, depends_on=None, metadata=None, on_duplicate='raise', conn=None"
)
WORKER = (
    "*, queues=('default',), concurrency=4, prefetch=None, poll_interval=1.0, retry_strategy=None, run_cron=True,"
    " heartbeat_interval=15.0, orphan_reaper_interval=30.0, orphan_stale_after=300.0, shutdown_timeout=30.0,"
    " listen_reconnect_delay=1.0, error_cap=20, archive_after_seconds=None, archive_interval=60.0,"
    " result_ttl_seconds=None, startup_max_retries=30, startup_retry_delay=1.0, hooks=None"
)
# As the reference has them; `self` left out.
REFERENCE = {
    "Roost": "dsn, *, registry=None",
    "Roost.enqueue": ENQUEUE,
    "Roost.enqueue_many": "jobs, *, conn=None",
    "Roost.setup_schema": "conn=None",
    "Roost.wait_for": "job_id, *, timeout=30.0, poll_interval=1.0, raise_on_failure=True",
    "AsyncRoost": "dsn, *, registry=None",
    "AsyncRoost.enqueue": ENQUEUE,
    "AsyncRoost.enqueue_many": "jobs, *, conn=None",
    "AsyncRoost.setup_schema": "conn=None",
    "AsyncRoost.wait_for": "job_id, *, timeout=30.0, poll_interval=1.0, raise_on_failure=True",
    "AsyncRoost.worker": WORKER,
    "CronEntry": (
        "name, expression, task, args=FACTORY, queue='default', priority=0, max_attempts=20, timezone_name=None"
    ),
    "cron": (
        "expression, *, name=None, queue='default', args=None, priority=0, max_attempts=20, timezone=None,"
        " handler_registry=None"
    ),
    "enqueue": ENQUEUE,
    "enqueue_many": "jobs, *, conn=None",
    "Hooks": "before_job=None, after_job=None",
    "HandlerRegistry": "",
    "HandlerRegistry.register": "name, func, *, args_model=None, defaults=None",
    "JobFailed": "job_id, state, errors=None",
    "JobInsert": (
        "task, args=None, queue='default', priority=0, max_attempts=20, scheduled_at=None, unique_key=None, tags=None,"
        " timeout_seconds=None, depends_on=None, metadata=None"
    ),
    "JobOutcome": "id, state, result, errors",
    "SnoozeJob": "seconds",
    "TaskDefaults": (
        "queue=None, priority=None, max_attempts=None, tags=None, timeout_seconds=None, rate_per_minute=None,"
        " max_concurrency=None"
    ),
    "exponential": "base=2.0, *, jitter=True, cap=86400",
    "job": (
        "name, *, args_model=None, queue=None, priority=None, max_attempts=None, tags=None, timeout_seconds=None,"
        " rate_per_minute=None, max_concurrency=None, registry=None"
    ),
}
BASES = {
    "RoostError": Exception,
    "DuplicateUniqueJobError": errors.RoostError,
    "JobNotFoundError": errors.RoostError,
    "JobFailed": RuntimeError,
    "JobTimeoutError": TimeoutError,
    "UnknownTaskError": errors.RoostError,
    "SnoozeJob": errors.RoostError,
    "WorkerShutdown": errors.RoostError,
}
CODES = {
    "RoostError": "roost.error",
    "DuplicateUniqueJobError": "roost.duplicate-unique-job",
    "JobNotFoundError": "roost.job-not-found",
    "JobFailed": "roost.job-failed",
    "JobTimeoutError": "roost.job-timeout",
    "UnknownTaskError": "roost.unknown-task",
    "SnoozeJob": "roost.snooze-job",
    "WorkerShutdown": "roost.worker-shutdown",
}
JOB_FIELDS = (
    "id queue task args state priority attempt max_attempts scheduled_at attempted_at completed_at cancelled_at"
    " discarded_at errors unique_key inserted_at tags timeout_seconds cancel_requested result depends_on metadata"
)


def parameters(function: Callable[..., Any]) -> list[tuple[str, inspect._ParameterKind, object]]:
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]


def public(name: str) -> Any:
    value: Any = roost_client
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", REFERENCE)
def test_a_signature_is_that_of_the_reference(name: str) -> None:
    documented: dict[str, Any] = {"FACTORY": inspect.signature(roost_client.CronEntry).parameters["args"].default}
    exec(f"def documented({REFERENCE[name]}): ...", documented)
    assert parameters(public(name)) == parameters(documented["documented"])


def test_a_bound_method_shows_the_same_defaults() -> None:
    client = roost_client.Roost("")
    assert parameters(client.enqueue) == parameters(roost_client.Roost.enqueue)


@pytest.mark.parametrize("name", [n for n in vars(roost_client.Roost) if not n.startswith("_")])
def test_both_clients_have_the_operation_with_the_same_parameters(name: str) -> None:
    blocking, awaited = getattr(roost_client.Roost, name), getattr(roost_client.AsyncRoost, name)
    assert parameters(blocking) == parameters(awaited)
    assert asyncio.iscoroutinefunction(awaited)
    assert blocking.__doc__
    assert awaited.__doc__ == f"As Roost.{name}."


@pytest.mark.parametrize("name", CODES)
def test_an_exception_has_its_code(name: str) -> None:
    assert public(name).code == CODES[name]


@pytest.mark.parametrize("name", BASES)
def test_an_exception_is_what_the_reference_says_it_is(name: str) -> None:
    assert public(name).__bases__ == (BASES[name],)


def test_every_exception_has_a_code_of_its_own() -> None:
    classes = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, BaseException) and cls.__module__ == errors.__name__
    ]
    codes = [cls.__dict__["code"] for cls in classes]
    assert len(set(codes)) == len(classes)
    assert {cls.__name__ for cls in classes} <= set(roost_client.__all__)


def test_a_job_has_the_fields_of_the_reference_and_is_frozen() -> None:
    assert " ".join(types.Job.model_fields) == JOB_FIELDS
    assert issubclass(types.Job, BaseModel)
    assert types.Job.model_config == {"frozen": True}


def test_a_job_is_made_of_its_fields_by_name() -> None:
    (fields,) = inspect.signature(types.Job.__init__).parameters.keys() - {"self"}
    assert inspect.signature(types.Job.__init__).parameters[fields].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("strategy", [roost_client.exponential(), roost_client.linear(), roost_client.fixed()])
def test_a_backoff_strategy_maps_an_attempt_to_seconds(strategy: roost_client.BackoffStrategy) -> None:
    assert isinstance(strategy(1), float)
    assert [roost_client.exponential(jitter=False)(attempt) for attempt in (1, 2, 3, 4, 20)] == [2, 4, 8, 16, 86400]


def test_the_job_states_are_strings() -> None:
    assert issubclass(roost_client.JobState, str)
    assert [str(state) for state in roost_client.JobState] == [
        "available", "executing", "retryable", "completed", "discarded", "cancelled",
    ]  # fmt: skip


def test_everything_public_is_there_and_documented() -> None:
    for name in roost_client.__all__:
        value = getattr(roost_client, name)
        assert not callable(value) or value.__doc__, name
