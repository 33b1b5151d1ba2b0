"""The command `roostd`: its options. What they lead to is in serve.py.

Imports next to nothing before it has seen to the signals: loading the rest takes a third of a second, in which a HUP
or USR1 would otherwise be the end of the daemon, and a TERM an end with a failure.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-c", "--config", "path", type=click.Path(path_type=Path), help="Configuration file (TOML).")
@click.option("--check", is_flag=True, help="Validate the settings, import the handlers, print both, and exit.")
@click.option("--json", "as_json", is_flag=True, help="With --check: print JSON, with the schema of each task.")
@click.option("--once", is_flag=True, help="Run what is available, print how many jobs ended, and exit.")
@click.option("--embedded", is_flag=False, flag_value="", metavar="[DIR]", help="Start a private PostgreSQL in DIR.")
@click.option("--orphan-stale-after", metavar="SECONDS", help="As worker.orphan_stale_after in the configuration.")
@click.option("--log-level", help="As log.level in the configuration.")
@click.option("--log-format", help="As log.format in the configuration.")
@click.version_option(package_name="roostd")
def main(
    path: Path | None,
    check: bool,
    as_json: bool,
    once: bool,
    embedded: str | None,
    orphan_stale_after: str | None,
    log_level: str | None,
    log_format: str | None,
) -> None:
    """Runs background jobs from PostgreSQL in child processes that can be stopped."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: sys.exit(0))
    if as_json and not check:
        raise click.UsageError("--json goes with --check")
    from roostd import serve

    flags = {
        "database.embedded": _embedded_directory() if embedded == "" else embedded,
        "worker.orphan_stale_after": orphan_stale_after,
        "log.level": log_level,
        "log.format": log_format,
    }
    serve.main(path, flags, check=check, as_json=as_json, once=once)


def _embedded_directory() -> str:
    """Where `--embedded` without a directory keeps its data: systemd's state directory, or the user's."""
    state = os.environ.get("STATE_DIRECTORY")
    if state:
        return str(Path(state.split(":")[0]) / "postgres")
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return str(Path(home) / "roost" / "postgres")
