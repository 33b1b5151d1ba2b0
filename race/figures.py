"""What is measured and in what unit, and how samples become one number and numbers a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Samples = Mapping[str, Mapping[str, Sequence[float]]]  # by competitor, then by figure


@dataclass(frozen=True, slots=True)
class Figure:
    """`best` is "most", "least", or "neither" for what says nothing of who is better."""

    key: str
    title: str
    unit: str
    best: str = "most"


FIGURES = (
    Figure("noops", "drain of no-ops", "jobs/s"),
    Figure("burns", "drain of jobs of 1 ms CPU", "jobs/s"),
    Figure("pickup_50", "pickup latency, median", "ms", "least"),
    Figure("pickup_95", "pickup latency, 95th percentile", "ms", "least"),
    Figure("pickup_99", "pickup latency, 99th percentile", "ms", "least"),
    Figure("enqueue_single", "enqueue, one by one", "jobs/s"),
    Figure("enqueue_many", "enqueue, in bulk", "jobs/s"),
    Figure("crowd_rate", "enqueue, one by one, 8 clients at once", "jobs/s"),
    Figure("crowd_ratio", "… relative to 1 client", "times"),
    Figure("memory_few", "memory of all workers, 2 children", "MB", "least"),
    Figure("memory_many", "memory of all workers, 16 children", "MB", "least"),
    Figure("hang_finished", "others finished beside hangs", "%"),
    Figure("hang_finished_unset", "… with nothing set for hangs", "%"),
    Figure("crash_finished", "others finished beside crashes", "%"),
    Figure("crash_cut", "others begun but not finished beside crashes", "jobs", "least"),
    Figure("crash_twice", "others begun twice beside crashes", "jobs", "least"),
    Figure("backlog_rate", "drain beside 1,000,000 waiting", "jobs/s"),
    Figure("backlog_ratio", "… relative to none waiting", "%"),
    Figure("horizon_dead", "dead rows under a pinned horizon", "rows", "neither"),
    Figure("horizon_rate", "drain under a pinned horizon", "jobs/s"),
    Figure("horizon_rate_ratio", "… relative to after it", "%"),
    Figure("horizon_pickup", "pickup latency under a pinned horizon, median", "ms", "least"),
    Figure("horizon_pickup_ratio", "… relative to after it", "%", "least"),
)


def medians(samples: Samples, key: str) -> dict[str, float]:
    """The median of each competitor that has samples of this figure."""
    return {name: statistics.median(found[key]) for name, found in samples.items() if found.get(key)}


def spread(samples: Samples, key: str) -> dict[str, str]:
    """The lowest and the highest sample of each competitor that has several of this figure."""
    return {
        name: f"{number(min(found[key]))} – {number(max(found[key]))}"
        for name, found in samples.items()
        if len(found.get(key, ())) > 1
    }


def said(samples: Samples) -> list[str]:
    """Which figures are medians, and of how many samples; who has fewer has failed in some rounds."""
    counts: dict[int, list[str]] = {}
    for figure in FIGURES:
        count = max((len(own.get(figure.key, ())) for own in samples.values()), default=0)
        if count and not figure.title.startswith("…"):
            counts.setdefault(count, []).append(figure.title)
    return [
        ("One sample: " if count == 1 else f"Medians of {count} samples, the competitors in turn: ")
        + f"{'; '.join(titles)}."
        for count, titles in sorted(counts.items(), reverse=True)
    ]


def winners(figure: Figure, values: Mapping[str, float]) -> set[str]:
    """Who is best; all of them where the table shows no difference."""
    if not values or figure.best == "neither":
        return set()
    best = (max if figure.best == "most" else min)(values.values())
    return {name for name, value in values.items() if number(value) == number(best)}


def table(labels: Mapping[str, str], samples: Samples) -> list[list[str]]:
    """A row for each figure that was measured, a column for each competitor; the best are in bold."""
    rows = [["", *labels.values()]]
    for figure in FIGURES:
        values = medians(samples, figure.key)
        if not values:
            continue
        best = winners(figure, values)
        cells = [
            "" if name not in values else f"**{number(values[name])}**" if name in best else number(values[name])
            for name in labels
        ]
        rows.append([f"{figure.title}, {figure.unit}", *cells])
    return rows


def text(rows: Sequence[Sequence[str]]) -> str:
    """The table in columns for a terminal."""
    plain = [[cell.replace("**", "") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in plain) for column in range(len(plain[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in plain
    )


def number(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"
