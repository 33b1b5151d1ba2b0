-- Locks those of the claims named, with their job rows, that nobody else has locked. Returns the leases of the others: a claim
-- that is gone, or stands under another lease, is neither locked nor returned.
-- Called by: the master, in the transaction of a complete or settle that may not wait for another's lock: of a cancel on the
-- claim, of an enqueue that depends on the job on its row.
-- Locks: the claims and job rows named (SKIP LOCKED, so in any order). Index: primary keys.
-- LATERAL, not NOT EXISTS over what was locked: with no plan but nested loops that would be quadratic.
SELECT held.lease
  FROM unnest(%(job_ids)s::bigint[], %(leases)s::bigint[]) AS o(job_id, lease)
  JOIN roost.claims AS held ON held.job_id BETWEEN o.job_id AND o.job_id AND held.lease = o.lease
  LEFT JOIN LATERAL (
       SELECT c.lease
         FROM roost.claims AS c
         JOIN roost.job_rows AS j ON j.id BETWEEN held.job_id AND held.job_id
        WHERE c.job_id = held.job_id AND c.lease = held.lease
          FOR UPDATE OF c SKIP LOCKED
          FOR NO KEY UPDATE OF j SKIP LOCKED
       ) AS free ON true
 WHERE free.lease IS NULL
