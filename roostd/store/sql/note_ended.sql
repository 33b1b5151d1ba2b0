-- Notes, of up to 1,000 parents after `after`, those that have ended and are not noted: who ended them was a worker from before
-- jobs could depend on others. Returns the last parent looked at (NULL: there is none), to go on after.
-- Called by: every master, until there is none, at the first round of its reaper: by then the worker in whose place it was
-- started has ended, too. Locks: none but the new rows. Index: primary keys; reads a row a parent that has dependents.
WITH RECURSIVE parent AS (
    (SELECT d.parent_id, 1 AS number FROM roost.dependencies d
      WHERE d.parent_id > %(after)s::bigint ORDER BY d.parent_id LIMIT 1)
    UNION ALL
    SELECT next.parent_id, parent.number + 1
      FROM parent
     CROSS JOIN LATERAL (SELECT d.parent_id FROM roost.dependencies d
                          WHERE d.parent_id > parent.parent_id ORDER BY d.parent_id LIMIT 1) AS next
     WHERE parent.number < 1000
), noted AS (
    INSERT INTO roost.ended_parents (job_id)
    SELECT j.id
      FROM parent
      JOIN roost.job_rows j ON j.id BETWEEN parent.parent_id AND parent.parent_id
       AND j.state IN ('completed', 'discarded', 'cancelled')
     ORDER BY parent.parent_id
    ON CONFLICT (job_id) DO NOTHING
)
SELECT max(parent.parent_id) FROM parent
