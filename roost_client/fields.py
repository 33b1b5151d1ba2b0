"""What each field of a job may hold. Every check is here once: enqueue, @job and the operations all use it.

A check returns the value to send or raises `Refused`; whoever knows what was being done turns that into
InvalidJobError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from .errors import InvalidJobError

MAX_NAME_LENGTH = 128  # characters; the database holds the same bound
MAX_KEY_LENGTH = 512  # characters, of four bytes at most; a btree's entry may have 2,700
INT4_MAX = 2**31 - 1
INT8_MAX = 2**63 - 1
MAX_SECONDS = 31_622_400  # a year
MAX_AGE = timedelta(days=36_525)  # a hundred years
MAX_INTEGER_DIGITS = 4300  # what Python reads back without being told otherwise (sys.set_int_max_str_digits)
# A day off the ends of what Python can hold, so that it can in any time zone; the database holds the same bounds.
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime(9999, 12, 31, tzinfo=UTC)

# Stands for "the caller did not pass this": a documented default must not win over @job's, the same value
# passed must. Any, because it stands in the place of a value of every type.
UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET", "__slots__": ()})()

# The documented default of every field that @job can set, in the order of roost.enqueue.
DOCUMENTED_DEFAULTS: dict[str, Any] = {
    "queue": "default",
    "priority": 0,
    "max_attempts": 20,
    "tags": None,
    "timeout_seconds": None,
}

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def shows_documented_defaults(function: F) -> F:
    """Make inspect.signature() and help() show the documented defaults in place of UNSET."""
    signature = inspect.signature(function)
    shown_parameters = [
        parameter.replace(default=DOCUMENTED_DEFAULTS[parameter.name]) if parameter.default is UNSET else parameter
        for parameter in signature.parameters.values()
        if parameter.name != "passed"
    ]
    function.__signature__ = signature.replace(parameters=shown_parameters)  # type: ignore[attr-defined]
    return function


class Refused(Exception):
    """`reason` reads on from the value's path: 'must be at least 1, not 0'."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def as_invalid_job(self, what: str, prefix: str = "") -> InvalidJobError:
        """Make the public error; `what` is what was being done, such as "enqueue 'send_receipt'"."""
        path = prefix + self.path
        return InvalidJobError(f"cannot {what}: {path} {self.reason}", path)


def text(path: str, value: object) -> str:
    """Return text that PostgreSQL can store: no NUL, no lone surrogate."""
    if not isinstance(value, str):
        raise Refused(path, f"must be a string, not {shown(value)}")
    if value.isascii():
        if "\0" in value:
            raise Refused(path, "holds a NUL character, which PostgreSQL cannot store")
    else:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Refused(path, f"holds the lone surrogate {value[error.start]!a}, which is not a character") from None
        if "\0" in value:
            raise Refused(path, "holds a NUL character, which PostgreSQL cannot store")
    return str.__str__(value)  # of a subclass (an enum member) the plain string


def name(path: str, value: object) -> str:
    """Return the name of a task or queue: 1 to 128 characters."""
    checked = text(path, value)
    if not 1 <= len(checked) <= MAX_NAME_LENGTH:
        raise Refused(path, f"must have 1 to {MAX_NAME_LENGTH} characters, not {len(checked)}")
    return checked


def unique_key(path: str, value: object) -> str | None:
    """Return a key of 1 to 512 characters; None for none."""
    if value is None:
        return None
    checked = text(path, value)
    if not 1 <= len(checked) <= MAX_KEY_LENGTH:
        raise Refused(path, f"must have 1 to {MAX_KEY_LENGTH} characters, not {len(checked)}")
    return checked


def on_duplicate(path: str, value: object, key: object) -> str:
    """Return what to do where an active job has the key."""
    if value not in ("raise", "return", "replace"):
        raise Refused(path, f"must be 'raise', 'return' or 'replace', not {shown(value)}")
    if value != "raise" and key is None:
        raise Refused(path, "is of no use without a unique_key")
    return str(value)


def parents(path: str, value: object, kind: type[T] | None = None) -> list[int | T]:
    """Return the ids of a list or tuple of job ids, and what there is of `kind` as it is; None has none."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise Refused(path, f"must be a list of job ids, not {shown(value)}")
    return [
        parent
        if kind is not None and isinstance(parent, kind)
        else integer(f"{path}[{i}]", parent, -INT8_MAX - 1, INT8_MAX)
        for i, parent in enumerate(value)
    ]


def integer(path: str, value: object, least: int = -INT4_MAX - 1, most: int = INT4_MAX) -> int:
    """Return a whole number in the range; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(path, f"must be an integer, not {shown(value)}")
    if value < least:
        raise Refused(path, f"must be at least {least}, not {shown(value)}")
    if value > most:
        raise Refused(path, f"must be at most {most}, not {shown(value)}")
    return int(value)


def count(path: str, value: object) -> int:
    """Return a whole number of at least 1."""
    return integer(path, value, least=1)


def optional_count(path: str, value: object) -> int | None:
    return None if value is None else count(path, value)


def seconds(path: str, value: object) -> float:
    """Return a duration of at least 0 seconds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(path, f"must be a number of seconds, not {shown(value)}")
    if not 0 <= value <= MAX_SECONDS:  # false for NaN too
        raise Refused(path, f"must be 0 to {MAX_SECONDS} seconds, not {shown(value)}")
    return float(value)


def age(path: str, value: object) -> str:
    """Return how long ago something was, as a number of seconds."""
    if not isinstance(value, timedelta):
        raise Refused(path, f"must be a timedelta, not {shown(value)}")
    if not timedelta() <= value <= MAX_AGE:
        raise Refused(path, f"must be 0 to {MAX_AGE.days} days, not {value}")
    return str(value.total_seconds())


def tags(path: str, value: object) -> tuple[str, ...]:
    """Return the tags of a list or tuple of strings; None has none."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise Refused(path, f"must be a list of strings, not {shown(value)}")
    return tuple([text(f"{path}[{i}]", tag) for i, tag in enumerate(value)])


def time(path: str, value: object) -> str:
    """Return an aware datetime as ISO text in UTC."""
    if not isinstance(value, datetime):
        raise Refused(path, f"must be a datetime, not {shown(value)}")
    if value.utcoffset() is None:
        raise Refused(path, f"must have a time zone, unlike {value}: use datetime.now(UTC) or .astimezone()")
    if not EARLIEST <= value < LATEST:
        raise Refused(path, f"must lie in the years 1 to 9999, unlike {value}")
    return value.astimezone(UTC).isoformat()


def shown(value: object) -> str:
    """A short text of any value, also of one whose repr() is endless or raises."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**30 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        return f"{value[:80]!a}" + ("…" if len(value) > 80 else "")
    return f"a {type(value).__qualname__}"
