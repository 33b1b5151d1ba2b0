-- Moves jobs of throttled tasks out of ready, of the first `limit` in each of these ranges: where a task was limited when many of
-- its jobs were waiting already, or many come back at once, a claim alone would do it too few at a time. Returns how many.
-- Called by: the master, after a claim that met any.
-- Locks: the ready rows it moves (SKIP LOCKED). Index: primary keys.
WITH met AS MATERIALIZED (
    SELECT r.row_id, j.task
      FROM unnest(%(range_queues)s::text[], %(priorities)s::integer[], %(scheduled_ats)s::timestamptz[],
                  %(job_ids)s::bigint[], %(last_priorities)s::integer[], %(early_seconds)s::float8[])
           AS past(queue, priority, scheduled_at, job_id, last_priority, early_seconds)
     CROSS JOIN LATERAL (
           SELECT ready.ctid AS row_id, ready.job_id
             FROM roost.ready
            WHERE ready.queue = past.queue COLLATE "C" AND ready.priority <= past.last_priority
              AND (ready.priority, ready.scheduled_at, ready.job_id)
                  > (past.priority, past.scheduled_at - make_interval(secs => past.early_seconds), past.job_id)
            ORDER BY ready.priority, ready.scheduled_at, ready.job_id
            LIMIT %(limit)s::integer
           ) AS r
      JOIN roost.job_rows j ON j.id BETWEEN r.job_id AND r.job_id
     WHERE j.task = ANY (ARRAY(SELECT t.task FROM roost.throttles t WHERE t.limited))
), free AS MATERIALIZED (
    SELECT locked.row_id, met.task
      FROM met
     CROSS JOIN LATERAL (SELECT ready.ctid AS row_id FROM roost.ready WHERE ready.ctid = met.row_id
                            FOR UPDATE SKIP LOCKED) AS locked
), taken AS (
    DELETE FROM roost.ready
     USING free
     WHERE ready.ctid = free.row_id
    RETURNING free.task, ready.queue, ready.priority, ready.scheduled_at, ready.job_id
), moved AS (
    INSERT INTO roost.throttled (task, queue, priority, scheduled_at, job_id)
    SELECT taken.task, taken.queue, taken.priority, taken.scheduled_at, taken.job_id FROM taken
    RETURNING job_id
)
SELECT count(*) FROM moved
