"""A whole Roost for as long as a `with` lasts: database, configuration, daemon; and nothing of it afterwards.

It ends in the same way when it is done, when something fails, and when the user interrupts it.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Self

import click
import psycopg

import roostd
from roost_client import Roost
from roost_client.schema import apply_migrations
from roostd import linux
from roostd.ctl.command import EXIT_CONFIG, EXIT_UNAVAILABLE, Failure, find_roostd
from roostd.ctl.demo.checks import Scene
from roostd.embedded import EmbeddedError, EmbeddedPostgres

# The data is thrown away, so nothing need reach the disk.
_POSTGRES = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB"}
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOP_SECONDS = 10.0
_LOG_LINES = 20


class Stage:
    """`scene` is what the checks need of it, once it is entered."""

    scene: Scene

    def __init__(self, children: int) -> None:
        self._children = children
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def show_log(self) -> None:
        """Print what the daemon said last."""
        lines = self._log.read_text(errors="replace").splitlines()
        click.echo("\n".join([f"roostd's last {_LOG_LINES} lines:", *lines[-_LOG_LINES:]]), err=True)

    def _clean_up(self) -> None:
        for number in _INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)  # another one would leave the rest behind
        self._stack.close()

    def _build(self) -> None:
        enter = self._stack.enter_context
        examples = _find_examples()
        for number in _INTERRUPTS:
            signal.signal(number, _interrupt)
        directory = Path(enter(tempfile.TemporaryDirectory(prefix="roost-demo-")))
        self._log = directory / "roostd.log"
        try:
            dsn = enter(EmbeddedPostgres(directory / "postgres", settings=_POSTGRES)).dsn
        except EmbeddedError as error:
            raise Failure(f"cannot run the demo: {error}", EXIT_UNAVAILABLE) from error
        with psycopg.connect(dsn) as conn:
            apply_migrations(conn)
        config = directory / "roost.toml"
        config.write_text(_configuration(dsn, examples, self._children))
        daemon = enter(self._daemon(config))
        roost = enter(Roost(dsn))
        self.scene = Scene(dsn, roost, directory, is_running=lambda: daemon.poll() is None)
        # Its first heartbeat, which comes when it has imported the handlers.
        self.scene.wait_for("worker", lambda: any(worker.metadata["generation"] for worker in roost.list_workers()))

    @contextmanager
    def _daemon(self, config: Path) -> Iterator[subprocess.Popen[bytes]]:
        # Settings that are meant for another daemon must not reach this one.
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("ROOST_", "NOTIFY_", "WATCHDOG_"))
        }
        with self._log.open("wb") as log:
            daemon = subprocess.Popen(
                [find_roostd("run the demo"), "-c", str(config)],
                cwd=config.parent,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for us, who then stop it in order
                # Whatever kills us must not leave it behind.
                preexec_fn=functools.partial(linux.die_with_parent, signal.SIGQUIT, os.getpid()),
            )
        try:
            yield daemon
        finally:
            # At once: what should have run to its end has been waited for.
            daemon.send_signal(signal.SIGQUIT)
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _configuration(dsn: str, examples: Path, children: int) -> str:
    return f"""\
[database]
dsn = {json.dumps(dsn)}

[handlers]
modules = ["files", "faults"]
pythonpath = [{json.dumps(str(examples))}]

[worker]
poll_interval = 0.1
kill_grace = 0.5
retry_strategy = {{ strategy = "fixed", delay = 0.1 }}

[pools.default]
queues = ["files", "faults", "emails"]
concurrency = {children}
"""


def _find_examples() -> Path:
    """They are no part of the package: the demo is that of a checkout."""
    examples = Path(roostd.__file__).parents[1] / "examples"
    if not (examples / "files.py").exists():
        raise Failure(f"cannot run the demo: there is no {examples}; run `make demo` in a checkout", EXIT_CONFIG)
    return examples


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
