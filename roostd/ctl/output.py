"""How results look: on a terminal tables with colours, off it plain text that stays the same, and JSON.

Text from the database may hold anything, such as what steers a terminal, so every character that is not printable is
shown as an escape.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import click
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {
    "available": "blue",
    "executing": "cyan",
    "retryable": "yellow",
    "completed": "green",
    "discarded": "red",
    "cancelled": "magenta",
    "paused": "yellow",
    "pending": "yellow",
    "altered": "red",
    "unknown": "red",
    "disabled": "yellow",
    "failed": "red",
    "ok": "green",
}


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under their column names; None is shown as a dash, numbers stand on the right."""
    values = [list(row) for row in rows]
    cells = [[_cell(value) for value in row] for row in values]
    is_right = [any(isinstance(row[n], int | timedelta) for row in values) for n in range(len(columns))]
    if sys.stdout.isatty():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column, right in zip(columns, is_right, strict=True):
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for line in cells:
            table.add_row(*(Text(text, _STYLES.get(text, "")) for text in line))
        Console().print(table)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_right, strict=True)
        ]
        click.echo("  ".join(padded).rstrip())


def print_json(value: object) -> None:
    """Print a value as JSON: the elements of a list on a line each."""
    if isinstance(value, list):
        click.echo("[" + ",".join("\n" + _json_text(item) for item in value) + ("\n]" if value else "]"))
    else:
        click.echo(_json_text(value))


def note(message: str) -> None:
    """Print a message to stderr."""
    click.echo(f"roostctl: {message}", err=True)


def printable(text: str) -> str:
    """The text on one line, with nothing in it that steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def shorten(text: str, length: int = 80) -> str:
    first = text.partition("\n")[0]
    return first if len(first) <= length else first[: length - 1] + "…"


def time_text(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age_text(age: timedelta) -> str:
    """A duration in its largest unit: 4s, 12m, 3h, 2d."""
    seconds = max(0, int(age.total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def compact_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _cell(value: object) -> str:
    match value:
        case None | "":
            return "-"
        case datetime():
            return time_text(value)
        case timedelta():
            return age_text(value)
        case _:
            return printable(str(value))


def _json_text(value: object) -> str:
    try:
        return json.dumps(value, default=_plain, allow_nan=False)
    except ValueError:
        # jsonb holds numbers that Python reads as infinite, and JSON has no word for that.
        readable = json.loads(json.dumps(value, default=_plain), parse_constant=str)
        return json.dumps(readable)


def _plain(value: object) -> object:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat()
        case UUID():
            return str(value)
        case timedelta():
            return value.total_seconds()
        case BaseModel() | Mapping():
            return dict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
