"""demo: a real workload, and a check for each thing that makes Roost worth having.

stage       an embedded PostgreSQL and a roostd in a temporary directory, and their end
workload    files of Python's own library through the tasks of examples/files.py
checks      what must hold; each fails where it does not
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TextIO

import click

from roostd.ctl.command import EXIT_NOTHING, Failure, Invocation, command
from roostd.ctl.demo.checks import CHECKS, CheckFailed, Verdict, run_checks
from roostd.ctl.demo.stage import Stage
from roostd.ctl.demo.workload import run_workload
from roostd.ctl.output import print_json

_CHILDREN = 4


@command("demo")
def demo(invocation: Invocation) -> int:
    """Start a database and roostd, run some thousands of jobs, and check what Roost promises.

    All in a temporary directory that is removed in the end. Needs a checkout, and nothing that runs already.
    """
    # With --json the verdicts are the data, and what is told meanwhile are messages.
    stream = sys.stderr if invocation.json else sys.stdout
    started_at = time.monotonic()
    with Stage(_CHILDREN) as stage:
        click.echo(f"PostgreSQL and roostd are up after {time.monotonic() - started_at:.1f} s", file=stream)
        try:
            work = run_workload(stage.scene, stream)
        except CheckFailed as error:
            stage.show_log()
            raise Failure(f"cannot work through the files: {error}") from error
        click.echo(str(work), file=stream)
        verdicts = run_checks(stage.scene, CHECKS, lambda verdict: _tell(verdict, stream))
        if not all(verdict.ok for verdict in verdicts):
            stage.show_log()
    failed = sum(not verdict.ok for verdict in verdicts)
    seconds = time.monotonic() - started_at
    told = f"{failed} of {len(verdicts)} checks FAILED" if failed else f"all {len(verdicts)} checks passed"
    click.echo(f"{told}, in {seconds:.1f} s", file=stream)
    if invocation.json:
        print_json({"ok": not failed, "seconds": round(seconds, 1), "workload": asdict(work), "checks": verdicts})
    return EXIT_NOTHING if failed else 0


COMMANDS = (demo,)


def _tell(verdict: Verdict, stream: TextIO) -> None:
    word = click.style("ok    ", fg="green") if verdict.ok else click.style("FAILED", fg="red", bold=True)
    click.echo(f"{word}  {verdict.check}{'' if verdict.ok else f': {verdict.reason}'}", file=stream)
