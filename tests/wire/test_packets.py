"""Jobs as packets: whole or not at all, read by exactly one reader, with no descriptor left behind."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.core.pace import MAX_WINDOW
from roostd.wire.packets import (
    INLINE_BYTES,
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
    send_message,
    send_packet,
)

BIGINTS = st.integers(min_value=-(2**63), max_value=2**63 - 1)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    sender, reader = job_socketpair()
    with sender, reader:
        yield sender, reader


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def send(sender: socket.socket, lease: int, args: bytes = b"{}") -> None:
    send_packet(sender, *encode_job(1, lease, 1, b"default", b"task", args))


@given(
    job_id=BIGINTS,
    lease=BIGINTS,
    attempt=st.integers(min_value=1, max_value=2**31 - 1),
    queue=NAMES,
    task=NAMES,
    args=st.binary(max_size=3 * INLINE_BYTES),
)
def test_a_job_arrives_as_it_was_sent(
    job_id: int, lease: int, attempt: int, queue: str, task: str, args: bytes
) -> None:
    before = open_files()
    sender, reader = job_socketpair()
    with sender, reader:
        send_packet(sender, *encode_job(job_id, lease, attempt, queue.encode(), task.encode(), args))
        received = PacketReader(reader, wait=False).read()
        assert received is not None
        assert lease_of(received[0]) == lease
        assert decode_job(*received) == JobPacket(job_id, lease, attempt, queue, task, args)
    assert open_files() == before


@pytest.mark.parametrize("size", [0, INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, 1_048_576, 30_000_000])
def test_arguments_of_any_size_arrive(pair: tuple[socket.socket, socket.socket], size: int) -> None:
    sender, reader = pair
    args = b"x" * size
    send(sender, 5, args)
    received = PacketReader(reader, wait=False).read()
    assert received is not None
    assert decode_job(*received).args == args


@pytest.mark.parametrize("size", [2, INLINE_BYTES, INLINE_BYTES + 1])
def test_a_full_window_fits_the_socket_and_a_full_socket_takes_no_half_packet(
    pair: tuple[socket.socket, socket.socket], size: int
) -> None:
    sender, reader = pair
    sender.setblocking(False)
    sent = 0
    try:
        while sent < 100_000:
            send(sender, sent, b"x" * size)
            sent += 1
    except BlockingIOError:
        pass
    assert sent >= MAX_WINDOW
    packets = PacketReader(reader, wait=False)
    for lease in range(sent):
        received = packets.read()
        assert received is not None
        assert decode_job(*received)[1] == lease
    with pytest.raises(BlockingIOError):
        packets.read()


def test_what_is_taken_back_unread_leaves_no_descriptor_open(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader = pair
    before = open_files()
    for lease in range(10):
        send(sender, lease, b"x" * 50_000)
    packets = PacketReader(reader, wait=False)
    for lease in range(10):
        received = packets.read()
        assert received is not None
        packet, fds = received
        assert lease_of(packet) == lease
        close_all(fds)
    assert open_files() == before


def test_of_two_readers_exactly_one_gets_each_packet(pair: tuple[socket.socket, socket.socket]) -> None:
    """The take-back: master and child read the same end at once, and what one has the other has not."""
    sender, reader = pair
    total = 20_000
    heard_read, heard_write = os.pipe()
    pid = os.fork()
    if pid == 0:  # the child: reads until the intake is closed, and says what it got
        status = 1
        try:
            sender.close()
            packets = PacketReader(reader, wait=True)
            while (received := packets.read()) is not None:
                os.write(heard_write, decode_job(*received).lease.to_bytes(8, "little"))
            status = 0
        finally:
            os._exit(status)
    os.close(heard_write)
    heard = b""
    try:
        os.set_blocking(heard_read, False)
        packets = PacketReader(reader, wait=False)
        taken: list[int] = []
        for lease in range(total):
            sender.setblocking(True)
            send(sender, lease)
            if lease % 3 == 0:
                try:
                    while (received := packets.read()) is not None:
                        taken.append(lease_of(received[0]))
                except BlockingIOError:
                    pass
            try:
                heard += os.read(heard_read, 65_536)
            except BlockingIOError:
                pass
        sender.shutdown(socket.SHUT_WR)
        os.set_blocking(heard_read, True)
        while piece := os.read(heard_read, 65_536):
            heard += piece
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(heard_read)
    child = [int.from_bytes(heard[i : i + 8], "little") for i in range(0, len(heard), 8)]
    assert sorted(child + taken) == list(range(total))
    assert child
    assert taken


def test_one_reader_that_does_not_wait_leaves_the_other_waiting(pair: tuple[socket.socket, socket.socket]) -> None:
    _, reader = pair
    with pytest.raises(BlockingIOError):
        PacketReader(reader, wait=False).read()
    assert os.get_blocking(reader.fileno())


def test_the_end_of_the_intake_comes_after_all_that_is_in_it(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader = pair
    send(sender, 1)
    sender.shutdown(socket.SHUT_WR)
    packets = PacketReader(reader, wait=True)
    assert packets.read() is not None
    assert packets.read() is None


def test_a_packet_that_is_cut_off_is_an_error_and_not_half_a_job(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader = pair
    sender.send(b"x" * 100_000)
    with pytest.raises(OSError, match="cut off"):
        PacketReader(reader, wait=False).read()


@pytest.mark.parametrize("size", [0, INLINE_BYTES, 2_000_000])
def test_messages_of_any_size_arrive_with_their_descriptors(size: int) -> None:
    before = open_files()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open("/dev/null") as null:
        message = {"op": "forked", "key": 3, "text": "é" * size}
        send_message(ours, message, [null.fileno(), null.fileno()])
        received = PacketReader(theirs, wait=False).read()
        assert received is not None
        packet, fds = received
        assert decode_message(packet, fds) == message
        assert len(fds) == 2
        close_all(fds)
    assert open_files() == before


@given(reason=st.integers(min_value=0, max_value=255), lease=BIGINTS)
def test_a_call_off_arrives_as_it_was_sent(reason: int, lease: int) -> None:
    assert decode_control(encode_control(reason, lease)) == (reason, lease)
