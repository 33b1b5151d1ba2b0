"""Jobs as packets, whatever their size; what is taken back; no descriptor lost on the way."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.core.pace import MAX_WINDOW
from roostd.wire.packets import (
    INLINE_BYTES,
    DescriptorsLost,
    JobPacket,
    PacketReader,
    close_all,
    decode_control,
    decode_job,
    decode_message,
    encode_control,
    encode_job,
    job_socketpair,
    lease_of,
    read_memfd,
    send_message,
    send_packet,
    write_memfd,
)

INT8 = st.integers(-(2**63), 2**63 - 1)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=128)
SIZES = [0, 1, INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, 2 * INLINE_BYTES, 65_536, 1 << 20]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    sender, reader = job_socketpair()
    with sender, reader:
        yield sender, reader


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def send(sock: socket.socket, job: JobPacket) -> None:
    queue, task = job.queue.encode(), job.task.encode()
    packet, overflow = encode_job(
        job.job_id, job.lease, job.attempt, queue, task, job.args, job.timeout_seconds, job.labels, job.start_by
    )
    send_packet(sock, packet, overflow)


def received(reader: PacketReader) -> tuple[memoryview, list[int]]:
    packet = reader.read()
    assert packet is not None
    return packet


# -- jobs


@given(
    st.builds(
        JobPacket,
        job_id=INT8,
        lease=INT8,
        attempt=st.integers(0, 2**31 - 1),
        queue=NAMES,
        task=NAMES,
        args=st.binary(max_size=200) | st.sampled_from(SIZES).map(lambda size: b"x" * size),
        timeout_seconds=st.none() | st.integers(1, 2**31 - 1),
        labels=st.just(b"") | st.binary(max_size=200) | st.sampled_from(SIZES).map(lambda size: b"y" * size),
        start_by=st.none() | st.floats(1, 1e12),
    )
)
def test_every_job_arrives_as_it_was_sent(job: JobPacket) -> None:
    sender, reader_end = job_socketpair()
    with sender, reader_end:
        send(sender, job)
        packet, fds = received(PacketReader(reader_end, wait=False))
        assert lease_of(packet) == job.lease
        assert decode_job(packet, fds) == job
        assert fds == []


@pytest.mark.parametrize("size", SIZES)
def test_only_what_is_too_large_for_a_packet_travels_in_a_memfd(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    sender, reader_end = pair
    job = JobPacket(1, 2, 3, "q" * 128, "t" * 128, os.urandom(size))
    send(sender, job)
    packet, fds = received(PacketReader(reader_end, wait=False))
    assert len(fds) == (size > INLINE_BYTES)
    assert decode_job(packet, fds) == job


def test_the_longest_names_and_the_largest_inline_arguments_fit_the_buffer(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sender, reader_end = pair
    job = JobPacket(1, 2, 3, "🦉" * 128, "🐦" * 128, b"x" * (INLINE_BYTES - 16), start_by=1.5)
    send(sender, job)
    assert decode_job(*received(PacketReader(reader_end, wait=False))) == job


def test_a_job_without_tags_metadata_and_timeout_pays_no_byte_for_them() -> None:
    plain, _ = encode_job(1, 2, 3, b"q", b"t", b"{}")
    assert len(plain) == 26 + len(b"qt{}")
    assert len(encode_job(1, 2, 3, b"q", b"t", b"{}", 7)[0]) == len(plain) + 16
    assert len(encode_job(1, 2, 3, b"q", b"t", b"{}", None, b"labels")[0]) == len(plain) + 16 + 6


def test_jobs_arrive_in_the_order_in_which_they_were_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader_end = pair
    reader = PacketReader(reader_end, wait=False)
    jobs = [JobPacket(n, n, 1, "q", "t", b"x" * (n * 97)) for n in range(MAX_WINDOW)]
    for job in jobs:
        send(sender, job)
    assert [decode_job(*received(reader)) for _ in jobs] == jobs


def test_a_full_window_of_the_largest_packets_fits_the_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, _ = pair
    sender.setblocking(False)
    # What a kernel allows by default, should this one allow more.
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 212_992)
    for number in range(MAX_WINDOW):
        send(sender, JobPacket(number, number, 1, "🦉" * 128, "🐦" * 128, b"x" * INLINE_BYTES))


@pytest.mark.parametrize("size", [10, INLINE_BYTES, 3 * INLINE_BYTES])
def test_a_full_socket_leaves_nothing_half_sent(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    sender, reader_end = pair
    sender.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            send(sender, JobPacket(sent, sent, 1, "q", "t", b"x" * size))
            sent += 1
    assert sent >= MAX_WINDOW
    reader = PacketReader(reader_end, wait=False)
    for number in range(sent):
        assert decode_job(*received(reader)) == JobPacket(number, number, 1, "q", "t", b"x" * size)
    with pytest.raises(BlockingIOError):
        reader.read()
    send(sender, JobPacket(9, 9, 1, "q", "t", b"x" * size))  # there is room again
    assert decode_job(*received(reader)).job_id == 9


def test_a_socket_that_is_shut_down_takes_nothing_and_what_was_sent_can_be_read(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sender, reader_end = pair
    reader = PacketReader(reader_end, wait=True)
    send(sender, JobPacket(1, 2, 1, "q", "t", b"x" * 5000))
    sender.shutdown(socket.SHUT_WR)
    with pytest.raises(OSError, match="Broken pipe"):
        send(sender, JobPacket(2, 3, 1, "q", "t", b"x" * 5000))
    assert decode_job(*received(reader)).job_id == 1
    assert reader.read() is None
    assert reader.read() is None


def test_what_is_never_read_keeps_no_descriptor_once_the_socket_is_closed() -> None:
    for _ in range(50):
        sender, reader_end = job_socketpair()
        with sender, reader_end:
            for _ in range(10):
                send(sender, JobPacket(1, 2, 1, "q", "t", b"x" * 5000))


# -- taking back


def test_reading_without_waiting_leaves_the_other_reader_waiting(pair: tuple[socket.socket, socket.socket]) -> None:
    """O_NONBLOCK would belong to the open file, which both share."""
    _, reader_end = pair
    with socket.socket(fileno=os.dup(reader_end.fileno())) as ours:
        with pytest.raises(BlockingIOError):
            PacketReader(ours, wait=False).read()
        assert reader_end.getblocking()


OTHER_READER = """
import json, socket, sys
from roostd.wire.packets import PacketReader, decode_job

reader, leases = PacketReader(socket.socket(fileno=int(sys.argv[1])), wait=True), []
print("ready", flush=True)
while (packet := reader.read()) is not None:
    leases.append(decode_job(*packet).lease)
print(json.dumps(leases))
"""


@pytest.mark.parametrize("size", [10, INLINE_BYTES + 1])
def test_each_packet_goes_to_exactly_one_of_two_readers(size: int) -> None:
    """One in another process, as the child; this one takes back, again and again."""
    sender, reader_end = job_socketpair()
    reader, taken_back = PacketReader(reader_end, wait=False), list[int]()
    with sender, reader_end:
        command = [sys.executable, "-c", OTHER_READER, str(reader_end.fileno())]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[reader_end.fileno()]) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            sender.setblocking(False)
            number = 0
            while number < 5000:
                with contextlib.suppress(BlockingIOError):
                    send(sender, JobPacket(number, number, 1, "q", "t", b"x" * size))
                    number += 1
                if number % 7 == 0 or number % 64 == 0:
                    taken_back += _take_back(reader)
            send(sender, JobPacket(number, number, 1, "q", "t", b"x" * size))  # one at least is for the other
            sender.shutdown(socket.SHUT_WR)
            read_there = json.load(other.stdout)
    assert other.returncode == 0
    assert sorted(taken_back + read_there) == list(range(5001))
    assert read_there == sorted(read_there)
    assert taken_back == sorted(taken_back)
    assert taken_back
    assert read_there


def _take_back(reader: PacketReader) -> list[int]:
    leases = []
    with contextlib.suppress(BlockingIOError):
        while (packet := reader.read()) is not None:
            leases.append(lease_of(packet[0]))
            close_all(packet[1])
    return leases


# -- what is no packet of ours


def test_a_packet_larger_than_the_buffer_is_refused_and_its_descriptors_closed(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    sender, reader_end = pair
    fd = write_memfd(b"x")
    try:
        socket.send_fds(sender, [b"x" * (2 * INLINE_BYTES + 1)], [fd])
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="cut off"):
        PacketReader(reader_end, wait=False).read()


def test_more_descriptors_than_expected_are_refused_and_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader_end = pair
    fd = write_memfd(b"x")
    try:
        socket.send_fds(sender, [b"x"], [fd] * 40)
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="cut off"):
        PacketReader(reader_end, wait=False).read()


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_packet_whose_descriptors_do_not_fit_the_table_of_open_files_is_told_from_the_end(
    pair: tuple[socket.socket, socket.socket], room: int
) -> None:
    sender, reader_end = pair
    reader = PacketReader(reader_end, wait=False)
    fd = write_memfd(b"x")
    send_message(sender, {"op": "forked", "key": 7}, [fd] * 3)
    send_message(sender, {"op": "exited", "key": 7})
    free = [os.dup(fd) for _ in range(room + 1)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        close_all(free)
        with pytest.raises(DescriptorsLost) as lost:
            reader.read()
        for place in free:  # those that did fit are closed
            with pytest.raises(OSError):
                os.fstat(place)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(fd)
    assert decode_message(memoryview(lost.value.packet), []) == {"op": "forked", "key": 7}
    packet, fds = received(reader)
    assert (decode_message(packet, fds), fds) == ({"op": "exited", "key": 7}, [])


@given(st.binary(max_size=200))
def test_garbage_is_an_error_or_a_job_and_never_hangs(garbage: bytes) -> None:
    fds = [write_memfd(b"{}")]
    with contextlib.suppress(Exception):
        decode_job(memoryview(garbage), fds)
    close_all(fds)


@pytest.mark.parametrize("length", range(26))
def test_a_job_cut_short_in_its_header_is_an_error(length: int) -> None:
    packet, _ = encode_job(1, 2, 3, b"queue", b"task", b"{}")
    with pytest.raises(Exception, match=r"unpack|buffer"):
        decode_job(memoryview(packet)[:length], [])


# -- control


@given(st.integers(0, 255), INT8)
def test_a_call_off_arrives_as_it_was_sent(reason: int, lease: int) -> None:
    assert decode_control(encode_control(reason, lease)) == (reason, lease)


# -- messages between master and template


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.booleans() | st.text(), st.lists, max_leaves=9)))
def test_every_message_arrives_as_it_was_sent(message: dict[str, Any]) -> None:
    sender, reader_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sender, reader_end:
        send_message(sender, message)
        packet, fds = received(PacketReader(reader_end, wait=False))
        assert decode_message(packet, fds) == message
        assert fds == []


@pytest.mark.parametrize("size", SIZES)
def test_descriptors_travel_with_messages_of_every_size(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    sender, reader_end = pair
    memfds = [write_memfd(f"file {number}".encode()) for number in range(6)]
    message = {"op": "forked", "text": "x" * size}
    send_message(sender, message, memfds)
    close_all(memfds)
    packet, fds = received(PacketReader(reader_end, wait=False))
    assert decode_message(packet, fds) == message
    assert [read_memfd(fd) for fd in fds] == [f"file {number}".encode() for number in range(6)]


@pytest.mark.parametrize("body", [b"J", b"J{", b"J\xff", b"J[]", b"Jnull", b"J1"])
def test_a_message_that_is_no_json_object_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode_message(memoryview(body), [])


def test_received_descriptors_are_not_inherited(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader_end = pair
    send(sender, JobPacket(1, 2, 1, "q", "t", b"x" * 5000))
    _, fds = received(PacketReader(reader_end, wait=False))
    assert [os.get_inheritable(fd) for fd in fds] == [False]
    close_all(fds)


# -- memfds


@pytest.mark.parametrize("size", SIZES)
def test_a_memfd_is_read_from_its_beginning_and_closed(size: int) -> None:
    data = os.urandom(size)
    assert read_memfd(write_memfd(data)) == data


def test_a_reader_that_waits_is_woken_by_a_packet_and_by_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader_end = pair
    assert select.select([reader_end], [], [], 0)[0] == []
    send(sender, JobPacket(1, 2, 1, "q", "t", b"{}"))
    assert select.select([reader_end], [], [], 5)[0] == [reader_end]
    received(PacketReader(reader_end, wait=True))
    sender.shutdown(socket.SHUT_WR)
    assert select.select([reader_end], [], [], 5)[0] == [reader_end]
    assert PacketReader(reader_end, wait=True).read() is None
