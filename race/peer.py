"""What a competitor's file tells about itself, and what it may know of the place it runs in."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

DSN_VARIABLE = "RACE_DSN"
REDIS_VARIABLE = "RACE_REDIS"
HARM_VARIABLE = "RACE_HARM"

Store = Literal["PostgreSQL", "Redis"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`table` holds one row a waiting job and nothing else does, so that a backlog can be made by copying a row of it.

    Where there is no such table it is empty, and the backlog is made with `enqueue_many`. `unfinished` asks how many
    jobs are not recorded as done, where that can be asked.
    What serves many short jobs, such as large claims, is no help beside hangs and crashes: there a competitor may have
    settings of its own, told by `beside_harm()`. Those that are not its defaults are its `hang_setting`; hangs are
    then measured without them too.
    """

    label: str
    distributions: tuple[str, ...]  # whose versions are reported
    store: Store
    isolation: str  # what a job shares with others
    settings: str  # what was set other than by default
    timeout: str  # by what means `hang` has its timeout
    rescue: str  # when, by default, jobs are given out again that a dead process had claimed
    hang_setting: str = ""
    table: str = ""
    unfinished: str = ""  # of a competitor on PostgreSQL


@dataclass(frozen=True, slots=True)
class Client:
    """`enqueue` returns when the job is safe; `enqueue_many` takes the fastest way there is."""

    enqueue: Callable[[str, int], Awaitable[object]]
    enqueue_many: Callable[[str, Sequence[int]], Awaitable[object]]


def dsn() -> str:
    """Of the database of this measurement."""
    return os.environ[DSN_VARIABLE]


def beside_harm() -> bool:
    """Whether these workers are to run jobs that hang or crash."""
    return HARM_VARIABLE in os.environ


def redis_socket() -> str:
    """The path of the socket of this run's Redis."""
    return os.environ[REDIS_VARIABLE]
