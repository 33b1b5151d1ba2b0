"""Roost's client library: enqueue jobs in your own transaction, declare handlers, look after jobs and queues.

Imports psycopg, pydantic and the standard library only; never roostd.
"""

from .aclient import AsyncRoost
from .backoff import BackoffStrategy, exponential, fixed, linear
from .client import Roost
from .current import CurrentJob, current_job
from .defaults import configure, enqueue, enqueue_many
from .errors import (
    DuplicateUniqueJobError,
    InvalidJobError,
    JobCancelled,
    JobFailed,
    JobNotFoundError,
    JobStateError,
    JobTimeoutError,
    LeaseLostError,
    RoostError,
    SchemaError,
    SnoozeJob,
    UnknownTaskError,
    WorkerCrash,
    WorkerShutdown,
)
from .explain import Explanation
from .hooks import Hooks
from .registry import DEFAULT_HANDLERS, CronSpec, HandlerRegistry, HandlerSpec, cron, job
from .types import (
    AddedCount,
    CronEntry,
    Job,
    JobInsert,
    JobOutcome,
    JobState,
    QueueInfo,
    RequeuedCount,
    TaskDefaults,
    WorkerInfo,
)

__all__ = [
    "configure",
    "enqueue",
    "enqueue_many",
    "Roost",
    "AsyncRoost",
    "job",
    "cron",
    "current_job",
    "CurrentJob",
    "Hooks",
    "exponential",
    "linear",
    "fixed",
    "BackoffStrategy",
    "AddedCount",
    "Job",
    "JobInsert",
    "JobOutcome",
    "JobState",
    "QueueInfo",
    "RequeuedCount",
    "WorkerInfo",
    "Explanation",
    "TaskDefaults",
    "CronEntry",
    "CronSpec",
    "DEFAULT_HANDLERS",
    "HandlerRegistry",
    "HandlerSpec",
    "RoostError",
    "InvalidJobError",
    "DuplicateUniqueJobError",
    "JobCancelled",
    "JobFailed",
    "JobNotFoundError",
    "JobStateError",
    "JobTimeoutError",
    "LeaseLostError",
    "SchemaError",
    "SnoozeJob",
    "UnknownTaskError",
    "WorkerCrash",
    "WorkerShutdown",
]
