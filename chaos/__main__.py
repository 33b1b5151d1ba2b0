"""Runs a campaign, and says whether Roost kept its promises."""

from __future__ import annotations

import secrets
import shlex
import signal
import sys
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from bench.machine import commit_of_checkout
from chaos import report
from chaos.campaign import run
from chaos.checker import check
from chaos.faults import FAULTS
from chaos.jobs import KINDS
from chaos.plan import Plan, make_plan
from chaos.stage import ChaosError, Stage
from roostd.embedded import EmbeddedError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seed", type=int, help="What decides everything. Default: a new one.")
@click.option("--faults", default=50, show_default=True, help="How many to inject.")
@click.option("--jobs", default=5_000, show_default=True, help="How many to enqueue.")
@click.option("--only", multiple=True, type=click.Choice([*FAULTS]), help="One kind of fault; may be repeated.")
@click.option("--kind", multiple=True, type=click.Choice([*KINDS]), help="One kind of job; may be repeated.")
@click.option("--limit", default=240, show_default=True, help="Seconds after which the campaign has failed.")
@click.option("--show-plan", is_flag=True, help="Print the plan, and do nothing.")
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("chaos/results"),
    show_default=True,
    help="Where to keep the report, and the evidence of what went wrong.",
)
@click.option(
    "--report", "document", type=click.Path(path_type=Path, dir_okay=False), help="Another file for the report."
)
def main(
    seed: int | None,
    faults: int,
    jobs: int,
    only: tuple[str, ...],
    kind: tuple[str, ...],
    limit: int,
    show_plan: bool,
    results: Path,
    document: Path | None,
) -> None:
    """Breaks three daemons and their PostgreSQL in every way there is, and checks that no promise is broken."""
    if seed is None:
        seed = secrets.randbelow(1 << 31)
    chosen_options = [f" --only {name}" for name in only] + [f" --kind {shlex.quote(name)}" for name in kind]
    repeat = f"python -m chaos --seed {seed} --faults {faults} --jobs {jobs}{''.join(chosen_options)}"
    print(f"seed {seed}: {repeat}", file=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(limit)
    commit = commit_of_checkout()  # before it may change
    chosen = only or tuple(FAULTS)

    def plan(skipped: Collection[str] = ()) -> Plan:
        kinds = {name: FAULTS[name].slow for name in chosen if name not in skipped}
        return make_plan(seed, faults=faults, jobs=jobs, kinds_of_fault=kinds, kinds_of_job=kind or tuple(KINDS))

    if show_plan:
        print("\n".join(plan().lines()))
        return
    try:
        with Stage() as stage:
            skipped = {name: reason for name in chosen if (reason := FAULTS[name].refusal(stage))}
            for name, reason in skipped.items():
                print(f"left out: {name}: {reason}", file=sys.stderr)
            evidence = run(plan(skipped), stage, skipped)
            findings = check(evidence)
            if findings.violations:
                report.keep_stories(results, evidence, findings, stage.masters.values())
    except (ChaosError, EmbeddedError) as error:
        print(f"chaos: {error}\nrepeat with: {repeat}", file=sys.stderr)
        sys.exit(2)
    print(report.table(evidence, findings))
    report.write(results, evidence, findings)
    if document is not None:
        document.write_text(report.document(repeat, commit, evidence, findings))
    if findings.violations:
        print(report.violations(findings, results), file=sys.stderr)
        print(f"repeat with: {repeat}", file=sys.stderr)
        sys.exit(1)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that everything that was started is ended on the way out.
    raise ChaosError(f"ended by {signal.Signals(number).name}; SIGALRM: it took longer than --limit")


if __name__ == "__main__":
    main()
