"""Worker: a roostd inside another program, with real children and a real database."""

import asyncio
import importlib
import inspect
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import roostd
from roost_client import AsyncRoost, HandlerRegistry, Hooks, JobState, Roost
from roostd import Worker
from roostd.master.run import StartError

HANDLERS = """
import os, time
from roost_client import HandlerRegistry, Hooks, job

registry = HandlerRegistry()

async def before_job(job, *, ctx):
    ctx["began"] = True

def after_job(job, *, result, error, ctx):
    with open(job.metadata["path"], "a") as file:
        file.write(f"{job.task} {error} {ctx}\\n")

hooks = Hooks(before_job, after_job)

@job("which_process", registry=registry)
def which_process():
    return [os.getpid(), os.getppid()]

@job("fail", registry=registry)
def fail():
    raise ValueError("on purpose")

@job("touch_and_sleep", registry=registry)
def touch_and_sleep(path, seconds):
    open(path, "w").close()
    time.sleep(seconds)
"""

_numbers = itertools.count(1)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with handlers, on sys.path, in a registry of its own."""
    name = f"worker_handlers_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(HANDLERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


@pytest.fixture
def make(dsn: str, module: ModuleType) -> Callable[..., Worker]:
    """A worker with what makes tests fast."""

    def make(**options: object) -> Worker:
        fast = {"poll_interval": 0.1, "concurrency": 2, "startup_retry_delay": 0.01}
        return Worker(dsn, **{"registry": module.registry, **fast, **options})

    return make


async def eventually(look: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline, f"no {what}"
        await asyncio.sleep(0.01)


def test_the_options_are_those_of_the_api_reference_in_its_order() -> None:
    parameters = inspect.signature(Worker).parameters
    options = {name: parameter.default for name, parameter in parameters.items() if name != "dsn"}
    reference = {
        "queues": ("default",),
        "concurrency": 4,
        "prefetch": None,
        "poll_interval": 1.0,
        "retry_strategy": None,
        "registry": None,
        "run_cron": True,
        "heartbeat_interval": 15.0,
        "orphan_reaper_interval": 30.0,
        "orphan_stale_after": 300.0,
        "shutdown_timeout": 30.0,
        "listen_reconnect_delay": 1.0,
        "error_cap": 20,
        "archive_after_seconds": None,
        "archive_interval": 60.0,
        "result_ttl_seconds": None,
        "startup_max_retries": 30,
        "startup_retry_delay": 1.0,
        "hooks": None,
    }
    assert list(options.items()) == list(reference.items())
    assert next(iter(parameters)) == "dsn"
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "dsn")


def test_run_once_runs_what_is_available_in_children_and_counts_it(dsn: str, make: Callable[..., Worker]) -> None:
    with Roost(dsn) as roost:
        ids = [roost.enqueue("which_process", queue=queue) for queue in ("default", "default", "emails", "other")]
        assert asyncio.run(make(queues=("default", "emails")).run_once()) == 3
        jobs = [roost.get_job(job_id) for job_id in ids]
    assert [job.state for job in jobs] == ["completed", "completed", "completed", "available"]
    for job in jobs[:3]:
        assert job.result is not None and os.getpid() not in job.result  # noqa: PT018


def test_a_client_makes_a_worker_for_its_database_and_its_handlers(dsn: str, module: ModuleType) -> None:
    async def main() -> tuple[int, str]:
        async with AsyncRoost(dsn, registry=module.registry) as roost:
            job_id = await roost.enqueue("which_process", queue="emails")
            worker = roost.worker(queues=["emails"], concurrency=1, poll_interval=0.1)
            assert isinstance(worker, Worker)
            ran = await worker.run_once()
            with pytest.raises(ValueError, match="concurrency"):
                roost.worker(concurrency=0)
            return ran, (await roost.get_job(job_id)).state

    assert asyncio.run(main()) == (1, JobState.COMPLETED)


def test_a_worker_runs_until_it_is_asked_to_stop_also_in_a_thread(dsn: str, make: Callable[..., Worker]) -> None:
    worker = make()
    thread = threading.Thread(target=lambda: asyncio.run(worker.run()))
    thread.start()
    with Roost(dsn) as roost:
        try:
            job_id = roost.enqueue("which_process")
            asyncio.run(eventually(lambda: roost.get_job(job_id).state == "completed", "completed job"))
        finally:
            worker.request_stop()
            thread.join(30)
        assert not thread.is_alive()
        assert roost.list_workers() == []


def test_a_worker_archives_and_one_that_runs_once_does_not(dsn: str, make: Callable[..., Worker]) -> None:
    ages = {"archive_after_seconds": 0, "archive_interval": 0.05, "result_ttl_seconds": 3600}
    with Roost(dsn) as roost:
        job_id = roost.enqueue("which_process")
        assert asyncio.run(make(**ages).run_once()) == 1
        assert [job.id for job in roost.list_jobs()] == [job_id]
        worker = make(**ages)
        thread = threading.Thread(target=lambda: asyncio.run(worker.run()))
        thread.start()
        try:
            asyncio.run(eventually(lambda: roost.list_jobs() == [], "archived job"))
        finally:
            worker.request_stop()
            thread.join(30)
        assert roost.get_job(job_id).result


def test_a_worker_that_was_stopped_before_it_ran_ends_at_once_and_can_run_again(
    dsn: str, make: Callable[..., Worker]
) -> None:
    worker = make()
    worker.request_stop()
    asyncio.run(asyncio.wait_for(worker.run(), 30))
    with Roost(dsn) as roost:
        roost.enqueue("which_process")
    assert asyncio.run(worker.run_once()) == 1


def test_a_stop_lets_the_running_job_finish_and_a_second_one_does_not(
    dsn: str, make: Callable[..., Worker], tmp_path: Path
) -> None:
    async def stop_in_the_middle(times: int, seconds: float) -> None:
        trace = tmp_path / f"running-{times}"
        worker = make()
        running = asyncio.create_task(worker.run())
        roost.enqueue("touch_and_sleep", args={"path": str(trace), "seconds": seconds})
        await eventually(trace.exists, "running job")
        for _ in range(times):
            worker.request_stop()
        await asyncio.wait_for(running, 30)

    with Roost(dsn) as roost:
        asyncio.run(stop_in_the_middle(1, 0.3))
        assert [job.state for job in roost.list_jobs()] == ["completed"]
        asyncio.run(stop_in_the_middle(2, 600))
        assert [(job.state, job.attempt) for job in roost.list_jobs()] == [("available", 0), ("completed", 1)]


def test_cancelling_run_ends_the_worker_in_order(dsn: str, make: Callable[..., Worker], tmp_path: Path) -> None:
    trace = tmp_path / "running"

    async def cancel_in_the_middle() -> None:
        running = asyncio.create_task(make().run())
        roost.enqueue("touch_and_sleep", args={"path": str(trace), "seconds": 0.3})
        await eventually(trace.exists, "running job")
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 30)

    with Roost(dsn) as roost:
        asyncio.run(cancel_in_the_middle())
        assert [job.state for job in roost.list_jobs()] == ["completed"]
        assert roost.list_workers() == []


def test_the_programs_signals_title_and_child_processes_stay_its_own(
    dsn: str, make: Callable[..., Worker], tmp_path: Path
) -> None:
    mine = subprocess.Popen(["sleep", "600"])
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in watched]
    title = Path("/proc/self/cmdline").read_bytes()
    during: list[object] = []

    async def look_while_it_runs() -> None:
        worker = make(orphan_reaper_interval=0.05)
        running = asyncio.create_task(worker.run())
        job_id = roost.enqueue("which_process")
        await eventually(lambda: roost.get_job(job_id).state == "completed", "completed job")
        during.extend(signal.getsignal(number) for number in watched[2:])
        worker.request_stop()
        await asyncio.wait_for(running, 30)

    try:
        with Roost(dsn) as roost:
            asyncio.run(look_while_it_runs())
        assert mine.poll() is None
        assert during == before[2:]
        assert [signal.getsignal(number) for number in watched] == before
        assert Path("/proc/self/cmdline").read_bytes() == title
    finally:
        mine.kill()
        mine.wait()


def test_systemds_variables_are_left_to_the_program(
    dsn: str, make: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    asyncio.run(make().run_once())
    assert os.environ["NOTIFY_SOCKET"] == "/nowhere/notify"


@pytest.mark.parametrize(
    ("strategy", "least", "most"),
    [
        (lambda attempt: 1000 * attempt, 990, 1010),
        (lambda attempt: 1 / 0, 0, 5),  # then exponential()
        (lambda attempt: float("inf"), 0, 5),
    ],
)
def test_the_retry_strategy_says_when_a_failed_job_runs_again(
    dsn: str, make: Callable[..., Worker], strategy: Callable[[int], float], least: float, most: float
) -> None:
    with Roost(dsn) as roost:
        job_id = roost.enqueue("fail")
        asyncio.run(make(retry_strategy=strategy).run_once())
        job = roost.get_job(job_id)
    assert job.state == JobState.RETRYABLE
    delay = job.scheduled_at.timestamp() - time.time()
    assert least - 30 < delay < most


def test_only_the_newest_errors_are_kept(dsn: str, make: Callable[..., Worker]) -> None:
    with Roost(dsn) as roost:
        job_id = roost.enqueue("fail")
        for _ in range(3):
            roost.retry(job_id)
            asyncio.run(make(error_cap=2, retry_strategy=lambda attempt: 3600).run_once())
        assert [error["attempt"] for error in roost.get_job(job_id).errors] == [2, 3]


def test_the_log_goes_where_the_program_says_or_to_stderr(dsn: str, module: ModuleType) -> None:
    program = f"""
import asyncio, sys, structlog
sys.path.insert(0, {str(Path(str(module.__file__)).parent)!r})
import {module.__name__} as handlers
from roostd import Worker
if sys.argv[1:]:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(open(sys.argv[1], "w")))
asyncio.run(Worker({dsn!r}, registry=handlers.registry).run_once())
"""
    log = Path(str(module.__file__)).with_name("log")
    for arguments in ([], [str(log)]):
        told = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert told.stdout == ""
        assert ("worker.ready" in told.stderr) == (not arguments)
    assert "worker.ready" in log.read_text()


def test_a_handler_in_main_is_refused() -> None:
    program = """
import asyncio
from roost_client import job
from roostd import Worker

@job("here")
def here(): ...

asyncio.run(Worker("postgresql:///nowhere").run_once())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert "cannot run task 'here' in a child: its handler is defined in __main__" in result.stderr
    assert "move it into a module" in result.stderr


def test_a_registry_without_tasks_or_without_a_name_is_refused(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="without tasks"):
        asyncio.run(Worker("postgresql:///nowhere", registry=HandlerRegistry()).run())
    nameless = HandlerRegistry()
    nameless.register("x", module.fail)
    with pytest.raises(ValueError, match="cannot find the registry"):
        asyncio.run(Worker("postgresql:///nowhere", registry=nameless).run())


def test_hooks_run_in_the_children(dsn: str, make: Callable[..., Worker], module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "hooked"
    with Roost(dsn) as roost:
        roost.enqueue("fail", metadata={"path": str(path)})
        asyncio.run(make(hooks=module.hooks, retry_strategy=lambda attempt: 3600).run_once())
    assert path.read_text() == "fail on purpose {'began': True}\n"


def test_hooks_without_a_name_and_what_is_no_hooks_are_refused(make: Callable[..., Worker], module: ModuleType) -> None:
    with pytest.raises(ValueError, match=f"cannot find the hooks in the modules {module.__name__}: give them a name"):
        asyncio.run(make(hooks=Hooks(module.before_job)).run())
    with pytest.raises(ValueError, match="cannot use hooks="):
        make(hooks=module.before_job)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("queues", ()),
        ("queues", "emails"),
        ("queues", ("a", "a")),
        ("queues", None),
        ("retry_strategy", "exponential"),
        ("registry", "shop.jobs"),
        ("concurrency", 0),
        ("concurrency", True),
        ("prefetch", 0),
        ("poll_interval", 0),
        ("poll_interval", float("nan")),
        ("heartbeat_interval", -1),
        ("orphan_stale_after", 30.0),
        ("shutdown_timeout", -1),
        ("error_cap", 0),
        ("archive_after_seconds", -1),
        ("archive_interval", 0),
        ("result_ttl_seconds", "1"),
        ("startup_max_retries", "5"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_with_its_name(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"cannot use {option}="):
        Worker("postgresql:///app", **{option: value})  # type: ignore[arg-type]


def test_a_dsn_that_cannot_be_used_is_not_shown() -> None:
    with pytest.raises(ValueError, match="cannot use dsn: expected") as caught:
        Worker("postgresql://me:s3cret/word@db/app")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("retries", [0, 1])
def test_a_database_that_does_not_answer_is_told_after_the_retries(
    make: Callable[..., Worker], module: ModuleType, tmp_path: Path, retries: int
) -> None:
    worker = Worker(f"host={tmp_path}", registry=module.registry, startup_max_retries=retries, startup_retry_delay=0.01)
    with pytest.raises(StartError, match=f"after {retries + 1} attempt"):
        asyncio.run(worker.run())


def test_a_missing_schema_is_told(empty_dsn: str, module: ModuleType) -> None:
    with pytest.raises(StartError, match="roostctl migrate up"):
        asyncio.run(Worker(empty_dsn, registry=module.registry).run())


def test_a_worker_that_runs_is_not_started_twice(make: Callable[..., Worker]) -> None:
    async def start_twice() -> None:
        worker = make()
        first = asyncio.create_task(worker.run())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="runs already"):
            await worker.run()
        worker.request_stop()
        await asyncio.wait_for(first, 30)

    asyncio.run(start_twice())


def test_the_package_gives_the_worker_only_when_asked() -> None:
    program = "import sys, roostd; assert 'roostd.worker' not in sys.modules; roostd.Worker; import roostd.worker"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="nonsense"):
        roostd.nonsense  # noqa: B018
