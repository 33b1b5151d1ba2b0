"""That each mutant is one still: its patch applies to the code as it is, and it says what it is and what to try."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bench.machine import CHECKOUT
from chaos.mutate import MUTANTS, read_mutant

PATCHES = sorted(MUTANTS.glob("*.patch"))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_mutant_says_what_it_takes_away_and_what_may_notice(patch: Path) -> None:
    mutant = read_mutant(patch)
    assert mutant.what
    assert mutant.tries
    assert all(attempt.startswith(("chaos ", "pytest ")) for attempt in mutant.tries)


@pytest.mark.skipif(shutil.which("git") is None, reason="patches are applied by git")
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_the_patch_of_a_mutant_applies_and_concerns_the_product(patch: Path) -> None:
    command = ["git", "apply", "--numstat", "--check", str(patch)]
    assert subprocess.run(["git", "apply", "--check", str(patch)], cwd=CHECKOUT, check=False).returncode == 0
    concerned = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert concerned
    assert all(line.split("\t")[2].startswith(("roostd/", "roost_client/")) for line in concerned)
