-- Moves up to 1,000 jobs of a span that ended longer than `age` seconds ago from job_rows to the archive. Returns how many.
-- Not those whose dependents have yet to be told: that looks for the job in job_rows. Nothing in the archive is retried: so
-- what its end has cancelled, or whose end cancelled it, need not be known any more.
-- Called by: every master, at every archive_interval. One statement: what is killed in it has moved nothing.
-- Locks: the job rows (SKIP LOCKED: masters share the work, and an enqueue that depends on a job keeps it where it is).
-- Index: primary keys.
WITH old AS MATERIALIZED (
    SELECT j.id
      FROM roost.job_rows j
     WHERE j.id BETWEEN %(span)s::bigint * 10000 AND %(span)s::bigint * 10000 + 9999
       AND j.state IN ('completed', 'discarded', 'cancelled')
       AND coalesce(j.completed_at, j.discarded_at, j.cancelled_at) < now() - make_interval(secs => %(age)s::float8)
       AND NOT EXISTS (SELECT 1 FROM roost.ended_parents e WHERE e.job_id BETWEEN j.id AND j.id)
       AND NOT EXISTS (SELECT 1 FROM roost.dependencies d WHERE d.parent_id BETWEEN j.id AND j.id)
     ORDER BY j.id
     LIMIT 1000
       FOR UPDATE SKIP LOCKED
), moved AS MATERIALIZED (
    DELETE FROM roost.job_rows AS j
     USING old
     WHERE j.id BETWEEN old.id AND old.id AND j.state IN ('completed', 'discarded', 'cancelled')
    RETURNING j.*
), forgotten_children AS (
    DELETE FROM roost.cancelled_dependents AS c
     USING moved
     WHERE c.parent_id BETWEEN moved.id AND moved.id
), forgotten_parents AS (  -- an edge at a time, by both of its columns
    DELETE FROM roost.cancelled_dependents AS c
     USING moved m
     CROSS JOIN LATERAL unnest(m.depends_on) AS d(parent_id)
     CROSS JOIN LATERAL (SELECT x.ctid AS row_id FROM roost.cancelled_dependents x
                          WHERE x.parent_id = d.parent_id AND x.child_id = m.id
                         OFFSET 0) AS edge
     WHERE m.state = 'cancelled' AND c.ctid = edge.row_id
), archived AS (
    INSERT INTO roost.jobs_archive
           (id, scheduled_at, inserted_at, attempted_at, completed_at, cancelled_at, discarded_at, priority, attempt, max_attempts,
            crashes, timeout_seconds, cancel_requested, state, queue, task, args, unique_key, tags, depends_on, metadata, errors,
            result)
    SELECT m.id, m.scheduled_at, m.inserted_at, m.attempted_at, m.completed_at, m.cancelled_at, m.discarded_at, m.priority,
           m.attempt, m.max_attempts, m.crashes, m.timeout_seconds, m.cancel_requested, m.state, m.queue, m.task, m.args,
           m.unique_key, coalesce(m.tags, '{}'), coalesce(m.depends_on, '{}'), coalesce(m.metadata, '{}'),
           coalesce(m.errors, '[]'), m.result
      FROM moved m
    RETURNING 1
)
SELECT count(*) FROM archived
