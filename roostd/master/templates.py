"""A template process as the master sees it: started, spoken to, ended. It decides nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from roostd.config import Config
from roostd.wire.packets import DescriptorsLost, PacketReader, decode_message, send_message
from roostd.wire.signals import EXIT_UNUSABLE


class TemplateProcess:
    """The process of one generation; its handlers may have `open_files` open.

    With `describe` its "ready" has what there is to know of each task, and what the handlers print goes to stderr.

    Calls `on_message(template, message, fds)`; op "gone" is the last. Op "lost" has taken the place of a message whose
    descriptors this process could not open: of a child's, which ends by itself then, `key` is left.
    """

    def __init__(
        self, generation: int, config: Config, *, open_files: int | None = None, describe: bool = False
    ) -> None:
        self.generation = generation
        self.config = config
        self.ready = False
        self.gone = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock = ours
        self._reader = PacketReader(ours, wait=False)
        try:
            # Not a fork: a fresh interpreter, so nothing of the master (loop, connections, secrets) is in it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "roostd.template", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if describe else None,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        handlers = config.handlers
        self._send(
            {
                "generation": generation,
                "modules": list(handlers.modules),
                "pythonpath": [str(path) for path in handlers.pythonpath],
                "registry": handlers.registry,
                "cron": {entry.name: entry.given() for entry in config.cron},
                "hooks": config.worker.hooks,
                "open_files": open_files,
                "describe": describe,
            }
        )

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self, on_message: Callable[[TemplateProcess, dict[str, Any], list[int]], None]) -> None:
        """Reads all messages that have arrived."""
        while not self.gone:
            try:
                received = self._reader.read()
            except BlockingIOError:
                return
            except DescriptorsLost as lost:
                on_message(self, {"op": "lost", "key": _key_of(lost.packet)}, [])
                continue
            except OSError:
                received = None
            if received is None:
                self.gone = True
                on_message(self, {"op": "gone"}, [])
                return
            packet, fds = received
            message = decode_message(packet, fds)
            on_message(self, message, fds)

    def fork(self, key: int, settings: dict[str, Any]) -> None:
        """Asks for a child; the answer is a message "forked" with its descriptors, or "refused"."""
        self._send({"op": "fork", "key": key, "settings": settings})

    def describe_exit(self) -> str:
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "its socket was closed"
        return describe_status(status)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """Ends the template, and reaps it."""
        self.kill()
        self._process.wait()
        self._sock.close()

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is dying: "gone" follows
            send_message(self._sock, message)


def _key_of(packet: bytes) -> int | None:
    """Whose message it was; None where that stood in a descriptor too."""
    return None if packet[:1] != b"J" else decode_message(memoryview(packet), []).get("key")


def describe_status(status: int) -> str:
    """An exit status in words; negative for a signal, as subprocess has it."""
    if status < 0:
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "unknown"
        return f"was killed by signal {-status} ({name})"
    if status == EXIT_UNUSABLE:
        return f"exited with status {status}, as a child does whose handler closed file descriptors that it needs"
    return f"exited with status {status}"
