"""The application's side of a campaign: enqueues, cancels, pauses, and says again what may not have been heard.

In a thread of its own, past the proxy, so that it goes on whatever is broken. Its word on what was enqueued is what the
checker goes by: a job whose enqueue was acknowledged must not be lost.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from chaos.evidence import Enqueued, Pause
from chaos.jobs import PAUSED_QUEUE
from chaos.plan import Plan, PlannedJob
from chaos.stage import Stage
from roost_client import JobInsert, Roost, RoostError

_PAUSE_SECONDS = 0.05


class Application:
    def __init__(self, stage: Stage, plan: Plan) -> None:
        self.step = 0
        self.told = Enqueued()
        self.failure: BaseException | None = None
        self._stage = stage
        self._plan = plan
        self._cancelled: set[int] = set()
        self._paused = False
        self._last_id = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="application")

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def has_enqueued(self) -> bool:
        """Whether all of the plan is in, once the step is the last."""
        return len(self.told.ids) == len(self._plan.jobs)

    def _run(self) -> None:
        with Roost(self._stage.dsn) as roost:
            while not self._ended.wait(_PAUSE_SECONDS):
                try:
                    with self._stage.connect() as conn:
                        self._act(roost, conn, self.step)
                except (psycopg.Error, RoostError):
                    continue  # the database is away: all of this is said again
                except BaseException as error:
                    self.failure = error
                    raise

    def _act(self, roost: Roost, conn: psycopg.Connection[Any], step: int) -> None:
        self._enqueue(
            roost, conn, [job for job in self._plan.jobs if job.step <= step and job.key not in self.told.ids]
        )
        self._pause(roost, conn, step)
        self._cancel(roost, conn, step)

    def _enqueue(self, roost: Roost, conn: psycopg.Connection[Any], jobs: list[PlannedJob]) -> None:
        # What an enqueue whose answer was lost has left there is found first.
        self._find(conn)
        missing = [job for job in jobs if job.key not in self.told.ids]
        inserts: dict[int, JobInsert] = {}
        for job in missing:
            parents = [self.told.ids.get(key) or inserts.get(key) for key in job.parents]
            if None not in parents:
                inserts[job.key] = _insert(job, parents)
        if inserts:  # a unique job whose key is taken is left out, and enqueued once it is free
            roost.enqueue_many(inserts.values())
            self._find(conn)

    def _find(self, conn: psycopg.Connection[Any]) -> None:
        rows = conn.execute(
            "SELECT id, (args ->> 'key')::bigint FROM roost.job_rows"
            " WHERE id > %s AND NOT coalesce(metadata, '{}') ? 'cron' ORDER BY id",
            (self._last_id,),
        ).fetchall()
        for job_id, key in rows:
            self._last_id = job_id
            if key >= 0:
                assert key not in self.told.ids, f"key {key} was enqueued twice"
                self.told.ids[key] = job_id

    def _pause(self, roost: Roost, conn: psycopg.Connection[Any], step: int) -> None:
        changes = [paused for at, paused in sorted(self._plan.pauses.items()) if at <= step]
        wanted = changes[-1] if changes and step < self._plan.steps else False
        if wanted == self._paused:
            return
        if wanted:
            roost.pause_queue(PAUSED_QUEUE)
            self.told.pauses.append(Pause(_clock(conn)))
        else:
            if self.told.pauses:
                self.told.pauses[-1].ended_at = _clock(conn)
            roost.resume_queue(PAUSED_QUEUE)
        self._paused = wanted

    def _cancel(self, roost: Roost, conn: psycopg.Connection[Any], step: int) -> None:
        due = [job for job in self._plan.jobs if job.cancel_step is not None and job.cancel_step <= step]
        ids = [self.told.ids[job.key] for job in due if job.key in self.told.ids]
        on_run = [
            self.told.ids[j.key] for j in self._plan.jobs if j.draft.cancel == "running" and j.key in self.told.ids
        ]
        running = conn.execute(
            "SELECT c.job_id FROM roost.claims c WHERE c.job_id = ANY (%s) AND c.claimed_at < now() - interval '0.2 s'",
            ([job_id for job_id in on_run if job_id not in self._cancelled],),
        ).fetchall()
        ids += [row[0] for row in running]
        for job_id in ids:
            if job_id not in self._cancelled:
                roost.cancel(job_id)
                self._cancelled.add(job_id)


def _clock(conn: psycopg.Connection[Any]) -> float:
    row = conn.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone()
    assert row is not None
    return float(row[0])


def _insert(job: PlannedJob, parents: Sequence[Any]) -> JobInsert:
    draft = job.draft
    delay = timedelta(seconds=draft.delay_seconds)
    return JobInsert(
        draft.task,
        dict(draft.args),
        queue=draft.queue,
        max_attempts=draft.max_attempts,
        timeout_seconds=draft.timeout_seconds,
        scheduled_at=datetime.now(UTC) + delay if delay else None,
        unique_key=draft.unique_key,
        depends_on=parents,
    )
