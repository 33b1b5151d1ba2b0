-- Moves up to 1,000 scheduled jobs that are due to where they may be claimed, and tells idle workers of their queues.
-- With past_seconds only jobs that fell due since then: see core/frontier.py.
-- Returns how many, in how many seconds the next one is due (null: none), whether any task has, or had, limits, and whether
-- there are parents whose end has yet to be told.
-- Called by: every master, at every poll. Locks: the scheduled rows it moves (SKIP LOCKED). Index: scheduled's primary key.
WITH due AS MATERIALIZED (
    SELECT s.ctid AS row_id
      FROM roost.scheduled s
     WHERE s.scheduled_at <= now()
       AND s.scheduled_at >= coalesce(now() - make_interval(secs => %(past_seconds)s::float8), '-infinity')
     ORDER BY s.scheduled_at, s.job_id
     LIMIT 1000
       FOR UPDATE SKIP LOCKED
), taken AS (
    DELETE FROM roost.scheduled
     USING due
     WHERE scheduled.ctid = due.row_id
    RETURNING scheduled.queue, scheduled.priority, scheduled.scheduled_at, scheduled.job_id
), moved AS (
    INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
    SELECT taken.queue, taken.priority, taken.scheduled_at, taken.job_id FROM taken
    RETURNING queue
), told AS (
    SELECT coalesce(sum(d.jobs), 0)::bigint AS jobs, count(roost.notify_idle(d.queue)) AS queues
      FROM (SELECT moved.queue, count(*) AS jobs FROM moved GROUP BY moved.queue) AS d
)
SELECT told.jobs,
       (SELECT extract(epoch FROM s.scheduled_at - now())::float8 FROM roost.scheduled s
         WHERE s.scheduled_at > now() ORDER BY s.scheduled_at LIMIT 1) AS next_in_seconds,
       EXISTS (SELECT 1 FROM roost.throttles) AS limits,
       EXISTS (SELECT 1 FROM roost.ended_parents) AS ended_parents
  FROM told
