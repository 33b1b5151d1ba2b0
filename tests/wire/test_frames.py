"""The frames on a child's outcome stream: however they are cut up, and whatever else a handler writes in between."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.wire.frames import HEADER_BYTES, Frame, FrameDecoder, FrameError, FrameKind, encode_frame

CAP = 300
LEASES = st.integers(-(2**63), 2**63 - 1)
FRAMES = st.builds(Frame, st.sampled_from(FrameKind), LEASES, st.binary(max_size=CAP))


def stream(frames: list[Frame]) -> bytes:
    return b"".join(encode_frame(*frame) for frame in frames)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    points = sorted({0, len(data), *(point % (len(data) + 1) for point in at)})
    return [data[start:end] for start, end in pairwise(points)]


@given(st.lists(FRAMES, max_size=12), st.lists(st.integers(0, 10_000), max_size=40))
def test_any_split_of_the_stream_gives_the_same_frames(frames: list[Frame], at: list[int]) -> None:
    decoder = FrameDecoder(CAP)
    assert [frame for chunk in cut(stream(frames), at) for frame in decoder.feed(chunk)] == frames


@given(st.lists(FRAMES, max_size=4))
def test_byte_by_byte_each_frame_comes_with_its_last_byte(frames: list[Frame]) -> None:
    decoder, ends, position = FrameDecoder(CAP), {}, 0
    for frame in frames:
        position += HEADER_BYTES + len(frame.body)
        ends[position] = frame
    data = stream(frames)
    for number in range(len(data)):
        assert decoder.feed(data[number : number + 1]) == ([ends[number + 1]] if number + 1 in ends else [])


@given(st.lists(st.binary(max_size=2000), max_size=20))
def test_garbage_ends_in_frames_within_the_cap_or_in_an_error_after_which_nothing_comes(chunks: list[bytes]) -> None:
    decoder, failed = FrameDecoder(CAP), False
    for chunk in chunks:
        try:
            frames = decoder.feed(chunk)
        except FrameError:
            failed = True
            continue
        assert not (failed and frames)
        assert all(len(frame.body) <= CAP for frame in frames)


@given(st.lists(FRAMES, max_size=3), st.lists(FRAMES, min_size=1, max_size=3), st.lists(st.integers(0, 2000)))
def test_no_frame_comes_after_an_error_however_good_it_looks(
    before: list[Frame], after: list[Frame], at: list[int]
) -> None:
    decoder = FrameDecoder(CAP)
    good = [frame for chunk in cut(stream(before), at) for frame in decoder.feed(chunk)]
    assert good == before
    with pytest.raises(FrameError):
        decoder.feed(b"\xff" * HEADER_BYTES)
    for chunk in cut(stream(after), at):
        with pytest.raises(FrameError):
            decoder.feed(chunk)


@pytest.mark.parametrize("kind", [0, 9, 127, 255])
def test_an_unknown_kind_is_an_error_as_soon_as_the_header_is_there(kind: int) -> None:
    decoder = FrameDecoder(CAP)
    header = struct.pack("<BIq", kind, 10, 1)
    assert decoder.feed(header[:-1]) == []
    with pytest.raises(FrameError, match=f"unknown kind {kind}"):
        decoder.feed(header[-1:])


def test_a_body_at_the_cap_is_read_and_one_above_it_is_refused_before_it_arrives() -> None:
    decoder = FrameDecoder(CAP)
    assert decoder.feed(encode_frame(FrameKind.COMPLETED, 7, b"x" * CAP)) == [(FrameKind.COMPLETED, 7, b"x" * CAP)]
    header = encode_frame(FrameKind.COMPLETED, 7, b"x" * (CAP + 1))[:HEADER_BYTES]
    with pytest.raises(FrameError, match=f"lease 7.*{CAP + 1} bytes are above the cap of {CAP}"):
        decoder.feed(header)


def test_frames_before_garbage_in_one_chunk_are_not_believed() -> None:
    """Who writes garbage into the stream may have written them too; their jobs end with the child."""
    decoder = FrameDecoder(CAP)
    with pytest.raises(FrameError):
        decoder.feed(encode_frame(FrameKind.COMPLETED, 1) + b"\xff" * HEADER_BYTES)


def test_the_decoder_keeps_no_more_than_one_unfinished_frame() -> None:
    decoder, cap = FrameDecoder(1 << 20), 1 << 20
    unfinished = encode_frame(FrameKind.COMPLETED, 1, b"x" * cap)[:-1]
    chunk = 65_536
    for start in range(0, len(unfinished), chunk):
        assert decoder.feed(unfinished[start : start + chunk]) == []
        assert len(decoder._rest) <= HEADER_BYTES + cap
    (frame,) = decoder.feed(b"x")
    assert len(frame.body) == cap
    assert decoder._rest == b""


def test_a_finished_frame_is_not_kept() -> None:
    decoder = FrameDecoder(CAP)
    decoder.feed(stream([Frame(FrameKind.FAILED, 1, b"x" * CAP)] * 100) + b"\x01")
    assert decoder._rest == b"\x01"


def test_a_large_frame_in_many_chunks_is_read_in_time_linear_in_its_size() -> None:
    """Joining all that has come at each chunk would copy it again and again: 20 MB in 1 kB chunks, 200 GB in all."""
    body = b"x" * (20 << 20)
    data = encode_frame(FrameKind.COMPLETED, 1, body)
    decoder = FrameDecoder(len(body))
    frames = [frame for start in range(0, len(data), 1024) for frame in decoder.feed(data[start : start + 1024])]
    assert frames == [(FrameKind.COMPLETED, 1, body)]


@pytest.mark.parametrize("kind", FrameKind)
def test_a_frame_without_a_body_is_a_header_alone(kind: FrameKind) -> None:
    assert len(encode_frame(kind, 1)) == HEADER_BYTES
    assert FrameDecoder(0).feed(encode_frame(kind, 1)) == [(kind, 1, b"")]
