"""A child as the master sees it: its sockets, its pidfd, and what can be done to it. It decides nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Sequence

from roostd import linux
from roostd.core.job import ClaimedJob
from roostd.core.outcome import SoftReason
from roostd.wire.frames import Frame, FrameDecoder
from roostd.wire.packets import (
    DescriptorsLost,
    PacketReader,
    close_all,
    encode_control,
    encode_job,
    lease_of,
    send_packet,
)
from roostd.wire.signals import DUMP, SOFT

_READ_BYTES = 262_144
_DUMP_BYTES = 65_536
_FAULTS = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)  # as faulthandler has them


class ChildProcess:
    """One forked child. `fds` are its ends as template/run.py sends them."""

    def __init__(self, key: int, pid: int, generation: int, pool: str, fds: Sequence[int], max_body_bytes: int) -> None:
        jobs, jobs_read, outcomes, control, self.dump_fd, self.pidfd = fds
        self.key = key
        self.pid = pid
        self.generation = generation
        self.pool = pool
        self.loss: str | None = None  # why it is being killed through no fault of its job
        self.jobs_run = 0
        self.retired = False
        self._dump_of = 0  # the lease that its stacks were asked for last
        self._jobs = socket.socket(fileno=jobs)
        self._jobs.setblocking(False)
        self._jobs_read = socket.socket(fileno=jobs_read)
        self._taken_back = PacketReader(self._jobs_read, wait=False)
        self.outcomes = socket.socket(fileno=outcomes)
        self.outcomes.setblocking(False)
        self._decoder = FrameDecoder(max_body_bytes)
        self._control = socket.socket(fileno=control)
        self._control.setblocking(False)

    def send(self, jobs: Sequence[ClaimedJob]) -> list[int]:
        """Hands over jobs in order; returns the leases that its socket had no room for."""
        for number, job in enumerate(jobs):
            packet, overflow = encode_job(
                job.id,
                job.lease,
                job.attempt,
                job.queue.encode(),
                job.task.encode(),
                job.args.encode(),
                job.timeout_seconds,
                job.labels.encode() if job.labels else b"",
                job.start_by,
            )
            try:
                send_packet(self._jobs, packet, overflow)
            except (BlockingIOError, OSError):
                return [left.lease for left in jobs[number:]]
        return []

    def take_back(self) -> list[int]:
        """Reads what the child has not read yet; returns the leases. What is left with it, it has started."""
        leases: list[int] = []
        while True:
            try:
                received = self._taken_back.read()
            except BlockingIOError:
                return leases
            except DescriptorsLost as lost:  # the arguments, which are here too
                leases.append(lease_of(memoryview(lost.packet)))
                continue
            if received is None:
                return leases
            packet, fds = received
            leases.append(lease_of(packet))
            close_all(fds)

    def read_outcomes(self) -> tuple[list[Frame], bool | None]:
        """The frames that have arrived, and whether there may be more to read now; None at the end of the stream.

        Raises FrameError when what came is no frames.
        """
        try:
            data = self.outcomes.recv(_READ_BYTES)
        except BlockingIOError:
            return [], False
        except OSError:
            return [], None
        frames = self._decoder.feed(data)
        self.jobs_run += len(frames)
        return frames, True if data else None

    def call_off(self, lease: int, reason: SoftReason) -> None:
        """Tells the child which job is meant and why, and wakes it."""
        self._dump_of = 0
        with contextlib.suppress(OSError):
            self._control.send(encode_control(reason, lease))
        self._signal(SOFT)

    def remind(self, lease: int) -> None:
        """Wakes it again, should it wait in C since just after the signal; its stack is noted, should it be stuck.

        Not with the call-off: to a process that runs, the signal that does that is a danger (docs/design/005).
        """
        if self._dump_of != lease:
            self.request_dump(lease)
        self._signal(SOFT)

    def request_dump(self, lease: int) -> None:
        """Has the child write its stacks to the dump file; `lease` is the one it runs, 0 for none."""
        os.ftruncate(self.dump_fd, 0)
        self._dump_of = lease
        self._signal(DUMP)

    def read_dump(self) -> str:
        """What was written to the dump file last: stacks that were asked for, or those of a fatal signal."""
        return os.pread(self.dump_fd, _DUMP_BYTES, 0).decode("utf-8", "replace").replace("\x00", "").strip()

    def last_words(self, lease: int, status: int | None) -> str:
        """The stack in which it died, or hung, under this lease; empty where it left none."""
        died_of_fault = status is not None and -status in _FAULTS
        return self.read_dump() if died_of_fault or self._dump_of == lease else ""

    def retire(self) -> None:
        """Closes the intake: the child ends when it has read all that is in it."""
        self.retired = True
        with contextlib.suppress(OSError):
            self._jobs.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
        except ProcessLookupError:
            return  # it is dead and reaped: the pid may be another process's by now
        linux.kill_tree(self.pid)

    def close(self) -> None:
        for sock in (self._jobs, self._jobs_read, self.outcomes, self._control):
            sock.close()
        close_all([self.dump_fd, self.pidfd])

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, 0)  # raises once it is reaped, and its pid may be another's
            linux.signal_main_thread(self.pid, number)
