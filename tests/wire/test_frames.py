"""The stream of outcomes: whole frames come out whatever the reads look like, and garbage comes out as an error."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roostd.wire.frames import HEADER_BYTES, Frame, FrameDecoder, FrameError, FrameKind, encode_frame

CAP = 4_096
LEASES = st.integers(min_value=-(2**63), max_value=2**63 - 1)
FRAMES = st.lists(
    st.builds(Frame, kind=st.sampled_from(FrameKind), lease=LEASES, body=st.binary(max_size=300)), max_size=20
)


def chunks_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


@given(frames=FRAMES, cuts=st.lists(st.integers(min_value=0), max_size=40))
def test_any_split_of_a_stream_gives_the_same_frames(frames: list[Frame], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(*frame) for frame in frames)
    decoder = FrameDecoder(CAP)
    decoded = [frame for chunk in chunks_of(stream, cuts) for frame in decoder.feed(chunk)]
    assert decoded == frames


def test_a_stream_read_byte_by_byte_gives_each_frame_with_its_last_byte() -> None:
    stream = encode_frame(FrameKind.COMPLETED, 7, b"[1]") + encode_frame(FrameKind.FAILED, 8, b"{}")
    decoder = FrameDecoder(CAP)
    arrived = [position for position, byte in enumerate(stream, 1) if decoder.feed(bytes([byte]))]
    assert arrived == [HEADER_BYTES + 3, len(stream)]


@given(garbage=st.binary(max_size=2_000), cuts=st.lists(st.integers(min_value=0), max_size=20))
def test_garbage_gives_frames_or_an_error_and_is_never_kept_beyond_one_frame(garbage: bytes, cuts: list[int]) -> None:
    decoder = FrameDecoder(CAP)
    taken = 0
    try:
        for chunk in chunks_of(garbage, cuts):
            for frame in decoder.feed(chunk):
                taken += HEADER_BYTES + len(frame.body)
    except FrameError:
        return
    assert len(garbage) - taken < HEADER_BYTES + CAP


@given(frames=FRAMES, kind=st.integers(min_value=0, max_value=255).filter(lambda k: k not in list(FrameKind)))
def test_an_unknown_kind_is_an_error_that_names_it(frames: list[Frame], kind: int) -> None:
    stream = b"".join(encode_frame(*frame) for frame in frames)
    with pytest.raises(FrameError, match=f"unknown kind {kind}"):
        FrameDecoder(CAP).feed(stream + bytes([kind]) + bytes(HEADER_BYTES))


def test_a_body_above_the_cap_is_refused_by_its_header_alone() -> None:
    header = encode_frame(FrameKind.COMPLETED, 12, b"x" * (CAP + 1))[:HEADER_BYTES]
    with pytest.raises(FrameError, match=r"lease 12: 4097 bytes .* cap of 4096"):
        FrameDecoder(CAP).feed(header)


def test_a_body_of_just_the_cap_is_taken() -> None:
    body = b"x" * CAP
    assert FrameDecoder(CAP).feed(encode_frame(FrameKind.COMPLETED, 1, body)) == [Frame(FrameKind.COMPLETED, 1, body)]


@given(cut=st.integers(min_value=0))
def test_a_stream_that_ends_in_the_middle_of_a_frame_gives_only_what_came_before(cut: int) -> None:
    first, second = encode_frame(FrameKind.COMPLETED, 1, b"1"), encode_frame(FrameKind.SNOOZED, 2, b'{"seconds": 1}')
    frames = FrameDecoder(CAP).feed(first + second[: cut % len(second)])
    assert frames == [Frame(FrameKind.COMPLETED, 1, b"1")]
