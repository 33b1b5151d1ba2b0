"""A real PgBouncer before a test's database: in transaction mode with two server connections, so that clients do
change between them, and the next transaction of one may run on either."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer on this machine")


class Bouncer:
    """One PgBouncer, its files in `folder`. The attribute `dsn` leads through it to the database it is given."""

    def __init__(self, dsn: str, folder: Path) -> None:
        database = conninfo_to_dict(dsn)
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        # As root both refuse to run, and the user of the server cannot enter the directory above its socket: a
        # descriptor leads there.
        self._sockets = os.open(str(database["host"]), os.O_RDONLY)
        self._owner = os.fstat(self._sockets)
        self.dsn = make_conninfo(host=str(folder), port="6432", dbname="app", user="app")
        settings = f"""\
[databases]
app = host=/proc/self/fd/{self._sockets} port={database["port"]} dbname={database["dbname"]} user={database["user"]}
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {folder}
auth_type = any
pool_mode = transaction
default_pool_size = 2
logfile = {folder}/log
"""
        (folder / "pgbouncer.ini").write_text(settings)
        if os.geteuid() == 0:
            for path in (folder, folder / "pgbouncer.ini"):
                os.chown(path, self._owner.st_uid, self._owner.st_gid)

    def start(self) -> None:
        """Returns when it listens."""
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            options = {"user": self._owner.st_uid, "group": self._owner.st_gid, "extra_groups": []}
        path = self._folder / ".s.PGSQL.6432"
        path.unlink(missing_ok=True)  # of one that was killed
        command = [str(PROGRAM), "--quiet", str(self._folder / "pgbouncer.ini")]
        process = subprocess.Popen(command, pass_fds=[self._sockets], cwd=self._folder, **options)
        self._process = process
        while True:
            assert process.poll() is None, (self._folder / "log").read_text()
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(str(path))
                except (FileNotFoundError, ConnectionRefusedError):
                    continue
                return

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(30)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
        os.close(self._sockets)
