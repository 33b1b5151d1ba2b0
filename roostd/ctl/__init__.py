"""The command `roostctl`: what each error means to the shell, and where the commands are.

    command    options that all commands share, and the database they lead to
    output     tables, lines and JSON: pretty on a terminal, plain off it
    filters    which jobs are meant
    queues, status, jobs, explain, changes, enqueue, cron, workers, tasks, migrate, completion, doctor, demo
               the commands, one file a group

Data goes to stdout, messages to stderr. Must not import the daemon's parts: all goes through the database.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click
import psycopg

from roost_client import InvalidJobError, RoostError, SchemaError
from roostd.config import ConfigError
from roostd.ctl import (
    changes,
    completion,
    cron,
    demo,
    doctor,
    enqueue,
    explain,
    jobs,
    migrate,
    queues,
    status,
    tasks,
    workers,
)
from roostd.ctl.command import EXIT_CONFIG, EXIT_NOTHING, EXIT_UNAVAILABLE, EXIT_USAGE, Failure, common_options
from roostd.ctl.output import note, one_line


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(package_name="roostd")
@common_options
def roostctl() -> None:
    """Looks after a Roost job queue: its jobs, queues and workers.

    The database is the one of --dsn, of the daemon's configuration (-c), of ROOST_DSN, or of DATABASE_URL.
    Exit status: 0 done, 1 no such job or nothing matched, 64 wrong usage, 69 database unavailable, 78 configuration.
    """


for module in (
    status, queues, jobs, explain, changes, enqueue, cron, workers, tasks, migrate, completion, doctor, demo,
):  # fmt: skip
    for each in module.COMMANDS:
        roostctl.add_command(each)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A task may be called anything, and the terminal may not have the characters for it.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    if (answered := completion.answer(roostctl)) is not None:
        return answered
    try:
        # Not click's own main(), which ends the process itself when a pipe breaks.
        with roostctl.make_context("roostctl", list(sys.argv[1:] if arguments is None else arguments)) as context:
            code: int | None = roostctl.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code
    except BrokenPipeError:
        _drop_output()  # whoever read us has enough
        return 128 + signal.SIGPIPE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "roostctl"
        return _failed(f"cannot run {path}: {error.format_message().rstrip('.')}; see {path} --help", EXIT_USAGE)
    except (click.Abort, KeyboardInterrupt):
        note("interrupted")
        return 128 + signal.SIGINT
    except ConfigError as error:
        return _failed(str(error), EXIT_CONFIG)
    except Failure as error:
        return _failed(str(error), error.exit_code)
    except InvalidJobError as error:
        return _failed(str(error), EXIT_USAGE)
    except SchemaError as error:
        return _failed(str(error), EXIT_CONFIG)
    except RoostError as error:
        return _failed(str(error), EXIT_NOTHING)
    except psycopg.Error as error:
        what = "use the database" if error.sqlstate else "reach the database"
        return _failed(f"cannot {what}: {one_line(error)}", EXIT_UNAVAILABLE)
    except OSError as error:
        if error.filename is not None:
            raise
        _drop_output()  # to a full disk
        return _failed(f"cannot write the output: {error.strerror or error}", EXIT_NOTHING)
    return code or 0


def _open_closed_streams() -> None:
    """Where the shell has closed stdout or stderr (`>&-`), a connection would get its number, and Python has None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _drop_output() -> None:
    """Python would complain about what it can't write when it flushes stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _failed(message: str, code: int) -> int:
    note(message)
    return code
