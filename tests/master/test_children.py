"""A child as the master holds it, with ends whose other side is this test."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from roostd.core.job import ClaimedJob
from roostd.master.children import ChildProcess
from roostd.wire.packets import INLINE_BYTES, job_socketpair


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    jobs, jobs_read = job_socketpair()
    outcomes, outcomes_write = socket.socketpair()
    control, control_read = socket.socketpair(type=socket.SOCK_SEQPACKET)
    with outcomes_write, control_read:
        ends = [sock.detach() for sock in (jobs, jobs_read, outcomes, control)]
        fds = [*ends, os.memfd_create("dump"), os.pidfd_open(os.getpid())]
        with closing(ChildProcess(1, os.getpid(), 1, "default", fds, 262_144)) as child:
            yield child


def test_jobs_are_taken_back_also_where_no_more_files_may_be_opened(child: ChildProcess) -> None:
    large = '{"text": "' + "x" * INLINE_BYTES + '"}'
    jobs = [ClaimedJob(n, n + 10, 1, 3, 0, None, "default", "task", args) for n, args in enumerate(["{}", large, "{}"])]
    assert child.send(jobs) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert child.take_back() == [10, 11, 12]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
