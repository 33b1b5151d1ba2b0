"""Puts the wall clock of a Python process off by CHAOS_SKEW seconds; Python imports this by itself where it finds it.

The monotonic clock stays as it is, as it does where an administrator sets a machine's clock wrong.
"""

import datetime
import os
import time

_SECONDS = float(os.environ.get("CHAOS_SKEW", "0"))
_real = datetime.datetime
_time, _time_ns = time.time, time.time_ns


class _Meta(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _real)


class _Skewed(_real, metaclass=_Meta):
    __slots__ = ()

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _real:  # type: ignore[override]
        return _real.now(tz) + datetime.timedelta(seconds=_SECONDS)

    @classmethod
    def utcnow(cls) -> _real:  # type: ignore[override]
        return _real.now(datetime.UTC).replace(tzinfo=None) + datetime.timedelta(seconds=_SECONDS)


time.time = lambda: _time() + _SECONDS
time.time_ns = lambda: _time_ns() + int(_SECONDS * 1e9)
datetime.datetime = _Skewed  # type: ignore[misc]
