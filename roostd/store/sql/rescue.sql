-- Frees the claims whose worker has no row: it was removed as stale, as a dead predecessor, or by itself at its end.
-- An attempt is spent, a crash is not: what died was the worker, not the job's own process.
-- Called by: every master's reaper, after remove_stale_workers; at start, for its predecessor on this host.
-- Locks: the claims and their job rows (SKIP LOCKED: two reapers share the work, and what an open transaction cancels or
-- depends on is left to a later round). Scans claims, which hold what runs now.
WITH lost AS MATERIALIZED (
    SELECT c.job_id, c.lease
      FROM roost.claims c
      JOIN roost.job_rows j ON j.id = c.job_id
     WHERE NOT EXISTS (SELECT 1 FROM roost.workers w WHERE w.id = c.worker_id)
     LIMIT 1000
       FOR UPDATE OF c SKIP LOCKED
       FOR NO KEY UPDATE OF j SKIP LOCKED
), ended AS MATERIALIZED (
    DELETE FROM roost.claims
     USING lost
     WHERE claims.job_id = lost.job_id AND claims.lease = lost.lease
    RETURNING claims.job_id, claims.lease, claims.attempt, claims.claimed_at, claims.cancel_requested
), job AS (
    UPDATE roost.job_rows AS j
       SET state = CASE WHEN ended.cancel_requested THEN 'cancelled'
                        WHEN ended.attempt < j.max_attempts THEN 'retryable'
                        ELSE 'discarded' END,
           attempt = ended.attempt,
           attempted_at = ended.claimed_at,
           scheduled_at = now(),
           discarded_at = CASE WHEN NOT ended.cancel_requested AND ended.attempt >= j.max_attempts THEN now() END,
           cancelled_at = CASE WHEN ended.cancel_requested THEN now() END,
           cancel_requested = ended.cancel_requested,
           errors = roost.append_error(j.errors, ended.attempt, %(error)s::jsonb, %(error_cap)s::integer)
      FROM ended
     WHERE j.id = ended.job_id AND j.state IN ('available', 'retryable')
    RETURNING j.id, j.state, j.queue, j.priority, j.scheduled_at
), due AS (
    INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
    SELECT job.queue, job.priority, job.scheduled_at, job.id FROM job WHERE job.state = 'retryable'
    RETURNING queue
), told AS (
    SELECT count(roost.notify_idle(d.queue)) AS queues FROM (SELECT DISTINCT due.queue FROM due) AS d
), followed AS MATERIALIZED (
    SELECT roost.after_end(array_agg(job.id)) AS parents FROM job WHERE job.state IN ('discarded', 'cancelled')
)
SELECT job.id, job.state FROM job, told, followed
