"""The handlers of the child's tests: what applications do, and what none should. Imported by the template alone."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from roost_client import SnoozeJob, job
from tests.child import models
from tests.child.models import Parcel
from tests.child.telling import tell


@job("echo")
def echo(**args: Any) -> Any:
    return args.get("value")


@job("one_argument")
def one_argument(value: int) -> int:
    return value


# -- endings


class Mine(BaseException):
    pass


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class Exiting(Exception):
    def __str__(self) -> str:
        sys.exit(3)


class NoText(Exception):
    def __str__(self) -> str:
        return 7  # type: ignore[return-value]


class SlyText(str):
    def __format__(self, spec: str) -> str:
        raise RuntimeError("not in an f-string")

    def __len__(self) -> int:
        raise RuntimeError("of no length")


class Sly(Exception):
    def __str__(self) -> str:
        return SlyText("sly")


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class WithoutName(Exception, metaclass=Nameless):
    pass


class OddlyNamed(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        return "a \x00 and a \ud800"


class WithOddName(Exception, metaclass=OddlyNamed):
    pass


def _chained(depth: int) -> Exception:
    error = Exception("the first")
    for number in range(depth):
        following = Exception(f"number {number}")
        following.__context__ = error
        error = following
    return error


def _noted() -> Exception:
    error = Exception("with notes")
    error.add_note("a \x00 and a \ud800 in a note")
    return error


def _snooze(seconds: Any) -> SnoozeJob:
    error = SnoozeJob(1)
    error.seconds = seconds
    return error


ERRORS: dict[str, Any] = {
    "ValueError": lambda: ValueError("it is no good"),
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "MemoryError": MemoryError,
    "Mine": lambda: Mine("of a class of its own"),
    "TimeoutError": lambda: TimeoutError("of the handler's own"),
    "ExceptionGroup": lambda: ExceptionGroup("many", [ValueError("one"), KeyError("two")]),
    "Unprintable": Unprintable,
    "Exiting": Exiting,
    "NoText": NoText,
    "Sly": Sly,
    "WithoutName": WithoutName,
    "odd name": WithOddName,
    "NUL and surrogate": lambda: Exception("a \x00 and a \udcff"),
    "ten million characters": lambda: Exception("x" * 10_000_000),
    "a long chain": lambda: _chained(2_000),
    "notes": _noted,
    "odd snooze": lambda: _snooze(object()),
}


@job("fail")
def fail(kind: str) -> None:
    raise ERRORS[kind]()


@job("recurse")
def recurse() -> None:
    recurse()


@job("snooze")
def snooze(seconds: float) -> None:
    raise SnoozeJob(seconds)


@job("snooze_later")
async def snooze_later(seconds: float) -> None:
    await asyncio.sleep(0)
    raise SnoozeJob(seconds)


class Answer(BaseModel):
    text: str


def _generator() -> Any:
    yield 1


async def _async_generator() -> Any:
    yield 1


async def _coroutine() -> int:
    return 1


class Awaitable:
    def __await__(self) -> Any:
        yield


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _circular() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


RESULTS: dict[str, Any] = {
    "model": lambda: Answer(text="grüße"),
    "models in a list": lambda: [Answer(text="a"), {"b": Answer(text="b")}],
    "tuple": lambda: (1, 2),
    "int keys": lambda: {1: "a", None: "b"},
    "object": object,
    "set": lambda: {1},
    "bytes": lambda: b"x",
    "tuple keys": lambda: {(1, 2): 3},
    "NaN": lambda: float("nan"),
    "inf": lambda: [1, float("inf")],
    "surrogate": lambda: {"text": "\udcff"},
    "surrogate key": lambda: {"\udcff": 1},
    "NUL": lambda: {"text": "a\x00b"},
    "text that says NUL": lambda: "\\u0000",
    "nested": lambda: _nested(5_000),
    "circular": _circular,
    "a number of many digits": lambda: 10**5_000,
    "generator": _generator,
    "async generator": _async_generator,
    "coroutine": _coroutine,
    "awaitable": Awaitable,
}


@job("give")
def give(kind: str) -> Any:
    return RESULTS[kind]()


@job("give_bytes")
def give_bytes(size: int) -> str:
    return "x" * size


# -- arguments


@job("takes_model", args_model=Parcel)
def takes_model(parcel: Parcel) -> Any:
    return [type(parcel).__name__, parcel.weight, parcel.label]


@job("takes_fields", args_model=Parcel)
def takes_fields(weight: float, label: str) -> Any:
    return [weight, label]


@job("takes_dotted", args_model=Parcel)
def takes_dotted(parcel: models.Parcel) -> Any:
    return [type(parcel).__name__, parcel.weight, parcel.label]


# -- being called off


@job("sleep")
def sleep(post: str) -> str:
    tell(post)
    time.sleep(60)
    return "slept"


@job("spin")
def spin(post: str) -> None:
    tell(post)
    while True:
        pass


@job("wait_for_lock")
def wait_for_lock(post: str) -> None:
    lock = threading.Lock()
    lock.acquire()
    tell(post)
    lock.acquire()


@job("wait_for_thread")
def wait_for_thread(post: str) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()
    tell(post)
    try:
        thread.join()
    finally:
        done.set()


@job("wait_for_process")
def wait_for_process(post: str) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            tell(post)
            process.wait()
        finally:
            process.kill()


@job("match")
def match(post: str) -> None:
    tell(post)
    re.match("(a+)+$", "a" * 40 + "b")


@job("clean_up")
def clean_up(post: str) -> None:
    try:
        tell(post)
        time.sleep(60)
    finally:
        tell(post, "cleaning")
        time.sleep(0.2)
        tell(post, "clean")


@job("swallow")
def swallow(post: str, value: int) -> int:
    try:
        tell(post)
        time.sleep(60)
    except BaseException as error:
        tell(post, type(error).__name__)
    return value


@job("swallow_and_fail")
def swallow_and_fail(post: str) -> None:
    try:
        tell(post)
        time.sleep(60)
    except BaseException:
        raise ValueError("something else") from None


@job("catch_everything")
def catch_everything(post: str) -> None:
    while True:
        try:
            tell(post)
            time.sleep(60)
        except BaseException:
            continue


@job("sleep_in_coroutine")
async def sleep_in_coroutine(post: str) -> None:
    tell(post)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        tell(post, "cancelled")
        raise


@job("swallow_in_coroutine")
async def swallow_in_coroutine(post: str) -> str:
    tell(post)
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0)
    return "as if nothing had happened"


@job("block_in_coroutine")
async def block_in_coroutine(post: str) -> None:
    tell(post)
    time.sleep(0.3)
    await asyncio.sleep(60)


@job("group_in_coroutine")
async def group_in_coroutine(post: str) -> None:
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(asyncio.sleep(60))
        tell(post)


@job("echo_in_coroutine")
async def echo_in_coroutine(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


@job("leave_tasks")
async def leave_tasks(value: Any) -> Any:
    leave_tasks.left = asyncio.create_task(asyncio.sleep(60))  # type: ignore[attr-defined]
    await asyncio.sleep(0)
    return value


@job("loop_count")
def loop_count(number: int) -> int:
    """Some tens or hundreds of microseconds of the handler's own code, with a cleanup of its own."""
    total = 0
    try:
        for step in range(number):
            total += step
    finally:
        for _ in range(20):
            total += 1
    return total


@job("loop_count_in_coroutine")
async def loop_count_in_coroutine(number: int) -> int:
    total = 0
    for step in range(number):
        total += step
        if step % 100 == 0:
            await asyncio.sleep(0)
    return total + 20


# -- what they do to their process


@job("pid")
def pid() -> int:
    return os.getpid()


@job("exit_at_once")
def exit_at_once(status: int) -> None:
    os._exit(status)


@job("kill_itself")
def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@job("segfault")
def segfault() -> None:
    ctypes.string_at(0)


@job("close_everything")
def close_everything() -> None:
    os.closerange(0, 1024)


@job("close_intake")
def close_intake() -> None:
    """Each socket on which packets come in."""
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            copy = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        with copy:
            if copy.type == socket.SOCK_SEQPACKET:
                os.close(number)


@job("put_files_in_place")
def put_files_in_place(path: str) -> None:
    """A file under every descriptor, as after a careless daemonisation."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    for number in range(3, 64):
        if number != file:
            os.dup2(file, number)


@job("fork_and_return")
def fork_and_return(value: Any) -> Any:
    os.fork()
    return value


@job("fork_and_fail")
def fork_and_fail() -> None:
    os.fork()
    raise ValueError("both of us")


@job("leave_thread")
def leave_thread(value: Any) -> Any:
    threading.Thread(target=time.sleep, args=(60,), daemon=False).start()
    return value


@job("leave_zombies")
def leave_zombies(number: int) -> None:
    for _ in range(number):
        if os.fork() == 0:
            os._exit(0)


@job("take_signals")
def take_signals() -> None:
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                continue


@job("block_signals")
def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


@job("set_alarm")
def set_alarm(seconds: float) -> None:
    """As a timeout of the handler's own that it forgets to take down."""

    def on_alarm(number: int, frame: Any) -> None:
        raise RuntimeError("the alarm of a job that is over")

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@job("open_all_files")
def open_all_files() -> int:
    left = []
    with contextlib.suppress(OSError):
        while True:
            left.append(os.open("/dev/null", os.O_RDONLY))
    return len(left)


@job("eat_memory")
def eat_memory(megabytes: int) -> int:
    eaten = bytearray(megabytes << 20)
    for place in range(0, len(eaten), 4096):
        eaten[place] = 1
    eat_memory.eaten = eaten  # type: ignore[attr-defined]
    return len(eaten)


def ignored_signals() -> list[int]:
    status = Path("/proc/self/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    return [number + 1 for number in range(64) if ignored >> number & 1]


@job("signals")
def signals() -> Any:
    """The dispositions that a handler finds."""
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
    return {"ignored": ignored_signals(), "blocked": blocked, "session": os.getsid(0)}


@job("descriptors")
def descriptors() -> Any:
    return sorted(int(number) for number in os.listdir("/proc/self/fd"))[:-1]


@job("daemonise")
def daemonise() -> int:
    """Leaves a process in a session of its own that has lost its parent."""
    leave = "setsid sleep 600 >/dev/null 2>&1 </dev/null & echo $!"
    return int(subprocess.run(["sh", "-c", leave], check=True, capture_output=True).stdout)
