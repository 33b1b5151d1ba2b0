"""That the report to keep says what it is of, and that what a process has open is told in words."""

from __future__ import annotations

import os
import socket

from chaos.checker import check
from chaos.evidence import Enqueued, Evidence, Injected, Sample
from chaos.fleet import open_files_of, sockets
from chaos.monitor import in_words
from chaos.plan import Plan
from chaos.report import document


def test_the_report_names_the_commit_the_seed_the_recoveries_and_what_went_wrong() -> None:
    evidence = Evidence(
        plan=Plan(7, (), (), {}),
        told=Enqueued(),
        injected=[Injected("kill_child", "m1", 1.0, 2.0, "child death", 0.25)],
        exit_statuses={"m1": 1},
        skipped={"fill_disk": "no tmpfs"},
    )
    text = document("python -m chaos --seed 7", "0123abc", evidence, check(evidence))
    for words in (
        "commit 0123abc",
        "`python -m chaos --seed 7`",
        "| child death | 1 s | 1 | 0.25 s | 0.25 s | 0.25 s |",
        "| kill_child | 1 |",
        "| fill_disk | left out: no tmpfs |",
        "- exit: m1 ended with 1 at SIGTERM",
    ):
        assert words in text


def test_a_process_that_grew_is_reported_with_what_it_has_more_of() -> None:
    samples = [Sample(float(n), "master", "m1", 9, ("/dev/null", *["unix socket"] * (n // 4)), 1) for n in range(20)]
    evidence = Evidence(plan=Plan(1, (), (), {}), told=Enqueued(), samples=samples)
    (violation,) = check(evidence).violations
    assert violation.what == "master 9 of m1 has 3 open files more than at its start: 3 unix socket"


def test_open_files_are_told_by_their_kind() -> None:
    one, other = socket.socketpair()
    with one, other, socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as connection:
            files = open_files_of(os.getpid())
            ours = {number: files[number] for number in (one.fileno(), connection.fileno())}
            port = server.getsockname()[1]
            assert in_words(ours, sockets()) == (f"TCP to {port}, state 01", "unix socket")
    assert open_files_of(2**22 + 1) == {}
