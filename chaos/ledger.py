"""What really happened to jobs, told by others than Roost: the handlers themselves, and triggers on its tables.

Each process that runs handlers appends to a file of its own, one write a line, so one that is killed loses nothing that
it has written. Each run also locks its job by the kernel, and loses the lock as its process dies, before anyone is told
of that: so a second run that starts meanwhile knows for certain that the first still lives.

Imported by handlers: the standard library only. Times are of CLOCK_MONOTONIC, which no skew of the wall clock touches.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True)
class Run:
    """One start of a handler. `ended_at` and `how` are None when its process died first."""

    job_id: int
    lease: int
    attempt: int
    pid: int
    master: str
    started_at: float
    ended_at: float | None = None
    how: str | None = None  # "returned", or the name of the exception
    beside: int = 0  # the pid of a process that ran the same job at that moment


@dataclass(frozen=True, slots=True)
class Effect:
    """What a handler wrote in the transaction in which it completed its job."""

    job_id: int
    lease: int
    txid: int


@dataclass(frozen=True, slots=True)
class Change:
    """A row that a trigger wrote: a claim made or ended, or a job's row as it was left. `at` is epoch seconds."""

    seq: int
    at: float
    txid: int
    table: str  # "claims" or "job_rows"
    op: str  # "INSERT", "UPDATE" or "DELETE"
    job_id: int
    lease: int | None = None
    worker: str | None = None
    attempt: int | None = None
    state: str | None = None
    queue: str | None = None
    crashes: int | None = None
    scheduled_at: float | None = None
    told_lease: int | None = None  # the lease that the handler put into its result, or into its newest error
    error: str | None = None  # the newest, when there is one


class Writer:
    """This process's part of the ledger, in `folder`; `master` is whose child it is."""

    def __init__(self, folder: Path, master: str) -> None:
        self._master = master
        self._locks = os.open(folder / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(folder / f"{os.getpid()}.jsonl", flags, 0o644)
        self._pid = os.getpid()

    def start(self, job_id: int, lease: int, attempt: int) -> None:
        """Notes the start of a handler, and whether another process is at the same job."""
        beside = self._lock(job_id)
        self._append(
            ["start", job_id, lease, attempt, self._pid, self._master, time.clock_gettime(time.CLOCK_MONOTONIC), beside]
        )

    def end(self, job_id: int, lease: int, how: str) -> None:
        self._append(["end", job_id, lease, how, time.clock_gettime(time.CLOCK_MONOTONIC)])
        fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, job_id)

    def _lock(self, job_id: int) -> int:
        """Locks the job's byte; returns the pid of the process that holds it already, 0 for none."""
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, job_id)
            return 0
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        wish = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, job_id, 1, 0)
        kind, _, _, _, holder = _FLOCK.unpack(fcntl.fcntl(self._locks, fcntl.F_GETLK, wish))
        return 0 if kind == fcntl.F_UNLCK else int(holder)  # it may have ended meanwhile

    def _append(self, entry: list[Any]) -> None:
        os.write(self._file, json.dumps(entry).encode() + b"\n")


def read_runs(folder: Path) -> list[Run]:
    """All runs in the order of their starts."""
    runs: list[Run] = []
    for file in folder.glob("*.jsonl"):
        runs += _runs_of(file)
    return sorted(runs, key=lambda run: run.started_at)


def _runs_of(file: Path) -> Iterator[Run]:
    open_run: Run | None = None
    for line in file.read_text().splitlines():
        kind, *values = json.loads(line)
        if kind == "start":
            if open_run is not None:  # a pid came up again, or the line of its end could not be written
                yield open_run
            job_id, lease, attempt, pid, master, at, beside = values
            open_run = Run(job_id, lease, attempt, pid, master, at, beside=beside)
        elif open_run is not None:
            job_id, lease, how, at = values
            assert (job_id, lease) == (open_run.job_id, open_run.lease), f"{file}: {line} ends what did not start"
            run, open_run = open_run, None
            yield Run(run.job_id, run.lease, run.attempt, run.pid, run.master, run.started_at, at, how, run.beside)
    if open_run is not None:
        yield open_run


# The lease is what handlers return and raise with, so that a row tells under which lease its content was reported.
TRIGGERS = """
CREATE SCHEMA chaos;
CREATE TABLE chaos.changes (
    seq          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    txid         bigint NOT NULL DEFAULT txid_current(),
    table_name   text NOT NULL,
    op           text NOT NULL,
    job_id       bigint NOT NULL,
    lease        bigint,
    worker       text,
    attempt      integer,
    state        text,
    queue        text,
    crashes      integer,
    scheduled_at timestamptz,
    told_lease   bigint,
    error        text
);
CREATE INDEX ON chaos.changes (job_id);
CREATE TABLE chaos.effects (job_id bigint NOT NULL, lease bigint NOT NULL, txid bigint NOT NULL DEFAULT txid_current());
CREATE FUNCTION chaos.note_claim() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE claim roost.claims%ROWTYPE := CASE WHEN TG_OP = 'DELETE' THEN OLD ELSE NEW END;
BEGIN
    INSERT INTO chaos.changes (table_name, op, job_id, lease, worker, attempt)
    VALUES ('claims', TG_OP, claim.job_id, claim.lease, claim.worker_id::text, claim.attempt);
    RETURN NULL;
END $$;
CREATE FUNCTION chaos.note_row() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE newest text := NEW.errors -> -1 ->> 'error';
BEGIN
    INSERT INTO chaos.changes (table_name, op, job_id, attempt, state, queue, crashes, scheduled_at, told_lease, error)
    VALUES ('job_rows', TG_OP, NEW.id, NEW.attempt, NEW.state, NEW.queue, NEW.crashes, NEW.scheduled_at,
            CASE WHEN NEW.result IS NOT NULL THEN (NEW.result ->> 'lease')::bigint
                 WHEN TG_OP = 'UPDATE' AND NEW.errors IS DISTINCT FROM OLD.errors
                 THEN substring(newest FROM 'under lease ([0-9]+)')::bigint END,
            CASE WHEN TG_OP = 'UPDATE' AND NEW.errors IS DISTINCT FROM OLD.errors THEN left(newest, 300) END);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_claim AFTER INSERT OR UPDATE OR DELETE ON roost.claims
    FOR EACH ROW EXECUTE FUNCTION chaos.note_claim();
CREATE TRIGGER chaos_row AFTER INSERT OR UPDATE ON roost.job_rows
    FOR EACH ROW EXECUTE FUNCTION chaos.note_row();
"""

EFFECTS = "SELECT job_id, lease, txid FROM chaos.effects"

CHANGES = """
SELECT seq, extract(epoch FROM at)::float8, txid, table_name, op, job_id, lease, worker, attempt, state, queue, crashes,
       extract(epoch FROM scheduled_at)::float8, told_lease, error
  FROM chaos.changes ORDER BY seq
"""
