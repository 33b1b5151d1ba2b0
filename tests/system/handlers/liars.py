"""Tasks that report outcomes of their own making, as a handler may that has got hold of its child's channel."""

from __future__ import annotations

import os
import sys
from typing import Any

from roost_client import job
from roostd.wire.frames import FrameKind, encode_frame

BODIES = {
    "NUL in a result": (FrameKind.COMPLETED, b'"\0"'),
    "no JSON": (FrameKind.COMPLETED, b"[1, "),
    "no UTF-8": (FrameKind.COMPLETED, b'"\xff"'),
    "a list for an error": (FrameKind.FAILED, b"[]"),
    "an error nested too deeply": (FrameKind.FAILED, b"[" * 100_000),
    "an error with what is no text": (FrameKind.FAILED, rb'{"error": "\ud800 \u0000", "trace": "\udfff"}'),
    "a snooze beyond a float": (FrameKind.SNOOZED, b'{"seconds": 1' + b"0" * 400 + b"}"),
}


@job("lie")
def lie(what: str) -> None:
    child, lease = _runner()
    kind, body = BODIES[what]
    child._outcomes.sendall(encode_frame(kind, lease, body))
    os._exit(0)


def _runner() -> tuple[Any, int]:
    """The object that runs this process's jobs, and the lease of this one."""
    frame = sys._getframe()
    while "job" not in frame.f_locals or not hasattr(frame.f_locals.get("self"), "_outcomes"):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_locals["self"], frame.f_locals["job"].lease
