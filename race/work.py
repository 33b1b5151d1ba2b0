"""One worker process of a competitor that has no command line of its own: `python -m race.work NAME CHILDREN`."""

from __future__ import annotations

import importlib
import sys


def command(name: str, children: int) -> list[str]:
    return [sys.executable, "-m", "race.work", name, str(children)]


if __name__ == "__main__":
    importlib.import_module(f"race.peers.{sys.argv[1]}").run(int(sys.argv[2]))
