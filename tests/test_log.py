"""The log as a process writes it: each test runs one, with a stderr of its kind."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

EVENTS = """
import logging, warnings
from roostd import log
log.configure(LEVEL, FORMAT)
logger = log.get_logger(pid=7)
logger.debug("detail.seen")
logger.info("job.completed", job_id=1, queue="a b", name="x", task="\\x1b[31m\\n", none=None, yes=True, text="é")
logger.warning("child.exited", status=-9, nested={"a": [1]})
logger.bind(lease=3).error("db.lost")
logger.critical("disk.full")
"""


def run(code: str, *, format: str = "auto", level: str = "info", environ: dict[str, str] | None = None, **options):
    code = code.replace("LEVEL", repr(level)).replace("FORMAT", repr(format))
    options.setdefault("stderr", subprocess.PIPE)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **(environ or {})},
        stdout=subprocess.PIPE,
        timeout=60,
        **options,
    )
    assert result.returncode == 0, result.stderr
    return result


def lines(code: str, **options) -> list[str]:
    result = run(code, **options)
    assert result.stdout == b""
    return result.stderr.decode().splitlines()


def test_json_has_one_object_a_line_with_the_time_in_utc() -> None:
    objects = [json.loads(line) for line in lines(EVENTS)]
    assert [(o["level"], o["event"]) for o in objects] == [
        ("info", "job.completed"),
        ("warning", "child.exited"),
        ("error", "db.lost"),
        ("critical", "disk.full"),
    ]
    first = objects[0]
    assert list(first)[:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["timestamp"])
    del first["timestamp"]
    values = {"job_id": 1, "queue": "a b", "name": "x", "task": "\x1b[31m\n", "none": None, "yes": True, "text": "é"}
    assert first == {"level": "info", "event": "job.completed", "pid": 7, **values}
    assert objects[1]["nested"] == {"a": [1]}
    assert objects[2]["lease"] == 3


def test_journald_gets_priorities_and_no_time() -> None:
    assert lines(EVENTS, format="journald", level="debug") == [
        "<7>detail.seen pid=7",
        r'<6>job.completed pid=7 job_id=1 queue="a b" name=x task="\u001b[31m\n" none=null yes=true text=é',
        '<4>child.exited pid=7 status=-9 nested={"a": [1]}',
        "<3>db.lost pid=7 lease=3",
        "<2>disk.full pid=7",
    ]


def test_console_lines_are_readable_and_hold_nothing_that_steers_a_terminal() -> None:
    found = lines(EVENTS + 'logger.info("job.started", task="\\x1b[31m")', format="console")
    assert len(found) == 5
    assert "[info     ] job.completed" in found[0]
    assert "queue='a b'" in found[0]
    assert r"task='\x1b[31m'" in found[4]
    assert "\x1b" not in "".join(found)


@pytest.mark.parametrize(("level", "count"), [("debug", 5), ("info", 4), ("warning", 3), ("error", 2), ("critical", 1)])
def test_events_below_the_level_are_left_out(level: str, count: int) -> None:
    assert len(lines(EVENTS, level=level)) == count


def test_a_second_configuration_changes_level_and_format_and_doubles_nothing() -> None:
    code = EVENTS.replace(
        "log.configure(LEVEL, FORMAT)",
        "early = log.get_logger(); log.configure('debug', 'json'); log.configure('error', 'journald')",
    )
    found = lines(code + "logging.getLogger('x').error('once'); early.info('not.seen'); early.error('last.one')")
    assert found == [
        "<3>db.lost pid=7 lease=3",
        "<2>disk.full pid=7",
        "<3>library.logged logger=x message=once",
        "<3>last.one",
    ]


def test_auto_is_journald_only_while_stderr_is_the_journals_stream(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        status = os.fstat(stream.fileno())
        stream_id = f"{status.st_dev}:{status.st_ino}"
        run(EVENTS, stderr=stream, environ={"JOURNAL_STREAM": stream_id})
    assert log.read_text().startswith("<6>job.completed")
    assert lines(EVENTS, environ={"JOURNAL_STREAM": stream_id})[0].startswith("{")


@pytest.mark.parametrize(("environ", "coloured"), [({"TERM": "xterm"}, True), ({"NO_COLOR": "1"}, False)])
def test_auto_is_console_on_a_terminal(environ: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    chunks = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)
        except OSError:
            pass  # how a terminal ends

    reader = threading.Thread(target=read)
    reader.start()
    run(EVENTS, stderr=theirs, environ=environ)
    os.close(theirs)
    reader.join(30)
    os.close(ours)
    text = b"".join(chunks).decode()
    assert "job.completed" in text
    assert not text.startswith("{")
    assert ("\x1b[" in text) is coloured


FAILURE = """
from roostd import log
log.configure(LEVEL, FORMAT)
def connect(dsn):
    raise RuntimeError("gone\\nfor good")
try:
    connect("hunter" + "2")
except RuntimeError:
    log.get_logger().exception("db.lost", attempt=1)
"""


def test_a_traceback_is_one_json_value() -> None:
    (line,) = lines(FAILURE)
    assert json.loads(line)["exception"].startswith("Traceback (most recent call last):\n")


def test_each_line_of_a_traceback_has_the_priority_for_journald() -> None:
    found = lines(FAILURE, format="journald")
    assert found[0] == "<3>db.lost attempt=1"
    assert found[-2:] == ["<3>RuntimeError: gone", "<3>for good"]
    assert all(line.startswith("<3>") for line in found)


@pytest.mark.parametrize("format", ["json", "console", "journald"])
def test_no_traceback_shows_local_variables(format: str) -> None:
    found = "\n".join(lines(FAILURE, format=format))
    assert "RuntimeError: gone" in found
    assert "hunter2" not in found


def test_what_libraries_log_and_warn_about_comes_in_the_same_stream() -> None:
    code = """
import logging, warnings
from roostd import log
log.configure(LEVEL, FORMAT)
logging.getLogger("asyncio").info("not interesting")
logging.getLogger("asyncio").warning("slow: %d ms", 150)
logging.getLogger("psycopg.pool").log(35, "odd level")
logging.getLogger("psycopg").error("wrong %d", "arguments")
warnings.warn("old", DeprecationWarning)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("x").exception("failed")
"""
    found = [json.loads(line) for line in lines(code, environ={"PYTHONWARNINGS": "always"})]
    assert all(line["event"] == "library.logged" for line in found)
    told = [(line["level"], line["logger"], line["message"]) for line in found]
    assert told[:2] == [("warning", "asyncio", "slow: 150 ms"), ("warning", "psycopg.pool", "odd level")]
    assert told[2][:2] == ("error", "psycopg")
    assert told[2][2].startswith("wrong %d ('arguments',)")
    assert "DeprecationWarning: old" in told[3][2]
    assert told[4] == ("error", "x", "failed")
    assert "ZeroDivisionError" in found[4]["exception"]


@pytest.mark.parametrize("format", ["json", "console", "journald"])
def test_a_value_that_cannot_be_shown_costs_the_values_not_the_event(format: str) -> None:
    code = """
from roostd import log
log.configure(LEVEL, FORMAT)
class Rude:
    def __repr__(self):
        raise RuntimeError
log.get_logger().info("job.failed", value=Rude())
log.get_logger().info("job.failed", value="\\udcff", other=object())
"""
    found = lines(code, format=format)
    assert len(found) == 2
    assert "job.failed" in found[0]
    assert "RuntimeError" in found[0]
    assert "udcff" in found[1]


MANY = """
import os
from roostd import log
log.configure(LEVEL, FORMAT)
for number in range(1000):
    log.get_logger().info("job.completed", number=number, padding=200 * "x")
print("alive", flush=True)
"""


def test_a_full_disk_does_not_stop_the_process() -> None:
    with open("/dev/full", "wb") as full:
        assert run(MANY, stderr=full).stdout == b"alive\n"


def test_a_reader_that_has_gone_does_not_stop_the_process() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert run(MANY, stderr=writing).stdout == b"alive\n"
    finally:
        os.close(writing)


def test_a_closed_stderr_does_not_stop_the_process_nor_write_into_other_files(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    # Closed before Python starts: else the first file opened would be number 2.
    code = MANY.replace("for number", f"file = open({str(victim)!r}, 'w')\nfor number")
    result = subprocess.run(
        [
            "sh",
            "-c",
            'exec "$0" -c "$1" 2>&-',
            sys.executable,
            code.replace("LEVEL", "'info'").replace("FORMAT", "'json'"),
        ],
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert (result.returncode, result.stdout) == (0, b"alive\n")
    assert victim.read_bytes() == b""


def test_a_reader_that_stalls_costs_lines_which_are_counted_once_it_reads_again() -> None:
    code = MANY + "input()\nlog.get_logger().info('reader.back')\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace("LEVEL", "'info'").replace("FORMAT", "'json'")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    with process:
        # It came to its end with a full pipe in front of it.
        assert process.stdout.readline() == b"alive\n"
        seen: list[bytes] = []
        reader = threading.Thread(target=lambda: seen.extend(process.stderr or ()))
        reader.start()
        # The pipe has room at the latest when the first of it has been read.
        while not seen:
            reader.join(0.01)
        process.stdin.write(b"\n")
        process.stdin.close()
        reader.join(30)
        assert process.wait(30) == 0
    objects = []
    for line in seen:
        try:
            objects.append(json.loads(line))
        except ValueError:
            assert line.startswith(b'{"timestamp"')  # the line that was cut off when the pipe was full
    completed = [o for o in objects if o["event"] == "job.completed"]
    assert [o["number"] for o in completed] == list(range(len(completed)))
    assert objects[-2]["event"] == "log.dropped"
    assert objects[-2]["level"] == "warning"
    assert len(completed) + objects[-2]["count"] == 1000
    assert objects[-1]["event"] == "reader.back"


def test_a_long_line_arrives_whole(tmp_path: Path) -> None:
    code = "from roostd import log; log.configure(); log.get_logger().info('a.b', text=300_000 * 'é')"
    with (tmp_path / "log").open("wb") as stream:
        run(code, stderr=stream)
    assert json.loads((tmp_path / "log").read_text())["text"] == 300_000 * "é"
