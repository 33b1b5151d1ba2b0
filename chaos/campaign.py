"""Carries a plan out, and hands what happened to the checker."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import psycopg

from chaos import ledger
from chaos.application import Application
from chaos.evidence import Alarm, Evidence, Injected
from chaos.faults import FAULTS, Fault
from chaos.fleet import Master, now, title_of
from chaos.ledger import Change, Effect
from chaos.monitor import Monitor
from chaos.plan import Plan, PlannedFault
from chaos.stage import ChaosError, Stage
from roostd import linux

END_SECONDS = 120.0  # for what is left, once all faults are mended
_REST_SECONDS = 5.0
_STEP_SECONDS = 0.3  # in which the jobs of a step get going


def run(plan: Plan, stage: Stage, skipped: dict[str, str]) -> Evidence:
    linux.adopt_orphans()
    monitor = Monitor(stage)
    application = Application(stage, plan)
    began_at, clock_offset = now(), time.time() - now()
    injector = _Injector(stage)
    try:
        for master in stage.masters.values():
            master.start()
        for master in stage.masters.values():
            stage.await_ready(master, 0)
            stage.await_whole(master)
        monitor.start()
        application.start()
        for planned in plan.faults:
            application.step = planned.step
            time.sleep(_STEP_SECONDS)
            injector.inject(planned)
        injector.await_slow()
        application.step = plan.steps
        _await_end(stage, application)
        time.sleep(_REST_SECONDS)
    except ChaosError as error:
        injector.injected.append(Injected("campaign", "", now(), now(), failure=str(error)))
    except BaseException:
        stage.stopping.set()
        raise
    finally:
        application.end()
        monitor.end()
        statuses = {name: master.stop() for name, master in stage.masters.items() if master.runs}
    if application.failure is not None:
        raise application.failure
    left = _await_none(monitor)
    with stage.connect() as conn:
        return Evidence(
            plan=plan,
            told=application.told,
            runs=ledger.read_runs(stage.ledger),
            changes=[Change(*row) for row in conn.execute(ledger.CHANGES)],
            effects=[Effect(*row) for row in conn.execute(ledger.EFFECTS)],
            rows=dict(conn.execute("SELECT id, state FROM roost.jobs").fetchall()),
            waiting=dict(conn.execute(_WAITING).fetchall()),
            injected=injector.injected,
            killed_pids=frozenset(stage.killed_pids),
            masters_of_workers=_workers(stage),
            strays=monitor.strays,
            samples=monitor.samples,
            clock_offset=clock_offset,
            cron_since=dict(conn.execute(_CRON_SINCE).fetchall()),
            cron_rows={(name, slot): job_id for name, slot, job_id in conn.execute(_CRON_ROWS)},
            cron_jobs=conn.execute(_CRON_JOBS).fetchall(),
            left_processes=left,
            left_workers=dict(conn.execute("SELECT id::text, name FROM roost.workers").fetchall()),
            alarms=list(_alarms(stage)),
            exit_statuses=statuses,
            skipped=skipped,
            seconds=now() - began_at,
            postgres_version=conn.info.parameter_status("server_version") or "",
        )


_WAITING = """
SELECT job_id, 'ready' FROM roost.ready UNION ALL SELECT job_id, 'scheduled' FROM roost.scheduled
UNION ALL SELECT job_id, 'claims' FROM roost.claims UNION ALL SELECT job_id, 'blocked' FROM roost.blocked
UNION ALL SELECT job_id, 'throttled' FROM roost.throttled
UNION ALL SELECT job_id, 'unique_keys' FROM roost.unique_keys
UNION ALL SELECT job_id, 'ended_parents' FROM roost.ended_parents
"""

_CRON_SINCE = "SELECT name, extract(epoch FROM since)::float8 FROM roost.cron_entries"
_CRON_ROWS = "SELECT name, extract(epoch FROM slot)::float8, job_id FROM roost.cron_runs"
_CRON_JOBS = """
SELECT metadata #>> '{cron,name}', extract(epoch FROM (metadata #>> '{cron,slot}')::timestamptz)::float8, id
  FROM roost.jobs WHERE metadata ? 'cron' ORDER BY id
"""


class _Injector:
    def __init__(self, stage: Stage) -> None:
        self.injected: list[Injected] = []
        self._stage = stage
        self._slow: dict[str, threading.Thread] = {}  # by the master that is under it

    def inject(self, planned: PlannedFault) -> None:
        """Returns when the fault is over; of a slow one, when it has begun."""
        fault = FAULTS[planned.fault]
        self._await_slow(lambda: planned.target not in self._slow)
        master = self._stage.masters[planned.target]
        if not fault.slow:
            self._act(fault, master, planned)
            return
        self.await_slow()  # one at a time: the others are to have room for the jobs that are taken from it
        self._stage.away.add(planned.target)
        thread = threading.Thread(target=self._act, args=(fault, master, planned), name=planned.fault)
        self._slow[planned.target] = thread
        thread.start()

    def await_slow(self) -> None:
        self._await_slow(lambda: not self._slow)

    def _await_slow(self, enough: Callable[[], bool]) -> None:
        while True:
            self._slow = {target: thread for target, thread in self._slow.items() if thread.is_alive()}
            if enough():
                return
            next(iter(self._slow.values())).join(0.05)

    def _act(self, fault: Fault, master: Master, planned: PlannedFault) -> None:
        injected = Injected(planned.fault, planned.target, now(), formula=fault.formula)
        self.injected.append(injected)
        try:
            injected.workers = frozenset(self._stage.await_that(self._registered, "row of any worker"))
            injected.recovery_seconds = fault.act(self._stage, master, planned)
        except (ChaosError, AssertionError, OSError, ValueError, TimeoutError, psycopg.Error) as error:
            injected.failure = f"{type(error).__name__}: {error}"
        injected.ended_at = now()
        self._stage.away.discard(planned.target)
        took = f"{injected.ended_at - injected.began_at:.1f} s"
        recovery = "" if injected.recovery_seconds is None else f", recovered in {injected.recovery_seconds:.2f} s"
        print(
            f"{planned.step:4}  {planned.fault} {planned.target}: {took}{recovery} {injected.failure or ''}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def _registered(self) -> list[str] | None:
        workers: list[str] | None = self._stage.ask("SELECT array_agg(id::text) FROM roost.workers")
        return workers


def _await_end(stage: Stage, application: Application) -> None:
    """Returns when every job is in a terminal state."""
    stage.await_that(lambda: application.has_enqueued, "last enqueue")
    stage.await_that(
        lambda: stage.ask(
            "SELECT NOT EXISTS (SELECT FROM roost.ready) AND NOT EXISTS (SELECT FROM roost.scheduled)"
            " AND NOT EXISTS (SELECT FROM roost.throttled)"
            " AND NOT EXISTS (SELECT FROM roost.claims)"
        ),
        "end of the last job",
        END_SECONDS,
    )


def _await_none(monitor: Monitor) -> list[str]:
    """What lives on a second after the last master has ended."""
    deadline = now() + 3
    while (left := monitor.orphans()) and now() < deadline:
        time.sleep(0.05)
    titles = [f"{pid} {title_of(pid)}" for pid in left]
    for pid in left:
        linux.kill_tree(pid)
    return titles


def _alarms(stage: Stage) -> Iterator[Alarm]:
    for name, master in stage.masters.items():
        for entry in master.entries("outcomes.unwritten", "worker.not_removed"):
            yield Alarm(name, str(entry["event"]), str(entry.get("error")))


def _workers(stage: Stage) -> dict[str, str]:
    return {
        str(entry["worker"]): name
        for name, master in stage.masters.items()
        for entry in master.entries("worker.ready", "worker.registered", "worker.stopped")
    }
