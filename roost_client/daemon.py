"""What of the daemon this library hands out. It never imports roostd: the installed distribution names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import RoostError


def part_of_daemon(name: str, what: str) -> Callable[..., Any]:
    """Return what the distribution has as the entry point `name`. Raises RoostError: it can't do `what`."""
    from importlib.metadata import entry_points  # takes longer than the whole of `import roost_client` may

    for point in entry_points(group="roost_client", name=name):
        part: Callable[..., Any] = point.load()
        return part
    raise RoostError(f"cannot {what}: the distribution roostd is not installed here; pip install roostd")
