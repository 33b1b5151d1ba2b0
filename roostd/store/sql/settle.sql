-- Ends claims in every way but completion: retryable, discarded, snoozed, cancelled, released (state null: as before).
-- A cancel that was asked for meanwhile beats every state but the terminal ones. Returns the leases still ours, with the state
-- and, the same in every row, the jobs of which dependents are to be told (NULL: none): see follow_parents.sql.
-- Called by: the master, a batch at a time, with what core/outcome.py decided. Safe to repeat after a lost answer.
-- Locks: the claims and job rows named, in order of id: a batch repeated while its first sending still runs can't deadlock.
-- On what another has locked (a cancel in an open transaction, an enqueue that depends on the job) it waits for
-- lock_timeout: see lock_claims.sql.
-- Index: primary keys; the update of job_rows is HOT where it adds no error and does not discard or cancel.
WITH outcome AS MATERIALIZED (
    SELECT o.job_id, o.lease, o.state, o.delay_seconds, o.error, o.counts_attempt, o.counts_crash
      FROM unnest(%(job_ids)s::bigint[], %(leases)s::bigint[], %(states)s::text[], %(delays)s::float8[],
                  %(errors)s::text[], %(counts_attempt)s::boolean[], %(counts_crash)s::boolean[])
           AS o(job_id, lease, state, delay_seconds, error, counts_attempt, counts_crash)
     ORDER BY o.job_id
), ended AS MATERIALIZED (
    DELETE FROM roost.claims
     USING outcome
     WHERE claims.job_id BETWEEN outcome.job_id AND outcome.job_id AND claims.lease = outcome.lease
    RETURNING claims.job_id, claims.lease, claims.attempt, claims.claimed_at, claims.cancel_requested,
              CASE WHEN claims.cancel_requested AND outcome.state IS DISTINCT FROM 'discarded' THEN 'cancelled'
                   ELSE outcome.state END AS state,
              outcome.delay_seconds, outcome.error, outcome.counts_attempt, outcome.counts_crash
), job AS (
    UPDATE roost.job_rows AS j
       SET state = coalesce(ended.state, j.state),
           attempt = CASE WHEN ended.counts_attempt THEN ended.attempt ELSE j.attempt END,
           attempted_at = CASE WHEN ended.counts_attempt THEN ended.claimed_at ELSE j.attempted_at END,
           crashes = j.crashes + ended.counts_crash::integer,
           scheduled_at = CASE WHEN ended.state IN ('available', 'retryable')
                               THEN now() + make_interval(secs => ended.delay_seconds) ELSE j.scheduled_at END,
           discarded_at = CASE WHEN ended.state = 'discarded' THEN now() END,
           cancelled_at = CASE WHEN ended.state = 'cancelled' THEN now() END,
           cancel_requested = ended.cancel_requested,
           errors = CASE WHEN ended.error IS NULL THEN j.errors
                         ELSE roost.append_error(j.errors, ended.attempt, ended.error::jsonb, %(error_cap)s::integer) END
      FROM ended
     WHERE j.id BETWEEN ended.job_id AND ended.job_id AND j.state IN ('available', 'retryable')
    RETURNING j.id, ended.lease, j.state, j.queue, j.priority, j.scheduled_at, j.unique_key IS NOT NULL AS has_key, j.awaited
), due AS (
    INSERT INTO roost.ready (queue, priority, scheduled_at, job_id)
    SELECT job.queue, job.priority, job.scheduled_at, job.id FROM job
     WHERE job.state IN ('available', 'retryable') AND job.scheduled_at <= now()
    RETURNING queue
), later AS (
    INSERT INTO roost.scheduled (scheduled_at, job_id, priority, queue)
    SELECT job.scheduled_at, job.id, job.priority, job.queue FROM job
     WHERE job.state IN ('available', 'retryable') AND job.scheduled_at > now()
), told AS (
    SELECT count(roost.notify_idle(d.queue)) AS queues FROM (SELECT DISTINCT due.queue FROM due) AS d
), followed AS MATERIALIZED (
    SELECT roost.after_end(array_agg(job.id), array_agg(job.id) FILTER (WHERE job.has_key),
                           array_agg(job.id) FILTER (WHERE job.awaited)) AS parents
      FROM job WHERE job.state IN ('discarded', 'cancelled')
    HAVING count(*) > 0
)
SELECT job.lease, job.state, (SELECT followed.parents FROM followed) AS parents
  FROM job, told
