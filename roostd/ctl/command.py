"""What all commands share: their options, and the way from these to a database.

A command is a function that takes an Invocation and returns its exit status (None for 0).
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from roost_client import Roost
from roostd.config import Config, load
from roostd.embedded import running_dsn

EXIT_NOTHING = 1
EXIT_USAGE = 64  # sysexits.h: EX_USAGE, EX_UNAVAILABLE, EX_CONFIG
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

F = TypeVar("F", bound=Callable[..., Any])


class Failure(Exception):
    """What was asked can't be done; the message says why."""

    def __init__(self, message: str, exit_code: int = EXIT_NOTHING) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(slots=True)
class Invocation:
    """The common options, given before the command or after it."""

    dsn: str | None = None
    config: Path | None = None
    json: bool = False

    def settings(self) -> Config:
        """The daemon's settings, as far as they are known here."""
        return load(self.config, environ=os.environ, flags={"database.dsn": self.dsn}).config

    def client(self) -> Roost:
        return Roost(self.conninfo())

    def connect(self) -> psycopg.Connection[Any]:
        """A connection in autocommit mode; it may lead through a pooler, so nothing is prepared."""
        return psycopg.connect(self.conninfo(), autocommit=True, prepare_threshold=None)

    def conninfo(self) -> str:
        """Where the database is. Raises ConfigError and Failure."""
        database = self.settings().database
        dsn = database.dsn
        if dsn is None and database.embedded is not None:
            dsn = running_dsn(database.embedded)
        if dsn is None:
            raise Failure(
                f"cannot reach the database in {database.embedded}: it is not running; start roostd", EXIT_UNAVAILABLE
            )
        defaults = {"connect_timeout": "10", "application_name": "roostctl"}
        defaults = {key: value for key, value in defaults.items() if key not in conninfo_to_dict(dsn)}
        return make_conninfo(dsn, **defaults, client_encoding="UTF8")  # nothing narrower holds every name


def common_options(function: F) -> F:
    """Add --dsn, -c and --json, which end up in the Invocation."""
    for option in (
        _option("--json", is_flag=True, default=None, help="Print JSON."),
        _option("-c", "--config", metavar="FILE", type=click.Path(path_type=Path), help="The daemon's settings."),
        _option("--dsn", metavar="DSN", help="The database, as a libpq URI or key=value pairs."),
    ):
        function = option(function)
    return function


def _option(*names: str, **attributes: Any) -> Callable[[F], F]:
    return click.option(*names, expose_value=False, callback=_remember, **attributes)


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    invocation = context.ensure_object(Invocation)
    if value is not None and parameter.name is not None:
        setattr(invocation, parameter.name, value)


def command(name: str) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a function `(invocation, **parameters)` a command."""

    def decorate(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def run(**parameters: Any) -> int | None:
            return function(click.get_current_context().ensure_object(Invocation), **parameters)

        return click.command(name)(common_options(run))

    return decorate


def find_roostd(what: str) -> str:
    """The daemon's command, which is installed with this one; `what` it is wanted for. Raises Failure."""
    beside = Path(sysconfig.get_path("scripts")) / "roostd"
    found = str(beside) if beside.exists() else shutil.which("roostd")
    if found is None:
        raise Failure(f"cannot {what}: there is no {beside}; install the package", EXIT_CONFIG)
    return found


def confirm(question: str, what: str) -> None:
    """Ask before a change of many things. Raises Failure where the answer is no, or nobody is there to answer."""
    if not sys.stdin.isatty():
        raise Failure(f"cannot {what} without a question, and no terminal is there to ask on: pass --yes", EXIT_USAGE)
    if not click.confirm(question, err=True):
        raise Failure("nothing was changed; --yes goes ahead without a question")
