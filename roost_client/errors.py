"""The exceptions a caller acts on, each with a stable `code`. Imports nothing of Roost."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

_LONGEST_SNOOZE_SECONDS = 31_556_952_000  # further away, the date would leave what Python's datetime can hold


class RoostError(Exception):
    """Base of all Roost errors but those a `RuntimeError` or `TimeoutError` handler must catch too."""

    code: ClassVar[str] = "roost.error"


class InvalidJobError(RoostError, ValueError):
    """An argument was refused, and nothing was changed. `path` names the value, such as `args.items[3].price`."""

    code: ClassVar[str] = "roost.invalid-job"

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class DuplicateUniqueJobError(RoostError):
    """An enqueue or retry conflicts with an active job of the same unique_key: that of `job_id`."""

    code: ClassVar[str] = "roost.duplicate-unique-job"

    def __init__(self, message: str, job_id: int = 0) -> None:
        super().__init__(message)
        self.job_id = job_id


class JobNotFoundError(RoostError):
    """No job has this id."""

    code: ClassVar[str] = "roost.job-not-found"


class JobStateError(RoostError):
    """The job is in a state, `state`, that the operation does not apply to."""

    code: ClassVar[str] = "roost.job-state"

    def __init__(self, message: str, state: str = "") -> None:
        super().__init__(message)
        self.state = state


class LeaseLostError(RoostError):
    """The job is no longer this run's to complete: it was taken from its worker, or has ended."""

    code: ClassVar[str] = "roost.lease-lost"


class UnknownTaskError(RoostError):
    """A worker pulled a job whose task name is not in its registry."""

    code: ClassVar[str] = "roost.unknown-task"


class SchemaError(RoostError):
    """The database's Roost schema is not the one this version works with; `problem` says in which way."""

    code: ClassVar[str] = "roost.schema"

    def __init__(self, message: str, problem: Literal["missing", "outdated", "newer", "altered"] = "missing") -> None:
        super().__init__(message)
        self.problem = problem


class SnoozeJob(RoostError):
    """Raised in a handler: run this job again in `seconds`, without counting the attempt."""

    code: ClassVar[str] = "roost.snooze-job"

    def __init__(self, seconds: float) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"cannot snooze for {seconds!r}: seconds must be a number")
        if not 0 <= seconds <= _LONGEST_SNOOZE_SECONDS:  # false for NaN too
            raise ValueError(
                f"cannot snooze for {seconds!r:.30} seconds: must be 0 to {_LONGEST_SNOOZE_SECONDS} (a thousand years)"
            )
        super().__init__(seconds)
        self.seconds = float(seconds)

    def __str__(self) -> str:
        return f"snoozed for {self.seconds:g} seconds"


class JobFailed(RuntimeError):
    """The awaited job ended `discarded` or `cancelled`."""

    code: ClassVar[str] = "roost.job-failed"

    def __init__(self, job_id: int, state: str, errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(job_id, state, errors)
        self.job_id = job_id
        self.state = state
        self.errors = errors or []

    def __str__(self) -> str:
        last = f": {self.errors[-1].get('error')}" if self.errors else ""
        return f"job {self.job_id} ended {self.state}{last}"


class JobTimeoutError(TimeoutError):
    """The awaited job did not end in time; it goes on."""

    code: ClassVar[str] = "roost.job-timeout"


class JobCancelled(BaseException):
    """What a handler sees when its job is cancelled: clean up and let it pass. No `except Exception` catches it."""

    code: ClassVar[str] = "roost.job-cancelled"


class WorkerCrash(RoostError):
    """The process that ran the job vanished before it reported an outcome."""

    code: ClassVar[str] = "roost.worker-crash"


class WorkerShutdown(RoostError):
    """Interrupts a worker's loop on a graceful shutdown."""

    code: ClassVar[str] = "roost.worker-shutdown"
