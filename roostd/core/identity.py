"""Who a master is, and whether a row of roost.workers was left by a dead predecessor on this host.

Host name and pid repeat (containers start at pid 1), so a row counts as dead only where this can be told for certain:
the same machine has booted again, or the process is gone or is another one by its start time. Where it can't be told
(another pid namespace), the heartbeat's age decides, as for every other host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Identity:
    """What is known of a master's process; stands in workers.metadata under "identity"."""

    hostname: str
    machine_id: str  # /etc/machine-id; empty where there is none
    boot_id: str  # /proc/sys/kernel/random/boot_id
    pid_namespace: str  # /proc/self/ns/pid
    pid: int
    started_ticks: int  # field 22 of /proc/PID/stat: clock ticks from boot to the process's start

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def is_dead_predecessor(metadata: dict[str, Any], me: Identity, started_ticks_of: Callable[[int], int | None]) -> bool:
    """Whether the row with this metadata belongs to a process that is certainly dead.

    `started_ticks_of` gives a live process's start time, None where there is no such process; it raises PermissionError
    where that is hidden.
    """
    try:
        other = Identity(**metadata["identity"])
    except (KeyError, TypeError):
        return False
    if other.hostname != me.hostname or other.machine_id != me.machine_id:
        return False
    if other.boot_id != me.boot_id:
        return bool(me.machine_id)
    if other.pid_namespace != me.pid_namespace:
        return False
    try:
        return started_ticks_of(other.pid) != other.started_ticks
    except PermissionError:
        return False
