"""Which jobs are meant: the options that `jobs` and `requeue` share."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import click

from roost_client.fields import INT8_MAX, MAX_AGE
from roostd.ctl import completion

F = TypeVar("F", bound=Callable[..., Any])

JOB_ID = click.IntRange(-INT8_MAX - 1, INT8_MAX)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def age(text: str) -> timedelta:
    """What an AGE stands for."""
    read = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text.strip(), re.ASCII)
    if read is None:
        raise click.BadParameter(
            f"{text!r} is no age: pass a number with s, m, h, d or w behind it, as in 90s, 15m, 2h, 3d"
        )
    try:
        found = timedelta(**{_UNITS[read[2]]: float(read[1])})
    except OverflowError:
        found = timedelta.max
    if found > MAX_AGE:
        raise click.BadParameter(f"{text!r} is more than a hundred years")
    return found


def filter_options(function: F) -> F:
    """Add the options of a JobFilter, under the names of its fields."""
    for option in (
        click.option("--error", metavar="TEXT", help="Only those with this in their newest error, in either case."),
        click.option("--newer-than", metavar="AGE", type=age, help="Only those enqueued since."),
        click.option("--older-than", metavar="AGE", type=age, help="Only those enqueued longer ago: 90s, 15m, 2h, 3d."),
        click.option("--tag", help="Only those with this tag."),
        click.option("--task", shell_complete=completion.tasks, help="Only this task's."),
        click.option("--queue", shell_complete=completion.queues, help="Only this queue's."),
    ):
        function = option(function)
    return function
