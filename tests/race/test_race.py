"""That the race counts right, writes its report, and runs with Roost itself, in numbers too small to mean anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.figures import percentile
from bench.machine import CHECKOUT
from race import __main__ as race_main
from race import crowd, figures, ledger, report, svg
from race.__main__ import joined
from race.drain import rate
from race.harm import outcome
from race.latency import waits
from race.ledger import Event, Ledger, Record
from race.rig import Entrant
from tests.interrupted import interrupt_once_children_run

MILLISECOND = 1_000_000


def done(number: int, at_ms: int, pid: int = 1, event: Event = Event.DONE) -> Record:
    return Record(number, pid, at_ms * MILLISECOND, event)


def test_what_processes_write_to_the_ledger_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Ledger(tmp_path / "ledger")
    monkeypatch.setenv(ledger.PATH_VARIABLE, str(book.path))
    code = "from race import ledger; [ledger.write(ledger.Event.DONE, number) for number in range(1000)]"
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=CHECKOUT) for _ in range(2)]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    assert len(book) == 2000
    assert sorted(record.number for record in book.read()) == sorted([*range(1000), *range(1000)])
    assert {record.pid for record in book.read()} == {writer.pid for writer in writers}
    book.clear()
    assert len(book) == 0


def test_the_clock_of_a_drain_starts_when_all_children_are_at_work() -> None:
    early = [done(number, 100 * number) for number in range(3)]
    both = [done(3 + number, 1000 + number, pid=1 + number % 2) for number in range(11)]
    # The second process is first seen at 1001 ms; ten jobs follow in 9 ms.
    assert rate([*early, *both], 2, 14) == pytest.approx(9 / 0.009)


def test_the_clock_of_a_drain_starts_with_the_first_job_where_one_child_did_most() -> None:
    records = [done(number, number) for number in range(10)] + [done(10, 10, pid=2)]
    assert rate(records, 2, 11) == pytest.approx(10 / 0.010)


def test_the_clock_of_a_drain_stops_when_the_last_job_is_recorded_as_done() -> None:
    records = [done(0, 0, pid=1), done(1, 0, pid=2), done(2, 1)]
    assert rate(records, 2, 3, recorded_at=4 * MILLISECOND) == pytest.approx(1 / 0.004)


def test_a_wait_is_from_the_call_to_the_first_start() -> None:
    called = [done(1, 0, event=Event.CALLED), done(2, 50, event=Event.CALLED)]
    assert waits([*called, done(2, 52), done(1, 5), done(1, 90)]) == [2, 5]
    assert percentile([1, 2, 3, 4], 50) == 2
    assert percentile([1, 2, 3, 4], 99) == 4


def test_only_the_harmless_jobs_are_counted() -> None:
    begun = [done(number, 0, event=Event.BEGAN) for number in (1, 2, 2, 3, 20)]
    assert outcome([*begun, done(1, 1), done(2, 1), done(20, 1)]) == {"finished": 2, "cut": 1, "twice": 1}


SAMPLES = {"roost": {"noops": [90.0, 110.0, 100.0], "pickup_50": [3.0]}, "other": {"noops": [50.0], "pickup_50": [2.0]}}
RESULTS: dict[str, Any] = {
    "machine": {
        "commit": "0123456789ab",
        "cores": "2",
        "processor": "a processor",
        "kernel": "6",
        "Python": "3.13",
        "PostgreSQL": "18: fsync on",
        "Redis": "7",
        "load at start": "0.1",
        "load at end": "0.2",
    },
    "scale": {"children": 2, "rounds": 3},
    "entrants": {
        name: {
            "label": label,
            "store": "PostgreSQL",
            "isolation": "none",
            "settings": "",
            "timeout": "",
            "rescue": "at once",
            "hang_setting": "",
            "versions": {label: "1"},
        }
        for name, label in (("roost", "Roost"), ("other", "Other & Sons"))
    },
    "skipped": {"third": "it is not installed"},
    "problems": {"roost": {}, "other": {"hang": "it did not start"}},
    "samples": SAMPLES,
}


def test_the_table_has_the_medians_with_the_best_in_bold() -> None:
    rows = figures.table({"roost": "Roost", "other": "Other"}, SAMPLES)
    assert rows == [
        ["", "Roost", "Other"],
        ["drain of no-ops, jobs/s", "**100**", "50"],
        ["pickup latency, median, ms", "3", "**2**"],
    ]
    assert figures.text(rows).splitlines()[1].split() == ["drain", "of", "no-ops,", "jobs/s", "100", "50"]


def test_a_single_sample_is_not_called_a_median() -> None:
    assert figures.said(SAMPLES) == [
        "Medians of 3 samples, the competitors in turn: drain of no-ops.",
        "One sample: pickup latency, median.",
    ]
    assert figures.spread(SAMPLES, "noops") == {"roost": "90 – 110"}


def test_a_crowd_is_counted_while_all_of_it_is_there() -> None:
    together = [done(number, 500 * number) for number in range(1, 5)]
    assert crowd.rate([done(0, 0, event=Event.CALLED), *together], Event.DONE, 1.2) == pytest.approx(3 / 1.2)


def test_the_time_it_takes_is_told_from_who_takes_part() -> None:
    redis = Entrant("one", "One", "Redis", "", "", "", "", "", "", "", {})
    entrants = {"one": redis, "two": replace(redis, store="PostgreSQL")}
    warm_up, noops, backlog = (race_main.SECONDS[name][1] for name in ("warm-up", "noops", "backlog"))
    told = race_main.estimate(entrants, ["noops", "backlog"], 5, quick=False)
    assert told == 2 * warm_up + 10 * noops + backlog


def test_who_looks_equal_in_the_table_is_equally_good() -> None:
    most = figures.FIGURES[0]
    assert figures.winners(most, {"one": 1000.2, "two": 999.9, "three": 900}) == {"one", "two"}


def test_a_figure_is_well_formed_with_a_bar_for_each_in_proportion() -> None:
    drawing = svg.bars(
        "A & B", [svg.Bar("one", 10, "10 /s", own=True), svg.Bar("<two>", 5, "5 /s"), svg.Bar("no", 0, "0")]
    )
    root = ElementTree.fromstring(drawing)
    rectangles = root.findall("{http://www.w3.org/2000/svg}rect")
    widths = [float(rectangle.attrib["width"]) for rectangle in rectangles]
    assert widths[0] == pytest.approx(2 * widths[1])
    assert widths[2] == 1
    assert rectangles[0].attrib["class"] == "own"
    assert "<two>" in "".join(root.itertext())


def test_the_report_says_who_wins_and_who_is_missing() -> None:
    text = report.section(RESULTS)
    assert "pickup latency, median: Other & Sons 2 ms, Roost 3" in text
    assert "drain of no-ops: " not in text.partition("![")[0].partition("Where another")[2]
    assert "third: skipped: it is not installed" in text
    assert "Other & Sons, hang: it did not start" in text
    assert set(report.drawings(RESULTS)) == {"noops", "pickup_50"}
    assert "](race/noops.svg)" in text


def test_results_of_another_run_stay_where_the_new_one_has_none() -> None:
    new = RESULTS | {
        "entrants": {"third": RESULTS["entrants"]["other"], "roost": RESULTS["entrants"]["roost"]},
        "skipped": {},
        "measures": ["noops", "hang"],
        "problems": {"third": {}, "roost": {}},
        "samples": {"third": {"noops": [1.0]}, "roost": {"noops": [200.0]}},
    }
    old = RESULTS | {
        "problems": {"roost": {"hang": "it hung", "crash": "it broke"}, "other": {"hang": "it did not start"}}
    }
    both = joined(old, new)
    assert both["samples"]["roost"] == {"noops": [200.0], "pickup_50": [3.0]}
    assert set(both["samples"]) == {"roost", "other", "third"}
    assert both["skipped"] == {}
    assert both["problems"] == {"roost": {"crash": "it broke"}, "other": {"hang": "it did not start"}, "third": {}}


def test_the_report_leaves_the_rest_of_the_document_alone() -> None:
    document = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.replaced(document, "new\n") == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="lacks the markers"):
        report.replaced("no markers", "new")


@pytest.mark.daemon
@pytest.mark.database
@pytest.mark.timeout(300)
def test_the_race_runs_with_roost_alone(tmp_path: Path) -> None:
    path = tmp_path / "race.json"
    asked = ("noops", "burns", "latency", "enqueue", "crowd", "memory", "hang", "crash", "backlog")
    race = subprocess.run(
        [sys.executable, "-m", "race", "--quick", "--only", "roost", "--json", str(path)]
        + [word for name in asked for word in ("--measure", name)],
        cwd=CHECKOUT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert race.returncode == 0, race.stderr
    kept = json.loads(path.read_text())
    assert kept["problems"] == {"roost": {}}, race.stderr
    found = {key: values[0] for key, values in kept["samples"]["roost"].items()}
    assert all(
        found[key] > 0
        for key in ("noops", "burns", "pickup_99", "enqueue_many", "crowd_ratio", "memory_few", "backlog_ratio")
    )
    # All of them where there is time: on a busy machine the short race may end before the last. Where nothing ends what
    # hangs it is a fifth, however much time there is.
    assert min(found["hang_finished"], found["crash_finished"]) > 50
    assert (found["crash_cut"], found["crash_twice"]) == (0, 0)
    assert report.section(kept)
    assert [left.name for left in tmp_path.iterdir()] == ["race.json"]


@pytest.mark.daemon
@pytest.mark.database
@pytest.mark.timeout(300)
def test_an_interrupted_race_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    pid = interrupt_once_children_run(
        "race", ["--quick", "--only", "roost", "--json", str(tmp_path / "race.json")], tmp_path
    )
    assert not (Path("/dev/shm") / f"roost-race-{pid}").exists()
