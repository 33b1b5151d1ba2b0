"""Stands between each master and PostgreSQL, and breaks their connections in the ways that networks do.

One TCP port a master, so that a fault meets one and not the others. It runs in a thread of its own; every method may be
called from any other.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

T = TypeVar("T")

_CHUNK = 65_536


@dataclass(slots=True)
class _Line:
    """A connection; `application` is its application_name, which says what a master uses it for."""

    master: str
    application: str
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    in_transaction: bool = False
    loses_answer: bool = False

    def cut(self) -> None:
        for end in (self.client, self.server):
            end.transport.abort()


@dataclass(slots=True)
class _Rules:
    """What happens to the connections of one master; of those in `swallowed` nothing passes either way."""

    delay_seconds: float = 0.0
    refused: bool = False
    swallowed: tuple[str, ...] = ()
    losing: dict[str, Future[None]] = field(default_factory=dict)


class Proxy:
    def __init__(self, masters: Iterable[str], server_socket: Callable[[], Path]) -> None:
        """`server_socket` is asked at each connection for the unix socket that leads to PostgreSQL."""
        self.ports: dict[str, int] = {}
        self._server_socket = server_socket
        self._rules = {master: _Rules() for master in masters}
        self._lines: list[_Line] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- faults

    def cut(self, master: str) -> None:
        """Ends all connections of a master at once, with a reset."""
        self._call(self._cut, master, "")

    def refuse(self, master: str, on: bool) -> None:
        """Whether connections are refused; those that stand are not touched."""
        self._call(self._set, master, "refused", on)

    def delay(self, master: str, seconds: float) -> None:
        """Everything that passes takes so much longer, each way."""
        self._call(self._set, master, "delay_seconds", seconds)

    def swallow(self, master: str, purpose: str = "") -> None:
        """From now on nothing passes on the connections for `purpose` (default: on any), and none is closed."""
        self._call(self._set, master, "swallowed", (f"roostd {purpose}",))

    def unswallow(self, master: str) -> None:
        """Lets new connections work again, and ends those that lost something."""
        self._call(self._unswallow, master)

    def lose_answer(self, master: str, purpose: str) -> Future[None]:
        """Lets the next statement that commits reach PostgreSQL, and cuts the connection instead of its answer.

        The result is there when it has happened.
        """
        happened: Future[None] = Future()
        self._call(self._lose, master, purpose, happened)
        return happened

    # -- in the loop

    async def _listen(self) -> None:
        for master in self._rules:
            server = await asyncio.start_server(
                lambda reader, writer, m=master: self._serve(m, reader, writer),  # type: ignore[misc]
                "127.0.0.1",
                0,
            )
            self.ports[master] = server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cut(self, master: str, prefix: str) -> None:
        for line in self._lines:
            if line.master == master and line.application.startswith(prefix):
                line.cut()

    async def _set(self, master: str, name: str, value: object) -> None:
        setattr(self._rules[master], name, value)

    async def _unswallow(self, master: str) -> None:
        prefixes, self._rules[master].swallowed = self._rules[master].swallowed, ()
        for prefix in prefixes:
            await self._cut(master, prefix)

    async def _lose(self, master: str, purpose: str, happened: Future[None]) -> None:
        self._rules[master].losing[f"roostd {purpose}"] = happened

    async def _serve(self, master: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rules = self._rules[master]
        if rules.refused:
            writer.transport.abort()
            return
        try:
            hello = await reader.read(_CHUNK)  # the startup packet, in which application_name stands
            server_reader, server_writer = await asyncio.open_unix_connection(str(self._server_socket()))
        except OSError:
            writer.transport.abort()
            return
        line = _Line(master, _application_of(hello), writer, server_writer)
        self._lines.append(line)
        server_writer.write(hello)
        try:
            await asyncio.gather(self._to_server(line, rules, reader), self._to_client(line, rules, server_reader))
        except (OSError, asyncio.CancelledError):
            pass  # one side is gone, and so is the other
        finally:
            line.cut()
            self._lines.remove(line)

    async def _to_server(self, line: _Line, rules: _Rules, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            if _is_swallowed(line, rules):
                continue
            if rules.delay_seconds:
                await asyncio.sleep(rules.delay_seconds)
            if line.application in rules.losing and _commits(data, line.in_transaction):
                line.loses_answer = True
            line.server.write(data)
            await line.server.drain()
        raise ConnectionResetError

    async def _to_client(self, line: _Line, rules: _Rules, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            if line.loses_answer:  # that there is one tells that the statement is done
                happened = rules.losing.pop(line.application, None)
                if happened is not None:
                    happened.set_result(None)
                raise ConnectionResetError
            if _is_swallowed(line, rules):
                continue
            if rules.delay_seconds:
                await asyncio.sleep(rules.delay_seconds)
            line.in_transaction = data[-6:-1] == b"Z\0\0\0\x05" and data[-1:] != b"I"
            line.client.write(data)
            await line.client.drain()
        raise ConnectionResetError

    def _call(self, function: Callable[..., object], *args: object) -> None:
        asyncio.run_coroutine_threadsafe(function(*args), self._loop).result(30)  # type: ignore[arg-type]


def _is_swallowed(line: _Line, rules: _Rules) -> bool:
    return any(line.application.startswith(prefix) for prefix in rules.swallowed)


def _application_of(hello: bytes) -> str:
    """The application_name of a startup packet; empty where there is none (a cancel request)."""
    words = hello[8:].split(b"\0")
    names = dict(zip(words[::2], words[1::2], strict=False))
    return names.get(b"application_name", b"").decode()


def _commits(data: bytes, in_transaction: bool) -> bool:
    """Whether what a client sends is a statement by itself or a COMMIT, not a part of a transaction."""
    return b"COMMIT" in data if in_transaction else not data.startswith(b"Q") or b"BEGIN" not in data
