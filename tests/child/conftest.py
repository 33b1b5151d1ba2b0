"""Real children of a real template, driven without a master or a database."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from roostd.config import Config, HandlersConfig, WorkerConfig
from roostd.core.job import ClaimedJob
from roostd.core.outcome import SoftReason
from roostd.core.pool import REMIND_SECONDS
from roostd.master.children import ChildProcess
from roostd.master.templates import TemplateProcess
from roostd.wire.frames import Frame, FrameKind
from roostd.wire.packets import close_all

PATIENCE_SECONDS = 30.0
CAP = 4 << 20
SETTINGS: dict[str, Any] = {
    "max_result_bytes": 1 << 20,
    "max_jobs_per_child": None,
    "max_rss_bytes": None,
    "memory_limit_bytes": None,
    "log_level": "info",
    "log_format": "json",
}
_keys = itertools.count(1)
_leases = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a child reported of one job."""

    kind: FrameKind
    lease: int
    body: Any  # the JSON, None for an empty body

    @property
    def error(self) -> str:
        return str(self.body["error"])

    @property
    def trace(self) -> str:
        return str(self.body["trace"])


class Template:
    """The template that the children of these tests are forked from."""

    def __init__(self, hooks: str | None = None) -> None:
        modules = ("handlers", "transactions") if hooks is None else ("hooked",)
        handlers = HandlersConfig(modules=modules, pythonpath=(Path(__file__).parent,))
        self.process = TemplateProcess(1, Config(handlers=handlers, worker=WorkerConfig(hooks=hooks)))
        self.ready = False
        self.forked: dict[int, tuple[int, list[int]]] = {}
        self.statuses: dict[int, int] = {}

    def start(self) -> Template:
        self.wait_until(lambda: self.ready, "the template to be ready")
        return self

    def _on_message(self, _: TemplateProcess, message: dict[str, Any], fds: list[int]) -> None:
        match message["op"]:
            case "ready":
                self.ready = True
            case "forked":
                self.forked[message["key"]] = (message["pid"], fds)
            case "exited":
                self.statuses[message["key"]] = message["status"]
            case _:
                raise AssertionError(f"the template says {message}")

    def wait_until(self, condition: Callable[[], bool], what: str, *also: int) -> None:
        """Reads what the template says until the condition holds; looks again whenever one of `also` has something."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            left = deadline - time.monotonic()
            assert left > 0, f"waited in vain for {what}"
            ready, _, _ = select.select([self.process.fileno(), *also], [], [], min(left, REMIND_SECONDS))
            if self.process.fileno() in ready:
                self.process.read(self._on_message)

    def child(self, **settings: Any) -> Child:
        key = next(_keys)
        self.process.fork(key, SETTINGS | settings)
        self.wait_until(lambda: key in self.forked, "a child")
        pid, fds = self.forked.pop(key)
        return Child(self, key, pid, fds)


class Child:
    """A child, and what has come from it."""

    def __init__(self, template: Template, key: int, pid: int, fds: list[int]) -> None:
        self.pid = pid
        self.process = ChildProcess(key, pid, 1, "default", fds, CAP)
        self._template = template
        self._key = key
        self._frames: deque[Frame] = deque()
        self._ended = False
        self._called_off: tuple[int, float] | None = None  # the last lease that was, and when
        self._remind_at = 0.0

    def start(self, task: str, /, *, lease: int | None = None, **args: Any) -> int:
        """Hands over a job; returns its lease."""
        return self.start_raw(task, json.dumps(args), lease=lease)

    def start_raw(self, task: str, args: str, *, lease: int | None = None, **fields: Any) -> int:
        """As start; `fields` are those of the ClaimedJob."""
        lease = next(_leases) if lease is None else lease
        job = ClaimedJob(lease + 10**6, lease, 1, 20, 0, None, "default", task, args)
        assert self.process.send([job._replace(**fields)]) == []
        return lease

    def outcome(self) -> Outcome:
        """The next outcome; fails when the child ends without one."""
        self._template.wait_until(self._has_frame, "an outcome", self.process.outcomes.fileno())
        assert self._frames, f"the child has ended: {self.exit_status()}"
        frame = self._frames.popleft()
        return Outcome(frame.kind, frame.lease, json.loads(frame.body) if frame.body else None)

    def run(self, task: str, /, **args: Any) -> Outcome:
        lease = self.start(task, **args)
        outcome = self.outcome()
        assert outcome.lease == lease
        return outcome

    def result(self, task: str, /, **args: Any) -> Any:
        outcome = self.run(task, **args)
        assert outcome.kind is FrameKind.COMPLETED, outcome
        return outcome.body

    def failure(self, task: str, /, **args: Any) -> Outcome:
        outcome = self.run(task, **args)
        assert outcome.kind is FrameKind.FAILED, outcome
        return outcome

    def call_off(self, lease: int, reason: SoftReason = SoftReason.CANCEL) -> None:
        self.process.call_off(lease, reason)
        self._called_off = lease, time.monotonic()
        self._remind_at = time.monotonic() + REMIND_SECONDS

    def last_outcomes(self) -> list[Outcome]:
        """All that it reports before it ends."""
        outcomes: list[Outcome] = []
        while True:
            self._template.wait_until(self._has_frame, "an outcome or the end", self.process.outcomes.fileno())
            if not self._frames:
                return outcomes
            outcomes.append(self.outcome())

    def exit_status(self) -> int:
        """How it ends; there must be no outcome before that."""
        statuses = self._template.statuses
        self._template.wait_until(lambda: self._key in statuses, "the child to end")
        while self._read():
            pass
        assert not self._frames, self._frames
        return statuses[self._key]

    def says_nothing(self, seconds: float) -> bool:
        """Whether it reports nothing for so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self._has_frame():
            select.select([self.process.outcomes.fileno()], [], [], min(left, REMIND_SECONDS))
        return not self._frames

    def is_alive(self) -> bool:
        return not select.select([self.process.pidfd], [], [], 0)[0]

    def close(self) -> None:
        if self._key not in self._template.statuses:
            self.process.kill()
            self._template.wait_until(lambda: self._key in self._template.statuses, "a killed child to end")
        self.process.close()

    def _has_frame(self) -> bool:
        self._read()
        if self._frames or self._ended:
            return True
        now = time.monotonic()
        if self._called_off and now >= self._remind_at:
            # As the pool does it: psycopg, which waits a tenth of a second at a time, and looks for signals after that
            # alone, would never come to it if it were interrupted all the time.
            self._remind_at = now + (now - self._called_off[1])
            self.process.remind(self._called_off[0])
        return False

    def _read(self) -> bool:
        """Takes in what is there; returns whether there may be more."""
        frames, more = self.process.read_outcomes()
        self._frames.extend(frames)
        self._ended = self._ended or more is None
        return bool(more)


class Post:
    """Where a handler says how far it is: a named pipe."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._text = ""

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while word not in self.words():
            left = deadline - time.monotonic()
            heard, _, _ = select.select([self._fd], [], [], max(0, left))
            assert heard, f"waited in vain for {word!r}: {self._text!r}"

    def words(self) -> list[str]:
        """All that has been said so far."""
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self._fd, 65_536).decode()
        return self._text.split("\n")[:-1]

    def forget(self) -> None:
        self._text = ""

    def close(self) -> None:
        close_all([self._fd])


@pytest.fixture(scope="session")
def forge() -> Iterator[Template]:
    """The template; made once, as a generation's is."""
    template = Template()
    with contextlib.closing(template.process):
        yield template.start()


@pytest.fixture
def make_child(forge: Template) -> Iterator[Callable[..., Child]]:
    """Forks a child with these settings."""
    with contextlib.ExitStack() as children:

        def make(**settings: Any) -> Child:
            child = forge.child(**settings)
            children.callback(child.close)
            return child

        yield make


@pytest.fixture
def child(make_child: Callable[..., Child]) -> Child:
    return make_child()


@pytest.fixture
def post(tmp_path: Path) -> Iterator[Post]:
    made = Post(tmp_path / "post")
    yield made
    made.close()
