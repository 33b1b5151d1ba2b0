"""Writes the race into docs/performance.md, and its figures beside it, from the results that `python -m race` kept.

`python -m race.report`. Only what is between the two markers is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from race.figures import FIGURES, Figure, medians, number, said, spread, table, winners
from race.svg import Bar, bars

BEGIN = "<!-- race: written by python -m race.report -->"
END = "<!-- race: end -->"
DRAWN = (
    *("noops", "burns", "pickup_50", "pickup_99", "enqueue_single", "enqueue_many", "crowd_ratio", "memory_many"),
    *("hang_finished", "crash_finished", "backlog_ratio", "horizon_rate_ratio", "horizon_pickup"),
)
OWN = "roost"
_DOCUMENT = Path("docs/performance.md")
_RESULTS = Path("race/results/race.json")
_FOLDER = "race"  # of the figures, beside the document


def main() -> None:
    results = json.loads(_RESULTS.read_text())
    document = _DOCUMENT.read_text()
    folder = _DOCUMENT.parent / _FOLDER
    folder.mkdir(exist_ok=True)
    figures = drawings(results)
    for path in folder.glob("*.svg"):
        if path.stem not in figures:
            path.unlink()
    for name, drawing in figures.items():
        (folder / f"{name}.svg").write_text(drawing)
    try:
        _DOCUMENT.write_text(replaced(document, section(results)))
    except ValueError as error:
        sys.exit(f"cannot write {_DOCUMENT}: {error}")


def replaced(document: str, text: str) -> str:
    """The document with `text` between its markers. Raises ValueError where they are missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def drawings(results: Mapping[str, Any]) -> dict[str, str]:
    """An SVG for each figure that is drawn and was measured."""
    found = {}
    for figure in FIGURES:
        values = medians(results["samples"], figure.key)
        if figure.key in DRAWN and values:
            order = sorted(values, key=lambda name: values[name], reverse=figure.best == "most")
            rows = [
                Bar(_label(results, name), values[name], f"{number(values[name])} {figure.unit}", own=name == OWN)
                for name in order
            ]
            found[figure.key] = bars(
                f"{_capital(figure.title)} ({'more' if figure.best == 'most' else 'less'} is better)", rows
            )
    return found


def section(results: Mapping[str, Any]) -> str:
    labels = {name: entrant["label"] for name, entrant in results["entrants"].items()}
    parts = [_machine(results), _table(table(labels, results["samples"]))]
    if spreads := _spreads(results):
        parts.append("The lowest and the highest sample:\n\n" + _table(spreads))
    if outcome := _outcome(results):
        parts.append(outcome)
    parts.append(
        "\n".join(
            f"![{figure.title}]({_FOLDER}/{figure.key}.svg)\n" for figure in FIGURES if _is_drawn(results, figure)
        )
    )
    parts.append(_entrants(results))
    if missing := _missing(results):
        parts.append(missing)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _is_drawn(results: Mapping[str, Any], figure: Figure) -> bool:
    return figure.key in DRAWN and bool(medians(results["samples"], figure.key))


def _machine(results: Mapping[str, Any]) -> str:
    machine, scale = results["machine"], results["scale"]
    return (
        f"Roost of commit {machine['commit']}. "
        f"Machine: {machine['cores']} cores of {machine['processor']}, Linux {machine['kernel']}, "
        f"Python {machine['Python']}, load {machine['load at start']} at the start and {machine['load at end']} "
        f"at the end. PostgreSQL {machine['PostgreSQL']}. Redis {machine['Redis']}. {scale['children']} children each. "
        + " ".join(said(results["samples"]))
    )


def _table(rows: list[list[str]]) -> str:
    """In Markdown, on its side: there are more competitors than a page is wide."""
    turned = [list(column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in turned]
    return "\n".join([lines[0], "|---" * len(turned[0]) + "|", *lines[1:]])


def _spreads(results: Mapping[str, Any]) -> list[list[str]]:
    entrants = results["entrants"]
    rows = []
    for figure in FIGURES:
        if found := spread(results["samples"], figure.key):
            rows.append([f"{figure.title}, {figure.unit}", *(found.get(name, "") for name in entrants)])
    return [["", *(_label(results, name) for name in entrants)], *rows] if rows else []


def _outcome(results: Mapping[str, Any]) -> str:
    """Where another is ahead of us, and by how much."""
    lines = []
    for figure in FIGURES:
        values = medians(results["samples"], figure.key)
        best = winners(figure, values)
        if best and OWN in values and OWN not in best:
            leader = min(best)
            lines.append(
                f"- {figure.title}: {_label(results, leader)} {number(values[leader])} {figure.unit}, "
                f"{_label(results, OWN)} {number(values[OWN])}."
            )
    return "Where another is ahead:\n\n" + "\n".join(lines) if lines else ""


def _entrants(results: Mapping[str, Any]) -> str:
    lines = [
        "| | store | what a job shares its process with | settings | timeout | jobs of a dead process | versions |",
        "|---|---|---|---|---|---|---|",
    ]
    for entrant in results["entrants"].values():
        versions = ", ".join(f"{name} {version}" for name, version in entrant["versions"].items())
        cells = (
            entrant["label"],
            entrant["store"],
            entrant["isolation"],
            entrant["settings"] + (f"; for hangs {entrant['hang_setting']}" if entrant["hang_setting"] else ""),
            entrant["timeout"],
            entrant["rescue"],
            versions,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _missing(results: Mapping[str, Any]) -> str:
    lines = [f"- {name}: skipped: {reason}" for name, reason in results["skipped"].items()]
    for name, problems in results["problems"].items():
        lines += [f"- {_label(results, name)}, {measure}: {reason}" for measure, reason in problems.items()]
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


def _label(results: Mapping[str, Any], name: str) -> str:
    return str(results["entrants"][name]["label"])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    main()
