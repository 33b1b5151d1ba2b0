-- Locks those of the claims named that nobody else has locked. Returns the leases of the others: a claim that is gone,
-- or stands under another lease, is neither locked nor returned.
-- Called by: the master, in the transaction of a complete or settle that may not wait for another's lock on a claim.
-- Locks: the claims named (SKIP LOCKED, so in any order). Index: claims' primary key.
-- LATERAL, not NOT EXISTS over what was locked: with no plan but nested loops that would be quadratic.
SELECT held.lease
  FROM unnest(%(job_ids)s::bigint[], %(leases)s::bigint[]) AS o(job_id, lease)
  JOIN roost.claims AS held ON held.job_id BETWEEN o.job_id AND o.job_id AND held.lease = o.lease
  LEFT JOIN LATERAL (
       SELECT c.lease
         FROM roost.claims AS c
        WHERE c.job_id = held.job_id AND c.lease = held.lease
          FOR UPDATE SKIP LOCKED
       ) AS free ON true
 WHERE free.lease IS NULL
