-- Claims one job under a new lease: the one named, wherever it waits, or else (NULL) the first that is due, of `queues` (NULL: all)
-- that are not paused; with `early` the next of those that are scheduled when none is due. The limits of tasks don't count.
-- No row: there is none.
-- Called by: testing.py, in the transaction of a test; never by a daemon, for which it reads too much.
-- Locks: the row that says where the job waits. Scans ready, throttled, and scheduled.
WITH waiting AS (
    SELECT r.job_id, r.queue, r.priority, r.scheduled_at FROM roost.ready r
     UNION ALL
    SELECT t.job_id, t.queue, t.priority, t.scheduled_at FROM roost.throttled t
     UNION ALL
    SELECT s.job_id, s.queue, s.priority, s.scheduled_at FROM roost.scheduled s
     WHERE s.scheduled_at <= now() OR %(early)s::boolean OR s.job_id = %(job_id)s::bigint
), chosen AS MATERIALIZED (
    SELECT waiting.job_id
      FROM waiting
     WHERE CASE WHEN %(job_id)s::bigint IS NOT NULL THEN waiting.job_id = %(job_id)s::bigint
                ELSE (%(queues)s::text[] IS NULL OR waiting.queue = ANY (%(queues)s::text[]))
                     AND NOT EXISTS (SELECT 1 FROM roost.queues p WHERE p.name = waiting.queue AND p.paused) END
     ORDER BY greatest(waiting.scheduled_at, now()), waiting.priority, waiting.scheduled_at, waiting.job_id
     LIMIT 1
), job AS MATERIALIZED (
    SELECT j.*, nextval('roost.lease_seq') AS lease
      FROM chosen
      JOIN roost.job_rows j ON j.id = chosen.job_id AND j.state IN ('available', 'retryable')
     WHERE roost.unplace(j)
), claim AS (
    INSERT INTO roost.claims (job_id, lease, worker_id, attempt)
    SELECT job.id, job.lease, %(worker_id)s::uuid, job.attempt + 1 FROM job
)
SELECT job.id, job.lease, job.attempt + 1 AS attempt, job.max_attempts, job.crashes, job.timeout_seconds, job.queue, job.task,
       job.args::text, job.priority, job.scheduled_at::text,
       CASE WHEN job.tags IS NOT NULL OR job.metadata IS NOT NULL
            THEN json_build_object('tags', job.tags, 'metadata', job.metadata)::text END AS labels
  FROM job
