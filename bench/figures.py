"""What was measured, beside what was aimed at: the table and the JSON file."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_COMPARISONS = {"≥": operator.ge, "≤": operator.le}


@dataclass(frozen=True, slots=True)
class Aim:
    """`comparison` is "≥" or "≤"."""

    comparison: str
    value: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `samples` are the measurements that `value` sums up, in their order."""

    name: str
    value: float
    unit: str
    aim: Aim | None = None
    samples: Sequence[float] = field(default=())

    @property
    def verdict(self) -> str:
        if self.aim is None:
            return ""
        return "yes" if _COMPARISONS[self.aim.comparison](self.value, self.aim.value) else "NO"


def median(name: str, samples: Sequence[float], unit: str, aim: Aim | None = None) -> Figure:
    return Figure(name, statistics.median(samples), unit, aim, samples)


def median_ratio(
    name: str, samples: Sequence[float], baseline: Sequence[float], unit: str = "", aim: Aim | None = None
) -> Figure:
    """Each sample to the one of the baseline that was measured next to it; in percent if that is the unit."""
    scale = 100 if unit == "%" else 1
    return median(name, [scale * one / other for one, other in zip(samples, baseline, strict=True)], unit, aim)


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The nearest rank: the smallest value that `percent` % of all do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def table(machine: dict[str, Any], figures: Sequence[Figure]) -> str:
    rows = [("", "measured", "lowest to highest", "aim", "met")]
    for figure in figures:
        spread = f"{_number(min(figure.samples))} to {_number(max(figure.samples))}" if len(figure.samples) > 1 else ""
        aim = f"{figure.aim.comparison} {_number(figure.aim.value)}" if figure.aim else ""
        rows.append((figure.name, f"{_number(figure.value)} {figure.unit}".strip(), spread, aim, figure.verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{key}: {value}" for key, value in machine.items()]
    lines.append("")
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def write_json(path: Path, machine: dict[str, Any], figures: Sequence[Figure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(figure) | {"met": figure.verdict} for figure in figures]
    path.write_text(json.dumps({"machine": machine, "figures": rows}, indent=1, ensure_ascii=False) + "\n")


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
