-- Completing a job in the transaction of its own handler.
--
-- The claim's row decides between the two who may end it: whoever deletes it under its lease. A worker whose child has
-- completed its job here finds no claim and changes nothing; a handler whose lease is gone gets false, and must roll back.

-- Completes the job that is claimed under this lease, as the worker would, in the caller's transaction. Returns false,
-- with nothing changed, when the lease is no longer that of a claim: the job was taken from its worker, or has ended.
-- A cancel that was asked for meanwhile changes nothing about a job that completes.
-- Locks as the worker's statements do: the claim first, then its row of job_rows; both until the transaction ends.
CREATE FUNCTION roost.complete(job_id bigint, lease bigint, result jsonb DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
    ended roost.claims%ROWTYPE;
BEGIN
    DELETE FROM roost.claims c WHERE c.job_id = job_id AND c.lease = lease RETURNING c.* INTO ended;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE roost.job_rows j
       SET state = 'completed', attempt = ended.attempt, attempted_at = ended.claimed_at, completed_at = now(),
           cancel_requested = ended.cancel_requested, result = result
     WHERE j.id = job_id AND j.state IN ('available', 'retryable');
    PERFORM roost.after_end(ARRAY[job_id]);
    RETURN true;
END $$;
