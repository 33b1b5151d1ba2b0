"""How the master hands a job to a child, calls a running one off, and talks to a template: packets.

A job is one packet of a SOCK_SEQPACKET pair, and the master keeps a copy of the end that the child reads. The kernel
gives each packet to exactly one reader, so the master takes back what a child has not started by reading it itself:
no shared memory, no acknowledgement, no race. What is too large for a packet stands in a memfd that travels with it.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

# Small enough that a full window of packets (core.pace.MAX_WINDOW, at up to 4.3 kB of kernel memory each) fits the send
# buffer that a kernel allows by default (net.core.wmem_max 212,992 bytes, which it doubles).
INLINE_BYTES = 2_048
_MAX_FDS = 16
_FD_SPACE = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
# Plain integers: as the enum that they are they take 3 µs longer for every packet.
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
_DO_NOT_WAIT = int(socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_TRUNC)
_FDS_MISSING = int(socket.MSG_CTRUNC)

_JOB = struct.Struct("<BBHHIqq")  # kind, flags, bytes of queue, bytes of task, attempt, lease, job id
_IN_MEMFD, _WITH_MORE = 1, 2  # the flags: the body is in a memfd; it begins with what most jobs have not, as follows
_MORE = struct.Struct("<IId")  # timeout in seconds (0: none), bytes of labels, time to start by (0: none)
_CONTROL = struct.Struct("<Bq")


class JobPacket(NamedTuple):
    """`args` and `labels` (tags and metadata; empty for a job without either) are JSON."""

    job_id: int
    lease: int
    attempt: int
    queue: str
    task: str
    args: bytes
    timeout_seconds: int | None = None
    labels: bytes = b""
    start_by: float | None = None  # CLOCK_BOOTTIME after which it is not to start


class DescriptorsLost(OSError):
    """A packet came without the descriptors that were sent with it: this process may open no more files."""

    def __init__(self, packet: bytes) -> None:
        super().__init__("cannot read packet: its descriptors were cut off by the kernel; is RLIMIT_NOFILE reached?")
        self.packet = packet


class PacketReader:
    """Reads packets from one socket with one buffer.

    Whether it waits is said here, not by the socket: O_NONBLOCK would hold for the other process that reads it too.
    """

    def __init__(self, sock: socket.socket, *, wait: bool) -> None:
        self._sock = sock
        self._flags = _RECEIVE if wait else _RECEIVE | _DO_NOT_WAIT
        self._buffer = bytearray(2 * INLINE_BYTES)

    def read(self) -> tuple[memoryview, list[int]] | None:
        """The next packet and the descriptors that came with it, which are the caller's; None at the end.

        The view is valid until the next read. Raises BlockingIOError when there is none and it does not wait, and
        DescriptorsLost when the descriptors of one did not all fit the table of open files; those that did are closed.
        """
        size, ancillary, flags, _ = self._sock.recvmsg_into([self._buffer], _FD_SPACE, self._flags)
        fds: list[int] = []
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                fds.extend(received)
        if flags & _TRUNCATED:
            close_all(fds)
            raise OSError("cannot read packet: it was cut off by the kernel")
        if flags & _FDS_MISSING:
            close_all(fds)
            raise DescriptorsLost(bytes(memoryview(self._buffer)[:size]))
        if size == 0:
            close_all(fds)
            return None
        return memoryview(self._buffer)[:size], fds


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def job_socketpair() -> tuple[socket.socket, socket.socket]:
    """The sending and the reading end of a child's intake, with as large a buffer as is allowed."""
    sender, reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
    return sender, reader


def encode_job(
    job_id: int,
    lease: int,
    attempt: int,
    queue: bytes,
    task: bytes,
    args: bytes,
    timeout_seconds: int | None = None,
    labels: bytes = b"",
    start_by: float | None = None,
) -> tuple[bytes, bytes]:
    """The packet of a job, and what must go with it in a memfd (empty for nearly every job)."""
    flags, body = 0, args
    if timeout_seconds is not None or labels or start_by is not None:
        more = _MORE.pack(timeout_seconds or 0, len(labels), start_by or 0.0)
        flags, body = _WITH_MORE, more + labels + args
    if len(body) <= INLINE_BYTES:
        return _JOB.pack(1, flags, len(queue), len(task), attempt, lease, job_id) + queue + task + body, b""
    return _JOB.pack(1, flags | _IN_MEMFD, len(queue), len(task), attempt, lease, job_id) + queue + task, body


def decode_job(packet: memoryview, fds: list[int]) -> JobPacket:
    """Reads a job's packet, and closes the memfd that came with it."""
    _, flags, queue_bytes, task_bytes, attempt, lease, job_id = _JOB.unpack_from(packet)
    task_start = _JOB.size + queue_bytes
    body_start = task_start + task_bytes
    queue = str(packet[_JOB.size : task_start], "utf-8")
    task = str(packet[task_start:body_start], "utf-8")
    body = read_memfd(fds.pop()) if flags & _IN_MEMFD else bytes(packet[body_start:])
    if not flags & _WITH_MORE:
        return JobPacket(job_id, lease, attempt, queue, task, body)
    timeout_seconds, labels_bytes, start_by = _MORE.unpack_from(body)
    args_start = _MORE.size + labels_bytes
    labels, args = body[_MORE.size : args_start], body[args_start:]
    return JobPacket(job_id, lease, attempt, queue, task, args, timeout_seconds or None, labels, start_by or None)


def lease_of(packet: memoryview) -> int:
    """The lease of a job's packet, without reading the rest."""
    lease: int = _JOB.unpack_from(packet)[5]
    return lease


def send_packet(sock: socket.socket, packet: bytes, overflow: bytes = b"") -> None:
    """Sends a packet whole or not at all. Raises BlockingIOError when the socket is full."""
    if not overflow:
        sock.send(packet)
        return
    fd = write_memfd(overflow)
    try:
        socket.send_fds(sock, [packet], [fd])
    finally:
        os.close(fd)


def encode_control(reason: int, lease: int) -> bytes:
    """Calls off the job under `lease`; `reason` is a core.outcome.SoftReason."""
    return _CONTROL.pack(reason, lease)


def decode_control(packet: bytes) -> tuple[int, int]:
    reason, lease = _CONTROL.unpack(packet)
    return reason, lease


def send_message(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Sends a JSON object (and descriptors) between master and template, whatever its size."""
    body = json.dumps(message).encode()
    if len(body) < INLINE_BYTES:
        socket.send_fds(sock, [b"J" + body], list(fds))
        return
    fd = write_memfd(body)
    try:
        socket.send_fds(sock, [b"M"], [*fds, fd])
    finally:
        os.close(fd)


def decode_message(packet: memoryview, fds: list[int]) -> dict[str, Any]:
    """Reads what send_message sent; the memfd of a large one is taken from the end of `fds` and closed."""
    body = bytes(packet[1:]) if packet[0] == ord("J") else read_memfd(fds.pop())
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError(f"cannot read message: a JSON object is due, not {type(message).__name__}")
    return message


def write_memfd(data: bytes) -> int:
    fd = os.memfd_create("roost", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


def read_memfd(fd: int) -> bytes:
    """All of a memfd, from its beginning; closes it."""
    with open(fd, "rb", buffering=0) as file:
        file.seek(0)
        return file.readall() or b""
