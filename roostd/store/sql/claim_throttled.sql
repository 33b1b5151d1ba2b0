-- Claims jobs of throttled tasks as far as their limits allow, best first, up to `most_throttled`, and none that would not be
-- among the best `limit` if those of ready were claimed along. Each row but the last is a job; the last says whether more could be
-- claimed now, and in how many seconds time makes room for more (null: that takes the end of a job).
-- Called by: the master, when a pool has room and core/throttle.py says so; alone in its transaction, so that no lock is held for
-- longer than the statement takes, whatever becomes of the master.
-- Locks: the rows of throttles of the tasks that have jobs waiting in these queues, and the throttled rows it takes (SKIP LOCKED).
-- Index: primary keys, of claims that on its task.
SELECT (f.job).id, f.lease, (f.job).attempt + 1 AS attempt, (f.job).max_attempts, (f.job).crashes, (f.job).timeout_seconds,
       (f.job).queue, (f.job).task, (f.job).args::text, (f.job).priority, (f.job).scheduled_at::text,
       CASE WHEN (f.job).tags IS NOT NULL OR (f.job).metadata IS NOT NULL
            THEN json_build_object('tags', (f.job).tags, 'metadata', (f.job).metadata)::text END AS labels,
       f.has_rate, f.more, f.next_in_seconds
  FROM roost.claim_throttled(
           %(worker_id)s::uuid, %(queues)s::text[], %(range_queues)s::text[], %(priorities)s::integer[],
           %(scheduled_ats)s::timestamptz[], %(job_ids)s::bigint[], %(last_priorities)s::integer[],
           %(early_seconds)s::float8[], %(limit)s::integer, %(most_throttled)s::integer, %(window_seconds)s::float8
       ) AS f
