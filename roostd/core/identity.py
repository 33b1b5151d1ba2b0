"""Who a master is, and whether a row of roost.workers was left by a dead predecessor on this host.

Host name and pid repeat (containers start at pid 1), so a row counts as dead only where this can be told for certain:
the same machine has booted since, or the process is gone or is another one by its start time. Host name and machine id
repeat too, among clones of one image: a row of another boot is of an earlier one only if it was last heard of before
this one. Where it can't be told, the heartbeat's age decides, as for every other host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# How far the database's clock, which dates a heartbeat, and the host's, which dates its boot, may run apart.
CLOCK_MARGIN_SECONDS = 2.0


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


def is_dead_predecessor(
    metadata: dict[str, Any],
    silent_seconds: float,
    me: Identity,
    *,
    uptime_seconds: float,
    heartbeat_interval: float,
    started_ticks_of: Callable[[int], int | None],
) -> bool:
    """Whether the row with this metadata, last heard of `silent_seconds` ago, belongs to a process that is dead.

    `uptime_seconds` is the age of this host's boot. On a host that booted within the last `heartbeat_interval`, a clone
    may be alive and not have been heard of since. `started_ticks_of` gives a live process's start time, None where
    there is no such process; it raises PermissionError where that is hidden.
    """
    try:
        other = Identity(**metadata["identity"])
    except (KeyError, TypeError):
        return False
    if other.hostname != me.hostname or other.machine_id != me.machine_id:
        return False
    if other.boot_id != me.boot_id:
        silent_since_boot = silent_seconds > max(uptime_seconds, heartbeat_interval) + CLOCK_MARGIN_SECONDS
        return bool(me.machine_id) and silent_since_boot
    if other.pid_namespace != me.pid_namespace:
        return False
    try:
        return started_ticks_of(other.pid) != other.started_ticks
    except PermissionError:
        return False
