"""Roost's supervisor daemon: runs jobs from PostgreSQL in child processes that it can stop and kill."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roostd.worker import Worker

__version__ = "0.1.0"
__all__ = ["Worker", "__version__"]


def __getattr__(name: str) -> Any:
    # Not before somebody asks: the processes that import this package need next to nothing of it.
    if name == "Worker":
        from roostd.worker import Worker

        return Worker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
