"""Stands between a daemon and its database, and can stop passing anything on while every connection stays open."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Proxy:
    """A unix socket in `folder` that leads to that of `dsn`; `self.dsn` leads through it."""

    def __init__(self, dsn: str, folder: Path) -> None:
        target = conninfo_to_dict(dsn)
        self._target = f"{target['host']}/.s.PGSQL.{target.get('port', 5432)}"
        self.dsn = make_conninfo(dsn, host=str(folder), port="5432")
        self._frozen: bytes | None = None
        self._change = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / ".s.PGSQL.5432"))
        (folder / ".s.PGSQL.5432").chmod(0o777)
        self._listener.listen(100)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        for sock in (self._listener, *self._sockets):
            _shut(sock)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def freeze(self, application: str = "") -> None:
        """From now on the connections of `application` (all: of any) swallow what is sent to them, either way."""
        with self._change:
            self._frozen = application.encode()

    def thaw(self) -> None:
        with self._change:
            self._frozen = None
            self._change.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self._sockets += [client, server]
            self._start(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        # The first packet says who connects: application_name stands in it.
        try:
            hello = client.recv(65536)
            self._wait_for_flow(hello)
            server.connect(self._target)
            server.sendall(hello)
        except OSError:
            _shut(client)
            return
        self._start(self._pump, server, client, hello)
        self._pump(client, server, hello)

    def _pump(self, source: socket.socket, sink: socket.socket, hello: bytes) -> None:
        try:
            while data := source.recv(65536):
                self._wait_for_flow(hello)
                sink.sendall(data)
        except OSError:
            pass
        self._wait_for_flow(hello)
        for sock in (source, sink):
            _shut(sock)

    def _wait_for_flow(self, hello: bytes) -> None:
        with self._change:
            self._change.wait_for(lambda: self._frozen is None or self._frozen not in hello)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
