-- Completes claimed jobs with their results (JSON text; a results array that is too short means null for the rest).
-- Returns the leases that were still ours; a late report under an earlier lease changes nothing. And, the same in every row,
-- the jobs among them of which dependents are to be told (NULL: none): see follow_parents.sql.
-- Called by: the master, a batch at a time. Safe to repeat after a lost answer.
-- Locks: the claims and job rows named, in order of id: a batch repeated while its first sending still runs can't deadlock.
-- On what another has locked (a cancel in an open transaction, an enqueue that depends on the job) it waits for
-- lock_timeout: see lock_claims.sql.
-- Index: primary keys; the update of job_rows is HOT.
WITH outcome AS MATERIALIZED (
    SELECT o.job_id, o.lease, o.result
      FROM unnest(%(job_ids)s::bigint[], %(leases)s::bigint[], %(results)s::text[]) AS o(job_id, lease, result)
     ORDER BY o.job_id
), ended AS MATERIALIZED (
    DELETE FROM roost.claims
     USING outcome
     WHERE claims.job_id BETWEEN outcome.job_id AND outcome.job_id AND claims.lease = outcome.lease
    RETURNING claims.job_id, claims.lease, claims.attempt, claims.claimed_at, claims.cancel_requested, outcome.result
), completed AS (
    UPDATE roost.job_rows
       SET state = 'completed', attempt = ended.attempt, attempted_at = ended.claimed_at, completed_at = now(),
           cancel_requested = ended.cancel_requested, result = ended.result::jsonb
      FROM ended
     WHERE job_rows.id BETWEEN ended.job_id AND ended.job_id AND job_rows.state IN ('available', 'retryable')
    RETURNING job_rows.id, ended.lease, job_rows.unique_key IS NOT NULL AS has_key, job_rows.awaited
), followed AS MATERIALIZED (
    SELECT roost.after_end(array_agg(completed.id), array_agg(completed.id) FILTER (WHERE completed.has_key),
                           array_agg(completed.id) FILTER (WHERE completed.awaited)) AS parents
      FROM completed
    HAVING count(*) > 0
)
SELECT completed.lease, followed.parents
  FROM completed, followed
