"""When expressions fire, against a clock that is watched minute by minute as Debian's cron watches it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roostd.core.cron import ExpressionError, Schedule, ZoneError, zone

MINUTE = timedelta(minutes=1)

# Days on which clocks are moved: forwards and back, by an hour, half an hour, two hours and a day, at night and across
# midnight; and days like any other.
MOVED = [
    ("Europe/Berlin", "2026-03-29"),
    ("Europe/Berlin", "2026-10-25"),
    ("America/New_York", "2026-03-08"),
    ("America/New_York", "2026-11-01"),
    ("Australia/Lord_Howe", "2026-04-05"),
    ("Australia/Lord_Howe", "2026-10-04"),
    ("Africa/Casablanca", "2026-02-15"),
    ("Africa/Casablanca", "2026-03-22"),
    ("America/Sao_Paulo", "2018-02-18"),
    ("America/Sao_Paulo", "2018-11-04"),
    ("America/Havana", "2026-11-01"),
    ("Antarctica/Troll", "2026-03-29"),
    ("Antarctica/Troll", "2026-10-25"),
    ("Asia/Pyongyang", "2018-05-05"),
    ("Europe/Dublin", "2026-10-25"),
    ("Pacific/Apia", "2011-12-30"),
    ("Asia/Kathmandu", "2026-05-05"),
    ("UTC", "2024-02-29"),
]


def instant(text: str, name: str = "UTC", fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(name), fold=fold).astimezone(UTC)


def slots(expression: str, name: str, after: datetime, until: datetime) -> list[datetime]:
    schedule, place, found = Schedule.parse(expression), ZoneInfo(name), []
    slot = schedule.next_after(after, place)
    while slot is not None and slot <= until:
        found.append(slot)
        slot = schedule.next_after(slot, place)
    return found


def local(expression: str, name: str, day: str, days: int = 1) -> list[str]:
    """The slots of so many days from that one, by the zone's clock."""
    end = (datetime.fromisoformat(day) + timedelta(days=days)).isoformat()
    found = slots(expression, name, instant(day, name) - MINUTE, instant(end, name) - MINUTE)
    return [f"{slot.astimezone(ZoneInfo(name)):%d %H:%M %z}" for slot in found]


# -- what Debian's cron does


class Field:
    """Some values of a field, and a text that means them."""

    def __init__(self, text: str, values: set[int]) -> None:
        self.text, self.values, self.is_star = text, values, text.startswith("*")

    def __repr__(self) -> str:
        return self.text


def fields(lowest: int, highest: int) -> st.SearchStrategy[Field]:
    value = st.integers(lowest, highest)
    steps = st.integers(1, highest - lowest + 1)
    star = st.just(Field("*", set(range(lowest, highest + 1))))
    stepped = steps.map(lambda step: Field(f"*/{step}", set(range(lowest, highest + 1, step))))
    one = value.map(lambda number: Field(str(number), {number}))
    span = st.tuples(value, value, steps).map(
        lambda t: Field(f"{min(t[:2])}-{max(t[:2])}/{t[2]}", set(range(min(t[:2]), max(t[:2]) + 1, t[2])))
    )
    several = st.lists(one | span, min_size=2, max_size=4).map(
        lambda parts: Field(",".join(part.text for part in parts), set().union(*(part.values for part in parts)))
    )
    return st.one_of(star, stepped, one, span, several)


expressions = st.tuples(
    fields(0, 59),
    st.one_of(fields(0, 23), st.integers(0, 4).map(lambda hour: Field(str(hour), {hour}))),
    st.one_of(st.just(Field("*", set(range(1, 32)))), fields(1, 31)),
    st.one_of(st.just(Field("*", set(range(1, 13)))), fields(1, 12)),
    st.one_of(st.just(Field("*", set(range(7)))), fields(0, 6)),
)


def matches(parts: tuple[Field, ...], shown: datetime) -> bool:
    minute, hour, day, month, weekday = parts
    by_date, by_weekday = shown.day in day.values, (shown.weekday() + 1) % 7 in weekday.values
    on_day = by_date and by_weekday if day.is_star or weekday.is_star else by_date or by_weekday
    return shown.minute in minute.values and shown.hour in hour.values and shown.month in month.values and on_day


def watched(parts: tuple[Field, ...], place: ZoneInfo, start: datetime, end: datetime) -> Iterator[datetime]:
    """What fires from `start` to `end`: wildcards by what the clock shows, the others by the latest it has shown."""
    is_wildcard = parts[0].is_star or parts[1].is_star
    reached = start.astimezone(place).replace(tzinfo=None)
    at = start
    while at < end:
        at += MINUTE
        shown = at.astimezone(place).replace(tzinfo=None, fold=0)
        if is_wildcard:
            if matches(parts, shown):
                yield at
            continue
        fires = False
        while reached < shown:
            reached += MINUTE
            fires = fires or matches(parts, reached)
        if fires:
            yield at


@settings(deadline=None)
@given(expressions, st.sampled_from(MOVED))
def test_slots_are_those_of_a_clock_that_is_watched(parts: tuple[Field, ...], moved: tuple[str, str]) -> None:
    name, day = moved
    place = ZoneInfo(name)
    middle = datetime.fromisoformat(day).replace(tzinfo=UTC)
    start, end = middle - timedelta(hours=20), middle + timedelta(hours=30)
    expression = " ".join(part.text for part in parts)
    expected = list(watched(parts, place, start, end))
    try:
        found = slots(expression, name, start, end)
    except ExpressionError:  # it never fires
        found = []
    assert found == expected


@settings(deadline=None)
@given(expressions, st.sampled_from(MOVED), st.integers(0, 6000), st.integers(0, 6000), st.integers(0, 59))
def test_the_latest_slot_is_the_last_of_all(
    parts: tuple[Field, ...], moved: tuple[str, str], before: int, later: int, seconds: int
) -> None:
    name, day = moved
    after = datetime.fromisoformat(day).replace(tzinfo=UTC) - timedelta(minutes=before)
    now = after + timedelta(minutes=later, seconds=seconds)
    expression = " ".join(part.text for part in parts)
    try:
        found = Schedule.parse(expression).latest(after, now, ZoneInfo(name))
    except ExpressionError:
        return
    every = slots(expression, name, after, now)
    assert found == (every[-1] if every else None)


@settings(deadline=None)
@given(expressions, st.datetimes(datetime(1990, 1, 1), datetime(2080, 1, 1)))
def test_the_next_day_is_found_however_far_away(parts: tuple[Field, ...], after: datetime) -> None:
    expression = " ".join(part.text for part in parts)
    try:
        found = Schedule.parse(expression).next_after(after.replace(tzinfo=UTC), ZoneInfo("UTC"))
    except ExpressionError:
        return
    assert found is not None
    shown = found.replace(tzinfo=None)
    assert shown > after
    assert matches(parts, shown)
    # No day in between has the date: the first time of a day that is one is no later than what was found.
    day = after.date()
    while day < shown.date():
        first = datetime(day.year, day.month, day.day, max(parts[1].values), max(parts[0].values))
        assert first <= after or not matches(parts, first)
        day += timedelta(days=1)


# -- the moving of clocks, in words


def test_a_skipped_time_fires_once_right_after_the_gap() -> None:
    assert local("30 2 * * *", "Europe/Berlin", "2026-03-29") == ["29 03:00 +0200"]
    assert local("0,15,30 2 * * *", "Europe/Berlin", "2026-03-29") == ["29 03:00 +0200"]
    assert local("0 2,3 * * *", "America/New_York", "2026-03-08") == ["08 03:00 -0400"]
    assert local("15 2 * * *", "Australia/Lord_Howe", "2026-10-04") == ["04 02:30 +1100"]
    assert local("30 0 * * *", "America/Sao_Paulo", "2018-11-04") == ["04 01:00 -0200"]


def test_a_repeated_time_fires_at_its_first_occurrence() -> None:
    assert local("30 2 * * *", "Europe/Berlin", "2026-10-25") == ["25 02:30 +0200"]
    assert local("45 1 * * *", "Australia/Lord_Howe", "2026-04-05") == ["05 01:45 +1100"]
    assert local("0 2 * * *", "Australia/Lord_Howe", "2026-04-05") == ["05 02:00 +1030"]
    assert local("30 23 * * *", "America/Sao_Paulo", "2018-02-17", 2) == ["17 23:30 -0200", "18 23:30 -0300"]


def test_wildcards_follow_the_clock() -> None:
    assert local("*/30 2 * * *", "Europe/Berlin", "2026-03-29") == []
    assert local("*/30 2 * * *", "Europe/Berlin", "2026-10-25") == [
        "25 02:00 +0200", "25 02:30 +0200", "25 02:00 +0100", "25 02:30 +0100",
    ]  # fmt: skip
    assert len(local("@hourly", "Europe/Berlin", "2026-03-29")) == 23
    hours = local("30 * * * *", "Australia/Lord_Howe", "2026-04-05")
    assert hours[:4] == ["05 00:30 +1100", "05 01:30 +1100", "05 01:30 +1030", "05 02:30 +1030"]
    every_minute = slots("* * * * *", "Europe/Berlin", instant("2026-10-24"), instant("2026-10-26"))
    assert [b - a for a, b in itertools.pairwise(every_minute)] == [MINUTE] * (2 * 24 * 60 - 1)


def test_a_day_that_is_skipped_fires_once_as_the_next_begins() -> None:
    assert local("0 9 * * *", "Pacific/Apia", "2011-12-29", 3) == [
        "29 09:00 -1000", "31 00:00 +1400", "31 09:00 +1400",
    ]  # fmt: skip
    assert local("0 12 30 12 *", "Pacific/Apia", "2011-12-29", 3) == ["31 00:00 +1400"]
    assert local("*/20 9 30 12 *", "Pacific/Apia", "2011-12-29", 3) == []


def test_ramadan_moves_the_clock_of_casablanca_back_and_forth() -> None:
    assert local("30 2 * * *", "Africa/Casablanca", "2026-02-15") == ["15 02:30 +0100"]
    assert local("30 2 * * *", "Africa/Casablanca", "2026-03-22") == ["22 03:00 +0100"]


def test_from_within_a_repeated_hour_the_second_occurrence_is_passed_over() -> None:
    schedule, place = Schedule.parse("30 2 * * *"), ZoneInfo("Europe/Berlin")
    for text, fold in (("2026-10-25 02:30", 0), ("2026-10-25 02:10", 1), ("2026-10-25 02:50", 1)):
        after = instant(text, "Europe/Berlin", fold)
        assert schedule.next_after(after, place) == instant("2026-10-26 02:30", "Europe/Berlin")


def test_before_standard_time_an_hour_had_odd_seconds() -> None:
    found = slots("0 0 * * *", "Europe/Berlin", instant("1893-03-30"), instant("1893-04-02 12:00"))
    assert [f"{slot.astimezone(ZoneInfo('Europe/Berlin')):%d %H:%M:%S}" for slot in found] == [
        "31 00:00:00", "01 00:06:32", "02 00:00:00",
    ]  # fmt: skip


# -- expressions


@pytest.mark.parametrize(
    ("expression", "same"),
    [
        ("@yearly", "0 0 1 1 *"),
        ("@annually", "0 0 1 1 *"),
        ("@monthly", "0 0 1 * *"),
        ("@weekly", "0 0 * * 0"),
        ("@daily", "0 0 * * *"),
        ("@midnight", "0 0 * * *"),
        ("@hourly", "0 * * * *"),
        (" 0\t0  1 1 * ", "0 0 1 1 *"),
        ("0 0 1 jan,MAR,Dec *", "0 0 1 1,3,12 *"),
        ("0 0 * * mon-fri", "0 0 * * 1-5"),
        ("0 0 * * fri-sun", "0 0 * * 5-7"),
        ("0 0 * * 7", "0 0 * * 0"),
        ("0 0 * * 5-7", "0 0 * * 0,5,6"),
        ("0-59/15 00 * * *", "0,15,30,45 0 * * *"),
    ],
)
def test_two_ways_to_write_the_same(expression: str, same: str) -> None:
    assert Schedule.parse(expression) == Schedule.parse(same)


def test_either_day_is_enough_where_neither_begins_with_a_star() -> None:
    friday_or_13th = local("0 0 13 * 5", "UTC", "2026-02-01", 28)
    assert friday_or_13th == [f"{day:02} 00:00 +0000" for day in (6, 13, 20, 27)]
    assert local("0 0 13 * 1", "UTC", "2026-02-01", 28) == [f"{day:02} 00:00 +0000" for day in (2, 9, 13, 16, 23)]
    # A star with a step is a star, as in Vixie's cron: both must match.
    assert local("0 0 */2 * 1", "UTC", "2026-02-01", 28) == ["09 00:00 +0000", "23 00:00 +0000"]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "has 0 fields; exactly five"),
        ("* * * *", "has 4 fields"),
        ("0 * * * * *", "has 6 fields"),
        ("* * * * * 2026", "has 6 fields"),
        ("60 * * * *", "'60' as minute; expected are numbers from 0 to 59"),
        ("* 24 * * *", "as hour"),
        ("* * 0 * *", "as day of month"),
        ("* * 32 * *", "numbers from 1 to 31"),
        ("* * * 13 *", "numbers from 1 to 12 or names from jan to dec"),
        ("* * * * 8", "numbers from 0 to 7 or names from sun to sat"),
        ("* * * * january", "as day of week"),
        ("* * mon * *", "as day of month"),
        ("*/0 * * * *", "the step must be a number from 1 to 60"),
        ("*/61 * * * *", "the step must be a number from 1 to 60"),
        ("*/-1 * * * *", "the step"),
        ("*/ * * * *", "the step"),
        ("5/15 * * * *", "a step needs a range, as in 5-59/2"),
        ("*-5 * * * *", "as minute"),
        ("1-2-3 * * * *", "as minute"),
        ("1,,2 * * * *", "'' as minute"),
        (",1 * * * *", "as minute"),
        ("0 22-2 * * *", "runs backwards; write 22-23,0-2"),
        ("-1 * * * *", "as minute"),
        ("005 * * * *", "as minute"),
        ("0-99999999 * * * *", "as minute"),
        ("٣ * * * *", "which no expression has"),
        ("1.5 * * * *", "'.', which no expression has"),
        ("0 0 L * *", "as day of month"),
        ("0 0 ? * *", "'?', which no expression has"),
        ("0 0 * * 5#2", "'#', which no expression has"),
        ("0\n0 * * *", "'\\n', which no expression has"),
        ("0 0 30 2 *", "never fires: no month that it names has a day 30"),
        ("0 0 31 2,4,6,9,11 *", "never fires"),
        ("0 0 31 feb */2", "never fires"),
        ("@reboot", "is not supported"),
        ("@fortnightly", "is unknown; there are @yearly"),
        ("@daily 5", "is unknown"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_reason(expression: str, reason: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Schedule.parse(expression)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "expression",
    [
        "*/1," * 300_000 + "* * * * *",
        "0-59," * 190 + "0 * * * *",
        "0-99999999 0-99999999 * * *",
        "*/99999999999999999999 * * * *",
        " " * 1_000_000,
        "@" * 1_000_000,
        "9" * 999,
    ],
    ids=lambda text: f"{text[:12]}…",
)
def test_an_absurd_expression_costs_nothing(expression: str) -> None:
    started_at = time.perf_counter()
    with pytest.raises(ExpressionError) as caught:
        Schedule.parse(expression)
        raise ExpressionError("it is in order")  # one below the longest
    assert time.perf_counter() - started_at < 0.05
    assert len(str(caught.value)) < 300


def test_the_thirtieth_of_february_or_a_monday_fires_on_mondays() -> None:
    assert len(local("0 0 30 2 1", "UTC", "2026-02-01", 28)) == 4


def test_leap_days_of_one_weekday_are_found_across_a_century() -> None:
    found = slots("0 0 29 2 */7", "UTC", instant("2072-03-01"), instant("2130-01-01"))  # Sundays
    assert [slot.year for slot in found] == [2088, 2128]


def test_what_only_ever_falls_into_gaps_is_found_to_be_never() -> None:
    place = ZoneInfo("America/New_York")
    started_at = time.perf_counter()
    # Sundays of the second week of March at two, by a wildcard: the hour that is skipped.
    assert Schedule.parse("* 2 8-14 3 */7").next_after(instant("2026-01-01"), place) is None
    assert Schedule.parse("0 2 8-14 3 */7").next_after(instant("2026-01-01"), place) == instant("2026-03-08 07:00")
    assert time.perf_counter() - started_at < 2


def test_at_the_end_of_time_there_is_nothing_more() -> None:
    assert Schedule.parse("* * * * *").next_after(datetime(9999, 12, 1, tzinfo=UTC), ZoneInfo("UTC")) is None
    assert Schedule.parse("@yearly").next_after(datetime(9999, 6, 1, tzinfo=UTC), ZoneInfo("UTC")) is None


def test_a_zone_that_is_none_is_refused_with_the_nearest() -> None:
    assert zone("Europe/Berlin").key == "Europe/Berlin"
    with pytest.raises(ZoneError, match="did you mean Europe/Berlin"):
        zone("Europe/Berlim")
    for name in ("", "America", "../etc/passwd", "/etc/localtime", "a\0b", "\ud800", "x" * 10_000, "EST5EDT5"):
        with pytest.raises(ZoneError):
            zone(name)
