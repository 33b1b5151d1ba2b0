"""The faults: each breaks one thing, mends it, and returns when the one it hit is whole again.

A new fault is a function with `@fault`. It gets the stage, the master that the plan chose, and its line of the plan; it
returns how many seconds the recovery took where `formula` bounds it, else None.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from chaos import fleet
from chaos.fleet import Master, now
from chaos.jobs import PROBE_QUEUE, QUEUE
from chaos.plan import PlannedFault
from chaos.stage import ChaosError, Stage, ballast
from roost_client import JobInsert, Roost, RoostError

Act = Callable[[Stage, Master, PlannedFault], float | None]


@dataclass(frozen=True, slots=True)
class Fault:
    """`formula` names the bound of its recovery (see `checker`). A `slow` one goes on beside the faults that follow."""

    act: Act
    formula: str | None = None
    slow: bool = False
    refusal: Callable[[Stage], str | None] = lambda stage: None  # why it can't be injected on this machine


FAULTS: dict[str, Fault] = {}


def fault(
    *,
    formula: str | None = None,
    slow: bool = False,
    refusal: Callable[[Stage], str | None] = lambda stage: None,
) -> Callable[[Act], Act]:
    def add(act: Act) -> Act:
        FAULTS[act.__name__] = Fault(act, formula, slow, refusal)
        return act

    return add


# -- children and templates


@fault(formula="child death")
def kill_child(stage: Stage, master: Master, plan: PlannedFault) -> float:
    """Until a job runs in its successor."""
    pid = _a_child(stage, master, plan)
    others, known = {*master.children()} - {pid}, {*stage.ledger.iterdir()}
    feed = _Feed(stage, plan, QUEUE, PROBE_QUEUE)
    began = now()
    _kill_child(stage, pid)

    def look() -> bool:
        feed.top_up()
        files = [stage.ledger / f"{each}.jsonl" for each in master.children() if each not in others]
        return any(file.exists() and file not in known for file in files)

    stage.await_that(look, f"job in the successor of child {pid}")
    took = now() - began
    stage.await_whole(master)
    return took


@fault()
def stop_child(stage: Stage, master: Master, plan: PlannedFault) -> None:
    pid = _a_child(stage, master, plan)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.2 + 3 * plan.dose)
    _signal(pid, signal.SIGCONT)
    stage.await_whole(master)


@fault()
def kill_template(stage: Stage, master: Master, plan: PlannedFault) -> None:
    (pid,) = master.templates()
    os.kill(pid, signal.SIGKILL)
    stage.await_that(lambda: pid not in master.templates() and master.is_whole(), f"successor of template {pid}")


@fault()
def stop_template(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """While it has a child to bury and another to fork."""
    (pid,) = master.templates()
    child = _a_child(stage, master, plan)
    os.kill(pid, signal.SIGSTOP)
    _kill_child(stage, child)
    time.sleep(0.2 + 2 * plan.dose)
    _signal(pid, signal.SIGCONT)
    stage.await_that(lambda: child not in master.children() and master.is_whole(), f"successor of child {child}")


# -- masters


@fault(formula="master death")
def kill_master(stage: Stage, master: Master, plan: PlannedFault) -> float:
    """Its jobs are to be freed by the others; a successor comes after that."""
    ids = stage.await_that(lambda: stage.workers_of(master), f"row of {master.name}")
    began = now()
    _kill(master)
    _await_freed(stage, ids)
    took = now() - began
    _start(stage, master)
    return took


@fault()
def replace_killed_master(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """Its jobs are to be freed by its successor."""
    ids = stage.await_that(lambda: stage.workers_of(master), f"row of {master.name}")
    _kill(master)
    _start(stage, master)
    _await_freed(stage, ids)


@fault()
def kill_master_and_template(stage: Stage, master: Master, plan: PlannedFault) -> None:
    pids = [master.pid, *master.templates()]
    for pid in pids:
        _signal(pid, signal.SIGSTOP)  # so that neither sees the other's end
    for pid in pids:
        _signal(pid, signal.SIGKILL)
    master.process.wait()
    _start(stage, master)


@fault()
def stop_master(stage: Stage, master: Master, plan: PlannedFault) -> None:
    master.signal(signal.SIGSTOP)
    time.sleep(0.2 + 2 * plan.dose)
    master.signal(signal.SIGCONT)
    stage.await_whole(master)


@fault(slow=True)
def stop_master_until_stale(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """The others free its jobs while its children still run them: the one fault by which runs may overlap."""
    ids = stage.await_that(lambda: stage.workers_of(master), f"row of {master.name}")
    master.signal(signal.SIGSTOP)
    try:
        _await_freed(stage, ids)
        time.sleep(1 + 3 * plan.dose)  # in which the others run them
    finally:
        master.signal(signal.SIGCONT)
    stage.await_that(lambda: set(stage.workers_of(master)) - set(ids), f"new row of {master.name}")
    stage.await_whole(master)


@fault()
def replace_master(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """TERM, and a successor beside it from the start, as for an upgrade."""
    old = master.process
    master.signal(signal.SIGTERM)
    mark = master.mark()
    master.start()
    status = old.wait(fleet.SHUTDOWN_TIMEOUT + fleet.KILL_GRACE + 20)
    assert status == 0, f"{master.name} ended with status {status} at SIGTERM"
    stage.await_ready(master, mark)
    stage.await_whole(master)


@fault()
def skew_clock(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """From now on its clock, and its children's, is ten minutes off; until its next successor."""
    master.stop()
    _start(stage, master, skew_seconds=600.0 if plan.dose < 0.5 else -600.0)


@fault()
def reload(stage: Stage, master: Master, plan: PlannedFault) -> None:
    master.generation += 1
    master.write_code(f"ITS = {master.generation}\n")
    _hang_up(stage, master, "reload.done")
    stage.await_whole(master)


@fault()
def reload_broken_code(stage: Stage, master: Master, plan: PlannedFault) -> None:
    master.write_code(["ITS = (\n", "raise RuntimeError\n", "import os; os._exit(1)\n"][int(plan.pick * 3)])
    _hang_up(stage, master, "reload.failed")
    master.write_code("ITS = 0\n")
    stage.await_whole(master)


@fault()
def reload_broken_config(stage: Stage, master: Master, plan: PlannedFault) -> None:
    master.write_config('[worker.nonsense]\nkey = "value"\n')
    _hang_up(stage, master, "reload.failed")
    master.write_config()
    stage.await_whole(master)


# -- PostgreSQL


@fault(formula="PostgreSQL back")
def restart_postgres(stage: Stage, master: Master, plan: PlannedFault) -> float:
    stage.postgres.restart("immediate")
    return _back(stage, plan)


@fault()
def terminate_backends(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """Of all masters, each connection with the same chance."""
    stage.ask(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name LIKE 'roostd%%' AND random() <= %s",
        0.2 + 0.8 * plan.dose,
    )
    _back(stage, plan)


@fault(refusal=lambda stage: stage.disk_refusal)
def fill_disk(stage: Stage, master: Master, plan: PlannedFault) -> None:
    with ballast(stage.disk):
        time.sleep(0.5 + plan.dose)
    time.sleep(0.1)
    stage.postgres.start()  # where it gave up
    _back(stage, plan)


@fault()
def jump_database_clock(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """Ten minutes forward, as far as workers see it: all of them were last heard of so much earlier.

    Whoever looks before one is heard of again takes its jobs, while its children still run them. For one master that is
    made certain: it is stopped meanwhile, for less time than would do any harm without the jump.
    """
    master.signal(signal.SIGSTOP)
    try:
        stage.ask(
            "WITH set_back AS (UPDATE roost.workers SET last_seen_at = last_seen_at - interval '10 min' RETURNING id)"
            " SELECT count(*) FROM set_back"
        )
        time.sleep(fleet.REAPER_INTERVAL + fleet.HEARTBEAT_INTERVAL + 2 * plan.dose)  # in which the others run them
    finally:
        master.signal(signal.SIGCONT)
    masters = stage.present()
    _await_beat(stage, *masters)
    for each in masters:
        stage.await_whole(each)


# -- the network


@fault()
def cut_connections(stage: Stage, master: Master, plan: PlannedFault) -> None:
    stage.proxy.refuse(master.name, True)
    stage.proxy.cut(master.name)
    time.sleep(plan.dose)
    stage.proxy.refuse(master.name, False)
    _await_beat(stage, master)


@fault()
def delay_connections(stage: Stage, master: Master, plan: PlannedFault) -> None:
    stage.proxy.delay(master.name, 0.02 + 0.2 * plan.dose)
    time.sleep(1.5)
    stage.proxy.delay(master.name, 0)
    _await_beat(stage, master)


@fault()
def swallow(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """All connections are dead, and stay open."""
    stage.proxy.swallow(master.name)
    time.sleep(0.5 + plan.dose)
    stage.proxy.unswallow(master.name)
    _await_beat(stage, master)


@fault(slow=True)
def swallow_until_stale(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """It has to kill its own children before the others free its jobs."""
    ids = stage.await_that(lambda: stage.workers_of(master), f"row of {master.name}")
    mark = master.mark()
    stage.proxy.swallow(master.name)
    try:
        stage.await_that(lambda: master.said("worker.fenced", since=mark), f"fence of {master.name}")
        _await_freed(stage, ids)
    finally:
        stage.proxy.unswallow(master.name)
    _await_beat(stage, master)
    stage.await_whole(master)


@fault()
def lose_answer_to_completions(stage: Stage, master: Master, plan: PlannedFault) -> None:
    _lose_answer(stage, master, plan, "write")


@fault()
def lose_answer_to_claim(stage: Stage, master: Master, plan: PlannedFault) -> None:
    _lose_answer(stage, master, plan, "claim")


@fault(formula="lost NOTIFY")
def lose_notifications(stage: Stage, master: Master, plan: PlannedFault) -> float:
    """Of all masters; a job that then comes into an idle queue is to be found by the next poll.

    Where there is other work, polls are many, and show nothing: so that is let end first, within limits.
    """
    quiet_until = now() + 6
    while now() < quiet_until and not stage.ask(_QUIET):
        time.sleep(0.05)
    for each in stage.masters:
        stage.proxy.swallow(each, "listen")
    try:
        with Roost(stage.dsn) as roost:
            job_id = roost.enqueue("chaos_sleep", args={"key": -1 - plan.step}, queue=PROBE_QUEUE, max_attempts=50)
        return float(
            stage.await_that(
                lambda: stage.ask(
                    "SELECT nullif(extract(epoch FROM min(c.at) - j.inserted_at), 0)::float8"
                    "  FROM roost.job_rows j JOIN chaos.changes c ON c.job_id = j.id AND c.table_name = 'claims'"
                    " WHERE j.id = %s GROUP BY j.id",
                    job_id,
                ),
                f"claim of job {job_id}",
                20,
            )
        )
    finally:
        for each in stage.masters:
            stage.proxy.unswallow(each)


_QUIET = """
SELECT NOT EXISTS (SELECT FROM roost.ready WHERE queue = 'work') AND NOT EXISTS (SELECT FROM roost.claims)
   AND NOT EXISTS (SELECT FROM roost.scheduled WHERE scheduled_at < now() + interval '1.5 s')
"""


# -- limits of the system


@fault()
def exhaust_files_of_master(stage: Stage, master: Master, plan: PlannedFault) -> None:
    """It may open no more files while a child has to be replaced and a connection to be made."""
    child = _a_child(stage, master, plan)
    with _no_more_files(master.pid):
        _kill_child(stage, child)
        if plan.dose < 0.5:
            stage.proxy.cut(master.name)
        time.sleep(0.3 + plan.dose)
    stage.await_that(lambda: child not in master.children() and master.is_whole(), f"successor of child {child}")
    _await_beat(stage, master)


@fault()
def exhaust_files_of_template(stage: Stage, master: Master, plan: PlannedFault) -> None:
    _replace_child_under(_no_more_files, stage, master, plan)


def _no_process_limit(stage: Stage) -> str | None:
    if os.geteuid() != 0 or _pids_cgroup() is not None:
        return None
    return "root is bound by no limit on processes, and there is no cgroup of pids that may be used"


@fault(refusal=_no_process_limit)
def fail_fork(stage: Stage, master: Master, plan: PlannedFault) -> None:
    _replace_child_under(_no_more_processes, stage, master, plan)


# -- what they share


def _a_child(stage: Stage, master: Master, plan: PlannedFault) -> int:
    """One that has run a job, where there is one: a child that is killed before that is replaced after a pause."""
    stage.await_whole(master)
    children = sorted(master.children())
    used = [pid for pid in children if fleet.title_of(pid) != "roostd: child idle"]
    among = used or children
    return among[int(plan.pick * len(among))]


def _replace_child_under(
    limit: Callable[[int], AbstractContextManager[None]], stage: Stage, master: Master, plan: PlannedFault
) -> None:
    """Kills a child while the template is under this limit for a time; its successor must come after that."""
    (template,) = master.templates()
    child = _a_child(stage, master, plan)
    with limit(template):
        _kill_child(stage, child)
        time.sleep(0.3 + plan.dose)
    stage.await_that(lambda: child not in master.children() and master.is_whole(), f"successor of child {child}")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _kill_child(stage: Stage, pid: int) -> None:
    stage.killed_pids.add(pid)
    _signal(pid, signal.SIGKILL)


def _kill(master: Master) -> None:
    master.process.kill()
    master.process.wait()


def _start(stage: Stage, master: Master, skew_seconds: float = 0.0) -> None:
    mark = master.mark()
    master.start(skew_seconds)
    stage.await_ready(master, mark)
    stage.await_whole(master)


def _hang_up(stage: Stage, master: Master, verdict: str) -> None:
    mark = master.mark()
    master.signal(signal.SIGHUP)
    stage.await_that(lambda: master.said(verdict, since=mark), f"{verdict} of {master.name}")


def _await_freed(stage: Stage, workers: list[str]) -> None:
    """Returns when the database holds nothing more for these workers."""
    stage.await_that(
        lambda: stage.ask(
            "SELECT NOT EXISTS (SELECT FROM roost.workers WHERE id = ANY (%s::uuid[]))"
            " AND NOT EXISTS (SELECT FROM roost.claims WHERE worker_id = ANY (%s::uuid[]))",
            workers,
            workers,
        ),
        f"end of what workers {workers} held",
    )


def _await_beat(stage: Stage, *masters: Master) -> None:
    """Returns when each has been heard of, and has asked for jobs, since now."""
    since = stage.await_that(lambda: stage.ask("SELECT clock_timestamp()"), "answer of PostgreSQL")
    for master in masters:
        stage.await_that(
            lambda: stage.ask(
                "SELECT true FROM roost.workers WHERE name = %s AND last_seen_at > %s LIMIT 1",
                master.name,  # noqa: B023
                since,
            ),
            f"heartbeat of {master.name}",
        )


def _back(stage: Stage, plan: PlannedFault) -> float:
    """Returns when every master that is not away claims jobs again; in how many seconds since PostgreSQL answers."""
    since = stage.await_that(lambda: stage.ask("SELECT coalesce(max(seq), 0) + 1 FROM chaos.changes"), "answer")
    began = now()
    feed = _Feed(stage, plan, PROBE_QUEUE)
    masters = stage.present()

    def look() -> bool:
        feed.top_up()
        claimed = stage.ask(
            "SELECT array_agg(DISTINCT w.name) FROM chaos.changes c JOIN roost.workers w ON w.id::text = c.worker"
            " WHERE c.seq >= %s AND c.table_name = 'claims' AND c.op = 'INSERT'",
            since,
        )
        return {master.name for master in masters} <= {*(claimed or [])}

    stage.await_that(look, f"claim of each of {', '.join(master.name for master in masters)}")
    took = now() - began
    _await_beat(stage, *masters)
    return took


class _Feed:
    """Has short jobs in queues for as long as something waits for one to be taken, on top of the plan's."""

    def __init__(self, stage: Stage, plan: PlannedFault, *queues: str) -> None:
        self._stage = stage
        self._jobs = [
            JobInsert("chaos_sleep", {"key": -1 - plan.step, "seconds": 0.02}, queue=queue, max_attempts=50)
            for queue in queues
            for _ in range(12)
        ]
        self._next_at = 0.0

    def top_up(self) -> None:
        if now() >= self._next_at:
            self._next_at = now() + 0.1
            with contextlib.suppress(RoostError, psycopg.Error), Roost(self._stage.dsn) as roost:
                roost.enqueue_many(self._jobs)


def _lose_answer(stage: Stage, master: Master, plan: PlannedFault, purpose: str) -> None:
    happened = stage.proxy.lose_answer(master.name, purpose)
    more = [JobInsert("chaos_sleep", {"key": -1 - plan.step, "seconds": 0.05}, queue=QUEUE, max_attempts=50)] * 12
    with Roost(stage.dsn) as roost:
        for _ in range(30):
            if wait([happened], timeout=0.5).done:
                break
            roost.enqueue_many(more)  # the others may have been faster with all there was
        else:
            raise ChaosError(f"{master.name} sent no statement to {purpose}")
    _await_beat(stage, master)


@contextmanager
def _no_more_files(pid: int) -> Iterator[None]:
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max((int(name) for name in os.listdir(f"/proc/{pid}/fd")), default=0)
    # Numbers below the limit that are free now may still be used: a few files can be opened yet, and then none.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    try:
        yield
    finally:
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        except ProcessLookupError:
            pass


def _pids_cgroup() -> Path | None:
    """A folder below which groups with a limit on processes can be made."""
    for folder in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")):
        if os.access(folder / "cgroup.procs", os.W_OK) and (
            folder.name == "pids" or "pids" in (folder / "cgroup.subtree_control").read_text().split()
        ):
            return folder
    return None


@contextmanager
def _no_more_processes(pid: int) -> Iterator[None]:
    """`pid` can't fork."""
    folder = _pids_cgroup()
    if os.geteuid() != 0 or folder is None:
        before = resource.prlimit(pid, resource.RLIMIT_NPROC)
        resource.prlimit(pid, resource.RLIMIT_NPROC, (1, before[1]))
        try:
            yield
        finally:
            resource.prlimit(pid, resource.RLIMIT_NPROC, before)
        return
    group = folder / f"roost-chaos-{os.getpid()}-{pid}"
    group.mkdir()
    (group / "pids.max").write_text("1")
    home = folder / _group_of(pid).lstrip("/")
    (group / "cgroup.procs").write_text(str(pid))
    try:
        yield
    finally:
        for member in (group / "cgroup.procs").read_text().split():
            (home / "cgroup.procs").write_text(member)
        group.rmdir()


def _group_of(pid: int) -> str:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "pids" in controllers.split(",") or controllers == "":
            return path
    return "/"
