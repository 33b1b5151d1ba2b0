"""What roostd tells systemd: sd_notify(3) over its datagram socket.

A notification is never worth a delay or a crash of the daemon: the socket doesn't block, and what can't be sent is
dropped. Must not be used by children: they inherit neither the variables nor the socket.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

# systemd reads a notification into 4096 bytes, and drops it whole when it is longer.
_MAX_STATUS_CHARACTERS = 500


class Notifier:
    """Sends to the socket that NOTIFY_SOCKET names; does nothing where there is none.

    Takes the variables of sd_notify out of `environ`, or a job that runs a program would speak for the daemon.
    Each method returns whether systemd was told.
    """

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        usec = environ.pop("WATCHDOG_USEC", "")
        pid = environ.pop("WATCHDOG_PID", "")
        self._socket: socket.socket | None = None
        # "@" names an abstract socket. There are vsock: addresses too, for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        # Half of what systemd allows, as sd_watchdog_enabled(3) recommends; None where no watchdog waits for us.
        self.watchdog_interval_seconds: float | None = None
        if usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid())):
            self.watchdog_interval_seconds = int(usec) / 2_000_000

    def ready(self, status: str) -> bool:
        """Started, or done reloading."""
        return self._send("READY=1", f"STATUS={_one_line(status)}")

    def reloading(self) -> bool:
        """Reloading from now on, until `ready`. The time tells this reload from an earlier one."""
        return self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> bool:
        return self._send("STOPPING=1")

    def status(self, text: str) -> bool:
        return self._send(f"STATUS={_one_line(text)}")

    def watchdog(self) -> bool:
        return self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for `seconds` from now to finish starting, reloading or stopping."""
        return self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *assignments: str) -> bool:
        if self._socket is None:
            return False
        message = "\n".join(assignments).encode("utf-8", "replace")
        try:
            return self._socket.sendto(message, self._address) == len(message)
        except (OSError, ValueError):
            return False  # nobody listens or the queue is full; the next one may get through


def _one_line(text: str) -> str:
    """A line break would begin an assignment of its own."""
    return " ".join(text.split())[:_MAX_STATUS_CHARACTERS]
