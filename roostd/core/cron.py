"""When does a cron expression fire? Expressions, and the slots that they have in a time zone.

A slot is the instant at which a job is due, an aware datetime in UTC. By the clock on the wall an expression means
minutes; where the clock is moved, these become slots as under Debian's cron:

    fixed      neither minute nor hour begins with `*`: a time has one slot, the first instant at which the clock has
               reached it. So one that is skipped has its slot right after the gap (all times of one gap share it), and
               one that is repeated fires at its first occurrence only.
    wildcard   minute or hour begins with `*`: every instant at which the clock shows a matching time is a slot. So what
               is skipped does not fire, and what is repeated fires again.

Must not read the clock: `after` and `now` are arguments. All searches end: see HORIZON.
"""

from __future__ import annotations

import bisect
import difflib
import re
import zoneinfo
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

# The longest expression without repetitions, every value of every field spelled out, has some 400 characters.
MAX_LENGTH = 1000
# As far as anything is looked for. February 29 falls on a given weekday every 40 years at the worst (2072, 2112).
HORIZON = timedelta(days=50 * 366)

_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)
_TICK = timedelta(microseconds=1)
# No clock was ever moved by more than a day (Pacific/Apia went over the date line in 2011).
_LONGEST_SHIFT = timedelta(hours=26)
_END = datetime(9999, 12, 1)
_DAYS_OF_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


class ExpressionError(ValueError):
    """`str()` reads on from the expression: "has 6 fields; …"."""


class ZoneError(ValueError):
    """`str()` reads on from the name of the zone."""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    lowest: int
    highest: int
    star: range
    names: Mapping[str, int]


_FIELDS = (
    _Field("minute", 0, 59, range(60), {}),
    _Field("hour", 0, 23, range(24), {}),
    _Field("day of month", 1, 31, range(1, 32), {}),
    _Field("month", 1, 12, range(1, 13), {name: number for number, name in enumerate(_MONTHS, 1)}),
    # Sunday is 0 and 7, so that it can begin a range and end one.
    _Field("day of week", 0, 7, range(7), {name: number for number, name in enumerate(_WEEKDAYS)}),
)


def zone(name: str) -> zoneinfo.ZoneInfo:
    """The IANA time zone of this name. Raises ZoneError."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):  # a path, a folder of zones, no UTF-8
        close = difflib.get_close_matches(name[:100], sorted(zoneinfo.available_timezones()), 1, 0.6)
        fix = f"; did you mean {close[0]}?" if close else ", as Europe/Berlin is"
        raise ZoneError(f"is not the name of an IANA time zone{fix}") from None


@dataclass(frozen=True, slots=True)
class Schedule:
    """A parsed expression."""

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # Sunday is 0
    either_day: bool  # day of month or day of week is enough; else a day must be of both
    is_wildcard: bool

    @classmethod
    def parse(cls, expression: str) -> Schedule:
        """Raises ExpressionError, at once however long the text is and whatever it would expand to."""
        if len(expression) > MAX_LENGTH:
            raise ExpressionError(f"has {len(expression)} characters; the most are {MAX_LENGTH}")
        if found := re.search(r"[^0-9A-Za-z*,/@ \t-]", expression):
            raise ExpressionError(f"holds {found[0]!a}, which no expression has")
        text = expression.strip()
        if text.startswith("@"):
            text = _macro(text)
        fields = text.split()
        if len(fields) != len(_FIELDS):
            names = ", ".join(field.name for field in _FIELDS)
            plural = "s" if len(fields) != 1 else ""
            raise ExpressionError(f"has {len(fields)} field{plural}; exactly five are needed: {names}")
        minutes, hours, days, months, weekdays = map(_values, _FIELDS, fields)
        is_star = [field.startswith("*") for field in fields]
        schedule = cls(
            minutes=tuple(sorted(minutes)),
            hours=tuple(sorted(hours)),
            days=frozenset(days),
            months=frozenset(months),
            weekdays=frozenset(weekday % 7 for weekday in weekdays),
            # Vixie's rule, by the first character of the field: so `*/2` counts as a star.
            either_day=not (is_star[2] or is_star[4]),
            is_wildcard=is_star[0] or is_star[1],
        )
        if not schedule.either_day and not any(min(days) <= _DAYS_OF_MONTH[month - 1] for month in months):
            raise ExpressionError(f"never fires: no month that it names has a day {min(days)}")
        return schedule

    def next_after(self, after: datetime, zone: zoneinfo.ZoneInfo) -> datetime | None:
        """The first slot later than `after`; None when there is none within HORIZON."""
        return self._next_wildcard(after, zone) if self.is_wildcard else self._next_fixed(after, zone)

    def latest(self, after: datetime, now: datetime, zone: zoneinfo.ZoneInfo) -> datetime | None:
        """The last slot later than `after` and not later than `now`, found by halving what lies between them."""
        slot = self.next_after(after, zone)
        if slot is None or slot > now:
            return None
        end = now  # there is no slot in (end, now]
        while (following := self.next_after(slot, zone)) is not None and following <= now:
            slot = following
            middle = slot + (end - slot) / 2
            later = self.next_after(middle, zone)
            if later is not None and later <= now:
                slot = later
            else:
                end = middle
        return slot

    def _next_fixed(self, after: datetime, zone: zoneinfo.ZoneInfo) -> datetime | None:
        local = after.astimezone(zone).replace(tzinfo=None)
        for minute in self._minutes_after(local):
            slot = _reached_at(minute, zone)
            if slot > after:  # else it was reached before the clock was put back
                return slot
        return None

    def _next_wildcard(self, after: datetime, zone: zoneinfo.ZoneInfo) -> datetime | None:
        local = after.astimezone(zone).replace(tzinfo=None)
        moved_at = _put_back_at(after, zone)
        if moved_at is not None:
            # What the clock shows until it is put back comes first, what it shows again from then on before the rest.
            minute = next(self._minutes_after(local), None)
            if minute is not None and (slot := minute.replace(tzinfo=zone).astimezone(UTC)) < moved_at:
                return slot
            local, after = moved_at.astimezone(zone).replace(tzinfo=None) - _TICK, moved_at - _TICK
        for minute in self._minutes_after(local):
            for fold in (0, 1):
                slot = minute.replace(tzinfo=zone, fold=fold).astimezone(UTC)
                if slot > after and slot.astimezone(zone).replace(tzinfo=None, fold=0) == minute:
                    return slot
        return None

    def _minutes_after(self, local: datetime) -> Iterator[datetime]:
        """The minutes that match, later than `local`, by a clock that nobody moves; to the HORIZON."""
        if local >= _END - _DAY:
            return
        until = local + HORIZON if local < _END - HORIZON else _END
        first = local.replace(second=0, microsecond=0, fold=0) + _MINUTE
        day, earliest = first.date(), (first.hour, first.minute)
        while day < until.date():
            if day.month not in self.months:
                day = date(day.year + day.month // 12, day.month % 12 + 1, 1)
            else:
                if self._fires_on(day):
                    for hour in self.hours[bisect.bisect_left(self.hours, earliest[0]) :]:
                        for minute in self.minutes:
                            if (hour, minute) >= earliest:
                                yield datetime(day.year, day.month, day.day, hour, minute)
                day += _DAY
            earliest = (0, 0)

    def _fires_on(self, day: date) -> bool:
        by_date, by_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return by_date or by_weekday if self.either_day else by_date and by_weekday


def _macro(text: str) -> str:
    name = text.lower()
    if name == "@reboot":
        raise ExpressionError("is not supported: there is no one start that all workers share; use a time")
    if name not in _MACROS:
        raise ExpressionError(f"is unknown; there are {', '.join(_MACROS)}")
    return _MACROS[name]


def _values(field: _Field, text: str) -> set[int]:
    values: set[int] = set()
    for item in text.split(","):
        values.update(_item(field, item))
    return values


def _item(field: _Field, item: str) -> range:
    """`*`, `*/n`, `a`, `a-b` or `a-b/n`: bounded before anything is made of it."""
    span, slash, step_text = item.partition("/")
    first, dash, last = span.partition("-")
    has = f"has {_shown(item)!r} as {field.name}"
    step = 1
    if slash:
        if span != "*" and not dash:
            raise ExpressionError(f"{has}: a step needs a range, as in {_shown(span)}-{field.highest}/2")
        step = _number(step_text)
        if not 1 <= step <= len(field.star):
            raise ExpressionError(f"{has}: the step must be a number from 1 to {len(field.star)}")
    if span == "*":
        return field.star[::step]
    start = _value(field, has, first)
    end = _value(field, has, last) if dash else start
    if dash and last.lower() == "sun" and start > 0:
        end = 7
    if start > end:
        fix = f"{first}-{field.highest},{field.lowest}-{last}"
        raise ExpressionError(f"{has}, which runs backwards; write {fix}")
    return range(start, end + 1, step)


def _value(field: _Field, has: str, text: str) -> int:
    value = field.names.get(text.lower(), _number(text))
    if not field.lowest <= value <= field.highest:
        names = f" or names from {next(iter(field.names))} to {list(field.names)[-1]}" if field.names else ""
        raise ExpressionError(f"{has}; expected are numbers from {field.lowest} to {field.highest}{names}")
    return value


def _number(text: str) -> int:
    """The number of one or two digits; -1, which no field has, where it is none."""
    return int(text) if re.fullmatch("[0-9]{1,2}", text) else -1


def _shown(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"


def _reached_at(minute: datetime, zone: zoneinfo.ZoneInfo) -> datetime:
    """The first instant at which the zone's clock shows `minute`, or a later time where it skips it."""
    slot = minute.replace(tzinfo=zone).astimezone(UTC)
    if slot.astimezone(zone).replace(tzinfo=None, fold=0) == minute:
        return slot
    # In a gap. By the offset before it `minute` comes too late, by the one after it too early.
    early, late = minute.replace(tzinfo=zone, fold=1).astimezone(UTC), slot
    while late - early > _TICK:
        middle = early + (late - early) / 2
        if middle.astimezone(zone).replace(tzinfo=None) >= minute:
            late = middle
        else:
            early = middle
    return late


def _put_back_at(after: datetime, zone: zoneinfo.ZoneInfo) -> datetime | None:
    """The instant at which the zone's clock is put back, if that is soon enough after `after` to show times again."""

    def offset(at: datetime) -> timedelta:
        shown = at.astimezone(zone).utcoffset()
        assert shown is not None
        return shown

    early, late = after, after + _LONGEST_SHIFT
    before = offset(early)
    if offset(late) >= before:
        return None
    while late - early > _TICK:
        middle = early + (late - early) / 2
        if offset(middle) < before:
            late = middle
        else:
            early = middle
    return late
