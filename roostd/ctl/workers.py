"""workers, reload, drain: who runs the jobs, telling them to read their settings and handlers anew, and to end.

Each is asked for, and its verdict read, in the worker's row, so it works from any host that reaches the database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import click
import psycopg

from roost_client import Roost, WorkerInfo
from roostd.ctl import completion
from roostd.ctl.command import EXIT_NOTHING, Failure, Invocation, command
from roostd.ctl.output import note, print_json, print_table

_POLL_SECONDS = 0.1


def _seconds(text: str) -> float:
    """Of a --timeout; NaN would never be over."""
    with contextlib.suppress(ValueError):
        if (seconds := float(text)) >= 0:
            return seconds
    raise click.BadParameter(f"{text!r} is no number of seconds from 0 on")


def _hostname(text: str) -> str:
    """Nothing, as of a variable that is not set, must not stand for the host that this runs on."""
    if not text:
        raise click.BadParameter("it is empty; leave the option out for the host that this runs on")
    return text


_named = click.option(
    "--worker",
    "names",
    metavar="NAME|ID",
    multiple=True,
    shell_complete=completion.workers,
    help="Only this worker; may be given more than once.",
)
_host = click.option(
    "--host",
    metavar="HOST",
    type=_hostname,
    shell_complete=completion.hosts,
    help="The workers on this host (default: on the one this runs on).",
)


@dataclass(frozen=True, slots=True)
class SeenWorker:
    """A worker, and how long ago it last said that it lives, by the database's clock."""

    worker: WorkerInfo
    silent: timedelta

    def as_json(self) -> dict[str, Any]:
        worker = {field.name: getattr(self.worker, field.name) for field in dataclasses.fields(self.worker)}
        return {**worker, "silent_seconds": self.silent.total_seconds()}


@command("workers")
def workers(invocation: Invocation) -> None:
    """List the workers and their last heartbeats."""
    with invocation.connect() as conn, invocation.client() as roost:
        found = read_workers(roost, conn)
    if invocation.json:
        print_json([seen.as_json() for seen in found])
    else:
        print_workers(found)


def read_workers(roost: Roost, conn: psycopg.Connection[Any]) -> list[SeenWorker]:
    found = roost.list_workers(conn=conn)
    row = conn.execute("SELECT now()").fetchone()
    assert row is not None
    return [SeenWorker(worker, row[0] - worker.last_seen_at) for worker in found]


def print_workers(found: list[SeenWorker]) -> None:
    print_table(
        ("WORKER", "HOST", "PID", "STATE", "QUEUES", "CHILDREN", "RUNNING", "GENERATION", "HEARTBEAT", "ID"),
        [
            (
                seen.worker.name,
                seen.worker.hostname,
                seen.worker.pid,
                seen.worker.metadata.get("state"),
                ",".join(seen.worker.queues),
                seen.worker.concurrency,
                seen.worker.inflight,
                seen.worker.metadata.get("generation"),
                seen.silent,
                seen.worker.id,
            )
            for seen in found
        ],
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a worker's reload ended; `ok` is false too where it did not answer, or was skipped as dead."""

    worker: str
    hostname: str
    pid: int
    ok: bool
    generation: int | None
    error: str | None
    skipped: bool = False


@command("reload")
@_named
@_host
@click.option("--timeout", metavar="SECONDS", type=_seconds, default=90.0, show_default=True)
def reload(invocation: Invocation, names: tuple[str, ...], host: str | None, timeout: float) -> int:
    """Have workers read their settings and handlers anew, and wait for their verdicts."""
    stale_after = timedelta(seconds=invocation.settings().worker.orphan_stale_after)
    with invocation.connect() as conn, invocation.client() as roost:
        meant = _meant("reload", read_workers(roost, conn), names, host)
        verdicts = [_skipped(seen, stale_after) for seen in meant if seen.silent > stale_after]
        if asked := [seen.worker for seen in meant if seen.silent <= stale_after]:
            request = roost.request_reload(worker_ids=[worker.id for worker in asked])
            verdicts = _wait_for_verdicts(roost, asked, request, timeout) + verdicts
    if invocation.json:
        print_json(verdicts)
    else:
        print_table(
            ("WORKER", "HOST", "PID", "RELOAD", "GENERATION", "ERROR"),
            [(v.worker, v.hostname, v.pid, _outcome(v), v.generation, v.error) for v in verdicts],
        )
    return 0 if asked and all(verdict.ok or verdict.skipped for verdict in verdicts) else EXIT_NOTHING


@dataclass(frozen=True, slots=True)
class Drain:
    """How far a worker's drain is; `outcome` is requested, drained, running (it did not end in time), or skipped."""

    worker: str
    hostname: str
    pid: int
    outcome: str
    running: int
    error: str | None = None


@command("drain")
@_named
@_host
@click.option("--wait", is_flag=True, help="Until they have ended.")
@click.option("--timeout", metavar="SECONDS", type=_seconds, help="How long to wait (default: for ever).")
def drain(invocation: Invocation, names: tuple[str, ...], host: str | None, wait: bool, timeout: float | None) -> int:
    """Have workers end when the jobs that they run have, however long that takes, and start no others.

    What they have claimed and not started goes back. A worker's exit status is 0, which systemd does not restart.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is of no use without --wait")
    stale_after = timedelta(seconds=invocation.settings().worker.orphan_stale_after)
    with invocation.connect() as conn, invocation.client() as roost:
        meant = _meant("drain", read_workers(roost, conn), names, host)
        skipped = [_dead(seen, stale_after) for seen in meant if seen.silent > stale_after]
        asked = [seen.worker for seen in meant if seen.silent <= stale_after]
        if asked:
            roost.request_drain(worker_ids=[worker.id for worker in asked])
        if wait:
            drains = _wait_for_ends(roost, conn, asked, stale_after, timeout)
        else:
            drains = [_drain(worker, "requested") for worker in asked]
    if invocation.json:
        print_json(drains + skipped)
    else:
        print_table(
            ("WORKER", "HOST", "PID", "DRAIN", "RUNNING", "ERROR"),
            [(d.worker, d.hostname, d.pid, d.outcome, d.running, d.error) for d in drains + skipped],
        )
    return 0 if asked and all(each.error is None for each in drains) else EXIT_NOTHING


COMMANDS = (workers, reload, drain)


def _meant(verb: str, found: list[SeenWorker], names: tuple[str, ...], host: str | None) -> list[SeenWorker]:
    meant = [seen for seen in found if _is_meant(seen.worker, names, host)]
    if not meant:
        whom = f"named {' or '.join(names)}" if names else f"on host {host or socket.gethostname()}"
        raise Failure(f"cannot {verb}: there is no worker {whom}; see roostctl workers, and name others by --host")
    return meant


def _wait_for_ends(
    roost: Roost,
    conn: psycopg.Connection[Any],
    asked: list[WorkerInfo],
    stale_after: timedelta,
    timeout: float | None,
) -> list[Drain]:
    """The drains in the order of `asked`, ended but for those that are late or dead. Says how many jobs still run."""
    deadline = None if timeout is None else time.monotonic() + timeout
    said = -1
    while True:
        present = {seen.worker.id: seen for seen in read_workers(roost, conn)}
        left = [present[worker.id] for worker in asked if worker.id in present]
        living = [seen for seen in left if seen.silent <= stale_after]
        is_late = deadline is not None and time.monotonic() >= deadline
        if not living or is_late:
            break
        running = sum(seen.worker.inflight for seen in living)
        if running != said:
            note(f"{running} job{'s' if running != 1 else ''} still run on {len(living)} of {len(asked)} workers")
            said = running
        time.sleep(_POLL_SECONDS)
    drains = []
    for worker in asked:
        seen = present.get(worker.id)
        if seen is None:
            drains.append(_drain(worker, "drained", 0))
        elif seen.silent > stale_after:
            drains.append(dataclasses.replace(_dead(seen, stale_after), outcome="failed"))
        else:
            late = _drain(seen.worker, "running")
            drains.append(dataclasses.replace(late, error=f"has not ended within {timeout:g} s; it goes on draining"))
    return drains


def _drain(worker: WorkerInfo, outcome: str, running: int | None = None) -> Drain:
    return Drain(worker.name, worker.hostname, worker.pid, outcome, worker.inflight if running is None else running)


def _dead(seen: SeenWorker, stale_after: timedelta) -> Drain:
    return dataclasses.replace(_drain(seen.worker, "skipped"), error=_silence(seen, stale_after))


def _is_meant(worker: WorkerInfo, names: tuple[str, ...], host: str | None) -> bool:
    if names and not {worker.name, str(worker.id)} & set(names):
        return False
    # Who names a worker means it wherever it runs.
    return worker.hostname == host if host else bool(names) or worker.hostname == socket.gethostname()


def _wait_for_verdicts(roost: Roost, asked: list[WorkerInfo], request: UUID, timeout: float) -> list[Verdict]:
    """The verdicts in the order of `asked`."""
    deadline = time.monotonic() + timeout
    verdicts: dict[UUID, Verdict] = {}
    while True:
        present = {worker.id: worker for worker in roost.list_workers()}
        is_late = time.monotonic() >= deadline
        for worker in asked:
            if worker.id not in verdicts:
                verdict = _verdict(worker, present.get(worker.id), request)
                if verdict is None and is_late:
                    verdict = _failed(worker, f"did not answer within {timeout:g} s")
                if verdict is not None:
                    verdicts[worker.id] = verdict
        if len(verdicts) == len(asked):
            return [verdicts[worker.id] for worker in asked]
        time.sleep(_POLL_SECONDS)


def _verdict(asked: WorkerInfo, present: WorkerInfo | None, request: UUID) -> Verdict | None:
    if present is None:
        return _failed(asked, "ended before it answered")
    answer = present.metadata.get("reload") or {}
    # A row holds one request: where another came after ours, its verdict holds for ours too.
    if answer.get("request") not in (str(request), str(present.reload_request)):
        return None
    error = answer.get("error") or None
    return Verdict(asked.name, asked.hostname, asked.pid, bool(answer.get("ok")), answer.get("generation"), error)


def _outcome(verdict: Verdict) -> str:
    return "ok" if verdict.ok else "skipped" if verdict.skipped else "failed"


def _skipped(seen: SeenWorker, stale_after: timedelta) -> Verdict:
    """Of a worker that its peers take for dead: nobody would answer."""
    return dataclasses.replace(_failed(seen.worker, _silence(seen, stale_after)), skipped=True)


def _silence(seen: SeenWorker, stale_after: timedelta) -> str:
    return (
        f"dead: not heard of for {seen.silent.total_seconds():.0f} s, "
        f"and worker.orphan_stale_after is {stale_after.total_seconds():g} s"
    )


def _failed(worker: WorkerInfo, error: str) -> Verdict:
    return Verdict(worker.name, worker.hostname, worker.pid, False, None, error)
