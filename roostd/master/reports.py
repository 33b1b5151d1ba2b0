"""What the frame that reports a run means, other than that it completed: the input of core/outcome.py."""

from __future__ import annotations

import json

from roostd.core.outcome import Ending, Report
from roostd.wire.frames import FrameKind

UNCONFIRMED = (
    "TransactionNotCommitted: its handler completed it in a transaction and returned, but that transaction was rolled"
    " back, or never committed"
)


def report_of_frame(kind: FrameKind, text: bytes) -> Report:
    if kind is FrameKind.UNCONFIRMED:
        return Report(Ending.UNCONFIRMED, UNCONFIRMED)
    body = json.loads(text)
    match kind:
        case FrameKind.SNOOZED:
            return Report(Ending.SNOOZED, seconds=float(body["seconds"]))
        case FrameKind.INTERRUPTED:
            return Report(Ending.RELEASED)
        case FrameKind.TIMED_OUT:
            ending = Ending.TIMED_OUT
        case FrameKind.CANCELLED:
            ending = Ending.CANCELLED
        case _:
            ending = Ending.FAILED
    return Report(ending, str(body["error"]), str(body["trace"]))
