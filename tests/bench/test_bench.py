"""That the benchmark runs, with numbers too small to mean anything, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.figures import Aim, Figure, median_ratio, table
from bench.machine import CHECKOUT
from tests.interrupted import interrupt_once_children_run


def test_a_figure_says_whether_its_aim_is_met() -> None:
    assert Figure("", 20_000, "jobs/s", Aim("≥", 20_000)).verdict == "yes"
    assert Figure("", 19_999, "jobs/s", Aim("≥", 20_000)).verdict == "NO"
    assert Figure("", 3.1, "ms", Aim("≤", 3)).verdict == "NO"
    assert Figure("", 1, "").verdict == ""


def test_rounds_are_compared_with_their_neighbours_not_with_the_median_of_all() -> None:
    assert median_ratio("", [50, 10, 60], [100, 20, 30], "%").samples == [50, 50, 200]
    assert median_ratio("", [50, 10, 60], [100, 20, 30]).value == 0.5


def test_the_table_has_a_line_for_each_figure() -> None:
    lines = table({"cores": 2}, [Figure("drain", 21_000.4, "jobs/s", Aim("≥", 20_000), [20_000, 22_000])]).splitlines()
    assert lines[0] == "cores: 2"
    assert lines[-1].split() == ["drain", "21,000", "jobs/s", "20,000", "to", "22,000", "≥", "20,000", "yes"]


@pytest.mark.daemon
@pytest.mark.database
@pytest.mark.timeout(300)
def test_the_measurements_run_and_are_kept(tmp_path: Path) -> None:
    measured = ("drain", "latency", "waiting", "enqueue", "crowd", "following", "cron", "operating", "memory")
    only = [word for name in measured for word in ("--only", name)]
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", *only, "--json", str(path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(path.read_text())
    names = [figure["name"] for figure in kept["figures"]]
    assert {
        "floor",
        "drain",
        "pickup latency, median",
        "enqueue and wait_for, median",
        "50 cron entries fired",
        "jobs of 5,000: discarded",
        "connections with 2 children",
    } <= set(names)
    assert all(figure["value"] > 0 for figure in kept["figures"])
    assert all(name in done.stdout for name in names)
    assert kept["machine"]["settings"].startswith("fsync on, synchronous_commit on")


@pytest.mark.daemon
@pytest.mark.database
@pytest.mark.timeout(300)
def test_an_interrupted_benchmark_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    options = ["--quick", "--only", "idle", "--json", str(tmp_path / "figures.json")]
    interrupt_once_children_run("bench", options, tmp_path)
