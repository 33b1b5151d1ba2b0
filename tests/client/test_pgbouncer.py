"""Behind a real PgBouncer in transaction mode, where each transaction may run on another server connection."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from roost_client import AsyncRoost, JobInsert, JobOutcome, Roost
from tests.client.hand import Hand

Jobs = Callable[[], list[dict[str, Any]]]
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no pgbouncer on this machine")


@pytest.fixture
def bouncer(dsn: str) -> Iterator[str]:
    """The DSN of a PgBouncer before the test's database."""
    database = conninfo_to_dict(dsn)
    # As root both refuse to run, and the user of the server cannot enter the directory above its socket: a descriptor
    # leads there.
    sockets = os.open(str(database["host"]), os.O_RDONLY)
    owner = os.fstat(sockets)
    with tempfile.TemporaryDirectory(prefix="roost-bouncer-") as folder:
        directory = Path(folder)
        # In transaction mode with two server connections, so that clients do change between them.
        settings = f"""\
[databases]
app = host=/proc/self/fd/{sockets} port={database["port"]} dbname={database["dbname"]} user={database["user"]}
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {directory}
auth_type = any
pool_mode = transaction
default_pool_size = 2
logfile = {directory}/log
"""
        (directory / "pgbouncer.ini").write_text(settings)
        command = [str(PROGRAM), "--quiet", str(directory / "pgbouncer.ini")]
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            for path in (directory, directory / "pgbouncer.ini"):
                os.chown(path, owner.st_uid, owner.st_gid)
            options = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        process = subprocess.Popen(command, pass_fds=[sockets], cwd=directory, **options)
        try:
            wait_until_it_listens(directory / ".s.PGSQL.6432", process)
            yield make_conninfo(host=folder, port="6432", dbname="app", user="app")
        finally:
            process.terminate()
            process.wait(30)
            os.close(sockets)


def wait_until_it_listens(path: Path, process: subprocess.Popen[bytes]) -> None:
    while True:
        assert process.poll() is None, (path.parent / "log").read_text()
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            return


def test_a_client_of_its_own_connections_works(bouncer: str, jobs: Jobs) -> None:
    with Roost(bouncer) as roost, Roost(bouncer) as other:
        for n in range(20):
            client = (roost, other)[n % 2]
            job_id = client.enqueue("a", args={"n": n}, tags=["x"])
            assert client.get_job(job_id).args == {"n": n}
        assert roost.enqueue_many([JobInsert("b")] * 10) == 10
        assert other.cancel(job_id) == "cancelled"
        assert other.retry(job_id) == "cancelled"
        roost.setup_schema()
        with roost._connections.borrow() as own:
            assert own.prepare_threshold is None
    assert len(jobs()) == 30


def test_a_transaction_of_the_caller_works(bouncer: str, jobs: Jobs) -> None:
    # What an application behind PgBouncer sets anyway.
    with (
        psycopg.connect(bouncer, prepare_threshold=None) as one,
        psycopg.connect(bouncer, prepare_threshold=None) as two,
    ):
        for n in range(20):
            conn = (one, two)[n % 2]
            Roost("host=/nonexistent").enqueue("a", args={"n": n}, conn=conn)
            if n % 4 < 2:
                conn.commit()
            else:
                conn.rollback()
    assert [row["args"]["n"] for row in jobs()] == [n for n in range(20) if n % 4 < 2]


def test_a_job_is_waited_for_by_polling_and_nothing_listens_on_a_shared_server(bouncer: str, dsn: str) -> None:
    with (
        Roost(bouncer) as roost,
        psycopg.connect(dsn, autocommit=True) as observer,
        ThreadPoolExecutor(20) as pool,
    ):
        job_ids = [roost.enqueue("a") for _ in range(20)]
        futures = [pool.submit(roost.wait_for, job_id, poll_interval=0.1, timeout=60) for job_id in job_ids]
        with closing(Hand(dsn)) as hand:
            for n, job_id in enumerate(job_ids):
                hand.complete(job_id, result=n)
        assert [future.result(30).result for future in futures] == list(range(20))
        awaited = observer.execute("SELECT count(*) FROM roost.job_rows WHERE awaited").fetchone()
        assert awaited == (0,)  # so no end of theirs was told, which nobody would have heard

        async def main() -> JobOutcome:
            async with AsyncRoost(bouncer) as client:
                return await client.wait_for(job_ids[0], poll_interval=0.1)

        assert asyncio.run(main()).result == 0


def test_async_works(bouncer: str, jobs: Jobs) -> None:
    async def main() -> None:
        async with AsyncRoost(bouncer) as roost:
            await asyncio.gather(*[roost.enqueue("a", args={"n": n}) for n in range(50)])

    asyncio.run(main())
    assert len(jobs()) == 50
