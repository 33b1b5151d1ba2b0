"""How much memory do master, template and children take, and how many connections, however many children there are?

Memory is PSS: a page that n processes share counts 1/n in each, so that the sum is what they take together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench.figures import Aim, Figure, median
from bench.rig import CHILDREN, Rig, connect, value, wait_until
from bench.scale import Scale
from roost_client import JobInsert, Roost

WARM_UP_JOBS = 500  # so that the children have run something

_CONNECTIONS = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND starts_with(application_name, 'roostd ')
"""


def measure(rig: Rig, scale: Scale) -> Iterator[Figure]:
    totals = {}
    for count in (CHILDREN, scale.many_children):
        with rig.database() as dsn, rig.daemon(dsn, children=count) as daemon:
            connections = _warm_up(dsn)
            template, children = _pss_mb(daemon.template), [_pss_mb(pid) for pid in daemon.children]
            totals[count] = template + sum(children)
            if count == CHILDREN:
                yield Figure("memory of the master", _pss_mb(daemon.pid), "MB PSS")
            yield Figure(f"memory of the template of {count} children", template, "MB PSS")
            yield median(f"memory of each of {count} idle children", children, "MB PSS")
            yield Figure(f"connections with {count} children", connections, "", Aim("≤", 4))
    more = (totals[scale.many_children] - totals[CHILDREN]) / (scale.many_children - CHILDREN)
    yield Figure("memory that one child more takes", more, "MB PSS", Aim("≤", 10))


def _warm_up(dsn: str) -> int:
    """Has the children run something, and waits until nothing is left to do; returns the daemon's connections."""
    with connect(dsn) as conn, Roost(dsn) as roost:
        roost.enqueue_many([JobInsert("noop")] * WARM_UP_JOBS)
        wait_until(conn, "SELECT count(*) >= %s FROM roost.jobs WHERE state = 'completed'", WARM_UP_JOBS, seconds=30)
        return int(value(conn, _CONNECTIONS))


def _pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"the kernel gives no PSS of process {pid}")
