"""How a child tells the master what became of a job: frames on a byte stream.

A frame is a header (kind, length of the body, lease) and a body. A stream, not packets, so that one read takes in
everything that many short jobs reported. Reads may split a frame anywhere: the decoder keeps the rest. What it can't
be is trusted, since a handler shares its process with the writer: a frame of an unknown kind or above the cap is an
error, after which the child is worth nothing.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

_HEADER = struct.Struct("<BIq")
HEADER_BYTES = _HEADER.size


class FrameKind(enum.IntEnum):
    """What a frame says of the job under its lease, and what its body holds (UTF-8 JSON)."""

    COMPLETED = 1  # the result; empty for None
    FAILED = 2  # {"error": str, "trace": str}
    SNOOZED = 3  # {"seconds": number}
    TIMED_OUT = 4  # as FAILED: the deadline's exception was raised in the handler
    CANCELLED = 5  # as FAILED: the cancel's exception was raised in the handler
    INTERRUPTED = 6  # as FAILED: the shutdown's exception was raised in the handler; or it came too late to start
    COMMITTED = 7  # completed in a transaction of the handler's own; as FAILED, of what it raised after it, or empty
    UNCONFIRMED = 8  # the handler returned after a transaction of that kind whose commit is not known of; empty


_KINDS = {int(kind): kind for kind in FrameKind}


class Frame(NamedTuple):
    kind: FrameKind
    lease: int
    body: bytes


class FrameError(Exception):
    """The stream does not hold frames; nothing after this point can be read."""


def encode_frame(kind: FrameKind, lease: int, body: bytes = b"") -> bytes:
    return _HEADER.pack(kind, len(body), lease) + body


class FrameDecoder:
    """Turns chunks of a stream, split anywhere, into frames; holds at most one unfinished frame."""

    def __init__(self, max_body_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._rest = bytearray()
        self._wanted = HEADER_BYTES  # the rest is not worth a look before it has as many
        self._error: FrameError | None = None

    def feed(self, chunk: bytes) -> list[Frame]:
        """The frames that `chunk` completes, in order. Raises FrameError on what is no frame, and ever after."""
        if self._error is not None:
            raise self._error
        data = chunk
        if self._rest:
            self._rest += chunk
            if len(self._rest) < self._wanted:
                return []
            data = bytes(self._rest)
        frames: list[Frame] = []
        position, end = 0, len(data)
        self._wanted = HEADER_BYTES
        while end - position >= HEADER_BYTES:
            kind, length, lease = _HEADER.unpack_from(data, position)
            if kind not in _KINDS:
                raise self._fail(f"cannot read frame: unknown kind {kind}")
            if length > self._max_body_bytes:
                raise self._fail(
                    f"cannot read frame of lease {lease}: {length} bytes are above the cap of {self._max_body_bytes}"
                )
            body_start = position + HEADER_BYTES
            if end - body_start < length:
                self._wanted = HEADER_BYTES + length
                break
            position = body_start + length
            frames.append(Frame(_KINDS[kind], lease, data[body_start:position]))
        self._rest = bytearray(data[position:])
        return frames

    def _fail(self, reason: str) -> FrameError:
        self._rest.clear()
        self._error = FrameError(reason)
        return self._error
