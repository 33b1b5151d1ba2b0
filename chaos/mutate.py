"""Shows that the campaign and the tests see what they are there to see: breaks Roost on purpose, one way at a time.

A mutant is a patch in `mutants/`. Its first line says what it takes away, those with `try:` what may catch it: a
campaign by its options, or files of tests. Each is applied to a copy of the tree, and what is tried runs there, in
order, until one goes red; the same must be green without the patch. A mutant that nothing catches has survived.

What a seed decides alone (the model, a simulation) comes before a campaign, which depends on the machine's timing too.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from bench.machine import CHECKOUT

MUTANTS = Path(__file__).with_name("mutants")
TRY_SECONDS = 300.0
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "results", "*.egg-info")


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    what: str
    tries: tuple[str, ...]
    patch: Path


@dataclass(frozen=True, slots=True)
class Verdict:
    """`caught_by` is empty for a mutant that survived."""

    mutant: Mutant
    caught_by: str
    seconds: float


def read_mutant(patch: Path) -> Mutant:
    head = patch.read_text().partition("\n--- ")[0].splitlines()
    tries = tuple(line.removeprefix("try: ") for line in head if line.startswith("try: "))
    return Mutant(patch.stem, head[0], tries, patch)


def judge(mutant: Mutant, silent: set[str]) -> Verdict:
    """What catches it, and is silent without it. Raises CalledProcessError where the patch does not apply any more.

    `silent` are the tries of which that is known already.
    """
    began = time.monotonic()
    for attempt in mutant.tries:
        with _copy() as copy:
            subprocess.run(["git", "apply", str(mutant.patch)], cwd=copy, check=True)
            caught = _try(attempt, copy)
        if caught:
            if attempt not in silent:
                with _copy() as copy:
                    if false := _try(attempt, copy):
                        raise click.ClickException(f"cannot judge {mutant.name}: {attempt} is red without it: {false}")
                silent.add(attempt)
            return Verdict(mutant, caught, time.monotonic() - began)
    return Verdict(mutant, "", time.monotonic() - began)


@contextmanager
def _copy() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="roost-mutant-") as directory:
        copy = Path(directory) / "tree"
        shutil.copytree(CHECKOUT, copy, ignore=_NOT_COPIED)
        yield copy


def _try(attempt: str, copy: Path) -> str:
    """What went red, or nothing."""
    words = shlex.split(attempt)
    results = copy / "results"
    if words[0] == "chaos":
        words += ["--results", str(results)]
    command = [sys.executable, "-m", *words]
    environ = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "MODEL_SHORTEN": "0"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environ, capture_output=True, text=True, timeout=TRY_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"{attempt}: it did not end"
    if done.returncode == 0:
        return ""
    if words[0] == "chaos":
        if checks := _checks_in(results / "chaos.json"):
            return f"campaign: {checks}"
        raise click.ClickException(f"cannot try {attempt}: {done.stderr[-2000:]}")
    failed = [
        line.split(" - ")[0].rpartition("::")[2] for line in done.stdout.splitlines() if line.startswith("FAILED")
    ]
    if not failed:
        raise click.ClickException(f"cannot try {attempt}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return f"{Path(words[-1]).stem.removeprefix('test_')}: {failed[0]}"


def _checks_in(report: Path) -> str:
    if not report.exists():
        return ""
    checks = [violation["check"] for violation in json.loads(report.read_text())["violations"]]
    return ", ".join(f"{check} ({checks.count(check)})" for check in dict.fromkeys(checks))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Judges the mutants of these NAMES (default: all)."""
    mutants = [read_mutant(patch) for patch in sorted(MUTANTS.glob("*.patch"))]
    if unknown := set(names) - {mutant.name for mutant in mutants}:
        raise click.UsageError(f"there is no mutant {', '.join(sorted(unknown))}")
    print("| mutant | taken away | caught by | seconds |\n|---|---|---|---|", flush=True)
    survivors = 0
    silent: set[str] = set()
    for mutant in mutants:
        if names and mutant.name not in names:
            continue
        verdict = judge(mutant, silent)
        survivors += not verdict.caught_by
        caught = verdict.caught_by or "NOTHING: it survived"
        print(f"| {mutant.name} | {mutant.what} | {caught} | {verdict.seconds:.0f} |", flush=True)
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
