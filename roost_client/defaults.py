"""enqueue and enqueue_many without a client at hand: a default one, made at the first need from what was configured."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Literal

import psycopg
from pydantic import BaseModel

from .client import Roost
from .errors import RoostError
from .fields import UNSET, shows_documented_defaults
from .types import AddedCount, JobInsert

DSN_VARIABLES = ("ROOST_DSN", "DATABASE_URL")  # the first that is set wins

_lock = threading.Lock()
_client: Roost | None = None
# For those who always pass conn= and so need no DSN: never opens a connection.
_without_dsn = Roost("")


def configure(dsn: str) -> None:
    """Set the database that the module's enqueue and enqueue_many use when they are not given a connection.

    Without it they take the environment's ROOST_DSN, or DATABASE_URL. Raises RoostError for a DSN that can't be read.
    """
    global _client
    client = Roost(dsn)
    with _lock:
        former, _client = _client, client
    if former is not None:
        former.close()


@shows_documented_defaults
def enqueue(
    task: str | Callable[..., Any],
    *,
    args: dict[str, Any] | BaseModel | None = None,
    queue: str = UNSET,
    priority: int = UNSET,
    max_attempts: int = UNSET,
    scheduled_at: datetime | None = None,
    unique_key: str | None = None,
    tags: list[str] | None = UNSET,
    timeout_seconds: int | None = UNSET,
    depends_on: list[int] | None = None,
    metadata: dict[str, Any] | None = None,
    on_duplicate: Literal["raise", "return", "replace"] = "raise",
    conn: psycopg.Connection[Any] | None = None,
) -> int:
    """As Roost.enqueue, on the default client. Raises RoostError when there is neither `conn` nor a configured DSN."""
    return _default(conn).enqueue(
        task,
        args=args,
        queue=queue,
        priority=priority,
        max_attempts=max_attempts,
        scheduled_at=scheduled_at,
        unique_key=unique_key,
        tags=tags,
        timeout_seconds=timeout_seconds,
        depends_on=depends_on,
        metadata=metadata,
        on_duplicate=on_duplicate,
        conn=conn,
    )


def enqueue_many(jobs: Iterable[JobInsert], *, conn: psycopg.Connection[Any] | None = None) -> AddedCount:
    """As Roost.enqueue_many, on the default client. Raises RoostError as enqueue does."""
    return _default(conn).enqueue_many(jobs, conn=conn)


def _default(conn: psycopg.Connection[Any] | None) -> Roost:
    global _client
    if conn is not None:
        return _without_dsn
    with _lock:
        if _client is None:
            dsn = next((value for name in DSN_VARIABLES if (value := os.environ.get(name))), None)
            if dsn is None:
                raise RoostError(
                    "cannot enqueue: no database is configured; call roost_client.configure(dsn), set ROOST_DSN or"
                    " DATABASE_URL, or pass conn="
                )
            _client = Roost(dsn)
        return _client
