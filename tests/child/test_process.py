"""What handlers do to their process, and how a child ends: only that job suffers, and nothing false is reported."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from roostd.child.run import EXIT_DONE
from roostd.child.running import EXIT_COPY
from roostd.wire.signals import EXIT_UNUSABLE
from tests.child.conftest import Child

MakeChild = Callable[..., Child]
MEGABYTE = 1 << 20
ROOT = Path(__file__).parents[2]


# -- ends without a report


@pytest.mark.parametrize(
    ("task", "args", "status"),
    [
        ("exit_at_once", {"status": 0}, 0),
        ("exit_at_once", {"status": 3}, 3),
        ("kill_itself", {}, -signal.SIGKILL),
        ("segfault", {}, -signal.SIGSEGV),
        ("close_everything", {}, EXIT_UNUSABLE),
    ],
)
def test_a_child_that_can_not_report_ends_and_leaves_the_rest_to_others(
    child: Child, task: str, args: dict[str, int], status: int
) -> None:
    child.start(task, **args)
    behind = [child.start("echo", value=number) for number in range(3)]
    assert child.exit_status() == status
    assert child.process.take_back() == behind


def test_a_file_in_the_place_of_its_channel_is_not_written_to(child: Child, tmp_path: Path) -> None:
    file = tmp_path / "file"
    child.start("put_files_in_place", path=str(file))
    assert child.exit_status() == EXIT_UNUSABLE
    assert file.read_bytes() == b""


def test_the_stack_of_a_fatal_signal_is_kept_for_the_record(child: Child) -> None:
    child.start("segfault")
    child.exit_status()
    dump = child.process.read_dump()
    assert "Segmentation fault" in dump
    assert "in segfault" in dump


def test_a_job_whose_handler_closed_the_intake_is_reported_and_the_child_ends(child: Child) -> None:
    assert child.result("close_intake") is None
    assert child.exit_status() == EXIT_UNUSABLE


# -- goes on


@pytest.mark.parametrize("task", ["fork_and_return", "leave_thread", "leave_tasks"])
def test_a_job_that_leaves_something_behind_is_reported_once_and_the_next_one_runs(child: Child, task: str) -> None:
    for number in range(3):
        assert child.result(task, value=number) == number
    assert child.result("pid") == child.pid


def test_a_copy_of_the_process_that_fails_too_reports_nothing(child: Child) -> None:
    assert child.failure("fork_and_fail").error == "ValueError: both of us"
    assert child.result("echo", value=1) == 1


def test_the_copy_ends_with_a_status_of_its_own() -> None:
    assert len({EXIT_DONE, EXIT_UNUSABLE, EXIT_COPY}) == 3


def test_threads_that_are_left_do_not_keep_a_child_from_ending(child: Child) -> None:
    child.result("leave_thread", value=1)
    child.process.retire()
    assert child.exit_status() == EXIT_DONE


def test_a_child_with_a_few_dead_processes_goes_on_and_with_many_it_ends(child: Child) -> None:
    assert child.result("leave_zombies", number=1) is None
    assert child.result("pid") == child.pid
    leases = [child.start("leave_zombies", number=1) for _ in range(60)]
    outcomes = child.last_outcomes()
    assert 10 < len(outcomes) < 60
    assert child.exit_status() == EXIT_DONE
    assert child.process.take_back() == leases[len(outcomes) :]


# -- signals


def ignored_by_a_fresh_program() -> list[int]:
    """What Python ignores (SIGPIPE, SIGXFSZ), and what a program started here inherits as ignored."""
    call = "import sys; sys.path[:0] = sys.argv[1:]; import handlers; print(handlers.ignored_signals())"
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", call, folder]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [int(number) for number in output.strip("[]\n").split(",")]


def test_a_handler_finds_the_signals_as_a_fresh_program_has_them(child: Child) -> None:
    found = child.result("signals")
    assert found["ignored"] == ignored_by_a_fresh_program()
    assert found["blocked"] == []
    assert found["session"] == child.pid


def test_a_child_whose_handler_took_its_signals_ends_when_the_job_is_reported(child: Child) -> None:
    """It could not be called off any more."""
    assert child.result("take_signals") is None
    behind = child.start("echo", value=1)
    assert child.exit_status() == EXIT_DONE
    assert child.process.take_back() == [behind]


def test_a_child_whose_handler_left_no_file_to_open_ends_before_another_job_suffers(child: Child) -> None:
    assert child.result("open_all_files") > 10
    behind = child.start("echo", value="x" * 100_000)  # which takes a descriptor
    assert child.exit_status() == EXIT_DONE
    assert child.process.take_back() == [behind]


def test_a_child_whose_handler_blocked_its_signals_ends_too(child: Child) -> None:
    assert child.result("block_signals") is None
    behind = child.start("echo", value=1)
    assert child.exit_status() == EXIT_DONE
    assert child.process.take_back() == [behind]


def test_a_child_whose_handler_left_an_alarm_ends_before_it_hits_another_job(child: Child) -> None:
    assert child.result("set_alarm", seconds=5) is None
    behind = child.start("echo", value=1)
    assert child.exit_status() == EXIT_DONE
    assert child.process.take_back() == [behind]


def test_a_handler_sees_no_descriptor_of_the_template_or_of_other_children(make_child: MakeChild) -> None:
    alone = make_child().result("descriptors")
    others = [make_child() for _ in range(5)]
    assert others[-1].result("descriptors") == alone


# -- ends in good order


def test_a_child_ends_when_its_intake_is_closed_and_empty(child: Child) -> None:
    leases = [child.start("echo", value=number) for number in range(20)]
    child.process.retire()
    assert [child.outcome().lease for _ in leases] == leases
    assert child.exit_status() == EXIT_DONE


def test_an_idle_child_ends_at_once_when_its_intake_is_closed(child: Child) -> None:
    child.process.retire()
    assert child.exit_status() == EXIT_DONE


def test_a_child_ends_after_its_number_of_jobs_and_gives_the_rest_back(make_child: MakeChild) -> None:
    child = make_child(max_jobs_per_child=3)
    leases = [child.start("echo", value=number) for number in range(8)]
    assert [child.outcome().lease for _ in range(3)] == leases[:3]
    assert child.exit_status() == EXIT_DONE
    assert child.process.take_back() == leases[3:]


def test_failed_jobs_count_towards_that_number(make_child: MakeChild) -> None:
    child = make_child(max_jobs_per_child=2)
    child.failure("fail", kind="ValueError")
    child.failure("no_such_task")
    assert child.exit_status() == EXIT_DONE


def test_a_child_that_has_grown_too_large_ends_when_its_job_is_reported(make_child: MakeChild) -> None:
    child = make_child(max_rss_bytes=200 * MEGABYTE)
    assert child.result("eat_memory", megabytes=1) == MEGABYTE
    assert child.result("eat_memory", megabytes=300) == 300 * MEGABYTE
    assert child.exit_status() == EXIT_DONE


def test_a_job_that_wants_more_memory_than_allowed_fails_and_the_child_goes_on(make_child: MakeChild) -> None:
    child = make_child(memory_limit_bytes=300 * MEGABYTE)
    assert child.failure("eat_memory", megabytes=1_000).error.startswith("MemoryError")
    assert child.result("eat_memory", megabytes=1) == MEGABYTE


def test_a_child_goes_when_nobody_reads_its_outcomes_any_more(child: Child) -> None:
    child.process.outcomes.shutdown(socket.SHUT_RDWR)
    child.start("echo", value=1)
    assert child.exit_status() == EXIT_UNUSABLE


def test_what_a_job_left_running_ends_with_a_child_that_ends_by_itself(child: Child) -> None:
    daemon = os.pidfd_open(child.result("daemonise"))
    try:
        child.process.retire()
        assert child.exit_status() == EXIT_DONE
        assert select.select([daemon], [], [], 10)[0], "it lives on"
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(daemon, signal.SIGKILL)
        os.close(daemon)
