"""A master that may open no more files: it says so, and keeps what it has."""

from __future__ import annotations

import os
import resource
import signal

from tests.system.conftest import StartDaemon
from tests.system.daemon import Daemon
from tests.system.jobs import Jobs


def leave_room(daemon: Daemon, number: int) -> None:
    """Lets the master open `number` more files and no others, whichever places in its table are free."""
    used = set(map(int, os.listdir(f"/proc/{daemon.pid}/fd")))
    free = [place for place in range(len(used) + number) if place not in used]
    limit = free[number - 1] + 1
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, hard))


def test_a_child_that_the_master_has_no_room_for_is_refused_and_asked_for_again(
    start_daemon: StartDaemon, jobs: Jobs
) -> None:
    daemon = start_daemon()
    template = daemon.wait_template()
    children = daemon.wait_children(2)
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    leave_room(daemon, 3)
    daemon.signal(signal.SIGTTIN)
    refused = daemon.wait_for("child.refused")
    assert "RLIMIT_NOFILE" in refused["error"]
    daemon.wait_for("child.refused", since=daemon.mark())
    assert not daemon.entries("template.died")
    jobs.wait_all(jobs.add_many(100, "whoami"))
    assert set(daemon.wait_children(2)) == set(children), "what could not be taken in has ended"

    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert set(daemon.wait_children(3)) > set(children)
    assert daemon.templates() == [template]
