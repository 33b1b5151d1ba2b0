-- Claims up to `limit` jobs of the ranges of queues that may run now, best first, under a new lease each. A job of a throttled
-- task is moved to throttled instead, and returned with the lease 0.
-- Called by: the master, whenever a pool has room.
-- Locks: the ready rows it takes (SKIP LOCKED: claimers never wait for each other).
-- Index: ready's primary key: the ranges of each queue in their order until there is enough; job_rows by id; throttles by its
-- primary key, once.
-- MATERIALIZED states what keeps the limit: run again, as a sub-select may be, the first part would lock more rows than asked
-- for. PostgreSQL 15 to 18 materialise a part that locks rows in any case: the plans are the same without the word.
-- A worker that was declared dead (its row is gone) claims nothing.
WITH candidate AS MATERIALIZED (
    SELECT best.row_id, best.priority, best.scheduled_at, best.job_id
      FROM unnest(%(queues)s::text[]) AS queue(name)
     CROSS JOIN LATERAL (
           SELECT r.row_id, r.priority, r.scheduled_at, r.job_id
             FROM unnest(%(range_queues)s::text[], %(priorities)s::integer[], %(scheduled_ats)s::timestamptz[],
                         %(job_ids)s::bigint[], %(last_priorities)s::integer[], %(early_seconds)s::float8[])
                  AS past(queue, priority, scheduled_at, job_id, last_priority, early_seconds)
            CROSS JOIN LATERAL (
                  SELECT ready.ctid AS row_id, ready.priority, ready.scheduled_at, ready.job_id
                    FROM roost.ready
                   WHERE ready.queue = past.queue COLLATE "C" AND ready.priority <= past.last_priority
                     AND (ready.priority, ready.scheduled_at, ready.job_id)
                         > (past.priority, past.scheduled_at - make_interval(secs => past.early_seconds), past.job_id)
                   ORDER BY ready.priority, ready.scheduled_at, ready.job_id
                   LIMIT %(limit)s::integer
                     FOR UPDATE SKIP LOCKED
                  ) AS r
            WHERE past.queue = queue.name
            LIMIT %(limit)s::integer
           ) AS best
     WHERE NOT EXISTS (SELECT 1 FROM roost.queues p WHERE p.name = queue.name COLLATE "C" AND p.paused)
       AND EXISTS (SELECT 1 FROM roost.workers w WHERE w.id = %(worker_id)s::uuid)
     ORDER BY best.priority, best.scheduled_at, best.job_id
     LIMIT %(limit)s::integer
), taken AS MATERIALIZED (
    DELETE FROM roost.ready
     USING candidate
     WHERE ready.ctid = candidate.row_id
    RETURNING ready.job_id, ready.priority, ready.scheduled_at
), job AS MATERIALIZED (
    SELECT j.id,
           CASE WHEN j.task = ANY (ARRAY(SELECT t.task FROM roost.throttles t WHERE t.limited)) THEN 0
                ELSE nextval('roost.lease_seq') END AS lease,
           j.attempt + 1 AS attempt, j.max_attempts, j.crashes,
           j.timeout_seconds, j.queue, j.task, j.args, j.priority, j.scheduled_at, j.tags, j.metadata
      FROM (SELECT taken.job_id FROM taken ORDER BY taken.priority, taken.scheduled_at, taken.job_id) AS t
      JOIN roost.job_rows j ON j.id BETWEEN t.job_id AND t.job_id AND j.state IN ('available', 'retryable')
), claim AS (
    INSERT INTO roost.claims (job_id, lease, worker_id, attempt)
    SELECT job.id, job.lease, %(worker_id)s::uuid, job.attempt FROM job WHERE job.lease > 0
), set_aside AS (
    INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id)
    SELECT job.task, job.queue, job.priority, job.scheduled_at, job.id FROM job WHERE job.lease = 0
)
SELECT job.id, job.lease, job.attempt, job.max_attempts, job.crashes, job.timeout_seconds, job.queue, job.task, job.args::text,
       job.priority, job.scheduled_at::text,
       CASE WHEN job.tags IS NOT NULL OR job.metadata IS NOT NULL
            THEN json_build_object('tags', job.tags, 'metadata', job.metadata)::text END AS labels
  FROM job
