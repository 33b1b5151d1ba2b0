"""How much memory do all worker processes take together when they have run something and stand idle?

Memory is PSS: a page that n processes share counts 1/n in each, so that the sum is what they take together.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from race.latency import warm_up
from race.rig import Place
from race.scale import Scale


def measure(place: Place, scale: Scale, _pace: float) -> dict[str, float]:
    few, many = (_idle(place, scale, children) for children in (scale.children, scale.many_children))
    return {"memory_few": few, "memory_many": many}


def _idle(place: Place, scale: Scale, children: int) -> float:
    with place.workers(children) as workers:
        warm_up(place, workers, scale, children)
        return sum(map(_pss_mb, workers.pids()))


def _pss_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0  # it ended meanwhile
