"""What systemd receives, on a real datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from roostd.sdnotify import Notifier


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.settimeout(10)
        name = (
            str(tmp_path / "notify") if request.param == "path" else f"@roost-test-{os.getpid()}-{time.monotonic_ns()}"
        )
        server.bind("\0" + name[1:] if name.startswith("@") else name)
        yield server, name


@pytest.fixture
def told(listener: tuple[socket.socket, str]) -> Iterator[tuple[Notifier, socket.socket]]:
    server, name = listener
    notifier = Notifier({"NOTIFY_SOCKET": name})
    yield notifier, server
    notifier.close()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda n: n.ready("4 children"), "READY=1\nSTATUS=4 children"),
        (lambda n: n.stopping(), "STOPPING=1"),
        (lambda n: n.status("running 3 jobs"), "STATUS=running 3 jobs"),
        (lambda n: n.status("a\nREADY=1\r\n b"), "STATUS=a READY=1 b"),
        (lambda n: n.status(""), "STATUS="),
        (lambda n: n.status("größer \udcff"), "STATUS=größer ?"),
        (lambda n: n.status(100_000 * "x"), "STATUS=" + 500 * "x"),
        (lambda n: n.watchdog(), "WATCHDOG=1"),
        (lambda n: n.extend_timeout(1.5), "EXTEND_TIMEOUT_USEC=1500000"),
    ],
)
def test_each_notification_is_one_datagram(told: tuple[Notifier, socket.socket], call, expected: str) -> None:
    notifier, server = told
    assert call(notifier)
    assert server.recv(65536).decode() == expected


def test_a_reload_is_stamped_with_the_monotonic_clock(told: tuple[Notifier, socket.socket]) -> None:
    notifier, server = told
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.reloading()
    reloading, stamp = server.recv(65536).decode().split("\n")
    assert reloading == "RELOADING=1"
    key, _, value = stamp.partition("=")
    assert key == "MONOTONIC_USEC"
    assert before <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_without_a_socket_nothing_happens() -> None:
    notifier = Notifier({})
    assert not notifier.ready("up")
    assert not notifier.watchdog()
    assert notifier.watchdog_interval_seconds is None


def test_children_do_not_inherit_what_would_let_them_speak_for_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    assert notifier.watchdog_interval_seconds == 15.0
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    notifier.close()


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [
        ("10000000", None, 5.0),
        pytest.param("10000000", str(os.getpid()), 5.0, id="own-pid"),
        ("10000000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("soon", None, None),
    ],
)
def test_the_watchdog_is_fed_at_half_its_time_if_it_waits_for_this_process(
    usec: str, pid: str | None, expected: float | None
) -> None:
    environ = {"WATCHDOG_USEC": usec} | ({"WATCHDOG_PID": pid} if pid else {})
    assert Notifier(environ).watchdog_interval_seconds == expected


@pytest.mark.parametrize("address", ["/nowhere/notify", "@" + 300 * "x", "vsock:2:1", "relative", "@a\0b"])
def test_an_address_that_leads_nowhere_is_no_error(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    assert not notifier.ready("up")
    notifier.close()


def test_a_full_queue_drops_the_notification_at_once_and_the_next_may_pass(
    told: tuple[Notifier, socket.socket],
) -> None:
    notifier, server = told
    for _ in range(100_000):
        if not notifier.watchdog():
            break
    else:
        pytest.fail("the queue never filled")
    server.recv(65536)
    assert notifier.watchdog()
