"""jobs, show, enqueue."""

import json
from collections.abc import Callable
from datetime import UTC, datetime

import psycopg
import pytest

from roost_client import Roost
from roostd.store import statements
from tests.ctl.conftest import Ctl


def test_enqueue_prints_the_id_of_a_job_with_all_that_was_given(ctl: Ctl, roost: Roost) -> None:
    result = ctl(
        "enqueue", "send", "--args", '{"to": ["ä", 1]}', "--queue", "emails", "--priority", -3, "--max-attempts", 7,
        "--at", "2040-01-31T10:00:00+02:00", "--timeout", 9, "--tag", "a", "--tag", "b",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    job = roost.get_job(int(result.out))
    assert (job.task, job.args, job.queue, job.priority) == ("send", {"to": ["ä", 1]}, "emails", -3)
    assert (job.max_attempts, job.timeout_seconds, job.tags) == (7, 9, ["a", "b"])
    assert job.scheduled_at == datetime(2040, 1, 31, 8, tzinfo=UTC)


def test_enqueue_has_the_defaults_of_the_client(ctl: Ctl, roost: Roost) -> None:
    by_hand = roost.get_job(ctl("enqueue", "send", "--json").json["id"])
    by_client = roost.get_job(roost.enqueue("send"))
    differing = {"id", "scheduled_at", "inserted_at"}
    assert by_hand.model_dump(exclude=differing) == by_client.model_dump(exclude=differing)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--args", "[1"], "pass a JSON object"),
        (["--args", "[1]"], "args must be"),
        (["--args", '{"a": {"b": NaN}}'], "args.a.b"),
        (["--at", "tomorrow"], "pass an ISO 8601 time"),
        (["--at", "2040-01-31T10:00:00"], "has no time zone; add it, as in 2040-01-31T10:00:00Z"),
        (["--timeout", "0"], "timeout_seconds"),
        (["--priority", "high"], "not a valid integer"),
        (["--queue", ""], "queue"),
        (["--queue", "q" * 129], "queue"),
    ],
)
def test_enqueue_refuses_what_a_job_cannot_have(ctl: Ctl, roost: Roost, options: list[str], reason: str) -> None:
    result = ctl("enqueue", "send", *options)
    assert (result.code, result.out) == (64, "")
    assert reason in result.err
    assert len(result.err.splitlines()) == 1
    assert roost.list_jobs() == []


def test_jobs_lists_the_newest_first_and_only_what_the_filters_say(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    first, second = roost.enqueue("send", queue="emails"), roost.enqueue("resize")
    [third] = discard(queue="emails", errors=[{"attempt": 1, "error": "old"}, {"attempt": 2, "error": "E: new\nmore"}])
    result = ctl("jobs")
    assert result.code == 0
    assert result.lines[0].split() == ["ID", "STATE", "QUEUE", "TASK", "ATTEMPT", "SCHEDULED", "ERROR"]
    assert [line.split()[:5] for line in result.lines[1:]] == [
        [str(third), "discarded", "emails", "send", "3/3"],
        [str(second), "available", "default", "resize", "0/20"],
        [str(first), "available", "emails", "send", "0/20"],
    ]
    assert result.lines[1].endswith("  E: new")

    def listed(*options: str) -> list[int]:
        return [job["id"] for job in ctl("jobs", "--json", *options).json]

    assert listed("--queue", "emails") == [third, first]
    assert listed("--task", "resize") == [second]
    assert listed("--state", "discarded") == [third]
    assert listed("--queue", "emails", "--task", "send", "--state", "available") == [first]


def test_pages_by_before_and_limit_give_every_job_once(ctl: Ctl, roost: Roost) -> None:
    ids = [roost.enqueue("send") for _ in range(7)]
    found: list[int] = []
    before: list[object] = []
    while True:
        result = ctl("jobs", "--json", "--limit", 3, *before)
        if result.code:
            break
        found += [job["id"] for job in result.json]
        before = ["--before", found[-1]]
        assert (f"--before {found[-1]}" in result.err) == (len(result.json) == 3)
    assert found == ids[::-1]
    assert (result.code, result.json) == (1, [])


def test_jobs_that_match_nothing_end_with_1_and_no_output(ctl: Ctl) -> None:
    result = ctl("jobs", "--queue", "none")
    assert (result.code, result.out) == (1, "")
    assert "no job matches" in result.err


def test_an_unknown_state_is_wrong_usage_that_names_the_states(ctl: Ctl) -> None:
    result = ctl("jobs", "--state", "done")
    assert result.code == 64
    assert "completed" in result.err


def test_show_prints_a_job_with_readable_tracebacks(ctl: Ctl, discard: Callable[..., list[int]]) -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in send\nValueError: boom'
    [job_id] = discard(
        errors=[{"attempt": 3, "at": "2040-01-31T10:00:00Z", "error": "ValueError: boom", "trace": trace}]
    )
    result = ctl("show", job_id)
    assert result.code == 0
    fields = dict(line.split(None, 1) for line in result.lines[: result.lines.index("")])
    assert (fields["id"], fields["task"], fields["state"], fields["attempt"]) == (
        str(job_id),
        "send",
        "discarded",
        "3/3",
    )
    assert "completed" not in fields
    at = result.lines.index("attempt 3 at 2040-01-31T10:00:00Z: ValueError: boom")
    assert result.lines[at + 1 : at + 4] == [f"    {line}" for line in trace.splitlines()]


def test_show_json_has_every_field_of_a_job(ctl: Ctl, roost: Roost) -> None:
    job = roost.get_job(roost.enqueue("send", args={"a": 1}, metadata={"trace": "x"}))
    shown = ctl("show", job.id, "--json").json
    assert list(shown) == list(type(job).model_fields)
    assert (shown["args"], shown["metadata"], shown["result"]) == ({"a": 1}, {"trace": "x"}, None)
    assert datetime.fromisoformat(shown["inserted_at"]) == job.inserted_at


def test_show_finds_an_archived_job(ctl: Ctl, roost: Roost, dsn: str) -> None:
    job_id = roost.enqueue("send", args={"a": 1})
    roost.cancel(job_id)
    before = ctl("show", job_id)
    with psycopg.connect(dsn) as conn:
        conn.execute(statements.SQL["archive"], {"span": 0, "age": -1})
    assert roost.list_jobs() == []
    assert ctl("show", job_id) == before
    retried = ctl("retry", job_id)
    assert (retried.code, "is in the archive" in retried.err) == (1, True)


def test_show_of_an_unknown_job_ends_with_1(ctl: Ctl) -> None:
    result = ctl("show", 42)
    assert (result.code, result.out, result.err) == (1, "", "roostctl: cannot get job 42: there is no such job\n")


def test_text_that_would_steer_a_terminal_is_shown_as_escapes(
    ctl: Ctl, roost: Roost, discard: Callable[..., list[int]]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\x9b31m"
    [job_id] = discard(queue=evil, task=evil, errors=[{"attempt": 1, "at": evil, "error": evil, "trace": evil}])
    roost.pause_queue(evil)
    for command in (["jobs"], ["show", job_id], ["queues"], ["status"], ["pause", evil]):
        result = ctl(*command)
        assert result.code == 0
        text = result.out + result.err
        assert all(character.isprintable() or character == "\n" for character in text), command
        assert "\\x1b" in text


def test_json_stays_json_whatever_sql_put_into_a_job(ctl: Ctl, dsn: str) -> None:
    nested = '{"a": ' + "[" * 3000 + "]" * 3000 + "}"
    with psycopg.connect(dsn) as conn:
        huge = "1" + "0" * 400 + ".5"  # which Python reads as infinite
        for args in (f'{{"x": {huge}, "y": -{huge}}}', nested, '{"n": ' + "9" * 5000 + "}", '{"n": "NaN"}'):
            conn.execute("SELECT roost.enqueue('send', %s::jsonb)", [args])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(ctl("jobs", "--json").out, parse_constant=refuse)
    assert [job["id"] for job in found] == [4, 3, 2, 1]
    assert found[3]["args"] == {"x": "Infinity", "y": "-Infinity"}
    for job_id in range(1, 5):
        assert ctl("show", job_id).code == 0
